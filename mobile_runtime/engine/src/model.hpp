// A parsed artifact: plain arrays in one block of memory, sizes known, every offset inside its region.
#pragma once

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "evensong.h"
#include "kernel.hpp"

namespace evensong {

enum class Region : uint8_t { kConst = 0, kState = 1, kSlots = 2, kArena = 3, kInput = 4, kOutput = 5 };

constexpr size_t kAlignment = 64;
constexpr uint32_t kMaxRank = 6;
constexpr uint64_t kMaxArtifactBytes = uint64_t(1) << 31;

constexpr uint64_t align(uint64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }
constexpr uint32_t itemsize(DType dtype) { return dtype == DType::kF32 || dtype == DType::kI32 ? 4 : 1; }

// A status and the sentence that goes with it.
class Report {
  public:
    Report(char* message, size_t capacity) : message_(message), capacity_(message ? capacity : 0) {
        if (capacity_) message_[0] = 0;
    }
    __attribute__((format(printf, 3, 4))) evensong_status fail(evensong_status status, const char* format, ...) {
        va_list arguments;
        va_start(arguments, format);
        if (capacity_) vsnprintf(message_, capacity_, format, arguments);
        va_end(arguments);
        return status;
    }

  private:
    char* message_;
    size_t capacity_;
};

// Zeroed memory, handed out from its start and never given back one by one.
class Block {
  public:
    static constexpr uint64_t round_up(uint64_t bytes) { return (bytes + 15) / 16 * 16; }

    Block() = default;
    Block(void* memory, size_t size) : next_(static_cast<char*>(memory)), left_(size) {}  // from a multiple of 8
    // Null when it is used up.
    void* take(uint64_t bytes) {
        void* taken = scratch(bytes);
        if (taken) next_ += round_up(bytes), left_ -= size_t(round_up(bytes));
        return taken;
    }
    // The same memory that take() will give next, for use until then.
    void* scratch(uint64_t bytes) const { return bytes <= left_ && round_up(bytes) <= left_ ? next_ : nullptr; }
    size_t left() const { return left_; }

  private:
    char* next_ = nullptr;
    size_t left_ = 0;
};

// An array in a Block. All bits zero must be a valid T; nothing is ever destroyed.
template <class T>
struct Array {
    T* data = nullptr;
    size_t size = 0;

    bool allocate(Block* block, size_t count) {
        data = static_cast<T*>(block->take(uint64_t(count) * sizeof(T)));
        size = data ? count : 0;
        return data != nullptr;
    }
    T& operator[](size_t index) { return data[index]; }
    const T& operator[](size_t index) const { return data[index]; }
    T* begin() const { return data; }
    T* end() const { return data + size; }
};

struct Variable {
    const char* name;
    DType dtype;
    bool trainable;  // else a buffer
    uint8_t rank;
    uint8_t perm[kMaxRank];   // axis i of the author's array is axis perm[i] here
    uint32_t dims[kMaxRank];  // as it lies in STATE
    uint64_t offset, bytes;
};

struct Tensor {
    DType dtype;
    Region region;
    bool batched;
    uint32_t rank;
    uint32_t dims[kMaxRank];  // for max_batch
    uint64_t offset;          // bytes in the region, or the port's index
    uint64_t elements, bytes;
    float scale;
    int32_t zero_point;

    uint64_t end() const { return offset + bytes; }
    uint32_t last() const { return rank ? dims[rank - 1] : 1; }
};

constexpr int32_t kNoVariable = -1;

struct Op {
    uint16_t code;
    uint8_t inputs, outputs;
    const uint32_t* operands;  // tensors: inputs, then outputs
    const Attribute* attributes;
    int32_t variable;  // what an optimiser updates, else kNoVariable
};

struct Port {
    const char* name;
    uint32_t tensor;
};

struct Program {
    const char* name;
    uint32_t max_batch;
    uint64_t arena_bytes, workspace_bytes;
    uint64_t work;  // multiply-adds of one run of max_batch examples, by the verifier's count
    Array<Port> inputs, outputs;
    Array<Tensor> tensors;
    Array<Op> ops;

    const Array<Port>& ports(bool output) const { return output ? outputs : inputs; }
};

struct Model {
    const uint8_t* constants = nullptr;  // inside the artifact's bytes
    const uint8_t* initial_state = nullptr;
    uint64_t const_bytes = 0, state_bytes = 0, slot_bytes = 0;
    Array<Variable> variables;
    Array<Program> programs;
    Array<uint32_t> operand_pool;
    Array<Attribute> attribute_pool;
    Array<char> names;  // one after the other, each ended by a zero
};

// The sections of an artifact, inside its bytes.
struct Sections {
    struct Section {
        const uint8_t* data;
        size_t size;
    };
    Section manifest, variables, programs, constants, state;
};

// Checks the frame: magic, version, length, checksum, table of sections.
evensong_status read_sections(const uint8_t* bytes, size_t size, Sections* out, Report* report);

// How many of everything an artifact has, and the largest of each kind of memory.
struct Parts {
    uint64_t variables, buffers, programs, ports, tensors, most_tensors, operations, operands, attributes, name_bytes;
    uint64_t constants, state, slots, arena, workspace, buffer_bytes;
};

// Reads nothing but counts and sizes. Of a broken artifact it counts at least what parse() needs to say what is wrong.
Parts count_parts(const Sections& sections);

// What the arrays of a Model take, and what parse() and fuse() use for a while on top.
uint64_t model_bytes(const Parts& parts);
uint64_t model_scratch(const Parts& parts);

// Reads the structure: afterwards every count, index and offset is in range. Operands are not yet matched.
evensong_status parse(const Sections& sections, const Parts& parts, Block* block, Model* model, Report* report);

// Matches every operation with its operands (dtypes, ranks, sizes, attributes, regions, overlaps, workspace, amount of
// work) and sets Op::variable. Afterwards no kernel can leave its memory.
evensong_status verify(Model* model, Report* report);

// Whether two tensors of one program share memory, for any batch.
bool overlap(const Tensor& a, const Tensor& b);

bool is_optimizer(uint16_t code);
bool is_loss(uint16_t code);

}  // namespace evensong
