// The sums of a tile to outputs: scaled, the bias added, rounded, added to a residual, stored. Included by what is compiled
// once for each level of instructions (DITQ_LEVEL), with -ffp-contract=off: each operation is rounded by itself.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "int8_product.h"
#include "lanes.h"

namespace ditq {
namespace DITQ_LEVEL {
namespace {

typedef std::uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef std::uint16_t Halves __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // of two registers' lanes

// fp32's bits whose upper half is the bf16 that is nearest, ties to even.
Bits rounded_to_bfloat16(const Lanes& y) {
    const Bits bits = reinterpret_cast<const Bits&>(y);
    const Bits rounded = bits + ((bits >> 16 & 1) + 0x7fff);
    return y == y ? rounded : Bits{} + 0x7fc00000;
}

Halves to_bfloat16(const Lanes& y, const Lanes& z) {
    Halves upper;
    for (int i = 0; i < 2 * LANES; ++i) upper[i] = 2 * i + 1;
    const Bits first = rounded_to_bfloat16(y), second = rounded_to_bfloat16(z);
    return __builtin_shuffle(reinterpret_cast<const Halves&>(first), reinterpret_cast<const Halves&>(second), upper);
}

Halves to_float16(const Lanes& y, const Lanes& z) {
    Halves halves;
    auto* to = reinterpret_cast<__m128i*>(&halves);
    for (const Lanes* values : {&y, &z}) {
        for (int i = 0; i < LANES; i += 8, ++to) {
            const __m256 eight = _mm256_loadu_ps(reinterpret_cast<const float*>(values) + i);
            _mm_storeu_si128(to, _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT));
        }
    }
    return halves;
}

// The values of `width` outputs from the n-th on; zeros past the last.
void load_outputs(const Int8Product& given, const float* values, std::int64_t n, std::int64_t width, float* to) {
    const std::int64_t there = std::max<std::int64_t>(std::min(width, given.outputs - n), 0);
    std::memset(to, 0, width * sizeof(float));
    std::memcpy(to, values + n, there * sizeof(float));
}

// A register's values of an output type, and values as that type holds them.
template <OutputType TYPE>
struct Stored {
    static constexpr std::int64_t SIZE = 4;
    static Lanes load(const std::uint8_t* from) { return *reinterpret_cast<const Lanes*>(from); }
    static Lanes rounded(const Lanes& y) { return y; }
};

template <>
struct Stored<OutputType::bfloat16> {
    static constexpr std::int64_t SIZE = 2;
    static Lanes load(const std::uint8_t* from) {
        typedef std::uint16_t Half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
        const Bits bits = __builtin_convertvector(*reinterpret_cast<const Half*>(from), Bits) << 16;
        return reinterpret_cast<const Lanes&>(bits);
    }
    static Lanes rounded(const Lanes& y) {
        const Bits bits = rounded_to_bfloat16(y) & 0xffff0000;
        return reinterpret_cast<const Lanes&>(bits);
    }
};

template <>
struct Stored<OutputType::float16> {
    static constexpr std::int64_t SIZE = 2;
    static Lanes load(const std::uint8_t* from) {
        Lanes y;
        for (int i = 0; i < LANES; i += 8) {
            const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * SIZE));
            _mm256_storeu_ps(reinterpret_cast<float*>(&y) + i, _mm256_cvtph_ps(eight));
        }
        return y;
    }
    static Lanes rounded(const Lanes& y) {
        const Halves halves = to_float16(y, y);
        return load(reinterpret_cast<const std::uint8_t*>(&halves));
    }
};

template <int WIDTH, OutputType TYPE>
void store_sums_as(
    const Int8Product& given, const std::int32_t* sums, std::int64_t first_row, std::int64_t rows, std::int64_t n) {
    using Type = Stored<TYPE>;
    constexpr std::int64_t SIZE = Type::SIZE;
    static_assert(WIDTH % (2 * LANES) == 0);
    const bool promoted = given.promoted, has_bias = given.bias != nullptr, is_added = given.residual != nullptr;
    alignas(64) float scales[WIDTH], biases[WIDTH];
    if (!promoted) load_outputs(given, given.scale, n, WIDTH, scales);
    if (has_bias) load_outputs(given, given.bias, n, WIDTH, biases);
    const std::int64_t count = std::min<std::int64_t>(WIDTH, given.outputs - n);
    // Of the last outputs of a row only `count` may be read and written.
    typedef std::uint8_t Row[WIDTH * SIZE];
    alignas(64) Row last_outputs, last_residual, last_gate;
    const auto row_of = [&](const void* values, std::int64_t row, std::int64_t stride, Row& last) {
        const std::uint8_t* found = static_cast<const std::uint8_t*>(values) + (row * stride + n) * SIZE;
        if (count == WIDTH) return found;
        std::memcpy(last, found, count * SIZE);
        return static_cast<const std::uint8_t*>(last);
    };
    for (std::int64_t row = first_row; row < first_row + rows; ++row, sums += WIDTH) {
        std::uint8_t* out = static_cast<std::uint8_t*>(given.out) + (row * given.outputs + n) * SIZE;
        std::uint8_t* to = count == WIDTH ? out : last_outputs;
        const std::uint8_t *residual = nullptr, *gate = nullptr;
        if (is_added) {
            const std::int64_t sample = (given.first_row + row) / given.rows_per_gate;
            residual = row_of(given.residual, row, given.residual_stride, last_residual);
            gate = row_of(given.gate, sample, given.gate_stride, last_gate);
        }
        const float sx = given.sx[row];
        const auto value = [&](int i) {
            const IntLanes& sum = *reinterpret_cast<const IntLanes*>(sums + i);
            Lanes y;
            if (promoted) {
                y = reinterpret_cast<const Lanes&>(sum) * sx;
            } else {
                y = __builtin_convertvector(sum, Lanes) * sx;
                y *= *reinterpret_cast<const Lanes*>(scales + i);
            }
            if (has_bias) y += *reinterpret_cast<const Lanes*>(biases + i);
            if (is_added) y = Type::load(residual + i * SIZE) + Type::load(gate + i * SIZE) * Type::rounded(y);
            return y;
        };
        const auto put = [&](const auto& values, int i) { std::memcpy(to + i * SIZE, &values, sizeof values); };
        for (int i = 0; i < WIDTH; i += 2 * LANES) {
            if constexpr (TYPE == OutputType::int32) std::memcpy(to + i * SIZE, sums + i, 2 * LANES * SIZE);
            if constexpr (TYPE == OutputType::float32) {
                put(value(i), i);
                put(value(i + LANES), i + LANES);
            }
            if constexpr (TYPE == OutputType::bfloat16) put(to_bfloat16(value(i), value(i + LANES)), i);
            if constexpr (TYPE == OutputType::float16) put(to_float16(value(i), value(i + LANES)), i);
        }
        if (count < WIDTH) std::memcpy(out, last_outputs, count * SIZE);
    }
}

// sums [rows, WIDTH], of the rows from first_row and the outputs from n on; fp32 in their place where groups are
// scaled.
template <int WIDTH>
void store_sums(
    const Int8Product& given, const std::int32_t* sums, std::int64_t first_row, std::int64_t rows, std::int64_t n) {
    switch (given.out_type) {
        case OutputType::int32: return store_sums_as<WIDTH, OutputType::int32>(given, sums, first_row, rows, n);
        case OutputType::float32: return store_sums_as<WIDTH, OutputType::float32>(given, sums, first_row, rows, n);
        case OutputType::bfloat16: return store_sums_as<WIDTH, OutputType::bfloat16>(given, sums, first_row, rows, n);
        default: return store_sums_as<WIDTH, OutputType::float16>(given, sums, first_row, rows, n);
    }
}

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
