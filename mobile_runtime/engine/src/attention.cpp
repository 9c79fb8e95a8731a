// Batched matrix products, and attention that keeps no matrix of scores: a block of queries at a time (Milakov and
// Gimelshein 2018; Dao et al. 2022 for the gradient, which computes the scores again).
#include "sequence.hpp"
#include "workspace.hpp"

namespace evensong {
namespace {

constexpr size_t kBlock = workspace::kQueries;
constexpr size_t kMostRows = workspace::kMostPatches;

size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// Pointers to rows of a matrix, `stride` elements apart.
template <class Element, size_t kCount>
struct Pointers {
    Element* row[kCount];

    Pointers(Element* first, size_t stride, size_t count) {
        for (size_t i = 0; i < count; ++i) row[i] = first + i * stride;
    }
};

// One head of one example: where its rows start, and how far apart they are.
template <class Element>
struct Head {
    Element* first;
    size_t stride, size;

    Head(const Operand& operand, size_t example, size_t head)
        : first(static_cast<Element*>(operand.data) +
                (example * operand.dims[1] * operand.dims[2] + head) * operand.dims[3]),
          stride(size_t(operand.dims[2]) * operand.dims[3]),
          size(operand.dims[3]) {}
    Element* row(size_t index) const { return first + index * stride; }
};

using Given = Head<const float>;
using Made = Head<float>;

// The scores of a block of queries: which keys they meet, in whole panels, and which each of them may see.
struct Block {
    size_t first, count, keys, columns;
    bool is_causal;

    Block(size_t first, size_t queries, size_t keys, bool is_causal)
        : first(first), count(smaller(queries - first, kBlock)), keys(keys), columns(keys), is_causal(is_causal) {
        if (is_causal) columns = smaller(keys, size_t(workspace::round_up(first + count, workspace::kPanel)));
    }
    size_t visible(size_t row) const { return is_causal ? smaller(keys, first + row + 1) : keys; }
    // What lies behind the visible part of a row counts as zero.
    void hide(float* scores, size_t row) const {
        __builtin_memset(scores + visible(row), 0, (columns - visible(row)) * sizeof(float));
    }
};

// out[keys, size] += scores[rows, keys]^T right[rows, size]
void add_transposed(const Products& products, const Block& block, const float* scores, const Given& right, Made out,
                    float* scratch) {
    for (size_t key = 0; key < block.columns; key += kMostRows) {
        const size_t count = smaller(block.columns - key, kMostRows);
        const Pointers<float, kMostRows> rows(out.row(key), out.stride, count);
        products.by_columns(scores + key, block.keys, right.row(block.first), right.stride, block.count, rows.row,
                            count, out.size, true, scratch);
    }
}

}  // namespace

Fault matmul(const Call& call, const Products& products) {
    const Operand &a = call.in[0], &b = call.in[1], &y = call.out[0];
    const int32_t transpose = call.attr[0].i;
    const size_t rows = y.dims[y.rank - 2], columns = y.last(),
                 depth = a.dims[transpose == 1 ? a.rank - 2 : a.rank - 1];
    float* scratch = reinterpret_cast<float*>(call.workspace);
    const float *left = a.f32(), *right = b.f32();
    float* end = y.f32_mut() + y.elements;
    for (float* out = y.f32_mut(); out != end; out += rows * columns, left += rows * depth, right += depth * columns) {
        if (transpose == 2) products.pack(right, depth, columns, depth, scratch);
        for (size_t first = 0; first < rows; first += kMostRows) {
            const size_t count = smaller(rows - first, kMostRows);
            const Pointers<float, kMostRows> to(out + first * columns, columns, count);
            const Pointers<const float, kMostRows> from(left + first * depth, depth, count);
            if (transpose == 0) {
                products.by_rows(from.row, right, columns, depth, to.row, count, columns, false, scratch);
            } else if (transpose == 1) {
                products.by_columns(left + first, rows, right, columns, depth, to.row, count, columns, false, scratch);
            } else {
                products.by_panels(from.row, scratch, depth, to.row, count, columns, nullptr);
            }
        }
    }
    return Fault::kNone;
}

Fault attention(const Call& call, const Products& products, const Scores& scores) {
    const size_t queries = call.in[0].dims[1], heads = call.in[0].dims[2], keys = call.in[1].dims[1];
    const float scale = call.attr[1].f;
    float* packed = reinterpret_cast<float*>(call.workspace);
    float* weights = packed + call.in[0].last() * workspace::round_up(keys, workspace::kPanel);
    float* scratch = weights + kBlock * keys;
    float* lse = call.outputs > 1 ? call.out[1].f32_mut() : nullptr;
    for (size_t n = 0; n < call.in[0].dims[0] * heads; ++n) {
        const size_t example = n / heads, head = n % heads;
        const Given q(call.in[0], example, head), k(call.in[1], example, head), v(call.in[2], example, head);
        const Made y(call.out[0], example, head);
        products.pack(k.first, k.stride, keys, k.size, packed);
        for (size_t first = 0; first < queries; first += kBlock) {
            const Block block(first, queries, keys, call.attr[0].i);
            const Pointers<const float, kBlock> q_rows(q.row(first), q.stride, block.count);
            const Pointers<float, kBlock> rows(weights, keys, block.count), y_rows(y.row(first), y.stride, block.count);
            products.by_panels(q_rows.row, packed, q.size, rows.row, block.count, block.columns, nullptr);
            for (size_t i = 0; i < block.count; ++i) {
                const float sum = scores.soften(rows.row[i], block.visible(i), scale);
                block.hide(rows.row[i], i);
                if (lse) lse[(example * queries + first + i) * heads + head] = sum;
            }
            products.by_rows(rows.row, v.first, v.stride, block.columns, y_rows.row, block.count, v.size, false,
                             scratch);
        }
    }
    return Fault::kNone;
}

Fault attention_grad(const Call& call, const Products& products, const Scores& scores) {
    const size_t queries = call.in[1].dims[1], heads = call.in[1].dims[2], keys = call.in[2].dims[1];
    const float scale = call.attr[1].f, *lse = call.in[4].f32();
    const size_t padded = workspace::round_up(keys, workspace::kPanel);
    float* packed_keys = reinterpret_cast<float*>(call.workspace);
    float* packed_values = packed_keys + call.in[2].last() * padded;
    float* weights = packed_values + call.in[3].last() * padded;
    float* dweights = weights + kBlock * keys;
    float* scratch = dweights + kBlock * keys;
    for (size_t i = 1; i < 3; ++i) __builtin_memset(call.out[i].data, 0, call.out[i].elements * sizeof(float));
    for (size_t n = 0; n < call.in[0].dims[0] * heads; ++n) {
        const size_t example = n / heads, head = n % heads;
        const Given dy(call.in[0], example, head), q(call.in[1], example, head);
        const Given k(call.in[2], example, head), v(call.in[3], example, head);
        const Made dq(call.out[0], example, head), dk(call.out[1], example, head), dv(call.out[2], example, head);
        products.pack(k.first, k.stride, keys, k.size, packed_keys);
        products.pack(v.first, v.stride, keys, v.size, packed_values);
        for (size_t first = 0; first < queries; first += kBlock) {
            const Block block(first, queries, keys, call.attr[0].i);
            const size_t count = block.count;
            const Pointers<const float, kBlock> q_rows(q.row(first), q.stride, count);
            const Pointers<const float, kBlock> dy_rows(dy.row(first), dy.stride, count);
            const Pointers<float, kBlock> rows(weights, keys, count), drows(dweights, keys, count);
            const Pointers<float, kBlock> dq_rows(dq.row(first), dq.stride, count);
            products.by_panels(q_rows.row, packed_keys, q.size, rows.row, count, block.columns, nullptr);
            products.by_panels(dy_rows.row, packed_values, v.size, drows.row, count, block.columns, nullptr);
            for (size_t i = 0; i < count; ++i) {
                scores.soften_back(rows.row[i], drows.row[i], block.visible(i), scale,
                                   lse[(example * queries + first + i) * heads + head]);
                block.hide(rows.row[i], i);
                block.hide(drows.row[i], i);
            }
            products.by_rows(drows.row, k.first, k.stride, block.columns, dq_rows.row, count, k.size, false, scratch);
            add_transposed(products, block, dweights, q, dk, scratch);
            add_transposed(products, block, weights, dy, dv, scratch);
        }
    }
    return Fault::kNone;
}

}  // namespace evensong
