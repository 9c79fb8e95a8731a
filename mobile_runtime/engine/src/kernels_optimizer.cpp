// Optimiser steps as torch.optim defines them: one pass over weight, gradient and state.

#include "kernel.hpp"
#include "opcodes.h"
#include "vec.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// Finds NaN and infinity in all that it saw at the price of one multiply-add: 0 * x is 0 for every finite x.
struct FiniteCheck {
    Floats poison = {};

    __attribute__((always_inline)) void see(Floats v) { poison += v * 0.0f; }
    Fault fault() const { return any(poison != 0.0f) ? Fault::kNotFinite : Fault::kNone; }
};

// g += weight_decay w; v = momentum v + g; g = nesterov ? g + momentum v : v; w -= learning_rate g
Fault sgd(const Call& call) {
    float* w = call.in[0].f32_mut();
    const float* g = call.in[1].f32();
    float* v = call.inputs > 2 ? call.in[2].f32_mut() : nullptr;
    const float momentum = call.attr[0].f, weight_decay = call.attr[1].f, learning_rate = call.run->learning_rate;
    const bool nesterov = call.attr[2].i != 0;
    const size_t count = call.in[0].elements;
    FiniteCheck check;
    for (size_t i = 0; i < count; i += kLanes) {
        const size_t live = count - i;
        const Floats weight = load_upto(w + i, live);
        Floats step = load_upto(g + i, live) + weight * weight_decay;
        if (v) {
            const Floats velocity = load_upto(v + i, live) * momentum + step;
            store_upto(v + i, velocity, live);
            step = nesterov ? step + velocity * momentum : velocity;
        }
        const Floats updated = weight - step * learning_rate;
        store_upto(w + i, updated, live);
        check.see(updated);
    }
    return check.fault();
}

double power(double base, uint64_t exponent) {
    double result = 1;
    for (; exponent; exponent >>= 1, base *= base) {
        if (exponent & 1) result *= base;
    }
    return result;
}

// m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; w -= size m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
Fault adam(const Call& call) {
    float* w = call.in[0].f32_mut();
    const float* g = call.in[1].f32();
    float* m = call.in[2].f32_mut();
    float* v = call.in[3].f32_mut();
    const float beta1 = call.attr[0].f, beta2 = call.attr[1].f, eps = call.attr[2].f, weight_decay = call.attr[3].f;
    const bool decoupled = call.attr[4].i != 0;
    const double learning_rate = double(call.run->learning_rate);
    const float size = float(learning_rate / (1.0 - power(double(beta1), call.run->step)));
    const float root_scale = float(1.0 / __builtin_sqrt(1.0 - power(double(beta2), call.run->step)));
    const float shrink = decoupled ? float(1.0 - learning_rate * double(weight_decay)) : 1.0f;
    const float coupled_decay = decoupled ? 0.0f : weight_decay;
    const size_t count = call.in[0].elements;
    FiniteCheck check;
    for (size_t i = 0; i < count; i += kLanes) {
        const size_t live = count - i;
        const Floats weight = load_upto(w + i, live);
        const Floats gradient = load_upto(g + i, live) + weight * coupled_decay;
        const Floats first = load_upto(m + i, live) * beta1 + gradient * (1.0f - beta1);
        const Floats second = load_upto(v + i, live) * beta2 + gradient * gradient * (1.0f - beta2);
        store_upto(m + i, first, live);
        store_upto(v + i, second, live);
        const Floats updated = weight * shrink - size * first / (square_root(second) * root_scale + eps);
        store_upto(w + i, updated, live);
        check.see(keep_first(updated, live, 0.0f));  // eps = 0 makes 0 / 0 of the lanes beyond the end
    }
    return check.fault();
}

}  // namespace

void register_optimizer(Kernel* table) {
    table[op::SGD] = sgd;
    table[op::ADAM] = adam;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
