// The fuzz target: opens any bytes as an artifact, on every instruction set of this CPU, and runs what is accepted.
//
// What it looks for, besides what the sanitizers find: a run that allocates, an engine that holds more memory than it
// says, and results that depend on the instruction set where they must not. Length and checksum are put right first,
// so that a mutation is not refused for them alone. run.py builds it and makes its corpus.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "evensong.h"
#include "model.hpp"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*allocated)(const volatile void*, size_t),
                                                         void (*freed)(const volatile void*));
extern "C" size_t __sanitizer_get_allocated_size(const volatile void* p);

using namespace evensong;

namespace {

constexpr size_t kHeaderBytes = 64;
constexpr uint64_t kMostMemory = uint64_t(1) << 24;  // larger artifacts are read and verified, but not opened
constexpr uint64_t kMostWork = uint64_t(1) << 22;    // longer programs are opened, but not run
const char* const kInstructionSets[] = {"avx512", "avxvnni", "avx2", "sse2", "dotprod", "neon", "generic"};

[[noreturn]] void fail(const char* what) {
    fprintf(stderr, "fuzz_artifact: %s\n", what);
    abort();
}

// ------------------------------------------------------------------------------------------------- allocations

size_t held_bytes, allocations;

void on_allocation(const volatile void*, size_t size) {
    held_bytes += size;
    ++allocations;
}
void on_free(const volatile void* p) {
    if (p) held_bytes -= __sanitizer_get_allocated_size(p);
}

// ------------------------------------------------------------------------------------------------- bytes

uint32_t crc32c(const uint8_t* data, size_t size) {
    uint32_t value = ~0u;
    for (; size; ++data, --size) {
        value ^= *data;
        for (int bit = 0; bit < 8; ++bit) value = value & 1 ? (value >> 1) ^ 0x82f63b78u : value >> 1;
    }
    return ~value;
}

void repair(uint8_t* bytes, size_t size) {
    const uint64_t length = size;
    const uint32_t checksum = crc32c(bytes + kHeaderBytes, size - kHeaderBytes);
    memcpy(bytes, "EVSG\x01\0", 6);
    memcpy(bytes + 8, &length, 8);
    memcpy(bytes + 16, &checksum, 4);
}

// Draws from the input itself, so that each input always runs alike.
struct Draw {
    uint64_t state;
    uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state >> 33);
    }
    uint32_t below(uint32_t bound) { return next() % bound; }
};

void fill(Draw* draw, DType dtype, void* data, size_t size) {
    static const float kHard[] = {0.0f, -0.0f, 1e-38f, 3e38f, -3e38f, NAN, INFINITY, 1.0f};
    const uint32_t style = draw->below(4);
    for (size_t i = 0; i < size / itemsize(dtype); ++i) {
        if (dtype == DType::kF32) {
            float value = style == 3 ? kHard[draw->below(8)] : (float(draw->below(2001)) - 1000.0f) * 1e-3f;
            static_cast<float*>(data)[i] = value;
        } else if (dtype == DType::kI32) {
            int32_t value = style == 3 ? int32_t(draw->next() * 2u) : int32_t(draw->below(4));
            static_cast<int32_t*>(data)[i] = value;
        } else {
            static_cast<uint8_t*>(data)[i] = uint8_t(draw->next());
        }
    }
}

// ------------------------------------------------------------------------------------------------- one engine

// Host buffers of exactly the right size, on the heap: the address sanitizer sees the first byte beyond.
struct Buffers {
    evensong_buffer list[256];
    uint32_t count;

    Buffers(const evensong_engine* engine, uint32_t program, bool output, uint32_t batch)
        : count(evensong_port_count(engine, program, output)) {
        for (uint32_t i = 0; i < count; ++i) {
            list[i].size = evensong_port_bytes(engine, program, output, i, batch);
            list[i].data = calloc(1, list[i].size);
        }
    }
    ~Buffers() {
        for (uint32_t i = 0; i < count; ++i) free(list[i].data);
    }
};

void run_program(evensong_engine* engine, const Model& model, uint32_t index, Draw draw) {
    const Program& program = model.programs[index];
    const uint32_t batch = 1 + draw.below(program.max_batch < 4 ? program.max_batch : 4);
    Buffers inputs(engine, index, false, batch), outputs(engine, index, true, batch);
    for (uint32_t step = 1; step <= 2; ++step) {
        for (uint32_t i = 0; i < inputs.count; ++i) {
            fill(&draw, program.tensors[program.inputs[i].tensor].dtype, inputs.list[i].data, inputs.list[i].size);
        }
        evensong_options options = {};
        options.learning_rate = step == 1 ? 0.1f : 3e38f;
        options.flags = draw.below(2) ? EVENSONG_CHECK_INPUTS : 0;
        options.step = step;
        options.seed = draw.next();
        char message[160];
        const size_t before = allocations;
        evensong_run(engine, index, batch, inputs.list, inputs.count, outputs.list, outputs.count, &options, message,
                     sizeof message);
        if (allocations != before) fail("a run allocated memory");
    }
}

// In memory of the host's, exactly as much as the engine asks for. Null if it refuses.
evensong_engine* open_in(const char* instruction_set, const uint8_t* bytes, size_t size, uint32_t flags,
                         void** memory) {
    size_t needed;
    char message[160];
    evensong_engine* engine = nullptr;
    if (evensong_memory_needed(bytes, size, flags, &needed, message, sizeof message) != EVENSONG_OK) return nullptr;
    if (posix_memalign(memory, 64, needed)) return nullptr;
    memset(*memory, 0xa5, needed);
    if (needed > 64 && evensong_open_in(*memory, needed - 1, instruction_set, bytes, size, flags, &engine, message,
                                        sizeof message) == EVENSONG_OK) {
        fail("an engine in less memory than it needs");
    }
    evensong_open_in(*memory, needed, instruction_set, bytes, size, flags, &engine, message, sizeof message);
    return engine;
}

void open_and_run(const char* instruction_set, const uint8_t* bytes, size_t size, const Model& model, uint32_t seed) {
    char message[160];
    evensong_engine* engine = nullptr;
    void* memory = nullptr;
    const size_t before = held_bytes;
    const uint32_t flags = seed & 1 ? EVENSONG_BORROW : 0;
    const evensong_status status =
        evensong_open_on(instruction_set, bytes, size, flags, &engine, message, sizeof message);
    if (status != EVENSONG_OK) {
        if (!message[0]) fail("a refusal without a message");
        if (held_bytes != before) fail("a refusal that keeps memory");
        return;
    }
    if (held_bytes - before > evensong_memory_bytes(engine)) fail("an engine holds more than it says");
    if (seed & 2) {
        evensong_close(engine);
        engine = open_in(instruction_set, bytes, size, flags, &memory);
        if (!engine) fail("an artifact that opens, but not in the host's memory");
    }
    Draw draw = {seed};
    if (model.variables.size && draw.below(3) == 0) {
        const uint32_t frozen = draw.below(uint32_t(model.variables.size));
        evensong_freeze(engine, &frozen, 1, message, sizeof message);
    }
    for (uint32_t i = 0; i < model.programs.size; ++i) {
        if (model.programs[i].work <= kMostWork) run_program(engine, model, i, draw);
    }
    evensong_close(engine);
    free(memory);
}

// Parses and verifies into `memory`, which is exactly as large as it has to be.
bool read_model(const uint8_t* bytes, size_t size, void** memory, Model* model) {
    Report report(nullptr, 0);
    Sections sections;
    if (read_sections(bytes, size, &sections, &report) != EVENSONG_OK) return false;
    const Parts parts = count_parts(sections);
    const size_t needed = size_t(model_bytes(parts) + model_scratch(parts));
    *memory = calloc(1, needed);
    Block block(*memory, needed);
    return parse(sections, parts, &block, model, &report) == EVENSONG_OK && verify(model, &report) == EVENSONG_OK;
}

// What an artifact declares, or more than any limit if the bytes are no artifact that could be opened.
uint64_t declared_memory(const Model& model) {
    uint64_t total = model.const_bytes + model.state_bytes + model.slot_bytes;
    for (const Program& program : model.programs) {
        total += program.arena_bytes + program.workspace_bytes;
        for (const Tensor& tensor : program.tensors) total += tensor.region >= Region::kInput ? tensor.bytes : 0;
    }
    return total;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    __sanitizer_install_malloc_and_free_hooks(on_allocation, on_free);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < kHeaderBytes) {
        evensong_engine* engine = nullptr;
        if (evensong_open(data, size, 0, &engine, nullptr, 0) == EVENSONG_OK) fail("a header is not an artifact");
        return 0;
    }
    // Borrowed bytes start at a multiple of 64.
    void* copy = nullptr;
    if (posix_memalign(&copy, 64, size)) return 0;
    uint8_t* bytes = static_cast<uint8_t*>(memcpy(copy, data, size));
    repair(bytes, size);
    uint32_t seed;
    memcpy(&seed, bytes + 16, 4);
    Model model;
    void* memory = nullptr;
    if (!read_model(bytes, size, &memory, &model)) {
        open_and_run(nullptr, bytes, size, model, seed);  // must be refused as well
    } else if (declared_memory(model) <= kMostMemory) {
        for (const char* set : kInstructionSets) open_and_run(set, bytes, size, model, seed);
    }
    free(memory);
    free(copy);
    return 0;
}

// Half of the mutations are libFuzzer's own, half replace a field: a count, a dimension, an offset or an attribute is
// four or eight bytes wide, and most of its values are refused at once.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned int seed) {
    static const uint32_t kHard[] = {0,    1,    2,     3,          4,          5,          63,         64,
                                     65,   127,  128,   255,        256,        0x7fff,     0x8000,     0x10000,
                                     1024, 4096, 32768, 0x3fffffff, 0x40000000, 0x7fffffff, 0x80000000, 0xffffffff};
    Draw draw = {seed};
    if (size < kHeaderBytes + 8 || draw.below(2)) return LLVMFuzzerMutate(data, size, most);
    for (uint32_t changes = 1 + draw.below(3); changes; --changes) {
        uint8_t* field = data + kHeaderBytes + draw.below(uint32_t(size - kHeaderBytes - 4));
        uint32_t value;
        memcpy(&value, field, 4);
        switch (draw.below(5)) {
            case 0:
                value = kHard[draw.below(sizeof kHard / sizeof *kHard)];
                break;
            case 1:
                value += draw.below(9) - 4;
                break;
            case 2:
                value *= 2;
                break;
            case 3:
                memcpy(&value, data + kHeaderBytes + draw.below(uint32_t(size - kHeaderBytes - 4)), 4);
                break;
            default:
                *field = uint8_t(draw.below(8));
                continue;  // a dtype, a region, a rank, a flag
        }
        memcpy(field, &value, 4);
    }
    return size;
}
