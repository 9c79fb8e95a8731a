// Where pooling windows meet their image: shared by the float32 and the int8 kernels.
#pragma once

#include "kernel.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// The places of one window that lie in the image: `rows` by `columns` of them.
struct Window {
    size_t first;           // element of the image where they start, channel 0
    size_t line, channels;  // elements from row to row and from place to place
    int32_t rows, columns;
    int32_t place, kernel_w;  // number of the first of them in the window, and numbers from row to row
    int32_t count;            // by which a mean divides
    size_t pixel;             // element of the pooled image, channel 0
};

// The real positions [begin, end) of a window along one axis that starts at `origin` (in the padding, if < 0).
struct Span {
    int32_t origin, begin, end;

    Span(int32_t output, int32_t kernel, int32_t stride, int32_t padding, int32_t size)
        : origin(output * stride - padding),
          begin(origin > 0 ? origin : 0),
          end(origin + kernel < size ? origin + kernel : size) {}
};

// Calls body(call, window) for every window; kIndexOutOfRange if any of them gives false. All pooling operations start
// with the same six attributes, those of means go on with count_include_pad.
static Fault each_window(const Call& call, const Operand& image, const Operand& pooled, bool mean,
                         bool (*body)(const Call&, const Window&)) {
    const Attribute* a = call.attr;
    Window window = {};
    window.channels = image.dims[3];
    window.line = image.dims[2] * window.channels;
    window.kernel_w = a[1].i;
    const size_t image_elements = image.dims[1] * window.line;
    bool sound = true;
    for (uint32_t n = 0; n < pooled.dims[0]; ++n) {
        for (uint32_t oh = 0; oh < pooled.dims[1]; ++oh) {
            const Span rows(int32_t(oh), a[0].i, a[2].i, a[4].i, int32_t(image.dims[1]));
            window.rows = rows.end - rows.begin;
            for (uint32_t ow = 0; ow < pooled.dims[2]; ++ow, window.pixel += window.channels) {
                const Span columns(int32_t(ow), a[1].i, a[3].i, a[5].i, int32_t(image.dims[2]));
                window.columns = columns.end - columns.begin;
                window.first =
                    n * image_elements + size_t(rows.begin) * window.line + size_t(columns.begin) * window.channels;
                window.place = (rows.begin - rows.origin) * a[1].i + columns.begin - columns.origin;
                window.count = mean && a[6].i ? a[0].i * a[1].i : window.rows * window.columns;
                sound &= body(call, window);
            }
        }
    }
    return sound ? Fault::kNone : Fault::kIndexOutOfRange;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
