// Batch, layer, group and RMS normalisation, float32. Variances take two passes: the mean first, then the squared
// distances from it.

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

// out[columns] = scale * sum of x[rows, columns] over its rows
__attribute__((noinline)) void column_sums(const float* x, size_t rows, size_t columns, float scale, float* out) {
    sum_columns(rows, columns, scale, out,
                [=](size_t row, size_t j, size_t live) { return load_upto(x + row * columns + j, live); });
}

// out[columns] = scale * sum of factor (x - mean[columns]) over rows; without a factor of the squares of x - mean
__attribute__((noinline)) void centred_sums(const float* factor, const float* x, const float* mean, size_t rows,
                                            size_t columns, float scale, float* out) {
    sum_columns(rows, columns, scale, out, [=](size_t row, size_t j, size_t live) {
        const size_t i = row * columns + j;
        const Floats distance = load_upto(x + i, live) - load_upto(mean + j, live);
        return (factor ? load_upto(factor + i, live) : distance) * distance;
    });
}

// y = (x - mean) rstd gamma + beta for rows of columns
__attribute__((noinline)) void normalise(const float* x, size_t rows, size_t columns, const float* mean,
                                         const float* rstd, const float* gamma, const float* beta, float* y) {
    each_row(y, rows, columns, [=](size_t i, size_t j, size_t live) {
        const Floats factor = load_upto(rstd + j, live) * load_upto(gamma + j, live);
        return (load_upto(x + i, live) - load_upto(mean + j, live)) * factor + load_upto(beta + j, live);
    });
}

// values[columns] *= factors
EVENSONG_INLINE void multiply(float* values, const float* factors, size_t columns) {
    each_vector(columns, [=](size_t j, size_t live) {
        store_upto(values + j, load_upto(values + j, live) * load_upto(factors + j, live), live);
    });
}

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

    column_sums(x, rows, columns, share, mean);
    centred_sums(nullptr, x, mean, rows, columns, share, rstd);
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
    normalise(x, rows, columns, mean, rstd, gamma, beta, call.out[0].f32_mut());
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

    column_sums(dy, rows, columns, 1.0f, dbeta);
    centred_sums(dy, x, mean, rows, columns, 1.0f, dgamma);
    multiply(dgamma, rstd, columns);
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
        centred_sums(dy, x, mean, rows, columns, 1.0f, dgamma);
        each_vector(columns, [=](size_t j, size_t live) {
            const Floats rstd = reciprocal_root(load_upto(variance + j, live), eps);
            store_upto(dgamma + j, load_upto(dgamma + j, live) * rstd, live);
        });
    }
    if (call.outputs > 2) column_sums(dy, rows, columns, 1.0f, call.out[2].f32_mut());
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- rows

// LAYER_NORM, and RMS_NORM: the same with no beta, and a mean that counts as zero.
Fault row_norm(const Call& call) {
    const bool is_centred = call.inputs > 2;
    const float* gamma = call.in[1].f32();
    const float* beta = is_centred ? call.in[2].f32() : nullptr;
    const double eps = double(call.attr[0].f);
    const size_t columns = call.in[1].elements, rows = call.in[0].elements / columns;
    for (size_t r = 0; r < rows; ++r) {
        const float* x = call.in[0].f32() + r * columns;
        float* y = call.out[0].f32_mut() + r * columns;
        float mean = 0.0f;
        if (is_centred) {
            const double sum = sum_elements(columns, [=](size_t i, size_t live) { return load_upto(x + i, live); });
            mean = call.out[1].f32_mut()[r] = float(sum / double(columns));
        }
        const double squares = sum_elements(columns, [=](size_t i, size_t live) {
            const Floats distance = load_upto(x + i, live) - mean;
            return distance * distance;
        });
        const float rstd = float(1.0 / __builtin_sqrt(squares / double(columns) + eps));
        call.out[is_centred ? 2 : 1].f32_mut()[r] = rstd;
        each_vector(columns, [=](size_t j, size_t live) {
            const Floats scaled = (load_upto(x + j, live) - mean) * rstd * load_upto(gamma + j, live);
            store_upto(y + j, beta ? scaled + load_upto(beta + j, live) : scaled, live);
        });
    }
    return Fault::kNone;
}

// As batch_norm_grad, with means over the row and gamma inside them.
Fault row_norm_grad(const Call& call) {
    const bool is_centred = call.inputs > 4;
    const float* dy = call.in[0].f32();
    const float* x = call.in[1].f32();
    const float* gamma = call.in[2].f32();
    const float* mean = is_centred ? call.in[3].f32() : nullptr;
    const float* rstd = call.in[is_centred ? 4 : 3].f32();
    const size_t columns = call.in[2].elements, rows = call.in[0].elements / columns;
    const float share = 1.0f / float(columns);
    const auto x_hat = [=](size_t row, size_t j, size_t live) {
        return (load_upto(x + row * columns + j, live) - (mean ? mean[row] : 0.0f)) * rstd[row];
    };
    for (size_t r = 0; r < rows; ++r) {
        float* dx = call.out[0].f32_mut() + r * columns;
        const auto g = [=](size_t j, size_t live) {
            return load_upto(dy + r * columns + j, live) * load_upto(gamma + j, live);
        };
        const float g_mean = is_centred ? float(sum_elements(columns, g)) * share : 0.0f;
        const float product_mean =
            float(sum_elements(columns, [=](size_t j, size_t live) { return g(j, live) * x_hat(r, j, live); })) * share;
        each_vector(columns, [=](size_t j, size_t live) {
            store_upto(dx + j, rstd[r] * ((g(j, live) - g_mean) - x_hat(r, j, live) * product_mean), live);
        });
    }
    sum_columns(rows, columns, 1.0f, call.out[1].f32_mut(), [=](size_t row, size_t j, size_t live) {
        return load_upto(dy + row * columns + j, live) * x_hat(row, j, live);
    });
    if (call.outputs > 2) column_sums(dy, rows, columns, 1.0f, call.out[2].f32_mut());
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- groups of channels

// Every channel of a group gets `scale` times the sum of its group.
void share_groups(float* values, size_t groups, size_t channels, float scale) {
    const size_t size = channels / groups;
    for (float* group = values; group != values + channels; group += size) {
        double sum = 0;
        for (size_t c = 0; c < size; ++c) sum += double(group[c]);
        for (size_t c = 0; c < size; ++c) group[c] = float(sum) * scale;
    }
}

// out[channel] = values[its group]
void spread_groups(const float* values, size_t groups, size_t channels, float* out) {
    for (size_t c = 0; c < channels; ++c) out[c] = values[c / (channels / groups)];
}

Fault group_norm(const Call& call) {
    const float eps = call.attr[0].f;
    const size_t rows = call.in[0].dims[1], channels = call.in[0].dims[2], groups = call.out[1].last();
    const size_t size = channels / groups;
    const float share = 1.0f / float(rows * size);
    float* mean = reinterpret_cast<float*>(call.workspace);
    float* rstd = mean + channels;
    for (size_t n = 0; n < call.in[0].dims[0]; ++n) {
        const float* x = call.in[0].f32() + n * rows * channels;
        column_sums(x, rows, channels, 1.0f, mean);
        share_groups(mean, groups, channels, share);
        centred_sums(nullptr, x, mean, rows, channels, 1.0f, rstd);
        share_groups(rstd, groups, channels, share);
        each_vector(channels, [=](size_t j, size_t live) {
            store_upto(rstd + j, reciprocal_root(load_upto(rstd + j, live), eps), live);
        });
        for (size_t g = 0; g < groups; ++g) {
            call.out[1].f32_mut()[n * groups + g] = mean[g * size];
            call.out[2].f32_mut()[n * groups + g] = rstd[g * size];
        }
        normalise(x, rows, channels, mean, rstd, call.in[1].f32(), call.in[2].f32(),
                  call.out[0].f32_mut() + n * rows * channels);
    }
    return Fault::kNone;
}

// As batch_norm_grad, with means over the rows and channels of a group and gamma inside them.
Fault group_norm_grad(const Call& call) {
    const float* gamma = call.in[2].f32();
    const size_t rows = call.in[0].dims[1], channels = call.in[0].dims[2], groups = call.in[3].last();
    const float share = 1.0f / float(rows * (channels / groups));
    float* sums[2] = {call.out[2].f32_mut(), call.out[1].f32_mut()};  // dbeta, dgamma
    float* mean = reinterpret_cast<float*>(call.workspace);
    float* rstd = mean + channels;
    float* means[2] = {rstd + channels, rstd + 2 * channels};  // of dy gamma and of dy gamma x_hat, over groups
    for (size_t n = 0; n < call.in[0].dims[0]; ++n) {
        const float* dy = call.in[0].f32() + n * rows * channels;
        const float* x = call.in[1].f32() + n * rows * channels;
        spread_groups(call.in[3].f32() + n * groups, groups, channels, mean);
        spread_groups(call.in[4].f32() + n * groups, groups, channels, rstd);
        column_sums(dy, rows, channels, 1.0f, means[0]);
        centred_sums(dy, x, mean, rows, channels, 1.0f, means[1]);
        multiply(means[1], rstd, channels);
        for (size_t k = 0; k < 2; ++k) {
            each_vector(channels, [=](size_t j, size_t live) {
                const Floats sum = load_upto(means[k] + j, live);
                store_upto(sums[k] + j, n ? load_upto(sums[k] + j, live) + sum : sum, live);
            });
            multiply(means[k], gamma, channels);
            share_groups(means[k], groups, channels, share);
        }
        each_row(call.out[0].f32_mut() + n * rows * channels, rows, channels, [=](size_t i, size_t j, size_t live) {
            const Floats r = load_upto(rstd + j, live);
            const Floats x_hat = (load_upto(x + i, live) - load_upto(mean + j, live)) * r;
            const Floats centred = load_upto(dy + i, live) * load_upto(gamma + j, live) - load_upto(means[0] + j, live);
            return r * (centred - x_hat * load_upto(means[1] + j, live));
        });
    }
    return Fault::kNone;
}

}  // namespace

void register_norm(Kernel* table) {
    table[op::BATCH_NORM_TRAIN] = batch_norm_train;
    table[op::BATCH_NORM_GRAD] = batch_norm_grad;
    table[op::BATCH_NORM_EVAL] = batch_norm_eval;
    table[op::BATCH_NORM_EVAL_GRAD] = batch_norm_eval_grad;
    table[op::LAYER_NORM] = table[op::RMS_NORM] = row_norm;
    table[op::LAYER_NORM_GRAD] = table[op::RMS_NORM_GRAD] = row_norm_grad;
    table[op::GROUP_NORM] = group_norm;
    table[op::GROUP_NORM_GRAD] = group_norm_grad;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
