// Opening and closing: from an artifact's bytes to an engine that is ready to run, in two blocks of memory.
//
// The first holds the engine and its description of the programs, the second the regions. evensong_open takes both from
// calloc, the second only once the artifact is verified; evensong_open_in lays them one behind the other.
#include "engine.hpp"
#include "opcodes.h"
#include "workspace.hpp"

#if !defined(EVENSONG_NO_HEAP)
#include <stdlib.h>
#endif

using namespace evensong;
using workspace::larger;

namespace {

// Under the address sanitizer a poisoned gap follows each region, so that leaving one is found out.
#if defined(__SANITIZE_ADDRESS__)
#define EVENSONG_SANITIZE_ADDRESS
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EVENSONG_SANITIZE_ADDRESS
#endif
#endif
#if defined(EVENSONG_SANITIZE_ADDRESS)
extern "C" void __asan_poison_memory_region(const volatile void* address, size_t size);
extern "C" void __asan_unpoison_memory_region(const volatile void* address, size_t size);
constexpr size_t kGap = kAlignment;
void poison(char* address, size_t size) { __asan_poison_memory_region(address, size); }
void unpoison(char* address, size_t size) { __asan_unpoison_memory_region(address, size); }
#else
constexpr size_t kGap = 0;
void poison(char*, size_t) {}
void unpoison(char*, size_t) {}
#endif

// ------------------------------------------------------------------------------------------------- how much memory

struct Request {
    const void* bytes;
    size_t size;
    bool borrow;
    Sections sections;
    Parts parts;
};

// The constants of borrowed bytes stay where they are.
uint64_t own_constants(const Request& request) { return request.borrow ? 0 : request.parts.constants; }

struct Regions {
    static constexpr int kCount = 6;
    uint64_t size[kCount];  // constants, state, slots, arena, workspace, saved statistics

    explicit Regions(const Request& request)
        : size{own_constants(request), request.parts.state,     request.parts.slots,
               request.parts.arena,    request.parts.workspace, request.parts.buffer_bytes} {}
    uint64_t total() const {
        uint64_t total = 0;
        for (uint64_t bytes : size) total += align(bytes) + kGap;
        return total;
    }
};

uint64_t description_bytes(const Parts& parts) {
    const uint64_t ready = Block::round_up(parts.variables) + Block::round_up(parts.programs * sizeof(Prepared)) +
                           Block::round_up(parts.buffers * sizeof(Statistic)) + parts.operands * sizeof(Operand) +
                           parts.operations * (sizeof(uint32_t) + sizeof(uint8_t)) +
                           parts.programs * 3 * Block::round_up(1);  // three arrays a program, each rounded up
    return align(Block::round_up(sizeof(evensong_engine)) + model_bytes(parts) + larger(ready, model_scratch(parts)));
}

evensong_status fail_without_memory(Report* report) {
    return report->fail(EVENSONG_MEMORY, "the system has no memory left for this artifact");
}

evensong_status read(const void* bytes, size_t size, uint32_t flags, Request* out, Report* report) {
    if (!bytes || flags & ~uint32_t(EVENSONG_BORROW))
        return report->fail(EVENSONG_ARGUMENT, "a null pointer or an unknown flag");
    *out = {bytes, size, (flags & EVENSONG_BORROW) != 0, {}, {}};
    evensong_status status = read_sections(static_cast<const uint8_t*>(bytes), size, &out->sections, report);
    if (status == EVENSONG_OK) out->parts = count_parts(out->sections);
    return status;
}

evensong_status begin(const char* instruction_set, const void* bytes, size_t size, uint32_t flags,
                      evensong_engine** engine, const InstructionSet** isa, Request* request, Report* report) {
    if (!engine) return report->fail(EVENSONG_ARGUMENT, "a null pointer or an unknown flag");
    *isa = find_instruction_set(instruction_set);
    if (!*isa) {
        return report->fail(EVENSONG_ARGUMENT, "instruction set '%s' is not in this build or this CPU",
                            instruction_set);
    }
    return read(bytes, size, flags, request, report);
}

// ------------------------------------------------------------------------------------------------- the description

bool prepare(const Program& program, Block* block, Prepared* out) {
    size_t operands = 0;
    for (const Op& op : program.ops) operands += size_t(op.inputs) + op.outputs;
    if (!out->operands.allocate(block, operands) || !out->first_operand.allocate(block, program.ops.size)) {
        return false;
    }
    size_t operand = 0, number = 0;
    for (const Op& op : program.ops) {
        out->first_operand[number++] = uint32_t(operand);
        out->updates_statistics = out->updates_statistics || op.code == op::BATCH_NORM_TRAIN;
        for (uint32_t i = 0; i < uint32_t(op.inputs) + op.outputs; ++i, ++operand) {
            const Tensor& tensor = program.tensors[op.operands[i]];
            Operand& live = out->operands[operand];
            memcpy(live.dims, tensor.dims, sizeof live.dims);
            live.rank = tensor.rank;
            live.dtype = tensor.dtype;
            live.scale = tensor.scale;
            live.zero_point = tensor.zero_point;
            live.elements = size_t(tensor.elements);
        }
    }
    out->batch = program.max_batch;
    return true;
}

// Makes the engine in `memory`, `size` zeroed bytes; its regions are yet to come.
evensong_status describe(const Request& request, const InstructionSet* isa, void* memory, size_t size,
                         evensong_engine** out, Report* report) {
    Block block(memory, size);
    evensong_engine* engine = static_cast<evensong_engine*>(block.take(sizeof(evensong_engine)));
    Model& model = engine->model;
    if (evensong_status status = parse(request.sections, request.parts, &block, &model, report)) return status;
    if (evensong_status status = verify(&model, report)) return status;
    if (request.borrow && reinterpret_cast<uintptr_t>(model.constants) % kAlignment) {
        return report->fail(EVENSONG_ARGUMENT, "borrowed bytes must start at a multiple of %zu", kAlignment);
    }
    engine->isa = isa;
    isa->fill(engine->kernels);
    for (const Program& program : model.programs) {
        for (const Op& op : program.ops) {
            if (!engine->kernels[op.code])
                return report->fail(EVENSONG_PROGRAM, "this build has no kernel for operation %u", op.code);
        }
    }
    bool ready = engine->frozen.allocate(&block, model.variables.size) &&
                 engine->statistics.allocate(&block, size_t(request.parts.buffers)) &&
                 engine->prepared.allocate(&block, model.programs.size);
    for (size_t i = 0; ready && i < model.programs.size; ++i) {
        ready = prepare(model.programs[i], &block, &engine->prepared[i]);
    }
    if (!ready) return fail_without_memory(report);
    engine->memory.description = size;
    *out = engine;
    return EVENSONG_OK;
}

// ------------------------------------------------------------------------------------------------- the regions

// Operands outside the host's buffers, and the copies of statistics, get their place.
void point_into_regions(evensong_engine* engine) {
    const Model& model = engine->model;
    for (size_t p = 0; p < model.programs.size; ++p) {
        Operand* live = engine->prepared[p].operands.data;
        for (const Op& op : model.programs[p].ops) {
            for (uint32_t i = 0; i < uint32_t(op.inputs) + op.outputs; ++i, ++live) {
                const Tensor& tensor = model.programs[p].tensors[op.operands[i]];
                if (tensor.region <= Region::kArena) live->data = engine->region(tensor.region) + tensor.offset;
            }
        }
    }
    Statistic* next = engine->statistics.data;
    char* saved = engine->saved;
    for (const Variable& variable : model.variables) {
        if (variable.trainable) continue;
        *next++ = {engine->state + variable.offset, saved, size_t(variable.bytes)};
        saved += align(variable.bytes);
    }
}

// `memory` is zero and starts at a multiple of 64. The arena and the workspace are shared by the programs: only one
// runs at a time.
void place_regions(const Request& request, char* memory, evensong_engine* engine) {
    const Regions regions(request);
    char* bases[Regions::kCount];
    char* next = memory;
    for (int i = 0; i < Regions::kCount; ++i) {
        const size_t bytes = size_t(regions.size[i]), end = size_t(align(bytes)) + kGap;
        bases[i] = next;
        poison(next + bytes, end - bytes);
        next += end;
    }
    const Model& model = engine->model;
    memcpy(bases[0], model.constants, size_t(regions.size[0]));
    memcpy(bases[1], model.initial_state, size_t(regions.size[1]));
    engine->constants = request.borrow ? reinterpret_cast<const char*>(model.constants) : bases[0];
    engine->state = bases[1];
    engine->slots = bases[2];
    engine->arena = bases[3];
    engine->workspace = bases[4];
    engine->saved = bases[5];
    const Parts& parts = request.parts;
    engine->memory = {size_t(parts.constants),   size_t(parts.state),     size_t(parts.slots),
                      size_t(parts.arena),       size_t(parts.workspace), size_t(parts.buffer_bytes),
                      engine->memory.description};
    point_into_regions(engine);
}

}  // namespace

// ------------------------------------------------------------------------------------------------- the C face

extern "C" {

#if !defined(EVENSONG_NO_HEAP)

evensong_status evensong_open(const void* bytes, size_t size, uint32_t flags, evensong_engine** engine, char* message,
                              size_t message_capacity) {
    return evensong_open_on(nullptr, bytes, size, flags, engine, message, message_capacity);
}

evensong_status evensong_open_on(const char* instruction_set, const void* bytes, size_t size, uint32_t flags,
                                 evensong_engine** engine, char* message, size_t message_capacity) {
    Report report(message, message_capacity);
    const InstructionSet* isa = nullptr;
    Request request;
    if (evensong_status status = begin(instruction_set, bytes, size, flags, engine, &isa, &request, &report)) {
        return status;
    }
    const uint64_t description = description_bytes(request.parts);
    const uint64_t regions = Regions(request).total() + kAlignment;
    if (larger(description, regions) > SIZE_MAX / 2) return fail_without_memory(&report);
    void* memory = calloc(1, size_t(description));
    if (!memory) return fail_without_memory(&report);
    evensong_engine* opened = nullptr;
    evensong_status status = describe(request, isa, memory, size_t(description), &opened, &report);
    if (status == EVENSONG_OK) {
        opened->owned_regions = calloc(1, size_t(regions));
        status = opened->owned_regions ? EVENSONG_OK : fail_without_memory(&report);
    }
    if (status != EVENSONG_OK) {
        free(memory);
        return status;
    }
    const uintptr_t start = reinterpret_cast<uintptr_t>(opened->owned_regions);
    place_regions(request, static_cast<char*>(opened->owned_regions) + (align(start) - start), opened);
    opened->held_bytes = size_t(description + regions);
    *engine = opened;
    return EVENSONG_OK;
}

#endif

evensong_status evensong_memory_needed(const void* bytes, size_t size, uint32_t flags, size_t* needed, char* message,
                                       size_t message_capacity) {
    Report report(message, message_capacity);
    Request request;
    if (evensong_status status = read(bytes, size, flags, &request, &report)) return status;
    const uint64_t total = description_bytes(request.parts) + Regions(request).total();
    if (total > SIZE_MAX / 2) return fail_without_memory(&report);
    *needed = size_t(total);
    return EVENSONG_OK;
}

evensong_status evensong_open_in(void* memory, size_t memory_size, const char* instruction_set, const void* bytes,
                                 size_t size, uint32_t flags, evensong_engine** engine, char* message,
                                 size_t message_capacity) {
    Report report(message, message_capacity);
    const InstructionSet* isa = nullptr;
    Request request;
    if (evensong_status status = begin(instruction_set, bytes, size, flags, engine, &isa, &request, &report)) {
        return status;
    }
    if (!memory || reinterpret_cast<uintptr_t>(memory) % kAlignment) {
        return report.fail(EVENSONG_ARGUMENT, "the memory must start at a multiple of %zu", kAlignment);
    }
    const uint64_t description = description_bytes(request.parts), needed = description + Regions(request).total();
    if (needed > memory_size) {
        return report.fail(EVENSONG_MEMORY, "this artifact needs %llu bytes of memory; got %zu",
                           static_cast<unsigned long long>(needed), memory_size);
    }
    memset(memory, 0, size_t(needed));
    evensong_engine* opened = nullptr;
    if (evensong_status status = describe(request, isa, memory, size_t(description), &opened, &report)) return status;
    place_regions(request, static_cast<char*>(memory) + description, opened);
    opened->held_bytes = size_t(needed);
    *engine = opened;
    return EVENSONG_OK;
}

void evensong_close(evensong_engine* engine) {
    if (!engine) return;
#if !defined(EVENSONG_NO_HEAP)
    if (engine->owned_regions) {
        free(engine->owned_regions);
        free(engine);
        return;
    }
#endif
    unpoison(reinterpret_cast<char*>(engine), engine->held_bytes);
}

}  // extern "C"
