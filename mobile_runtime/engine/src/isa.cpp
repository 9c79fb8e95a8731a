// Which kernels run on this CPU. Each name here is a namespace: the same sources, compiled once per instruction set.
#include "isa.hpp"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(__linux__)
extern "C" unsigned long getauxval(unsigned long type);  // declared by hand: cross-compilers may come without headers
#endif

namespace evensong {

#define EVENSONG_DECLARE(isa)                           \
    namespace isa {                                     \
    void register_all(Kernel* table);                   \
    void register_int8(Kernel* table);                  \
    bool all_finite(const float* values, size_t count); \
    }

static bool always() { return true; }

#if defined(__x86_64__)

EVENSONG_DECLARE(avx512)
EVENSONG_DECLARE(avxvnni)
EVENSONG_DECLARE(avx2)
EVENSONG_DECLARE(sse2)

// Intel's manual (volume 1, chapter 14): a set counts if the CPU has it and the system saves its registers. The
// compiler's __builtin_cpu_supports says the same, at the price of a table of every CPU.
struct Features {
    uint32_t leaf1_c = 0, leaf7_b = 0, leaf7_c = 0, leaf7_1_a = 0, saved = 0;

    Features() {
        uint32_t a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &leaf1_c, &d) || !has(leaf1_c, bit_OSXSAVE)) return;
        __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
        if (__get_cpuid_count(7, 0, &a, &leaf7_b, &leaf7_c, &d) && a >= 1) {
            __get_cpuid_count(7, 1, &leaf7_1_a, &b, &c, &d);
        }
    }
    static bool has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }
};

static bool has_avx2() {
    const Features f;
    return Features::has(f.saved, 0x06) && Features::has(f.leaf1_c, bit_FMA) && Features::has(f.leaf7_b, bit_AVX2);
}

static bool has_avxvnni() {
    constexpr uint32_t kAvxVnni = 1u << 4;
    return has_avx2() && Features::has(Features().leaf7_1_a, kAvxVnni);
}

static bool has_avx512() {
    const Features f;
    const uint32_t needed = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return has_avx2() && Features::has(f.saved, 0xe6) && Features::has(f.leaf7_b, needed) &&
           Features::has(f.leaf7_c, bit_AVX512VNNI);
}

static const InstructionSet kInstructionSets[] = {
    {"avx512", has_avx512,
     [](Kernel* table) {
         avx2::register_all(table);  // AVX-512 has matrix products only: the rest gains nothing from it
         avx512::register_all(table);
     },
     avx512::all_finite},
    {"avxvnni", has_avxvnni,
     [](Kernel* table) {
         avx2::register_all(table);
         avxvnni::register_int8(table);
     },
     avx2::all_finite},
    {"avx2", has_avx2, avx2::register_all, avx2::all_finite},
    {"sse2", always, sse2::register_all, sse2::all_finite},
};

#elif defined(__aarch64__)

EVENSONG_DECLARE(dotprod)
EVENSONG_DECLARE(neon)

static bool has_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD)
    return true;  // the compiler's own target has it
#elif defined(__APPLE__)
    int32_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
#elif defined(__linux__)  // Android too
    constexpr unsigned long kHwcap = 16, kAsimdDp = 1ul << 20;
    return getauxval(kHwcap) & kAsimdDp;
#else
    return false;
#endif
}

static const InstructionSet kInstructionSets[] = {
    {"dotprod", has_dotprod,
     [](Kernel* table) {
         neon::register_all(table);
         dotprod::register_int8(table);
     },
     neon::all_finite},
    {"neon", always, neon::register_all, neon::all_finite},
};

#else  // one baseline, chosen when the library is built: EVENSONG_BASELINE is neon, simd128, relaxed or generic

EVENSONG_DECLARE(EVENSONG_BASELINE)

#define EVENSONG_STRING_(text) #text
#define EVENSONG_STRING(text) EVENSONG_STRING_(text)

static const InstructionSet kInstructionSets[] = {
    {EVENSONG_STRING(EVENSONG_BASELINE), always, EVENSONG_BASELINE::register_all, EVENSONG_BASELINE::all_finite},
};

#endif

const InstructionSet* find_instruction_set(const char* name) {
    for (const InstructionSet& set : kInstructionSets) {
        if ((!name || strcmp(name, set.name) == 0) && set.supported()) return &set;
    }
    return nullptr;
}

}  // namespace evensong
