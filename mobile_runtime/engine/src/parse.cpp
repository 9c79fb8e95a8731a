// Bytes to Model. The bytes are hostile until the frame, the checksum and every structural rule of docs/artifact.md
// hold.
#include "model.hpp"
#include "opcodes.h"

namespace evensong {
namespace {

constexpr size_t kHeaderBytes = 64;
constexpr size_t kSectionBytes = 24;
constexpr uint16_t kMajorVersion = 1;
constexpr uint32_t kMostPrograms = 32;
constexpr uint32_t kMostVariables = 1u << 14;  // these three keep the verifier's searches short
constexpr uint32_t kMostTensors = 1u << 18;
constexpr uint32_t kMostOps = 1u << 16;
constexpr uint32_t kMostBatch = 1u << 20;

enum SectionKind : uint32_t {
    kManifest = 1,
    kVariables = 2,
    kPrograms = 3,
    kConstants = 4,
    kState = 5,
    kSectionKinds = 6
};

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
    void name(char (&out)[256]) {
        uint16_t length = u16();
        if (length < 1 || length > 255) failed = true;
        const uint8_t* text = take(length);
        memset(out, 0, sizeof out);
        if (text) memcpy(out, text, length);
    }
};

// ------------------------------------------------------------------------------------------------- sections

struct Sections {
    const uint8_t* data[kSectionKinds];
    size_t size[kSectionKinds];
};

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
        if (kind < kSectionKinds) {
            out->data[kind] = bytes + offset;
            out->size[kind] = length;
        }
    }
    for (uint32_t kind = kManifest; kind < kSectionKinds; ++kind) {
        if (!out->data[kind]) return report->fail(EVENSONG_CORRUPT, "section %u is missing", kind);
    }
    return EVENSONG_OK;
}

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

evensong_status check_apart(const Array<Variable>& variables, Report* report) {
    struct Span {
        uint64_t begin, end;
    };
    Array<Span> spans;
    if (!spans.allocate(variables.size))
        return report->fail(EVENSONG_MEMORY, "no memory for %zu variables", variables.size);
    for (size_t i = 0; i < variables.size; ++i)
        spans[i] = {variables[i].offset, variables[i].offset + variables[i].bytes};
    qsort(spans.data, spans.size, sizeof(Span), [](const void* a, const void* b) {
        uint64_t left = static_cast<const Span*>(a)->begin, right = static_cast<const Span*>(b)->begin;
        return left < right ? -1 : int(left > right);
    });
    for (size_t i = 1; i < spans.size; ++i) {
        if (spans[i].begin < spans[i - 1].end) return report->fail(EVENSONG_ARTIFACT, "two variables share memory");
    }
    return EVENSONG_OK;
}

evensong_status read_variables(Cursor cursor, Model* model, Report* report) {
    uint32_t count = cursor.count(15, kMostVariables);
    uint64_t state_bytes = cursor.u64();
    model->slot_bytes = cursor.u64();
    if (cursor.failed || state_bytes != model->state_bytes || model->slot_bytes > kMaxArtifactBytes) {
        return report->fail(EVENSONG_ARTIFACT, "the sizes of the state or of the optimiser's slots are wrong");
    }
    if (!model->variables.allocate(count)) return report->fail(EVENSONG_MEMORY, "no memory for %u variables", count);
    for (uint32_t i = 0; i < count; ++i) {
        Variable& variable = model->variables[i];
        char name[256];
        cursor.name(name);
        uint8_t dtype = cursor.u8(), flags = cursor.u8(), rank = cursor.u8(), zero = cursor.u8();
        if (cursor.failed || zero || rank > kMaxRank || (flags != 1 && flags != 2) ||
            !read_dtype(dtype, &variable.dtype)) {
            return report->fail(EVENSONG_ARTIFACT, "variable %u has a bad header", i);
        }
        variable.trainable = flags == 1;
        uint32_t dims[kMaxRank];
        for (uint32_t axis = 0; axis < rank; ++axis) dims[axis] = cursor.u32();
        uint32_t seen = 0;
        for (uint32_t i = 0; i < rank; ++i) {
            const uint32_t axis = cursor.u8();
            if (axis < rank) seen |= 1u << axis;
        }
        if (seen != (1u << rank) - 1)
            return report->fail(EVENSONG_ARTIFACT, "variable '%s' has a bad permutation", name);
        variable.offset = cursor.u64();
        uint64_t elements;
        if (cursor.failed || !measure(dims, rank, variable.dtype, &elements, &variable.bytes) ||
            !fits(variable.offset, variable.bytes, model->state_bytes)) {
            return report->fail(EVENSONG_ARTIFACT, "variable '%s' does not fit the state", name);
        }
    }
    if (cursor.remaining()) return report->fail(EVENSONG_CORRUPT, "the variables section has bytes too many");
    return check_apart(model->variables, report);
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
    out->partner = kNoPartner;
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

evensong_status read_ports(Cursor* cursor, Array<Port>* ports, Report* report) {
    uint8_t count = cursor->u8();
    if (!ports->allocate(count)) return report->fail(EVENSONG_MEMORY, "no memory for %u ports", count);
    char name[256];
    for (Port& port : *ports) {
        cursor->name(name);
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

evensong_status read_program(Cursor* cursor, Model* model, size_t* operands, size_t* attributes, Program* out,
                             Report* report) {
    cursor->name(out->name);
    out->max_batch = cursor->u32();
    out->arena_bytes = cursor->u64();
    out->workspace_bytes = cursor->u64();
    if (cursor->failed || out->max_batch < 1 || out->max_batch > kMostBatch || out->arena_bytes > kMaxArtifactBytes ||
        out->workspace_bytes > kMaxArtifactBytes) {
        return report->fail(EVENSONG_ARTIFACT, "program '%s' has a bad size", out->name);
    }
    if (evensong_status status = read_ports(cursor, &out->inputs, report)) return status;
    if (evensong_status status = read_ports(cursor, &out->outputs, report)) return status;
    uint32_t tensors = cursor->count(20, kMostTensors);
    if (!out->tensors.allocate(tensors)) return report->fail(EVENSONG_MEMORY, "no memory for %u tensors", tensors);
    for (Tensor& tensor : out->tensors) {
        if (evensong_status status = read_tensor(cursor, *model, *out, &tensor, report)) return status;
    }
    if (evensong_status status = check_ports(*out, report)) return status;
    uint32_t ops = cursor->count(6, kMostOps);
    if (!out->ops.allocate(ops)) return report->fail(EVENSONG_MEMORY, "no memory for %u operations", ops);
    for (Op& op : out->ops) {
        if (evensong_status status = read_op(cursor, model, *out, operands, attributes, &op, report)) return status;
    }
    if (cursor->failed)
        return report->fail(EVENSONG_CORRUPT, "program '%s' is truncated or has too many parts", out->name);
    return EVENSONG_OK;
}

}  // namespace

evensong_status parse(const uint8_t* bytes, size_t size, Model* model, Report* report) {
    Sections sections;
    if (evensong_status status = read_sections(bytes, size, &sections, report)) return status;
    model->constants = sections.data[kConstants];
    model->const_bytes = sections.size[kConstants];
    model->initial_state = sections.data[kState];
    model->state_bytes = sections.size[kState];
    Cursor variables(sections.data[kVariables], sections.size[kVariables]);
    if (evensong_status status = read_variables(variables, model, report)) return status;

    Cursor cursor(sections.data[kPrograms], sections.size[kPrograms]);
    uint32_t programs = cursor.count(32, kMostPrograms);
    if (cursor.failed) return report->fail(EVENSONG_ARTIFACT, "more programs than fit");
    // Every operand and every attribute takes four bytes of the section.
    size_t most_words = sections.size[kPrograms] / 4;
    if (!model->programs.allocate(programs) || !model->operand_pool.allocate(most_words) ||
        !model->attribute_pool.allocate(most_words)) {
        return report->fail(EVENSONG_MEMORY, "no memory for the programs");
    }
    size_t operands = 0, attributes = 0;
    for (Program& program : model->programs) {
        if (evensong_status status = read_program(&cursor, model, &operands, &attributes, &program, report))
            return status;
    }
    if (cursor.remaining()) return report->fail(EVENSONG_CORRUPT, "the programs section has bytes too many");
    return EVENSONG_OK;
}

}  // namespace evensong
