// Running programs. include/evensong.h has the rules.
#include "engine.hpp"

#include "opcodes.h"

using namespace evensong;

uint64_t evensong::live_bytes(const Program& program, const Port& port, uint32_t batch) {
    const Tensor& tensor = program.tensors[port.tensor];
    return tensor.batched ? tensor.bytes / program.max_batch * batch : tensor.bytes;
}

namespace {

// ------------------------------------------------------------------------------------------------- before a run

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

// Gives operands in the host's buffers their place, and batched ones their number of rows.
void bind(const Program& program, uint32_t batch, const evensong_buffer* inputs, const evensong_buffer* outputs,
          Prepared* prepared) {
    const bool resize = prepared->batch != batch;
    Operand* live = prepared->operands.data;
    for (const Op& op : program.ops) {
        for (uint32_t i = 0; i < uint32_t(op.inputs) + op.outputs; ++i, ++live) {
            const Tensor& tensor = program.tensors[op.operands[i]];
            if (tensor.region == Region::kInput) live->data = inputs[tensor.offset].data;
            if (tensor.region == Region::kOutput) live->data = outputs[tensor.offset].data;
            if (!resize || !tensor.batched) continue;
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

// ------------------------------------------------------------------------------------------------- a run

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
            Fault fault = call(i);
            if (fault != Fault::kNone) return fault;
        }
        return Fault::kNone;
    }

  private:
    const Operand* operands(size_t number) const { return prepared_->operands.data + prepared_->first_operand[number]; }
    bool is_frozen(const Op& op) const { return engine_->frozen[size_t(op.variable)]; }

    Fault call(size_t number) {
        const Op& op = program_.ops[number];
        const Operand* in = operands(number);
        return engine_->kernels[op.code](
            Call{in, op.inputs, in + op.inputs, op.outputs, op.attributes, engine_->workspace, &run_});
    }

    // The gradients of all updates that follow one another, before the first of them changes anything.
    bool gradients_are_finite(size_t first) const {
        for (size_t i = first; i < program_.ops.size && is_optimizer(program_.ops[i].code); ++i) {
            const Op& op = program_.ops[i];
            if (is_frozen(op) || op.code == op::LINEAR_UPDATE) continue;  // which has no gradient in memory
            const Operand& gradient = operands(i)[1];
            if (gradient.dtype != DType::kF32) continue;
            if (!engine_->isa->all_finite(gradient.f32(), gradient.elements)) return false;
        }
        return true;
    }

    evensong_engine* engine_;
    const Program& program_;
    Prepared* prepared_;
    const Run run_;
};

}  // namespace

// ------------------------------------------------------------------------------------------------- the C face

extern "C" {

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
    if (!__builtin_isfinite(options->learning_rate) || options->learning_rate < 0 || options->step < 1) {
        return report.fail(EVENSONG_ARGUMENT, "the learning rate must be finite and >= 0, and the step at least 1");
    }
    if (evensong_status status = check_buffers(program, false, batch, inputs, input_count, &report)) return status;
    if (evensong_status status = check_buffers(program, true, batch, outputs, output_count, &report)) return status;
    if (options->flags & EVENSONG_CHECK_INPUTS) {
        if (evensong_status status = check_inputs(engine, program, inputs, &report)) return status;
    }

    bind(program, batch, inputs, outputs, &prepared);
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
