// Matrix products, C (+)= A B, as tiles of rows x vectors that stay in registers for the whole depth.
//
// A is read one element at a time and broadcast, so it needs no packing: it is either a list of rows or a matrix whose
// columns are contiguous (a transposed operand). B is read in vectors along its columns: in place where its rows are
// contiguous, else from packed panels. The idea of panels is from Goto and van de Geijn (2008), "Anatomy of
// high-performance matrix multiplication"; the small matrices of devices need only its innermost two loops.
#pragma once

#include "opcodes.h"
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
    float scale = 1.0f;       // of the product, where it is added to what C holds
};

EVENSONG_INLINE Floats activate(Floats v, int32_t kind) {
    if (kind == activation::NONE) return v;
    v = v < 0.0f ? Floats{} : v;  // NaN stays NaN
    return kind == activation::RELU6 ? (v > 6.0f ? splat(6.0f) : v) : v;
}

// One panel: out[row][out_column + j] for all rows and the panel's columns j < `columns`.
void multiply_panel(Rows left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows,
                    size_t out_column, size_t columns, Epilogue epilogue);
void multiply_panel(Columns left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows,
                    size_t out_column, size_t columns, Epilogue epilogue);

// Columns of the panel that starts where `columns` are left, as packed: whole vectors.
EVENSONG_INLINE size_t panel_width(size_t columns) { return columns > kLanes ? kPanelColumns : kLanes; }

// out[0..rows)[0..columns) (+)= left * right, where right is packed panel after panel.
void multiply_packed(Rows left, const float* panels, size_t depth, float* const* out, size_t rows, size_t columns,
                     Epilogue epilogue);

// out (+)= left * right, where right's rows are contiguous and read in place; `scratch` holds one panel of `depth`
// rows. Without scratch, whole vectors may be read at the end of every row.
void multiply_in_place(Rows left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows,
                       size_t columns, Epilogue epilogue, float* scratch);
void multiply_in_place(Columns left, const float* right, size_t right_stride, size_t depth, float* const* out,
                       size_t rows, size_t columns, Epilogue epilogue, float* scratch);

// Packs right[0..depth)[0..columns) into one panel of whole vectors; `columns` is cut to one panel.
void pack_panel(const float* right, size_t right_stride, size_t depth, size_t columns, float* panel);

// The same from a transposed matrix: panel[k][j] = right[j * stride + k].
void pack_panel_transposed(const float* right, size_t stride, size_t depth, size_t columns, float* panel);

// out[rows, columns] = activation(x[rows, depth] w[columns, depth]^T + bias), without packing: for few rows.
void multiply_by_dots(const float* x, const float* w, size_t rows, size_t columns, size_t depth, float* out,
                      const float* bias, int32_t kind);

// db[columns] = sum of dy[rows, columns] over rows
void bias_gradient(const float* dy, size_t rows, size_t columns, float* db);

}  // namespace EVENSONG_ISA
}  // namespace evensong
