// Products with a factor that is mostly zeros: a gradient behind a ReLU has one half of them, one behind max pooling
// three quarters and more.
//
// Only what is not zero is visited. Each such element scales a run of the other factor, whole vectors that are read
// where they lie, and all runs of one result are added up in registers.
#pragma once

#include "vec.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// The elements that are not zero, of one row or column of a matrix, and where the runs that they scale begin.
struct Terms {
    const float* values;
    const uint32_t* offsets;  // in elements, from a base
    size_t count;
};

constexpr size_t kWidestRun = (EVENSONG_LANES == 16 ? 16 : 12) * kLanes;  // columns added up at once, in registers

// out[0..columns) (+)= scale * sum over terms of value * base[offset .. offset + columns)
void add_terms(const Terms& terms, const float* base, float* out, size_t columns, bool accumulate, float scale);

size_t count_nonzeros(const float* values, size_t count);

// All terms of a block of a matrix, sorted by column or by row. Uses memory that it is given.
class TermLists {
  public:
    // `room` floats at `memory`: lists for at most `most_lists` columns or rows, the rest is for terms.
    TermLists(float* memory, size_t room, size_t most_lists)
        : ends_(reinterpret_cast<uint32_t*>(memory)),
          capacity_(room > most_lists ? (room - most_lists) / 2 : 0),
          values_(memory + most_lists),
          offsets_(reinterpret_cast<uint32_t*>(values_ + capacity_)) {}

    // How many elements are not zero in the matrix of these rows. Prepares for by_column().
    size_t count(const float* const* rows, size_t count, size_t columns);
    bool fits(size_t terms) const { return terms <= capacity_; }
    bool has_room() const { return capacity_ > 0; }

    // One list for each column of the matrix that was counted: an element of row i gets places[i].
    void by_column(const float* const* rows, size_t count, size_t columns, const uint32_t* places);
    // One list for each row: an element of column j gets j * step. There has to be room for all elements.
    void by_row(const float* const* rows, size_t count, size_t columns, size_t step);

    Terms list(size_t index) const {
        const size_t begin = index ? ends_[index - 1] : 0;
        return {values_ + begin, offsets_ + begin, ends_[index] - begin};
    }

  private:
    uint32_t* ends_;
    size_t capacity_;
    float* values_;
    uint32_t* offsets_;
};

}  // namespace EVENSONG_ISA
}  // namespace evensong
