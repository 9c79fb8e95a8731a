// Quantised operations. scale and zero_point stand in the operands; every result is the same byte on every target.

#include "int8_product.hpp"
#include "kernel.hpp"
#include "opcodes.h"
#include "window.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

constexpr size_t kFewRows = 8;  // at most so many rows do not pay for packing the weights

Int8Layer layer_of(const Call& call, int32_t lo, int32_t hi) {
    const Operand& w = call.in[1];
    const size_t outputs = w.dims[0];
    return {w.i8(),
            w.i8() + w.elements,
            call.in[2].i32(),
            call.in[3].f32(),
            w.elements / outputs,
            outputs,
            outputs,
            Requantizer(call.out[0].zero_point, lo, hi)};
}

Fault qlinear(const Call& call) {
    const Int8Layer layer = layer_of(call, call.attr[0].i, call.attr[1].i);
    const int8_t* x = call.in[0].i8();
    int8_t* y = call.out[0].i8_mut();
    const size_t rows = call.in[0].elements / layer.depth;
    if (rows <= kFewRows) {
        for (size_t r = 0; r < rows; ++r) multiply_row(layer, x + r * layer.depth, y + r * layer.outputs);
        return Fault::kNone;
    }
    const int8_t* x_end = x + call.in[0].elements;
    multiply_rows(layer, rows, y, call.workspace,
                  [&](size_t row, Cell* cells) { fill_cells(x + row * layer.depth, x_end, layer.depth, cells); });
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- convolution

struct Convolution {
    const Operand &x, &w, &y;
    const int32_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;
    const int32_t height, width, kernel_h, kernel_w;
    const size_t channels, group_channels;  // of x

    explicit Convolution(const Call& call)
        : x(call.in[0]),
          w(call.in[1]),
          y(call.out[0]),
          stride_h(call.attr[0].i),
          stride_w(call.attr[1].i),
          pad_top(call.attr[2].i),
          pad_left(call.attr[3].i),
          dilation_h(call.attr[4].i),
          dilation_w(call.attr[5].i),
          groups(call.attr[6].i),
          height(int32_t(x.dims[1])),
          width(int32_t(x.dims[2])),
          kernel_h(int32_t(w.dims[1])),
          kernel_w(int32_t(w.dims[2])),
          channels(x.dims[3]),
          group_channels(w.dims[3]) {}
};

// The place of an output pixel, counted up without dividing.
struct Pixel {
    uint32_t height, width;
    uint32_t image = 0, row = 0, column = 0;

    explicit Pixel(const Operand& y) : height(y.dims[1]), width(y.dims[2]) {}
    void next() {
        if (++column < width) return;
        column = 0;
        if (++row < height) return;
        row = 0;
        ++image;
    }
};

// Copies in steps of 16 bytes, up to 15 beyond the end on both sides; `from_end` bounds what may be read.
EVENSONG_INLINE void copy_steps(int8_t* to, const int8_t* from, const int8_t* from_end, size_t count) {
    if (__builtin_expect(from_end - from < ptrdiff_t(count + 16), 0)) {
        __builtin_memcpy(to, from, count);
        return;
    }
    for (size_t i = 0; i < count; i += 16) store_as(to + i, load_as<Ints4>(from + i));
}

// The patch of x under one output pixel, [kernel_h, kernel_w, group_channels]; padding reads the zero point.
// `patch` has 16 bytes of room beyond its end.
void gather_patch(const Convolution& c, size_t group, const Pixel& pixel, int8_t* patch) {
    const int8_t* x_end = c.x.i8() + c.x.elements;
    const int32_t top = int32_t(pixel.row) * c.stride_h - c.pad_top,
                  left = int32_t(pixel.column) * c.stride_w - c.pad_left;
    const size_t part = c.group_channels, line_bytes = size_t(c.kernel_w) * part;
    const bool contiguous = c.dilation_w == 1 && c.groups == 1;
    for (int32_t kh = 0; kh < c.kernel_h; ++kh, patch += line_bytes) {
        const int32_t h = top + kh * c.dilation_h;
        if (h < 0 || h >= c.height) {
            __builtin_memset(patch, c.x.zero_point, line_bytes);
            continue;
        }
        const int8_t* line =
            c.x.i8() + (size_t(pixel.image) * size_t(c.height) + size_t(h)) * size_t(c.width) * c.channels;
        if (contiguous) {
            const int32_t begin = left < 0 ? -left : 0;
            const int32_t end = c.width - left < c.kernel_w ? c.width - left : c.kernel_w;
            if (begin == 0 && end == c.kernel_w) {
                copy_steps(patch, line + size_t(left) * part, x_end, line_bytes);
                continue;
            }
            __builtin_memset(patch, c.x.zero_point, line_bytes);
            if (end > begin) {
                __builtin_memcpy(patch + size_t(begin) * part, line + size_t(left + begin) * part,
                                 size_t(end - begin) * part);
            }
            continue;
        }
        for (int32_t kw = 0; kw < c.kernel_w; ++kw) {
            const int32_t w = left + kw * c.dilation_w;
            int8_t* to = patch + size_t(kw) * part;
            if (w < 0 || w >= c.width) {
                __builtin_memset(to, c.x.zero_point, part);
            } else {
                copy_steps(to, line + size_t(w) * c.channels + group * part, x_end, part);
            }
        }
    }
}

// One channel in, one channel out: lanes are channels, and every tap is one multiply-add.
void convolve_depthwise(const Convolution& c, const Call& call, const Requantizer& requantize) {
    const size_t channels = c.channels, taps = size_t(c.kernel_h) * size_t(c.kernel_w);
    int32_t* packed = reinterpret_cast<int32_t*>(call.workspace);  // [taps, channels]
    for (size_t o = 0; o < channels; ++o) {
        for (size_t t = 0; t < taps; ++t) packed[t * channels + o] = narrow_weight(c.w.i8()[o * taps + t]);
    }
    const float* bias = call.in[2].f32();  // bits, moved as floats
    const float* multiplier = call.in[3].f32();
    const size_t pixels = c.y.elements / channels;
    Pixel pixel(c.y);
    for (size_t p = 0; p < pixels; ++p, pixel.next()) {
        const int32_t top = int32_t(pixel.row) * c.stride_h - c.pad_top,
                      left = int32_t(pixel.column) * c.stride_w - c.pad_left;
        const int8_t* image = c.x.i8() + size_t(pixel.image) * size_t(c.height) * size_t(c.width) * channels;
        for (size_t o = 0; o < channels; o += kLanes) {
            const size_t live = channels - o;
            Ints sum = Ints(load_upto(bias + o, live));
            const float* weight = reinterpret_cast<const float*>(packed) + o;
            for (int32_t kh = 0; kh < c.kernel_h; ++kh) {
                const int32_t h = top + kh * c.dilation_h;
                for (int32_t kw = 0; kw < c.kernel_w; ++kw, weight += channels) {
                    const int32_t w = left + kw * c.dilation_w;
                    Ints x = splat(c.x.zero_point);
                    if (h >= 0 && h < c.height && w >= 0 && w < c.width) {
                        x = load_bytes(image + (size_t(h) * size_t(c.width) + size_t(w)) * channels + o, live);
                    }
                    sum = multiply_add(sum, x, Ints(load_upto(weight, live)));
                }
            }
            store_bytes(c.y.i8_mut() + p * channels + o, requantize(to_float(sum) * load_upto(multiplier + o, live)),
                        live);
        }
    }
}

Fault qconv2d(const Call& call) {
    const Convolution c(call);
    Int8Layer layer = layer_of(call, call.attr[7].i, call.attr[8].i);
    if (c.group_channels == 1 && size_t(c.groups) == layer.outputs) {
        convolve_depthwise(c, call, layer.requantize);
        return Fault::kNone;
    }
    const size_t pixels = c.y.elements / layer.stride;
    layer.outputs /= size_t(c.groups);
    const size_t product_bytes = workspace::int8_product_bytes(layer.depth, layer.outputs);
    const size_t patch_bytes = (layer.depth + 3) / 4 * 4 + 64;
    int8_t* patch = reinterpret_cast<int8_t*>(call.workspace + product_bytes - patch_bytes);
    for (size_t group = 0; group < size_t(c.groups); ++group) {
        int8_t* y = c.y.i8_mut() + group * layer.outputs;
        Pixel pixel(c.y);
        if (pixels <= kFewRows) {
            for (size_t p = 0; p < pixels; ++p, pixel.next()) {
                gather_patch(c, group, pixel, patch);
                multiply_row(layer, patch, y + p * layer.stride);
            }
        } else {
            multiply_rows(layer, pixels, y, call.workspace, [&](size_t row, Cell* cells) {
                if (row == 0) pixel = Pixel(c.y);
                gather_patch(c, group, pixel, patch);
                fill_cells(patch, patch + patch_bytes, layer.depth, cells);
                pixel.next();
            });
        }
        layer.w += layer.outputs * layer.depth;
        layer.bias += layer.outputs;
        layer.multiplier += layer.outputs;
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- element-wise

Fault quantize(const Call& call) {
    const Operand& y = call.out[0];
    const Requantizer requantize(y.zero_point, -128, 127);
    const float inverse = 1.0f / y.scale;
    for (size_t i = 0; i < y.elements; i += kLanes) {
        const size_t live = y.elements - i;
        store_bytes(y.i8_mut() + i, requantize(load_upto(call.in[0].f32() + i, live) * inverse), live);
    }
    return Fault::kNone;
}

Fault dequantize(const Call& call) {
    const Operand& x = call.in[0];
    for (size_t i = 0; i < x.elements; i += kLanes) {
        const size_t live = x.elements - i;
        store_upto(call.out[0].f32_mut() + i, to_float(load_bytes(x.i8() + i, live) - x.zero_point) * x.scale, live);
    }
    return Fault::kNone;
}

Fault qadd(const Call& call) {
    const Operand &a = call.in[0], &b = call.in[1], &y = call.out[0];
    const float scale_a = call.attr[0].f, scale_b = call.attr[1].f;
    const Requantizer requantize(y.zero_point, call.attr[2].i, call.attr[3].i);
    for (size_t i = 0; i < y.elements; i += kLanes) {
        const size_t live = y.elements - i;
        const Floats left = to_float(load_bytes(a.i8() + i, live) - a.zero_point) * scale_a;
        const Floats right = to_float(load_bytes(b.i8() + i, live) - b.zero_point) * scale_b;
        store_bytes(y.i8_mut() + i, requantize(left + right), live);
    }
    return Fault::kNone;
}

Fault qlut(const Call& call) {
    const int8_t* x = call.in[0].i8();
    const int8_t* table = call.in[1].i8() + 128;
    int8_t* y = call.out[0].i8_mut();
    for (size_t i = 0; i < call.out[0].elements; ++i) y[i] = table[x[i]];
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- pooling

// Calls first(), then each(x) for every real place of the window, then last(sum, rows, columns), lane by channel.
template <class Combine, class Finish>
EVENSONG_INLINE void pool(const Call& call, int32_t start, Combine combine, Finish finish) {
    const PoolGeometry g(call.attr);
    const Operand &x = call.in[0], &y = call.out[0];
    const size_t channels = x.last(), width = x.dims[2], image_pixels = size_t(x.dims[1]) * width;
    each_window(g, x, y, [&](const Span& rows, const Span& columns, size_t image, size_t pixel) {
        for (size_t c = 0; c < channels; c += kLanes) {
            const size_t live = channels - c;
            Ints value = splat(start);
            for (int32_t h = rows.begin; h < rows.end; ++h) {
                const int8_t* line = x.i8() + (image * image_pixels + size_t(h) * width) * channels + c;
                for (int32_t w = columns.begin; w < columns.end; ++w) {
                    value = combine(value, load_bytes(line + size_t(w) * channels, live));
                }
            }
            store_bytes(y.i8_mut() + pixel * channels + c, finish(value, rows, columns), live);
        }
    });
}

Fault qmax_pool2d(const Call& call) {
    pool(
        call, -128, [](Ints best, Ints x) { return x > best ? x : best; },
        [](Ints best, const Span&, const Span&) { return best; });
    return Fault::kNone;
}

Fault qavg_pool2d(const Call& call) {
    const PoolGeometry g(call.attr);
    const bool count_include_pad = call.attr[6].i != 0;
    const float ratio = call.attr[7].f;
    const int32_t zero_point = call.in[0].zero_point;
    const Requantizer requantize(call.out[0].zero_point, -128, 127);
    pool(
        call, 0, [=](Ints sum, Ints x) { return sum + (x - zero_point); },
        [=](Ints sum, const Span& rows, const Span& columns) {
            const int32_t count = count_include_pad ? g.kernel_h * g.kernel_w : rows.count() * columns.count();
            return requantize(to_float(sum) * (ratio / float(count)));
        });
    return Fault::kNone;
}

}  // namespace

void register_int8(Kernel* table) {
    table[op::QUANTIZE] = quantize;
    table[op::DEQUANTIZE] = dequantize;
    table[op::QLINEAR] = qlinear;
    table[op::QCONV2D] = qconv2d;
    table[op::QADD] = qadd;
    table[op::QMAX_POOL2D] = qmax_pool2d;
    table[op::QAVG_POOL2D] = qavg_pool2d;
    table[op::QLUT] = qlut;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
