// Int8 matrix products: y[r, o] = requantise(bias[o] + sum over k of x[r, k] w[o, k]).
//
// Few rows (multiply_row): one dot product along k for each output, weights read once where they lie. Many rows
// (multiply_rows): weights are repacked so that lanes are outputs, and a tile of rows multiplies a panel of columns.
#pragma once

#include "int8_vec.hpp"
#include "workspace.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// What both forms need to know.
struct Int8Layer {
    const int8_t* w;          // [outputs, depth]
    const float* bias;        // [outputs], int32 bits
    const float* multiplier;  // [outputs]
    size_t depth, outputs;
    size_t stride;  // from one row of y to the next
    Requantizer requantize;
};

// ------------------------------------------------------------------------------------------------- few rows

// One step of a dot product: as many bytes of x and w as fill a vector of cells.
constexpr size_t kDotStep = kLanes * kGroup;

#if defined(EVENSONG_UNSIGNED_DOT)
// Here the weights take the unsigned side, so that x needs no change: (w + 128) x, less 128 x once for each row of x.
EVENSONG_INLINE Ints dot_activations(const int8_t* x) { return load_as<Ints>(x); }
EVENSONG_INLINE Ints dot_weights(const int8_t* w) { return load_as<Ints>(w) ^ int32_t(0x80808080); }
EVENSONG_INLINE Ints dot_step(Ints sum, Ints x, Ints w) { return dot_groups(sum, w, x); }
#else
EVENSONG_INLINE Ints dot_activations(const int8_t* x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return load_as<Ints>(x);
#else
    return widen_pairs(x);
#endif
}
EVENSONG_INLINE Ints dot_weights(const int8_t* w) { return dot_activations(w); }
EVENSONG_INLINE Ints dot_step(Ints sum, Ints x, Ints w) { return dot_groups(sum, x, w); }
#endif

// The sums of four vectors, one to a lane.
EVENSONG_INLINE Ints4 sum_each(const Ints* v) {
    const Square t = turn(fold_to_four<Ints4>(v[0]), fold_to_four<Ints4>(v[1]), fold_to_four<Ints4>(v[2]),
                          fold_to_four<Ints4>(v[3]));
    return (t.line[0] + t.line[1]) + (t.line[2] + t.line[3]);
}

// y[outputs] of one row x[depth], depth >= kDotStep.
static void multiply_row(const Int8Layer& layer, const int8_t* x, int8_t* y) {
    // The last step ends with the row, where it may meet places that have been multiplied before: there x is zero.
    const size_t depth = layer.depth, whole = depth / kDotStep * kDotStep, last = depth - kDotStep;
    int8_t buffer[kDotStep] = {};
    for (size_t k = whole; k < depth; ++k) buffer[k - last] = x[k];
    const Ints x_last = dot_activations(buffer);

    Ints start = {};
#if defined(EVENSONG_UNSIGNED_DOT)
    start = dot_step(start, x_last, offset_groups());
    for (size_t k = 0; k < whole; k += kDotStep) start = dot_step(start, dot_activations(x + k), offset_groups());
    start = -start;
#endif

    for (size_t first = 0; first < layer.outputs; first += kLanes) {
        const size_t live = layer.outputs - first;
        int32_t totals[kLanes] = {};
        for (size_t o = 0; o < kLanes && o < live; o += 4) {
            const int8_t* w[4];  // outputs that do not exist repeat the last one
            Ints sums[4];
            EVENSONG_UNROLL
            for (size_t j = 0; j < 4; ++j) {
                w[j] = layer.w + (first + (o + j < live ? o + j : live - 1)) * depth;
                sums[j] = dot_step(start, x_last, dot_weights(w[j] + last));
            }
            for (size_t k = 0; k < whole; k += kDotStep) {
                const Ints cells = dot_activations(x + k);
                EVENSONG_UNROLL
                for (size_t j = 0; j < 4; ++j) sums[j] = dot_step(sums[j], cells, dot_weights(w[j] + k));
            }
            store_as(totals + o, sum_each(sums));
        }
        const Ints sum = load_as<Ints>(totals) + Ints(load_upto(layer.bias + first, live));
        store_bytes(y + first, layer.requantize(to_float(sum) * load_upto(layer.multiplier + first, live)), live);
    }
}

// ------------------------------------------------------------------------------------------------- many rows

constexpr size_t kPanelColumns = 2 * kLanes;

// Repacks weights [outputs, depth] into panels [depth / kGroup][kPanelColumns][kGroup], zero beyond the depth, and
// takes what the cells' offset will add off the bias. Columns beyond the outputs repeat the last one; nobody reads
// their sums.
static void pack_weights(const Int8Layer& layer, size_t first, size_t columns, WeightCell* packed, int32_t* bias) {
    constexpr size_t kStep = 4 * kGroup, kLine = kPanelColumns * kGroup;
    const size_t depth = layer.depth, whole = depth / kStep * kStep, rest = depth - whole;
    const size_t groups = (depth + kGroup - 1) / kGroup, panel = groups * kLine, last = layer.outputs - 1;
    for (size_t column = 0; column < columns; column += 4) {
        WeightCell* to = packed + column / kPanelColumns * panel + column % kPanelColumns * kGroup;
        const int8_t* w[4];
        for (size_t j = 0; j < 4; ++j) {
            const size_t output = first + column + j < last ? first + column + j : last;
            w[j] = layer.w + output * depth;
            bias[column + j] = reinterpret_cast<const int32_t*>(layer.bias)[output];
        }
        for (size_t k = 0; k < whole; k += kStep, to += 4 * kLine) {
            const Square square =
                turn(four_groups(w[0] + k), four_groups(w[1] + k), four_groups(w[2] + k), four_groups(w[3] + k));
            EVENSONG_UNROLL
            for (size_t i = 0; i < 4; ++i) store_as(to + i * kLine, square.line[i]);
        }
        if (rest) {
            int8_t buffer[4][kStep] = {};
            for (size_t j = 0; j < 4; ++j) {
                for (size_t k = 0; k < rest; ++k) buffer[j][k] = w[j][whole + k];
            }
            const Square square =
                turn(four_groups(buffer[0]), four_groups(buffer[1]), four_groups(buffer[2]), four_groups(buffer[3]));
            for (size_t i = 0; i * kGroup < rest; ++i) store_as(to + i * kLine, square.line[i]);
        }
    }
#if defined(EVENSONG_UNSIGNED_DOT)
    for (size_t column = 0; column < columns; column += kLanes) {
        const WeightCell* from = packed + column / kPanelColumns * panel + column % kPanelColumns * kGroup;
        Ints excess = {};
        for (size_t g = 0; g < groups; ++g) {
            excess = dot_groups(excess, offset_groups(), load_as<Ints>(from + g * kLine));
        }
        store_as(bias + column, load_as<Ints>(bias + column) - excess);
    }
#endif
}

// y[rows, columns] of a tile of kRows rows of cells (those beyond `rows` are computed and dropped) and one panel.
template <size_t kVectors>
static void multiply_tile(const Int8Layer& layer, const Cell* cells, size_t cell_stride, size_t rows,
                          const WeightCell* panel, const int32_t* bias, size_t first, int8_t* y) {
    const size_t groups = cell_stride / kGroup;
    Ints sums[kRows][kVectors];
    EVENSONG_UNROLL
    for (size_t i = 0; i < kRows * kVectors; ++i) {
        sums[i / kVectors][i % kVectors] = load_as<Ints>(bias + i % kVectors * kLanes);
    }
    for (size_t g = 0; g < groups; ++g, panel += kPanelColumns * kGroup) {
        Ints weights[kVectors];
        EVENSONG_UNROLL
        for (size_t v = 0; v < kVectors; ++v) weights[v] = load_as<Ints>(panel + v * kLanes * kGroup);
        EVENSONG_UNROLL
        for (size_t r = 0; r < kRows; ++r) {
            const Ints same = splat(load_as<int32_t>(cells + r * cell_stride + g * kGroup));
            EVENSONG_UNROLL
            for (size_t v = 0; v < kVectors; ++v) sums[r][v] = dot_groups(sums[r][v], same, weights[v]);
        }
    }
    Ints done[kRows][kVectors];  // in memory, for a loop over the rows that exist
    EVENSONG_UNROLL
    for (size_t i = 0; i < kRows * kVectors; ++i) done[i / kVectors][i % kVectors] = sums[i / kVectors][i % kVectors];
    for (size_t v = 0; v < kVectors; ++v) {
        const size_t column = first + v * kLanes, live = layer.outputs - column;
        const Floats multiplier = load_upto(layer.multiplier + column, live);
        for (size_t r = 0; r < rows; ++r) {
            store_bytes(y + r * layer.stride + column, layer.requantize(to_float(done[r][v]) * multiplier), live);
        }
    }
}

// All rows. cells_of(row, cells) writes one row of cells, see copy_cells, and is called for all rows in order, once for
// each block of weights.
template <class CellsOf>
EVENSONG_INLINE void multiply_rows(const Int8Layer& layer, size_t rows, int8_t* y, char* workspace, CellsOf cells_of) {
    const size_t depth = (layer.depth + 3) / 4 * 4, block = workspace::int8_columns(layer.depth, layer.outputs);
    const size_t cell_stride = (layer.depth + kGroup - 1) / kGroup * kGroup;
    WeightCell* packed = reinterpret_cast<WeightCell*>(workspace);
    int32_t* bias = reinterpret_cast<int32_t*>(workspace + 2 * depth * block);
    Cell* cells = reinterpret_cast<Cell*>(bias + block);
    for (size_t first = 0; first < layer.outputs; first += block) {
        const size_t left = layer.outputs - first;
        const size_t columns = left < block ? (left + kPanelColumns - 1) / kPanelColumns * kPanelColumns : block;
        pack_weights(layer, first, columns, packed, bias);
        for (size_t row = 0; row < rows; row += kRows) {
            const size_t live = rows - row < kRows ? rows - row : kRows;
            for (size_t r = 0; r < live; ++r) cells_of(row + r, cells + r * cell_stride);
            for (size_t c = 0; c < columns; c += kPanelColumns) {
                const WeightCell* panel = packed + c * cell_stride;
                const bool both = first + c + kLanes < layer.outputs;
                const auto multiply = both ? multiply_tile<2> : multiply_tile<1>;
                multiply(layer, cells, cell_stride, live, panel, bias + c, first + c, y + row * layer.stride);
            }
        }
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
