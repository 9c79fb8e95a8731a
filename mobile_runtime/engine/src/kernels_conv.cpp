// CONV2D and its gradients, float32, channels last: matrix products over patches; depthwise kernels stand in
// depthwise.hpp.
#include "depthwise.hpp"
#include "direct.hpp"
#include "patches.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

template <class Number>
EVENSONG_INLINE Number smaller(Number a, Number b) {
    return a < b ? a : b;
}

// The workspace of a product: packed weights, then a block of patches. workspace.hpp bounds both.
struct Blocks {
    float *weights, *patches;
    size_t weight_columns, patch_rows, patch_elements;

    Blocks(char* workspace, size_t depth, size_t columns, size_t pixels)
        : weights(reinterpret_cast<float*>(workspace)),
          weight_columns(size_t(workspace::weight_columns(depth, columns))),
          patch_rows(size_t(workspace::patch_rows(depth, pixels))),
          patch_elements(size_t(workspace::patch_elements(depth, pixels))) {
        patches = weights + workspace::round_up(depth * weight_columns, 64);
    }
};

// convolve() below, where patches would be copies though each window could be read in place.
__attribute__((noinline)) void convolve_directly(Band& band, const Patches& patches, int32_t images,
                                                 const float* weights, size_t columns, Epilogue epilogue,
                                                 Target target) {
    constexpr size_t kMost = kMostRows / kTileRows * kTileRows;
    const float* windows[kMost];
    float* out[kMost];
    for (int32_t image = 0; image < images; image += band.images()) {
        const int32_t band_images = smaller(images - image, band.images());
        for (int32_t row = 0; row < patches.h.grid; row += band.rows()) {
            const int32_t band_rows = smaller(patches.h.grid - row, band.rows());
            band.fill(image, band_images, row, band_rows);
            size_t count = 0;
            for (int32_t line = 0; line < band_images * band_rows; ++line) {
                const int32_t i = line / band_rows, r = line % band_rows;
                const float* window = band.window(i, r);
                float* place = target.at(image + i, row + r, 0);
                for (int32_t column = 0; column < patches.w.grid; ++column) {
                    windows[count] = window;
                    out[count] = place;
                    window += band.step();
                    place += target.column_stride;
                    if (++count < kMost) continue;
                    multiply_windows(windows, band.lines(), weights, out, count, columns, epilogue);
                    count = 0;
                }
            }
            if (count) multiply_windows(windows, band.lines(), weights, out, count, columns, epilogue);
        }
    }
}

// target(pixel) = epilogue(patch(pixel) * weights) for all pixels of a grid and `columns` columns of packed weights.
__attribute__((noinline)) void convolve(const Patches& patches, int32_t images, const Blocks& blocks, size_t columns,
                                        Epilogue epilogue, Target target) {
    if (patches.lines_are_contiguous() && !patches.lies_in_source()) {
        Band band(patches, images, blocks.patches, blocks.patch_elements);
        if (band.fits()) return convolve_directly(band, patches, images, blocks.weights, columns, epilogue, target);
    }
    const size_t pixels = size_t(images) * size_t(patches.h.grid) * size_t(patches.w.grid);
    for (size_t pixel = 0; pixel < pixels; pixel += blocks.patch_rows) {
        const size_t count = smaller(pixels - pixel, blocks.patch_rows);
        const float* rows[kMostRows];
        float* out[kMostRows];
        patches.rows(pixel, count, blocks.patches, false, target, rows, out);
        multiply_packed(Rows{rows}, blocks.weights, patches.depth(), out, count, columns, epilogue);
    }
}

Fault convolution(const Call& call) {
    const Operand &x = call.in[0], &w = call.in[1], &y = call.out[0];
    const Convolution conv(x, w, y, call.attr);
    const float* bias = call.inputs > 2 ? call.in[2].f32() : nullptr;
    const int32_t kind = call.attr[7].i;
    if (conv.is_depthwise()) {
        depthwise_forward(conv, x.f32(), w.f32(), {bias, kind, false}, y.f32_mut(),
                          reinterpret_cast<float*>(call.workspace));
        return Fault::kNone;
    }
    const size_t depth = conv.depth(), columns = size_t(conv.group_out_channels()), pixels = conv.out_pixels();
    const Blocks blocks(call.workspace, depth, columns, pixels);
    for (size_t group = 0; group < size_t(conv.groups); ++group) {
        const Patches patches = {conv.forward_h(),
                                 conv.forward_w(),
                                 x.f32() + group * size_t(conv.group_channels),
                                 size_t(conv.channels),
                                 size_t(conv.group_channels),
                                 x.f32() + x.elements};
        for (size_t first = 0; first < columns; first += blocks.weight_columns) {
            const size_t width = smaller(columns - first, blocks.weight_columns), channel = group * columns + first;
            for (size_t j = 0; j < width; j += kPanelColumns) {
                pack_panel_transposed(w.f32() + (channel + j) * depth, depth, depth, smaller(width - j, kPanelColumns),
                                      blocks.weights + j * depth);
            }
            const Epilogue epilogue = {bias ? bias + channel : nullptr, kind, false};
            convolve(patches, conv.images, blocks, width, epilogue, conv.out_target(y.f32_mut() + channel));
        }
    }
    return Fault::kNone;
}

// Packs the weights of one phase as seen from the input: row (tap h, tap w, output channel) is w[output channel, taps,
// :].
__attribute__((noinline)) void pack_backward(const Convolution& conv, const Axis& h, const Axis& w,
                                             const float* weights, size_t columns, float* panels) {
    const size_t outputs = size_t(conv.group_out_channels()), depth = size_t(h.taps) * size_t(w.taps) * outputs;
    for (size_t j = 0; j < columns; j += kPanelColumns) {
        float* out = panels + j * depth;
        const size_t live = smaller(columns - j, kPanelColumns);
        for (int32_t tap = 0; tap < h.taps * w.taps; ++tap) {
            const size_t row = size_t(h.kernel_first + tap / w.taps * h.kernel_step);
            const size_t column = size_t(w.kernel_first + tap % w.taps * w.kernel_step);
            const float* from = weights + (row * size_t(conv.kernel_w) + column) * size_t(conv.group_channels) + j;
            pack_panel(from, conv.depth(), outputs, live, out);
            out += outputs * panel_width(live);
        }
    }
}

__attribute__((noinline)) void clear_grid(const Axis& h, const Axis& w, int32_t images, size_t columns, Target target) {
    for (int32_t image = 0; image < images; ++image) {
        for (int32_t row = 0; row < h.grid; ++row) {
            for (int32_t column = 0; column < w.grid; ++column) {
                __builtin_memset(target.at(image, row, column), 0, columns * sizeof(float));
            }
        }
    }
}

__attribute__((noinline)) void grad_input_phase(const Convolution& conv, const Axis& h, const Axis& w, const float* dy,
                                                const float* weights, Target target, const Blocks& blocks) {
    const size_t columns = size_t(conv.group_channels), outputs = size_t(conv.group_out_channels());
    if (h.taps == 0 || w.taps == 0)
        return clear_grid(h, w, conv.images, size_t(conv.channels), target);  // no tap meets them
    for (size_t group = 0; group < size_t(conv.groups); ++group) {
        const Patches patches = {h,
                                 w,
                                 dy + group * outputs,
                                 size_t(conv.out_channels),
                                 outputs,
                                 dy + conv.out_pixels() * size_t(conv.out_channels)};
        for (size_t first = 0; first < columns; first += blocks.weight_columns) {
            const size_t width = smaller(columns - first, blocks.weight_columns);
            pack_backward(conv, h, w, weights + group * outputs * conv.depth() + first, width, blocks.weights);
            Target here = target;
            here.base += group * columns + first;
            convolve(patches, conv.images, blocks, width, Epilogue(), here);
        }
    }
}

Fault convolution_grad_input(const Call& call) {
    const Operand &dy = call.in[0], &w = call.in[1], &dx = call.out[0];
    const Convolution conv(dx, w, dy, call.attr);
    if (conv.is_depthwise()) {
        depthwise_grad_input(conv, dy.f32(), w.f32(), dx.f32_mut(), reinterpret_cast<float*>(call.workspace));
        return Fault::kNone;
    }
    // Sized for the phase with the most taps.
    const size_t taps = workspace::phase_taps(size_t(conv.kernel_h), size_t(conv.stride_h), size_t(conv.dilation_h)) *
                        workspace::phase_taps(size_t(conv.kernel_w), size_t(conv.stride_w), size_t(conv.dilation_w));
    const Blocks blocks(call.workspace, taps * size_t(conv.group_out_channels()), size_t(conv.group_channels),
                        dx.elements / dx.last());
    for (int32_t a = 0; a < conv.stride_h && a < conv.height; ++a) {
        const Axis h =
            backward_axis(conv.height, conv.out_height, conv.kernel_h, conv.stride_h, conv.pad_top, conv.dilation_h, a);
        for (int32_t b = 0; b < conv.stride_w && b < conv.width; ++b) {
            const Axis v = backward_axis(conv.width, conv.out_width, conv.kernel_w, conv.stride_w, conv.pad_left,
                                         conv.dilation_w, b);
            grad_input_phase(conv, h, v, dy.f32(), w.f32(), conv.phase_target(dx.f32_mut(), a, b), blocks);
        }
    }
    return Fault::kNone;
}

Fault convolution_grad_weight(const Call& call) {
    const Operand &dy = call.in[0], &x = call.in[1], &dw = call.out[0];
    const Convolution conv(x, dw, dy, call.attr);
    float* block = reinterpret_cast<float*>(call.workspace);
    const size_t depth = conv.depth(), out_columns = size_t(conv.group_out_channels()), pixels = conv.out_pixels();
    if (conv.is_depthwise()) {
        depthwise_grad_weight(conv, dy.f32(), x.f32(), dw.f32_mut(), block);
    } else {
        const size_t stride = size_t(workspace::patch_stride(depth)),
                     most = size_t(workspace::patch_rows(depth, pixels));
        for (size_t group = 0; group < size_t(conv.groups); ++group) {
            const Patches patches = {conv.forward_h(),
                                     conv.forward_w(),
                                     x.f32() + group * size_t(conv.group_channels),
                                     size_t(conv.channels),
                                     size_t(conv.group_channels),
                                     x.f32() + x.elements};
            for (size_t pixel = 0; pixel < pixels; pixel += most) {
                const size_t count = smaller(pixels - pixel, most);
                const float* rows[kMostRows];
                float* unused[kMostRows];
                patches.rows(pixel, count, block, true, Target(), rows, unused);
                Epilogue epilogue;
                epilogue.accumulate = pixel > 0;
                for (size_t first = 0; first < out_columns; first += kMostRows) {
                    const size_t channels = smaller(out_columns - first, kMostRows);
                    float* out[kMostRows];
                    for (size_t i = 0; i < channels; ++i)
                        out[i] = dw.f32_mut() + (group * out_columns + first + i) * depth;
                    const Columns left = {dy.f32() + pixel * size_t(conv.out_channels) + group * out_columns + first,
                                          size_t(conv.out_channels)};
                    multiply_in_place(left, block, stride, count, out, channels, depth, epilogue, nullptr);
                }
            }
        }
    }
    if (call.outputs > 1) bias_gradient(dy.f32(), pixels, size_t(conv.out_channels), call.out[1].f32_mut());
    return Fault::kNone;
}

}  // namespace

void register_conv(Kernel* table);
void register_conv(Kernel* table) {
    table[op::CONV2D] = convolution;
    table[op::CONV2D_GRAD_INPUT] = convolution_grad_input;
    table[op::CONV2D_GRAD_WEIGHT] = convolution_grad_weight;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
