// Which kernels run on this CPU. Each name here is a namespace: the same sources, compiled once per instruction set.
#include "isa.hpp"

#include <string.h>

namespace evensong {

#define EVENSONG_DECLARE(isa)                           \
    namespace isa {                                     \
    void register_all(Kernel* table);                   \
    bool all_finite(const float* values, size_t count); \
    }

#if defined(__x86_64__) || defined(_M_X64)

EVENSONG_DECLARE(avx512)
EVENSONG_DECLARE(avx2)
EVENSONG_DECLARE(sse2)

static const InstructionSet kInstructionSets[] = {
    {"avx512",
     [] {
         __builtin_cpu_init();
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
     },
     [](Kernel* table) {
         avx2::register_all(table);  // AVX-512 has matrix products only: the rest gains nothing from it
         avx512::register_all(table);
     },
     avx512::all_finite},
    {"avx2",
     [] {
         __builtin_cpu_init();
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     },
     avx2::register_all, avx2::all_finite},
    {"sse2", [] { return true; }, sse2::register_all, sse2::all_finite},
};

#else  // one baseline, chosen when the library is built: EVENSONG_BASELINE is neon, wasm or generic

EVENSONG_DECLARE(EVENSONG_BASELINE)

#define EVENSONG_STRING_(text) #text
#define EVENSONG_STRING(text) EVENSONG_STRING_(text)

static const InstructionSet kInstructionSets[] = {
    {EVENSONG_STRING(EVENSONG_BASELINE), [] { return true; }, EVENSONG_BASELINE::register_all,
     EVENSONG_BASELINE::all_finite},
};

#endif

const InstructionSet* find_instruction_set(const char* name) {
    for (const InstructionSet& set : kInstructionSets) {
        if ((!name || strcmp(name, set.name) == 0) && set.supported()) return &set;
    }
    return nullptr;
}

}  // namespace evensong
