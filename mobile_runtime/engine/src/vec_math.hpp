// Vectorised elementary functions, without libm: the same code on x86, ARM and WebAssembly.
//
// Relative errors against float64: exponential 1e-7 (down to the smallest normal number), sigmoid, hyperbolic_tangent,
// bell, log1p_of_unit and logarithm 2e-7, normal_upper_tail 5e-7; tests/mobile_runtime/test_kernels_elementwise.py
// holds them. NaN gives NaN. The coefficients are our own relative minimax fits.
#pragma once

#include "vec.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// 2^n for n in [-126, 127].
EVENSONG_INLINE Floats power_of_two(Ints n) { return Floats((Words(n) + 127u) << 23); }

// x = n ln 2 + r with |r| <= ln 2 / 2. Cody and Waite's two-part constant keeps r exact to the last bit or two.
struct ReducedExponent {
    Floats r;
    Ints n;
};
EVENSONG_INLINE ReducedExponent reduce_exponent(Floats x) {
    Floats biased = x * 1.44269504f + kRoundingBias;
    Floats n = biased - kRoundingBias;
    Floats r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    return {r, Ints(Words(biased) - 0x4b400000u)};
}

// e^r - 1 for |r| <= ln 2 / 2, relative error 1e-7.
EVENSONG_INLINE Floats expm1_reduced(Floats r) {
    Floats tail = 8.366978952e-03f + r * 1.394115718e-03f;
    tail = 4.166639872e-02f + r * tail;
    tail = 1.666654090e-01f + r * tail;
    tail = 0.5f + r * tail;
    return r + r * r * tail;
}

// e^(x + low), where `low` is a small correction that x was too coarse to hold.
EVENSONG_FUNCTION Floats exponential(Floats x, Floats low = Floats{}) {
    x = x > 89.0f ? splat(89.0f) : x;  // infinity from here on; NaN passes both comparisons
    x = x < -104.0f ? splat(-104.0f) : x;
    ReducedExponent e = reduce_exponent(x);
    Ints half = e.n >> 1;  // in two steps: 2^n alone would leave the range of a normal float
    return (1.0f + expm1_reduced(e.r + low)) * power_of_two(half) * power_of_two(e.n - half);
}

EVENSONG_FUNCTION Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// tanh x = (e^2x - 1) / (e^2x + 1), with e^2x - 1 kept accurate near zero.
EVENSONG_FUNCTION Floats hyperbolic_tangent(Floats x) {
    Floats magnitude = absolute(x);
    magnitude = magnitude > 10.0f ? splat(10.0f) : magnitude;
    ReducedExponent e = reduce_exponent(magnitude + magnitude);
    Floats scale = power_of_two(e.n);
    Floats expm1 = scale * expm1_reduced(e.r) + (scale - 1.0f);
    return with_sign_of(expm1 / (expm1 + 2.0f), x);
}

// e^(-x^2 / 2). Squaring loses the bits that matter for large x: the part of x below 12 bits goes in as a correction.
EVENSONG_FUNCTION Floats bell(Floats x) {
    x = absolute(x);
    x = x > 20.0f ? splat(20.0f) : x;  // zero from 14.5 on
    Floats coarse = Floats(Ints(x) & int32_t(0xfffff000));
    return exponential(coarse * coarse * -0.5f, (x - coarse) * (x + coarse) * -0.5f);
}

// P(Z > a) for a standard normal Z and a >= 0, given bell(a): erfc(a / sqrt 2) / 2 without the cancellation of 1 - erf.
EVENSONG_FUNCTION Floats normal_upper_tail(Floats a, Floats bell_of_a) {
    Floats t = 1.0f / (1.0f + 0.3f * a);
    Floats p = splat(3.837837180e-02f);
    p = p * t - 1.691665009e-01f;
    p = p * t + 2.286608568e-01f;
    p = p * t - 7.650732375e-02f;
    p = p * t + 1.425360748e-01f;
    p = p * t + 9.468330542e-02f;
    p = p * t + 1.219203930e-01f;
    p = p * t + 1.194876826e-01f;
    p = p * t + 7.169207909e-06f;
    return p * bell_of_a;
}

// log(1 + x) for 0 <= x <= 1, accurate in the relative sense: 2 atanh(x / (2 + x)).
EVENSONG_FUNCTION Floats log1p_of_unit(Floats x) {
    Floats s = x / (2.0f + x);
    Floats z = s * s;
    Floats tail = 1.071445547e-01f + z * 1.214829992e-01f;
    tail = 1.430837856e-01f + z * tail;
    tail = 1.999944153e-01f + z * tail;
    tail = 3.333333777e-01f + z * tail;
    return 2.0f * (s + s * z * tail);
}

// log x: -infinity at zero, NaN below. x = 2^n m with sqrt(1/2) <= m < sqrt 2.
EVENSONG_INLINE Floats logarithm(Floats x) {
    const Ints tiny = x < 0x1p-126f;  // not a normal number: bring it among them
    const Floats normal = tiny ? x * 0x1p23f : x;
    const Ints n = (Ints(normal) - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2)
    const Floats m = Floats(Ints(normal) - (n << 23));
    const Floats exponent = __builtin_convertvector(n, Floats) - (tiny ? splat(23.0f) : Floats{});
    // As reduce_exponent() splits ln 2; log1p_of_unit() holds below zero as well, down to sqrt(1/2) - 1.
    const Floats y = exponent * 0.693359375f + (log1p_of_unit(m - 1.0f) - exponent * 2.12194440e-4f);
    const Floats infinity = splat(__builtin_inff());
    const Floats below = x == 0.0f ? -infinity : splat(__builtin_nanf(""));
    return x > 0.0f ? (x < infinity ? y : x) : below;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
