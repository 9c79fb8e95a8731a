// Matrix products, C (+)= A B, as tiles of rows x vectors that stay in registers for the whole depth.
//
// A is read one element at a time and broadcast, so it needs no packing: it is either a list of rows or a matrix whose
// columns are contiguous (a transposed operand). B is read in vectors along its columns: in place where its rows are
// contiguous, else from packed panels. The idea of panels is from Goto and van de Geijn (2008), "Anatomy of
// high-performance matrix multiplication"; the small matrices of devices need only its innermost two loops.
#pragma once

#include "opcodes.h"
#include "sums.hpp"
#include "vec.hpp"
#include "workspace.hpp"

namespace evensong {
namespace EVENSONG_ISA {

constexpr size_t kPanelVectors = 2;
constexpr size_t kPanelColumns = kPanelVectors * kLanes;
constexpr size_t kTileRows = EVENSONG_LANES == 16 ? 12 : 6;  // fills the registers: 32 of 512 bits, or 16
constexpr size_t kMostRows = workspace::kMostPatches;        // rows of one call of multiply()
static_assert(kPanelColumns <= workspace::kPanel, "the workspace bound covers every instruction set");

// Rows of A: rows[i][k].
struct Rows {
    const float* const* rows;
    float at(size_t i, size_t k) const { return rows[i][k]; }
    Rows from(size_t row) const { return {rows + row}; }
};

// A transposed: element (i, k) stands at data[k * stride + i].
struct Columns {
    const float* data;
    size_t stride;
    float at(size_t i, size_t k) const { return data[k * stride + i]; }
    Columns from(size_t row) const { return {data + row, stride}; }
};

// What happens to a finished tile: C = activation(product + bias), or C += product while the depth is not used up.
struct Epilogue {
    const float* bias = nullptr;  // one entry a column
    int32_t activation = activation::NONE;
    bool accumulate = false;  // add to what C holds, before bias and activation
};

EVENSONG_INLINE Floats activate(Floats v, int32_t kind) {
    if (kind == activation::NONE) return v;
    v = v < 0.0f ? Floats{} : v;  // NaN stays NaN
    return kind == activation::RELU6 ? (v > 6.0f ? splat(6.0f) : v) : v;
}

// One tile: kRows rows times kVectors vectors, of which `columns` columns exist.
template <size_t kRows, size_t kVectors, class Left>
__attribute__((noinline)) void multiply_tile(Left left, const float* right, size_t right_stride, size_t depth, float* const* out,
                                             size_t out_column, size_t columns, Epilogue epilogue) {
    Floats sums[kRows][kVectors] = {};
    Left a = left;
    for (size_t k = 0; k < depth; ++k, right += right_stride) {
        Floats b[kVectors];
        for (size_t v = 0; v < kVectors; ++v) b[v] = load(right + v * kLanes);
        for (size_t i = 0; i < kRows; ++i) {
            const float scalar = a.at(i, k);
            for (size_t v = 0; v < kVectors; ++v) sums[i][v] += scalar * b[v];
        }
    }
    for (size_t v = 0; v < kVectors; ++v) {
        if (v * kLanes >= columns) return;
        const size_t live = columns - v * kLanes, column = out_column + v * kLanes;
        const Floats bias = epilogue.bias ? load_upto(epilogue.bias + column, live) : Floats{};
        for (size_t i = 0; i < kRows; ++i) {
            float* c = out[i] + column;
            Floats sum = sums[i][v] + bias;
            if (epilogue.accumulate) sum += load_upto(c, live);
            store_upto(c, activate(sum, epilogue.activation), live);
        }
    }
}

// All rows of one panel: tiles of kTileRows, then of what is left.
template <size_t kVectors, size_t kRows = kTileRows, class Left>
EVENSONG_INLINE void multiply_panel(Left left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows,
                                    size_t out_column, size_t columns, Epilogue epilogue) {
    size_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
        multiply_tile<kRows, kVectors>(left.from(row), right, right_stride, depth, out + row, out_column, columns, epilogue);
    }
    if constexpr (kRows > 1) {
        constexpr size_t kFewer = kRows > 4 ? kRows - (kTileRows == 12 ? 4 : 2) : kRows / 2;
        if (row < rows) {
            multiply_panel<kVectors, kFewer>(left.from(row), right, right_stride, depth, out + row, rows - row, out_column, columns,
                                             epilogue);
        }
    }
}

template <class Left>
void multiply_panel(Left left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows, size_t out_column,
                    size_t columns, Epilogue epilogue) {
    if (columns > kLanes) {
        multiply_panel<2>(left, right, right_stride, depth, out, rows, out_column, columns, epilogue);
    } else {
        multiply_panel<1>(left, right, right_stride, depth, out, rows, out_column, columns, epilogue);
    }
}

// Columns of the panel that starts where `columns` are left, as packed: whole vectors.
EVENSONG_INLINE size_t panel_width(size_t columns) { return columns > kLanes ? kPanelColumns : kLanes; }

// out[0..rows)[0..columns) (+)= left * right, where right is packed panel after panel.
template <class Left>
EVENSONG_INLINE void multiply_packed(Left left, const float* panels, size_t depth, float* const* out, size_t rows, size_t columns,
                                     Epilogue epilogue) {
    for (size_t j = 0; j < columns; j += kPanelColumns) {
        const size_t left_over = columns - j;
        multiply_panel(left, panels + j * depth, panel_width(left_over), depth, out, rows, j, left_over, epilogue);
    }
}

// Packs right[0..depth)[0..columns) into one panel of whole vectors; `columns` fits one panel.
EVENSONG_INLINE void pack_panel(const float* right, size_t right_stride, size_t depth, size_t columns, float* panel) {
    const size_t width = panel_width(columns);
    for (size_t k = 0; k < depth; ++k, right += right_stride, panel += width) {
        for (size_t j = 0; j < width; j += kLanes) store(panel + j, j < columns ? load_upto(right + j, columns - j) : Floats{});
    }
}

// The same from a transposed matrix: panel[k][j] = right[j * stride + k].
EVENSONG_INLINE void pack_panel_transposed(const float* right, size_t stride, size_t depth, size_t columns, float* panel) {
    const size_t width = panel_width(columns);
    for (size_t j = 0; j < width; ++j) {
        for (size_t k = 0; k < depth; ++k) panel[k * width + j] = j < columns ? right[j * stride + k] : 0.0f;
    }
}

// out (+)= left * right, where right's rows are contiguous and read in place; `scratch` holds one panel of `depth` rows.
// `is_padded`: whole vectors may be read at the end of every row.
template <class Left>
void multiply_in_place(Left left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows, size_t columns,
                       Epilogue epilogue, bool is_padded, float* scratch) {
    for (size_t j = 0; j < columns; j += kPanelColumns) {
        const size_t left_over = columns - j, width = panel_width(left_over);
        if (left_over >= width || is_padded) {
            multiply_panel(left, right + j, right_stride, depth, out, rows, j, left_over, epilogue);
        } else {
            pack_panel(right + j, right_stride, depth, left_over, scratch);
            multiply_panel(left, scratch, width, depth, out, rows, j, left_over, epilogue);
        }
    }
}

// db[columns] = sum of dy[rows, columns] over rows
EVENSONG_INLINE void bias_gradient(const float* dy, size_t rows, size_t columns, float* db) {
    sum_columns(rows, columns, 1.0f, db, [=](size_t i, size_t j, size_t live) { return load_upto(dy + i * columns + j, live); });
}

// ------------------------------------------------------------------------------------------------- dot products

// out[i][j] = activation(dot(x[i], w[j]) + bias[j]) for kRows rows of x and kColumns rows of w, all contiguous.
template <size_t kRows, size_t kColumns>
__attribute__((noinline)) void dot_tile(const float* x, size_t depth, const float* const* w, float* out, size_t out_stride,
                                        size_t columns, const float* bias, int32_t kind) {
    Floats sums[kRows][kColumns] = {};
    size_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        Floats a[kRows];
        for (size_t i = 0; i < kRows; ++i) a[i] = load(x + i * depth + k);
        for (size_t j = 0; j < kColumns; ++j) {
            const Floats b = load(w[j] + k);
            for (size_t i = 0; i < kRows; ++i) sums[i][j] += a[i] * b;
        }
    }
    if (k < depth) {
        for (size_t j = 0; j < kColumns; ++j) {
            const Floats b = load_upto(w[j] + k, depth - k);
            for (size_t i = 0; i < kRows; ++i) sums[i][j] += load_upto(x + i * depth + k, depth - k) * b;
        }
    }
    for (size_t i = 0; i < kRows; ++i) {
        for (size_t j = 0; j < kColumns; ++j) {
            if (j >= columns) break;
            float sum = sum_lanes(sums[i][j]) + (bias ? bias[j] : 0.0f);
            if (kind != activation::NONE) sum = sum < 0.0f ? 0.0f : sum;
            if (kind == activation::RELU6) sum = sum > 6.0f ? 6.0f : sum;
            out[i * out_stride + j] = sum;
        }
    }
}

template <size_t kRows, size_t kColumns>
EVENSONG_INLINE void dot_rows(const float* x, size_t depth, const float* const* w, float* out, size_t out_stride, size_t& row,
                              size_t rows, size_t columns, const float* bias, int32_t kind) {
    for (; row + kRows <= rows; row += kRows) {
        dot_tile<kRows, kColumns>(x + row * depth, depth, w, out + row * out_stride, out_stride, columns, bias, kind);
    }
}

// out[rows, columns] = activation(x[rows, depth] w[columns, depth]^T + bias), without packing: for few rows.
EVENSONG_INLINE void multiply_by_dots(const float* x, const float* w, size_t rows, size_t columns, size_t depth, float* out,
                                      const float* bias, int32_t kind) {
    constexpr size_t kColumns = EVENSONG_LANES == 16 ? 5 : 3;
    const size_t step = rows >= 4 ? kColumns : 8;
    for (size_t j = 0; j < columns; j += step) {
        const float* w_rows[8];
        for (size_t c = 0; c < step; ++c) w_rows[c] = w + (j + c < columns ? j + c : columns - 1) * depth;
        const size_t live = columns - j;
        const float* b = bias ? bias + j : nullptr;
        size_t row = 0;
        if (step == kColumns) dot_rows<4, kColumns>(x, depth, w_rows, out + j, columns, row, rows, live, b, kind);
        if (step == kColumns) dot_rows<1, kColumns>(x, depth, w_rows, out + j, columns, row, rows, live, b, kind);
        dot_rows<1, 8>(x, depth, w_rows, out + j, columns, row, rows, live, b, kind);
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
