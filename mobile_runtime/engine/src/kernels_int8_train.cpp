// Int8 training, element by element: scales that a program moves, and gradients on scales of their own.

#include "opcodes.h"
#include "stochastic.hpp"
#include "window.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

constexpr float kMostBias = 1073741824.0f;

// ------------------------------------------------------------------------------------------------- forward

// To the nearest integer, ties to even: from 2^23 on every float32 is one.
float rounded(float v) {
    const float unit = v < 0.0f ? -8388608.0f : 8388608.0f;
    return v > -8388608.0f && v < 8388608.0f ? (v + unit) - unit : v;
}

Fault prepare(const Call& call) {
    const Operand& w = call.in[0];
    const float* w_scale = call.in[1].f32();
    const float x_scale = call.in[2].f32()[call.attr[0].i], y_scale = call.in[2].f32()[call.attr[1].i];
    const int32_t zero_point = call.attr[2].i;
    const size_t outputs = w.dims[0], depth = w.elements / outputs;
    for (size_t o = 0; o < outputs; ++o) {
        const int8_t* row = w.i8() + o * depth;
        Ints lanes = {};
        size_t i = 0;
        for (; i + kLanes <= depth; i += kLanes) lanes += widen(row + i);
        int32_t sum = 0;
        for (; i < depth; ++i) sum += row[i];
        for (size_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
        const float unit = w_scale[o] * x_scale;  // of one unit of the sum
        float start = call.inputs > 3 ? call.in[3].f32()[o] / unit : 0.0f;
        start = start != start ? 0.0f : start < -kMostBias ? -kMostBias : start > kMostBias ? kMostBias : start;
        call.out[0].i32_mut()[o] = int32_t(uint32_t(int32_t(rounded(start))) - uint32_t(zero_point) * uint32_t(sum));
        call.out[1].f32_mut()[o] = unit / y_scale;
    }
    return Fault::kNone;
}

Fault observe(const Call& call) {
    const Operand& x = call.in[0];
    Ints most = {};
    for (size_t i = 0; i < x.elements; i += kLanes) {
        const size_t live = x.elements - i;
        Ints value = load_bytes(x.i8() + i, live) - x.zero_point;
        if (live < kLanes) value = lane_numbers() < splat(int32_t(live)) ? value : Ints{};
        const Ints magnitude = value < 0 ? -value : value;
        most = magnitude > most ? magnitude : most;
    }
    int32_t largest = 0;
    for (size_t lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
    const float peak = float(largest) / float(call.attr[1].i);
    float* known = call.in[1].f32_mut() + call.attr[0].i;
    if (peak > *known) *known = peak;
    return Fault::kNone;
}

Fault adapt(const Call& call) {
    const float grow = call.attr[0].f, shrink = call.attr[1].f;
    float *scales = call.in[0].f32_mut(), *peaks = call.in[1].f32_mut();
    for (size_t i = 0; i < call.in[0].elements; ++i) {
        const float factor = peaks[i] >= 1.0f ? grow : peaks[i] > shrink ? peaks[i] : shrink;
        if (peaks[i] > 0.0f) scales[i] *= factor;
        peaks[i] = 0.0f;
    }
    return Fault::kNone;
}

Fault quantize(const Call& call) {
    const Operand& y = call.out[0];
    const Requantizer requantize(y.zero_point, -128, 127);
    const float inverse = 1.0f / call.in[1].f32()[call.attr[0].i];
    for (size_t i = 0; i < y.elements; i += kLanes) {
        const size_t live = y.elements - i;
        store_bytes(y.i8_mut() + i, requantize(load_upto(call.in[0].f32() + i, live) * inverse), live);
    }
    return Fault::kNone;
}

// Integers times one factor, for activations and for gradients (whose zero point is zero).
void dequantize_by(const Operand& x, int32_t zero_point, float scale, const Operand& y) {
    for (size_t i = 0; i < x.elements; i += kLanes) {
        const size_t live = x.elements - i;
        store_upto(y.f32_mut() + i, to_float(load_bytes(x.i8() + i, live) - zero_point) * scale, live);
    }
}

Fault dequantize(const Call& call) {
    dequantize_by(call.in[0], call.in[0].zero_point, call.in[1].f32()[call.attr[0].i], call.out[0]);
    return Fault::kNone;
}

Fault dequantize_gradient(const Call& call) {
    dequantize_by(call.in[0], 0, call.in[1].f32()[2 * call.attr[0].i], call.out[0]);
    return Fault::kNone;
}

Fault add(const Call& call) {
    const Operand &a = call.in[0], &b = call.in[1], &y = call.out[0];
    const float* scales = call.in[2].f32();
    const float y_scale = scales[call.attr[2].i];
    const float scale_a = scales[call.attr[0].i] / y_scale, scale_b = scales[call.attr[1].i] / y_scale;
    const Requantizer requantize(y.zero_point, call.attr[3].i, call.attr[4].i);
    for (size_t i = 0; i < y.elements; i += kLanes) {
        const size_t live = y.elements - i;
        const Floats left = to_float(load_bytes(a.i8() + i, live) - a.zero_point) * scale_a;
        const Floats right = to_float(load_bytes(b.i8() + i, live) - b.zero_point) * scale_b;
        store_bytes(y.i8_mut() + i, requantize(left + right), live);
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- gradients

// y = srn(v / s) with the least s that clips nothing; gives s, or infinity where a value is not finite. v is read
// twice.
template <class Value>
EVENSONG_INLINE float onto_own_scale(const Call& call, int32_t stream, Value v) {
    const Operand& y = call.out[0];
    Largest largest;
    for (size_t i = 0; i < y.elements; i += kLanes) largest.add(v(i, y.elements - i), y.elements - i);
    if (largest.value() == __builtin_inff()) return __builtin_inff();
    const float scale = scale_for(largest.value()), inverse = 1.0f / scale;
    const StochasticRounding round(stream, *call.run);
    for (size_t i = 0; i < y.elements; i += kLanes) {
        const size_t live = y.elements - i;
        store_bytes(y.i8_mut() + i, round(v(i, live) * inverse, i), live);
    }
    return scale;
}

Fault quantize_gradient(const Call& call) {
    const float* dy = call.in[0].f32();
    const float scale =
        onto_own_scale(call, call.attr[1].i, [=](size_t i, size_t live) { return load_upto(dy + i, live); });
    if (scale == __builtin_inff()) return Fault::kNotFinite;
    call.in[1].f32_mut()[2 * call.attr[0].i] = scale;
    return Fault::kNone;
}

Fault mask(const Call& call) {
    const int8_t *g = call.in[0].i8(), *y = call.in[1].i8();
    int8_t* out = call.out[0].i8_mut();
    const int32_t lo = call.attr[0].i, hi = call.attr[1].i;
    for (size_t i = 0; i < call.out[0].elements; i += kLanes) {
        const size_t live = call.out[0].elements - i;
        const Ints at = load_bytes(y + i, live);
        store_bytes(out + i, load_bytes(g + i, live) & (at > lo) & (at < hi), live);
    }
    return Fault::kNone;
}

Fault scale(const Call& call) {
    const int8_t* g = call.in[0].i8();
    const float* w_scale = call.in[1].f32();
    const size_t row = call.in[1].elements;
    // A vector may meet the end of the row: its factors are gathered. Elements come in order, so the place in the row
    // is counted along.
    float factors[kLanes];
    size_t at = 0;
    const auto value = [&](size_t i, size_t live) {
        if (i == 0) at = 0;
        const Floats stored = to_float(load_bytes(g + i, live));
        const size_t here = at;
        for (at += kLanes; at >= row;) at -= row;
        if (here + kLanes <= row) return stored * load(w_scale + here);
        for (size_t lane = 0, j = here; lane < kLanes; ++lane) {
            factors[lane] = w_scale[j];
            j = j + 1 == row ? 0 : j + 1;
        }
        return stored * load(factors);
    };
    const float own = onto_own_scale(call, call.attr[2].i, value);
    if (own == __builtin_inff()) return Fault::kNotFinite;
    float* grads = call.in[2].f32_mut();
    grads[2 * call.attr[1].i] = grads[2 * call.attr[0].i] * own;
    return Fault::kNone;
}

Fault add_gradients(const Call& call) {
    const int8_t *a = call.in[0].i8(), *b = call.in[1].i8();
    float* grads = call.in[2].f32_mut();
    const float scale_a = grads[2 * call.attr[0].i], scale_b = grads[2 * call.attr[1].i];
    const float own = onto_own_scale(call, call.attr[3].i, [=](size_t i, size_t live) {
        return to_float(load_bytes(a + i, live)) * scale_a + to_float(load_bytes(b + i, live)) * scale_b;
    });
    if (own == __builtin_inff()) return Fault::kNotFinite;
    grads[2 * call.attr[2].i] = own;
    return Fault::kNone;
}

Fault bias_gradient(const Call& call) {
    const Operand& g = call.in[0];
    const size_t outputs = call.out[0].elements, rows = g.elements / outputs;
    const float unit = call.in[2].f32()[2 * call.attr[0].i];
    for (size_t o = 0; o < outputs; o += kLanes) {
        const size_t live = outputs - o;
        Ints sum = {};
        const int8_t* from = g.i8() + o;
        for (size_t m = 0; m < rows; ++m, from += outputs) sum += load_bytes(from, live);
        store_upto(call.out[0].f32_mut() + o, to_float(sum) * (unit / load_upto(call.in[1].f32() + o, live)), live);
    }
    return Fault::kNone;
}

// Windows do not overlap: the verifier saw to it. Every place of a window takes the gradient or zero.
bool scatter_window(const Call& call, const Window& window) {
    const Operand& index = call.in[1];
    bool sound = true;
    for (size_t c = 0; c < window.channels; c += kLanes) {
        const size_t at = window.pixel + c, live = window.channels - c;
        const Ints places = index.dtype == DType::kI32 ? Ints(load_upto(index.f32() + at, live))
                                                       : load_bytes(index.i8() + at, live) & 0xff;
        const Ints g = load_bytes(call.in[0].i8() + at, live);
        Ints found = {};
        int8_t* line = call.out[0].i8_mut() + window.first + c;
        for (int32_t h = 0, place = window.place; h < window.rows; ++h, place += window.kernel_w) {
            for (int32_t w = 0; w < window.columns; ++w) {
                const Ints here = places == splat(place + w);
                store_bytes(line + size_t(w) * window.channels, here & g, live);
                found |= here;
            }
            line += window.line;
        }
        if (live < kLanes) found = lane_numbers() < splat(int32_t(live)) ? found : splat(-1);
        sound &= !any(~found);
    }
    return sound;
}

Fault max_pool2d_gradient(const Call& call) {
    __builtin_memset(call.out[0].data, 0, call.out[0].elements);
    return each_window(call, call.out[0], call.in[0], false, scatter_window);
}

}  // namespace

void register_int8_train(Kernel* table) {
    table[op::Q_PREPARE] = prepare;
    table[op::Q_OBSERVE] = observe;
    table[op::Q_ADAPT] = adapt;
    table[op::Q_QUANTIZE] = quantize;
    table[op::Q_DEQUANTIZE] = dequantize;
    table[op::Q_ADD] = add;
    table[op::G_QUANTIZE] = quantize_gradient;
    table[op::G_DEQUANTIZE] = dequantize_gradient;
    table[op::G_MASK] = mask;
    table[op::G_SCALE] = scale;
    table[op::G_ADD] = add_gradients;
    table[op::G_BIAS] = bias_gradient;
    table[op::G_MAX_POOL2D] = max_pool2d_gradient;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
