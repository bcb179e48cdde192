// Products of int8 by AMX: tiles of 16 rows of 64 bytes, two of activations by two of weights at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace ditq {
namespace DITQ_LEVEL {
namespace {

// Of the eight tile registers 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights. As the processor reads it.
struct alignas(64) TileShapes {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
};

#ifdef DITQ_EMULATED
struct Registers {
    TileShapes shapes;
    alignas(64) std::uint8_t bytes[8][16][64];
};
inline Registers& registers() {
    static thread_local Registers all;
    return all;
}
inline void configure(const TileShapes& shapes) {
    registers().shapes = shapes;
    std::memset(registers().bytes, 0xab, sizeof registers().bytes);
}
inline void release() { configure({}); }
template <int T>
void zero() { std::memset(registers().bytes[T], 0, sizeof registers().bytes[T]); }
template <int T>
void load(const void* from, std::int64_t stride) {
    zero<T>();
    for (int row = 0; row < registers().shapes.rows[T]; ++row) {
        const auto* start = static_cast<const std::uint8_t*>(from) + row * stride;
        std::memcpy(registers().bytes[T][row], start, registers().shapes.bytes[T]);
    }
}
template <int T>
void store(void* to, std::int64_t stride) {
    for (int row = 0; row < registers().shapes.rows[T]; ++row) {
        auto* start = static_cast<std::uint8_t*>(to) + row * stride;
        std::memcpy(start, registers().bytes[T][row], registers().shapes.bytes[T]);
    }
}
template <int SUM, int X, int W>
void dot() {
    const TileShapes& shapes = registers().shapes;
    for (int row = 0; row < shapes.rows[SUM]; ++row) {
        for (int column = 0; column < shapes.bytes[SUM] / 4; ++column) {
            std::int32_t sum;
            std::memcpy(&sum, &registers().bytes[SUM][row][4 * column], 4);
            for (int k = 0; k < shapes.bytes[X]; ++k) {
                const std::int32_t x = static_cast<std::int8_t>(registers().bytes[X][row][k]);
                sum += x * static_cast<std::int8_t>(registers().bytes[W][k / 4][4 * column + k % 4]);
            }
            std::memcpy(&registers().bytes[SUM][row][4 * column], &sum, 4);
        }
    }
}
#else
// The registers' numbers are part of the instructions' text, which intrinsics would want as literals.
inline void configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void release() { __asm__ volatile("tilerelease"); }
template <int T>
void zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
void load(const void* from, std::int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
void store(void* to, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}
template <int SUM, int X, int W>
void dot() { __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(W)); }
#endif

struct Tile {
    static constexpr int ROWS = 32;
    static constexpr int PANELS = 2;
    using Element = std::int8_t;
    static constexpr bool SHIFTED = false;

    // For products of at least `inputs` inputs at a time.
    explicit Tile(std::int64_t inputs) : dwords_(inputs < 64 ? inputs / 4 : 16) {
        TileShapes shapes;
        for (int tile = 0; tile < 8; ++tile) {
            const bool is_x = tile == 4 || tile == 5, is_weight = tile > 5;
            shapes.rows[tile] = is_weight ? dwords_ : 16;
            shapes.bytes[tile] = is_x ? 4 * dwords_ : 64;
        }
        configure(shapes);
    }
    ~Tile() { release(); }
    Tile(const Tile&) = delete;
    Tile& operator=(const Tile&) = delete;

    static constexpr int CHUNK = 64;
    static std::int8_t arranged(std::int8_t code) { return code; }

    // sums [32, 32], rows `stride` apart, is or grows by the product of `count` dwords of inputs.
    void multiply(
        const Element* x, const std::int32_t* panels, std::int64_t panel_stride, const std::int32_t*,
        std::int64_t count, std::int32_t* sums, std::int64_t stride, bool first) const {
        const std::int64_t bytes = 4 * stride;
        if (first) {
            zero<0>();
            zero<1>();
            zero<2>();
            zero<3>();
        } else {
            load<0>(sums, bytes);
            load<1>(sums + 16, bytes);
            load<2>(sums + 16 * stride, bytes);
            load<3>(sums + 16 * stride + 16, bytes);
        }
        for (std::int64_t i = 0; i < count; i += dwords_) {
            const Element* here = x + i / 16 * ROWS * 64 + i % 16 * 4;
            load<4>(here, 64);
            load<6>(panels + 16 * i, 64);
            load<7>(panels + panel_stride + 16 * i, 64);
            dot<0, 4, 6>();
            load<5>(here + 16 * 64, 64);
            dot<1, 4, 7>();
            dot<2, 5, 6>();
            dot<3, 5, 7>();
        }
        store<0>(sums, bytes);
        store<1>(sums + 16, bytes);
        store<2>(sums + 16 * stride, bytes);
        store<3>(sums + 16 * stride + 16, bytes);
    }

private:
    int dwords_;  // of inputs that one instruction takes
};

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
