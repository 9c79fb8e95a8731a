// Depthwise convolution: every channel has its own kernel, so vectors run over channels and there is no matrix product.
#pragma once

#include "patches.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// packed[tap, channel] = w[channel, tap]
__attribute__((noinline)) inline void pack_depthwise(const float* w, size_t channels, size_t taps, float* packed) {
    for (size_t tap = 0; tap < taps; ++tap) {
        for (size_t c = 0; c < channels; ++c) packed[tap * channels + c] = w[c * taps + tap];
    }
}

// Taps [begin, end) of one grid position fall inside the source.
inline void live_taps(const Axis& axis, int32_t position, int32_t* begin, int32_t* end) {
    const int32_t origin = position * axis.step + axis.first;
    *begin = origin >= 0 ? 0 : (axis.delta - 1 - origin) / axis.delta;
    *end = origin >= axis.source ? 0 : (axis.source - 1 - origin) / axis.delta + 1;
    if (*end > axis.taps) *end = axis.taps;
}

// target(image, row, column)[c] = epilogue(sum over live taps of source * packed) for every position of the grid.
__attribute__((noinline)) inline void depthwise_grid(const Axis& h, const Axis& w, int32_t images, size_t channels,
                                                     size_t kernel_w, const float* source, const float* packed,
                                                     Epilogue epilogue, Target target) {
    for (int32_t image = 0; image < images; ++image) {
        for (int32_t row = 0; row < h.grid; ++row) {
            int32_t top, bottom;
            live_taps(h, row, &top, &bottom);
            for (int32_t column = 0; column < w.grid; ++column) {
                int32_t left, right;
                live_taps(w, column, &left, &right);
                float* out = target.at(image, row, column);
                for (size_t c = 0; c < channels; c += kLanes) {
                    const size_t live = channels - c;
                    Floats sum = epilogue.bias ? load_upto(epilogue.bias + c, live) : Floats{};
                    for (int32_t i = top; i < bottom; ++i) {
                        const size_t y =
                            size_t(image) * size_t(h.source) + size_t(row * h.step + h.first + i * h.delta);
                        const size_t tap_row = size_t(h.kernel_first + i * h.kernel_step) * kernel_w;
                        for (int32_t j = left; j < right; ++j) {
                            const size_t x = size_t(column * w.step + w.first + j * w.delta);
                            const size_t tap = tap_row + size_t(w.kernel_first + j * w.kernel_step);
                            sum += load_upto(source + (y * size_t(w.source) + x) * channels + c, live) *
                                   load_upto(packed + tap * channels + c, live);
                        }
                    }
                    store_upto(out + c, activate(sum, epilogue.activation), live);
                }
            }
        }
    }
}

inline void depthwise_forward(const Convolution& conv, const float* x, const float* w, Epilogue epilogue, float* y,
                              float* packed) {
    const size_t channels = size_t(conv.channels);
    pack_depthwise(w, channels, conv.depth(), packed);
    depthwise_grid(conv.forward_h(), conv.forward_w(), conv.images, channels, size_t(conv.kernel_w), x, packed,
                   epilogue, conv.out_target(y));
}

__attribute__((noinline)) inline void depthwise_grad_input(const Convolution& conv, const float* dy, const float* w,
                                                           float* dx, float* packed) {
    const size_t channels = size_t(conv.channels);
    pack_depthwise(w, channels, conv.depth(), packed);
    for (int32_t a = 0; a < conv.stride_h && a < conv.height; ++a) {
        const Axis h =
            backward_axis(conv.height, conv.out_height, conv.kernel_h, conv.stride_h, conv.pad_top, conv.dilation_h, a);
        for (int32_t b = 0; b < conv.stride_w && b < conv.width; ++b) {
            const Axis v = backward_axis(conv.width, conv.out_width, conv.kernel_w, conv.stride_w, conv.pad_left,
                                         conv.dilation_w, b);
            depthwise_grid(h, v, conv.images, channels, size_t(conv.kernel_w), dy, packed, Epilogue(),
                           conv.phase_target(dx, a, b));
        }
    }
}

// dw[c, tap] = sum over grid positions of dy[c] * x[tap, c]; `sums` holds [tap, c] meanwhile.
inline void depthwise_grad_weight(const Convolution& conv, const float* dy, const float* x, float* dw, float* sums) {
    const size_t channels = size_t(conv.channels), taps = conv.depth();
    const Axis h = conv.forward_h(), w = conv.forward_w();
    for (size_t i = 0; i < taps * channels; ++i) sums[i] = 0;
    for (int32_t line = 0; line < conv.images * h.grid; ++line, dy += size_t(w.grid) * channels) {
        const int32_t image = line / h.grid, row = line % h.grid;
        for (int32_t tap = 0; tap < int32_t(taps); ++tap) {
            const int32_t source_y = row * h.step + h.first + tap / w.taps * h.delta;
            if (source_y < 0 || source_y >= h.source) continue;
            const int32_t origin = w.first + tap % w.taps * w.delta;  // source position of grid column 0
            const int32_t begin = origin >= 0 ? 0 : (w.step - 1 - origin) / w.step;
            const int32_t inside = origin >= w.source ? 0 : (w.source - 1 - origin) / w.step + 1;
            const int32_t end = inside < w.grid ? inside : w.grid;
            const float* from = x + (size_t(image) * size_t(h.source) + size_t(source_y)) * size_t(w.source) * channels;
            for (size_t c = 0; c < channels; c += kLanes) {
                const size_t live = channels - c;
                float* out = sums + size_t(tap) * channels + c;
                Floats sum = load_upto(out, live);
                for (int32_t column = begin; column < end; ++column) {
                    sum += load_upto(dy + size_t(column) * channels + c, live) *
                           load_upto(from + size_t(column * w.step + origin) * channels + c, live);
                }
                store_upto(out, sum, live);
            }
        }
    }
    for (size_t c = 0; c < channels; ++c) {
        for (size_t tap = 0; tap < taps; ++tap) dw[c * taps + tap] = sums[tap * channels + c];
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
