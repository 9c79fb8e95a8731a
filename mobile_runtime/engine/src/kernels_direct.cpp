// The tiles behind direct.hpp.
#include "direct.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

EVENSONG_INLINE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// One tile: kTileRows windows times kVectors vectors, for the whole depth, in registers. NaN passes the bounds.
template <size_t kVectors>
__attribute__((noinline)) void window_tile(const float* const* windows, Lines lines, const float* panel,
                                           float* const* out, size_t column, size_t columns, Epilogue epilogue) {
    Floats sums[kTileRows][kVectors];
    EVENSONG_UNROLL
    for (size_t v = 0; v < kVectors; ++v) {
        const size_t from = v * kLanes;
        const Floats bias = epilogue.bias ? load_upto(epilogue.bias + column + from, columns - from) : Floats{};
        EVENSONG_UNROLL
        for (size_t i = 0; i < kTileRows; ++i) sums[i][v] = bias;
    }
    for (size_t line = 0; line < lines.lines; ++line) {
        const float* x[kTileRows];
        EVENSONG_UNROLL
        for (size_t i = 0; i < kTileRows; ++i) x[i] = windows[i] + line * lines.line_stride;
        for (size_t k = 0; k < lines.run; ++k, panel += kVectors * kLanes) {
            Floats b[kVectors];
            EVENSONG_UNROLL
            for (size_t v = 0; v < kVectors; ++v) b[v] = load(panel + v * kLanes);
            EVENSONG_UNROLL
            for (size_t i = 0; i < kTileRows; ++i) {
                const float scalar = x[i][k];
                EVENSONG_UNROLL
                for (size_t v = 0; v < kVectors; ++v) sums[i][v] += scalar * b[v];
            }
        }
    }
    const Floats least = splat(epilogue.activation == activation::NONE ? -__builtin_inff() : 0.0f);
    const Floats most = splat(epilogue.activation == activation::RELU6 ? 6.0f : __builtin_inff());
    // A last panel that is not whole goes to its place through a buffer.
    alignas(64) float buffer[kTileRows][kVectors * kLanes];
    const bool is_whole = columns >= kVectors * kLanes;
    EVENSONG_UNROLL
    for (size_t i = 0; i < kTileRows; ++i) {
        float* row = is_whole ? out[i] + column : buffer[i];
        EVENSONG_UNROLL
        for (size_t v = 0; v < kVectors; ++v) store(row + v * kLanes, minimum(most, maximum(least, sums[i][v])));
    }
    if (is_whole) return;
    for (size_t i = 0; i < kTileRows; ++i) __builtin_memcpy(out[i] + column, buffer[i], columns * sizeof(float));
}

}  // namespace

void multiply_windows(const float** windows, Lines lines, const float* panels, float** out, size_t count,
                      size_t columns, Epilogue epilogue) {
    // Surplus rows of the last tile repeat its last window, and write the same result again.
    for (size_t i = count; i % kTileRows; ++i) windows[i] = windows[count - 1], out[i] = out[count - 1];
    for (size_t j = 0; j < columns; j += kPanelColumns, panels += lines.lines * lines.run * kPanelColumns) {
        const size_t left_over = columns - j;
        for (size_t i = 0; i < count; i += kTileRows) {
            if (left_over > kLanes) {
                window_tile<2>(windows + i, lines, panels, out + i, j, left_over, epilogue);
            } else {
                window_tile<1>(windows + i, lines, panels, out + i, j, left_over, epilogue);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------- the band

Band::Band(const Patches& patches, int32_t images, float* memory, size_t room)
    : patches_(patches),
      images_(images),
      memory_(memory),
      most_images_(images),
      rows_(patches.h.grid),
      columns_(patches.w.grid) {
    const Axis &h = patches.h, &w = patches.w;
    if (h.is_inside() && w.is_inside()) {
        memory_ = nullptr;
        line_ = size_t(w.source) * patches.channels;
        return;
    }
    const size_t most_lines = room / (w.extent(columns_) * patches.channels), reach = h.extent(1);
    if (most_lines >= reach) {
        if (most_lines < h.extent(rows_)) rows_ = int32_t((most_lines - reach) / size_t(h.step)) + 1;
        const size_t whole = rows_ == h.grid ? most_lines / h.extent(rows_) : 1;
        if (whole < size_t(images)) most_images_ = int32_t(whole);
    } else {
        const size_t most_pixels = room / reach / patches.channels;
        columns_ = most_pixels < w.extent(1) ? 0 : int32_t((most_pixels - w.extent(1)) / size_t(w.step)) + 1;
        rows_ = most_images_ = 1;
    }
    line_ = w.extent(columns_) * patches.channels;
}

Band::Part Band::part_from(int32_t image, int32_t row, int32_t column) const {
    return {image,
            row,
            column,
            smaller(most_images_, images_ - image),
            smaller(rows_, patches_.h.grid - row),
            smaller(columns_, patches_.w.grid - column)};
}

void Band::visit(const Target& target, void (*body)(void*, const float**, float**, size_t), void* context) const {
    const float* windows[kMostWindows];
    float* places[kMostWindows];
    const size_t step = size_t(patches_.w.step) * patches_.channels;
    Part part = part_from(0, 0, 0);
    while (part.images > 0) {
        if (memory_) fill(part);
        size_t count = 0;
        for (int32_t line = 0; line < part.images * part.rows; ++line) {
            const int32_t image = line / part.rows, row = line % part.rows;
            const float* window = first_window(part, image, row);
            float* place = target.at(part.image + image, part.row + row, part.column);
            for (int32_t column = 0; column < part.columns; ++column) {
                windows[count] = window;
                places[count] = place;
                window += step;
                place += target.column_stride;
                if (++count < kMostWindows) continue;
                body(context, windows, places, count);
                count = 0;
            }
        }
        if (count) body(context, windows, places, count);
        part.column += part.columns;
        if (part.column == patches_.w.grid) part.column = 0, part.row += part.rows;
        if (part.row == patches_.h.grid) part.row = 0, part.image += part.images;
        part = part_from(part.image, part.row, part.column);
    }
}

// Where the window of a row's first grid position lies, counted from the first image and row of the part.
const float* Band::first_window(const Part& part, int32_t image, int32_t row) const {
    const Axis &h = patches_.h, &w = patches_.w;
    if (!memory_) return patches_.at(image, row * h.step + h.first, w.first);
    return memory_ + (size_t(image) * h.extent(part.rows) + size_t(row) * size_t(h.step)) * line_;
}

void Band::fill(const Part& part) const {
    const Axis &h = patches_.h, &w = patches_.w;
    const size_t channels = patches_.channels;
    const int32_t lines = int32_t(h.extent(part.rows)), width = int32_t(w.extent(part.columns));
    const int32_t top = part.row * h.step + h.first, first = part.column * w.step + w.first;
    const int32_t left = smaller(first < 0 ? -first : 0, width), end = smaller(width, w.source - first);
    float* out = memory_;
    for (int32_t image = part.image; image < part.image + part.images; ++image) {
        for (int32_t y = top; y < top + lines; ++y, out += line_) {
            if (y < 0 || y >= h.source || end <= left) {
                clear_floats(out, line_);
                continue;
            }
            const size_t begin = size_t(left) * channels, count = size_t(end - left) * channels;
            clear_floats(out, begin);
            copy_floats(out + begin, patches_.at(image, y, first + left), count);
            clear_floats(out + begin + count, line_ - begin - count);
        }
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
