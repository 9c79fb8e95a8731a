// Int8 arithmetic that gives the same bytes on every target: exact 32-bit sums, then one float32 step after another.
// Sources that include this are compiled without contraction to fused multiply-add (see CMakeLists.txt).
#pragma once

#include "kernel.hpp"
#include "vec.hpp"

namespace evensong {
namespace EVENSONG_ISA {

typedef int32_t Ints4 __attribute__((vector_size(16)));

// ------------------------------------------------------------------------------------------------- bytes and lanes

// `live` bytes, at most kLanes of them, each in a 32-bit lane.
EVENSONG_INLINE Ints load_bytes(const int8_t* p, size_t live) {
    if (__builtin_expect(live >= kLanes, 1)) return __builtin_convertvector(load_as<Bytes>(p), Ints);
#if EVENSONG_LANES == 16
    return __builtin_convertvector(Bytes(_mm_maskz_loadu_epi8(__mmask16((1u << live) - 1), p)), Ints);
#else
    Ints lanes = {};
    for (size_t i = 0; i < live; ++i) lanes[i] = p[i];
    return lanes;
#endif
}

EVENSONG_INLINE void store_bytes(int8_t* p, Ints v, size_t live) {
    if (__builtin_expect(live >= kLanes, 1)) {
        store_as(p, __builtin_convertvector(v, Bytes));
        return;
    }
#if EVENSONG_LANES == 16
    _mm512_mask_cvtepi32_storeu_epi8(p, __mmask16((1u << live) - 1), __m512i(v));
#else
    for (size_t i = 0; i < live; ++i) p[i] = int8_t(v[i]);
#endif
}

EVENSONG_INLINE Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

// ------------------------------------------------------------------------------------------------- requantisation

// clamp(rne(v) + zero_point, lo, hi), and NaN counts as 0. Clamping first is the same, and keeps the rounding in range.
struct Requantizer {
    float zero_point, lowest, highest;

    Requantizer(int32_t zero_point, int32_t lo, int32_t hi)
        : zero_point(float(zero_point)), lowest(float(lo - zero_point)), highest(float(hi - zero_point)) {}

    // Values are Floats or Floats4; the result has as many int32 lanes.
    template <class Values>
    __attribute__((always_inline)) auto operator()(Values v) const {
        typedef decltype(v == v) Mask;
        v = Values(Mask(v) & (v == v));
        v = v < lowest ? lowest - Values{} : v;
        v = v > highest ? highest - Values{} : v;
        // The unit in the last place of the bias is 1: adding it rounds to the nearest integer, ties to even.
        v = (v + kRoundingBias) + zero_point;
        return Mask(v) - 0x4b400000;
    }
};

// ------------------------------------------------------------------------------------------------- products

// sum + x w in every lane, for -32768 <= x, w < 32768; `w` comes from narrow_weight.
EVENSONG_INLINE Ints multiply_add(Ints sum, Ints x, Ints w) {
#if EVENSONG_LANES == 16
    return sum + Ints(_mm512_madd_epi16(__m512i(x), __m512i(w)));
#elif EVENSONG_LANES == 8
    return sum + Ints(_mm256_madd_epi16(__m256i(x), __m256i(w)));
#elif defined(__SSE2__)
    return sum + Ints(_mm_madd_epi16(__m128i(x), __m128i(w)));
#else
    return sum + x * w;
#endif
}
EVENSONG_INLINE int32_t narrow_weight(int8_t w) {
#if defined(__SSE2__)
    return int32_t(uint16_t(int16_t(w)));  // the high half must not multiply x's sign
#else
    return w;
#endif
}

// The products of int8 come in groups that fill a 32-bit lane: four bytes where the CPU has such an instruction, else
// two int16. A Cell holds one activation and a WeightCell one weight, as the instruction wants them.
#if defined(__AVX512VNNI__)

constexpr size_t kGroup = 4;
constexpr size_t kRows = 8;  // rows of a tile: with two vectors of columns, 16 of the 32 registers hold sums
typedef uint8_t Cell;        // x + 128: the instruction multiplies unsigned by signed bytes
typedef int8_t WeightCell;

EVENSONG_INLINE Ints dot_groups(Ints sum, Ints cells, Ints weights) {
    return Ints(_mm512_dpbusd_epi32(__m512i(sum), __m512i(cells), __m512i(weights)));
}
EVENSONG_INLINE Ints offset_groups() {
    return splat(int32_t(0x80808080));
}  // cells of x = 0, and what they add too much

#else

constexpr size_t kGroup = 2;
constexpr size_t kRows = 4;
typedef int16_t Cell;
typedef int16_t WeightCell;

EVENSONG_INLINE Ints dot_groups(Ints sum, Ints cells, Ints weights) {
#if defined(__AVX2__)
    return sum + Ints(_mm256_madd_epi16(__m256i(cells), __m256i(weights)));
#elif defined(__SSE2__)
    return sum + Ints(_mm_madd_epi16(__m128i(cells), __m128i(weights)));
#elif defined(__wasm_simd128__)
    return sum + Ints(wasm_i32x4_dot_i16x8(v128_t(cells), v128_t(weights)));
#elif defined(__aarch64__)
    const int16x8_t a = int16x8_t(cells), b = int16x8_t(weights);
    const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
    return sum + Ints(vpaddq_s32(low, high));
#else
    return sum + ((cells << 16) >> 16) * ((weights << 16) >> 16) + (cells >> 16) * (weights >> 16);
#endif
}
EVENSONG_INLINE Ints offset_groups() { return Ints{}; }

#endif

}  // namespace EVENSONG_ISA
}  // namespace evensong
