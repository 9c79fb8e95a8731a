// An opened artifact, as the files behind evensong.h see it.
#pragma once

#include "evensong.h"
#include "isa.hpp"
#include "model.hpp"

namespace evensong {

// A program made ready: one Operand for every use of a tensor, in the order of the operations.
struct Prepared {
    Array<Operand> operands;
    Array<uint32_t> first_operand;  // of each operation, in `operands`
    uint32_t batch;                 // that `operands` now describe
    bool updates_statistics;
};

// A running statistic: training overwrites it before the loss is known, so a copy can undo a diverged step.
struct Statistic {
    char* live;
    char* saved;
    size_t bytes;
};

// Bytes of the port's tensor for `batch` examples.
uint64_t live_bytes(const Program& program, const Port& port, uint32_t batch);

}  // namespace evensong

// Lies at the start of a block that holds everything but the regions. All bits zero is an engine that holds nothing.
struct evensong_engine {
    evensong::Model model;
    const evensong::InstructionSet* isa;
    evensong::Kernel kernels[evensong::kOpCodes];
    evensong_memory memory;
    const char* constants;
    char *state, *slots, *arena, *workspace, *saved;
    void* owned_regions;  // what evensong_close frees, with the engine; null if all memory is the caller's
    size_t held_bytes;
    evensong::Array<evensong::Prepared> prepared;     // one per program
    evensong::Array<evensong::Statistic> statistics;  // one per variable that is a buffer
    evensong::Array<uint8_t> frozen;                  // one flag per variable

    char* region(evensong::Region region) {
        char* const bases[] = {const_cast<char*>(constants), state, slots, arena};
        return region <= evensong::Region::kArena ? bases[int(region)] : nullptr;
    }
};
