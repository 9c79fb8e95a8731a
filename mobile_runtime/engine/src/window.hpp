// Where a pooling window meets its image: shared by the float32 and the int8 kernels.
#pragma once

#include "kernel.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// The attributes that every pooling operation starts with.
struct PoolGeometry {
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;

    explicit PoolGeometry(const Attribute* a)
        : kernel_h(a[0].i), kernel_w(a[1].i), stride_h(a[2].i), stride_w(a[3].i), pad_top(a[4].i), pad_left(a[5].i) {}
};

// The real positions [begin, end) of a window along one axis, and where the window itself starts (in the padding, if <
// 0).
struct Span {
    int32_t origin, begin, end;

    Span(int32_t output, int32_t kernel, int32_t stride, int32_t padding, int32_t size)
        : origin(output * stride - padding),
          begin(origin > 0 ? origin : 0),
          end(origin + kernel < size ? origin + kernel : size) {}
    int32_t count() const { return end > begin ? end - begin : 0; }
};

// Calls body(rows, columns, image, pixel) for every output pixel: its spans, the index of its image in the batch, and
// its own index among all output pixels.
template <class Body>
static inline __attribute__((always_inline)) void each_window(const PoolGeometry& g, const Operand& large,
                                                              const Operand& small, Body body) {
    size_t pixel = 0;
    for (uint32_t n = 0; n < small.dims[0]; ++n) {
        for (uint32_t oh = 0; oh < small.dims[1]; ++oh) {
            const Span rows(int32_t(oh), g.kernel_h, g.stride_h, g.pad_top, int32_t(large.dims[1]));
            for (uint32_t ow = 0; ow < small.dims[2]; ++ow, ++pixel) {
                const Span columns(int32_t(ow), g.kernel_w, g.stride_w, g.pad_left, int32_t(large.dims[2]));
                body(rows, columns, size_t(n), pixel);
            }
        }
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
