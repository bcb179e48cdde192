// Compiled once for each level of instructions (DITQ_LEVEL, a namespace; DITQ_LANES, the floats in a register), with
// -ffp-contract=off.
#include "few_rows_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "decode.h"

namespace ditq {
namespace DITQ_LEVEL {
namespace {

constexpr int LANES = DITQ_LANES;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef std::int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef std::int32_t IntLanes __attribute__((vector_size(4 * LANES)));

constexpr std::int64_t BLOCK = 1024;  // inputs that are decoded at a time; a multiple of all groups
constexpr int ROWS = 4;               // that meet a decoded weight before the next is converted

float sum(const Lanes& lanes) {
    float values[LANES];
    std::memcpy(values, &lanes, sizeof values);
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) values[i] += values[i + width];
    }
    return values[0];
}

// Adds to the sums of COUNT rows what `count` inputs, a multiple of 32, contribute, times a factor.
template <int COUNT>
void add(
    const float* x, std::int64_t x_stride, const std::int8_t* codes, std::int64_t count, float factor, float* sums) {
    Lanes total[COUNT][2] = {};
    for (std::int64_t k = 0; k < count; k += 2 * LANES) {
        for (int half = 0; half < 2; ++half) {
            const auto& stored = *reinterpret_cast<const Bytes*>(codes + k + half * LANES);
            const Lanes weights = __builtin_convertvector(__builtin_convertvector(stored, IntLanes), Lanes);
            for (int row = 0; row < COUNT; ++row) {
                total[row][half] +=
                    weights * *reinterpret_cast<const Lanes*>(x + row * x_stride + k + half * LANES);
            }
        }
    }
    for (int row = 0; row < COUNT; ++row) sums[row] += sum(total[row][0] + total[row][1]) * factor;
}

using Add = void (*)(const float*, std::int64_t, const std::int8_t*, std::int64_t, float, float*);
constexpr Add ADD[ROWS + 1] = {nullptr, add<1>, add<2>, add<3>, add<4>};

void compute_output(const FewRowsProduct& given, std::int64_t n, float* sums) {
    alignas(64) std::int8_t codes[BLOCK];
    std::fill(sums, sums + given.rows, 0.0f);
    for (std::int64_t k = 0; k < given.x_stride; k += BLOCK) {
        const std::int64_t count = std::min(BLOCK, given.x_stride - k);
        decode(given, n, k, count, codes);
        const std::int64_t segment = given.promoted ? given.group : count;
        for (std::int64_t from = 0; from < count && k + from < given.inputs; from += segment) {
            const float factor = given.promoted ? given.scale[(k + from) / given.group * given.outputs + n] : 1.0f;
            for (std::int64_t row = 0; row < given.rows; row += ROWS) {
                const float* x = given.x + row * given.x_stride + k + from;
                const auto rows = std::min<std::int64_t>(ROWS, given.rows - row);
                ADD[rows](x, given.x_stride, codes + from, std::min(segment, count - from), factor, sums + row);
            }
        }
    }
}

}  // namespace

void multiply_few_rows(const FewRowsProduct& given, std::int64_t first, std::int64_t last) {
    std::vector<float> sums(given.rows);
    for (std::int64_t n = first; n < last; ++n) {
        compute_output(given, n, sums.data());
        for (std::int64_t row = 0; row < given.rows; ++row) {
            const float scaled = given.promoted ? sums[row] : sums[row] * given.scale[n];
            given.out[row * given.outputs + n] = given.bias == nullptr ? scaled : scaled + given.bias[n];
        }
    }
}

}  // namespace DITQ_LEVEL
}  // namespace ditq
