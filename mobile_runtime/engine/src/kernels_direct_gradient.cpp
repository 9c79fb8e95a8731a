// Gradients of weights from windows that are read where they lie: add_gradients() of direct.hpp.
#include "direct.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

EVENSONG_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// sums[t][j] = sum over windows of window[taps[t]] * row[channel + j], for `live` of the channels.
template <size_t kTaps, size_t kVectors>
__attribute__((noinline)) void gradient_tile(const float* const* windows, const float* const* rows, size_t count,
                                             const uint32_t* taps, size_t channel, size_t live, float* sums_out) {
    Floats sums[kTaps][kVectors] = {};
    for (size_t i = 0; i < count; ++i) {
        const float* window = windows[i];
        const float* row = rows[i] + channel;
        Floats b[kVectors];
        EVENSONG_UNROLL
        for (size_t v = 0; v < kVectors; ++v) b[v] = kVectors == 1 ? load_upto(row, live) : load(row + v * kLanes);
        EVENSONG_UNROLL
        for (size_t t = 0; t < kTaps; ++t) {
            const float scalar = window[taps[t]];
            EVENSONG_UNROLL
            for (size_t v = 0; v < kVectors; ++v) sums[t][v] += scalar * b[v];
        }
    }
    EVENSONG_UNROLL
    for (size_t t = 0; t < kTaps; ++t) {
        EVENSONG_UNROLL
        for (size_t v = 0; v < kVectors; ++v) store(sums_out + (t * kVectors + v) * kLanes, sums[t][v]);
    }
}

struct Tile {
    size_t taps;
    void (*add[2])(const float* const* windows, const float* const* rows, size_t count, const uint32_t* taps,
                   size_t channel, size_t live, float* sums_out);
};
template <size_t kTaps>
constexpr Tile tile_of() {
    return {kTaps, {gradient_tile<kTaps, 1>, gradient_tile<kTaps, 2>}};
}
constexpr Tile kTiles[] = {tile_of<kTileRows>(), tile_of<kTileRows / 3 * 2>(), tile_of<kTileRows / 3>()};

}  // namespace

void add_gradients(const WindowBlock& block, float* dw) {
    const size_t depth = block.depth();
    for (size_t tap = 0; tap < depth;) {
        const size_t taps_left = depth - tap;
        const Tile* tile = kTiles;
        while (tile != kTiles + 2 && tile[1].taps >= taps_left) ++tile;
        uint32_t taps[kTileRows];  // a tile that is too high repeats the last tap
        for (size_t t = 0; t < tile->taps; ++t) {
            const size_t k = tap + smaller(t, taps_left - 1);
            taps[t] = uint32_t(k / block.lines.run * block.lines.line_stride + k % block.lines.run);
        }
        const size_t live_taps = smaller(tile->taps, taps_left);
        for (size_t channel = 0; channel < block.channels;) {
            const size_t left = block.channels - channel, vectors = left >= kPanelColumns ? 2 : 1;
            const size_t width = vectors * kLanes, live = smaller(left, width);
            alignas(64) float sums[kTileRows * kPanelColumns];
            tile->add[vectors - 1](block.windows, block.rows, block.count, taps, channel, live, sums);
            for (size_t j = 0; j < live; ++j) {
                float* out = dw + (channel + j) * depth + tap;
                for (size_t t = 0; t < live_taps; ++t) out[t] += sums[t * width + j];
            }
            channel += width;
        }
        tap += live_taps;
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
