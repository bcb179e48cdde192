// Compiled once for each level of instructions (DITQ_LEVEL, a namespace, and DITQ_LANES, the floats in a register), with
// -ffp-contract=off: each operation is rounded by itself, as PyTorch's are.
#include "quantize_activation.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "activation_row.h"
#include "lanes.h"

namespace ditq {
namespace DITQ_LEVEL {
namespace {

static_assert(LANES <= MOST_LANES);

constexpr float LARGEST = 127.0f;
constexpr float SMALLEST_AMAX = 0x1p-100f;  // reference.py says why
// Added, it rounds to the nearest integer, ties to even: the lowest byte of the sum's bits.
constexpr float TO_INTEGER = 12582912.0f;
constexpr std::int32_t INFINITE = 0x7f800000;  // as bits; NaN is above

// By intrinsics what GCC makes several instructions of.
#if DITQ_LANES == 16
__m256i halves(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
Lanes from_bfloat16(const void* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(from)), 16));
}
Lanes from_float16(const void* from) { return _mm512_cvtph_ps(halves(from)); }
Lanes limited(Lanes y) { return _mm512_max_ps(Lanes{} - LARGEST, _mm512_min_ps(Lanes{} + LARGEST, y)); }  // NaN stays
void store_lowest_bytes(Lanes y, std::int8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_castps_si512(y)));
}
#else
__m128i halves(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
Lanes from_bfloat16(const void* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves(from)), 16));
}
Lanes from_float16(const void* from) { return _mm256_cvtph_ps(halves(from)); }
Lanes limited(Lanes y) { return _mm256_max_ps(Lanes{} - LARGEST, _mm256_min_ps(Lanes{} + LARGEST, y)); }  // NaN stays
void store_lowest_bytes(Lanes y, std::int8_t* to) {
    const __m256i lowest = _mm256_set1_epi32(0x0c080400);  // of each half's four dwords
    const __m256i quads = _mm256_shuffle_epi8(_mm256_castps_si256(y), lowest);
    const __m256i both = _mm256_permutevar8x32_epi32(quads, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(both));
}
#endif

Lanes from_float32(const void* from) { return *static_cast<const Lanes*>(from); }

template <class Stored, Lanes (*CONVERT)(const void*)>
std::int32_t load(const Stored* from, std::int64_t inputs, float* to) {
    IntLanes most = {};
    const auto take = [&](const Stored* stored, std::int64_t k) {
        Lanes& values = *reinterpret_cast<Lanes*>(to + k);
        values = CONVERT(stored);
        const IntLanes magnitude = reinterpret_cast<const IntLanes&>(values) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    };
    std::int64_t k = 0;
    for (; k + LANES <= inputs; k += LANES) take(from + k, k);
    if (k < inputs) {
        Stored rest[LANES] = {};
        std::memcpy(rest, from + k, (inputs - k) * sizeof(Stored));
        take(rest, k);
    }
    std::int32_t found = 0;
    for (int i = 0; i < LANES; ++i) found = std::max<std::int32_t>(found, most[i]);
    return found;
}

void round(const float* values, float factor, std::int64_t inputs, std::int8_t* codes) {
    const auto put = [&](std::int64_t k, std::int8_t* to) {
        const Lanes y = *reinterpret_cast<const Lanes*>(values + k) * factor;
        store_lowest_bytes(limited(y) + TO_INTEGER, to);
    };
    std::int64_t k = 0;
    for (; k + LANES <= inputs; k += LANES) put(k, codes + k);
    if (k < inputs) {
        std::int8_t rest[LANES];
        put(k, rest);
        std::memcpy(codes + k, rest, inputs - k);
    }
}

}  // namespace

std::int32_t load_row(FloatType type, const void* from, std::int64_t inputs, float* to) {
    const auto* halves = static_cast<const std::uint16_t*>(from);
    switch (type) {
        case FloatType::bfloat16: return load<std::uint16_t, from_bfloat16>(halves, inputs, to);
        case FloatType::float16: return load<std::uint16_t, from_float16>(halves, inputs, to);
        default: return load<float, from_float32>(static_cast<const float*>(from), inputs, to);
    }
}

void round_row(
    const float* values, std::int32_t most, const float* amax, std::int64_t inputs, std::int8_t* codes, float* scale) {
    if (most >= INFINITE) {
        std::memset(codes, 0, inputs);
        *scale = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    float reach;
    std::memcpy(&reach, &most, sizeof reach);
    if (amax != nullptr) reach = *amax;
    reach = std::max(reach, SMALLEST_AMAX);
    round(values, LARGEST / reach, inputs, codes);
    *scale = reach / LARGEST;
}

void round_activations(const ActivationRounding& given, std::int64_t first, std::int64_t last) {
    std::vector<float> values(given.inputs + MOST_LANES);
    const auto* x = static_cast<const std::uint8_t*>(given.x);
    const std::int64_t row_bytes = given.row_stride * (given.type == FloatType::float32 ? 4 : 2);
    for (std::int64_t m = first; m < last; ++m) {
        const std::int32_t most = load_row(given.type, x + m * row_bytes, given.inputs, values.data());
        round_row(values.data(), most, given.amax, given.inputs, given.codes + m * given.inputs, given.scale + m);
    }
}

}  // namespace DITQ_LEVEL
}  // namespace ditq
