// Softmax and the losses, float32. A loss is a mean over the live rows and brings its gradient with it.

#include "kernel.hpp"
#include "opcodes.h"
#include "sums.hpp"
#include "vec_math.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// ------------------------------------------------------------------------------------------------- rows

// NaN never wins: it shows in the sum of the exponentials.
float row_maximum(const float* x, size_t count) {
    Floats best = splat(-kInfinity);
    for (size_t i = 0; i < count; i += kLanes) {
        best = maximum(keep_first(load_upto(x + i, count - i), count - i, -kInfinity), best);
    }
    return max_lanes(best);
}

void scale_row(float* y, size_t count, float factor) {
    for (size_t i = 0; i < count; i += kLanes) store_upto(y + i, load_upto(y + i, count - i) * factor, count - i);
}

// log(1 + x) for x >= 0, in double: 2 atanh(f / (2 + f)) after the exponent is taken off. Infinity and NaN pass
// through.
double log1p_of_sum(double x) {
    const double u = 1.0 + x;
    if (!(u < 1e300)) return u;
    uint64_t bits;
    __builtin_memcpy(&bits, &u, sizeof bits);
    int32_t exponent = int32_t(bits >> 52) - 1023;
    double f = x;  // exact, where 1 + x is not
    if (exponent > 0 || u > 1.4142135623730951) {
        bits = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
        double mantissa;
        __builtin_memcpy(&mantissa, &bits, sizeof bits);
        if (mantissa > 1.4142135623730951) {
            mantissa *= 0.5;
            ++exponent;
        }
        f = mantissa - 1.0;
    }
    const double s = f / (2.0 + f), z = s * s;
    double series = 0;
    for (int k = 21; k >= 3; k -= 2) series = z * (1.0 / k + series);
    return double(exponent) * 0.69314718055994531 + 2.0 * (s + s * series);
}

Fault store_loss(const Operand& loss, double value) {
    loss.f32_mut()[0] = float(value);
    return __builtin_isfinite(loss.f32()[0]) ? Fault::kNone : Fault::kNotFinite;
}

// ------------------------------------------------------------------------------------------------- softmax

Fault softmax(const Call& call) {
    const size_t columns = call.in[0].last(), rows = call.in[0].elements / columns;
    for (size_t r = 0; r < rows; ++r) {
        const float* x = call.in[0].f32() + r * columns;
        float* y = call.out[0].f32_mut() + r * columns;
        const float best = row_maximum(x, columns);
        const double sum = sum_elements(columns, [=](size_t i, size_t live) {
            const Floats e = exponential(load_upto(x + i, live) - best);
            store_upto(y + i, e, live);
            return e;
        });
        scale_row(y, columns, float(1.0 / sum));
    }
    return Fault::kNone;
}

Fault softmax_grad(const Call& call) {
    const size_t columns = call.in[0].last(), rows = call.in[0].elements / columns;
    for (size_t r = 0; r < rows; ++r) {
        const float* dy = call.in[0].f32() + r * columns;
        const float* y = call.in[1].f32() + r * columns;
        float* dx = call.out[0].f32_mut() + r * columns;
        const float dot = float(sum_elements(
            columns, [=](size_t i, size_t live) { return load_upto(dy + i, live) * load_upto(y + i, live); }));
        for (size_t i = 0; i < columns; i += kLanes) {
            const size_t live = columns - i;
            store_upto(dx + i, load_upto(y + i, live) * (load_upto(dy + i, live) - dot), live);
        }
    }
    return Fault::kNone;
}

Fault log_softmax(const Call& call) {
    const size_t columns = call.in[0].last(), rows = call.in[0].elements / columns;
    for (size_t r = 0; r < rows; ++r) {
        const float* x = call.in[0].f32() + r * columns;
        float* y = call.out[0].f32_mut() + r * columns;
        const float best = row_maximum(x, columns);
        const double sum =
            sum_elements(columns, [=](size_t i, size_t live) { return exponential(load_upto(x + i, live) - best); });
        const float log_sum = float(log1p_of_sum(sum - 1.0));
        for (size_t i = 0; i < columns; i += kLanes) {
            store_upto(y + i, (load_upto(x + i, columns - i) - best) - log_sum, columns - i);
        }
    }
    return Fault::kNone;
}

Fault log_softmax_grad(const Call& call) {
    const size_t columns = call.in[0].last(), rows = call.in[0].elements / columns;
    for (size_t r = 0; r < rows; ++r) {
        const float* dy = call.in[0].f32() + r * columns;
        const float* y = call.in[1].f32() + r * columns;
        float* dx = call.out[0].f32_mut() + r * columns;
        const float total =
            float(sum_elements(columns, [=](size_t i, size_t live) { return load_upto(dy + i, live); }));
        for (size_t i = 0; i < columns; i += kLanes) {
            const size_t live = columns - i;
            store_upto(dx + i, load_upto(dy + i, live) - exponential(load_upto(y + i, live)) * total, live);
        }
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- losses

// With b the first largest logit and rest = sum of e^(x - x_b) over the other classes:
// loss = log(1 + rest) + (x_b - x_label), two terms >= 0, so that a small loss keeps its digits.
Fault cross_entropy(const Call& call) {
    const size_t columns = call.in[0].last(), rows = call.in[0].elements / columns;
    const int32_t* labels = call.in[1].i32();
    const float share = 1.0f / float(rows);
    double loss = 0;
    int32_t correct = 0;
    for (size_t r = 0; r < rows; ++r) {
        const float* x = call.in[0].f32() + r * columns;
        float* dx = call.outputs > 2 ? call.out[2].f32_mut() + r * columns : nullptr;
        if (labels[r] < 0 || size_t(labels[r]) >= columns) return Fault::kIndexOutOfRange;
        const size_t label = size_t(labels[r]);
        const float best = row_maximum(x, columns);
        size_t winner = 0;
        while (winner + 1 < columns && x[winner] != best) ++winner;
        const double rest = sum_elements(columns, [=](size_t i, size_t live) {
            const Floats e = exponential(load_upto(x + i, live) - best);
            if (dx) store_upto(dx + i, e, live);
            return lane_numbers() == splat(int32_t(winner - i)) ? Floats{} : e;
        });
        loss += log1p_of_sum(rest) + (double(best) - double(x[label]));
        correct += winner == label;
        if (dx) {
            const float factor = float(double(share) / (1.0 + rest));
            scale_row(dx, columns, factor);
            dx[label] = label == winner ? -float(rest) * factor : dx[label] - share;
        }
    }
    call.out[1].i32_mut()[0] = correct;
    return store_loss(call.out[0], loss / double(rows));
}

Fault mse(const Call& call) {
    const float* prediction = call.in[0].f32();
    const float* target = call.in[1].f32();
    float* gradient = call.outputs > 2 ? call.out[2].f32_mut() : nullptr;
    const size_t count = call.in[0].elements;
    const float slope = 2.0f / float(count);
    const double sum = sum_elements(count, [=](size_t i, size_t live) {
        const Floats error = load_upto(prediction + i, live) - load_upto(target + i, live);
        if (gradient) store_upto(gradient + i, error * slope, live);
        return error * error;
    });
    call.out[1].i32_mut()[0] = 0;
    return store_loss(call.out[0], sum / double(count));
}

Fault bce_with_logits(const Call& call) {
    const float* logits = call.in[0].f32();
    const float* target = call.in[1].f32();
    float* gradient = call.outputs > 2 ? call.out[2].f32_mut() : nullptr;
    const size_t count = call.in[0].elements;
    const float share = 1.0f / float(count);
    Ints right = {};
    const double sum = sum_elements(count, [=, &right](size_t i, size_t live) {
        const Floats x = load_upto(logits + i, live), t = load_upto(target + i, live);
        const Floats e = exponential(-absolute(x)), larger = 1.0f / (1.0f + e);
        const Ints same = ~((x > 0.0f) ^ (t > 0.5f));
        right -= live < kLanes ? (lane_numbers() < splat(int32_t(live))) & same : same;
        if (gradient) store_upto(gradient + i, ((x < 0.0f ? e * larger : larger) - t) * share, live);
        return ((x > 0.0f ? x : Floats{}) - x * t) + log1p_of_unit(e);
    });
    int32_t correct = 0;
    for (size_t lane = 0; lane < kLanes; ++lane) correct += right[lane];
    call.out[1].i32_mut()[0] = correct;
    return store_loss(call.out[0], sum / double(count));
}

}  // namespace

void register_loss(Kernel* table) {
    table[op::SOFTMAX] = softmax;
    table[op::SOFTMAX_GRAD] = softmax_grad;
    table[op::LOG_SOFTMAX] = log_softmax;
    table[op::LOG_SOFTMAX_GRAD] = log_softmax_grad;
    table[op::CROSS_ENTROPY] = cross_entropy;
    table[op::MSE] = mse;
    table[op::BCE_WITH_LOGITS] = bce_with_logits;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
