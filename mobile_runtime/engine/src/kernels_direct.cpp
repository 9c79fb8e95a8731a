// The tiles behind direct.hpp.
#include "direct.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// One tile: kTileRows windows times kVectors vectors, for the whole depth, in registers. NaN passes the bounds.
template <size_t kVectors>
__attribute__((noinline)) void window_tile(const float* const* windows, Lines lines, const float* panel,
                                           float* const* out, size_t column, size_t columns, Epilogue epilogue) {
    Floats sums[kTileRows][kVectors];
    EVENSONG_UNROLL
    for (size_t v = 0; v < kVectors; ++v) {
        const size_t from = v * kLanes;
        const Floats bias = epilogue.bias ? load_upto(epilogue.bias + column + from, columns - from) : Floats{};
        EVENSONG_UNROLL
        for (size_t i = 0; i < kTileRows; ++i) sums[i][v] = bias;
    }
    for (size_t line = 0; line < lines.lines; ++line) {
        const float* x[kTileRows];
        EVENSONG_UNROLL
        for (size_t i = 0; i < kTileRows; ++i) x[i] = windows[i] + line * lines.line_stride;
        for (size_t k = 0; k < lines.run; ++k, panel += kVectors * kLanes) {
            Floats b[kVectors];
            EVENSONG_UNROLL
            for (size_t v = 0; v < kVectors; ++v) b[v] = load(panel + v * kLanes);
            EVENSONG_UNROLL
            for (size_t i = 0; i < kTileRows; ++i) {
                const float scalar = x[i][k];
                EVENSONG_UNROLL
                for (size_t v = 0; v < kVectors; ++v) sums[i][v] += scalar * b[v];
            }
        }
    }
    const Floats least = splat(epilogue.activation == activation::NONE ? -__builtin_inff() : 0.0f);
    const Floats most = splat(epilogue.activation == activation::RELU6 ? 6.0f : __builtin_inff());
    // A last panel that is not whole goes to its place through a buffer.
    alignas(64) float buffer[kTileRows][kVectors * kLanes];
    const bool is_whole = columns >= kVectors * kLanes;
    EVENSONG_UNROLL
    for (size_t i = 0; i < kTileRows; ++i) {
        float* row = is_whole ? out[i] + column : buffer[i];
        EVENSONG_UNROLL
        for (size_t v = 0; v < kVectors; ++v) store(row + v * kLanes, minimum(most, maximum(least, sums[i][v])));
    }
    if (is_whole) return;
    for (size_t i = 0; i < kTileRows; ++i) __builtin_memcpy(out[i] + column, buffer[i], columns * sizeof(float));
}

}  // namespace

void multiply_windows(const float** windows, Lines lines, const float* panels, float** out, size_t count,
                      size_t columns, Epilogue epilogue) {
    // Surplus rows of the last tile repeat its last window, and write the same result again.
    for (size_t i = count; i % kTileRows; ++i) windows[i] = windows[count - 1], out[i] = out[count - 1];
    for (size_t j = 0; j < columns; j += kPanelColumns, panels += lines.lines * lines.run * kPanelColumns) {
        const size_t left_over = columns - j;
        for (size_t i = 0; i < count; i += kTileRows) {
            if (left_over > kLanes) {
                window_tile<2>(windows + i, lines, panels, out + i, j, left_over, epilogue);
            } else {
                window_tile<1>(windows + i, lines, panels, out + i, j, left_over, epilogue);
            }
        }
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
