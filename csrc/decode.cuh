// Stored weights to numbers that enter a product. Every function runs on the host too, where tests/test_extension.py
// walks all codes, multipliers and zero points through it.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

namespace ditq {

#define DITQ_BOTH __host__ __device__ __forceinline__

// The meaning of a group's byte: weights are multiplier * (code - zero_point), an int8.
struct Group {
    std::uint32_t multiplier;  // 1..16
    std::uint32_t zero_point;  // 0..15
};

DITQ_BOTH Group unpack_group(std::uint8_t stored) {
    return {(static_cast<std::uint32_t>(stored) >> 4) + 1, static_cast<std::uint32_t>(stored) & 0xF};
}

// One of four words, by a number that need not be known when this is compiled: registers have no addresses.
DITQ_BOTH std::uint32_t word(const uint4& words, int index) {
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

// Four stored bytes hold codes of the low half-block in their low nibbles, of the high half-block in their high ones.
DITQ_BOTH std::uint32_t low_nibbles(std::uint32_t four_bytes) { return four_bytes & 0x0F0F0F0F; }
DITQ_BOTH std::uint32_t high_nibbles(std::uint32_t four_bytes) { return (four_bytes >> 4) & 0x0F0F0F0F; }

// Four codes, one a byte, to four int8. u * m + (128 - z * m) stays in 0..255 for every format, so that no byte carries
// into the next; the flipped top bit takes the 128 off again.
DITQ_BOTH std::uint32_t decode_four(std::uint32_t codes, Group group) {
    return (codes * group.multiplier + (128 - group.zero_point * group.multiplier) * 0x01010101) ^ 0x80808080;
}

// One of four int8, in fp32.
DITQ_BOTH float int8_to_float(std::uint32_t four, int place) {
    return static_cast<float>(static_cast<std::int8_t>(four >> (8 * place)));
}

// ---- Pairs of 16-bit floats, for matrix instructions ----

// The pattern whose last mantissa bit is worth 1: a small integer put into its low bits is added to it. 128 and 1024.
template <class T> struct UnitStep;
template <> struct UnitStep<__nv_bfloat16> {
    using Pair = __nv_bfloat162;
    static constexpr std::uint32_t pattern = 0x43004300;
};
template <> struct UnitStep<__half> {
    using Pair = __half2;
    static constexpr std::uint32_t pattern = 0x64006400;
};

template <class To, class From> DITQ_BOTH To bits_of(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof(To));
    return to;
}

template <class T> DITQ_BOTH std::uint32_t subtract_pair(std::uint32_t a, std::uint32_t b) {
    using Pair = typename UnitStep<T>::Pair;
    return bits_of<std::uint32_t>(__hsub2(bits_of<Pair>(a), bits_of<Pair>(b)));
}

template <class T> DITQ_BOTH std::uint32_t multiply_pair(std::uint32_t a, std::uint32_t b) {
    using Pair = typename UnitStep<T>::Pair;
    return bits_of<std::uint32_t>(__hmul2(bits_of<Pair>(a), bits_of<Pair>(b)));
}

// Two int8, in bytes 0 and 2, to a pair: the seven low bits count up, the sign bit counts 128 down. (bf16's mantissa has
// no room for all eight.)
template <class T> DITQ_BOTH std::uint32_t int8_pair(std::uint32_t bytes) {
    constexpr std::uint32_t pattern = UnitStep<T>::pattern;
    return subtract_pair<T>((bytes & 0x007F007F) | pattern, (bytes & 0x00800080) | pattern);
}

// A group as a pair decoder wants it: the zero point above the pattern, and the multiplier twice.
template <class T> struct PairGroup {
    std::uint32_t zero_point;
    std::uint32_t multiplier;
};

template <class T> DITQ_BOTH PairGroup<T> pair_group(Group group) {
    constexpr std::uint32_t pattern = UnitStep<T>::pattern;
    return {
        pattern | (group.zero_point * 0x00010001),
        subtract_pair<T>(pattern | (group.multiplier * 0x00010001), pattern),
    };
}

// Two codes, in the low nibbles of bytes 0 and 2, to a pair. Difference and product are integers below 256: exact.
template <class T> DITQ_BOTH std::uint32_t nibble_pair(std::uint32_t bytes, PairGroup<T> group) {
    const std::uint32_t code = (bytes & 0x000F000F) | UnitStep<T>::pattern;
    return multiply_pair<T>(subtract_pair<T>(code, group.zero_point), group.multiplier);
}

}  // namespace ditq
