// CONV2D_GRAD_WEIGHT, float32: dw[o, tap] = sum over pixels of dy[pixel, o] * window(pixel)[tap].
//
// Windows are read where they lie, as in the forward pass. A block of pixels adds its share to all of dw, either from
// register tiles of taps x output channels, or element by element where most of dy is zero.
#include "depthwise.hpp"
#include "direct.hpp"
#include "sparse.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

EVENSONG_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// False, and nothing done, where add_gradients() is faster.
bool add_sparse(const WindowBlock& block, TermLists terms, float* dw) {
    if (!terms.has_room()) return false;
    const size_t depth = block.depth(), run = block.lines.run, vectors = (run + kLanes - 1) / kLanes;
    const size_t count = terms.count(block.rows, block.count, block.channels);
    const size_t dense = block.count * depth * ((block.channels + kLanes - 1) / kLanes);
    const size_t sparse = (count * (vectors + 2) + block.channels * (2 * vectors + 16)) * block.lines.lines;
    if (!terms.fits(count) || sparse > dense) return false;
    uint32_t places[kMostWindows];
    for (size_t i = 0; i < block.count; ++i) places[i] = uint32_t(block.windows[i] - block.windows[0]);
    terms.by_column(block.rows, block.count, block.channels, places);
    for (size_t line = 0; line < block.lines.lines; ++line) {  // outside: what one line meets stays in the cache
        for (size_t channel = 0; channel < block.channels; ++channel) {
            add_terms(terms.list(channel), block.windows[0] + line * block.lines.line_stride,
                      dw + channel * depth + line * run, run, true, 1.0f);
        }
    }
    return true;
}

// False, and nothing done, where windows cannot be read in place.
bool add_windows(const Convolution& conv, const Patches& patches, const float* dy, float* dw, float* memory,
                 size_t room) {
    if (!patches.lines_are_contiguous()) return false;
    Band band(patches, conv.images, memory, room / 2);
    if (!band.fits()) return false;
    float* lists = memory + room / 2;
    const TermLists terms(lists, room - room / 2, size_t(conv.out_channels));
    clear_floats(dw, size_t(conv.out_channels) * patches.depth());
    // The rows of dy are only read; a Target says where they lie.
    band.each_block(conv.out_target(const_cast<float*>(dy)), [&](const float** windows, float** rows, size_t count) {
        const WindowBlock block = {windows, rows, count, size_t(conv.out_channels), band.lines()};
        if (!add_sparse(block, terms, dw)) add_gradients(block, dw);
    });
    return true;
}

// dw = dy^T patches, where patches are copies.
void multiply_patches(const Convolution& conv, const Patches& patches, const float* dy, float* dw, float* memory) {
    const size_t depth = conv.depth(), stride = size_t(workspace::patch_stride(depth)), pixels = conv.out_pixels();
    const size_t outputs = size_t(conv.group_out_channels()), most = size_t(workspace::patch_rows(depth, pixels));
    for (size_t pixel = 0; pixel < pixels; pixel += most) {
        const size_t count = smaller(pixels - pixel, most);
        const float* rows[kMostRows];
        float* unused[kMostRows];
        patches.rows(pixel, count, memory, true, Target(), rows, unused);
        Epilogue epilogue;
        epilogue.accumulate = pixel > 0;
        for (size_t first = 0; first < outputs; first += kMostRows) {
            const size_t channels = smaller(outputs - first, kMostRows);
            float* out[kMostRows];
            for (size_t i = 0; i < channels; ++i) out[i] = dw + (first + i) * depth;
            const Columns left = {dy + pixel * size_t(conv.out_channels) + first, size_t(conv.out_channels)};
            multiply_in_place(left, memory, stride, count, out, channels, depth, epilogue, nullptr);
        }
    }
}

Fault convolution_grad_weight(const Call& call) {
    const Operand &dy = call.in[0], &x = call.in[1], &dw = call.out[0];
    const Convolution conv(x, dw, dy, call.attr);
    float* memory = reinterpret_cast<float*>(call.workspace);
    if (call.outputs > 1) {
        bias_gradient(dy.f32(), conv.out_pixels(), size_t(conv.out_channels), call.out[1].f32_mut());
    }
    if (conv.is_depthwise()) {
        depthwise_grad_weight(conv, dy.f32(), x.f32(), dw.f32_mut(), memory);
        return Fault::kNone;
    }
    const size_t outputs = size_t(conv.group_out_channels());
    for (size_t group = 0; group < size_t(conv.groups); ++group) {
        const Patches patches = conv.forward_patches(x, group);
        const float* gradient = dy.f32() + group * outputs;
        float* out = dw.f32_mut() + group * outputs * conv.depth();
        const size_t room = size_t(workspace::patch_elements(conv.depth(), conv.out_pixels()));
        if (!kIsSmall && conv.groups == 1 && add_windows(conv, patches, gradient, out, memory, room)) break;
        multiply_patches(conv, patches, gradient, out, memory);
    }
    return Fault::kNone;
}

}  // namespace

void register_conv_weight(Kernel* table);
void register_conv_weight(Kernel* table) { table[op::CONV2D_GRAD_WEIGHT] = convolution_grad_weight; }

}  // namespace EVENSONG_ISA
}  // namespace evensong
