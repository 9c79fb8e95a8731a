// The sums behind sparse.hpp.
#include "sparse.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// kChains terms at a time, so that few vectors still keep the multiply-add units busy.
template <size_t kVectors>
constexpr size_t kChains = kVectors >= 8 ? 1 : (kVectors >= 3 ? 2 : 4);

template <size_t kVectors>
__attribute__((noinline)) void add_vectors(const Terms& terms, const float* base, float* out, bool accumulate,
                                           float scale) {
    constexpr size_t kAtOnce = kChains<kVectors>;
    Floats sums[kAtOnce][kVectors] = {};
    size_t n = 0;
    for (; n + kAtOnce <= terms.count; n += kAtOnce) {
        EVENSONG_UNROLL
        for (size_t c = 0; c < kAtOnce; ++c) {
            const float value = terms.values[n + c];
            const float* run = base + terms.offsets[n + c];
            EVENSONG_UNROLL
            for (size_t v = 0; v < kVectors; ++v) sums[c][v] += value * load(run + v * kLanes);
        }
    }
    for (; kAtOnce > 1 && n < terms.count; ++n) {
        const float value = terms.values[n];
        const float* run = base + terms.offsets[n];
        EVENSONG_UNROLL
        for (size_t v = 0; v < kVectors; ++v) sums[0][v] += value * load(run + v * kLanes);
    }
    EVENSONG_UNROLL
    for (size_t v = 0; v < kVectors; ++v) {
        Floats sum = sums[0][v];
        EVENSONG_UNROLL
        for (size_t c = 1; c < kAtOnce; ++c) sum += sums[c][v];
        store(out + v * kLanes, accumulate ? load(out + v * kLanes) + scale * sum : scale * sum);
    }
}

// The last columns, less than a vector.
__attribute__((noinline)) void add_partial(const Terms& terms, const float* base, float* out, size_t columns,
                                           bool accumulate, float scale) {
    Floats sum = {};
    for (size_t n = 0; n < terms.count; ++n) sum += terms.values[n] * load_partial(base + terms.offsets[n], columns);
    store_partial(out, accumulate ? load_partial(out, columns) + scale * sum : scale * sum, columns);
}

// Calls body(column) for each element of a row that is not zero. By words of 64: few of their lengths are mispredicted.
template <class Body>
EVENSONG_INLINE void each_nonzero(const float* row, size_t columns, Body body) {
    for (size_t first = 0; first < columns; first += 64) {
        uint64_t word = 0;
        for (size_t j = 0; j < 64 && first + j < columns; j += kLanes) {
            word |= uint64_t(lane_bits(load_upto(row + first + j, columns - first - j) != 0.0f)) << j;
        }
        for (; word; word &= word - 1) body(first + size_t(__builtin_ctzll(word)));
    }
}

struct Width {
    size_t vectors;
    void (*add)(const Terms& terms, const float* base, float* out, bool accumulate, float scale);
};

template <size_t kVectors>
constexpr Width width_of() {
    return {kVectors, add_vectors<kVectors>};
}

constexpr Width kWidths[] = {
#if EVENSONG_LANES == 16
    width_of<16>(), width_of<10>(), width_of<8>(), width_of<4>(), width_of<3>(), width_of<2>(), width_of<1>(),
#elif defined(__wasm__)
    width_of<12>(),
    width_of<4>(),
    width_of<1>(),  // a module is to be small
#else
    width_of<12>(), width_of<10>(), width_of<6>(), width_of<4>(), width_of<2>(), width_of<1>(),
#endif
};

}  // namespace

void add_terms(const Terms& terms, const float* base, float* out, size_t columns, bool accumulate, float scale) {
    if (terms.count == 0 && accumulate) return;
    const Width* width = kWidths;
    while (columns >= kLanes) {
        while (width->vectors * kLanes > columns) ++width;
        width->add(terms, base, out, accumulate, scale);
        const size_t done = width->vectors * kLanes;
        base += done;
        out += done;
        columns -= done;
    }
    if (columns) add_partial(terms, base, out, columns, accumulate, scale);
}

size_t count_nonzeros(const float* values, size_t count) {
    Ints lanes = {};
    for (size_t i = 0; i < count; i += kLanes) lanes -= load_upto(values + i, count - i) != 0.0f;
    size_t total = 0;
    for (size_t lane = 0; lane < kLanes; ++lane) total += size_t(lanes[lane]);
    return total;
}

size_t TermLists::count(const float* const* rows, size_t count, size_t columns) {
    size_t total = 0;
    for (size_t j = 0; j < columns; j += kLanes) {
        const size_t live = columns - j < kLanes ? columns - j : kLanes;
        Ints counts = {};
        for (size_t i = 0; i < count; ++i) counts -= load_upto(rows[i] + j, live) != 0.0f;
        for (size_t lane = 0; lane < live; ++lane) ends_[j + lane] = uint32_t(total += size_t(counts[lane]));
    }
    return total;
}

void TermLists::by_column(const float* const* rows, size_t count, size_t columns, const uint32_t* places) {
    for (size_t j = columns; j-- > 0;) ends_[j] = j ? ends_[j - 1] : 0;  // where each list begins; filling moves it on
    for (size_t i = 0; i < count; ++i) {
        each_nonzero(rows[i], columns, [&](size_t column) {
            const uint32_t end = ends_[column]++;
            values_[end] = rows[i][column];
            offsets_[end] = places[i];
        });
    }
}

void TermLists::by_row(const float* const* rows, size_t count, size_t columns, size_t step) {
    uint32_t end = 0;
    for (size_t i = 0; i < count; ++i) {
        each_nonzero(rows[i], columns, [&](size_t column) {
            values_[end] = rows[i][column];
            offsets_[end++] = uint32_t(column * step);
        });
        ends_[i] = end;
    }
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
