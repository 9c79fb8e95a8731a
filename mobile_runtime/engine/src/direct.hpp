// Convolution without copies of patches: every window is read where it lies, in a band of the image that has zeros
// around it.
//
// A patch repeats each source element once for every tap that meets it; the band holds it once. Within a line of the
// kernel a window's elements are contiguous, so that a product over it is a few runs of broadcast times vector.
#pragma once

#include "patches.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// What all windows share: each is `lines` runs of `run` elements, `line_stride` apart.
struct Lines {
    size_t lines, run, line_stride;
};

// out[i][column + j] = epilogue(window i * panels), for `count` windows and the packed weights of `columns` columns.
// windows[] and out[] have room up to the next multiple of kTileRows.
void multiply_windows(const float** windows, Lines lines, const float* panels, float** out, size_t count,
                      size_t columns, Epilogue epilogue);

// Some pixels: the windows that they read, and their rows of a gradient.
struct WindowBlock {
    const float* const* windows;
    const float* const* rows;
    size_t count, channels;
    Lines lines;

    size_t depth() const { return lines.lines * lines.run; }
};

// dw[channel, tap] += sum over the block of row[channel] * window[tap]
void add_gradients(const WindowBlock& block, float* dw);

constexpr size_t kMostWindows = kMostRows / kTileRows * kTileRows;  // of one block

// Windows of a grid over all channels of a source: in place where none meets the padding, else in a copy of what some
// grid pixels meet, with zeros around it. That is part of a row, some rows, or all rows of some images.
class Band {
  public:
    Band(const Patches& patches, int32_t images, float* memory, size_t room);

    bool fits() const { return columns_ > 0; }
    // Elements from a window's line to its next, and from a tap to its next.
    size_t line_stride() const { return size_t(patches_.h.delta) * line_; }
    size_t tap_stride() const { return size_t(patches_.w.delta) * patches_.channels; }
    // For grids whose taps are contiguous.
    Lines lines() const {
        return {size_t(patches_.h.taps), size_t(patches_.w.taps) * patches_.channels, line_stride()};
    }

    // Calls body(windows, places, count) for blocks of all grid pixels: windows[i] is what a pixel reads, places[i]
    // where the target has it. Both have room for kMostWindows.
    template <class Body>
    void each_block(const Target& target, Body body) {
        visit(
            target,
            [](void* f, const float** windows, float** places, size_t count) {
                (*static_cast<Body*>(f))(windows, places, count);
            },
            &body);
    }

  private:
    // Grid pixels that the band holds at a time.
    struct Part {
        int32_t image, row, column, images, rows, columns;
    };

    const Patches& patches_;
    int32_t images_;
    float* memory_;
    size_t line_ = 0;
    int32_t most_images_, rows_, columns_;  // at a time

    void visit(const Target& target, void (*body)(void*, const float**, float**, size_t), void* context) const;
    Part part_from(int32_t image, int32_t row, int32_t column) const;
    const float* first_window(const Part& part, int32_t image, int32_t row) const;
    void fill(const Part& part) const;
};

}  // namespace EVENSONG_ISA
}  // namespace evensong
