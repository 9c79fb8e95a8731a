// Rounding to a neighbour with a probability that keeps the mean, and the scales of int8 gradients. Same bytes on every
// target; docs/artifact.md has the formulas. Sources that include this are compiled without contraction.
#pragma once

#include "int8_vec.hpp"
#include "kernel.hpp"

namespace evensong {
namespace EVENSONG_ISA {

constexpr float kMostGradient = 127.0f;
constexpr float kLeastScale = 1e-30f;
constexpr float kHeadroom = 1.25f / 127.0f;  // of a delayed scale over the largest value of the step before
constexpr float kDecay = 0.5f;               // the least share of its scale that a gradient keeps from step to step

// Word 0 of the Philox4x32-10 block of (0, stream, step), as dropout draws it.
static inline uint32_t philox_word(uint32_t stream, const Run& run) {
    uint32_t c[4] = {0, stream, uint32_t(run.step), uint32_t(run.step >> 32)};
    uint32_t k0 = uint32_t(run.seed), k1 = uint32_t(run.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
        const uint64_t a = uint64_t(c[0]) * 0xd2511f53u, b = uint64_t(c[2]) * 0xcd9e8d57u;
        const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1,
                                  uint32_t(a)};
        __builtin_memcpy(c, next, sizeof c);
    }
    return c[0];
}

// clamp(v, -most, most), rounded; element `index` of a tensor always takes the same random number in one step.
struct StochasticRounding {
    uint32_t key;
    Floats most;

    StochasticRounding(int32_t stream, const Run& run, float most = kMostGradient)
        : key(philox_word(uint32_t(stream), run)), most(splat(most)) {}

    __attribute__((always_inline)) Ints operator()(Floats v, size_t index) const {
        Words x = (Words(lane_numbers()) + uint32_t(index)) * 0x9e3779b9u + key;
        x = (x ^ (x >> 16)) * 0x21f0aaadu;
        x = (x ^ (x >> 15)) * 0xd35a2d97u;
        x ^= x >> 15;
        const Floats dither = to_float(Ints(x >> 8)) * 0x1p-24f - 0.5f;
        v = Floats(Ints(v) & (v == v));
        v = minimum(maximum(v, -most), most) + dither;
        v = minimum(maximum(v, -most), most);  // what rounds up from just below the limit
        return Ints(v + kRoundingBias) - int32_t(0x4b400000);
    }
};

// The largest magnitude seen; NaN counts as nothing.
struct Largest {
    Floats lanes = {};
    __attribute__((always_inline)) void add(Floats v, size_t live) {
        const Floats magnitude = absolute(v);
        const Floats known = magnitude == magnitude ? magnitude : Floats{};
        lanes = maximum(lanes, live < kLanes ? keep_first(known, live, 0.0f) : known);
    }
    float value() const { return max_lanes(lanes); }
};

// The scale under which `largest` becomes 127.
static inline float scale_for(float largest) {
    const float scale = largest * (1.0f / kMostGradient);
    return scale > kLeastScale ? scale : kLeastScale;
}

// The scale of a gradient whose size is known only once it has been computed: what the last step proposed, or nothing.
struct DelayedScale {
    float source;  // of the factors of the sums
    float *current, *next;

    DelayedScale(const Operand& grads, int32_t from, int32_t to)
        : source(grads.f32()[2 * from]), current(grads.f32_mut() + 2 * to), next(current + 1) {}

    bool is_known() const { return *next > 0.0f; }
    void propose(float largest_sum) { *next = larger(largest_sum * source * kHeadroom, kLeastScale); }
    // The factor for the sums of this step.
    float begin() {
        *current = *next;
        return source / *current;
    }
    void end(float largest_sum) {
        *next = larger(larger(largest_sum * source * kHeadroom, *current * kDecay), kLeastScale);
    }

  private:
    static float larger(float a, float b) { return a > b ? a : b; }
};

}  // namespace EVENSONG_ISA
}  // namespace evensong
