// Batch and layer normalisation, float32. Variances take two passes: the mean first, then the squared distances from
// it.

#include "kernel.hpp"
#include "opcodes.h"
#include "sums.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// Runs body(i, live) over kLanes elements at a time; `live` of them, if fewer, exist.
template <class Body>
EVENSONG_INLINE void each_vector(size_t count, Body body) {
    for (size_t i = 0; i < count; i += kLanes) body(i, count - i);
}

// y[i] = f(i, j, live) for every row of a matrix, where i is the element's place and j its column.
template <class Function>
EVENSONG_INLINE void each_row(float* y, size_t rows, size_t columns, Function f) {
    for (size_t start = 0; start < rows * columns; start += columns) {
        each_vector(columns, [&](size_t j, size_t live) { store_upto(y + start + j, f(start + j, j, live), live); });
    }
}

EVENSONG_INLINE Floats reciprocal_root(Floats variance, float eps) { return 1.0f / square_root(variance + eps); }

// ------------------------------------------------------------------------------------------------- batch

Fault batch_norm_train(const Call& call) {
    const float* x = call.in[0].f32();
    const float* gamma = call.in[1].f32();
    const float* beta = call.in[2].f32();
    float* running_mean = call.in[3].f32_mut();
    float* running_var = call.in[4].f32_mut();
    float* mean = call.out[1].f32_mut();
    float* rstd = call.out[2].f32_mut();  // the variance until the running statistics have it
    const float eps = call.attr[0].f, take = call.attr[1].f, keep = 1.0f - take;
    const size_t columns = call.in[0].last(), rows = call.in[0].elements / columns;
    const float share = 1.0f / float(rows);
    const float unbiased = rows > 1 ? float(double(rows) / double(rows - 1)) : 1.0f;  // one row: its variance is 0

    sum_columns(rows, columns, share, mean,
                [=](size_t row, size_t j, size_t live) { return load_upto(x + row * columns + j, live); });
    sum_columns(rows, columns, share, rstd, [=](size_t row, size_t j, size_t live) {
        const Floats distance = load_upto(x + row * columns + j, live) - load_upto(mean + j, live);
        return distance * distance;
    });
    Floats poison = {};
    each_vector(columns, [&](size_t j, size_t live) {
        const Floats variance = load_upto(rstd + j, live);
        const Floats new_mean = load_upto(running_mean + j, live) * keep + load_upto(mean + j, live) * take;
        const Floats new_var = load_upto(running_var + j, live) * keep + variance * (unbiased * take);
        store_upto(running_mean + j, new_mean, live);
        store_upto(running_var + j, new_var, live);
        store_upto(rstd + j, reciprocal_root(variance, eps), live);
        poison += (new_mean + new_var) * 0.0f;  // NaN if either is not finite
    });
    each_row(call.out[0].f32_mut(), rows, columns, [=](size_t i, size_t j, size_t live) {
        const Floats factor = load_upto(rstd + j, live) * load_upto(gamma + j, live);
        return (load_upto(x + i, live) - load_upto(mean + j, live)) * factor + load_upto(beta + j, live);
    });
    return any(poison != 0.0f) ? Fault::kNotFinite : Fault::kNone;
}

// With x_hat = (x - mean) rstd: dx = gamma rstd (dy - mean of dy - x_hat * mean of dy x_hat), means over rows.
Fault batch_norm_grad(const Call& call) {
    const float* dy = call.in[0].f32();
    const float* x = call.in[1].f32();
    const float* gamma = call.in[2].f32();
    const float* mean = call.in[3].f32();
    const float* rstd = call.in[4].f32();
    float* dgamma = call.out[1].f32_mut();
    float* dbeta = call.out[2].f32_mut();
    const size_t columns = call.in[0].last(), rows = call.in[0].elements / columns;
    const float share = 1.0f / float(rows);

    sum_columns(rows, columns, 1.0f, dbeta,
                [=](size_t row, size_t j, size_t live) { return load_upto(dy + row * columns + j, live); });
    sum_columns(rows, columns, 1.0f, dgamma, [=](size_t row, size_t j, size_t live) {
        const Floats distance = load_upto(x + row * columns + j, live) - load_upto(mean + j, live);
        return load_upto(dy + row * columns + j, live) * distance * load_upto(rstd + j, live);
    });
    each_row(call.out[0].f32_mut(), rows, columns, [=](size_t i, size_t j, size_t live) {
        const Floats r = load_upto(rstd + j, live);
        const Floats x_hat = (load_upto(x + i, live) - load_upto(mean + j, live)) * r;
        const Floats centred = load_upto(dy + i, live) - share * load_upto(dbeta + j, live);
        return load_upto(gamma + j, live) * r * (centred - x_hat * (share * load_upto(dgamma + j, live)));
    });
    return Fault::kNone;
}

Fault batch_norm_eval(const Call& call) {
    const float* x = call.in[0].f32();
    const float* gamma = call.in[1].f32();
    const float* beta = call.in[2].f32();
    const float* mean = call.in[3].f32();
    const float* variance = call.in[4].f32();
    float* y = call.out[0].f32_mut();
    const float eps = call.attr[0].f;
    const size_t columns = call.in[0].last(), count = call.in[0].elements;
    each_vector(columns, [=](size_t j, size_t live) {  // column blocks outside: one root for each column
        const Floats factor = reciprocal_root(load_upto(variance + j, live), eps) * load_upto(gamma + j, live);
        const Floats centre = load_upto(mean + j, live), shift = load_upto(beta + j, live);
        for (size_t i = j; i < count; i += columns) {
            store_upto(y + i, (load_upto(x + i, live) - centre) * factor + shift, live);
        }
    });
    return Fault::kNone;
}

Fault batch_norm_eval_grad(const Call& call) {
    const float* dy = call.in[0].f32();
    const float* x = call.in[1].f32();
    const float* gamma = call.in[2].f32();
    const float* mean = call.in[3].f32();
    const float* variance = call.in[4].f32();
    float* dx = call.out[0].f32_mut();
    const float eps = call.attr[0].f;
    const size_t columns = call.in[0].last(), count = call.in[0].elements, rows = count / columns;
    each_vector(columns, [=](size_t j, size_t live) {
        const Floats factor = reciprocal_root(load_upto(variance + j, live), eps) * load_upto(gamma + j, live);
        for (size_t i = j; i < count; i += columns) store_upto(dx + i, load_upto(dy + i, live) * factor, live);
    });
    if (call.outputs > 1) {
        float* dgamma = call.out[1].f32_mut();
        sum_columns(rows, columns, 1.0f, dgamma, [=](size_t row, size_t j, size_t live) {
            const size_t i = row * columns + j;
            return load_upto(dy + i, live) * (load_upto(x + i, live) - load_upto(mean + j, live));
        });
        each_vector(columns, [=](size_t j, size_t live) {
            const Floats rstd = reciprocal_root(load_upto(variance + j, live), eps);
            store_upto(dgamma + j, load_upto(dgamma + j, live) * rstd, live);
        });
    }
    if (call.outputs > 2) {
        sum_columns(rows, columns, 1.0f, call.out[2].f32_mut(),
                    [=](size_t row, size_t j, size_t live) { return load_upto(dy + row * columns + j, live); });
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- layer

Fault layer_norm(const Call& call) {
    const float* gamma = call.in[1].f32();
    const float* beta = call.in[2].f32();
    const double eps = double(call.attr[0].f);
    const size_t columns = call.in[1].elements, rows = call.in[0].elements / columns;
    for (size_t r = 0; r < rows; ++r) {
        const float* x = call.in[0].f32() + r * columns;
        float* y = call.out[0].f32_mut() + r * columns;
        const double sum = sum_elements(columns, [=](size_t i, size_t live) { return load_upto(x + i, live); });
        const float mean = float(sum / double(columns));
        const double squares = sum_elements(columns, [=](size_t i, size_t live) {
            const Floats distance = load_upto(x + i, live) - mean;
            return distance * distance;
        });
        const float rstd = float(1.0 / __builtin_sqrt(squares / double(columns) + eps));
        call.out[1].f32_mut()[r] = mean;
        call.out[2].f32_mut()[r] = rstd;
        each_vector(columns, [=](size_t j, size_t live) {
            const Floats x_hat = (load_upto(x + j, live) - mean) * rstd;
            store_upto(y + j, x_hat * load_upto(gamma + j, live) + load_upto(beta + j, live), live);
        });
    }
    return Fault::kNone;
}

// As batch_norm_grad, with means over the row and gamma inside them.
Fault layer_norm_grad(const Call& call) {
    const float* gamma = call.in[2].f32();
    const size_t columns = call.in[2].elements, rows = call.in[0].elements / columns;
    for (size_t r = 0; r < rows; ++r) {
        const float* dy = call.in[0].f32() + r * columns;
        const float* x = call.in[1].f32() + r * columns;
        float* dx = call.out[0].f32_mut() + r * columns;
        const float mean = call.in[3].f32()[r], rstd = call.in[4].f32()[r];
        const auto g = [=](size_t j, size_t live) { return load_upto(dy + j, live) * load_upto(gamma + j, live); };
        const auto x_hat = [=](size_t j, size_t live) { return (load_upto(x + j, live) - mean) * rstd; };
        const float share = 1.0f / float(columns);
        const float g_mean = float(sum_elements(columns, g)) * share;
        const float product_mean =
            float(sum_elements(columns, [=](size_t j, size_t live) { return g(j, live) * x_hat(j, live); })) * share;
        each_vector(columns, [=](size_t j, size_t live) {
            store_upto(dx + j, rstd * ((g(j, live) - g_mean) - x_hat(j, live) * product_mean), live);
        });
    }
    const float* dy = call.in[0].f32();
    const float* x = call.in[1].f32();
    const float* mean = call.in[3].f32();
    const float* rstd = call.in[4].f32();
    sum_columns(rows, columns, 1.0f, call.out[1].f32_mut(), [=](size_t row, size_t j, size_t live) {
        const size_t i = row * columns + j;
        return load_upto(dy + i, live) * (load_upto(x + i, live) - mean[row]) * rstd[row];
    });
    sum_columns(rows, columns, 1.0f, call.out[2].f32_mut(),
                [=](size_t row, size_t j, size_t live) { return load_upto(dy + row * columns + j, live); });
    return Fault::kNone;
}

}  // namespace

void register_norm(Kernel* table) {
    table[op::BATCH_NORM_TRAIN] = batch_norm_train;
    table[op::BATCH_NORM_GRAD] = batch_norm_grad;
    table[op::BATCH_NORM_EVAL] = batch_norm_eval;
    table[op::BATCH_NORM_EVAL_GRAD] = batch_norm_eval_grad;
    table[op::LAYER_NORM] = layer_norm;
    table[op::LAYER_NORM_GRAD] = layer_norm_grad;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
