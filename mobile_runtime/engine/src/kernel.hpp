// What a kernel sees: live operands, attributes, workspace. Kernels are pure functions of a Call; they never allocate.
//
// Every kernel source is compiled once per instruction set with -DEVENSONG_ISA=name, inside `namespace evensong::name`,
// and fills one table indexed by operation code. The loader has verified ranks, shapes, dtypes and regions before a
// kernel runs; VALUES in memory (embedding ids, labels, pooling indices) are still hostile, and kernels check them as
// they use them. Operands in the host's buffers are aligned for their element type only, all others to 64 bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace evensong {

enum class DType : uint8_t { kF32 = 1, kI8 = 2, kU8 = 3, kI32 = 4 };

// One tensor with the number of rows that this run really has.
struct Operand {
    void* data;        // first element; outputs are writable
    uint32_t dims[6];  // live sizes: dims[0] is already scaled to the run's batch
    uint32_t rank;
    DType dtype;
    float scale;         // int8 only
    int32_t zero_point;  // int8 only
    size_t elements;     // product of dims

    const float* f32() const { return static_cast<const float*>(data); }
    float* f32_mut() const { return static_cast<float*>(data); }
    const int8_t* i8() const { return static_cast<const int8_t*>(data); }
    int8_t* i8_mut() const { return static_cast<int8_t*>(data); }
    const int32_t* i32() const { return static_cast<const int32_t*>(data); }
    int32_t* i32_mut() const { return static_cast<int32_t*>(data); }
    const uint8_t* u8() const { return static_cast<const uint8_t*>(data); }
    uint8_t* u8_mut() const { return static_cast<uint8_t*>(data); }
    uint32_t last() const { return rank ? dims[rank - 1] : 1; }  // size of the last dimension
};

union Attribute {
    int32_t i;
    float f;
};

// What one run of a program shares between its kernels.
struct Run {
    float learning_rate;
    uint64_t step;  // from 1
    uint64_t seed;
};

enum class Fault : int32_t {
    kNone = 0,
    kIndexOutOfRange = 1,  // an embedding id or a label
    kNotFinite = 2,        // a loss or an updated weight is NaN or infinite
};

struct Call {
    const Operand* in;
    uint32_t inputs;
    const Operand* out;
    uint32_t outputs;
    const Attribute* attr;  // in the order of the operation's specification (opcodes.h)
    char* workspace;        // 64-byte aligned, at least workspace_bytes(call)
    const Run* run;
};

using Kernel = Fault (*)(const Call&);

constexpr uint32_t kOpCodes = 160;  // size of a kernel table; codes are below it

}  // namespace evensong
