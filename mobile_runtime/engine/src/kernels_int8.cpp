// Quantised operations. scale and zero_point stand in the operands; every result is the same byte on every target.

#include "int8_product.hpp"
#include "kernel.hpp"
#include "opcodes.h"
#include "window.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

constexpr size_t kFewRows = 8;  // at most so many rows do not pay for packing the weights

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

    // Where a window starts; in the padding, if negative.
    int32_t top_of(uint32_t row) const { return int32_t(row) * stride_h - pad_top; }
    int32_t left_of(uint32_t column) const { return int32_t(column) * stride_w - pad_left; }

    // Whether output pixel i is the product of the weights and pixel i of x; there may be padding on any side.
    bool is_product(const Operand& y) const {
        const bool same_size = int32_t(y.dims[1]) == height && int32_t(y.dims[2]) == width;
        const bool same_place = stride_h == 1 && stride_w == 1 && pad_top == 0 && pad_left == 0;
        return kernel_h == 1 && kernel_w == 1 && groups == 1 && same_size && same_place;
    }
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

// The patch of x under one output pixel, [kernel_h, kernel_w, group_channels], as cells; padding reads the zero point.
// Up to 15 cells beyond its end are written.
__attribute__((noinline)) void gather_patch(const Convolution& c, size_t group, const Pixel& pixel, Cell* patch) {
    const int32_t top = c.top_of(pixel.row), left = c.left_of(pixel.column);
    const Taps taps(left, c.dilation_w, c.kernel_w, c.width);
    const size_t part = c.group_channels, line_cells = size_t(c.kernel_w) * part;
    const size_t before = size_t(taps.begin) * part, inside = size_t(taps.count()) * part;
    const size_t run = c.dilation_w == 1 && c.groups == 1 ? inside : part, step = size_t(c.dilation_w) * c.channels;
    const size_t column = inside ? size_t(left + taps.begin * c.dilation_w) : 0;
    const int8_t* first = c.x + pixel.image * c.image + column * c.channels + group * part;
    for (int32_t kh = 0, h = top; kh < c.kernel_h; ++kh, h += c.dilation_h, patch += line_cells) {
        if (h < 0 || h >= c.height || inside < line_cells) fill_cells(patch, c.zero_point, line_cells);
        if (h < 0 || h >= c.height || inside == 0) continue;
        const int8_t* from = first + size_t(h) * c.line;
        for (size_t done = 0; done < inside; done += run, from += step) {
            copy_cells(patch + before + done, from, c.x_end, run);
        }
        // The last copy may have run over the padding behind it.
        if (before + inside < line_cells) {
            fill_cells(patch + before + inside, c.zero_point, line_cells - before - inside);
        }
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
        const int32_t top = c.top_of(pixel.row), left = c.left_of(pixel.column);
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

Int8Layer layer_of(const Call& call, int32_t lo, int32_t hi) {
    const size_t outputs = call.in[1].dims[0];
    return {call.in[1].i8(),
            call.in[2].f32(),
            call.in[3].f32(),
            call.in[1].elements / outputs,
            outputs,
            outputs,
            Requantizer(call.out[0].zero_point, lo, hi)};
}

Fault convolve(const Call& call, const Convolution& c, Int8Layer layer) {
    if (c.group_channels == 1 && c.groups == layer.outputs) {
        convolve_depthwise(c, call, layer.requantize);
        return Fault::kNone;
    }
    const size_t pixels = call.out[0].elements / layer.stride;
    int8_t* y = call.out[0].i8_mut();
    if (pixels <= kFewRows && layer.depth >= kDotStep && c.is_product(call.out[0])) {
        for (size_t p = 0; p < pixels; ++p) multiply_row(layer, c.x + p * layer.depth, y + p * layer.stride);
        return Fault::kNone;
    }
    layer.outputs /= c.groups;
    for (size_t group = 0; group < c.groups; ++group) {
        Pixel pixel(call.out[0]);
        multiply_rows(layer, pixels, y, call.workspace, [&](size_t row, Cell* cells) {
            if (row == 0) pixel = Pixel(call.out[0]);
            gather_patch(c, group, pixel, cells);
            pixel.next();
        });
        layer.w += layer.outputs * layer.depth;
        layer.bias += layer.outputs;
        layer.multiplier += layer.outputs;
        y += layer.outputs;
    }
    return Fault::kNone;
}

Fault qconv2d(const Call& call) {
    return convolve(call, Convolution(call), layer_of(call, call.attr[7].i, call.attr[8].i));
}

void set_image(Operand* operand, uint32_t height, uint32_t channels) {
    operand->dims[1] = height;
    operand->dims[2] = 1;
    operand->dims[3] = channels;
}

// A convolution of one place over an image of one column.
Fault qlinear(const Call& call) {
    const Int8Layer layer = layer_of(call, call.attr[0].i, call.attr[1].i);
    const uint32_t rows = uint32_t(call.in[0].elements / layer.depth);
    Operand in[4] = {call.in[0], call.in[1], call.in[2], call.in[3]}, out = call.out[0];
    in[0].dims[0] = 1;
    set_image(&in[0], rows, uint32_t(layer.depth));
    set_image(&in[1], 1, uint32_t(layer.depth));
    set_image(&out, rows, uint32_t(layer.outputs));
    Attribute attr[9] = {};
    attr[0].i = attr[1].i = attr[4].i = attr[5].i = attr[6].i = 1;
    const Call one = {in, 4, &out, 1, attr, call.workspace, call.run};
    return convolve(one, Convolution(one), layer);
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

// Folds the window into each channel with `combine`, then `finish`.
template <class Combine, class Finish>
EVENSONG_INLINE bool pool_window(const Call& call, const Window& window, int32_t start, Combine combine,
                                 Finish finish) {
    for (size_t c = 0; c < window.channels; c += kLanes) {
        const size_t live = window.channels - c;
        const int8_t* line = call.in[0].i8() + window.first + c;
        Ints value = splat(start);
        for (int32_t h = 0; h < window.rows; ++h, line += window.line) {
            const int8_t* x = line;
            for (int32_t w = 0; w < window.columns; ++w, x += window.channels)
                value = combine(value, load_bytes(x, live));
        }
        store_bytes(call.out[0].i8_mut() + window.pixel + c, finish(value), live);
    }
    return true;
}

// The first maximum of each channel and its place in the window, for training.
bool qmax_window_with_index(const Call& call, const Window& window) {
    const Operand& index = call.out[1];
    for (size_t c = 0; c < window.channels; c += kLanes) {
        const size_t live = window.channels - c, at = window.pixel + c;
        const int8_t* line = call.in[0].i8() + window.first + c;
        Ints best = splat(-129), place = {};
        for (int32_t h = 0, here = window.place; h < window.rows; ++h, here += window.kernel_w, line += window.line) {
            for (int32_t w = 0; w < window.columns; ++w) {
                const Ints value = load_bytes(line + size_t(w) * window.channels, live);
                const Ints larger = value > best;
                best = larger ? value : best;
                place = larger ? splat(here + w) : place;
            }
        }
        store_bytes(call.out[0].i8_mut() + at, best, live);
        if (index.dtype == DType::kI32) {
            store_upto(index.f32_mut() + at, Floats(place), live);
        } else {
            store_bytes(index.i8_mut() + at, place, live);
        }
    }
    return true;
}

bool qmax_window(const Call& call, const Window& window) {
    return pool_window(
        call, window, -128, [](Ints best, Ints x) { return x > best ? x : best; }, [](Ints best) { return best; });
}

bool qmean_window(const Call& call, const Window& window) {
    const Requantizer requantize(call.out[0].zero_point, -128, 127);
    const int32_t zero_point = call.in[0].zero_point;
    const float factor = call.attr[7].f / float(window.count);
    return pool_window(
        call, window, 0, [=](Ints sum, Ints x) { return sum + (x - zero_point); },
        [=](Ints sum) { return requantize(to_float(sum) * factor); });
}

Fault qmax_pool2d(const Call& call) {
    const auto body = call.outputs > 1 ? qmax_window_with_index : qmax_window;
    return each_window(call, call.in[0], call.out[0], false, body);
}
Fault qavg_pool2d(const Call& call) { return each_window(call, call.in[0], call.out[0], true, qmean_window); }

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
