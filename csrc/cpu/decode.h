// Stored weights to the integers that they mean, with AVX2. Included by what is compiled once for each level of
// instructions (DITQ_LEVEL), inside of its namespace's unnamed one.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace ditq {
namespace DITQ_LEVEL {
namespace {

// The integers that the nibbles of a group mean, by the group's byte.
struct Decoded {
    alignas(16) std::int8_t values[256][16];
};
constexpr Decoded decoded_nibbles() {
    Decoded all{};
    for (int code = 0; code < 256; ++code) {
        const int multiplier = (code >> 4) + 1, zero_point = code & 15;
        for (int nibble = 0; nibble < 16; ++nibble) {
            all.values[code][nibble] = static_cast<std::int8_t>(multiplier * (nibble - zero_point));
        }
    }
    return all;
}
constexpr Decoded DECODED = decoded_nibbles();

// `count` integers from input k on, of output n. `given` has a stored weight's members, as Int8Product does.
template <class Given>
void decode(const Given& given, std::int64_t n, std::int64_t k, std::int64_t count, std::int8_t* to) {
    const std::uint8_t* stored = given.weight + n * given.weight_row_bytes;
    if (given.group_code == nullptr) {
        const std::int64_t there = std::min(count, given.inputs - k);
        std::memcpy(to, stored + k, there);
        std::memset(to + there, 0, count - there);
        return;
    }
    const std::int64_t last_group = (given.inputs - 1) / given.group;
    const __m256i nibble = _mm256_set1_epi8(15);
    for (std::int64_t start = k; start < k + count; start += 32) {
        // Of each 128 codes the first 64 are low nibbles. Past the last input, whatever comes meets zeros.
        const std::int64_t within = start % 128;
        const std::uint8_t* bytes = stored + (start / 128) * 64 + within % 64;
        __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
        if (within >= 64) codes = _mm256_srli_epi16(codes, 4);
        const std::int64_t group = std::min(start / given.group, last_group);
        const std::int8_t* meaning = DECODED.values[given.group_code[group * given.outputs + n]];
        const __m256i meanings =
            _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(meaning)));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(to + start - k), _mm256_shuffle_epi8(meanings, _mm256_and_si256(codes, nibble)));
    }
}

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
