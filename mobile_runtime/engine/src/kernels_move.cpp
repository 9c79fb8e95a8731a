// Operations that move elements without looking at them (any dtype), and embeddings.

#include "kernel.hpp"
#include "opcodes.h"
#include "vec.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

size_t item_bytes(const Operand& operand) {
    return operand.dtype == DType::kF32 || operand.dtype == DType::kI32 ? 4 : 1;
}

const char* bytes_of(const Operand& operand) { return static_cast<const char*>(operand.data); }
char* bytes_of_mut(const Operand& operand) { return static_cast<char*>(operand.data); }

void copy_bytes(char* to, const char* from, size_t count) { __builtin_memcpy(to, from, count); }

Fault copy(const Call& call) {
    copy_bytes(bytes_of_mut(call.out[0]), bytes_of(call.in[0]), call.out[0].elements * item_bytes(call.out[0]));
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- along one axis

// A tensor seen as [outer, axis, inner], in bytes: `row` is one step of `outer`, `step` one of the axis.
struct AxisView {
    size_t outer = 1, step, row;

    AxisView(const Operand& operand, uint32_t axis) : step(item_bytes(operand)) {
        for (uint32_t i = 0; i < operand.rank; ++i) {
            if (i < axis) outer *= operand.dims[i];
            if (i > axis) step *= operand.dims[i];
        }
        row = step * operand.dims[axis];
    }
};

Fault concat(const Call& call) {
    const uint32_t axis = uint32_t(call.attr[0].i);
    const AxisView whole(call.out[0], axis);
    char* to = bytes_of_mut(call.out[0]);
    for (uint32_t k = 0; k < call.inputs; ++k) {
        const AxisView part(call.in[k], axis);
        const char* from = bytes_of(call.in[k]);
        for (size_t o = 0; o < part.outer; ++o) copy_bytes(to + o * whole.row, from + o * part.row, part.row);
        to += part.row;
    }
    return Fault::kNone;
}

Fault slice(const Call& call) {
    const uint32_t axis = uint32_t(call.attr[0].i);
    const AxisView whole(call.in[0], axis), part(call.out[0], axis);
    const char* from = bytes_of(call.in[0]) + size_t(call.attr[1].i) * whole.step;
    char* to = bytes_of_mut(call.out[0]);
    for (size_t o = 0; o < part.outer; ++o) copy_bytes(to + o * part.row, from + o * whole.row, part.row);
    return Fault::kNone;
}

Fault slice_grad(const Call& call) {
    const uint32_t axis = uint32_t(call.attr[0].i);
    const AxisView part(call.in[0], axis), whole(call.out[0], axis);
    const size_t before = size_t(call.attr[1].i) * whole.step, after = whole.row - before - part.row;
    const char* from = bytes_of(call.in[0]);
    char* to = bytes_of_mut(call.out[0]);
    for (size_t o = 0; o < whole.outer; ++o, to += whole.row) {
        __builtin_memset(to, 0, before);
        copy_bytes(to + before, from + o * part.row, part.row);
        __builtin_memset(to + before + part.row, 0, after);
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- transpose

// One axis of the output: how many steps it has and how far a step goes in the input and in the output, in elements.
struct Axis {
    size_t count, from, to;
};

// y[i * to_rows + j * to_columns] = x[i * rows.from + j * columns.from], in square tiles that stay in the first-level
// cache.
template <class Item>
void transpose_plane(const Item* x, Item* y, const Axis& rows, const Axis& columns) {
    constexpr size_t kTile = 16;
    for (size_t i0 = 0; i0 < rows.count; i0 += kTile) {
        const size_t i1 = rows.count - i0 < kTile ? rows.count : i0 + kTile;
        for (size_t j0 = 0; j0 < columns.count; j0 += kTile) {
            const size_t j1 = columns.count - j0 < kTile ? columns.count : j0 + kTile;
            for (size_t i = i0; i < i1; ++i) {
                for (size_t j = j0; j < j1; ++j) y[i * rows.to + j * columns.to] = x[i * rows.from + j * columns.from];
            }
        }
    }
}

Fault transpose(const Call& call) {
    const Operand &x = call.in[0], &y = call.out[0];
    size_t strides[6], stride = 1;
    for (uint32_t i = x.rank; i-- > 0; stride *= x.dims[i]) strides[i] = stride;

    // The output's axes, outermost first; neighbours that are neighbours in the input too become one.
    Axis axes[8] = {{1, 0, 0}, {1, 0, 0}};
    size_t used = 2, place = 1;
    for (uint32_t i = y.rank; i-- > 0; place *= y.dims[i]) {
        const Axis axis = {y.dims[i], strides[call.attr[i].i], place};
        if (axis.count == 1) continue;
        Axis& inner = axes[used - 1];  // filled from the innermost outwards
        if (used > 2 && axis.from == inner.from * inner.count) {
            inner.count *= axis.count;
        } else {
            axes[used++] = axis;
        }
    }
    // The plane that is walked in tiles: the output's innermost axis and the input's innermost.
    size_t innermost = used > 2 ? 2 : 0, partner = 1;
    for (size_t k = 3; k < used; ++k) {
        if (axes[k].from == 1) partner = k;
    }
    if (partner == 1 && used > 3) partner = 3;
    const Axis columns = axes[innermost], rows = axes[partner];
    axes[innermost].count = axes[partner].count = 1;

    const bool whole_runs = columns.from == 1;
    size_t counter[8] = {}, from = 0, to = 0;
    for (;;) {
        const size_t item = item_bytes(x);
        if (whole_runs) {
            for (size_t i = 0; i < rows.count; ++i) {
                copy_bytes(bytes_of_mut(y) + (to + i * rows.to) * item, bytes_of(x) + (from + i * rows.from) * item,
                           columns.count * item);
            }
        } else if (item == 4) {
            transpose_plane(x.i32() + from, y.i32_mut() + to, rows, columns);
        } else {
            transpose_plane(x.i8() + from, y.i8_mut() + to, rows, columns);
        }
        size_t k = 2;  // the next place of the odometer over the other axes
        for (; k < used; ++k) {
            from += axes[k].from;
            to += axes[k].to;
            if (++counter[k] < axes[k].count) break;
            from -= axes[k].from * axes[k].count;
            to -= axes[k].to * axes[k].count;
            counter[k] = 0;
        }
        if (k == used) return Fault::kNone;
    }
}

// ------------------------------------------------------------------------------------------------- embedding

EVENSONG_INLINE bool outside(int32_t id, size_t rows) { return id < 0 || size_t(id) >= rows; }

Fault embedding(const Call& call) {
    const int32_t* ids = call.in[0].i32();
    const size_t count = call.in[0].elements, rows = call.in[1].dims[0], columns = call.in[1].dims[1];
    float* y = call.out[0].f32_mut();
    for (size_t i = 0; i < count; ++i, y += columns) {
        if (outside(ids[i], rows)) return Fault::kIndexOutOfRange;
        __builtin_memcpy(y, call.in[1].f32() + size_t(ids[i]) * columns, columns * sizeof *y);
    }
    return Fault::kNone;
}

Fault embedding_grad(const Call& call) {
    const float* dy = call.in[0].f32();
    const int32_t* ids = call.in[1].i32();
    const size_t count = call.in[1].elements, rows = call.out[0].dims[0], columns = call.out[0].dims[1];
    __builtin_memset(call.out[0].data, 0, call.out[0].elements * sizeof *dy);
    for (size_t i = 0; i < count; ++i, dy += columns) {
        if (outside(ids[i], rows)) return Fault::kIndexOutOfRange;
        float* row = call.out[0].f32_mut() + size_t(ids[i]) * columns;
        for (size_t j = 0; j < columns; j += kLanes) {
            const size_t live = columns - j;
            store_upto(row + j, load_upto(row + j, live) + load_upto(dy + j, live), live);
        }
    }
    return Fault::kNone;
}

}  // namespace

void register_move(Kernel* table) {
    table[op::TRANSPOSE] = transpose;
    table[op::CONCAT] = concat;
    table[op::SLICE] = slice;
    table[op::SLICE_GRAD] = slice_grad;
    table[op::COPY] = copy;
    table[op::EMBEDDING] = embedding;
    table[op::EMBEDDING_GRAD] = embedding_grad;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
