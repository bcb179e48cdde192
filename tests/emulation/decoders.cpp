// Walks every stored weight that a format may hold through csrc/decode.cuh and compares with plain arithmetic. Silent if
// all agree.
#include <cstdio>
#include <cstdlib>

#include "decode.cuh"

namespace {

using namespace ditq;

void expect(int found, int expected, const char* what) {
    if (found == expected) return;
    std::printf("%s: %d instead of %d\n", what, found, expected);
    std::exit(1);
}

// Element 0 or 1 of a pair.
template <class T>
int element(std::uint32_t pair, int index) {
    T value;
    const std::uint16_t bits = static_cast<std::uint16_t>(pair >> (16 * index));
    std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
    const float number = static_cast<float>(value);
    expect(number == static_cast<int>(number), true, "a decoded number is whole");
    return static_cast<int>(number);
}

template <class T>
void walk_int8_pairs() {
    for (int first = -128; first < 128; ++first) {
        for (int second = -128; second < 128; ++second) {
            // The bytes between are other inputs', which must not show.
            const std::uint32_t bytes = static_cast<std::uint8_t>(first) | 0xA500u |
                                        static_cast<std::uint32_t>(static_cast<std::uint8_t>(second)) << 16 | 0x5A000000u;
            const std::uint32_t pair = int8_pair<T>(bytes);
            expect(element<T>(pair, 0), first, "int8, first of a pair");
            expect(element<T>(pair, 1), second, "int8, second of a pair");
        }
    }
}

// What ditq_kernels/layer/formats.py calls largest_multiplier.
bool fits(int multiplier, int zero_point) { return (15 - zero_point) * multiplier <= 127 && zero_point * multiplier <= 128; }

template <class T>
void walk_nibble_pairs(int multiplier, int zero_point, Group group) {
    const PairGroup<T> pair_parameters = pair_group<T>(group);
    for (int first = 0; first < 16; ++first) {
        for (int second = 0; second < 16; ++second) {
            const std::uint32_t bytes = 0xA5F0A5F0u & ~0x000F000Fu;
            const std::uint32_t codes = bytes | static_cast<unsigned>(first) | static_cast<unsigned>(second) << 16;
            const std::uint32_t pair = nibble_pair<T>(codes, pair_parameters);
            expect(element<T>(pair, 0), multiplier * (first - zero_point), "nibble, first of a pair");
            expect(element<T>(pair, 1), multiplier * (second - zero_point), "nibble, second of a pair");
        }
    }
}

void walk_fours(int multiplier, int zero_point, Group group) {
    for (int code = 0; code < 16; ++code) {
        for (int other = 0; other < 16; ++other) {
            // Both extremes beside the code, where a carry or a borrow would show; low and high nibbles differ.
            const int low[4] = {code, 15, other, 0}, high[4] = {0, other, 15, code};
            std::uint32_t stored = 0;
            for (int i = 0; i < 4; ++i) stored |= static_cast<std::uint32_t>(low[i] | high[i] << 4) << (8 * i);
            const std::uint32_t from_low = decode_four(low_nibbles(stored), group);
            const std::uint32_t from_high = decode_four(high_nibbles(stored), group);
            for (int i = 0; i < 4; ++i) {
                expect(static_cast<int>(int8_to_float(from_low, i)), multiplier * (low[i] - zero_point), "low nibble");
                expect(static_cast<int>(int8_to_float(from_high, i)), multiplier * (high[i] - zero_point), "high nibble");
            }
        }
    }
}

}  // namespace

int main() {
    int walked = 0;
    for (int multiplier = 1; multiplier <= 16; ++multiplier) {
        for (int zero_point = 0; zero_point < 16; ++zero_point) {
            const Group group = unpack_group(static_cast<std::uint8_t>((multiplier - 1) << 4 | zero_point));
            expect(static_cast<int>(group.multiplier), multiplier, "multiplier");
            expect(static_cast<int>(group.zero_point), zero_point, "zero point");
            if (!fits(multiplier, zero_point)) continue;
            ++walked;
            walk_fours(multiplier, zero_point, group);
            walk_nibble_pairs<__half>(multiplier, zero_point, group);
            walk_nibble_pairs<__nv_bfloat16>(multiplier, zero_point, group);
        }
    }
    walk_int8_pairs<__half>();
    walk_int8_pairs<__nv_bfloat16>();
    std::printf("%d\n", walked);
    return 0;
}
