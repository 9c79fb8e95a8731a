// CONV2D and its gradients, float32, channels last: matrix products over patches; depthwise kernels stand in depthwise.hpp.
#include "depthwise.hpp"
#include "patches.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

EVENSONG_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// The workspace of a product: packed weights, then a block of patches. workspace.hpp bounds both.
struct Blocks {
    float *weights, *patches;
    size_t weight_columns, patch_rows;

    Blocks(char* workspace, size_t depth, size_t columns, size_t pixels)
        : weights(reinterpret_cast<float*>(workspace)),
          weight_columns(size_t(workspace::weight_columns(depth, columns))),
          patch_rows(size_t(workspace::patch_rows(depth, pixels))) {
        patches = weights + workspace::round_up(depth * weight_columns, 64);
    }
};

// out(pixel) = epilogue(patch(pixel) * weights) for all pixels of a grid and `columns` columns.
// pack(first column, columns, panels) packs weights; out_row(pixel) is where a pixel's result starts.
template <class Pack, class OutRow>
EVENSONG_INLINE void convolve(const Patches& patches, size_t pixels, size_t columns, const Blocks& blocks, Epilogue epilogue, Pack pack,
                              OutRow out_row) {
    const size_t depth = patches.depth();
    for (size_t j = 0; j < columns; j += blocks.weight_columns) {
        const size_t width = smaller(columns - j, blocks.weight_columns);
        pack(j, width, blocks.weights);
        Epilogue here = epilogue;
        if (here.bias) here.bias += j;
        for (size_t pixel = 0; pixel < pixels; pixel += blocks.patch_rows) {
            const size_t count = smaller(pixels - pixel, blocks.patch_rows);
            const float* rows[kMostRows];
            float* out[kMostRows];
            patches.rows(pixel, count, blocks.patches, rows);
            for (size_t i = 0; i < count; ++i) out[i] = out_row(pixel + i) + j;
            multiply_packed(Rows{rows}, blocks.weights, depth, out, count, width, here);
        }
    }
}

Fault convolution(const Call& call) {
    const Operand &x = call.in[0], &w = call.in[1], &y = call.out[0];
    const Convolution conv(x, w, y, call.attr);
    const float* bias = call.inputs > 2 ? call.in[2].f32() : nullptr;
    const int32_t kind = call.attr[7].i;
    if (conv.is_depthwise()) {
        depthwise_forward(conv, x.f32(), w.f32(), {bias, kind, false}, y.f32_mut(), reinterpret_cast<float*>(call.workspace));
        return Fault::kNone;
    }
    const size_t depth = conv.depth(), columns = size_t(conv.group_out_channels()), pixels = conv.out_pixels();
    const Blocks blocks(call.workspace, depth, columns, pixels);
    for (size_t group = 0; group < size_t(conv.groups); ++group) {
        const Patches patches = {conv.forward_h(), conv.forward_w(), x.f32() + group * size_t(conv.group_channels),
                                 size_t(conv.channels), size_t(conv.group_channels)};
        const float* weights = w.f32() + group * columns * depth;
        Epilogue epilogue;
        epilogue.bias = bias ? bias + group * columns : nullptr;
        epilogue.activation = kind;
        convolve(
            patches, pixels, columns, blocks, epilogue,
            [&](size_t first, size_t width, float* panels) {
                for (size_t j = 0; j < width; j += kPanelColumns) {
                    pack_panel_transposed(weights + (first + j) * depth, depth, depth, smaller(width - j, kPanelColumns), panels + j * depth);
                }
            },
            [&](size_t pixel) { return y.f32_mut() + pixel * size_t(conv.out_channels) + group * columns; });
    }
    return Fault::kNone;
}

// Row (tap h, tap w, output channel) of the weights of one phase, as seen from the input: w[out, tap h, tap w, :].
struct BackwardWeights {
    const Convolution& conv;
    const Axis &h, &w;
    const float* data;  // of the group

    void pack(size_t first, size_t width, float* panels) const {
        const size_t depth = size_t(h.taps) * size_t(w.taps) * size_t(conv.group_out_channels());
        for (size_t j = 0; j < width; j += kPanelColumns, panels += kPanelColumns * depth) {
            const size_t live = smaller(width - j, kPanelColumns);
            float* out = panels;
            for (int32_t th = 0; th < h.taps; ++th) {
                for (int32_t tw = 0; tw < w.taps; ++tw) {
                    const size_t tap = size_t(h.kernel_first + th * h.kernel_step) * size_t(conv.kernel_w) +
                                       size_t(w.kernel_first + tw * w.kernel_step);
                    const float* from = data + tap * size_t(conv.group_channels) + first + j;
                    pack_panel(from, conv.depth(), size_t(conv.group_out_channels()), live, out);
                    out += size_t(conv.group_out_channels()) * panel_width(live);
                }
            }
        }
    }
};

void grad_input_phase(const Convolution& conv, const Axis& h, const Axis& w, int32_t phase_h, int32_t phase_w, const float* dy,
                      const float* weights, float* dx, const Blocks& blocks) {
    const size_t columns = size_t(conv.group_channels), out_columns = size_t(conv.group_out_channels());
    const size_t pixels = size_t(conv.images) * size_t(h.grid) * size_t(w.grid);
    for (size_t group = 0; group < size_t(conv.groups); ++group) {
        const Patches patches = {h, w, dy + group * out_columns, size_t(conv.out_channels), out_columns};
        auto out_row = [&](size_t pixel) {
            int32_t image, row, column;
            patches.locate(pixel, &image, &row, &column);
            const size_t y = size_t(phase_h + row * conv.stride_h), x = size_t(phase_w + column * conv.stride_w);
            return dx + ((size_t(image) * size_t(conv.height) + y) * size_t(conv.width) + x) * size_t(conv.channels) + group * columns;
        };
        if (patches.depth() == 0) {  // no tap of the kernel meets these pixels
            for (size_t pixel = 0; pixel < pixels; ++pixel) __builtin_memset(out_row(pixel), 0, columns * sizeof(float));
            continue;
        }
        const BackwardWeights packed = {conv, h, w, weights + group * out_columns * conv.depth()};
        convolve(
            patches, pixels, columns, blocks, Epilogue(),
            [&](size_t first, size_t width, float* panels) { packed.pack(first, width, panels); }, out_row);
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
    const Blocks blocks(call.workspace, taps * size_t(conv.group_out_channels()), size_t(conv.group_channels), dx.elements / dx.last());
    for (int32_t a = 0; a < conv.stride_h && a < conv.height; ++a) {
        const Axis h = backward_axis(conv.height, conv.out_height, conv.kernel_h, conv.stride_h, conv.pad_top, conv.dilation_h, a);
        for (int32_t b = 0; b < conv.stride_w && b < conv.width; ++b) {
            const Axis v = backward_axis(conv.width, conv.out_width, conv.kernel_w, conv.stride_w, conv.pad_left, conv.dilation_w, b);
            grad_input_phase(conv, h, v, a, b, dy.f32(), w.f32(), dx.f32_mut(), blocks);
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
        const size_t stride = size_t(workspace::patch_stride(depth)), most = size_t(workspace::patch_rows(depth, pixels));
        for (size_t group = 0; group < size_t(conv.groups); ++group) {
            const Patches patches = {conv.forward_h(), conv.forward_w(), x.f32() + group * size_t(conv.group_channels),
                                     size_t(conv.channels), size_t(conv.group_channels)};
            for (size_t pixel = 0; pixel < pixels; pixel += most) {
                const size_t count = smaller(pixels - pixel, most);
                for (size_t i = 0; i < count; ++i) {
                    int32_t image, row, column;
                    patches.locate(pixel + i, &image, &row, &column);
                    patches.copy_patch(image, row, column, block + i * stride);
                }
                Epilogue epilogue;
                epilogue.accumulate = pixel > 0;
                for (size_t first = 0; first < out_columns; first += kMostRows) {
                    const size_t rows = smaller(out_columns - first, kMostRows);
                    float* out[kMostRows];
                    for (size_t i = 0; i < rows; ++i) out[i] = dw.f32_mut() + (group * out_columns + first + i) * depth;
                    const Columns left = {dy.f32() + pixel * size_t(conv.out_channels) + group * out_columns + first,
                                          size_t(conv.out_channels)};
                    multiply_in_place(left, block, stride, count, out, rows, depth, epilogue, true, nullptr);
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
