// The instruction sets that this library has kernels for, best first, and the choice among them.
#pragma once

#include "kernel.hpp"

namespace evensong {

// What one instruction set provides. `fill` writes every kernel that it has into a table indexed by operation code.
struct InstructionSet {
    const char* name;
    bool (*supported)();
    void (*fill)(Kernel* table);
    bool (*all_finite)(const float* values, size_t count);
};

// The named set, or the best one if `name` is null; null if the CPU or the build lacks it.
const InstructionSet* find_instruction_set(const char* name);

}  // namespace evensong
