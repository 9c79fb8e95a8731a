// Sums over many elements whose error does not grow with their number: losses, statistics, bias gradients.
#pragma once

#include "vec.hpp"

namespace evensong {
namespace EVENSONG_ISA {

// A long sum of vectors: float lanes for a short stretch, then double, so that the error does not grow with the length.
struct LongSum {
    Floats lanes = {};
    double total = 0;
    uint32_t pending = 0;

    __attribute__((always_inline)) void add(Floats v) {
        lanes += v;
        if (__builtin_expect(++pending == 32, 0)) flush();
    }
    __attribute__((always_inline)) double value() {
        flush();
        return total;
    }

  private:
    __attribute__((always_inline)) void flush() {
        for (size_t i = 0; i < kLanes; ++i) total += double(lanes[i]);
        lanes = Floats{};
        pending = 0;
    }
};

// The sum of f(i, live) over `count` elements, where f gives kLanes terms from element i on; terms beyond the end are
// dropped.
template <class Function>
EVENSONG_INLINE double sum_elements(size_t count, Function f) {
    LongSum sum;
    for (size_t i = 0; i < count; i += kLanes) {
        const Floats terms = f(i, count - i);
        sum.add(count - i < kLanes ? keep_first(terms, count - i, 0.0f) : terms);
    }
    return sum.value();
}

// out[j] = scale * sum over i < rows of term(i, j, live), where term gives row i from column j on; `live` columns are
// left. Blocks of rows are summed in four chains and joined by compensated addition (Kahan 1965): the error does not
// grow with rows.
template <class Term>
EVENSONG_INLINE void sum_columns(size_t rows, size_t columns, float scale, float* out, Term term) {
    constexpr size_t kBlock = 64;
    for (size_t j = 0; j < columns; j += kLanes) {
        const size_t live = columns - j;
        Floats total = {}, lost = {};
        for (size_t start = 0; start < rows; start += kBlock) {
            const size_t stop = rows - start < kBlock ? rows : start + kBlock;
            Floats chain[4] = {};
            size_t i = start;
            for (; i + 4 <= stop; i += 4) {
                EVENSONG_UNROLL
                for (size_t k = 0; k < 4; ++k) chain[k] += term(i + k, j, live);
            }
            for (; i < stop; ++i) chain[0] += term(i, j, live);
            const Floats block = ((chain[0] + chain[1]) + (chain[2] + chain[3])) - lost;
            const Floats sum = total + block;
            lost = (sum - total) - block;
            total = sum;
        }
        store_upto(out + j, total * scale, live);
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
