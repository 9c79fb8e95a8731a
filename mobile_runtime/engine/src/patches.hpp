// Convolution as a matrix product: which source pixels a pixel of the grid meets, and the rows that it reads.
//
// One description serves the forward pass and the gradient in the input. For each axis, tap t of grid position p reads
// source position p * step + first + t * delta, and belongs to kernel place kernel_first + t * kernel_step.
#pragma once

#include "gemm.hpp"
#include "kernel.hpp"

namespace evensong {
namespace EVENSONG_ISA {

struct Axis {
    int32_t source, grid;
    int32_t step, first, delta, taps;
    int32_t kernel_first, kernel_step;

    workspace::GridAxis of_grid() const { return {uint64_t(grid), uint64_t(step), uint64_t(taps), uint64_t(delta)}; }
    // Source positions from the first to the last tap of that many grid positions.
    size_t extent(int32_t positions) const { return size_t(of_grid().extent(uint64_t(positions))); }
    // No tap of any grid position falls into the padding.
    bool is_inside() const { return first >= 0 && size_t(first) + extent(grid) <= size_t(source); }
};

// Where the result of each grid pixel goes: base + image * image_stride + row * row_stride + column * column_stride.
struct Target {
    float* base;
    size_t image_stride, row_stride, column_stride;

    float* at(int32_t image, int32_t row, int32_t column) const {
        return base + size_t(image) * image_stride + size_t(row) * row_stride + size_t(column) * column_stride;
    }
};

struct Patches;

// A convolution's sizes, from the operands x [N,H,W,C], w [O,KH,KW,C/groups], y [N,P,Q,O] and the attributes.
struct Convolution {
    int32_t images, height, width, channels;
    int32_t out_height, out_width, out_channels;
    int32_t kernel_h, kernel_w, group_channels;
    int32_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;

    Convolution(const Operand& x, const Operand& w, const Operand& y, const Attribute* attr)
        : images(int32_t(x.dims[0])),
          height(int32_t(x.dims[1])),
          width(int32_t(x.dims[2])),
          channels(int32_t(x.dims[3])),
          out_height(int32_t(y.dims[1])),
          out_width(int32_t(y.dims[2])),
          out_channels(int32_t(y.dims[3])),
          kernel_h(int32_t(w.dims[1])),
          kernel_w(int32_t(w.dims[2])),
          group_channels(int32_t(w.dims[3])),
          stride_h(attr[0].i),
          stride_w(attr[1].i),
          pad_top(attr[2].i),
          pad_left(attr[3].i),
          dilation_h(attr[4].i),
          dilation_w(attr[5].i),
          groups(attr[6].i) {}

    int32_t group_out_channels() const { return out_channels / groups; }
    size_t depth() const { return size_t(kernel_h) * size_t(kernel_w) * size_t(group_channels); }
    size_t out_pixels() const { return size_t(images) * size_t(out_height) * size_t(out_width); }
    bool is_depthwise() const { return group_channels == 1 && groups == out_channels; }

    // Targets of grid pixels: of the output, and of the phase (a, b) of the input.
    Target out_target(float* y) const {
        const size_t pixel = size_t(out_channels);
        return {y, size_t(out_height) * size_t(out_width) * pixel, size_t(out_width) * pixel, pixel};
    }
    Target phase_target(float* dx, int32_t a, int32_t b) const {
        const size_t pixel = size_t(channels), line = size_t(width) * pixel;
        return {dx + size_t(a) * line + size_t(b) * pixel, size_t(height) * line, size_t(stride_h) * line,
                size_t(stride_w) * pixel};
    }

    Axis forward_h() const { return {height, out_height, stride_h, -pad_top, dilation_h, kernel_h, 0, 1}; }
    Axis forward_w() const { return {width, out_width, stride_w, -pad_left, dilation_w, kernel_w, 0, 1}; }
    Patches forward_patches(const Operand& x, size_t group) const;
};

// The pixels `phase`, `phase + stride`, ... of an input axis, which meet every step-th tap: their gradient is a
// convolution of stride 1 over the output's gradient. Taps run backwards through the kernel, so that they run forwards
// through the source.
__attribute__((noinline)) inline Axis backward_axis(int32_t input, int32_t output, int32_t kernel, int32_t stride,
                                                    int32_t padding, int32_t dilation, int32_t phase) {
    const int32_t common = int32_t(workspace::greatest_common_divisor(uint64_t(stride), uint64_t(dilation)));
    const int32_t step = stride / common;
    Axis axis = {output, (input - phase + stride - 1) / stride, 1, 0, dilation / common, 0, 0, -step};
    for (int32_t k = 0; k < step && k < kernel; ++k) {
        if ((phase + padding - k * dilation) % stride) continue;
        axis.taps = (kernel - k + step - 1) / step;
        axis.kernel_first = k + (axis.taps - 1) * step;
        axis.first = (phase + padding - axis.kernel_first * dilation) / stride;
    }
    return axis;
}

// Rows for a block of grid pixels: pointers into the source where a patch lies there in one piece, else copies.
struct Patches {
    Axis h, w;
    const float* source;  // [images, h.source, w.source, pixel_stride], already at the group's first channel
    size_t pixel_stride;  // all channels
    size_t channels;      // of the group
    const float* end;     // of the source

    size_t depth() const { return size_t(h.taps) * size_t(w.taps) * channels; }
    bool lines_are_contiguous() const { return channels == pixel_stride && (w.taps == 1 || w.delta == 1); }
    bool taps_are_contiguous() const { return w.taps == 1 || (w.delta == 1 && channels == pixel_stride); }
    bool lies_in_source() const { return h.taps == 1 && taps_are_contiguous() && h.is_inside() && w.is_inside(); }

    // rows[i] becomes the patch of grid pixel first + i, and out[i] its target. Copies go to block[i *
    // patch_stride(depth)]; `always_copy` asks for them even where a patch lies in one piece.
    __attribute__((noinline)) void rows(size_t first_pixel, size_t count, float* block, bool always_copy,
                                        const Target& target, const float** rows, float** out) const {
        const size_t stride = size_t(workspace::patch_stride(depth()));
        const bool in_source = !always_copy && lies_in_source();
        int32_t column = int32_t(first_pixel % size_t(w.grid)),
                row = int32_t(first_pixel / size_t(w.grid) % size_t(h.grid)),
                image = int32_t(first_pixel / size_t(w.grid) / size_t(h.grid));
        for (size_t i = 0; i < count; ++i) {
            if (in_source) {
                rows[i] = at(image, row * h.step + h.first, column * w.step + w.first);
            } else {
                rows[i] = block + i * stride;
                copy_patch(image, row, column, block + i * stride);
            }
            out[i] = target.at(image, row, column);
            if (++column == w.grid) {
                column = 0;
                if (++row == h.grid) row = 0, ++image;
            }
        }
    }

    const float* at(int32_t image, int32_t y, int32_t x) const {
        return source + ((size_t(image) * size_t(h.source) + size_t(y)) * size_t(w.source) + size_t(x)) * pixel_stride;
    }

  private:
    void copy_patch(int32_t image, int32_t row, int32_t column, float* out) const {
        const size_t line = size_t(w.taps) * channels;
        const int32_t top = row * h.step + h.first, left = column * w.step + w.first;
        const bool is_inside =
            top >= 0 && top + (h.taps - 1) * h.delta < h.source && left >= 0 && left + w.taps <= w.source;
        if (is_inside && taps_are_contiguous()) {
            const size_t next = size_t(h.delta) * size_t(w.source) * pixel_stride;
            const float* from = at(image, top, left);
            if (size_t(end - from) >=
                size_t(h.taps - 1) * next + line + kLanes) {  // whole vectors may be read everywhere
                for (int32_t t = 0; t < h.taps; ++t, out += line, from += next) {
                    for (size_t i = 0; i < line; i += kLanes) store(out + i, load(from + i));
                }
                return;
            }
        }
        for (int32_t t = 0; t < h.taps; ++t, out += line) {
            const int32_t y = row * h.step + h.first + t * h.delta;
            if (y < 0 || y >= h.source) {
                clear(out, line);
            } else if (taps_are_contiguous()) {
                copy_line(image, y, column * w.step + w.first, out);
            } else {
                copy_taps(image, y, column * w.step + w.first, out);
            }
        }
    }

    // Whole vectors are written: a row of the block has room for one more at its end, and lines are written in order.
    static void copy(float* out, const float* from, size_t count) {
        for (size_t i = 0; i < count; i += kLanes) store(out + i, load_upto(from + i, count - i));
    }
    static void clear(float* out, size_t count) {
        for (size_t i = 0; i < count; i += kLanes) store(out + i, Floats{});
    }

    // All taps of a line at once: source positions x .. x + taps, cut off at the borders.
    void copy_line(int32_t image, int32_t y, int32_t x, float* out) const {
        const int32_t begin = x < 0 ? (-x < w.taps ? -x : w.taps) : 0;
        const int32_t inside = w.source - x < w.taps ? w.source - x : w.taps;
        const int32_t end = inside > begin ? inside : begin;
        if (begin) clear(out, size_t(begin) * channels);
        if (end > begin) copy(out + size_t(begin) * channels, at(image, y, x + begin), size_t(end - begin) * channels);
        if (end < w.taps) clear(out + size_t(end) * channels, size_t(w.taps - end) * channels);
    }

    void copy_taps(int32_t image, int32_t y, int32_t x, float* out) const {
        for (int32_t t = 0; t < w.taps; ++t, out += channels) {
            const int32_t tap = x + t * w.delta;
            if (tap < 0 || tap >= w.source) {
                clear(out, channels);
            } else {
                copy(out, at(image, y, tap), channels);
            }
        }
    }
};

inline Patches Convolution::forward_patches(const Operand& x, size_t group) const {
    const size_t group_size = size_t(group_channels);
    return {forward_h(), forward_w(), x.f32() + group * group_size, size_t(channels), group_size, x.f32() + x.elements};
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
