// Int8 arithmetic that gives the same bytes on every target: exact 32-bit sums, then one float32 step after another.
// Sources that include this are compiled without contraction to fused multiply-add (see CMakeLists.txt).
#pragma once

#include "kernel.hpp"
#include "vec.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// ------------------------------------------------------------------------------------------------- bytes and lanes

// `live` bytes, at most kLanes of them, each in a 32-bit lane.
EVENSONG_INLINE Ints load_bytes(const int8_t* p, size_t live) {
    if (__builtin_expect(live >= kLanes, 1)) return widen(p);
#if EVENSONG_LANES == 16
    return Ints(_mm512_maskz_cvtepi8_epi32(0xffff, _mm_maskz_loadu_epi8(__mmask16((1u << live) - 1), p)));
#else
    Ints lanes = {};
    for (size_t i = 0; i < live; ++i) lanes[i] = p[i];
    return lanes;
#endif
}

EVENSONG_INLINE void store_bytes(int8_t* p, Ints v, size_t live) {
    if (__builtin_expect(live >= kLanes, 1)) {
        narrow(p, v);
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
    Floats lowest, highest;
    Ints offset;

    Requantizer(int32_t zero_point, int32_t lo, int32_t hi)
        : lowest(splat(float(lo - zero_point))),
          highest(splat(float(hi - zero_point))),
          offset(splat(zero_point - 0x4b400000)) {}

    __attribute__((always_inline)) Ints operator()(Floats v) const {
        v = Floats(Ints(v) & (v == v));
        v = minimum(maximum(v, lowest), highest);
        return Ints(v + kRoundingBias) + offset;  // the last place of the bias is 1: the sum is rounded, ties to even
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
// two int16. A Cell holds one activation and a WeightCell one weight, as the instruction wants them. kRows are those of
// a tile: with two vectors of columns their sums fill half of 32 registers, or of 16.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// Unsigned by signed bytes.
#define EVENSONG_UNSIGNED_DOT
constexpr size_t kGroup = 4;
constexpr size_t kRows = kLanes == 16 ? 8 : 4;
typedef uint8_t Cell;  // x + 128
typedef int8_t WeightCell;

EVENSONG_INLINE Ints dot_groups(Ints sum, Ints cells, Ints weights) {
#if EVENSONG_LANES == 16
    return Ints(_mm512_dpbusd_epi32(__m512i(sum), __m512i(cells), __m512i(weights)));
#else
    return Ints(_mm256_dpbusd_epi32(__m256i(sum), __m256i(cells), __m256i(weights)));
#endif
}
// Cells of x = 0, and what they add too much.
EVENSONG_INLINE Ints offset_groups() { return splat(int32_t(0x80808080)); }
EVENSONG_INLINE void copy_step(Cell* to, const int8_t* x) { store_as(to, load_as<Ints4>(x) ^ int32_t(0x80808080)); }
EVENSONG_INLINE Ints4 four_groups(const int8_t* w) { return load_as<Ints4>(w); }

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr size_t kGroup = 4;
constexpr size_t kRows = 8;
typedef int8_t Cell;
typedef int8_t WeightCell;

EVENSONG_INLINE Ints dot_groups(Ints sum, Ints cells, Ints weights) {
    return Ints(vdotq_s32(int32x4_t(sum), int8x16_t(cells), int8x16_t(weights)));
}
EVENSONG_INLINE void copy_step(Cell* to, const int8_t* x) { store_as(to, load_as<Ints4>(x)); }
EVENSONG_INLINE Ints4 four_groups(const int8_t* w) { return load_as<Ints4>(w); }

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
// Eight bytes as int16; as many bytes as fill a vector, as int16.
typedef int16_t Shorts8 __attribute__((vector_size(16)));
EVENSONG_INLINE Shorts8 widen_eight(const int8_t* p) {
#if defined(__SSE2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return Shorts8(_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8));
#else
    typedef int8_t Bytes8 __attribute__((vector_size(8)));
    return __builtin_convertvector(load_as<Bytes8>(p), Shorts8);
#endif
}
EVENSONG_INLINE Ints widen_pairs(const int8_t* p) {
#if defined(__AVX2__)
    return Ints(_mm256_cvtepi8_epi16(load_as<__m128i>(p)));
#else
    return Ints(widen_eight(p));
#endif
}

EVENSONG_INLINE void copy_step(Cell* to, const int8_t* x) {
    EVENSONG_UNROLL
    for (size_t i = 0; i < 16; i += 2 * kLanes) store_as(to + i, widen_pairs(x + i));
}
EVENSONG_INLINE Ints4 four_groups(const int8_t* w) { return Ints4(widen_eight(w)); }

#endif

// ------------------------------------------------------------------------------------------------- rows of x

// Near the end of x: the last step must not read beyond it.
__attribute__((noinline)) static void copy_last_cells(Cell* to, const int8_t* x, size_t count) {
    for (size_t i = 0; i < count; i += 16) {
        int8_t buffer[16] = {};
        for (size_t k = i; k < count && k < i + 16; ++k) buffer[k - i] = x[k];
        copy_step(to + i, buffer);
    }
}

// Copies x[count] as cells, in steps of 16: up to 15 cells beyond the end are written. Nothing is read from x_end on.
EVENSONG_INLINE void copy_cells(Cell* to, const int8_t* x, const int8_t* x_end, size_t count) {
    if (__builtin_expect(size_t(x_end - x) < count + 15, 0)) {
        copy_last_cells(to, x, count);
        return;
    }
    size_t i = 0;
    do {
        copy_step(to + i, x + i);
        i += 16;
    } while (i < count);
}

EVENSONG_INLINE void fill_cells(Cell* to, int8_t value, size_t count) {
    int8_t buffer[16];
    __builtin_memset(buffer, value, sizeof buffer);
    for (size_t i = 0; i < count; i += 16) copy_step(to + i, buffer);
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
