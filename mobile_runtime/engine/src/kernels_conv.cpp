// CONV2D and its gradients, float32, channels last: matrix products over patches; depthwise kernels stand in
// depthwise.hpp.
#include "depthwise.hpp"
#include "direct.hpp"
#include "patches.hpp"
#include "sparse.hpp"

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
    size_t elements() const { return size_t(patches - weights) + patch_elements; }
};

// convolve() below, where patches would be copies though each window could be read in place.
__attribute__((noinline)) void convolve_directly(Band& band, const float* weights, size_t columns, Epilogue epilogue,
                                                 Target target) {
    band.each_block(target, [&](const float** windows, float** out, size_t count) {
        multiply_windows(windows, band.lines(), weights, out, count, columns, epilogue);
    });
}

// target(pixel) = epilogue(patch(pixel) * weights) for all pixels of a grid and `columns` columns of packed weights.
__attribute__((noinline)) void convolve(const Patches& patches, int32_t images, const Blocks& blocks, size_t columns,
                                        Epilogue epilogue, Target target) {
    if (patches.lines_are_contiguous() && !patches.lies_in_source()) {
        Band band(patches, images, blocks.patches, blocks.patch_elements);
        if (band.fits()) return convolve_directly(band, blocks.weights, columns, epilogue, target);
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
        const Patches patches = conv.forward_patches(x, group);
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
    if (conv.is_depthwise()) return depthwise_grad_input(conv, h, w, dy, weights, target, blocks.weights);
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

// The gradient in the input where most of dy is zero: each of its other elements adds rows of w to the lines of its
// window. False, and nothing done, where a product over all elements is faster.
bool grad_input_sparse(const Convolution& conv, const float* dy, const float* w, float* dx, float* memory,
                       size_t room) {
    const size_t outputs = size_t(conv.out_channels), channels = size_t(conv.channels), depth = conv.depth();
    const size_t most = smaller((room - 1) / (2 * outputs + 1), kMostRows), run = size_t(conv.kernel_w) * channels;
    if (conv.groups != 1 || conv.dilation_w != 1 || most == 0) return false;
    const size_t vectors = (run + kLanes - 1) / kLanes, pixels = conv.out_pixels();  // costs are those of a kernel line
    const size_t dense = pixels * outputs * size_t(conv.kernel_w) * ((channels + kLanes - 1) / kLanes);
    const size_t sparse = count_nonzeros(dy, pixels * outputs) * (vectors + 2) + pixels * (2 * vectors + 32);
    if (sparse > dense) return false;

    clear_floats(dx, size_t(conv.images) * size_t(conv.height) * size_t(conv.width) * channels);
    TermLists terms(memory, room, most);
    for (size_t first = 0; first < pixels; first += most) {
        const size_t count = smaller(pixels - first, most);
        const float* rows[kMostRows];
        for (size_t i = 0; i < count; ++i) rows[i] = dy + (first + i) * outputs;
        terms.by_row(rows, count, outputs, depth);
        for (int32_t line = 0; line < conv.kernel_h; ++line) {  // outside: one line of w stays in the cache
            for (size_t i = 0; i < count; ++i) {
                const int32_t pixel = int32_t(first + i), out_line = pixel / conv.out_width;
                const int32_t y = out_line % conv.out_height * conv.stride_h - conv.pad_top + line * conv.dilation_h;
                const int32_t x = pixel % conv.out_width * conv.stride_w - conv.pad_left;
                const int32_t begin = x < 0 ? -x : 0, end = smaller(conv.kernel_w, conv.width - x);
                if (y < 0 || y >= conv.height || begin >= end) continue;
                const size_t image_line = size_t(out_line / conv.out_height) * size_t(conv.height) + size_t(y);
                add_terms(terms.list(i), w + size_t(line) * run + size_t(begin) * channels,
                          dx + (image_line * size_t(conv.width) + size_t(x + begin)) * channels,
                          size_t(end - begin) * channels, true, 1.0f);
            }
        }
    }
    return true;
}

Fault convolution_grad_input(const Call& call) {
    const Operand &dy = call.in[0], &w = call.in[1], &dx = call.out[0];
    const Convolution conv(dx, w, dy, call.attr);
    // Sized for the phase with the most taps.
    const size_t taps = workspace::phase_taps(size_t(conv.kernel_h), size_t(conv.stride_h), size_t(conv.dilation_h)) *
                        workspace::phase_taps(size_t(conv.kernel_w), size_t(conv.stride_w), size_t(conv.dilation_w));
    const Blocks blocks(call.workspace, taps * size_t(conv.group_out_channels()), size_t(conv.group_channels),
                        dx.elements / dx.last());
    if (!kIsSmall && !conv.is_depthwise() &&
        grad_input_sparse(conv, dy.f32(), w.f32(), dx.f32_mut(), blocks.weights, blocks.elements()))
        return Fault::kNone;
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

}  // namespace

void register_conv(Kernel* table);
void register_conv(Kernel* table) {
    table[op::CONV2D] = convolution;
    table[op::CONV2D_GRAD_INPUT] = convolution_grad_input;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
