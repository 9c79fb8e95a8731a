// Int8 training, the products: gradients of inputs (rows of gradients times weights) and steps of weights (gradients
// times inputs, summed over all pixels). Every sum is an exact int32.
//
// Both pack one operand into panels whose lanes are columns and whose groups run along the sum, as int8_product.hpp
// does, but from rows along the columns: nothing is transposed in memory.
#include "opcodes.h"
#include "stochastic.hpp"
#include "workspace.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

constexpr size_t kPanelColumns = 2 * kLanes;
constexpr size_t kPixels = size_t(workspace::kGradientPixels);
static_assert(kPanelColumns <= workspace::kPanel, "the workspace bound covers every instruction set");

// ------------------------------------------------------------------------------------------------- panels

// A panel [groups][kPanelColumns][kGroup] for every kPanelColumns columns.
struct Panels {
    WeightCell* cells;
    size_t groups;

    WeightCell* at(size_t column, size_t group) const {
        return cells + (column / kPanelColumns * groups + group) * kPanelColumns * kGroup;
    }
};

typedef int8_t Bytes16 __attribute__((vector_size(16)));
typedef int16_t Shorts8 __attribute__((vector_size(16)));

// Sixteen columns of kGroup rows, interleaved: each lane of 32 bits is one column, four bytes where the CPU multiplies
// bytes, else two int16.
EVENSONG_INLINE void interleave(const Bytes16* rows, Ints4* out) {
#define EVENSONG_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define EVENSONG_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
    if (kGroup == 4) {
        const Shorts8 a = Shorts8(__builtin_shufflevector(rows[0], rows[1], EVENSONG_LOW));
        const Shorts8 b = Shorts8(__builtin_shufflevector(rows[kGroup - 2], rows[kGroup - 1], EVENSONG_LOW));
        const Shorts8 c = Shorts8(__builtin_shufflevector(rows[0], rows[1], EVENSONG_HIGH));
        const Shorts8 d = Shorts8(__builtin_shufflevector(rows[kGroup - 2], rows[kGroup - 1], EVENSONG_HIGH));
        out[0] = Ints4(__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
        out[1] = Ints4(__builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
        out[2] = Ints4(__builtin_shufflevector(c, d, 0, 8, 1, 9, 2, 10, 3, 11));
        out[3] = Ints4(__builtin_shufflevector(c, d, 4, 12, 5, 13, 6, 14, 7, 15));
        return;
    }
    // Each byte beside its sign.
    for (size_t half = 0; half < 2; ++half) {
        const Bytes16 first = rows[0], second = rows[1];
        const Bytes16 pairs = half ? __builtin_shufflevector(first, second, EVENSONG_HIGH)
                                   : __builtin_shufflevector(first, second, EVENSONG_LOW);
        const Bytes16 signs = pairs < 0;
        out[2 * half] = Ints4(__builtin_shufflevector(pairs, signs, EVENSONG_LOW));
        out[2 * half + 1] = Ints4(__builtin_shufflevector(pairs, signs, EVENSONG_HIGH));
    }
#undef EVENSONG_LOW
#undef EVENSONG_HIGH
}

// `live` bytes of kGroup rows, sixteen at most; a null row is zero.
EVENSONG_INLINE void load_rows(const int8_t* const* rows, size_t at, size_t live, Bytes16* out) {
    for (size_t r = 0; r < kGroup; ++r) {
        if (rows[r] && live >= 16) {
            out[r] = load_as<Bytes16>(rows[r] + at);
            continue;
        }
        int8_t buffer[16] = {};
        if (rows[r]) {
            for (size_t c = 0; c < live; ++c) buffer[c] = rows[r][at + c];
        }
        out[r] = load_as<Bytes16>(buffer);
    }
}

// Writes one group: kGroup rows of `columns` int8, interleaved; a null row is zero. Whole panels are written.
__attribute__((noinline)) void pack_group(const Panels& panels, size_t group, const int8_t* const* rows,
                                          size_t columns) {
    for (size_t first = 0; first < columns; first += kPanelColumns) {
        WeightCell* to = panels.at(first, group);
        for (size_t c = 0; c < kPanelColumns; c += 16) {
            Ints4 lanes[4] = {};
            const size_t at = first + c;
            if (at < columns) {
                Bytes16 bytes[kGroup];
                load_rows(rows, at, columns - at, bytes);
                interleave(bytes, lanes);
            }
            for (size_t i = 0; i < 4 && c + 4 * i < kPanelColumns; ++i) store_as(to + (c + 4 * i) * kGroup, lanes[i]);
        }
    }
}

// What the cells' offset adds to the sums of one vector of columns, where the CPU multiplies unsigned by signed bytes.
__attribute__((noinline)) Ints excess_of(const Panels& panels, size_t column, size_t groups) {
    Ints excess = {};
#if defined(EVENSONG_UNSIGNED_DOT)
    for (size_t g = 0; g < groups; ++g) {
        const WeightCell* cells = panels.at(column, g) + column % kPanelColumns * kGroup;
        excess = dot_groups(excess, offset_groups(), load_as<Ints>(cells));
    }
#else
    (void)panels, (void)column, (void)groups;
#endif
    return excess;
}

// sums[r][v] += cells of row r times the panel, over `groups` groups.
template <size_t kVectors>
EVENSONG_INLINE void multiply_panel(Ints (&sums)[kRows][kVectors], const Cell* cells, size_t cell_stride,
                                    const WeightCell* panel, size_t groups) {
    for (size_t g = 0; g < groups; ++g, panel += kPanelColumns * kGroup) {
        Ints weights[kVectors];
        EVENSONG_UNROLL
        for (size_t v = 0; v < kVectors; ++v) weights[v] = load_as<Ints>(panel + v * kLanes * kGroup);
        EVENSONG_UNROLL
        for (size_t r = 0; r < kRows; ++r) {
            const Ints same = splat(load_as<int32_t>(cells + r * cell_stride + g * kGroup));
            EVENSONG_UNROLL
            for (size_t v = 0; v < kVectors; ++v) sums[r][v] = dot_groups(sums[r][v], same, weights[v]);
        }
    }
}

// ------------------------------------------------------------------------------------------------- geometry

// Of a convolution; a linear layer is one of a single place, over images of one pixel.
struct Sizes {
    int32_t images, height, width, out_height, out_width, kernel_h, kernel_w;
    size_t channels, group_channels, out_channels, groups;
    int32_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;

    Sizes(const Operand& x, const Operand& w, const Operand& y, const Attribute* a)
        : images(int32_t(x.dims[0])),
          height(int32_t(x.dims[1])),
          width(int32_t(x.dims[2])),
          out_height(int32_t(y.dims[1])),
          out_width(int32_t(y.dims[2])),
          kernel_h(int32_t(w.dims[1])),
          kernel_w(int32_t(w.dims[2])),
          channels(x.dims[3]),
          group_channels(w.dims[3]),
          out_channels(y.dims[3]),
          groups(size_t(a[6].i)),
          stride_h(a[0].i),
          stride_w(a[1].i),
          pad_top(a[2].i),
          pad_left(a[3].i),
          dilation_h(a[4].i),
          dilation_w(a[5].i) {}

    Sizes(size_t rows, const Operand& w)
        : images(int32_t(rows)),
          height(1),
          width(1),
          out_height(1),
          out_width(1),
          kernel_h(1),
          kernel_w(1),
          channels(w.dims[1]),
          group_channels(w.dims[1]),
          out_channels(w.dims[0]),
          groups(1),
          stride_h(1),
          stride_w(1),
          pad_top(0),
          pad_left(0),
          dilation_h(1),
          dilation_w(1) {}

    bool is_depthwise() const { return group_channels == 1 && groups == out_channels; }
    size_t taps() const { return size_t(kernel_h) * size_t(kernel_w); }
};

// The taps of the kernel that input positions phase, phase + stride, ... meet: kernel place first + t * step reads
// output position (position / stride) + source + t * delta.
struct PhaseTaps {
    int32_t count = 0, first = 0, step = 1, source = 0, delta = 1;

    PhaseTaps(int32_t kernel, int32_t stride, int32_t padding, int32_t dilation, int32_t phase) {
        const int32_t common = int32_t(workspace::greatest_common_divisor(uint64_t(stride), uint64_t(dilation)));
        step = stride / common;
        for (int32_t k = 0; k < step && k < kernel; ++k) {
            if ((phase + padding - k * dilation) % stride) continue;
            first = k;
            count = (kernel - k + step - 1) / step;
            source = (phase + padding - k * dilation) / stride;
            delta = -dilation / common;
        }
    }
};

// ------------------------------------------------------------------------------------------------- gradients of inputs

// Where finished sums go: to their scale, or only into the largest magnitude.
struct Finish {
    int8_t* dx;  // null: nothing is stored
    float factor;
    StochasticRounding round;
    Largest* largest;

    __attribute__((always_inline)) void operator()(size_t element, Ints sum, size_t live) const {
        const Floats v = to_float(sum);
        largest->add(v, live);
        if (dx) store_bytes(dx + element, round(v * factor, element), live);
    }
};

// Everything is computed twice where the scale is not known yet: once to know how large it is.
template <class Pass>
EVENSONG_INLINE void on_delayed_scale(const Call& call, int32_t from, int32_t to, int32_t stream, Pass pass) {
    DelayedScale scale(call.in[2], from, to);
    const StochasticRounding round(stream, *call.run);
    bool stores = scale.is_known();
    do {
        Largest largest;
        const float factor = stores ? scale.begin() : 0.0f;
        pass(Finish{stores ? call.out[0].i8_mut() : nullptr, factor, round, &largest});
        if (stores) {
            scale.end(largest.value());
            return;
        }
        scale.propose(largest.value());
        stores = true;
    } while (true);
}

// dx of the pixels of one phase and one group: patches of g times weights, taken as [taps, outputs] by [columns].
// row_of(k) is the row of weights of place k in the sum; cells_of(row, cells) copies a patch of `depth` cells.
template <class RowOf, class CellsOf, class ElementOf>
EVENSONG_INLINE void multiply_back(size_t depth, size_t columns, size_t pixels, char* workspace, RowOf row_of,
                                   CellsOf cells_of, ElementOf element_of, const Finish& finish) {
    const size_t groups = (depth + kGroup - 1) / kGroup, cell_stride = groups * kGroup;
    const size_t block = workspace::int8_columns(depth, columns);
    WeightCell* packed = reinterpret_cast<WeightCell*>(workspace);
    Cell* cells = reinterpret_cast<Cell*>(workspace + (2 * workspace::round_up(depth, 4) + 4) * block);
    for (size_t first = 0; first < columns; first += block) {
        const size_t width = columns - first < block ? columns - first : block;
        const Panels panels = {packed, groups};
        for (size_t g = 0; g < groups; ++g) {
            const int8_t* rows[kGroup];
            for (size_t i = 0; i < kGroup; ++i)
                rows[i] = g * kGroup + i < depth ? row_of(g * kGroup + i) + first : nullptr;
            pack_group(panels, g, rows, width);
        }
        for (size_t pixel = 0; pixel < pixels; pixel += kRows) {
            const size_t live_rows = pixels - pixel < kRows ? pixels - pixel : kRows;
            for (size_t r = 0; r < live_rows; ++r) cells_of(pixel + r, cells + r * cell_stride);
            for (size_t column = 0; column < width; column += kPanelColumns) {
                Ints sums[kRows][2];
                const Ints start[2] = {-excess_of(panels, column, groups), -excess_of(panels, column + kLanes, groups)};
                for (size_t r = 0; r < kRows; ++r) sums[r][0] = start[0], sums[r][1] = start[1];
                multiply_panel<2>(sums, cells, cell_stride, panels.at(column, 0), groups);
                Ints done[kRows][2];
                __builtin_memcpy(done, sums, sizeof sums);
                for (size_t r = 0; r < live_rows; ++r) {
                    const size_t element = element_of(pixel + r) + first + column;
                    finish(element, done[r][0], width - column);
                    if (width - column > kLanes) finish(element + kLanes, done[r][1], width - column - kLanes);
                }
            }
        }
    }
}

// dx of one channel of every group: lanes are channels.
__attribute__((noinline)) void depthwise_back(const Sizes& s, const Call& call, const Finish& finish) {
    int32_t* weights = reinterpret_cast<int32_t*>(call.workspace);  // [taps, channels]
    const size_t channels = s.channels, taps = s.taps();
    for (size_t c = 0; c < channels; ++c) {
        for (size_t t = 0; t < taps; ++t) weights[t * channels + c] = narrow_weight(call.in[1].i8()[c * taps + t]);
    }
    size_t element = 0;
    for (int32_t n = 0; n < s.images; ++n) {
        const int8_t* image = call.in[0].i8() + size_t(n) * size_t(s.out_height) * size_t(s.out_width) * channels;
        for (int32_t y = 0; y < s.height; ++y) {
            const PhaseTaps rows(s.kernel_h, s.stride_h, s.pad_top, s.dilation_h, y % s.stride_h);
            for (int32_t x = 0; x < s.width; ++x, element += channels) {
                const PhaseTaps columns(s.kernel_w, s.stride_w, s.pad_left, s.dilation_w, x % s.stride_w);
                for (size_t c = 0; c < channels; c += kLanes) {
                    const size_t live = channels - c;
                    Ints sum = {};
                    for (int32_t i = 0; i < rows.count; ++i) {
                        const int32_t p = y / s.stride_h + rows.source + i * rows.delta;
                        if (p < 0 || p >= s.out_height) continue;
                        for (int32_t j = 0; j < columns.count; ++j) {
                            const int32_t q = x / s.stride_w + columns.source + j * columns.delta;
                            if (q < 0 || q >= s.out_width) continue;
                            const size_t tap = size_t(rows.first + i * rows.step) * size_t(s.kernel_w) +
                                               size_t(columns.first + j * columns.step);
                            const size_t at = (size_t(p) * size_t(s.out_width) + size_t(q)) * channels + c;
                            const float* weight = reinterpret_cast<const float*>(weights + tap * channels + c);
                            sum = multiply_add(sum, load_bytes(image + at, live), Ints(load_upto(weight, live)));
                        }
                    }
                    finish(element + c, sum, live);
                }
            }
        }
    }
}

// dx of the pixels (a, b), (a + stride_h, b), ... of one group.
__attribute__((noinline)) void phase_back(const Sizes& s, const Call& call, size_t group, int32_t a, int32_t b,
                                          const Finish& finish) {
    const PhaseTaps rows(s.kernel_h, s.stride_h, s.pad_top, s.dilation_h, a);
    const PhaseTaps columns(s.kernel_w, s.stride_w, s.pad_left, s.dilation_w, b);
    const size_t outputs = s.out_channels / s.groups, taps_w = size_t(columns.count);
    const size_t taps = size_t(rows.count) * taps_w, depth = taps * outputs;
    const int32_t grid_h = (s.height - a + s.stride_h - 1) / s.stride_h;
    const int32_t grid_w = (s.width - b + s.stride_w - 1) / s.stride_w;
    if (grid_h <= 0 || grid_w <= 0) return;
    const size_t per_image = size_t(grid_h) * size_t(grid_w), pixels = per_image * size_t(s.images);
    const size_t first_channel = group * s.group_channels;
    const auto element_of = [&](size_t pixel) {
        const size_t y = size_t(a) + pixel % per_image / size_t(grid_w) * size_t(s.stride_h);
        const size_t x = size_t(b) + pixel % size_t(grid_w) * size_t(s.stride_w);
        return ((pixel / per_image * size_t(s.height) + y) * size_t(s.width) + x) * s.channels + first_channel;
    };
    if (!taps) {  // no window meets these pixels
        for (size_t pixel = 0; pixel < pixels; ++pixel) {
            for (size_t c = 0; c < s.group_channels; c += kLanes)
                finish(element_of(pixel) + c, Ints{}, s.group_channels - c);
        }
        return;
    }
    const int8_t *g = call.in[0].i8(), *g_end = g + call.in[0].elements;
    const int8_t* w = call.in[1].i8() + group * outputs * s.taps() * s.group_channels;
    multiply_back(
        depth, s.group_channels, pixels, call.workspace,
        [&](size_t k) {
            const size_t tap = k / outputs, o = k % outputs;
            const size_t kh = size_t(rows.first + int32_t(tap / taps_w) * rows.step);
            const size_t kw = size_t(columns.first + int32_t(tap % taps_w) * columns.step);
            return w + ((o * size_t(s.kernel_h) + kh) * size_t(s.kernel_w) + kw) * s.group_channels;
        },
        [&](size_t pixel, Cell* cells) {
            const int32_t y = int32_t(pixel % per_image / size_t(grid_w)), x = int32_t(pixel % size_t(grid_w));
            const int8_t* image =
                g + pixel / per_image * size_t(s.out_height) * size_t(s.out_width) * s.out_channels + group * outputs;
            for (int32_t i = 0; i < rows.count; ++i) {
                const int32_t p = y + rows.source + i * rows.delta;
                for (int32_t j = 0; j < columns.count; ++j, cells += outputs) {
                    const int32_t q = x + columns.source + j * columns.delta;
                    if (p < 0 || p >= s.out_height || q < 0 || q >= s.out_width) {
                        fill_cells(cells, 0, outputs);
                    } else {
                        const size_t at = (size_t(p) * size_t(s.out_width) + size_t(q)) * s.out_channels;
                        copy_cells(cells, image + at, g_end, outputs);
                    }
                }
            }
        },
        element_of, finish);
}

Fault input_gradient(const Call& call, const Sizes& s, const Attribute* a) {
    on_delayed_scale(call, a[0].i, a[1].i, a[2].i, [&](const Finish& finish) {
        if (s.is_depthwise()) {
            depthwise_back(s, call, finish);
            return;
        }
        for (size_t group = 0; group < s.groups; ++group) {
            for (int32_t i = 0; i < s.stride_h; ++i) {
                for (int32_t j = 0; j < s.stride_w; ++j) phase_back(s, call, group, i, j, finish);
            }
        }
    });
    return Fault::kNone;
}

Fault linear_input(const Call& call) {
    const Operand& w = call.in[1];
    return input_gradient(call, Sizes(call.in[0].elements / w.dims[0], w), call.attr);
}

Fault conv2d_input(const Call& call) {
    return input_gradient(call, Sizes(call.out[0], call.in[1], call.in[0], call.attr), call.attr + 7);
}

// ------------------------------------------------------------------------------------------------- steps of weights

// One step of stochastic gradient descent on int8 weights, in units of their own grid.
struct Step {
    int8_t *w, *residual;  // the second may be null
    const float* w_scale;
    float rate, unit, decay;
    StochasticRounding round;

    Step(const Call& call, int32_t from, int32_t x, float weight_decay, int32_t stream)
        : w(call.in[0].i8_mut()),
          residual(call.inputs > 6 ? call.in[6].i8_mut() : nullptr),
          w_scale(call.in[3].f32()),
          rate(call.run->learning_rate),
          unit(call.in[5].f32()[2 * from] * call.in[4].f32()[x]),
          decay(rate * weight_decay),
          round(stream, *call.run, 254.0f) {}

    float factor(size_t output) const { return (rate * unit) / (w_scale[output] * w_scale[output]); }

    // `live` weights of one output from element `at` on.
    __attribute__((always_inline)) void operator()(size_t at, Ints sum, float factor, size_t live) const {
        const Ints stored = load_bytes(w + at, live);
        const Floats step = to_float(sum) * factor + to_float(stored) * decay;
        if (!residual) {
            store_bytes(w + at, bounded(stored - round(step, at), -127, 127), live);
            return;
        }
        Floats fine = step * 256.0f;
        fine = Floats(Ints(fine) & (fine == fine));
        fine = minimum(maximum(fine, splat(-65024.0f)), splat(65024.0f));
        const Ints moved = Ints(fine + kRoundingBias) - int32_t(0x4b400000);
        const Ints whole = bounded(stored * 256 + load_bytes(residual + at, live) - moved, -32640, 32639);
        const Ints high = (whole + 128) >> 8;
        store_bytes(w + at, high, live);
        store_bytes(residual + at, whole - high * 256, live);
    }

  private:
    static __attribute__((always_inline)) Ints bounded(Ints v, int32_t lo, int32_t hi) {
        v = v < lo ? splat(lo) : v;
        return v > hi ? splat(hi) : v;
    }
};

// Gradients of some pixels, turned: cells [outputs, pixels].
__attribute__((noinline)) void turn_gradients(const int8_t* g, size_t stride, size_t pixels, size_t outputs,
                                              Cell* cells) {
#if defined(EVENSONG_UNSIGNED_DOT)
    constexpr int32_t kOffset = int32_t(0x80808080);
#else
    constexpr int32_t kOffset = 0;
#endif
    for (size_t m = 0; m < pixels; m += kGroup) {
        const int8_t* rows[kGroup] = {};
        for (size_t i = 0; i < kGroup && m + i < pixels; ++i) rows[i] = g + (m + i) * stride;
        for (size_t o = 0; o < outputs; o += 16) {
            Bytes16 bytes[kGroup];
            Ints4 lanes[4];
            load_rows(rows, o, outputs - o, bytes);
            interleave(bytes, lanes);
            for (size_t i = 0; i < 16 && o + i < outputs; ++i) {
                store_as(cells + (o + i) * kPixels + m, lanes[i / 4][i % 4] ^ kOffset);
            }
        }
    }
}

// All pixels of one group: sums over them for a block of columns at a time, then the step. rows_of(pixel, count,
// buffer, rows) gives `count` rows of x, whole patches; columns beyond a patch do not exist.
template <class RowsOf>
EVENSONG_INLINE void step_group(const Call& call, const Step& step, const int8_t* g, size_t g_stride, size_t outputs,
                                size_t first_output, size_t columns, size_t pixels, int32_t zero_point,
                                RowsOf rows_of) {
    const size_t block = workspace::gradient_columns(outputs, columns);
    int32_t* sums = reinterpret_cast<int32_t*>(call.workspace);  // [outputs, block]
    int32_t* excess = sums + outputs * block;                    // [block]
    int32_t* totals = excess + block;                            // [outputs]: of the gradients
    WeightCell* packed = reinterpret_cast<WeightCell*>(totals + workspace::round_up(outputs, 16));
    Cell* cells = reinterpret_cast<Cell*>(packed + kPixels * block);
    int8_t* patches = reinterpret_cast<int8_t*>(cells + (outputs + kRows) * kPixels);
    const bool is_one_block = pixels <= kPixels;
    if (is_one_block) turn_gradients(g, g_stride, pixels, outputs, cells);
    for (size_t o = 0; o < outputs; o += kLanes) {
        Ints total = {};
        for (size_t m = 0; m < pixels; ++m) total += load_bytes(g + m * g_stride + o, outputs - o);
        for (size_t lane = 0; lane < kLanes && o + lane < outputs; ++lane) totals[o + lane] = total[lane];
    }
    for (size_t first = 0; first < columns; first += block) {
        const size_t width = columns - first < block ? columns - first : block;
        __builtin_memset(sums, 0, (outputs + 1) * block * sizeof(int32_t));
        for (size_t pixel = 0; pixel < pixels; pixel += kPixels) {
            const size_t live = pixels - pixel < kPixels ? pixels - pixel : kPixels;
            const size_t groups = (live + kGroup - 1) / kGroup;
            const Panels panels = {packed, groups};
            for (size_t group = 0; group < groups; ++group) {
                const size_t m = group * kGroup, count = live - m < kGroup ? live - m : kGroup;
                const int8_t* rows[kGroup] = {};
                rows_of(pixel + m, count, patches, rows);
                for (size_t i = 0; i < count; ++i) rows[i] += first;
                pack_group(panels, group, rows, width);
            }
            if (!is_one_block) turn_gradients(g + pixel * g_stride, g_stride, live, outputs, cells);
            for (size_t column = 0; column < width; column += kLanes) {
                store_as(excess + column, load_as<Ints>(excess + column) + excess_of(panels, column, groups));
            }
            for (size_t o = 0; o < outputs; o += kRows) {
                const size_t live_rows = outputs - o < kRows ? outputs - o : kRows;
                for (size_t column = 0; column < width; column += kPanelColumns) {
                    Ints tile[kRows][2] = {};
                    multiply_panel<2>(tile, cells + o * kPixels, kPixels, panels.at(column, 0), groups);
                    Ints done[kRows][2];
                    __builtin_memcpy(done, tile, sizeof tile);
                    for (size_t r = 0; r < live_rows; ++r) {
                        int32_t* to = sums + (o + r) * block + column;
                        store_as(to, load_as<Ints>(to) + done[r][0]);
                        store_as(to + kLanes, load_as<Ints>(to + kLanes) + done[r][1]);
                    }
                }
            }
        }
        for (size_t o = 0; o < outputs; ++o) {
            const float factor = step.factor(first_output + o);
            const int32_t shift = int32_t(uint32_t(zero_point) * uint32_t(totals[o]));
            for (size_t column = 0; column < width; column += kLanes) {
                const Ints sum = load_as<Ints>(sums + o * block + column) - load_as<Ints>(excess + column) - shift;
                step((first_output + o) * columns + first + column, sum, factor, width - column);
            }
        }
    }
}

// The patch of x under one output pixel, [kernel_h, kernel_w, group_channels]; padding is the zero point.
__attribute__((noinline)) const int8_t* patch_of(const Sizes& s, const int8_t* x, int8_t zero_point, size_t group,
                                                 size_t pixel, int8_t* buffer) {
    const uint32_t at = uint32_t(pixel), width = uint32_t(s.out_width), height = uint32_t(s.out_height);
    const int32_t top = int32_t(at / width % height) * s.stride_h - s.pad_top;
    const int32_t left = int32_t(at % width) * s.stride_w - s.pad_left;
    const size_t part = s.group_channels, line = size_t(s.width) * s.channels;
    const int8_t* image = x + size_t(at / width / height) * size_t(s.height) * line + group * part;
    if (s.taps() == 1 && top >= 0 && top < s.height && left >= 0 && left < s.width) {
        return image + size_t(top) * line + size_t(left) * s.channels;
    }
    // Taps [begin, end) of a line lie in the image; they are one run where nothing lies between them.
    int32_t begin = 0, end = s.kernel_w;
    while (begin < end && left + begin * s.dilation_w < 0) ++begin;
    while (end > begin && left + (end - 1) * s.dilation_w >= s.width) --end;
    const bool is_run = s.dilation_w == 1 && part == s.channels;
    const size_t run = is_run ? size_t(end - begin) * part : part;
    int8_t* to = buffer;
    for (int32_t i = 0; i < s.kernel_h; ++i, to += size_t(s.kernel_w) * part) {
        const int32_t row = top + i * s.dilation_h;
        const bool is_inside = row >= 0 && row < s.height;
        if (!is_inside || begin > 0 || end < s.kernel_w) {
            __builtin_memset(to, zero_point, size_t(s.kernel_w) * part);
            if (!is_inside) continue;
        }
        for (int32_t j = begin; j < end; j += is_run ? end - begin : 1) {
            const int8_t* from = image + size_t(row) * line + size_t(left + j * s.dilation_w) * s.channels;
            int8_t* out = to + size_t(j) * part;
            if (run < 16) {  // a call would cost more
                for (size_t k = 0; k < run; ++k) out[k] = from[k];
            } else {
                __builtin_memcpy(out, from, run);
            }
        }
    }
    return buffer;
}

// One input and one output channel a group: lanes are channels, a tap at a time.
__attribute__((noinline)) void depthwise_update(const Sizes& s, const Call& call, const Step& step) {
    const size_t channels = s.channels, taps = s.taps();
    int32_t* sums = reinterpret_cast<int32_t*>(call.workspace);  // [channels, taps], as the weights lie
    const int32_t zero_point = call.in[2].zero_point;
    for (size_t tap = 0; tap < taps; ++tap) {
        const int32_t down = int32_t(tap / size_t(s.kernel_w)) * s.dilation_h - s.pad_top;
        const int32_t across = int32_t(tap % size_t(s.kernel_w)) * s.dilation_w - s.pad_left;
        for (size_t c = 0; c < channels; c += kLanes) {
            const size_t live = channels - c;
            Ints sum = {};
            for (int32_t n = 0; n < s.images; ++n) {
                for (int32_t p = 0; p < s.out_height; ++p) {
                    const int32_t row = p * s.stride_h + down;
                    if (row < 0 || row >= s.height) continue;
                    const int8_t* g = call.in[1].i8() +
                                      (size_t(n) * size_t(s.out_height) + size_t(p)) * size_t(s.out_width) * channels +
                                      c;
                    const int8_t* x =
                        call.in[2].i8() + (size_t(n) * size_t(s.height) + size_t(row)) * size_t(s.width) * channels + c;
                    for (int32_t q = 0; q < s.out_width; ++q) {
                        const int32_t column = q * s.stride_w + across;
                        if (column < 0 || column >= s.width) continue;
                        const Ints value = load_bytes(x + size_t(column) * channels, live) - zero_point;
                        sum += value * load_bytes(g + size_t(q) * channels, live);
                    }
                }
            }
            for (size_t lane = 0; lane < kLanes && lane < live; ++lane) sums[(c + lane) * taps + tap] = sum[lane];
        }
    }
    for (size_t c = 0; c < channels; ++c) {
        for (size_t t = 0; t < taps; t += kLanes) {
            const Ints sum = Ints(load_upto(reinterpret_cast<const float*>(sums + c * taps + t), taps - t));
            step(c * taps + t, sum, step.factor(c), taps - t);
        }
    }
}

Fault weight_update(const Call& call, const Sizes& s, const Attribute* a) {
    const Step step(call, a[0].i, a[1].i, a[2].f, a[3].i);
    if (s.is_depthwise()) {
        depthwise_update(s, call, step);
        return Fault::kNone;
    }
    const size_t outputs = s.out_channels / s.groups, columns = s.taps() * s.group_channels;
    const int32_t zero_point = call.in[2].zero_point;
    const int8_t* x = call.in[2].i8();
    for (size_t group = 0; group < s.groups; ++group) {
        step_group(call, step, call.in[1].i8() + group * outputs, s.out_channels, outputs, group * outputs, columns,
                   call.in[1].elements / s.out_channels, zero_point,
                   [&](size_t pixel, size_t count, int8_t* buffer, const int8_t** rows) {
                       for (size_t i = 0; i < count; ++i) {
                           rows[i] = patch_of(s, x, int8_t(zero_point), group, pixel + i, buffer + i * columns);
                       }
                   });
    }
    return Fault::kNone;
}

Fault linear_update(const Call& call) {
    const Operand& w = call.in[0];
    return weight_update(call, Sizes(call.in[1].elements / w.dims[0], w), call.attr);
}

Fault conv2d_update(const Call& call) {
    return weight_update(call, Sizes(call.in[2], call.in[0], call.in[1], call.attr), call.attr + 7);
}

}  // namespace

void register_int8_gradient(Kernel* table) {
    table[op::G_LINEAR_INPUT] = linear_input;
    table[op::G_CONV2D_INPUT] = conv2d_input;
    table[op::G_LINEAR_UPDATE] = linear_update;
    table[op::G_CONV2D_UPDATE] = conv2d_update;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
