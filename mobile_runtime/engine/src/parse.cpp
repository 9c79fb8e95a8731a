// Bytes to Model. The bytes are hostile until the frame, the checksum and every structural rule of docs/artifact.md
// hold.
#include "model.hpp"
#include "opcodes.h"
#include "workspace.hpp"

namespace evensong {

using workspace::larger;
using workspace::smaller;

namespace {

constexpr size_t kHeaderBytes = 64;
constexpr size_t kSectionBytes = 24;
constexpr uint16_t kMajorVersion = 1;
constexpr uint32_t kMostPrograms = 32;
constexpr uint32_t kMostVariables = 1u << 14;  // these three keep the verifier's searches short
constexpr uint32_t kMostTensors = 1u << 18;
constexpr uint32_t kMostOps = 1u << 16;
constexpr uint32_t kMostBatch = 1u << 20;

constexpr uint32_t kSectionKinds = 5;  // numbered from 1, in the order of struct Sections

// ------------------------------------------------------------------------------------------------- CRC32C (RFC 3720)

// Four bits at a time: a table of 64 bytes, and still far faster than an artifact comes over a network.
uint32_t crc32c(const uint8_t* data, size_t size) {
    static const uint32_t kTable[16] = {0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3,
                                        0x61c69362, 0x7198540d, 0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9,
                                        0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75};
    uint32_t value = ~0u;
    for (; size; ++data, --size) {
        value ^= *data;
        value = (value >> 4) ^ kTable[value & 15];
        value = (value >> 4) ^ kTable[value & 15];
    }
    return ~value;
}

// ------------------------------------------------------------------------------------------------- a bounds-checked
// reader

// Reads forward, little-endian. Past the end every read gives zero and `failed` stays set, so that callers check once.
struct Cursor {
    const uint8_t* data;
    size_t size;
    size_t at = 0;
    bool failed = false;

    Cursor(const uint8_t* data, size_t size) : data(data), size(size) {}
    explicit Cursor(const Sections::Section& section) : Cursor(section.data, section.size) {}

    size_t remaining() const { return size - at; }
    const uint8_t* take(size_t count) {
        if (failed || count > remaining()) {
            failed = true;
            return nullptr;
        }
        at += count;
        return data + at - count;
    }
    uint64_t number(size_t bytes) {
        const uint8_t* p = take(bytes);
        uint64_t value = 0;
        for (size_t i = 0; p && i < bytes; ++i) value |= uint64_t(p[i]) << (8 * i);
        return value;
    }
    uint8_t u8() { return uint8_t(number(1)); }
    uint16_t u16() { return uint16_t(number(2)); }
    uint32_t u32() { return uint32_t(number(4)); }
    uint64_t u64() { return number(8); }
    float f32() {
        uint32_t bits = u32();
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    // `count` records of at least `least` bytes each must fit in what is left: no hostile count allocates memory.
    uint32_t count(size_t least, uint32_t most) {
        uint32_t value = u32();
        if (value > remaining() / least || value > most) failed = true;
        return failed ? 0 : value;
    }
    // The text behind its length, not ended by a zero; null where it is broken.
    const uint8_t* name(size_t* length) {
        *length = u16();
        if (*length < 1 || *length > 255) failed = true;
        return take(*length);
    }
};

// Hands out zero-terminated copies of names.
struct Names {
    char* next;
    char* end;

    const char* copy(Cursor* cursor) {
        size_t length;
        const uint8_t* text = cursor->name(&length);
        if (!text || size_t(end - next) <= length) {
            cursor->failed = true;
            return "";
        }
        char* name = next;
        memcpy(name, text, length);
        next += length + 1;  // the memory is zero
        return name;
    }
};

}  // namespace

// ------------------------------------------------------------------------------------------------- sections

evensong_status read_sections(const uint8_t* bytes, size_t size, Sections* out, Report* report) {
    Cursor cursor(bytes, size);
    if (size < kHeaderBytes || memcmp(bytes, "EVSG", 4) != 0) {
        return report->fail(EVENSONG_CORRUPT,
                            "not an evensong artifact; expected magic EVSG and at least %zu bytes, got %zu bytes",
                            kHeaderBytes, size);
    }
    cursor.take(4);
    uint16_t major = cursor.u16(), minor = cursor.u16();
    uint64_t declared = cursor.u64();
    uint32_t checksum = cursor.u32(), count = cursor.u32();
    if (major != kMajorVersion) {
        return report->fail(EVENSONG_ARTIFACT,
                            "the artifact was made for another runtime; expected format %u.x, got %u.%u. "
                            "Compile the model with the version of evensong that this device runs.",
                            kMajorVersion, major, minor);
    }
    if (declared != size || size > kMaxArtifactBytes) {
        return report->fail(EVENSONG_CORRUPT, "the artifact's length is wrong; expected %llu bytes, got %zu",
                            static_cast<unsigned long long>(declared), size);
    }
    while (cursor.at < kHeaderBytes) {
        if (cursor.u8()) return report->fail(EVENSONG_CORRUPT, "the artifact's header has bytes set that must be zero");
    }
    uint32_t actual = crc32c(bytes + kHeaderBytes, size - kHeaderBytes);
    if (actual != checksum) {
        return report->fail(EVENSONG_CORRUPT,
                            "the artifact is damaged; expected CRC32C %08x, got %08x. Fetch it again.", checksum,
                            actual);
    }
    if (count > cursor.remaining() / kSectionBytes) {
        return report->fail(EVENSONG_CORRUPT, "%u sections cannot fit in the artifact", count);
    }
    *out = Sections{};
    Sections::Section* const sections[kSectionKinds] = {&out->manifest, &out->variables, &out->programs,
                                                        &out->constants, &out->state};
    // Sections lie in the order of the table and do not overlap; the writer sorts them by kind.
    uint64_t free_from = kHeaderBytes + uint64_t(count) * kSectionBytes;
    uint32_t last_kind = 0;
    for (uint32_t i = 0; i < count; ++i) {
        uint32_t kind = cursor.u32(), zero = cursor.u32();
        uint64_t offset = cursor.u64(), length = cursor.u64();
        if (zero || offset % kAlignment || offset < free_from || offset > size || length > size - offset ||
            kind <= last_kind) {
            return report->fail(EVENSONG_CORRUPT, "section %u is out of place or lies outside the artifact", kind);
        }
        last_kind = kind;
        free_from = offset + length;
        if (kind <= kSectionKinds) *sections[kind - 1] = {bytes + offset, size_t(length)};
    }
    for (uint32_t kind = 1; kind <= kSectionKinds; ++kind) {
        if (!sections[kind - 1]->data) return report->fail(EVENSONG_CORRUPT, "section %u is missing", kind);
    }
    return EVENSONG_OK;
}

// ------------------------------------------------------------------------------------------------- counting

namespace {

// Of a variable in STATE.
struct Span {
    uint64_t begin, end;
};

uint32_t read_variable_count(Cursor* cursor) { return cursor->count(15, kMostVariables); }
uint32_t read_program_count(Cursor* cursor) { return cursor->count(32, kMostPrograms); }
uint32_t read_tensor_count(Cursor* cursor) { return cursor->count(20, kMostTensors); }
uint32_t read_operation_count(Cursor* cursor) { return cursor->count(6, kMostOps); }

void count_name(Cursor* cursor, Parts* parts) {
    size_t length;
    cursor->name(&length);
    parts->name_bytes += length + 1;
}

void count_variables(Cursor cursor, Parts* parts) {
    parts->variables = read_variable_count(&cursor);
    cursor.u64();
    parts->slots = cursor.u64();
    for (uint64_t i = 0; i < parts->variables && !cursor.failed; ++i) {
        count_name(&cursor, parts);
        const uint8_t dtype = cursor.u8(), flags = cursor.u8(), rank = cursor.u8();
        cursor.u8();
        uint64_t bytes = itemsize(DType(dtype));
        for (uint32_t axis = 0; axis < rank; ++axis) bytes = smaller(bytes * cursor.u32(), kMaxArtifactBytes + 1);
        cursor.take(rank + sizeof(uint64_t));
        if (flags != 1) ++parts->buffers, parts->buffer_bytes += align(bytes);
    }
}

void count_program(Cursor* cursor, Parts* parts) {
    count_name(cursor, parts);
    cursor->u32();
    parts->arena = larger(parts->arena, cursor->u64());
    parts->workspace = larger(parts->workspace, cursor->u64());
    for (int side = 0; side < 2; ++side) {
        const uint8_t ports = cursor->u8();
        parts->ports += ports;
        for (uint32_t i = 0; i < ports; ++i) {
            count_name(cursor, parts);
            cursor->u32();
        }
    }
    const uint32_t tensors = read_tensor_count(cursor);
    parts->tensors += tensors;
    parts->most_tensors = larger(parts->most_tensors, tensors);
    for (uint32_t i = 0; i < tensors; ++i) {
        cursor->take(2);
        const uint8_t rank = cursor->u8();
        cursor->take(1 + 4 * rank + 16);
    }
    const uint32_t operations = read_operation_count(cursor);
    parts->operations += operations;
    for (uint32_t i = 0; i < operations; ++i) {
        cursor->u16();
        const uint32_t inputs = cursor->u8(), outputs = cursor->u8(), attributes = cursor->u8();
        parts->operands += inputs + outputs;
        parts->attributes += attributes;
        cursor->take(1 + 4 * (inputs + outputs + attributes));
        if (cursor->failed) return;
    }
}

}  // namespace

Parts count_parts(const Sections& sections) {
    Parts parts = {};
    parts.constants = sections.constants.size;
    parts.state = sections.state.size;
    count_variables(Cursor(sections.variables), &parts);
    Cursor cursor(sections.programs);
    parts.programs = read_program_count(&cursor);
    for (uint64_t i = 0; i < parts.programs && !cursor.failed; ++i) count_program(&cursor, &parts);
    return parts;
}

uint64_t model_bytes(const Parts& parts) {
    return Block::round_up(parts.variables * sizeof(Variable)) + Block::round_up(parts.programs * sizeof(Program)) +
           parts.programs * 4 * Block::round_up(1) +  // four arrays a program, each rounded up
           parts.ports * sizeof(Port) + parts.tensors * sizeof(Tensor) + parts.operations * sizeof(Op) +
           Block::round_up(parts.operands * sizeof(uint32_t)) + Block::round_up(parts.attributes * sizeof(Attribute)) +
           Block::round_up(parts.name_bytes);
}

uint64_t model_scratch(const Parts& parts) {
    return larger(parts.variables * sizeof(Span), parts.most_tensors * sizeof(uint32_t));
}

namespace {

// ------------------------------------------------------------------------------------------------- tensors and
// variables

bool read_dtype(uint8_t code, DType* out) {
    *out = DType(code);
    return code >= 1 && code <= 4;
}

// Elements and bytes without overflow; no dimension is zero and the whole is at most kMaxArtifactBytes.
bool measure(const uint32_t* dims, uint32_t rank, DType dtype, uint64_t* elements, uint64_t* bytes) {
    uint64_t count = 1;
    for (uint32_t i = 0; i < rank; ++i) {
        count *= dims[i];
        if (!count || count > kMaxArtifactBytes) return false;
    }
    *elements = count;
    *bytes = count * itemsize(dtype);
    return *bytes <= kMaxArtifactBytes;
}

bool fits(uint64_t offset, uint64_t bytes, uint64_t limit) {
    return offset % kAlignment == 0 && offset <= limit && bytes <= limit - offset;
}

void exchange(Span* a, Span* b) {
    const Span kept = *a;
    *a = *b;
    *b = kept;
}

// By begin: a heap sort, which needs no memory and is never slow.
void sort(Span* spans, size_t count) {
    const auto sink = [&](size_t parent, size_t end) {
        for (size_t child; (child = 2 * parent + 1) < end; parent = child) {
            if (child + 1 < end && spans[child].begin < spans[child + 1].begin) ++child;
            if (spans[parent].begin >= spans[child].begin) return;
            exchange(&spans[parent], &spans[child]);
        }
    };
    for (size_t i = count / 2; i-- > 0;) sink(i, count);
    for (size_t end = count; end-- > 1;) {
        exchange(&spans[0], &spans[end]);
        sink(0, end);
    }
}

evensong_status check_apart(const Array<Variable>& variables, const Block& block, Report* report) {
    const size_t count = variables.size;
    Span* spans = static_cast<Span*>(block.scratch(count * sizeof(Span)));
    if (!spans) return report->fail(EVENSONG_MEMORY, "no memory for %zu variables", count);
    for (size_t i = 0; i < count; ++i) spans[i] = {variables[i].offset, variables[i].offset + variables[i].bytes};
    sort(spans, count);
    bool apart = true;
    for (size_t i = 1; i < count; ++i) apart = apart && spans[i].begin >= spans[i - 1].end;
    memset(spans, 0, count * sizeof(Span));  // whoever takes this memory next expects zeros
    return apart ? EVENSONG_OK : report->fail(EVENSONG_ARTIFACT, "two variables share memory");
}

evensong_status read_variables(Cursor cursor, Block* block, Names* names, Model* model, Report* report) {
    uint32_t count = read_variable_count(&cursor);
    uint64_t state_bytes = cursor.u64();
    model->slot_bytes = cursor.u64();
    if (cursor.failed || state_bytes != model->state_bytes || model->slot_bytes > kMaxArtifactBytes) {
        return report->fail(EVENSONG_ARTIFACT, "the sizes of the state or of the optimiser's slots are wrong");
    }
    if (!model->variables.allocate(block, count))
        return report->fail(EVENSONG_MEMORY, "no memory for %u variables", count);
    for (uint32_t i = 0; i < count; ++i) {
        Variable& variable = model->variables[i];
        variable.name = names->copy(&cursor);
        uint8_t dtype = cursor.u8(), flags = cursor.u8(), rank = cursor.u8(), zero = cursor.u8();
        if (cursor.failed || zero || rank > kMaxRank || (flags != 1 && flags != 2 && flags != 6) ||
            !read_dtype(dtype, &variable.dtype)) {
            return report->fail(EVENSONG_ARTIFACT, "variable %u has a bad header", i);
        }
        variable.trainable = flags == 1;
        variable.rank = rank;
        for (uint32_t axis = 0; axis < rank; ++axis) variable.dims[axis] = cursor.u32();
        uint32_t seen = 0;
        for (uint32_t i = 0; i < rank; ++i) {
            const uint8_t axis = cursor.u8();
            if (axis < rank) seen |= 1u << axis;
            variable.perm[i] = axis;
        }
        if (seen != (1u << rank) - 1)
            return report->fail(EVENSONG_ARTIFACT, "variable '%s' has a bad permutation", variable.name);
        variable.offset = cursor.u64();
        uint64_t elements;
        if (cursor.failed || !measure(variable.dims, rank, variable.dtype, &elements, &variable.bytes) ||
            !fits(variable.offset, variable.bytes, model->state_bytes)) {
            return report->fail(EVENSONG_ARTIFACT, "variable '%s' does not fit the state", variable.name);
        }
    }
    if (cursor.remaining()) return report->fail(EVENSONG_CORRUPT, "the variables section has bytes too many");
    return check_apart(model->variables, *block, report);
}

evensong_status read_tensor(Cursor* cursor, const Model& model, const Program& program, Tensor* out, Report* report) {
    uint8_t dtype = cursor->u8(), region = cursor->u8(), rank = cursor->u8(), batched = cursor->u8();
    if (cursor->failed || !read_dtype(dtype, &out->dtype) || region > uint8_t(Region::kOutput) || rank > kMaxRank ||
        batched > 1) {
        return report->fail(EVENSONG_ARTIFACT, "a tensor of '%s' has a bad header", program.name);
    }
    out->region = Region(region);
    out->rank = rank;
    out->batched = batched;
    for (uint32_t axis = 0; axis < rank; ++axis) out->dims[axis] = cursor->u32();
    out->offset = cursor->u64();
    out->scale = cursor->f32();
    out->zero_point = int32_t(cursor->u32());
    if (cursor->failed || !measure(out->dims, rank, out->dtype, &out->elements, &out->bytes)) {
        return report->fail(EVENSONG_ARTIFACT, "a tensor of '%s' has a bad size", program.name);
    }
    bool persistent = out->region < Region::kArena;
    if (batched && (!rank || out->dims[0] % program.max_batch || persistent)) {
        return report->fail(EVENSONG_ARTIFACT, "a batched tensor of '%s' does not divide by its batch", program.name);
    }
    const uint64_t limits[] = {model.const_bytes,   model.state_bytes,   model.slot_bytes,
                               program.arena_bytes, program.inputs.size, program.outputs.size};
    uint64_t limit = limits[region];
    bool placed = out->region <= Region::kArena ? fits(out->offset, out->bytes, limit) : out->offset < limit;
    if (!placed) return report->fail(EVENSONG_ARTIFACT, "a tensor of '%s' does not fit its region", program.name);
    return EVENSONG_OK;
}

evensong_status read_op(Cursor* cursor, Model* model, const Program& program, size_t* operands, size_t* attributes,
                        Op* out, Report* report) {
    out->code = cursor->u16();
    out->inputs = cursor->u8();
    out->outputs = cursor->u8();
    uint8_t n_attributes = cursor->u8(), zero = cursor->u8();
    out->variable = kNoVariable;
    const Signature* signature = nullptr;
    for (const Signature& row : kSignatures) {
        if (row.code == out->code) signature = &row;
    }
    if (cursor->failed || !signature || zero) {
        return report->fail(
            EVENSONG_ARTIFACT,
            "'%s' uses an operation that this runtime does not know; got code %u. Update evensong on the device.",
            program.name, out->code);
    }
    bool inputs_fit =
        out->inputs >= signature->required_inputs && (signature->variadic || out->inputs <= signature->most_inputs);
    bool outputs_fit = out->outputs >= signature->required_outputs && out->outputs <= signature->most_outputs;
    if (!inputs_fit || !outputs_fit || n_attributes != signature->attributes) {
        return report->fail(EVENSONG_ARTIFACT, "%s in '%s' has the wrong number of operands", signature->name,
                            program.name);
    }
    out->operands = model->operand_pool.data + *operands;
    for (uint32_t i = 0; i < uint32_t(out->inputs) + out->outputs; ++i) {
        uint32_t tensor = cursor->u32();
        if (cursor->failed || tensor >= program.tensors.size) {
            return report->fail(EVENSONG_ARTIFACT, "%s in '%s' names a tensor that does not exist", signature->name,
                                program.name);
        }
        model->operand_pool[(*operands)++] = tensor;
    }
    out->attributes = model->attribute_pool.data + *attributes;
    for (uint32_t i = 0; i < n_attributes; ++i) model->attribute_pool[(*attributes)++].f = cursor->f32();
    if (cursor->failed) return report->fail(EVENSONG_CORRUPT, "%s in '%s' is truncated", signature->name, program.name);
    return EVENSONG_OK;
}

evensong_status read_ports(Cursor* cursor, Block* block, Names* names, Array<Port>* ports, Report* report) {
    uint8_t count = cursor->u8();
    if (!ports->allocate(block, count)) return report->fail(EVENSONG_MEMORY, "no memory for %u ports", count);
    for (Port& port : *ports) {
        port.name = names->copy(cursor);
        port.tensor = cursor->u32();
    }
    return EVENSONG_OK;
}

evensong_status check_ports(const Program& program, Report* report) {
    for (int side = 0; side < 2; ++side) {
        bool output = side == 1;
        const Array<Port>& ports = program.ports(output);
        for (size_t i = 0; i < ports.size; ++i) {
            uint32_t index = ports[i].tensor;
            Region region = output ? Region::kOutput : Region::kInput;
            if (index >= program.tensors.size || program.tensors[index].region != region ||
                program.tensors[index].offset != i) {
                return report->fail(EVENSONG_ARTIFACT, "port %zu of '%s' does not name its own tensor", i,
                                    program.name);
            }
        }
    }
    // Any other view of a port has exactly the port's bytes, whatever the batch.
    for (const Tensor& tensor : program.tensors) {
        if (tensor.region < Region::kInput) continue;
        const Tensor& port = program.tensors[program.ports(tensor.region == Region::kOutput)[tensor.offset].tensor];
        if (tensor.bytes != port.bytes || tensor.batched != port.batched || tensor.dtype != port.dtype) {
            return report->fail(EVENSONG_ARTIFACT, "a tensor of '%s' does not have the size of its port", program.name);
        }
    }
    return EVENSONG_OK;
}

evensong_status read_program(Cursor* cursor, Block* block, Names* names, Model* model, size_t* operands,
                             size_t* attributes, Program* out, Report* report) {
    out->name = names->copy(cursor);
    out->max_batch = cursor->u32();
    out->arena_bytes = cursor->u64();
    out->workspace_bytes = cursor->u64();
    if (cursor->failed || out->max_batch < 1 || out->max_batch > kMostBatch || out->arena_bytes > kMaxArtifactBytes ||
        out->workspace_bytes > kMaxArtifactBytes) {
        return report->fail(EVENSONG_ARTIFACT, "program '%s' has a bad size", out->name);
    }
    if (evensong_status status = read_ports(cursor, block, names, &out->inputs, report)) return status;
    if (evensong_status status = read_ports(cursor, block, names, &out->outputs, report)) return status;
    uint32_t tensors = read_tensor_count(cursor);
    if (!out->tensors.allocate(block, tensors))
        return report->fail(EVENSONG_MEMORY, "no memory for %u tensors", tensors);
    for (Tensor& tensor : out->tensors) {
        if (evensong_status status = read_tensor(cursor, *model, *out, &tensor, report)) return status;
    }
    if (evensong_status status = check_ports(*out, report)) return status;
    uint32_t ops = read_operation_count(cursor);
    if (!out->ops.allocate(block, ops)) return report->fail(EVENSONG_MEMORY, "no memory for %u operations", ops);
    for (Op& op : out->ops) {
        if (evensong_status status = read_op(cursor, model, *out, operands, attributes, &op, report)) return status;
    }
    if (cursor->failed)
        return report->fail(EVENSONG_CORRUPT, "program '%s' is truncated or has too many parts", out->name);
    return EVENSONG_OK;
}

}  // namespace

evensong_status parse(const Sections& sections, const Parts& parts, Block* block, Model* model, Report* report) {
    model->constants = sections.constants.data;
    model->const_bytes = sections.constants.size;
    model->initial_state = sections.state.data;
    model->state_bytes = sections.state.size;
    if (!model->names.allocate(block, size_t(parts.name_bytes)) ||
        !model->operand_pool.allocate(block, size_t(parts.operands)) ||
        !model->attribute_pool.allocate(block, size_t(parts.attributes))) {
        return report->fail(EVENSONG_MEMORY, "no memory for the programs");
    }
    Names names = {model->names.begin(), model->names.end()};
    if (evensong_status status = read_variables(Cursor(sections.variables), block, &names, model, report)) {
        return status;
    }
    Cursor cursor(sections.programs);
    uint32_t programs = read_program_count(&cursor);
    if (cursor.failed) return report->fail(EVENSONG_ARTIFACT, "more programs than fit");
    if (!model->programs.allocate(block, programs)) return report->fail(EVENSONG_MEMORY, "no memory for the programs");
    size_t operands = 0, attributes = 0;
    for (Program& program : model->programs) {
        evensong_status status = read_program(&cursor, block, &names, model, &operands, &attributes, &program, report);
        if (status) return status;
    }
    if (cursor.remaining()) return report->fail(EVENSONG_CORRUPT, "the programs section has bytes too many");
    return EVENSONG_OK;
}

}  // namespace evensong
