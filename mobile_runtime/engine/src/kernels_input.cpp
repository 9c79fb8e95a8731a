// Operations between raw data and the first layer: text, categories, numbers, images. docs/artifact.md states the
// hashes and the rules of text; every result is the same on every target.

#include "kernel.hpp"
#include "opcodes.h"
#include "vec.hpp"

namespace evensong {
namespace EVENSONG_ISA {
namespace {

// ------------------------------------------------------------------------------------------------- numbers, categories

Fault cast(const Call& call) {
    const size_t count = call.out[0].elements;
    float* y = call.out[0].f32_mut();
    if (call.in[0].dtype == DType::kU8) {
        const uint8_t* x = call.in[0].u8();
        size_t i = 0;
        for (; i + kLanes <= count; i += kLanes) store(y + i, __builtin_convertvector(widen(x + i) & 0xff, Floats));
        for (; i < count; ++i) y[i] = x[i];
    } else {
        const int32_t* x = call.in[0].i32();
        for (size_t i = 0; i < count; ++i) y[i] = float(x[i]);
    }
    return Fault::kNone;
}

Fault one_hot(const Call& call) {
    const size_t width = call.in[0].last(), columns = call.out[0].last(), rows = call.out[0].elements / columns;
    const int64_t first = call.attr[0].i;
    const bool counting = call.attr[1].i;
    const int32_t* ids = call.in[0].i32();
    float* y = call.out[0].f32_mut();
    __builtin_memset(y, 0, call.out[0].elements * sizeof *y);
    for (size_t m = 0; m < rows; ++m, y += columns) {
        for (size_t i = 0; i < width; ++i) {
            const int64_t column = *ids++ - first;
            if (column >= int64_t(columns)) return Fault::kIndexOutOfRange;
            if (column >= 0) y[column] = counting ? y[column] + 1.0f : 1.0f;
        }
    }
    return Fault::kNone;
}

// The first place of 0 .. count that is not before what is searched. Ends on any data.
template <class Before>
EVENSONG_INLINE size_t bisect(size_t count, Before before) {
    size_t low = 0, high = count;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (before(middle)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

Fault bucketize(const Call& call) {
    const float *x = call.in[0].f32(), *boundaries = call.in[1].f32();
    const size_t count = call.in[1].elements;
    const bool right = call.attr[0].i;
    for (size_t i = 0; i < call.out[0].elements; ++i) {
        const float v = x[i];
        call.out[0].i32_mut()[i] =
            int32_t(bisect(count, [&](size_t k) { return right ? boundaries[k] <= v : boundaries[k] < v; }));
    }
    return Fault::kNone;
}

// The finaliser of MurmurHash3 (Appleby 2011).
uint32_t mix(uint32_t h) {
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}

Fault lookup(const Call& call) {
    const int32_t* x = call.in[0].i32();
    const int32_t* table = call.inputs > 1 ? call.in[1].i32() : nullptr;  // rows of key, id
    const size_t keys = table ? call.in[1].dims[0] : 0;
    const uint32_t first = uint32_t(call.attr[0].i), bins = uint32_t(call.attr[1].i), salt = uint32_t(call.attr[2].i);
    for (size_t i = 0; i < call.out[0].elements; ++i) {
        const int32_t v = x[i];
        size_t k = bisect(keys, [&](size_t at) { return table[2 * at] < v; });
        k = k < keys ? k : keys - 1;
        const bool known = keys && table[2 * k] == v;
        const uint32_t bin = uint32_t(uint64_t(mix(uint32_t(v) ^ salt)) * bins >> 32);
        call.out[0].i32_mut()[i] = known ? table[2 * k + 1] : int32_t(first + bin);
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- text

constexpr uint32_t kMostNgrams = 4;
constexpr uint32_t kFnvBasis = 2166136261u, kFnvPrime = 16777619u;  // FNV-1a, 32 bits (Fowler, Noll, Vo)
enum Split { kNone = 0, kWhitespace = 1, kCharacters = 2 };

bool is_space(uint8_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_punctuation(uint8_t c) {
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
}
uint32_t hash_byte(uint32_t hash, uint8_t byte) { return (hash ^ byte) * kFnvPrime; }

// The hashes of one text's tokens, and of up to `ngrams` tokens in a row joined by spaces, as they end.
struct Tokens {
    int32_t *next, *last;
    uint32_t basis, ngrams;
    uint32_t count = 0;  // tokens that have ended
    bool inside = false;
    uint32_t running[kMostNgrams] = {};  // [k]: the last k tokens and the current one
    uint32_t ended[kMostNgrams] = {};    // [k]: the last k + 1 tokens

    void take(uint8_t byte) {
        for (uint32_t k = 0; k < ngrams; ++k) {
            if (!inside) running[k] = k == 0 ? basis : hash_byte(count < k ? 0 : ended[k - 1], ' ');
            running[k] = hash_byte(running[k], byte);
        }
        inside = true;
    }
    void end() {
        if (!inside) return;
        inside = false;
        ++count;
        for (uint32_t k = 0; k < ngrams; ++k) {
            ended[k] = running[k];
            if (k < count && next < last) *next++ = int32_t(running[k] ? running[k] : 1);
        }
    }
};

Fault tokenize(const Call& call) {
    const size_t bytes = call.in[0].last(), width = call.out[0].last(), rows = call.out[0].elements / width;
    const bool lower = call.attr[0].i, strip = call.attr[1].i;
    const int32_t split = call.attr[2].i;
    const uint8_t* text = call.in[0].u8();
    int32_t* y = call.out[0].i32_mut();
    for (size_t m = 0; m < rows; ++m, text += bytes, y += width) {
        Tokens tokens{y, y + width, kFnvBasis ^ uint32_t(call.attr[4].i), uint32_t(call.attr[3].i)};
        for (size_t i = 0; i < bytes && text[i]; ++i) {
            uint8_t c = text[i];
            if (lower && c >= 'A' && c <= 'Z') c |= 0x20;
            if (strip && is_punctuation(c)) continue;
            if (split == kWhitespace && is_space(c)) {
                tokens.end();
                continue;
            }
            if (split == kCharacters && (c & 0xc0) != 0x80) tokens.end();
            tokens.take(c);
        }
        tokens.end();
        while (tokens.next < tokens.last) *tokens.next++ = 0;
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- resize

enum Interpolation { kNearest = 0, kNearestExact = 1, kBilinear = 2 };

// The two pixels of an axis that a pixel of the result lies between, and the share of each.
struct Taps {
    size_t place[2];
    float share[2];

    Taps(uint32_t at, uint32_t size, uint32_t resized, int32_t mode) {
        const float scale = float(size) / float(resized);
        float x = mode == kNearest ? float(at) * scale : (float(at) + 0.5f) * scale;
        if (mode == kBilinear) x = x < 0.5f ? 0.0f : x - 0.5f;
        const size_t low = size_t(x);
        place[0] = low < size ? low : size - 1;
        place[1] = mode == kBilinear && place[0] + 1 < size ? place[0] + 1 : place[0];
        const float rest = mode == kBilinear ? x - float(place[0]) : 0.0f;
        share[1] = rest < 1.0f ? rest : 1.0f;
        share[0] = 1.0f - share[1];
    }
};

// f(pixel of the small grid, taps of its row and column) for all images; pixels and images count channels.
template <class Function>
EVENSONG_INLINE void over_pixels(const Operand& x, const Operand& y, int32_t mode, Function f) {
    size_t pixel = 0;
    for (uint32_t n = 0; n < y.dims[0]; ++n) {
        for (uint32_t p = 0; p < y.dims[1]; ++p) {
            const Taps row(p, x.dims[1], y.dims[1], mode);
            for (uint32_t q = 0; q < y.dims[2]; ++q, pixel += y.dims[3]) {
                const Taps column(q, x.dims[2], y.dims[2], mode);
                size_t from[2][2];
                for (size_t i = 0; i < 2; ++i) {
                    for (size_t j = 0; j < 2; ++j) {
                        from[i][j] = ((size_t(n) * x.dims[1] + row.place[i]) * x.dims[2] + column.place[j]) * x.dims[3];
                    }
                }
                f(pixel, from, row.share, column.share);
            }
        }
    }
}

template <class Item>
void resize(const Call& call, const Item* x) {
    const int32_t mode = call.attr[0].i;
    const size_t channels = call.out[0].dims[3];
    float* y = call.out[0].f32_mut();
    over_pixels(call.in[0], call.out[0], mode,
                [=](size_t pixel, const size_t (&from)[2][2], const float* row, const float* column) {
                    for (size_t c = 0; c < channels; ++c) {
                        float lines[2];
                        if (mode != kBilinear) {
                            y[pixel + c] = float(x[from[0][0] + c]);
                            continue;
                        }
                        for (size_t i = 0; i < 2; ++i) {
                            lines[i] = column[0] * float(x[from[i][0] + c]) + column[1] * float(x[from[i][1] + c]);
                        }
                        y[pixel + c] = row[0] * lines[0] + row[1] * lines[1];
                    }
                });
}

Fault resize2d(const Call& call) {
    if (call.in[0].dtype == DType::kU8) {
        resize(call, call.in[0].u8());
    } else {
        resize(call, call.in[0].f32());
    }
    return Fault::kNone;
}

Fault resize2d_grad(const Call& call) {
    const float* dy = call.in[0].f32();
    float* dx = call.out[0].f32_mut();
    const size_t channels = call.in[0].dims[3];
    __builtin_memset(dx, 0, call.out[0].elements * sizeof *dx);
    over_pixels(call.out[0], call.in[0], call.attr[0].i,
                [=](size_t pixel, const size_t (&to)[2][2], const float* row, const float* column) {
                    for (size_t k = 0; k < 4; ++k) {
                        const float share = row[k / 2] * column[k % 2];
                        if (share == 0.0f) continue;
                        for (size_t c = 0; c < channels; ++c) dx[to[k / 2][k % 2] + c] += share * dy[pixel + c];
                    }
                });
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- crop and flip

// One block of Philox4x32-10 (Salmon et al. 2011).
void philox(uint32_t counter, uint32_t stream, const Run& run, uint32_t (&words)[4]) {
    uint32_t c[4] = {counter, stream, uint32_t(run.step), uint32_t(run.step >> 32)};
    uint32_t k0 = uint32_t(run.seed), k1 = uint32_t(run.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
        const uint64_t a = uint64_t(c[0]) * 0xd2511f53u, b = uint64_t(c[2]) * 0xcd9e8d57u;
        const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1,
                                  uint32_t(a)};
        __builtin_memcpy(c, next, sizeof c);
    }
    __builtin_memcpy(words, c, sizeof c);
}

// Where a window of `part` pixels starts on an axis of `whole`, and which way it is read.
struct Span {
    int64_t start, step;

    Span(int64_t whole, int64_t part) : start((whole - part) >> 1), step(1) {}
    Span(int64_t whole, int64_t part, int64_t pad, bool mirrored, uint32_t word)
        : start(int64_t(uint64_t(word) * uint64_t(whole + 2 * pad - part + 1) >> 32) - pad), step(1) {
        if (!mirrored) return;
        start += part - 1;
        step = -1;
    }
};

Fault crop2d(const Call& call) {
    const Operand &x = call.in[0], &y = call.out[0];
    const Attribute* attr = call.attr;  // random, pad_h, pad_w, flip_h, flip_v, stream
    const size_t item = x.dtype == DType::kF32 || x.dtype == DType::kI32 ? 4 : 1, pixel = item * x.dims[3];
    const int64_t height = x.dims[1], width = x.dims[2];
    const char* from = static_cast<const char*>(x.data);
    char* to = static_cast<char*>(y.data);
    for (uint32_t n = 0; n < y.dims[0]; ++n, from += size_t(height) * size_t(width) * pixel) {
        Span rows(height, y.dims[1]), columns(width, y.dims[2]);
        if (attr[0].i) {
            uint32_t words[4];
            philox(n, uint32_t(attr[5].i), *call.run, words);
            rows = Span(height, y.dims[1], attr[1].i, attr[4].i && words[2] >> 31, words[0]);
            columns = Span(width, y.dims[2], attr[2].i, attr[3].i && words[3] >> 31, words[1]);
        }
        int64_t row = rows.start;
        for (uint32_t p = 0; p < y.dims[1]; ++p, row += rows.step) {
            int64_t column = columns.start;
            for (uint32_t q = 0; q < y.dims[2]; ++q, column += columns.step, to += pixel) {
                const bool inside = row >= 0 && row < height && column >= 0 && column < width;
                if (inside) {
                    __builtin_memcpy(to, from + size_t(row * width + column) * pixel, pixel);
                } else {
                    __builtin_memset(to, 0, pixel);
                }
            }
        }
    }
    return Fault::kNone;
}

// ------------------------------------------------------------------------------------------------- int8

Fault qlut_u8(const Call& call) {
    const uint8_t* x = call.in[0].u8();
    const int8_t* table = call.in[1].i8();
    int8_t* y = call.out[0].i8_mut();
    const size_t channels = call.in[1].dims[0], count = call.out[0].elements;
    for (size_t c = 0; c < channels; ++c, table += 256) {
        for (size_t i = c; i < count; i += channels) y[i] = table[x[i]];
    }
    return Fault::kNone;
}

}  // namespace

void register_input(Kernel* table) {
    table[op::CAST] = cast;
    table[op::ONE_HOT] = one_hot;
    table[op::BUCKETIZE] = bucketize;
    table[op::LOOKUP] = lookup;
    table[op::TOKENIZE] = tokenize;
    table[op::RESIZE2D] = resize2d;
    table[op::RESIZE2D_GRAD] = resize2d_grad;
    table[op::CROP2D] = crop2d;
    table[op::QLUT_U8] = qlut_u8;
}

}  // namespace EVENSONG_ISA
}  // namespace evensong
