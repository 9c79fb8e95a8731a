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

// Windows of a grid whose taps are contiguous: in the source where none meets the padding, else in a copy of some grid
// rows' surroundings, for some images at once where all of their rows fit.
class Band {
  public:
    Band(const Patches& patches, int32_t images, float* memory, size_t room) : patches_(patches), memory_(memory) {
        const Axis &h = patches.h, &w = patches.w;
        if (h.is_inside() && w.is_inside()) {
            memory_ = nullptr;
            line_ = size_t(w.source) * patches.channels;
            rows_ = h.grid;
            images_ = images;
            return;
        }
        line_ = (size_t(w.grid - 1) * size_t(w.step) + size_t(w.taps)) * patches.channels;
        const size_t lines = room / line_, reach = size_t(h.taps - 1) * size_t(h.delta) + 1;
        if (lines < reach) return;
        const size_t rows = (lines - reach) / size_t(h.step) + 1;
        rows_ = rows < size_t(h.grid) ? int32_t(rows) : h.grid;
        const size_t whole = rows_ == h.grid ? lines / source_lines(h.grid) : 1;
        images_ = whole < size_t(images) ? int32_t(whole) : images;
    }

    bool fits() const { return rows_ > 0; }
    Lines lines() const {
        return {size_t(patches_.h.taps), size_t(patches_.w.taps) * patches_.channels, size_t(patches_.h.delta) * line_};
    }

    // Calls body(windows, places, count) for blocks of all grid pixels in order: windows[i] is what a pixel reads,
    // places[i] where the target has it.
    template <class Body>
    __attribute__((always_inline)) void each_block(int32_t images, const Target& target, Body body) {
        const float* windows[kMostWindows];
        float* places[kMostWindows];
        const size_t step = size_t(patches_.w.step) * patches_.channels;
        for (int32_t image = 0; image < images; image += images_) {
            const int32_t band_images = smaller(images - image, images_);
            for (int32_t row = 0; row < patches_.h.grid; row += rows_) {
                const int32_t band_rows = smaller(patches_.h.grid - row, rows_);
                if (memory_) fill(image, band_images, row, band_rows);
                size_t count = 0;
                for (int32_t line = 0; line < band_images * band_rows; ++line) {
                    const float* window = first_window(line / band_rows, line % band_rows);
                    float* place = target.at(image + line / band_rows, row + line % band_rows, 0);
                    for (int32_t column = 0; column < patches_.w.grid; ++column) {
                        windows[count] = window;
                        places[count] = place;
                        window += step;
                        place += target.column_stride;
                        if (++count < kMostWindows) continue;
                        body(windows, places, count);
                        count = 0;
                    }
                }
                if (count) body(windows, places, count);
            }
        }
    }

  private:
    const Patches& patches_;
    float* memory_;
    size_t line_ = 0, image_stride_ = 0;
    int32_t rows_ = 0, images_ = 0;  // of the grid at a time

    // Where the window of a row's first grid position lies, counted from the first image and row that the band holds.
    const float* first_window(int32_t image, int32_t row) const {
        if (!memory_) return patches_.at(image, row * patches_.h.step + patches_.h.first, patches_.w.first);
        return memory_ + size_t(image) * image_stride_ + size_t(row) * size_t(patches_.h.step) * line_;
    }

    // Copies what the grid rows first_row .. first_row + rows of some images meet.
    __attribute__((noinline)) void fill(int32_t first_image, int32_t images, int32_t first_row, int32_t rows) {
        const Axis &h = patches_.h, &w = patches_.w;
        const size_t channels = patches_.channels;
        const int32_t lines = int32_t(source_lines(rows)), width = int32_t(line_ / channels);
        const int32_t left = w.first < 0 ? -w.first : 0, from = w.first < 0 ? 0 : w.first;
        const int32_t inside = smaller(width - left, w.source - from), top = first_row * h.step + h.first;
        image_stride_ = size_t(lines) * line_;
        float* out = memory_;
        for (int32_t image = first_image; image < first_image + images; ++image) {
            for (int32_t y = top; y < top + lines; ++y, out += line_) {
                if (y < 0 || y >= h.source || inside <= 0) {
                    clear_floats(out, line_);
                    continue;
                }
                const size_t begin = size_t(left) * channels, count = size_t(inside) * channels;
                clear_floats(out, begin);
                copy_floats(out + begin, patches_.at(image, y, from), count);
                clear_floats(out + begin + count, line_ - begin - count);
            }
        }
    }

    size_t source_lines(int32_t rows) const {
        return size_t(rows - 1) * size_t(patches_.h.step) + size_t(patches_.h.taps - 1) * size_t(patches_.h.delta) + 1;
    }
    static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
};

}  // namespace EVENSONG_ISA
}  // namespace evensong
