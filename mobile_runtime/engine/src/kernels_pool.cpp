// Pooling over channels-last images, float32, forward and backward. Lanes are channels.

#include "kernel.hpp"
#include "opcodes.h"
#include "vec.hpp"
#include "window.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// ------------------------------------------------------------------------------------------------- maximum

// The index tensor: one byte an element where the window has at most 256 places, else int32.
EVENSONG_INLINE Ints load_index(const Operand& index, size_t at, size_t live) {
    Ints result = {};
    if (index.dtype == DType::kI32) {
        return Ints(load_upto(index.f32() + at, live));  // bits, moved as floats
    }
    if (live >= kLanes) {
        return widen(index.u8() + at) & 0xff;
    }
    for (size_t i = 0; i < live; ++i) result[i] = index.u8()[at + i];
    return result;
}

EVENSONG_INLINE void store_index(const Operand& index, size_t at, Ints places, size_t live) {
    if (index.dtype == DType::kI32) {
        store_upto(index.f32_mut() + at, Floats(places), live);
    } else if (live >= kLanes) {
        narrow(index.u8_mut() + at, places);
    } else {
        for (size_t i = 0; i < live; ++i) index.u8_mut()[at + i] = uint8_t(places[i]);
    }
}

// The first maximum wins; NaN wins over everything, so that it is not hidden.
Fault max_pool2d(const Call& call) {
    const PoolGeometry g(call.attr);
    const Operand &x = call.in[0], &y = call.out[0];
    const size_t channels = x.last(), width = x.dims[2], image_pixels = size_t(x.dims[1]) * width;
    const bool wants_index = call.outputs > 1;
    each_window(g, x, y, [&](const Span& rows, const Span& columns, size_t image, size_t pixel) {
        for (size_t c = 0; c < channels; c += kLanes) {
            const size_t live = channels - c;
            Floats best = splat(-__builtin_inff());
            Ints place = splat((rows.begin - rows.origin) * g.kernel_w + columns.begin - columns.origin);
            for (int32_t h = rows.begin; h < rows.end; ++h) {
                const float* line = x.f32() + (image * image_pixels + size_t(h) * width) * channels + c;
                int32_t here = (h - rows.origin) * g.kernel_w - columns.origin;
                for (int32_t w = columns.begin; w < columns.end; ++w) {
                    const Floats v = load_upto(line + size_t(w) * channels, live);
                    const Ints larger = (v > best) | (v != v);
                    best = larger ? v : best;
                    place = larger ? splat(here + w) : place;
                }
            }
            store_upto(y.f32_mut() + pixel * channels + c, best, live);
            if (wants_index) store_index(call.out[1], pixel * channels + c, place, live);
        }
    });
    return Fault::kNone;
}

void zero(float* x, size_t count) { __builtin_memset(x, 0, count * sizeof *x); }

// Every place of a window takes its dy where the index names it. A place outside the image, or outside the window, is
// hostile.
Fault max_pool2d_grad(const Call& call) {
    const PoolGeometry g(call.attr);
    const Operand &dy = call.in[0], &index = call.in[1], &dx = call.out[0];
    const size_t channels = dx.last(), width = dx.dims[2], image_pixels = size_t(dx.dims[1]) * width;
    zero(dx.f32_mut(), dx.elements);
    Ints lost = {};  // all ones where no place of the window took the gradient
    each_window(g, dx, dy, [&](const Span& rows, const Span& columns, size_t image, size_t pixel) {
        for (size_t c = 0; c < channels; c += kLanes) {
            const size_t live = channels - c, at = pixel * channels + c;
            const Floats gradient = load_upto(dy.f32() + at, live);
            const Ints place = load_index(index, at, live);
            Ints untaken = lane_numbers() < splat(int32_t(live < kLanes ? live : kLanes));
            for (int32_t h = rows.begin; h < rows.end; ++h) {
                float* line = dx.f32_mut() + (image * image_pixels + size_t(h) * width) * channels + c;
                const int32_t here = (h - rows.origin) * g.kernel_w - columns.origin;
                for (int32_t w = columns.begin; w < columns.end; ++w) {
                    const Ints chosen = place == splat(here + w);
                    float* target = line + size_t(w) * channels;
                    store_upto(target, load_upto(target, live) + (chosen ? gradient : Floats{}), live);
                    untaken &= ~chosen;
                }
            }
            lost |= untaken;
        }
    });
    return any(lost) ? Fault::kIndexOutOfRange : Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- mean

EVENSONG_INLINE float share_of(const PoolGeometry& g, const Span& rows, const Span& columns, bool count_include_pad) {
    const int32_t count = count_include_pad ? g.kernel_h * g.kernel_w : rows.count() * columns.count();
    return 1.0f / float(count);
}

Fault avg_pool2d(const Call& call) {
    const PoolGeometry g(call.attr);
    const Operand &x = call.in[0], &y = call.out[0];
    const size_t channels = x.last(), width = x.dims[2], image_pixels = size_t(x.dims[1]) * width;
    const bool count_include_pad = call.attr[6].i != 0;
    each_window(g, x, y, [&](const Span& rows, const Span& columns, size_t image, size_t pixel) {
        const float share = share_of(g, rows, columns, count_include_pad);
        for (size_t c = 0; c < channels; c += kLanes) {
            const size_t live = channels - c;
            Floats sum = {};
            for (int32_t h = rows.begin; h < rows.end; ++h) {
                const float* line = x.f32() + (image * image_pixels + size_t(h) * width) * channels + c;
                Floats row = {};  // row by row, so that a global mean stays accurate
                for (int32_t w = columns.begin; w < columns.end; ++w)
                    row += load_upto(line + size_t(w) * channels, live);
                sum += row;
            }
            store_upto(y.f32_mut() + pixel * channels + c, sum * share, live);
        }
    });
    return Fault::kNone;
}

Fault avg_pool2d_grad(const Call& call) {
    const PoolGeometry g(call.attr);
    const Operand &dy = call.in[0], &dx = call.out[0];
    const size_t channels = dx.last(), width = dx.dims[2], image_pixels = size_t(dx.dims[1]) * width;
    const bool count_include_pad = call.attr[6].i != 0;
    zero(dx.f32_mut(), dx.elements);
    each_window(g, dx, dy, [&](const Span& rows, const Span& columns, size_t image, size_t pixel) {
        const float share = share_of(g, rows, columns, count_include_pad);
        for (size_t c = 0; c < channels; c += kLanes) {
            const size_t live = channels - c;
            const Floats part = load_upto(dy.f32() + pixel * channels + c, live) * share;
            for (int32_t h = rows.begin; h < rows.end; ++h) {
                float* line = dx.f32_mut() + (image * image_pixels + size_t(h) * width) * channels + c;
                for (int32_t w = columns.begin; w < columns.end; ++w) {
                    float* target = line + size_t(w) * channels;
                    store_upto(target, load_upto(target, live) + part, live);
                }
            }
        }
    });
    return Fault::kNone;
}

}  // namespace

void register_pool(Kernel* table) {
    table[op::MAX_POOL2D] = max_pool2d;
    table[op::MAX_POOL2D_GRAD] = max_pool2d_grad;
    table[op::AVG_POOL2D] = avg_pool2d;
    table[op::AVG_POOL2D_GRAD] = avg_pool2d_grad;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
