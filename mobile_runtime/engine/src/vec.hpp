// Portable vectors: GCC/Clang vector extensions, as wide as the instruction set that this file is compiled for.
//
// Everything lives in the namespace of the instruction set, so that the linker never merges an AVX-512 copy of a helper
// into the baseline. Plain operators (+ * < ?:) work on these types; what they cannot say stands here.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

#if !defined(EVENSONG_LANES)
#if defined(__AVX512F__)
#define EVENSONG_LANES 16
#elif defined(__AVX2__)
#define EVENSONG_LANES 8
#else
#define EVENSONG_LANES 4
#endif
#endif

#define EVENSONG_INLINE static inline __attribute__((always_inline))

// Longer functions of one vector: calls, where code is to be small first.
#if defined(EVENSONG_SMALL) || defined(__wasm__)
#define EVENSONG_FUNCTION __attribute__((noinline, unused)) static
#else
#define EVENSONG_FUNCTION EVENSONG_INLINE
#endif

// Before a loop of a few fixed rounds over an array of vectors: unrolled, so that the array lives in registers.
#if defined(__clang__)
#define EVENSONG_UNROLL _Pragma("clang loop unroll(full)")
#else
#define EVENSONG_UNROLL _Pragma("GCC unroll 32")
#endif

namespace evensong {
namespace EVENSONG_ISA {

constexpr size_t kLanes = EVENSONG_LANES;  // 32-bit lanes in a vector
#if defined(EVENSONG_SMALL)
constexpr bool kIsSmall = true;  // kernels without which every operation can do are left out
#else
constexpr bool kIsSmall = false;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));  // one to a 32-bit lane
typedef float Floats4 __attribute__((vector_size(16)));

// ------------------------------------------------------------------------------------------------- loads and stores

EVENSONG_INLINE Floats splat(float x) { return x - Floats{}; }
EVENSONG_INLINE Ints splat(int32_t x) { return x - Ints{}; }
EVENSONG_INLINE Words splat(uint32_t x) { return x - Words{}; }

template <class Vector>
EVENSONG_INLINE Vector load_as(const void* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class Vector>
EVENSONG_INLINE void store_as(void* p, Vector v) {
    __builtin_memcpy(p, &v, sizeof v);
}

EVENSONG_INLINE Floats load(const float* p) { return load_as<Floats>(p); }
EVENSONG_INLINE void store(float* p, Floats v) { store_as(p, v); }

// Signed bytes to lanes, and lanes to their low bytes. By hand: GCC's own conversion takes them one at a time.
EVENSONG_INLINE Ints widen(const void* p) {
#if EVENSONG_LANES == 16
    return Ints(_mm512_maskz_cvtepi8_epi32(0xffff, load_as<__m128i>(p)));
#elif EVENSONG_LANES == 8
    return Ints(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#elif defined(__SSE2__)
    const __m128i bytes = _mm_cvtsi32_si128(load_as<int32_t>(p)), pairs = _mm_unpacklo_epi8(bytes, bytes);
    return Ints(_mm_srai_epi32(_mm_unpacklo_epi16(pairs, pairs), 24));
#else
    return __builtin_convertvector(load_as<Bytes>(p), Ints);
#endif
}
EVENSONG_INLINE void narrow(void* p, Ints v) {
#if EVENSONG_LANES == 16
    store_as(p, _mm512_maskz_cvtepi32_epi8(0xffff, __m512i(v)));
#elif EVENSONG_LANES == 8
    const __m256i low = __m256i(v & 0xff);
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
#elif defined(__SSE2__)
    const __m128i low = __m128i(v & 0xff), pairs = _mm_packs_epi32(low, low);
    store_as(p, _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs)));
#else
    store_as(p, __builtin_convertvector(v, Bytes));
#endif
}

EVENSONG_INLINE Ints lane_numbers() {
#if EVENSONG_LANES == 16
    return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif EVENSONG_LANES == 8
    return Ints{0, 1, 2, 3, 4, 5, 6, 7};
#else
    return Ints{0, 1, 2, 3};
#endif
}

// The first `count` elements, 0 < count < kLanes; the other lanes are zero. No byte beyond them is touched.
#if EVENSONG_LANES == 16
EVENSONG_INLINE Floats load_partial(const float* p, size_t count) {
    return Floats(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
}
EVENSONG_INLINE void store_partial(float* p, Floats v, size_t count) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), __m512(v));
}
#elif EVENSONG_LANES == 8
EVENSONG_INLINE Floats load_partial(const float* p, size_t count) {
    return Floats(_mm256_maskload_ps(p, __m256i(lane_numbers() < splat(int32_t(count)))));
}
EVENSONG_INLINE void store_partial(float* p, Floats v, size_t count) {
    _mm256_maskstore_ps(p, __m256i(lane_numbers() < splat(int32_t(count))), __m256(v));
}
#else  // calls, not inlined: they are rare, and would double the size of every loop
__attribute__((noinline, unused)) static Floats load_partial(const float* p, size_t count) {
    return Floats{p[0], count > 1 ? p[1] : 0.0f, count > 2 ? p[2] : 0.0f, 0.0f};
}
__attribute__((noinline, unused)) static void store_partial(float* p, Floats v, size_t count) {
    p[0] = v[0];
    if (count > 1) p[1] = v[1];
    if (count > 2) p[2] = v[2];
}
#endif

// `count` elements, at most kLanes of them are used.
EVENSONG_INLINE Floats load_upto(const float* p, size_t count) {
    return __builtin_expect(count >= kLanes, 1) ? load(p) : load_partial(p, count);
}
EVENSONG_INLINE void store_upto(float* p, Floats v, size_t count) {
    if (__builtin_expect(count >= kLanes, 1)) {
        store(p, v);
    } else {
        store_partial(p, v, count);
    }
}

// Copies and zeros of any length: what the compiler makes of memcpy() when it optimises for size is slow.
EVENSONG_INLINE void copy_floats(float* to, const float* from, size_t count) {
    for (size_t i = 0; i < count; i += kLanes) store_upto(to + i, load_upto(from + i, count - i), count - i);
}
EVENSONG_INLINE void clear_floats(float* to, size_t count) {
    for (size_t i = 0; i < count; i += kLanes) store_upto(to + i, Floats{}, count - i);
}

// Lanes from `count` on become `filler`.
EVENSONG_INLINE Floats keep_first(Floats v, size_t count, float filler) {
    return lane_numbers() < splat(int32_t(count < kLanes ? count : kLanes)) ? v : splat(filler);
}

// ------------------------------------------------------------------------------------------------- lane arithmetic

// NaN in `a` or `b` gives b.
EVENSONG_INLINE Floats minimum(Floats a, Floats b) {
#if EVENSONG_LANES == 16
    return Floats(_mm512_maskz_min_ps(0xffff, __m512(a), __m512(b)));
#elif EVENSONG_LANES == 8
    return Floats(_mm256_min_ps(__m256(a), __m256(b)));
#elif defined(__SSE2__)
    return Floats(_mm_min_ps(__m128(a), __m128(b)));
#else
    return a < b ? a : b;
#endif
}
EVENSONG_INLINE Floats maximum(Floats a, Floats b) {
#if EVENSONG_LANES == 16
    return Floats(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b)));
#elif EVENSONG_LANES == 8
    return Floats(_mm256_max_ps(__m256(a), __m256(b)));
#elif defined(__SSE2__)
    return Floats(_mm_max_ps(__m128(a), __m128(b)));
#else
    return a > b ? a : b;
#endif
}
EVENSONG_INLINE Floats absolute(Floats v) { return Floats(Ints(v) & 0x7fffffff); }
EVENSONG_INLINE Floats with_sign_of(Floats magnitude, Floats sign) {
    return Floats(Ints(magnitude) | (Ints(sign) & int32_t(0x80000000)));
}

EVENSONG_INLINE Floats square_root(Floats v) {
#if EVENSONG_LANES == 16
    return Floats(_mm512_maskz_sqrt_ps(0xffff, __m512(v)));
#elif EVENSONG_LANES == 8
    return Floats(_mm256_sqrt_ps(__m256(v)));
#elif defined(__SSE2__)
    return Floats(_mm_sqrt_ps(__m128(v)));
#elif defined(__wasm_simd128__)
    return Floats(wasm_f32x4_sqrt(v128_t(v)));
#elif defined(__aarch64__)
    return Floats(vsqrtq_f32(float32x4_t(v)));
#else
    for (size_t i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}

// 1.5 * 2^23: its unit in the last place is 1, so that adding it to |v| < 2^22 rounds v to the nearest integer, ties to
// even.
constexpr float kRoundingBias = 12582912.0f;

// ------------------------------------------------------------------------------------------------- across lanes

template <class Four, class Vector>
EVENSONG_INLINE Four quarter(Vector v, size_t index) {
    return load_as<Four>(reinterpret_cast<const char*>(&v) + 16 * index);
}

// Lane i becomes the sum of lanes i, i + 4, i + 8, ...
template <class Four, class Vector>
EVENSONG_INLINE Four fold_to_four(Vector v) {
    Four sum = quarter<Four>(v, 0);
    EVENSONG_UNROLL
    for (size_t i = 1; i < kLanes / 4; ++i) sum += quarter<Four>(v, i);
    return sum;
}

// Four rows of four lanes, turned: lane i of line j is lane j of row i.
typedef int32_t Ints4 __attribute__((vector_size(16)));
struct Square {
    Ints4 line[4];
};
EVENSONG_INLINE Square turn(Ints4 a, Ints4 b, Ints4 c, Ints4 d) {
    const Ints4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Ints4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return {{__builtin_shufflevector(ab0, cd0, 0, 1, 4, 5), __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7),
             __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5), __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7)}};
}

EVENSONG_INLINE float sum_lanes(Floats v) {
    Floats4 s = fold_to_four<Floats4>(v);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

EVENSONG_INLINE float max_lanes(Floats v) {
    float best = v[0];
    for (size_t i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
    return best;
}

// One bit for each lane of a comparison's result.
EVENSONG_INLINE uint32_t lane_bits(Ints mask) {
#if EVENSONG_LANES == 16
    return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask));
#elif EVENSONG_LANES == 8
    return uint32_t(_mm256_movemask_ps(__m256(mask)));
#elif defined(__SSE2__)
    return uint32_t(_mm_movemask_ps(__m128(mask)));
#else
    uint32_t bits = 0;
    EVENSONG_UNROLL
    for (size_t i = 0; i < kLanes; ++i) bits |= uint32_t(mask[i]) & 1u << i;
    return bits;
#endif
}

// Any lane of a comparison's result set?
EVENSONG_INLINE bool any(Ints mask) {
#if EVENSONG_LANES == 16
    return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) != 0;
#elif EVENSONG_LANES == 8
    return !_mm256_testz_si256(__m256i(mask), __m256i(mask));
#else
    int32_t bits = 0;
    EVENSONG_UNROLL
    for (size_t i = 0; i < kLanes; ++i) bits |= mask[i];
    return bits != 0;
#endif
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
