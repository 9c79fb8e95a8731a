// The tiles behind gemm.hpp.
#include "gemm.hpp"
#include "sums.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// Whether a tile can add itself to what C holds; only the largest can, since the code for it is as large as the tile.
template <size_t kRows, size_t kVectors>
constexpr bool kAdds = kRows == kTileRows && kVectors == kPanelVectors;

// Adds up one tile: kRows rows times kVectors vectors, for the whole depth, in registers. Stores it to out[row] +
// column, or with `scale` adds scale times it to what stands there.
template <size_t kRows, size_t kVectors, class Left>
void multiply_tile(Left left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t column,
                   const float* scale) {
    Floats sums[kRows][kVectors] = {};
    for (size_t k = 0; k < depth; ++k, right += right_stride) {
        Floats b[kVectors];
        EVENSONG_UNROLL
        for (size_t v = 0; v < kVectors; ++v) b[v] = load(right + v * kLanes);
        EVENSONG_UNROLL
        for (size_t i = 0; i < kRows; ++i) {
            const float scalar = left.at(i, k);
            EVENSONG_UNROLL
            for (size_t v = 0; v < kVectors; ++v) sums[i][v] += scalar * b[v];
        }
    }
    if (kAdds<kRows, kVectors> && scale) {
        const Floats factor = splat(*scale);
        EVENSONG_UNROLL
        for (size_t i = 0; i < kRows; ++i) {
            float* row = out[i] + column;
            EVENSONG_UNROLL
            for (size_t v = 0; v < kVectors; ++v) store(row + v * kLanes, load(row + v * kLanes) + factor * sums[i][v]);
        }
        return;
    }
    EVENSONG_UNROLL
    for (size_t i = 0; i < kRows; ++i) {
        float* row = out[i] + column;
        EVENSONG_UNROLL
        for (size_t v = 0; v < kVectors; ++v) store(row + v * kLanes, sums[i][v]);
    }
}

// Writes the first `columns` columns of a tile to out[row] + out_column.
__attribute__((noinline)) void finish_tile(const float* tile, size_t rows, float* const* out, size_t out_column,
                                           size_t columns, Epilogue epilogue) {
    for (size_t j = 0; j < columns && j < kPanelColumns; j += kLanes) {
        const size_t live = columns - j, column = out_column + j;
        const Floats bias = epilogue.bias ? load_upto(epilogue.bias + column, live) : Floats{};
#pragma GCC unroll 1
        for (size_t i = 0; i < rows; ++i) {
            float* c = out[i] + column;
            Floats sum = load(tile + i * kPanelColumns + j) + bias;
            if (epilogue.accumulate) sum = load_upto(c, live) + epilogue.scale * sum;
            store_upto(c, activate(sum, epilogue.activation), live);
        }
    }
}

// Tiles by their height, so that any number of rows is a few of them.
template <class Left>
struct Tile {
    size_t rows;
    void (*multiply[kPanelVectors])(Left left, const float* right, size_t right_stride, size_t depth, float* const* out,
                                    size_t column, const float* scale);
};

template <class Left, size_t kRows>
constexpr Tile<Left> tile_of() {
    return {kRows, {multiply_tile<kRows, 1, Left>, multiply_tile<kRows, 2, Left>}};
}

template <class Left>
constexpr Tile<Left> kTiles[] = {
    tile_of<Left, kTileRows>(),
#if !defined(__wasm__)  // a module is to be small
    tile_of<Left, kTileRows / 3 * 2>(),
#endif
    tile_of<Left, kTileRows / 3>(),     tile_of<Left, 2>(), tile_of<Left, 1>(),
};

// All rows of one panel: out[row][out_column + j] for the panel's columns j < `columns`. A tile that is whole and gets
// neither bias nor activation goes straight to its place, any other through a buffer.
template <class Left>
void multiply_rows(Left left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows,
                   size_t out_column, size_t columns, Epilogue epilogue) {
    const bool is_plain = columns >= panel_width(columns) && !epilogue.bias && epilogue.activation == activation::NONE;
    alignas(64) float buffer[kTileRows * kPanelColumns];
    float* buffer_rows[kTileRows];
    for (size_t i = 0; i < kTileRows; ++i) buffer_rows[i] = buffer + i * kPanelColumns;
    const Tile<Left>* tile = kTiles<Left>;
    for (size_t row = 0; row < rows; row += tile->rows) {
        while (tile->rows > rows - row) ++tile;
        if (epilogue.accumulate) {  // what is added to comes from far away: ask for it before the tile's sums begin
            for (size_t i = 0; i < tile->rows; ++i) {
                for (size_t j = 0; j < kPanelColumns; j += 16) __builtin_prefetch(out[row + i] + out_column + j, 1);
            }
        }
        const bool adds = epilogue.accumulate && tile->rows == kTileRows && columns >= kPanelColumns;
        const bool is_direct = is_plain && (adds || !epilogue.accumulate);
        tile->multiply[columns > kLanes](left.from(row), right, right_stride, depth,
                                         is_direct ? out + row : buffer_rows, is_direct ? out_column : 0,
                                         is_direct && adds ? &epilogue.scale : nullptr);
        if (!is_direct) finish_tile(buffer, tile->rows, out + row, out_column, columns, epilogue);
    }
}

// out (+)= left * right, where right's rows are contiguous and read in place; `scratch` holds one panel of `depth`
// rows. `is_padded`: whole vectors may be read at the end of every row.
template <class Left>
void multiply_columns(Left left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows,
                      size_t columns, Epilogue epilogue, float* scratch) {
    for (size_t j = 0; j < columns; j += kPanelColumns) {
        const size_t left_over = columns - j, width = panel_width(left_over);
        if (left_over >= width || !scratch) {
            multiply_rows(left, right + j, right_stride, depth, out, rows, j, left_over, epilogue);
        } else {
            pack_panel(right + j, right_stride, depth, left_over, scratch);
            multiply_rows(left, scratch, width, depth, out, rows, j, left_over, epilogue);
        }
    }
}

// ------------------------------------------------------------------------------------------------- dot products

// The sums over the lanes of four vectors, each as sum_lanes adds them.
EVENSONG_INLINE Floats4 sums_of_four(Floats a, Floats b, Floats c, Floats d) {
    const Square lanes = turn(Ints4(fold_to_four<Floats4>(a)), Ints4(fold_to_four<Floats4>(b)),
                              Ints4(fold_to_four<Floats4>(c)), Ints4(fold_to_four<Floats4>(d)));
    return (Floats4(lanes.line[0]) + Floats4(lanes.line[2])) + (Floats4(lanes.line[1]) + Floats4(lanes.line[3]));
}

// The products of kRows rows of x with kColumns rows of w, all contiguous: tile[row][column], up to a multiple of four.
template <size_t kRows, size_t kColumns>
__attribute__((noinline)) void dot_tile(const float* x, size_t depth, const float* const* w, float* tile) {
    Floats sums[kRows][kColumns] = {};
    size_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        Floats a[kRows];
        EVENSONG_UNROLL
        for (size_t i = 0; i < kRows; ++i) a[i] = load(x + i * depth + k);
        EVENSONG_UNROLL
        for (size_t j = 0; j < kColumns; ++j) {
            const Floats b = load(w[j] + k);
            EVENSONG_UNROLL
            for (size_t i = 0; i < kRows; ++i) sums[i][j] += a[i] * b;
        }
    }
    if (k < depth) {
        EVENSONG_UNROLL
        for (size_t j = 0; j < kColumns; ++j) {
            const Floats b = load_upto(w[j] + k, depth - k);
            EVENSONG_UNROLL
            for (size_t i = 0; i < kRows; ++i) sums[i][j] += load_upto(x + i * depth + k, depth - k) * b;
        }
    }
    const auto sum = [&](size_t n) { return n < kRows * kColumns ? sums[n / kColumns][n % kColumns] : Floats{}; };
    EVENSONG_UNROLL
    for (size_t n = 0; n < kRows * kColumns; n += 4) {
        store_as(tile + n, sums_of_four(sum(n), sum(n + 1), sum(n + 2), sum(n + 3)));
    }
}

template <size_t kRows, size_t kColumns>
void dot_rows(const float* x, size_t depth, const float* const* w, float* out, size_t out_stride, size_t& row,
              size_t rows, size_t columns) {
    for (; row + kRows <= rows; row += kRows) {
        float tile[kRows * kColumns + 3];
        dot_tile<kRows, kColumns>(x + row * depth, depth, w, tile);
        for (size_t i = 0; i < kRows; ++i) {
            float* sums = out + (row + i) * out_stride;
            for (size_t j = 0; j < kColumns && j < columns; ++j) sums[j] = tile[i * kColumns + j];
        }
    }
}

}  // namespace

// ------------------------------------------------------------------------------------------------- the face

void multiply_panel(Rows left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows,
                    size_t out_column, size_t columns, Epilogue epilogue) {
    multiply_rows(left, right, right_stride, depth, out, rows, out_column, columns, epilogue);
}

void multiply_panel(Columns left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows,
                    size_t out_column, size_t columns, Epilogue epilogue) {
    multiply_rows(left, right, right_stride, depth, out, rows, out_column, columns, epilogue);
}

void multiply_packed(Rows left, const float* panels, size_t depth, float* const* out, size_t rows, size_t columns,
                     Epilogue epilogue) {
    for (size_t j = 0; j < columns; j += kPanelColumns) {
        const size_t left_over = columns - j;
        multiply_panel(left, panels + j * depth, panel_width(left_over), depth, out, rows, j, left_over, epilogue);
    }
}

void multiply_in_place(Rows left, const float* right, size_t right_stride, size_t depth, float* const* out, size_t rows,
                       size_t columns, Epilogue epilogue, float* scratch) {
    multiply_columns(left, right, right_stride, depth, out, rows, columns, epilogue, scratch);
}

void multiply_in_place(Columns left, const float* right, size_t right_stride, size_t depth, float* const* out,
                       size_t rows, size_t columns, Epilogue epilogue, float* scratch) {
    multiply_columns(left, right, right_stride, depth, out, rows, columns, epilogue, scratch);
}

void pack_panel(const float* right, size_t right_stride, size_t depth, size_t columns, float* panel) {
    const size_t width = panel_width(columns);
    for (size_t k = 0; k < depth; ++k, right += right_stride, panel += width) {
        for (size_t j = 0; j < width; j += kLanes)
            store(panel + j, j < columns ? load_upto(right + j, columns - j) : Floats{});
    }
}

void pack_panel_transposed(const float* right, size_t stride, size_t depth, size_t columns, float* panel) {
    const size_t width = panel_width(columns), live = columns < width ? columns : width;
    for (size_t k = 0; k < depth; ++k, panel += width) {
        const float* from = right + k;
        for (size_t j = 0; j < live; ++j, from += stride) panel[j] = *from;
        for (size_t j = live; j < width; ++j) panel[j] = 0.0f;
    }
}

void multiply_by_dots(const float* x, const float* w, size_t rows, size_t columns, size_t depth, float* out,
                      const float* bias, int32_t kind) {
    constexpr size_t kColumns = EVENSONG_LANES == 16 ? 5 : 3;
    const size_t step = rows >= 4 ? kColumns : 8;
    for (size_t j = 0; j < columns; j += step) {
        const float* w_rows[8];
        for (size_t c = 0; c < step; ++c) w_rows[c] = w + (j + c < columns ? j + c : columns - 1) * depth;
        size_t row = 0;
        if (step == kColumns) {
            dot_rows<4, kColumns>(x, depth, w_rows, out + j, columns, row, rows, columns - j);
            dot_rows<1, kColumns>(x, depth, w_rows, out + j, columns, row, rows, columns - j);
        } else {
            dot_rows<1, 8>(x, depth, w_rows, out + j, columns, row, rows, columns - j);
        }
    }
    if (!bias && kind == activation::NONE) return;
    for (size_t i = 0; i < rows; ++i, out += columns) {
        for (size_t j = 0; j < columns; j += kLanes) {
            const size_t live = columns - j;
            const Floats sum = load_upto(out + j, live) + (bias ? load_upto(bias + j, live) : Floats{});
            store_upto(out + j, activate(sum, kind), live);
        }
    }
}

void bias_gradient(const float* dy, size_t rows, size_t columns, float* db) {
    sum_columns(rows, columns, 1.0f, db,
                [=](size_t i, size_t j, size_t live) { return load_upto(dy + i * columns + j, live); });
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
