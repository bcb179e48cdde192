// Compiled once for each level of instructions (DITQ_LEVEL, a namespace, and DITQ_LANES, the floats in a register), with
// -ffp-contract=off: each operation is rounded by itself, as PyTorch's are.
#include "quantize_activation.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace ditq {
namespace DITQ_LEVEL {
namespace {

constexpr int LANES = DITQ_LANES;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef std::int32_t IntLanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr float LARGEST = 127.0f;
constexpr float SMALLEST_AMAX = 0x1p-100f;    // reference.py says why
constexpr float TO_INTEGER = 12582912.0f;     // added and taken away, it rounds to the nearest integer, ties to even
constexpr std::int32_t INFINITE = 0x7f800000;  // as bits; NaN is above

// `values` gets row m in fp32. Returns the bits of its largest magnitude.
std::int32_t load(const ActivationRounding& given, std::int64_t m, std::vector<float>& values) {
    const std::int64_t start = m * given.row_stride;
    if (given.type == FloatType::float32) {
        std::memcpy(values.data(), static_cast<const float*>(given.x) + start, 4 * given.inputs);
    } else {
        const std::uint16_t* from = static_cast<const std::uint16_t*>(given.x) + start;
        if (given.type == FloatType::bfloat16) {
            std::uint32_t* to = reinterpret_cast<std::uint32_t*>(values.data());
            for (std::int64_t k = 0; k < given.inputs; ++k) to[k] = static_cast<std::uint32_t>(from[k]) << 16;
        } else {
            for (std::int64_t k = 0; k < given.inputs; k += 8) {
                std::uint16_t eight[8] = {};
                std::memcpy(eight, from + k, 2 * std::min<std::int64_t>(8, given.inputs - k));
                const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(eight));
                _mm256_storeu_ps(values.data() + k, _mm256_cvtph_ps(halves));
            }
        }
    }
    IntLanes most = {};
    for (std::size_t k = 0; k < values.size(); k += LANES) {
        const IntLanes magnitude = *reinterpret_cast<const IntLanes*>(values.data() + k) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    std::int32_t found = 0;
    for (int i = 0; i < LANES; ++i) found = std::max<std::int32_t>(found, most[i]);
    return found;
}

void round(const std::vector<float>& values, float factor, std::int64_t inputs, std::int8_t* codes) {
    constexpr std::int64_t STRETCH = 256;
    std::int32_t whole[STRETCH];
    for (std::int64_t start = 0; start < inputs; start += STRETCH) {
        const std::int64_t count = std::min(STRETCH, inputs - start);
        for (std::int64_t k = 0; k < count; k += LANES) {
            Lanes y = *reinterpret_cast<const Lanes*>(values.data() + start + k) * factor;
            y = y > LARGEST ? Lanes{} + LARGEST : y;
            y = y < -LARGEST ? Lanes{} - LARGEST : y;
            y = (y + TO_INTEGER) - TO_INTEGER;
            *reinterpret_cast<IntLanes*>(whole + k) = __builtin_convertvector(y, IntLanes);
        }
        for (std::int64_t k = 0; k < count; ++k) codes[start + k] = static_cast<std::int8_t>(whole[k]);
    }
}

}  // namespace

void round_activations(const ActivationRounding& given, std::int64_t first, std::int64_t last) {
    std::vector<float> values((given.inputs + LANES - 1) / LANES * LANES);  // zeros past the last input
    for (std::int64_t m = first; m < last; ++m) {
        std::int8_t* codes = given.codes + m * given.inputs;
        const std::int32_t bits = load(given, m, values);
        if (bits >= INFINITE) {
            std::memset(codes, 0, given.inputs);
            given.scale[m] = std::numeric_limits<float>::quiet_NaN();
            continue;
        }
        float reach;
        std::memcpy(&reach, &bits, sizeof reach);
        if (given.amax != nullptr) reach = *given.amax;
        reach = std::max(reach, SMALLEST_AMAX);
        round(values, LARGEST / reach, given.inputs, codes);
        given.scale[m] = reach / LARGEST;
    }
}

}  // namespace DITQ_LEVEL
}  // namespace ditq
