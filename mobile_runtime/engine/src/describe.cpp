// What an opened engine says about itself, and variables in the author's layout.
#include "engine.hpp"

using namespace evensong;

namespace {

// Copies a variable between STATE and an array in the author's layout, whose axis i is the variable's axis perm[i].
template <bool kWrite>
void transfer(const Variable& variable, char* state, char* author) {
    const size_t item = itemsize(variable.dtype);
    size_t stride[kMaxRank] = {};  // in STATE, along each axis of the author
    uint32_t dims[kMaxRank] = {}, at[kMaxRank] = {};
    for (uint32_t i = 0; i < variable.rank; ++i) {
        const uint32_t axis = variable.perm[i];
        dims[i] = variable.dims[axis];
        stride[i] = item;
        for (uint32_t inner = axis + 1; inner < variable.rank; ++inner) stride[i] *= variable.dims[inner];
    }
    char* place = state + variable.offset;
    for (const char* end = author + variable.bytes; author < end; author += item) {
        memcpy(kWrite ? place : author, kWrite ? author : place, item);
        for (uint32_t i = variable.rank; i-- > 0;) {
            place += stride[i];
            if (++at[i] < dims[i]) break;
            at[i] = 0;
            place -= stride[i] * dims[i];
        }
    }
}

evensong_status check_variable(const evensong_engine* engine, uint32_t index, size_t size, Report* report) {
    const Array<Variable>& variables = engine->model.variables;
    if (index >= variables.size) {
        return report->fail(EVENSONG_ARGUMENT, "there is no variable %u among %zu", index, variables.size);
    }
    if (size != variables[index].bytes) {
        return report->fail(EVENSONG_ARGUMENT, "variable '%s' has %llu bytes; got %zu", variables[index].name,
                            static_cast<unsigned long long>(variables[index].bytes), size);
    }
    return EVENSONG_OK;
}

template <class T>
int32_t find(const Array<T>& items, const char* name) {
    for (size_t i = 0; i < items.size; ++i) {
        if (strcmp(items[i].name, name) == 0) return int32_t(i);
    }
    return -1;
}

}  // namespace

extern "C" {

uint32_t evensong_abi_version(void) { return EVENSONG_ABI_VERSION; }

const char* evensong_instruction_set(void) { return find_instruction_set(nullptr)->name; }

evensong_status evensong_manifest(const void* bytes, size_t size, const char** manifest, size_t* manifest_size,
                                  char* message, size_t message_capacity) {
    Report report(message, message_capacity);
    Sections sections;
    evensong_status status = read_sections(static_cast<const uint8_t*>(bytes), size, &sections, &report);
    if (status != EVENSONG_OK) return status;
    *manifest = reinterpret_cast<const char*>(sections.manifest.data);
    *manifest_size = sections.manifest.size;
    return EVENSONG_OK;
}

// ------------------------------------------------------------------------------------------------- memory

size_t evensong_memory_bytes(const evensong_engine* engine) { return engine->held_bytes; }

void evensong_memory_info(const evensong_engine* engine, evensong_memory* memory) { *memory = engine->memory; }

void* evensong_state(evensong_engine* engine, size_t* size) {
    *size = size_t(engine->model.state_bytes);
    return engine->state;
}

void* evensong_slots(evensong_engine* engine, size_t* size) {
    *size = size_t(engine->model.slot_bytes);
    return engine->slots;
}

// ------------------------------------------------------------------------------------------------- programs

uint32_t evensong_program_count(const evensong_engine* engine) { return uint32_t(engine->model.programs.size); }

int32_t evensong_find_program(const evensong_engine* engine, const char* name) {
    return find(engine->model.programs, name);
}

evensong_status evensong_program_info(const evensong_engine* engine, uint32_t program, evensong_program* info) {
    if (program >= engine->model.programs.size) return EVENSONG_ARGUMENT;
    const Program& found = engine->model.programs[program];
    *info = {found.name,
             found.max_batch,
             uint32_t(found.inputs.size),
             uint32_t(found.outputs.size),
             size_t(found.arena_bytes),
             size_t(found.workspace_bytes)};
    return EVENSONG_OK;
}

uint32_t evensong_max_batch(const evensong_engine* engine, uint32_t program) {
    return program < engine->model.programs.size ? engine->model.programs[program].max_batch : 0;
}

uint32_t evensong_port_count(const evensong_engine* engine, uint32_t program, int32_t output) {
    return program < engine->model.programs.size ? uint32_t(engine->model.programs[program].ports(output != 0).size)
                                                 : 0;
}

evensong_status evensong_port_info(const evensong_engine* engine, uint32_t program, int32_t output, uint32_t port,
                                   evensong_port* info) {
    if (port >= evensong_port_count(engine, program, output)) return EVENSONG_ARGUMENT;
    const Program& found = engine->model.programs[program];
    const Port& named = found.ports(output != 0)[port];
    const Tensor& tensor = found.tensors[named.tensor];
    *info = {};
    info->name = named.name;
    info->dtype = evensong_dtype(tensor.dtype);
    info->batched = tensor.batched;
    info->rank = tensor.rank;
    memcpy(info->dims, tensor.dims, tensor.rank * sizeof *info->dims);
    if (tensor.batched) info->dims[0] /= found.max_batch;
    info->scale = tensor.scale;
    info->zero_point = tensor.zero_point;
    return EVENSONG_OK;
}

size_t evensong_port_bytes(const evensong_engine* engine, uint32_t program, int32_t output, uint32_t port,
                           uint32_t batch) {
    if (port >= evensong_port_count(engine, program, output)) return 0;
    const Program& found = engine->model.programs[program];
    return batch >= 1 && batch <= found.max_batch ? size_t(live_bytes(found, found.ports(output != 0)[port], batch))
                                                  : 0;
}

// ------------------------------------------------------------------------------------------------- variables

uint32_t evensong_variable_count(const evensong_engine* engine) { return uint32_t(engine->model.variables.size); }

int32_t evensong_find_variable(const evensong_engine* engine, const char* name) {
    return find(engine->model.variables, name);
}

evensong_status evensong_variable_info(const evensong_engine* engine, uint32_t variable, evensong_variable* info) {
    if (variable >= engine->model.variables.size) return EVENSONG_ARGUMENT;
    const Variable& found = engine->model.variables[variable];
    *info = {};
    info->name = found.name;
    info->dtype = evensong_dtype(found.dtype);
    info->trainable = found.trainable;
    info->rank = found.rank;
    for (uint32_t i = 0; i < found.rank; ++i) info->dims[i] = found.dims[found.perm[i]];
    info->bytes = size_t(found.bytes);
    return EVENSONG_OK;
}

evensong_status evensong_read_variable(const evensong_engine* engine, uint32_t variable, void* data, size_t size,
                                       char* message, size_t message_capacity) {
    Report report(message, message_capacity);
    if (evensong_status status = check_variable(engine, variable, size, &report)) return status;
    transfer<false>(engine->model.variables[variable], engine->state, static_cast<char*>(data));
    return EVENSONG_OK;
}

evensong_status evensong_write_variable(evensong_engine* engine, uint32_t variable, const void* data, size_t size,
                                        char* message, size_t message_capacity) {
    Report report(message, message_capacity);
    if (evensong_status status = check_variable(engine, variable, size, &report)) return status;
    transfer<true>(engine->model.variables[variable], engine->state, static_cast<char*>(const_cast<void*>(data)));
    return EVENSONG_OK;
}

}  // extern "C"
