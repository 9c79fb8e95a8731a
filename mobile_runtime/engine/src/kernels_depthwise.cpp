// The kernels behind depthwise.hpp. Windows are read where they lie in a Band (direct.hpp), a few pixels at a time, so
// that a weight is loaded once for all of them.
#include "depthwise.hpp"
#include "direct.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

constexpr size_t kPixels = 4;     // of one tile
constexpr size_t kGradients = 9;  // taps whose gradients are summed up at once: a 3x3 kernel
constexpr size_t kBlock = 64;     // pixels whose windows stay in the first-level cache meanwhile

// The taps of a grid: how many, and where each lies in a window.
struct Taps {
    size_t count, channels;
    const uint32_t* offsets;
};

// A vector of channels, or with kWhole = false the last few of them.
template <bool kWhole>
EVENSONG_INLINE Floats load_channels(const float* p, size_t live) {
    return kWhole ? load(p) : load_upto(p, live);
}

// out[p][0..live) = epilogue(sum over taps of w[tap * channels] * windows[p][offset of tap]) for kPixels pixels.
template <bool kWhole>
EVENSONG_INLINE void depthwise_vector(const float* const* x, const Taps& taps, const float* w, size_t c, size_t live,
                                      const Epilogue& epilogue, float* const* out) {
    const size_t channels = taps.channels, count = taps.count;
    const uint32_t* offsets = taps.offsets;
    Floats sums[kPixels];
    const Floats bias = epilogue.bias ? load_channels<kWhole>(epilogue.bias + c, live) : Floats{};
    EVENSONG_UNROLL
    for (size_t p = 0; p < kPixels; ++p) sums[p] = bias;
    w += c;
    for (size_t t = 0; t < count; ++t, w += channels) {
        const Floats weight = load_channels<kWhole>(w, live);
        const size_t at = offsets[t] + c;
        EVENSONG_UNROLL
        for (size_t p = 0; p < kPixels; ++p) sums[p] += weight * load_channels<kWhole>(x[p] + at, live);
    }
    EVENSONG_UNROLL
    for (size_t p = 0; p < kPixels; ++p) store_upto(out[p] + c, activate(sums[p], epilogue.activation), live);
}

__attribute__((noinline)) void depthwise_tile(const float* const* windows, const Taps& taps, const float* packed,
                                              const Epilogue& epilogue, float* const* out) {
    const size_t channels = taps.channels;
    const float* x[kPixels];
    EVENSONG_UNROLL
    for (size_t p = 0; p < kPixels; ++p) x[p] = windows[p];
    size_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) depthwise_vector<true>(x, taps, packed, c, kLanes, epilogue, out);
    if (c < channels) depthwise_vector<false>(x, taps, packed, c, channels - c, epilogue, out);
}

// sums[tap * channels] += sum over windows of row[c] * window[offset of tap + c], for up to kGradients taps.
template <bool kWhole>
EVENSONG_INLINE void gradient_vector(const float* const* windows, const float* const* rows, size_t count,
                                     const uint32_t* offsets, size_t live_taps, size_t channels, size_t c, size_t live,
                                     float* sums) {
    Floats totals[kGradients] = {};
    for (size_t i = 0; i < count; ++i) {
        const Floats gradient = load_channels<kWhole>(rows[i] + c, live);
        const float* window = windows[i] + c;
        EVENSONG_UNROLL
        for (size_t t = 0; t < kGradients; ++t) {
            totals[t] += gradient * load_channels<kWhole>(window + offsets[t], live);
        }
    }
    sums += c;
    EVENSONG_UNROLL
    for (size_t t = 0; t < kGradients; ++t, sums += channels) {
        if (t < live_taps) store_upto(sums, load_channels<kWhole>(sums, live) + totals[t], live);
    }
}

__attribute__((noinline)) void gradient_tile(const float* const* windows, const float* const* rows, size_t count,
                                             const uint32_t* offsets, size_t live_taps, size_t channels, float* sums) {
    size_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
        gradient_vector<true>(windows, rows, count, offsets, live_taps, channels, c, kLanes, sums);
    }
    if (c == channels) return;
    gradient_vector<false>(windows, rows, count, offsets, live_taps, channels, c, channels - c, sums);
}

// One grid of a depthwise convolution, and how it divides the memory: tap offsets, packed weights or sums, the band.
struct Grid {
    Patches patches;
    size_t channels, count;  // of taps
    uint32_t* offsets;
    float* weights;
    Band band;

    Grid(const Convolution& conv, const Axis& h, const Axis& w, const float* source, float* memory)
        : patches{h, w, source, size_t(conv.channels), size_t(conv.channels), nullptr},
          channels(size_t(conv.channels)),
          count(size_t(h.taps) * size_t(w.taps)),
          offsets(reinterpret_cast<uint32_t*>(memory)),
          weights(memory + workspace::round_up(count, 16)),
          band(patches, conv.images, weights + workspace::round_up(count * channels, 16),
               size_t(workspace::depthwise_band(uint64_t(conv.images), channels, h.of_grid(), w.of_grid()))) {
        for (size_t t = 0; t < count; ++t) {
            const size_t line = t / size_t(w.taps), tap = t % size_t(w.taps);
            offsets[t] = uint32_t(line * band.line_stride() + tap * band.tap_stride());
        }
    }
    Grid(const Grid&) = delete;  // the band refers to the patches

    // weights[tap, channel] = w[channel, place of the tap in the kernel]
    void pack(const float* w, int32_t kernel_h, int32_t kernel_w) {
        const size_t places = size_t(kernel_h) * size_t(kernel_w);
        float* out = weights;
        for (int32_t i = 0; i < patches.h.taps; ++i) {
            for (int32_t j = 0; j < patches.w.taps; ++j) {
                const float* from = w + size_t((patches.h.kernel_first + i * patches.h.kernel_step) * kernel_w +
                                               patches.w.kernel_first + j * patches.w.kernel_step);
                for (size_t c = 0; c < channels; ++c) *out++ = from[c * places];
            }
        }
    }

    __attribute__((noinline)) void convolve(const Epilogue& epilogue, const Target& target) {
        band.each_block(target, [&](const float** windows, float** out, size_t pixels) {
            // Surplus pixels of the last tile repeat its last one, and write the same result again.
            for (size_t i = pixels; i % kPixels; ++i) windows[i] = windows[pixels - 1], out[i] = out[pixels - 1];
            for (size_t i = 0; i < pixels; i += kPixels) {
                depthwise_tile(windows + i, {count, channels, offsets}, weights, epilogue, out + i);
            }
        });
    }
};

}  // namespace

void depthwise_forward(const Convolution& conv, const float* x, const float* w, Epilogue epilogue, float* y,
                       float* memory) {
    Grid grid(conv, conv.forward_h(), conv.forward_w(), x, memory);
    grid.pack(w, conv.kernel_h, conv.kernel_w);
    grid.convolve(epilogue, conv.out_target(y));
}

void depthwise_grad_input(const Convolution& conv, const Axis& h, const Axis& w, const float* dy, const float* weights,
                          const Target& target, float* memory) {
    Grid grid(conv, h, w, dy, memory);
    grid.pack(weights, conv.kernel_h, conv.kernel_w);
    grid.convolve(Epilogue(), target);
}

void depthwise_grad_weight(const Convolution& conv, const float* dy, const float* x, float* dw, float* memory) {
    Grid grid(conv, conv.forward_h(), conv.forward_w(), x, memory);
    const size_t channels = grid.channels, taps = grid.count;
    clear_floats(grid.weights, taps * channels);
    // The rows of dy are only read; a Target says where they lie.
    grid.band.each_block(conv.out_target(const_cast<float*>(dy)),
                         [&](const float** windows, float** rows, size_t pixels) {
                             for (size_t i = 0; i < pixels; i += kBlock) {
                                 for (size_t t = 0; t < taps; t += kGradients) {
                                     uint32_t offsets[kGradients];  // a last group that is not whole repeats a tap
                                     for (size_t k = 0; k < kGradients; ++k) {
                                         offsets[k] = grid.offsets[t + k < taps ? t + k : taps - 1];
                                     }
                                     gradient_tile(windows + i, rows + i, pixels - i < kBlock ? pixels - i : kBlock,
                                                   offsets, taps - t, channels, grid.weights + t * channels);
                                 }
                             }
                         });
    for (size_t c = 0; c < channels; ++c) {
        for (size_t t = 0; t < taps; ++t) dw[c * taps + t] = grid.weights[t * channels + c];
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
