// LINEAR and its gradients, float32.
#include "gemm.hpp"
#include "kernel.hpp"
#include "sparse.hpp"

namespace evensong {
namespace EVENSONG_ISA {

bool all_finite(const float* values, size_t count);  // kernels.cpp

namespace {

constexpr size_t kDepth = workspace::kDepth;

// Calls body(first row, rows, pointers to those rows of `matrix`) for blocks of rows.
template <class Element, class Body>
EVENSONG_INLINE void for_blocks_of_rows(Element* matrix, size_t stride, size_t rows, Body body) {
    for (size_t first = 0; first < rows; first += kMostRows) {
        const size_t count = rows - first < kMostRows ? rows - first : kMostRows;
        Element* pointers[kMostRows];
        for (size_t i = 0; i < count; ++i) pointers[i] = matrix + (first + i) * stride;
        body(first, count, pointers);
    }
}

EVENSONG_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// y[M,O] = act(x[M,I] w[O,I]^T + b[O])
Fault linear(const Call& call) {
    const Operand &x = call.in[0], &w = call.in[1], &y = call.out[0];
    const float* bias = call.inputs > 2 ? call.in[2].f32() : nullptr;
    const size_t depth = x.last(), rows = x.elements / depth, columns = y.last();
    const int32_t kind = call.attr[0].i;
    if (rows <= workspace::kDotRows) {
        multiply_by_dots(x.f32(), w.f32(), rows, columns, depth, y.f32_mut(), bias, kind);
        return Fault::kNone;
    }
    float* panel = reinterpret_cast<float*>(call.workspace);
    for (size_t j = 0; j < columns; j += kPanelColumns) {
        const size_t live = smaller(columns - j, kPanelColumns);
        for (size_t k = 0; k < depth; k += kDepth) {
            const size_t deep = smaller(depth - k, kDepth);
            const bool is_last = k + deep == depth;
            pack_panel_transposed(w.f32() + j * depth + k, depth, deep, live, panel);
            const Epilogue epilogue = {is_last && bias ? bias + j : nullptr, is_last ? kind : activation::NONE, k > 0};
            for_blocks_of_rows(x.f32() + k, depth, rows, [&](size_t first, size_t count, const float* const* x_rows) {
                float* y_rows[kMostRows];
                for (size_t i = 0; i < count; ++i) y_rows[i] = y.f32_mut() + (first + i) * columns + j;
                multiply_panel(Rows{x_rows}, panel, panel_width(live), deep, y_rows, count, 0, live, epilogue);
            });
        }
    }
    return Fault::kNone;
}

// dx[M,I] = dy[M,O] w[O,I]
Fault linear_grad_input(const Call& call) {
    const Operand &dy = call.in[0], &w = call.in[1], &dx = call.out[0];
    const size_t depth = dy.last(), rows = dy.elements / depth, columns = dx.last();
    float* scratch = reinterpret_cast<float*>(call.workspace);
    for (size_t k = 0; k < depth; k += kDepth) {
        const size_t deep = smaller(depth - k, kDepth);
        for_blocks_of_rows(dy.f32() + k, depth, rows, [&](size_t first, size_t count, const float* const* dy_rows) {
            float* dx_rows[kMostRows];
            for (size_t i = 0; i < count; ++i) dx_rows[i] = dx.f32_mut() + (first + i) * columns;
            Epilogue epilogue;
            epilogue.accumulate = k > 0;
            multiply_in_place(Rows{dy_rows}, w.f32() + k * columns, columns, deep, dx_rows, count, columns, epilogue,
                              scratch);
        });
    }
    return Fault::kNone;
}

// multiply_transposed() below for a sparse dy. A block of x is copied, so that it stays in the first-level cache while
// all rows of `out` are made from it.
void multiply_sparse(const Operand& dy, const Operand& x, float* out, bool accumulate, float scale, float* workspace) {
    constexpr size_t kColumns = workspace::kSparseColumns / kWidestRun * kWidestRun;
    const size_t outputs = dy.last(), rows = dy.elements / outputs, columns = x.last();
    const size_t few = smaller(rows, workspace::kSparseRows), most_lists = smaller(outputs, workspace::kSparseColumns);
    const size_t room = workspace::round_up(most_lists * (2 * few + 1), 16), stride = smaller(columns, kColumns);
    TermLists terms(workspace, room, most_lists);
    float* block = workspace + room;
    uint32_t places[workspace::kSparseRows];
    for (size_t i = 0; i < few; ++i) places[i] = uint32_t(i * stride);
    const float* gradients[workspace::kSparseRows];
    for (size_t k = 0; k < rows; k += few) {
        const size_t deep = smaller(rows - k, few);
        for (size_t first = 0; first < outputs; first += most_lists) {
            const size_t lists = smaller(outputs - first, most_lists);
            for (size_t i = 0; i < deep; ++i) gradients[i] = dy.f32() + (k + i) * outputs + first;
            terms.count(gradients, deep, lists);
            terms.by_column(gradients, deep, lists, places);
            for (size_t j = 0; j < columns; j += kColumns) {
                const size_t width = smaller(columns - j, kColumns);
                for (size_t i = 0; i < deep; ++i) {
                    copy_floats(block + places[i], x.f32() + (k + i) * columns + j, width);
                }
                for (size_t o = 0; o < lists; ++o) {
                    add_terms(terms.list(o), block, out + (first + o) * columns + j, width, accumulate || k > 0, scale);
                }
            }
        }
    }
}

// out[O,I] = dy[M,O]^T x[M,I], or with `accumulate` out += scale * dy^T x
void multiply_transposed(const Operand& dy, const Operand& x, float* out, bool accumulate, float scale,
                         char* workspace) {
    const size_t rows = dy.last(), depth = dy.elements / rows, columns = x.last();
    float* scratch = reinterpret_cast<float*>(workspace);
    if (!kIsSmall && 4 * count_nonzeros(dy.f32(), dy.elements) <= 3 * dy.elements)
        return multiply_sparse(dy, x, out, accumulate, scale, scratch);
    for (size_t k = 0; k < depth; k += kDepth) {
        const size_t deep = smaller(depth - k, kDepth);
        for_blocks_of_rows(out, columns, rows, [&](size_t first, size_t count, float* const* out_rows) {
            const Columns left = {dy.f32() + k * rows + first, rows};
            Epilogue epilogue;
            epilogue.accumulate = accumulate || k > 0;
            epilogue.scale = scale;
            multiply_in_place(left, x.f32() + k * columns, columns, deep, out_rows, count, columns, epilogue, scratch);
        });
    }
}

// dw[O,I] = dy^T x; db[O] = sum of dy over rows
Fault linear_grad_weight(const Call& call) {
    const Operand& dy = call.in[0];
    multiply_transposed(dy, call.in[1], call.out[0].f32_mut(), false, 1.0f, call.workspace);
    if (call.outputs > 1) bias_gradient(dy.f32(), dy.elements / dy.last(), dy.last(), call.out[1].f32_mut());
    return Fault::kNone;
}

// The largest magnitude; infinite or NaN if any element is: as integers, magnitudes stand in the order finite,
// infinity, NaN.
float largest(const Operand& x) {
    Ints most = {};
    for (size_t i = 0; i < x.elements; i += kLanes) {
        const Ints v = Ints(absolute(load_upto(x.f32() + i, x.elements - i)));
        most = v > most ? v : most;
    }
    int32_t best = 0;
    for (size_t lane = 0; lane < kLanes; ++lane) best = most[lane] > best ? most[lane] : best;
    float magnitude;
    __builtin_memcpy(&magnitude, &best, sizeof magnitude);
    return magnitude;
}

// w -= learning_rate (dy^T x + weight_decay w). |dy^T x| is at most M max|dy| max|x|: where that is far inside the
// range of float32, a finite w stays finite and is not read once more.
Fault linear_update(const Call& call) {
    const Operand &w = call.in[0], &dy = call.in[1], &x = call.in[2];
    const float learning_rate = call.run->learning_rate, keep = 1.0f - learning_rate * call.attr[0].f;
    const float bound = float(dy.elements / dy.last()) * largest(dy) * largest(x);
    const bool surely_finite = bound < 1e30f && bound * learning_rate < 1e30f && keep >= -1.0f && keep <= 1.0f;
    if (keep != 1.0f) {
        for (size_t i = 0; i < w.elements; i += kLanes) {
            const size_t live = w.elements - i;
            store_upto(w.f32_mut() + i, load_upto(w.f32() + i, live) * keep, live);
        }
    }
    multiply_transposed(dy, x, w.f32_mut(), true, -learning_rate, call.workspace);
    return surely_finite || all_finite(w.f32(), w.elements) ? Fault::kNone : Fault::kNotFinite;
}

}  // namespace

void register_linear(Kernel* table);
void register_linear(Kernel* table) {
    table[op::LINEAR] = linear;
    table[op::LINEAR_GRAD_INPUT] = linear_grad_input;
    table[op::LINEAR_GRAD_WEIGHT] = linear_grad_weight;
    table[op::LINEAR_UPDATE] = linear_update;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
