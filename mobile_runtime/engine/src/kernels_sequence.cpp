// What the drivers of sequence.hpp call, for one instruction set.
#include "gemm.hpp"
#include "sequence.hpp"
#include "sums.hpp"
#include "vec_math.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// ------------------------------------------------------------------------------------------------- products

void pack(const float* w, size_t stride, size_t columns, size_t depth, float* panels) {
    for (size_t j = 0; j < columns; j += kPanelColumns) {
        const size_t live = columns - j < kPanelColumns ? columns - j : kPanelColumns;
        pack_panel_transposed(w + j * stride, stride, depth, live, panels + j * depth);
    }
}

void by_panels(const float* const* left, const float* panels, size_t depth, float* const* out, size_t rows,
               size_t columns, const float* bias) {
    Epilogue epilogue;
    epilogue.bias = bias;
    multiply_packed(Rows{left}, panels, depth, out, rows, columns, epilogue);
}

void by_rows(const float* const* left, const float* right, size_t stride, size_t depth, float* const* out, size_t rows,
             size_t columns, bool accumulate, float* scratch) {
    Epilogue epilogue;
    epilogue.accumulate = accumulate;
    multiply_in_place(Rows{left}, right, stride, depth, out, rows, columns, epilogue, scratch);
}

void by_columns(const float* left, size_t left_stride, const float* right, size_t stride, size_t depth,
                float* const* out, size_t rows, size_t columns, bool accumulate, float* scratch) {
    Epilogue epilogue;
    epilogue.accumulate = accumulate;
    multiply_in_place(Columns{left, left_stride}, right, stride, depth, out, rows, columns, epilogue, scratch);
}

void by_vector(const float* x, const float* w, size_t columns, size_t depth, float* out) {
    multiply_by_dots(x, w, 1, columns, depth, out, nullptr, activation::NONE);
}

constexpr Products kProducts = {pack, by_panels, by_rows, by_columns, by_vector, bias_gradient};

// ------------------------------------------------------------------------------------------------- attention

// row = e^(scale * row - shift); returns its sum.
__attribute__((noinline)) double raise(float* row, size_t count, float scale, float shift) {
    return sum_elements(count, [=](size_t j, size_t live) {
        const Floats power = exponential(load_upto(row + j, live) * scale - shift);
        store_upto(row + j, power, live);
        return power;
    });
}

float soften(float* row, size_t count, float scale) {
    Floats most = splat(row[0] * scale);
    for (size_t j = 0; j < count; j += kLanes) {
        most = maximum(most, keep_first(load_upto(row + j, count - j) * scale, count - j, row[0] * scale));
    }
    const float largest = max_lanes(most);
    const double sum = raise(row, count, scale, largest);
    const float inverse = float(1.0 / sum);
    for (size_t j = 0; j < count; j += kLanes) store_upto(row + j, load_upto(row + j, count - j) * inverse, count - j);
    return largest + logarithm(splat(float(sum)))[0];
}

void soften_back(float* row, float* drow, size_t count, float scale, float lse) {
    raise(row, count, scale, lse);
    Floats sums = {};
    for (size_t j = 0; j < count; j += kLanes) sums += load_upto(row + j, count - j) * load_upto(drow + j, count - j);
    const float mean = sum_lanes(sums);
    for (size_t j = 0; j < count; j += kLanes) {
        const size_t live = count - j;
        store_upto(drow + j, load_upto(row + j, live) * (load_upto(drow + j, live) - mean) * scale, live);
    }
}

constexpr Scores kScores = {soften, soften_back};

// ------------------------------------------------------------------------------------------------- recurrent cells

// Calls, not inlined: a cell has up to five of them.
__attribute__((noinline)) Floats sigmoid_of(Floats x) { return sigmoid(x); }
__attribute__((noinline)) Floats tanh_of(Floats x) { return hyperbolic_tangent(x); }

// Runs body(j, live) over kLanes elements at a time.
template <class Body>
EVENSONG_INLINE void each_vector(size_t count, Body body) {
    for (size_t j = 0; j < count; j += kLanes) body(j, count - j);
}

void gru_cell(const Step& s) {
    each_vector(s.hidden, [&](size_t j, size_t live) {
        const auto x = [&](size_t part) { return load_upto(s.gx + part * s.hidden + j, live); };
        const auto h = [&](size_t part) {
            return load_upto(s.gh + part * s.hidden + j, live) + load_upto(s.bias + part * s.hidden + j, live);
        };
        const Floats r = sigmoid_of(x(0) + h(0)), z = sigmoid_of(x(1) + h(1)), n = tanh_of(x(2) + r * h(2));
        store_upto(s.gates + j, r, live);
        store_upto(s.gates + s.hidden + j, z, live);
        store_upto(s.gates + 2 * s.hidden + j, n, live);
        store_upto(s.after + j, n + z * (load_upto(s.before + j, live) - n), live);
    });
}

void gru_cell_back(const StepBack& s) {
    each_vector(s.hidden, [&](size_t j, size_t live) {
        const Floats r = load_upto(s.gates + j, live), z = load_upto(s.gates + s.hidden + j, live);
        const Floats n = load_upto(s.gates + 2 * s.hidden + j, live);
        const Floats dh = load_upto(s.dy + j, live) + load_upto(s.dh + j, live);
        const Floats dn = dh * (1.0f - z) * (1.0f - n * n);
        const Floats dz = dh * (load_upto(s.before + j, live) - n) * z * (1.0f - z);
        store_upto(s.dgx + j, dn * load_upto(s.scratch + j, live) * r * (1.0f - r), live);
        store_upto(s.dgx + s.hidden + j, dz, live);
        store_upto(s.dgx + 2 * s.hidden + j, dn, live);
        store_upto(s.scratch + j, dn * r, live);
        store_upto(s.dh + j, dh * z, live);
    });
}

void lstm_cell(const Step& s) {
    each_vector(s.hidden, [&](size_t j, size_t live) {
        const auto sum = [&](size_t part) {
            const size_t at = part * s.hidden + j;
            return load_upto(s.gx + at, live) + load_upto(s.gh + at, live) + load_upto(s.bias + at, live);
        };
        const Floats i = sigmoid_of(sum(0)), f = sigmoid_of(sum(1)), g = tanh_of(sum(2)), o = sigmoid_of(sum(3));
        const Floats c = f * load_upto(s.c + j, live) + i * g;
        store_upto(s.gates + j, i, live);
        store_upto(s.gates + s.hidden + j, f, live);
        store_upto(s.gates + 2 * s.hidden + j, g, live);
        store_upto(s.gates + 3 * s.hidden + j, o, live);
        store_upto(s.c + j, c, live);
        store_upto(s.after + j, o * tanh_of(c), live);
    });
}

void lstm_cell_back(const StepBack& s) {
    each_vector(s.hidden, [&](size_t j, size_t live) {
        const Floats i = load_upto(s.gates + j, live), f = load_upto(s.gates + s.hidden + j, live);
        const Floats g = load_upto(s.gates + 2 * s.hidden + j, live), o = load_upto(s.gates + 3 * s.hidden + j, live);
        const Floats dh = load_upto(s.dy + j, live) + load_upto(s.dh + j, live);
        const Floats tanh_c = tanh_of(load_upto(s.scratch + j, live));
        const Floats dc = dh * o * (1.0f - tanh_c * tanh_c) + load_upto(s.dc + j, live);
        store_upto(s.dgx + j, dc * g * i * (1.0f - i), live);
        store_upto(s.dgx + s.hidden + j, dc * load_upto(s.before + j, live) * f * (1.0f - f), live);
        store_upto(s.dgx + 2 * s.hidden + j, dc * i * (1.0f - g * g), live);
        store_upto(s.dgx + 3 * s.hidden + j, dh * tanh_c * o * (1.0f - o), live);
        store_upto(s.dc + j, dc * f, live);
    });
}

void lstm_state(const float* gates, const float* before, float* after, size_t hidden) {
    each_vector(hidden, [=](size_t j, size_t live) {
        const Floats i = load_upto(gates + j, live), f = load_upto(gates + hidden + j, live);
        const Floats g = load_upto(gates + 2 * hidden + j, live);
        store_upto(after + j, f * load_upto(before + j, live) + i * g, live);
    });
}

constexpr Cells kCells = {gru_cell, gru_cell_back, lstm_cell, lstm_cell_back, lstm_state};

}  // namespace

void register_sequence(Kernel* table);
void register_sequence(Kernel* table) {
    table[op::MATMUL] = [](const Call& call) { return evensong::matmul(call, kProducts); };
    table[op::ATTENTION] = [](const Call& call) { return evensong::attention(call, kProducts, kScores); };
    table[op::ATTENTION_GRAD] = [](const Call& call) { return evensong::attention_grad(call, kProducts, kScores); };
    table[op::GRU] = [](const Call& call) { return evensong::gru(call, kProducts, kCells); };
    table[op::GRU_GRAD] = [](const Call& call) { return evensong::gru_grad(call, kProducts, kCells); };
    table[op::LSTM] = [](const Call& call) { return evensong::lstm(call, kProducts, kCells); };
    table[op::LSTM_GRAD] = [](const Call& call) { return evensong::lstm_grad(call, kProducts, kCells); };
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
