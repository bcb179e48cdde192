// Products of int8 by AVX2, which multiplies pairs of 16-bit integers: both operands are widened beforehand, so that
// nothing saturates.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ditq {
namespace DITQ_LEVEL {
namespace {

struct Tile {
    static constexpr int ROWS = 4;  // compilers run out of the 16 registers with more
    static constexpr int PANELS = 1;
    static constexpr std::int64_t BLOCK = 640;
    static constexpr std::int64_t FEWEST_ROWS = 64;
    using Element = std::int16_t;  // of both operands
    static constexpr bool SHIFTED = false;

    explicit Tile(std::int64_t) {}

    static constexpr int CHUNK = 2;  // inputs of a row that lie side by side; the same of the next row follows
    static std::int16_t arranged(std::int8_t code) { return code; }

    // sums [ROWS, 16] is or grows by the product of `count` dwords of inputs.
    void multiply(
        const Element* x, const std::int32_t* panels, std::int64_t, const std::int32_t*, std::int64_t count,
        std::int32_t* sums, bool first) const {
        __m256i total[ROWS][2];
        for (int row = 0; row < ROWS; ++row) {
            for (int half = 0; half < 2; ++half) {
                const auto* before = reinterpret_cast<const __m256i*>(sums + row * 16 + 8 * half);
                total[row][half] = first ? _mm256_setzero_si256() : _mm256_loadu_si256(before);
            }
        }
        const auto* pairs = reinterpret_cast<const std::int32_t*>(x);
        for (std::int64_t i = 0; i < count; ++i) {
            __m256i left = _mm256_load_si256(reinterpret_cast<const __m256i*>(panels + 16 * i));
            __m256i right = _mm256_load_si256(reinterpret_cast<const __m256i*>(panels + 16 * i + 8));
            __asm__("" : "+x"(left), "+x"(right));  // loaded once, and not again by each product
            for (int row = 0; row < ROWS; ++row) {
                const __m256i pair = _mm256_set1_epi32(pairs[i * ROWS + row]);
                total[row][0] = _mm256_add_epi32(total[row][0], _mm256_madd_epi16(pair, left));
                total[row][1] = _mm256_add_epi32(total[row][1], _mm256_madd_epi16(pair, right));
            }
        }
        for (int row = 0; row < ROWS; ++row) {
            for (int half = 0; half < 2; ++half) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + row * 16 + 8 * half), total[row][half]);
            }
        }
    }
};

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
