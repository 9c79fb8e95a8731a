// Pooling over channels-last images, float32, forward and backward. Lanes are channels.

#include "kernel.hpp"
#include "opcodes.h"
#include "vec.hpp"
#include "window.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// ------------------------------------------------------------------------------------------------- maximum

// The index tensor: one byte an element where the window has at most 256 places, else int32.
EVENSONG_INLINE Ints load_index(const Operand& index, size_t at, size_t live) {
    Ints result = {};
    if (index.dtype == DType::kI32) {
        return Ints(load_upto(index.f32() + at, live));  // bits, moved as floats
    }
    if (live >= kLanes) {
        return widen(index.u8() + at) & 0xff;
    }
    for (size_t i = 0; i < live; ++i) result[i] = index.u8()[at + i];
    return result;
}

EVENSONG_INLINE void store_index(const Operand& index, size_t at, Ints places, size_t live) {
    if (index.dtype == DType::kI32) {
        store_upto(index.f32_mut() + at, Floats(places), live);
    } else if (live >= kLanes) {
        narrow(index.u8_mut() + at, places);
    } else {
        for (size_t i = 0; i < live; ++i) index.u8_mut()[at + i] = uint8_t(places[i]);
    }
}

// The first maximum wins; NaN wins over everything, so that it is not hidden.
bool max_window(const Call& call, const Window& window) {
    const bool wants_index = call.outputs > 1;
    for (size_t c = 0; c < window.channels; c += kLanes) {
        const size_t live = window.channels - c;
        const float* line = call.in[0].f32() + window.first + c;
        Floats best = splat(-__builtin_inff());
        int32_t here = window.place;
        Ints place = splat(here);
        for (int32_t h = 0; h < window.rows; ++h, line += window.line, here += window.kernel_w) {
            const float* x = line;
            for (int32_t w = 0; w < window.columns; ++w, x += window.channels) {
                const Floats v = load_upto(x, live);
                const Ints larger = (v > best) | (v != v);
                best = larger ? v : best;
                place = larger ? splat(here + w) : place;
            }
        }
        store_upto(call.out[0].f32_mut() + window.pixel + c, best, live);
        if (wants_index) store_index(call.out[1], window.pixel + c, place, live);
    }
    return true;
}

Fault max_pool2d(const Call& call) { return each_window(call, call.in[0], call.out[0], false, max_window); }

// Every place takes dy where the index names it. An index that names no place of the image is hostile.
bool max_window_grad(const Call& call, const Window& window) {
    Ints untaken = {};
    for (size_t c = 0; c < window.channels; c += kLanes) {
        const size_t live = window.channels - c;
        const Floats gradient = load_upto(call.in[0].f32() + window.pixel + c, live);
        const Ints place = load_index(call.in[1], window.pixel + c, live);
        Ints open = lane_numbers() < splat(int32_t(live < kLanes ? live : kLanes));
        float* line = call.out[0].f32_mut() + window.first + c;
        int32_t here = window.place;
        for (int32_t h = 0; h < window.rows; ++h, line += window.line, here += window.kernel_w) {
            float* dx = line;
            for (int32_t w = 0; w < window.columns; ++w, dx += window.channels) {
                const Ints chosen = place == splat(here + w);
                store_upto(dx, load_upto(dx, live) + (chosen ? gradient : Floats{}), live);
                open &= ~chosen;
            }
        }
        untaken |= open;
    }
    return !any(untaken);
}

void zero(const Operand& x) { __builtin_memset(x.data, 0, x.elements * sizeof(float)); }

Fault max_pool2d_grad(const Call& call) {
    zero(call.out[0]);
    return each_window(call, call.out[0], call.in[0], false, max_window_grad);
}

// ------------------------------------------------------------------------------------------------- mean

bool mean_window(const Call& call, const Window& window) {
    const float share = 1.0f / float(window.count);
    for (size_t c = 0; c < window.channels; c += kLanes) {
        const size_t live = window.channels - c;
        const float* line = call.in[0].f32() + window.first + c;
        Floats sum = {};
        for (int32_t h = 0; h < window.rows; ++h, line += window.line) {
            const float* x = line;
            Floats row = {};  // row by row, so that a global mean stays accurate
            for (int32_t w = 0; w < window.columns; ++w, x += window.channels) row += load_upto(x, live);
            sum += row;
        }
        store_upto(call.out[0].f32_mut() + window.pixel + c, sum * share, live);
    }
    return true;
}

Fault avg_pool2d(const Call& call) { return each_window(call, call.in[0], call.out[0], true, mean_window); }

bool mean_window_grad(const Call& call, const Window& window) {
    const float share = 1.0f / float(window.count);
    for (size_t c = 0; c < window.channels; c += kLanes) {
        const size_t live = window.channels - c;
        const Floats part = load_upto(call.in[0].f32() + window.pixel + c, live) * share;
        float* line = call.out[0].f32_mut() + window.first + c;
        for (int32_t h = 0; h < window.rows; ++h, line += window.line) {
            float* dx = line;
            for (int32_t w = 0; w < window.columns; ++w, dx += window.channels) {
                store_upto(dx, load_upto(dx, live) + part, live);
            }
        }
    }
    return true;
}

Fault avg_pool2d_grad(const Call& call) {
    zero(call.out[0]);
    return each_window(call, call.out[0], call.in[0], true, mean_window_grad);
}

}  // namespace

void register_pool(Kernel* table) {
    table[op::MAX_POOL2D] = max_pool2d;
    table[op::MAX_POOL2D_GRAD] = max_pool2d_grad;
    table[op::AVG_POOL2D] = avg_pool2d;
    table[op::AVG_POOL2D_GRAD] = avg_pool2d_grad;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
