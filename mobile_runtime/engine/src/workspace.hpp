// How much packing workspace an operation may use: protos/evensong/wire/workspace.py in C++. A test holds the two
// equal.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace evensong {
namespace workspace {

constexpr uint64_t kPanel = 32;                   // columns of the widest panel that any instruction set packs
constexpr uint64_t kDepth = 256;                  // rows of a panel packed at a time where not all are needed
constexpr uint64_t kDotRows = 32;                 // a LINEAR with at most this many rows packs nothing
constexpr uint64_t kPatchElements = 24 * 1024;    // elements of one block of patches ...
constexpr uint64_t kLeastPatches = 16;            // ... but never fewer patches than this
constexpr uint64_t kMostPatches = 256;            // ... nor more
constexpr uint64_t kWeightElements = 256 * 1024;  // elements of one block of packed weights, if one panel fits

constexpr uint64_t kSequences = 48;       // examples that a recurrent layer takes at a time
constexpr uint64_t kDotSequences = 4;     // a recurrent layer with at most this many reads its weight in place
constexpr uint64_t kSparseRows = 32;      // rows of x that a product with a sparse dy takes at a time
constexpr uint64_t kSparseColumns = 256;  // columns of x, and of dy

constexpr uint64_t kQueries = 48;     // queries that attention takes at a time
constexpr uint64_t kChannelSums = 4;  // numbers for each channel that a group norm keeps

constexpr uint64_t kInt8Weights = 64 * 1024;  // weights of one packed block of an int8 product, if one panel fits
constexpr uint64_t kInt8Rows = 8;             // rows of patches that the int8 product takes at a time
constexpr uint64_t kInt8Slack = 192;          // bytes that whole vectors may run over the last row

constexpr uint64_t kGradientPixels = 64;        // pixels that a step of int8 weights sums at a time
constexpr uint64_t kGradientSums = 64 * 1024;   // sums that it holds, if one panel of all outputs fits
constexpr uint64_t kMostGradientColumns = 512;  // weights of one output that it takes at a time

constexpr uint64_t round_up(uint64_t size, uint64_t multiple) { return (size + multiple - 1) / multiple * multiple; }
constexpr uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }
constexpr uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
constexpr uint64_t greatest_common_divisor(uint64_t a, uint64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

// Elements from one row of a block of patches to the next: whole panels, and an odd number of cache lines.
constexpr uint64_t patch_stride(uint64_t depth) { return round_up(depth, kPanel) + kPanel / 2; }

constexpr uint64_t patch_rows(uint64_t depth, uint64_t pixels) {
    return smaller(pixels, larger(kLeastPatches, smaller(kMostPatches, kPatchElements / patch_stride(depth))));
}

constexpr uint64_t patch_elements(uint64_t depth, uint64_t pixels) {
    return patch_stride(depth) * patch_rows(depth, pixels);
}

// Columns of weights packed at a time: a multiple of kPanel.
constexpr uint64_t weight_columns(uint64_t depth, uint64_t columns) {
    return smaller(round_up(columns, kPanel), larger(kPanel, kWeightElements / depth / kPanel * kPanel));
}

constexpr uint64_t weight_elements(uint64_t depth, uint64_t columns) { return depth * weight_columns(depth, columns); }

// One axis of a grid: its positions, the source's step from one to the next and from tap to tap.
struct GridAxis {
    uint64_t positions, step, taps, delta;

    constexpr uint64_t extent(uint64_t count) const { return (count - 1) * step + (taps - 1) * delta + 1; }
};

// The copy of what some pixels of a depthwise grid meet: of all, if that is not too much, or at least of one.
constexpr uint64_t depthwise_band(uint64_t images, uint64_t channels, const GridAxis& h, const GridAxis& w) {
    const uint64_t one = smaller(h.extent(1) * w.extent(1), 1 << 30) * channels;  // more does not fit any memory
    const uint64_t pixels = smaller(h.extent(h.positions) * w.extent(w.positions), kPatchElements);
    return larger(one, smaller(smaller(images * pixels, kPatchElements) * channels, kPatchElements));
}

// Places of taps, packed weights or their gradients, and the band.
constexpr uint64_t depthwise_elements(uint64_t images, uint64_t channels, const GridAxis& h, const GridAxis& w) {
    const uint64_t taps = h.taps * w.taps;
    return round_up(taps, 16) + round_up(taps * channels, 16) + depthwise_band(images, channels, h, w);
}

// LINEAR_GRAD_WEIGHT: one panel, or a block of x and the terms of a block of a sparse dy.
constexpr uint64_t linear_grad_weight_elements(uint64_t rows, uint64_t outputs, uint64_t inputs) {
    const uint64_t few = smaller(rows, kSparseRows), lists = smaller(outputs, kSparseColumns);
    return larger(kPanel * smaller(rows, kDepth),
                  few * smaller(round_up(inputs, kPanel), kSparseColumns) + round_up(lists * (2 * few + 1), 16));
}

// Columns of int8 weights packed at a time: a multiple of kPanel.
constexpr uint64_t int8_columns(uint64_t depth, uint64_t columns) {
    return smaller(round_up(columns, kPanel), larger(kPanel, kInt8Weights / round_up(depth, 4) / kPanel * kPanel));
}

// Packed int8 weights (as int16 where the CPU cannot multiply bytes), one int32 a column, and rows of patches; in
// bytes.
constexpr uint64_t int8_product_bytes(uint64_t depth, uint64_t columns) {
    return (2 * round_up(depth, 4) + 4) * int8_columns(depth, columns) +
           round_up((2 * kInt8Rows + 1) * round_up(depth, 4), 64) + kInt8Slack;
}

// A recurrent layer: packed weights, then for each example of a block its gates and a state.
constexpr uint64_t recurrent_elements(uint64_t examples, uint64_t gates, uint64_t hidden) {
    return (examples <= kDotSequences ? 0 : hidden * round_up(gates, kPanel)) +
           smaller(examples, kSequences) * (gates + hidden);
}

// Its gradient: first packed weights of one gate, then a panel and two gradients of states for each example of a block;
// and a state of zeros.
constexpr uint64_t recurrent_grad_elements(uint64_t examples, uint64_t gates, uint64_t hidden) {
    return larger(hidden * round_up(hidden, kPanel),
                  kPanel * larger(gates, kDepth) + 2 * smaller(examples, kSequences) * hidden) +
           hidden;
}

// Weights of each output that one pass of a step takes: a multiple of kPanel.
constexpr uint64_t gradient_columns(uint64_t outputs, uint64_t columns) {
    return smaller(round_up(columns, kPanel),
                   smaller(kMostGradientColumns, larger(kPanel, kGradientSums / outputs / kPanel * kPanel)));
}

// Sums and what the cells' offset adds to them, totals of the gradients, a packed panel of inputs, gradients turned,
// and a group of patches; in bytes.
constexpr uint64_t gradient_step_bytes(uint64_t outputs, uint64_t columns) {
    return 4 * ((outputs + 1) * gradient_columns(outputs, columns) + round_up(outputs, 16)) +
           2 * kGradientPixels * (gradient_columns(outputs, columns) + outputs + kInt8Rows) + 4 * columns + kInt8Slack;
}

// A matrix product: the whole right matrix packed, if it is transposed, else one panel of it.
constexpr uint64_t matmul_elements(uint64_t depth, uint64_t columns, bool is_transposed) {
    return depth * (is_transposed ? round_up(columns, kPanel) : kPanel);
}

// Attention: the keys of one head packed, a block of scores, a panel of values.
constexpr uint64_t attention_elements(uint64_t keys, uint64_t size) {
    return size * round_up(keys, kPanel) + (kQueries + kPanel) * keys;
}

// Its gradient: keys and values packed, two blocks of scores, a panel.
constexpr uint64_t attention_grad_elements(uint64_t keys, uint64_t size, uint64_t value_size) {
    return (size + value_size) * round_up(keys, kPanel) + 2 * kQueries * keys + kPanel * larger(keys, kQueries);
}

// Taps of the kernel that the pixels of one phase of the stride meet, along one axis.
constexpr uint64_t phase_taps(uint64_t kernel, uint64_t stride, uint64_t dilation) {
    uint64_t step = stride / greatest_common_divisor(stride, dilation);
    return (kernel + step - 1) / step;
}

}  // namespace workspace
}  // namespace evensong
