// Kernels over sequences come in two halves: drivers that only move pointers, compiled once (recurrent.cpp), and what
// they call, compiled for each instruction set (kernels_sequence.cpp). This is the line between them.
#pragma once

#include "kernel.hpp"

namespace evensong {

// Matrix products. `out` and left operands given by rows are lists of pointers, at most kMostRows of workspace.hpp.
struct Products {
    // Packs w[columns, depth], whose rows stand `stride` apart, as panels of its transpose.
    void (*pack)(const float* w, size_t stride, size_t columns, size_t depth, float* panels);
    // out[rows, columns] = left[rows, depth] panels + bias, where bias may be null
    void (*by_panels)(const float* const* left, const float* panels, size_t depth, float* const* out, size_t rows,
                      size_t columns, const float* bias);
    // out (+)= left right[depth, columns], whose rows stand `stride` apart; scratch: workspace::kPanel * depth elements
    void (*by_rows)(const float* const* left, const float* right, size_t stride, size_t depth, float* const* out,
                    size_t rows, size_t columns, bool accumulate, float* scratch);
    // out (+)= left^T right, where left[depth, rows] has rows `left_stride` apart
    void (*by_columns)(const float* left, size_t left_stride, const float* right, size_t stride, size_t depth,
                       float* const* out, size_t rows, size_t columns, bool accumulate, float* scratch);
    // out[columns] = w[columns, depth] x, without packing
    void (*by_vector)(const float* x, const float* w, size_t columns, size_t depth, float* out);
    // out[columns] = sum of x[rows, columns] over rows
    void (*sum_rows)(const float* x, size_t rows, size_t columns, float* out);
};

// ------------------------------------------------------------------------------------------------- recurrent layers

// One row of one step. Rows of gates have one part of `hidden` elements for each gate.
struct Step {
    size_t hidden;
    const float *gx, *gh, *bias;  // gh: the product of the weights with the state before
    const float* before;          // the state before, `after` the one made now
    float *gates, *after;         // gates may be gx's own memory
    float* c;                     // LSTM: c before, overwritten by the one made now
};

// One row of one step backward; dgx may be the gates' own memory.
struct StepBack {
    size_t hidden;
    const float *dy, *gates;
    const float* before;  // GRU: the state before; LSTM: c before
    float* dgx;
    float* scratch;  // GRU: the state's part of n, overwritten by its gradient; LSTM: c
    float *dh, *dc;  // the gradients that the step after hands on, overwritten by those for the step before
};

struct Cells {
    void (*gru)(const Step&);
    void (*gru_back)(const StepBack&);
    void (*lstm)(const Step&);
    void (*lstm_back)(const StepBack&);
    // c after one step, from its gates and c before
    void (*lstm_state)(const float* gates, const float* before, float* after, size_t hidden);
};

// ------------------------------------------------------------------------------------------------- attention

struct Scores {
    // row[count] = softmax(scale * row); returns the logarithm of the sum of e^(scale * row)
    float (*soften)(float* row, size_t count, float scale);
    // row = e^(scale * row - lse), the weights; drow, their gradient, becomes that of the products
    void (*soften_back)(float* row, float* drow, size_t count, float scale, float lse);
};

Fault matmul(const Call& call, const Products& products);
Fault attention(const Call& call, const Products& products, const Scores& scores);
Fault attention_grad(const Call& call, const Products& products, const Scores& scores);

Fault gru(const Call& call, const Products& products, const Cells& cells);
Fault gru_grad(const Call& call, const Products& products, const Cells& cells);
Fault lstm(const Call& call, const Products& products, const Cells& cells);
Fault lstm_grad(const Call& call, const Products& products, const Cells& cells);

}  // namespace evensong
