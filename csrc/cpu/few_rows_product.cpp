// Compiled once for each level of instructions (DITQ_LEVEL, a namespace; DITQ_LANES, the floats in a register), with
// -ffp-contract=off.
#include "few_rows_product.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "decode.h"
#include "lanes.h"

namespace ditq {
namespace DITQ_LEVEL {
namespace {

constexpr std::int64_t BLOCK = 1024;  // inputs that are decoded at a time; a multiple of all groups
constexpr int ROWS = 4;               // that meet a decoded weight before the next is converted

// By intrinsics: of __builtin_convertvector, GCC makes a load for each byte.
#if DITQ_LANES == 16
Lanes widened(const std::int8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}
Lanes fused(Lanes a, Lanes b, Lanes sum) { return _mm512_fmadd_ps(a, b, sum); }
#else
Lanes widened(const std::int8_t* codes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}
Lanes fused(Lanes a, Lanes b, Lanes sum) { return _mm256_fmadd_ps(a, b, sum); }
#endif

Lanes& at(float* values) { return *reinterpret_cast<Lanes*>(values); }
const Lanes& at(const float* values) { return *reinterpret_cast<const Lanes*>(values); }

float sum(const float* lanes) {
    float values[LANES];
    std::memcpy(values, lanes, sizeof values);
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) values[i] += values[i + width];
    }
    return values[0];
}

// Adds to the sums of COUNT rows, LANES of each, what `count` inputs, a multiple of 32, contribute, times a factor.
template <int COUNT>
void add(
    const float* x, std::int64_t x_stride, const std::int8_t* codes, std::int64_t count, float factor, float* sums) {
    Lanes total[COUNT][2] = {};
    for (std::int64_t k = 0; k < count; k += 2 * LANES) {
        for (int half = 0; half < 2; ++half) {
            const std::int64_t i = k + half * LANES;
            const Lanes weights = widened(codes + i);
            for (int row = 0; row < COUNT; ++row) {
                total[row][half] = fused(weights, at(x + row * x_stride + i), total[row][half]);
            }
        }
    }
    for (int row = 0; row < COUNT; ++row) at(sums + row * LANES) += (total[row][0] + total[row][1]) * factor;
}

using Add = void (*)(const float*, std::int64_t, const std::int8_t*, std::int64_t, float, float*);
constexpr Add ADD[ROWS + 1] = {nullptr, add<1>, add<2>, add<3>, add<4>};

// `sums` [rows, LANES] gets what is still to be summed across lanes.
void compute_output(const FewRowsProduct& given, std::int64_t n, float* sums) {
    alignas(64) std::int8_t codes[BLOCK];
    std::fill(sums, sums + given.rows * LANES, 0.0f);
    for (std::int64_t k = 0; k < given.x_stride; k += BLOCK) {
        const std::int64_t count = std::min(BLOCK, given.x_stride - k);
        decode(given, n, k, count, codes);
        const std::int64_t segment = given.promoted ? given.group : count;
        for (std::int64_t from = 0; from < count && k + from < given.inputs; from += segment) {
            const float factor = given.promoted ? given.scale[(k + from) / given.group * given.outputs + n] : 1.0f;
            for (std::int64_t row = 0; row < given.rows; row += ROWS) {
                const float* x = given.x + row * given.x_stride + k + from;
                const auto rows = std::min<std::int64_t>(ROWS, given.rows - row);
                ADD[rows](
                    x, given.x_stride, codes + from, std::min(segment, count - from), factor, sums + row * LANES);
            }
        }
    }
}

}  // namespace

void multiply_few_rows(const FewRowsProduct& given, std::int64_t first, std::int64_t last) {
    std::vector<float> sums(given.rows * LANES);
    for (std::int64_t n = first; n < last; ++n) {
        compute_output(given, n, sums.data());
        for (std::int64_t row = 0; row < given.rows; ++row) {
            const float total = sum(sums.data() + row * LANES);
            const float scaled = given.promoted ? total : total * given.scale[n];
            given.out[row * given.outputs + n] = given.bias == nullptr ? scaled : scaled + given.bias[n];
        }
    }
}

}  // namespace DITQ_LEVEL
}  // namespace ditq
