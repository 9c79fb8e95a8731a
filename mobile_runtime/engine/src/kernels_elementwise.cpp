// Element-wise operations, broadcast rows, reductions and dropout, float32.

#include "kernel.hpp"
#include "opcodes.h"
#include "sums.hpp"
#include "vec_math.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// y[i] = f(x[i]); x and y may be the same memory.
template <class Function>
EVENSONG_INLINE void map(const float* x, float* y, size_t count, Function f) {
    for (size_t i = 0; i < count; i += kLanes) store_upto(y + i, f(load_upto(x + i, count - i)), count - i);
}

// y[i] = f(a[i], b[i]); y may be a or b.
template <class Function>
EVENSONG_INLINE void map(const float* a, const float* b, float* y, size_t count, Function f) {
    for (size_t i = 0; i < count; i += kLanes) {
        store_upto(y + i, f(load_upto(a + i, count - i), load_upto(b + i, count - i)), count - i);
    }
}

// ------------------------------------------------------------------------------------------------- activations

constexpr float kTanhSlope = 0.7978845608f;   // sqrt(2 / pi)
constexpr float kTanhCubic = 0.044715f;       // Hendrycks and Gimpel 2016
constexpr float kBellHeight = 0.3989422804f;  // 1 / sqrt(2 pi)

// Comparisons are written so that NaN stays NaN: a diverged model must not look healthy behind its ReLU.
EVENSONG_INLINE Floats clamp(Floats x, float lo, float hi) {
    x = x < lo ? splat(lo) : x;
    return x > hi ? splat(hi) : x;
}

// Calls, not inlined: several kinds need them, forward and backward.
__attribute__((noinline)) Floats sigmoid_of(Floats x) { return sigmoid(x); }
__attribute__((noinline)) Floats bell_of(Floats x) { return bell(x); }
__attribute__((noinline)) Floats normal_cdf(Floats x, Floats bell_of_x) {
    const Floats tail = normal_upper_tail(absolute(x), bell_of_x);
    return x < 0.0f ? tail : 1.0f - tail;
}

EVENSONG_INLINE Floats gelu_tanh_argument(Floats x) { return kTanhSlope * (x + kTanhCubic * x * x * x); }

Fault unary(const Call& call) {
    const float* x = call.in[0].f32();
    float* y = call.out[0].f32_mut();
    const size_t count = call.out[0].elements;
    switch (call.attr[0].i) {
        case activation::RELU:
            map(x, y, count, [](Floats v) { return v < 0.0f ? Floats{} : v; });
            break;
        case activation::RELU6:
            map(x, y, count, [](Floats v) { return clamp(v, 0.0f, 6.0f); });
            break;
        case activation::HARDSWISH:
            map(x, y, count, [](Floats v) { return v * clamp(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f); });
            break;
        case activation::GELU:
            map(x, y, count, [](Floats v) { return v * normal_cdf(v, bell_of(v)); });
            break;
        case activation::GELU_TANH:
            map(x, y, count, [](Floats v) { return v * sigmoid_of(2.0f * gelu_tanh_argument(v)); });
            break;
        case activation::SIGMOID:
            map(x, y, count, [](Floats v) { return sigmoid_of(v); });
            break;
        case activation::TANH:
            map(x, y, count, [](Floats v) { return hyperbolic_tangent(v); });
            break;
        case activation::SILU:
            map(x, y, count, [](Floats v) { return v * sigmoid_of(v); });
            break;
        case activation::EXP:
            map(x, y, count, [](Floats v) { return exponential(v); });
            break;
        case activation::LOG:
            map(x, y, count, [](Floats v) { return logarithm(v); });
            break;
        case activation::SQRT:
            map(x, y, count, [](Floats v) { return square_root(v); });
            break;
        case activation::RECIPROCAL:
            map(x, y, count, [](Floats v) { return 1.0f / v; });
            break;
        default:
            break;  // the loader refuses every other kind
    }
    return Fault::kNone;
}

// s is the forward output y or the forward input x, see opcodes.h's source.
Fault unary_grad(const Call& call) {
    const float* dy = call.in[0].f32();
    const float* s = call.in[1].f32();
    float* dx = call.out[0].f32_mut();
    const size_t count = call.out[0].elements;
    switch (call.attr[0].i) {
        case activation::RELU:
            map(dy, s, dx, count, [](Floats g, Floats y) { return y > 0.0f ? g : Floats{}; });
            break;
        case activation::RELU6:
            map(dy, s, dx, count, [](Floats g, Floats y) { return ((y > 0.0f) & (y < 6.0f)) ? g : Floats{}; });
            break;
        case activation::HARDSWISH:
            map(dy, s, dx, count, [](Floats g, Floats x) {
                const Floats ramp = x * (1.0f / 3.0f) + 0.5f;
                return g * (x < -3.0f ? Floats{} : (x <= 3.0f ? ramp : splat(1.0f)));
            });
            break;
        case activation::GELU:
            map(dy, s, dx, count, [](Floats g, Floats x) {
                const Floats b = bell_of(x);
                return g * (normal_cdf(x, b) + x * b * kBellHeight);
            });
            break;
        case activation::GELU_TANH:
            map(dy, s, dx, count, [](Floats g, Floats x) {
                const Floats p = sigmoid_of(2.0f * gelu_tanh_argument(x));  // (1 + tanh) / 2
                const Floats slope = 2.0f * kTanhSlope * (1.0f + 3.0f * kTanhCubic * x * x);
                return g * (p + x * p * (1.0f - p) * slope);
            });
            break;
        case activation::SIGMOID:
            map(dy, s, dx, count, [](Floats g, Floats y) { return g * y * (1.0f - y); });
            break;
        case activation::TANH:
            map(dy, s, dx, count, [](Floats g, Floats y) { return g * (1.0f - y * y); });
            break;
        case activation::SILU:
            map(dy, s, dx, count, [](Floats g, Floats x) {
                const Floats p = sigmoid_of(x);
                return g * p * (1.0f + x * (1.0f - p));
            });
            break;
        case activation::EXP:
            map(dy, s, dx, count, [](Floats g, Floats y) { return g * y; });
            break;
        case activation::LOG:
            map(dy, s, dx, count, [](Floats g, Floats x) { return g / x; });
            break;
        case activation::SQRT:
            map(dy, s, dx, count, [](Floats g, Floats y) { return g * 0.5f / y; });
            break;
        case activation::RECIPROCAL:
            map(dy, s, dx, count, [](Floats g, Floats y) { return -g * y * y; });
            break;
        default:
            break;
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- arithmetic

// b is as long as a, or a row that repeats.
template <class Function>
EVENSONG_INLINE Fault binary(const Call& call, Function f) {
    const float* a = call.in[0].f32();
    const float* b = call.in[1].f32();
    float* y = call.out[0].f32_mut();
    const size_t count = call.out[0].elements, period = call.in[1].elements;
    if (period == 1) {
        const Floats same = splat(b[0]);
        map(a, y, count, [=](Floats v) { return f(v, same); });
        return Fault::kNone;
    }
    for (size_t row = 0; row < count; row += period) {
        map(a + row, b, y + row, count - row < period ? count - row : period, f);
    }
    return Fault::kNone;
}

Fault add(const Call& call) {
    return binary(call, [](Floats a, Floats b) { return a + b; });
}
Fault sub(const Call& call) {
    return binary(call, [](Floats a, Floats b) { return a - b; });
}
Fault mul(const Call& call) {
    return binary(call, [](Floats a, Floats b) { return a * b; });
}

// The larger of sign * a and sign * b, times sign; NaN on either side is kept.
Fault extremum(const Call& call, float sign) {
    return binary(call, [=](Floats a, Floats b) { return ((sign * a > sign * b) | (a != a)) ? a : b; });
}
Fault larger_of(const Call& call) { return extremum(call, 1.0f); }
Fault smaller_of(const Call& call) { return extremum(call, -1.0f); }

Fault unit_step(const Call& call) {
    const Floats at_equal = splat(call.attr[0].f);
    return binary(call, [=](Floats a, Floats b) { return a > b ? splat(1.0f) : (a == b ? at_equal : Floats{}); });
}

Fault scale(const Call& call) {
    const float alpha = call.attr[0].f, beta = call.attr[1].f;
    map(call.in[0].f32(), call.out[0].f32_mut(), call.out[0].elements, [=](Floats v) { return alpha * v + beta; });
    return Fault::kNone;
}

Fault fill(const Call& call) {
    const Floats value = splat(call.attr[0].f);
    float* y = call.out[0].f32_mut();
    const size_t count = call.out[0].elements;
    for (size_t i = 0; i < count; i += kLanes) store_upto(y + i, value, count - i);
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- reductions

// y[columns] = scale * sum of x[rows, columns] over its rows.
void reduce_rows(const float* x, float* y, size_t rows, size_t columns, float scale) {
    if (columns == 1) {
        const double sum = sum_elements(rows, [=](size_t i, size_t live) { return load_upto(x + i, live); });
        y[0] = float(sum * double(scale));
        return;
    }
    sum_columns(rows, columns, scale, y,
                [=](size_t row, size_t j, size_t live) { return load_upto(x + row * columns + j, live); });
}

Fault sum_rows(const Call& call) {
    const size_t columns = call.out[0].elements;
    reduce_rows(call.in[0].f32(), call.out[0].f32_mut(), call.in[0].elements / columns, columns, 1.0f);
    return Fault::kNone;
}

Fault reduce_mean(const Call& call) {
    const size_t axis = size_t(call.attr[0].i), inner = size_t(call.attr[1].i);
    const size_t outer = call.out[0].elements / inner;
    for (size_t o = 0; o < outer; ++o) {
        reduce_rows(call.in[0].f32() + o * axis * inner, call.out[0].f32_mut() + o * inner, axis, inner,
                    1.0f / float(axis));
    }
    return Fault::kNone;
}

Fault reduce_mean_grad(const Call& call) {
    const size_t axis = size_t(call.attr[0].i), inner = size_t(call.attr[1].i);
    const size_t outer = call.in[0].elements / inner;
    const float share = 1.0f / float(axis);
    const float* dy = call.in[0].f32();
    float* dx = call.out[0].f32_mut();
    for (size_t o = 0; o < outer; ++o, dy += inner) {
        if (inner == 1) {
            const Floats value = splat(dy[0] * share);
            for (size_t i = 0; i < axis; i += kLanes) store_upto(dx + i, value, axis - i);
            dx += axis;
            continue;
        }
        for (size_t i = 0; i < axis; ++i, dx += inner) {
            map(dy, dx, inner, [=](Floats v) { return v * share; });
        }
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- dropout

typedef uint64_t Wide __attribute__((vector_size(kLanes * 4)));

// The 64-bit products of the even 32-bit lanes with m.
EVENSONG_INLINE Wide multiply_even(Wide v, uint32_t m) {
#if EVENSONG_LANES == 16
    return Wide(_mm512_maskz_mul_epu32(0xff, __m512i(v), _mm512_set1_epi64(m)));
#elif EVENSONG_LANES == 8
    return Wide(_mm256_mul_epu32(__m256i(v), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
    return Wide(_mm_mul_epu32(__m128i(v), _mm_set1_epi64x(m)));
#else
    return (v & 0xffffffffu) * m;
#endif
}

struct Product {
    Words high, low;
};
EVENSONG_INLINE Product multiply(Words v, uint32_t m) {
    const Wide even = multiply_even(Wide(v), m), odd = multiply_even(Wide(v) >> 32, m);
    const Wide low_half = Wide{} + 0xffffffffu;
    return {Words((even >> 32) | (odd & ~low_half)), Words((even & low_half) | (odd << 32))};
}

// Philox4x32-10 (Salmon et al. 2011): kLanes counters that follow each other in their first word, four random words for
// each.
struct RandomBlock {
    Words word[4];
};
EVENSONG_INLINE RandomBlock philox(uint32_t counter, uint32_t stream, uint64_t step, uint64_t seed) {
    Words c0 = Words(lane_numbers()) + counter, c1 = splat(stream);
    Words c2 = splat(uint32_t(step)), c3 = splat(uint32_t(step >> 32));
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
        const Product a = multiply(c0, 0xd2511f53u), b = multiply(c2, 0xcd9e8d57u);
        c0 = b.high ^ c1 ^ k0;
        c1 = b.low;
        c2 = a.high ^ c3 ^ k1;
        c3 = a.low;
    }
    return {{c0, c1, c2, c3}};
}

Fault dropout(const Call& call) {
    const float p = call.attr[0].f, scale = 1.0f / (1.0f - p);
    const float* x = call.in[0].f32();
    float* y = call.out[0].f32_mut();
    uint8_t* mask = call.out[1].u8_mut();
    const size_t count = call.out[0].elements;
    for (size_t start = 0; start < count; start += 4 * kLanes) {
        const RandomBlock random =
            philox(uint32_t(start / 4), uint32_t(call.attr[1].i), call.run->step, call.run->seed);
        uint32_t words[4 * kLanes];  // in the order of the elements: four for each counter
        EVENSONG_UNROLL
        for (size_t q = 0; q < kLanes / 4; ++q) {
            const Square square = turn(quarter<Ints4>(random.word[0], q), quarter<Ints4>(random.word[1], q),
                                       quarter<Ints4>(random.word[2], q), quarter<Ints4>(random.word[3], q));
            store_as(words + 16 * q, square);
        }
        const size_t live = count - start < 4 * kLanes ? count - start : 4 * kLanes;
        for (size_t i = 0; i < live; i += kLanes) {
            const size_t part = live - i;
            const Floats u = __builtin_convertvector(Ints(load_as<Words>(words + i) >> 8), Floats) * 0x1p-24f;
            const Ints keep = u >= p;
            store_upto(y + start + i, keep ? load_upto(x + start + i, part) * scale : Floats{}, part);
            if (part >= kLanes) {
                narrow(mask + start + i, keep & 1);
            } else {
                for (size_t k = 0; k < part; ++k) mask[start + i + k] = keep[k] != 0;
            }
        }
    }
    return Fault::kNone;
}

Fault dropout_grad(const Call& call) {
    const float scale = 1.0f / (1.0f - call.attr[0].f);
    const float* dy = call.in[0].f32();
    const uint8_t* mask = call.in[1].u8();
    float* dx = call.out[0].f32_mut();
    const size_t count = call.out[0].elements;
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Ints keep = widen(mask + i);
        store(dx + i, keep != 0 ? load(dy + i) * scale : Floats{});
    }
    for (; i < count; ++i) dx[i] = mask[i] ? dy[i] * scale : 0.0f;
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- masks of one bit

static_assert(kLanes <= 8, "one byte holds the bits of a vector");

template <class Passes>
EVENSONG_INLINE void write_mask(const Call& call, Passes passes) {
    const size_t columns = call.in[0].last(), bytes = call.out[0].last(), rows = call.out[0].elements / bytes;
    for (size_t row = 0; row < rows; ++row) {
        const float* y = call.in[0].f32() + row * columns;
        uint8_t* mask = call.out[0].u8_mut() + row * bytes;
        for (size_t j = 0; j < columns; j += 8) {
            uint32_t bits = 0;
            EVENSONG_UNROLL
            for (size_t k = 0; k < 8; k += kLanes) {
                if (j + k < columns) bits |= lane_bits(passes(load_upto(y + j + k, columns - j - k))) << k;
            }
            mask[j / 8] = uint8_t(bits);
        }
    }
}

Fault activation_mask(const Call& call) {
    if (call.attr[0].i == activation::RELU) {
        write_mask(call, [](Floats y) { return y > 0.0f; });
    } else {
        write_mask(call, [](Floats y) { return (y > 0.0f) & (y < 6.0f); });
    }
    return Fault::kNone;
}

Fault mask_grad(const Call& call) {
    const size_t columns = call.out[0].last(), bytes = call.in[1].last(), rows = call.in[1].elements / bytes;
    const Ints bit = splat(1) << lane_numbers();
    for (size_t row = 0; row < rows; ++row) {
        const float* dy = call.in[0].f32() + row * columns;
        const uint8_t* mask = call.in[1].u8() + row * bytes;
        float* dx = call.out[0].f32_mut() + row * columns;
        for (size_t j = 0; j < columns; j += kLanes) {
            const Ints passes = (splat(int32_t(mask[j / 8] >> j % 8)) & bit) != 0;
            store_upto(dx + j, passes ? load_upto(dy + j, columns - j) : Floats{}, columns - j);
        }
    }
    return Fault::kNone;
}

}  // namespace

void register_elementwise(Kernel* table) {
    table[op::UNARY] = unary;
    table[op::UNARY_GRAD] = unary_grad;
    table[op::ADD] = add;
    table[op::SUB] = sub;
    table[op::MUL] = mul;
    table[op::MAXIMUM] = larger_of;
    table[op::MINIMUM] = smaller_of;
    table[op::STEP] = unit_step;
    table[op::SCALE] = scale;
    table[op::FILL] = fill;
    table[op::SUM_ROWS] = sum_rows;
    table[op::REDUCE_MEAN] = reduce_mean;
    table[op::REDUCE_MEAN_GRAD] = reduce_mean_grad;
    table[op::DROPOUT] = dropout;
    table[op::DROPOUT_GRAD] = dropout_grad;
    table[op::ACTIVATION_MASK] = activation_mask;
    table[op::MASK_GRAD] = mask_grad;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
