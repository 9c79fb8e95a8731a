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
            call.in[2].f32(),
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
                  [&](size_t row, Cell* cells) { copy_cells(cells, x + row * layer.depth, x_end, layer.depth); });
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- convolution

// Values, not references: stores of bytes may alias everything that is not a local copy.
struct Convolution {
    const int8_t *x, *x_end;
    int8_t zero_point;
    int32_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
    int32_t height, width, kernel_h, kernel_w;
    size_t groups, channels, group_channels;  // of x
    size_t line, image;                       // elements of x from row to row and from image to image

    explicit Convolution(const Call& call)
        : x(call.in[0].i8()),
          x_end(x + call.in[0].elements),
          zero_point(int8_t(call.in[0].zero_point)),
          stride_h(call.attr[0].i),
          stride_w(call.attr[1].i),
          pad_top(call.attr[2].i),
          pad_left(call.attr[3].i),
          dilation_h(call.attr[4].i),
          dilation_w(call.attr[5].i),
          height(int32_t(call.in[0].dims[1])),
          width(int32_t(call.in[0].dims[2])),
          kernel_h(int32_t(call.in[1].dims[1])),
          kernel_w(int32_t(call.in[1].dims[2])),
          groups(size_t(call.attr[6].i)),
          channels(call.in[0].dims[3]),
          group_channels(call.in[1].dims[3]),
          line(size_t(width) * channels),
          image(size_t(height) * line) {}
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

// The taps [begin, end) of a kernel that meet the image along one axis, where tap k lies at origin + k * dilation.
struct Taps {
    int32_t begin = 0, end;

    Taps(int32_t origin, int32_t dilation, int32_t kernel, int32_t size) : end(kernel) {
        while (begin < kernel && origin + begin * dilation < 0) ++begin;
        while (end > begin && origin + (end - 1) * dilation >= size) --end;
    }
    int32_t count() const { return end - begin; }
};

// The patch of x under one output pixel, [kernel_h, kernel_w, group_channels], as bytes or as cells; padding reads the
// zero point. Up to 15 items beyond its end are written.
template <class Item>
EVENSONG_INLINE void gather_patch(const Convolution& c, size_t group, const Pixel& pixel, Item* patch) {
    const int32_t top = int32_t(pixel.row) * c.stride_h - c.pad_top,
                  left = int32_t(pixel.column) * c.stride_w - c.pad_left;
    const Taps taps(left, c.dilation_w, c.kernel_w, c.width);
    const size_t part = c.group_channels, line_items = size_t(c.kernel_w) * part;
    const size_t before = size_t(taps.begin) * part, inside = size_t(taps.count()) * part;
    const bool contiguous = c.dilation_w == 1 && c.groups == 1;
    const size_t run = contiguous ? inside : part, step = size_t(c.dilation_w) * c.channels;
    const int8_t* first =
        c.x + pixel.image * c.image + size_t(left + taps.begin * c.dilation_w) * c.channels + group * part;
    for (int32_t kh = 0, h = top; kh < c.kernel_h; ++kh, h += c.dilation_h, patch += line_items) {
        if (h < 0 || h >= c.height || inside < line_items) fill_cells(patch, c.zero_point, line_items);
        if (h < 0 || h >= c.height || inside == 0) continue;
        const int8_t* from = first + size_t(h) * c.line;
        for (size_t done = 0; done < inside; done += run, from += step)
            copy_cells(patch + before + done, from, c.x_end, run);
        // The last step may have run over the padding behind it.
        if (before + inside < line_items)
            fill_cells(patch + before + inside, c.zero_point, line_items - before - inside);
    }
}

// One channel in, one channel out: lanes are channels, and every tap is one multiply-add. Only taps that meet the image
// are visited, with x less its zero point; what the zero point adds in all stands in `start`.
struct Depthwise {
    const int32_t* weights;  // [taps, channels]
    const float* start;      // [channels], int32 bits
    const float* multiplier;
    size_t channels, x_step, x_line, w_line;  // from tap to tap and from line to line, in elements
    int32_t zero_point;
    Requantizer requantize;

    // y[channels] from the first tap's x and weights, over rows * columns taps.
    __attribute__((noinline)) void pixel(const int8_t* x, size_t first_weight, int32_t rows, int32_t columns,
                                         int8_t* y) const {
        for (size_t o = 0; o < channels; o += kLanes) {
            const size_t live = channels - o;
            Ints sum = Ints(load_upto(start + o, live));
            const int8_t* line = x + o;
            const float* weight = reinterpret_cast<const float*>(weights + first_weight + o);
            for (int32_t h = 0; h < rows; ++h, line += x_line, weight += w_line) {
                for (int32_t w = 0; w < columns; ++w) {
                    const Ints value = load_bytes(line + size_t(w) * x_step, live) - zero_point;
                    sum = multiply_add(sum, value, Ints(load_upto(weight + size_t(w) * channels, live)));
                }
            }
            store_bytes(y + o, requantize(to_float(sum) * load_upto(multiplier + o, live)), live);
        }
    }
};

void convolve_depthwise(const Convolution& c, const Call& call, const Requantizer& requantize) {
    const size_t channels = c.channels, taps = size_t(c.kernel_h) * size_t(c.kernel_w);
    int32_t* weights = reinterpret_cast<int32_t*>(call.workspace);
    int32_t* start = weights + taps * channels;
    for (size_t o = 0; o < channels; ++o) {
        int32_t sum = 0;
        for (size_t t = 0; t < taps; ++t) {
            const int8_t w = call.in[1].i8()[o * taps + t];
            weights[t * channels + o] = narrow_weight(w);
            sum += w;
        }
        start[o] = int32_t(uint32_t(call.in[2].i32()[o]) + uint32_t(int32_t(c.zero_point)) * uint32_t(sum));
    }
    const Depthwise layer = {weights,
                             reinterpret_cast<const float*>(start),
                             call.in[3].f32(),
                             channels,
                             size_t(c.dilation_w) * channels,
                             size_t(c.dilation_h) * c.line,
                             size_t(c.kernel_w) * channels,
                             c.zero_point,
                             requantize};
    int8_t* y = call.out[0].i8_mut();
    const int8_t* y_end = y + call.out[0].elements;
    for (Pixel pixel(call.out[0]); y < y_end; y += channels, pixel.next()) {
        const int32_t top = int32_t(pixel.row) * c.stride_h - c.pad_top,
                      left = int32_t(pixel.column) * c.stride_w - c.pad_left;
        const Taps rows(top, c.dilation_h, c.kernel_h, c.height), columns(left, c.dilation_w, c.kernel_w, c.width);
        const int8_t* x = c.x + pixel.image * c.image;
        size_t first_weight = 0;
        if (rows.count() && columns.count()) {
            x += size_t(top + rows.begin * c.dilation_h) * c.line +
                 size_t(left + columns.begin * c.dilation_w) * channels;
            first_weight = size_t(rows.begin * c.kernel_w + columns.begin) * channels;
        }
        layer.pixel(x, first_weight, rows.count(), columns.count(), y);
    }
}

Fault qconv2d(const Call& call) {
    const Convolution c(call);
    Int8Layer layer = layer_of(call, call.attr[7].i, call.attr[8].i);
    if (c.group_channels == 1 && c.groups == layer.outputs) {
        convolve_depthwise(c, call, layer.requantize);
        return Fault::kNone;
    }
    const size_t pixels = call.out[0].elements / layer.stride;
    layer.outputs /= c.groups;
    for (size_t group = 0; group < c.groups; ++group) {
        int8_t* y = call.out[0].i8_mut() + group * layer.outputs;
        Pixel pixel(call.out[0]);
        if (pixels <= kFewRows) {
            int8_t* patch = reinterpret_cast<int8_t*>(call.workspace);
            for (size_t p = 0; p < pixels; ++p, pixel.next()) {
                gather_patch(c, group, pixel, patch);
                multiply_row(layer, patch, y + p * layer.stride);
            }
        } else {
            multiply_rows(layer, pixels, y, call.workspace, [&](size_t row, Cell* cells) {
                if (row == 0) pixel = Pixel(call.out[0]);
                gather_patch(c, group, pixel, cells);
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

// The real places of one window: x points to the first, `line` is from row to row.
struct Places {
    const int8_t* x;
    size_t line, channels;
    int32_t rows, columns;
};

// Folds the window into each channel with `combine`, then `finish`.
template <class Combine, class Finish>
EVENSONG_INLINE void pool_window(const Places& p, int32_t start, int8_t* y, Combine combine, Finish finish) {
    for (size_t c = 0; c < p.channels; c += kLanes) {
        const size_t live = p.channels - c;
        Ints value = splat(start);
        const int8_t* line = p.x + c;
        for (int32_t h = 0; h < p.rows; ++h, line += p.line) {
            for (int32_t w = 0; w < p.columns; ++w)
                value = combine(value, load_bytes(line + size_t(w) * p.channels, live));
        }
        store_bytes(y + c, finish(value), live);
    }
}

// Calls body(places, y) for every window.
template <class Body>
EVENSONG_INLINE void each_place(const Call& call, Body body) {
    const PoolGeometry g(call.attr);
    const Operand &x = call.in[0], &y = call.out[0];
    const size_t channels = x.last(), line = x.dims[2] * channels;
    each_window(g, x, y, [&](const Span& rows, const Span& columns, size_t image, size_t pixel) {
        const int8_t* first =
            x.i8() + (image * x.dims[1] + size_t(rows.begin)) * line + size_t(columns.begin) * channels;
        body(Places{first, line, channels, rows.count(), columns.count()}, y.i8_mut() + pixel * channels);
    });
}

__attribute__((noinline)) void max_window(const Places& p, int8_t* y) {
    pool_window(p, -128, y, [](Ints best, Ints x) { return x > best ? x : best; }, [](Ints best) { return best; });
}

Fault qmax_pool2d(const Call& call) {
    each_place(call, max_window);
    return Fault::kNone;
}

__attribute__((noinline)) void mean_window(const Places& p, int32_t zero_point, float factor,
                                           const Requantizer& requantize, int8_t* y) {
    pool_window(
        p, 0, y, [=](Ints sum, Ints x) { return sum + (x - zero_point); },
        [=](Ints sum) { return requantize(to_float(sum) * factor); });
}

Fault qavg_pool2d(const Call& call) {
    const bool count_include_pad = call.attr[6].i != 0;
    const int32_t window = call.attr[0].i * call.attr[1].i;
    const Requantizer requantize(call.out[0].zero_point, -128, 127);
    each_place(call, [&](const Places& p, int8_t* y) {
        const int32_t count = count_include_pad ? window : p.rows * p.columns;
        mean_window(p, call.in[0].zero_point, call.attr[7].f / float(count), requantize, y);
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
