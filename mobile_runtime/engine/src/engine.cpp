// The C face: open an artifact, run its programs, close it. include/evensong.h has the rules.
#include <math.h>

#include "evensong.h"
#include "isa.hpp"
#include "model.hpp"
#include "opcodes.h"

using namespace evensong;

namespace {

// Where the live size of an operand or its memory depends on the run.
struct PortOperand {
    uint32_t operand, port;
    bool output;
};

// A program made ready: one Operand for every use of a tensor, in the order of the operations.
struct Prepared {
    Array<Operand> operands;
    Array<PortOperand> ports;
    Array<uint32_t> first_operand;  // of each operation, in `operands`
    Array<uint8_t> waits;           // operations that their partner does, in this run
    uint32_t batch;                 // that `operands` now describe
    bool updates_statistics;
};

// A running statistic: training overwrites it before the loss is known, so a copy can undo a diverged step.
struct Statistic {
    char* live;
    char* saved;
    size_t bytes;
};

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
constexpr size_t kGap = kAlignment;
void poison(char* address, size_t size) { __asan_poison_memory_region(address, size); }
#else
constexpr size_t kGap = 0;
void poison(char*, size_t) {}
#endif

uint64_t align(uint64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

struct evensong_engine {
    Model model;
    const InstructionSet* isa;
    Kernel kernels[kOpCodes];
    Array<char> memory;  // everything below lies in here, but borrowed constants
    const char* constants;
    char *state, *slots, *arena, *workspace, *saved;
    Array<Prepared> prepared;     // one per program
    Array<Statistic> statistics;  // one per variable that is a buffer
    Array<uint8_t> frozen;        // one flag per variable

    char* region(Region region) {
        char* const bases[] = {const_cast<char*>(constants), state, slots, arena};
        return region <= Region::kArena ? bases[int(region)] : nullptr;
    }
};

namespace {

// ------------------------------------------------------------------------------------------------- open

// One block for all regions. The arena and the workspace are shared by the programs: only one runs at a time.
bool allocate_memory(evensong_engine* engine, bool borrow) {
    const Model& model = engine->model;
    uint64_t arena = 0, workspace = 0, saved = 0;
    for (const Program& program : model.programs) {
        arena = program.arena_bytes > arena ? program.arena_bytes : arena;
        workspace = program.workspace_bytes > workspace ? program.workspace_bytes : workspace;
    }
    for (const Variable& variable : model.variables) saved += variable.trainable ? 0 : align(variable.bytes);
    uint64_t constants = borrow ? 0 : model.const_bytes;
    const uint64_t sizes[] = {constants, model.state_bytes, model.slot_bytes, arena, workspace, saved};
    uint64_t total = kAlignment;
    for (uint64_t size : sizes) total += align(size) + kGap;
    if (total > SIZE_MAX / 2 || !engine->memory.allocate(size_t(total))) return false;

    char* next = engine->memory.data + (align(reinterpret_cast<uintptr_t>(engine->memory.data)) -
                                        reinterpret_cast<uintptr_t>(engine->memory.data));
    char* bases[6];
    for (int i = 0; i < 6; ++i) {
        bases[i] = next;
        next += align(sizes[i]) + kGap;
        poison(bases[i] + sizes[i], size_t(next - bases[i] - ptrdiff_t(sizes[i])));
    }
    memcpy(bases[0], model.constants, size_t(constants));
    memcpy(bases[1], model.initial_state, size_t(model.state_bytes));
    engine->constants = borrow ? reinterpret_cast<const char*>(model.constants) : bases[0];
    engine->state = bases[1];
    engine->slots = bases[2];
    engine->arena = bases[3];
    engine->workspace = bases[4];
    engine->saved = bases[5];
    return true;
}

bool prepare(evensong_engine* engine, const Program& program, Prepared* out) {
    size_t operands = 0, ports = 0;
    for (const Op& op : program.ops) {
        for (uint32_t i = 0; i < uint32_t(op.inputs) + op.outputs; ++i, ++operands) {
            ports += program.tensors[op.operands[i]].region >= Region::kInput;
        }
    }
    if (!out->operands.allocate(operands) || !out->ports.allocate(ports)) return false;
    if (!out->first_operand.allocate(program.ops.size) || !out->waits.allocate(program.ops.size)) return false;
    size_t operand = 0, port = 0, number = 0;
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
            if (tensor.region >= Region::kInput) {
                out->ports[port++] = {uint32_t(operand), uint32_t(tensor.offset), tensor.region == Region::kOutput};
            } else {
                live.data = engine->region(tensor.region) + tensor.offset;
            }
        }
    }
    out->batch = program.max_batch;
    return true;
}

bool prepare_statistics(evensong_engine* engine) {
    size_t count = 0;
    for (const Variable& variable : engine->model.variables) count += !variable.trainable;
    if (!engine->statistics.allocate(count)) return false;
    size_t next = 0;
    char* saved = engine->saved;
    for (const Variable& variable : engine->model.variables) {
        if (variable.trainable) continue;
        engine->statistics[next++] = {engine->state + variable.offset, saved, size_t(variable.bytes)};
        saved += align(variable.bytes);
    }
    return true;
}

evensong_status build(evensong_engine* engine, const void* bytes, size_t size, bool borrow, Report* report) {
    if (evensong_status status = parse(static_cast<const uint8_t*>(bytes), size, &engine->model, report)) return status;
    if (evensong_status status = verify(&engine->model, report)) return status;
    if (borrow && reinterpret_cast<uintptr_t>(engine->model.constants) % kAlignment) {
        return report->fail(EVENSONG_ARGUMENT, "borrowed bytes must start at a multiple of %zu", kAlignment);
    }
    engine->isa->fill(engine->kernels);
    const Model& model = engine->model;
    for (const Program& program : model.programs) {
        for (const Op& op : program.ops) {
            if (!engine->kernels[op.code])
                return report->fail(EVENSONG_PROGRAM, "this build has no kernel for operation %u", op.code);
        }
    }
    bool ready = fuse(&engine->model) && allocate_memory(engine, borrow) &&
                 engine->frozen.allocate(model.variables.size) && engine->prepared.allocate(model.programs.size) &&
                 prepare_statistics(engine);
    for (size_t i = 0; ready && i < model.programs.size; ++i) {
        ready = prepare(engine, model.programs[i], &engine->prepared[i]);
    }
    return ready ? EVENSONG_OK : report->fail(EVENSONG_MEMORY, "the system has no memory left for this artifact");
}

// ------------------------------------------------------------------------------------------------- run

uint64_t live_bytes(const Program& program, const Port& port, uint32_t batch) {
    const Tensor& tensor = program.tensors[port.tensor];
    return tensor.batched ? tensor.bytes / program.max_batch * batch : tensor.bytes;
}

evensong_status check_buffers(const Program& program, bool output, uint32_t batch, const evensong_buffer* buffers,
                              uint32_t count, Report* report) {
    const Array<Port>& ports = program.ports(output);
    const char* side = output ? "output" : "input";
    if (count != ports.size) {
        return report->fail(EVENSONG_ARGUMENT, "'%s' has %zu %s ports; got %u buffers", program.name, ports.size, side,
                            count);
    }
    for (uint32_t i = 0; i < count; ++i) {
        uint64_t expected = live_bytes(program, ports[i], batch);
        uint32_t element = itemsize(program.tensors[ports[i].tensor].dtype);
        if (!buffers[i].data || buffers[i].size != expected || reinterpret_cast<uintptr_t>(buffers[i].data) % element) {
            return report->fail(
                EVENSONG_ARGUMENT, "%s %u of '%s' for %u examples must be %llu bytes, aligned to %u; got %zu bytes",
                side, i, program.name, batch, static_cast<unsigned long long>(expected), element, buffers[i].size);
        }
    }
    return EVENSONG_OK;
}

// Buffers that passed check_buffers.
evensong_status check_inputs(const evensong_engine* engine, const Program& program, const evensong_buffer* inputs,
                             Report* report) {
    for (uint32_t i = 0; i < program.inputs.size; ++i) {
        if (program.tensors[program.inputs[i].tensor].dtype != DType::kF32) continue;
        if (!engine->isa->all_finite(static_cast<const float*>(inputs[i].data), inputs[i].size / sizeof(float))) {
            return report->fail(EVENSONG_EXAMPLE, "input %u of '%s' holds NaN or infinite values", i, program.name);
        }
    }
    return EVENSONG_OK;
}

void resize(const Program& program, uint32_t batch, Prepared* prepared) {
    if (prepared->batch == batch) return;
    Operand* live = prepared->operands.data;
    for (const Op& op : program.ops) {
        for (uint32_t i = 0; i < uint32_t(op.inputs) + op.outputs; ++i, ++live) {
            const Tensor& tensor = program.tensors[op.operands[i]];
            if (!tensor.batched) continue;
            live->dims[0] = tensor.dims[0] / program.max_batch * batch;
            live->elements = size_t(tensor.elements / program.max_batch * batch);
        }
    }
    prepared->batch = batch;
}

void save_statistics(const evensong_engine* engine) {
    for (const Statistic& statistic : engine->statistics) memcpy(statistic.saved, statistic.live, statistic.bytes);
}

void restore_statistics(const evensong_engine* engine) {
    for (const Statistic& statistic : engine->statistics) memcpy(statistic.live, statistic.saved, statistic.bytes);
}

// One run of one program.
class Runner {
  public:
    Runner(evensong_engine* engine, const Program& program, Prepared* prepared, const Run& run)
        : engine_(engine), program_(program), prepared_(prepared), run_(run) {}

    Fault run() {
        bool updating = false;
        for (size_t i = 0; i < program_.ops.size; ++i) {
            const Op& op = program_.ops[i];
            bool optimizer = is_optimizer(op.code);
            if (optimizer && !updating && !gradients_are_finite(i)) return Fault::kNotFinite;
            updating = optimizer;
            if (optimizer && is_frozen(op)) continue;
            Fault fault = op.partner == kNoPartner ? call(i) : optimizer ? update(i) : gradient(i);
            if (fault != Fault::kNone) return fault;
        }
        return Fault::kNone;
    }

  private:
    const Operand* operands(size_t number) const { return prepared_->operands.data + prepared_->first_operand[number]; }
    bool is_frozen(const Op& op) const { return engine_->frozen[size_t(op.variable)]; }

    Fault call(uint16_t code, const Operand* in, uint32_t inputs, const Operand* out, uint32_t outputs,
               const Attribute* attributes) {
        return engine_->kernels[code](Call{in, inputs, out, outputs, attributes, engine_->workspace, &run_});
    }
    Fault call(size_t number) {
        const Op& op = program_.ops[number];
        const Operand* in = operands(number);
        return call(op.code, in, op.inputs, in + op.inputs, op.outputs, op.attributes);
    }

    // The gradients of all updates that follow one another, before the first of them changes anything.
    bool gradients_are_finite(size_t first) const {
        for (size_t i = first; i < program_.ops.size && is_optimizer(program_.ops[i].code); ++i) {
            const Op& op = program_.ops[i];
            if (is_frozen(op) || (op.partner != kNoPartner && prepared_->waits[size_t(op.partner)])) continue;
            const Operand& gradient = operands(i)[1];
            if (!engine_->isa->all_finite(gradient.f32(), gradient.elements)) return false;
        }
        return true;
    }

    // A LINEAR_GRAD_WEIGHT that its SGD may do: left to it if its result is surely finite. The bias does not wait.
    Fault gradient(size_t number) {
        const Op& op = program_.ops[number];
        const Operand* in = operands(number);
        bool waits = !is_frozen(program_.ops[size_t(op.partner)]) &&
                     call(kLinearUpdateCheck, in, 2, nullptr, 0, nullptr) == Fault::kNone;
        prepared_->waits[number] = waits;
        if (!waits) return call(number);
        Operand out[2] = {in[2], op.outputs > 1 ? in[3] : in[2]};
        out[0].data = nullptr;
        return call(op.code, in, op.inputs, out, op.outputs, op.attributes);
    }

    // The SGD of such a gradient.
    Fault update(size_t number) {
        const size_t partner = size_t(program_.ops[number].partner);
        if (!prepared_->waits[partner]) return call(number);
        const Operand* gradient = operands(partner);
        const Operand in[] = {gradient[0], gradient[1], operands(number)[0]};
        return call(kLinearUpdate, in, 3, nullptr, 0, nullptr);
    }

    evensong_engine* engine_;
    const Program& program_;
    Prepared* prepared_;
    const Run run_;
};

}  // namespace

// ------------------------------------------------------------------------------------------------- the C face

extern "C" {

uint32_t evensong_abi_version(void) { return EVENSONG_ABI_VERSION; }

const char* evensong_instruction_set(void) { return find_instruction_set(nullptr)->name; }

evensong_status evensong_open(const void* bytes, size_t size, uint32_t flags, evensong_engine** engine, char* message,
                              size_t message_capacity) {
    return evensong_open_on(nullptr, bytes, size, flags, engine, message, message_capacity);
}

evensong_status evensong_open_on(const char* instruction_set, const void* bytes, size_t size, uint32_t flags,
                                 evensong_engine** engine, char* message, size_t message_capacity) {
    Report report(message, message_capacity);
    if (!bytes || !engine || flags & ~uint32_t(EVENSONG_BORROW))
        return report.fail(EVENSONG_ARGUMENT, "a null pointer or an unknown flag");
    const InstructionSet* isa = find_instruction_set(instruction_set);
    if (!isa)
        return report.fail(EVENSONG_ARGUMENT, "instruction set '%s' is not in this build or this CPU", instruction_set);
    evensong_engine* opened = static_cast<evensong_engine*>(calloc(1, sizeof(evensong_engine)));
    if (!opened) return report.fail(EVENSONG_MEMORY, "no memory for an engine");
    opened->isa = isa;
    evensong_status status = build(opened, bytes, size, flags & EVENSONG_BORROW, &report);
    if (status == EVENSONG_OK) {
        *engine = opened;
    } else {
        evensong_close(opened);
    }
    return status;
}

void evensong_close(evensong_engine* engine) {
    if (!engine) return;
    engine->~evensong_engine();
    free(engine);
}

size_t evensong_memory_bytes(const evensong_engine* engine) {
    const Model& model = engine->model;
    size_t bytes = sizeof *engine + engine->memory.bytes() + model.variables.bytes() + model.programs.bytes() +
                   model.operand_pool.bytes() + model.attribute_pool.bytes() + engine->statistics.bytes() +
                   engine->frozen.bytes() + engine->prepared.bytes();
    for (const Program& program : model.programs) {
        bytes += program.inputs.bytes() + program.outputs.bytes() + program.tensors.bytes() + program.ops.bytes();
    }
    for (const Prepared& prepared : engine->prepared) {
        bytes += prepared.operands.bytes() + prepared.ports.bytes() + prepared.first_operand.bytes() +
                 prepared.waits.bytes();
    }
    return bytes;
}

void* evensong_state(evensong_engine* engine, size_t* size) {
    *size = size_t(engine->model.state_bytes);
    return engine->state;
}

void* evensong_slots(evensong_engine* engine, size_t* size) {
    *size = size_t(engine->model.slot_bytes);
    return engine->slots;
}

int32_t evensong_find_program(const evensong_engine* engine, const char* name) {
    for (size_t i = 0; i < engine->model.programs.size; ++i) {
        if (strcmp(engine->model.programs[i].name, name) == 0) return int32_t(i);
    }
    return -1;
}

uint32_t evensong_max_batch(const evensong_engine* engine, uint32_t program) {
    return program < engine->model.programs.size ? engine->model.programs[program].max_batch : 0;
}

uint32_t evensong_port_count(const evensong_engine* engine, uint32_t program, int32_t output) {
    return program < engine->model.programs.size ? uint32_t(engine->model.programs[program].ports(output != 0).size)
                                                 : 0;
}

size_t evensong_port_bytes(const evensong_engine* engine, uint32_t program, int32_t output, uint32_t port,
                           uint32_t batch) {
    if (port >= evensong_port_count(engine, program, output)) return 0;
    const Program& found = engine->model.programs[program];
    return batch >= 1 && batch <= found.max_batch ? size_t(live_bytes(found, found.ports(output != 0)[port], batch))
                                                  : 0;
}

evensong_status evensong_freeze(evensong_engine* engine, const uint32_t* variables, size_t count, char* message,
                                size_t message_capacity) {
    Report report(message, message_capacity);
    for (size_t i = 0; i < count; ++i) {
        if (variables[i] >= engine->model.variables.size) {
            return report.fail(EVENSONG_ARGUMENT, "there is no variable %u among %zu", variables[i],
                               engine->model.variables.size);
        }
    }
    memset(engine->frozen.data, 0, engine->frozen.size);
    for (size_t i = 0; i < count; ++i) engine->frozen[variables[i]] = 1;
    return EVENSONG_OK;
}

evensong_status evensong_run(evensong_engine* engine, uint32_t program_index, uint32_t batch,
                             const evensong_buffer* inputs, uint32_t input_count, const evensong_buffer* outputs,
                             uint32_t output_count, const evensong_options* options, char* message,
                             size_t message_capacity) {
    Report report(message, message_capacity);
    if (program_index >= engine->model.programs.size) {
        return report.fail(EVENSONG_ARGUMENT, "there is no program %u among %zu", program_index,
                           engine->model.programs.size);
    }
    const Program& program = engine->model.programs[program_index];
    Prepared& prepared = engine->prepared[program_index];
    if (batch < 1 || batch > program.max_batch) {
        return report.fail(EVENSONG_ARGUMENT, "'%s' takes 1 to %u examples; got %u", program.name, program.max_batch,
                           batch);
    }
    if (options->flags & ~uint32_t(EVENSONG_CHECK_INPUTS)) {
        return report.fail(EVENSONG_ARGUMENT, "unknown flags in the options");
    }
    if (!isfinite(options->learning_rate) || options->learning_rate < 0 || options->step < 1) {
        return report.fail(EVENSONG_ARGUMENT, "the learning rate must be finite and >= 0, and the step at least 1");
    }
    if (evensong_status status = check_buffers(program, false, batch, inputs, input_count, &report)) return status;
    if (evensong_status status = check_buffers(program, true, batch, outputs, output_count, &report)) return status;
    if (options->flags & EVENSONG_CHECK_INPUTS) {
        if (evensong_status status = check_inputs(engine, program, inputs, &report)) return status;
    }

    resize(program, batch, &prepared);
    for (const PortOperand& port : prepared.ports) {
        prepared.operands[port.operand].data = (port.output ? outputs : inputs)[port.port].data;
    }
    if (prepared.updates_statistics) save_statistics(engine);
    Runner runner(engine, program, &prepared, Run{options->learning_rate, options->step, options->seed});
    Fault fault = runner.run();
    if (fault == Fault::kNone) return EVENSONG_OK;
    if (prepared.updates_statistics) restore_statistics(engine);
    if (fault == Fault::kIndexOutOfRange) {
        return report.fail(EVENSONG_EXAMPLE, "a label or an embedding index in the examples is out of range");
    }
    return report.fail(EVENSONG_DIVERGED,
                       "the loss, a gradient or an updated weight is NaN or infinite. Lower the learning rate.");
}

}  // extern "C"
