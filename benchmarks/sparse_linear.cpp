// A sparse matrix times a vector, as well as AVX2 can: y[o] = sum of value[k] x[column[k]] over row o's entries.
//
// What `python -m benchmarks pruning` measures against the engine's dense kernels, to know whether unstructured
// sparsity could pay at run time. Rows are padded to whole vectors; columns are 16 bits wide, so that an entry takes
// six bytes.
#include <immintrin.h>
#include <stdint.h>

extern "C" void sparse_linear(const float* x, const float* values, const uint16_t* columns, const uint32_t* rows,
                              uint32_t outputs, float* y) {
    for (uint32_t o = 0; o < outputs; ++o) {
        __m256 sums[4] = {};
        uint32_t k = rows[o];
        const uint32_t end = rows[o + 1];
        for (; k + 32 <= end; k += 32) {
            for (int j = 0; j < 4; ++j) {
                const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + k + 8 * j));
                const __m256 gathered = _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(narrow), 4);
                sums[j] = _mm256_fmadd_ps(_mm256_loadu_ps(values + k + 8 * j), gathered, sums[j]);
            }
        }
        for (; k < end; k += 8) {
            const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + k));
            const __m256 gathered = _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(narrow), 4);
            sums[0] = _mm256_fmadd_ps(_mm256_loadu_ps(values + k), gathered, sums[0]);
        }
        const __m256 total = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
        float lanes[8];
        _mm256_storeu_ps(lanes, total);
        y[o] = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
    }
}
