// GRU and LSTM over whole sequences. A block of examples goes through all time steps before the next block: per step
// one product of the states with the packed weights, then the gates element by element.
#include "sequence.hpp"
#include "workspace.hpp"

namespace evensong {
namespace {

constexpr size_t kBlock = workspace::kSequences;
constexpr size_t kMostRows = workspace::kMostPatches;

size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// Sizes, and the order of time.
struct Sequence {
    size_t examples, steps, gates, hidden;
    bool reverse;

    Sequence(const Operand& gates, size_t hidden, const Call& call)
        : examples(gates.dims[0]),
          steps(gates.dims[1]),
          gates(gates.dims[2]),
          hidden(hidden),
          reverse(call.attr[0].i != 0) {}
    size_t block() const { return smaller(examples, kBlock); }
    size_t rows() const { return examples * steps; }
    size_t row(size_t example, size_t step) const { return example * steps + (reverse ? steps - 1 - step : step); }
    size_t row_before(size_t row) const { return reverse ? row + 1 : row - 1; }
    bool is_first(size_t row) const { return row == this->row(row / steps, 0); }
};

void clear(float* values, size_t count) { __builtin_memset(values, 0, count * sizeof(float)); }

Fault forward(const Call& call, const Products& products, void (*cell)(const Step&)) {
    const Sequence q(call.in[0], call.out[1].last(), call);
    const float *gx = call.in[0].f32(), *w = call.in[1].f32();
    float *gates = call.out[0].f32_mut(), *y = call.out[1].f32_mut();
    float* gh = reinterpret_cast<float*>(call.workspace);
    float* c = gh + q.block() * q.gates;
    float* panels = c + q.block() * q.hidden;
    const bool is_packed = q.examples > workspace::kDotSequences;
    if (is_packed) products.pack(w, q.hidden, q.gates, q.hidden, panels);
    for (size_t first = 0; first < q.examples; first += kBlock) {
        const size_t count = smaller(q.examples - first, kBlock);
        clear(gh, count * q.gates);
        clear(c, count * q.hidden);
        const float* before[kBlock];
        float* out[kBlock];
        for (size_t i = 0; i < count; ++i) {
            before[i] = c;
            out[i] = gh + i * q.gates;
        }
        for (size_t step = 0; step < q.steps; ++step) {
            if (step && is_packed) products.by_panels(before, panels, q.hidden, out, count, q.gates, nullptr);
            for (size_t i = 0; i < count; ++i) {
                if (step && !is_packed) products.by_vector(before[i], w, q.gates, q.hidden, out[i]);
                const size_t row = q.row(first + i, step);
                float* after = y + row * q.hidden;
                cell({q.hidden, gx + row * q.gates, out[i], call.in[2].f32(), before[i], gates + row * q.gates, after,
                      c + i * q.hidden});
                before[i] = after;
            }
        }
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- gradients

// Some rows of the weights, and the gradients of what they gave.
struct Part {
    const float* w;
    size_t rows;
    const float* dgates;
    size_t stride;  // of dgates, from one (example, time) to the next
};

// One gradient: the packed weights of a GRU are used up before the panel and what follows it begin.
struct Gradient {
    const Call& call;
    const Products& products;
    Sequence q;
    float *packed, *panel, *dh, *dc, *zeros;

    Gradient(const Call& call, const Products& products)
        : call(call), products(products), q(call.in[1], call.in[0].last(), call) {
        packed = panel = reinterpret_cast<float*>(call.workspace);
        dh = panel + workspace::kPanel * workspace::larger(q.gates, workspace::kDepth);
        dc = dh + q.block() * q.hidden;
        zeros = packed + workspace::recurrent_grad_elements(q.examples, q.gates, q.hidden) - q.hidden;
        clear(zeros, q.hidden);
    }

    // All time steps, last to first. `states`: those that cell takes as `before`. `adds`: whether cell leaves in dh
    // what does not go through the weights.
    void steps_back(void (*cell)(const StepBack&), const float* states, const Part* parts, size_t part_count,
                    bool adds) const {
        for (size_t first = 0; first < q.examples; first += kBlock) {
            const size_t count = smaller(q.examples - first, kBlock);
            float* out[kBlock];
            for (size_t i = 0; i < count; ++i) out[i] = dh + i * q.hidden;
            clear(dh, count * q.hidden);
            clear(dc, count * q.hidden);
            for (size_t step = q.steps; step-- > 0;) {
                for (size_t i = 0; i < count; ++i) {
                    const size_t row = q.row(first + i, step);
                    const float* before = step ? states + q.row_before(row) * q.hidden : zeros;
                    cell({q.hidden, call.in[0].f32() + row * q.hidden, call.in[1].f32() + row * q.gates, before,
                          call.out[0].f32_mut() + row * q.gates, call.out[1].f32_mut() + row * q.hidden, out[i],
                          dc + i * q.hidden});
                }
                for (const Part* part = parts; step && part != parts + part_count; ++part) {
                    const float* rows[kBlock];
                    for (size_t i = 0; i < count; ++i) rows[i] = part->dgates + q.row(first + i, step) * part->stride;
                    products.by_rows(rows, part->w, q.hidden, part->rows, out, count, q.hidden, adds || part != parts,
                                     panel);
                }
            }
        }
    }

    // dw[part.rows, hidden] = dgates^T times the states before, sequence by sequence.
    void weights(const Part& part, const float* y, float* dw) const {
        if (q.steps == 1) return clear(dw, part.rows * q.hidden);
        const size_t left_first = q.reverse ? 0 : 1, right_first = 1 - left_first;
        for (size_t first = 0; first < part.rows; first += kMostRows) {
            const size_t count = smaller(part.rows - first, kMostRows);
            float* out[kMostRows];
            for (size_t i = 0; i < count; ++i) out[i] = dw + (first + i) * q.hidden;
            for (size_t example = 0; example < q.examples; ++example) {
                for (size_t step = 0; step + 1 < q.steps; step += workspace::kDepth) {
                    const size_t row = example * q.steps + step;
                    products.by_columns(part.dgates + (row + left_first) * part.stride + first, part.stride,
                                        y + (row + right_first) * q.hidden, q.hidden,
                                        smaller(q.steps - 1 - step, workspace::kDepth), out, count, q.hidden, row > 0,
                                        panel);
                }
            }
        }
    }
};

}  // namespace

Fault gru(const Call& call, const Products& products, const Cells& cells) { return forward(call, products, cells.gru); }

Fault lstm(const Call& call, const Products& products, const Cells& cells) {
    return forward(call, products, cells.lstm);
}

Fault gru_grad(const Call& call, const Products& products, const Cells& cells) {
    const Gradient g(call, products);
    const Sequence& q = g.q;
    const float *y = call.in[2].f32(), *w = call.in[3].f32(), *dgx = call.out[0].f32();
    float* dn = call.out[1].f32_mut();
    // The states' part of n again, for all steps at once: cheaper than to keep it from the forward pass.
    const size_t first_n = 2 * q.hidden;
    products.pack(w + first_n * q.hidden, q.hidden, q.hidden, q.hidden, g.packed);
    for (size_t first = 0; first < q.rows(); first += kMostRows) {
        const size_t count = smaller(q.rows() - first, kMostRows);
        const float* before[kMostRows];
        float* out[kMostRows];
        for (size_t i = 0; i < count; ++i) {
            const size_t row = first + i;
            before[i] = q.is_first(row) ? g.zeros : y + q.row_before(row) * q.hidden;
            out[i] = dn + row * q.hidden;
        }
        products.by_panels(before, g.packed, q.hidden, out, count, q.hidden, call.in[4].f32() + first_n);
    }
    const Part parts[] = {{w, first_n, dgx, q.gates}, {w + first_n * q.hidden, q.hidden, dn, q.hidden}};
    g.steps_back(cells.gru_back, y, parts, 2, true);
    if (call.outputs > 2) {
        g.weights(parts[0], y, call.out[2].f32_mut());
        g.weights(parts[1], y, call.out[2].f32_mut() + first_n * q.hidden);
    }
    if (call.outputs > 3) {
        products.sum_rows(dgx, q.rows(), q.gates, call.out[3].f32_mut());
        products.sum_rows(dn, q.rows(), q.hidden, call.out[3].f32_mut() + first_n);
    }
    return Fault::kNone;
}

Fault lstm_grad(const Call& call, const Products& products, const Cells& cells) {
    const Gradient g(call, products);
    const Sequence& q = g.q;
    const float *gates = call.in[1].f32(), *dgx = call.out[0].f32();
    float* c = call.out[1].f32_mut();
    for (size_t example = 0; example < q.examples; ++example) {  // c again, as above
        const float* before = g.zeros;
        for (size_t step = 0; step < q.steps; ++step) {
            const size_t row = q.row(example, step);
            cells.lstm_state(gates + row * q.gates, before, c + row * q.hidden, q.hidden);
            before = c + row * q.hidden;
        }
    }
    const Part all = {call.in[3].f32(), q.gates, dgx, q.gates};
    g.steps_back(cells.lstm_back, c, &all, 1, false);
    if (call.outputs > 2) g.weights(all, call.in[2].f32(), call.out[2].f32_mut());
    if (call.outputs > 3) products.sum_rows(dgx, q.rows(), q.gates, call.out[3].f32_mut());
    return Fault::kNone;
}

}  // namespace evensong
