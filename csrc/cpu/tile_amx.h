// Products of int8 by AMX: one tile of activations by four of weights at a time, 16 rows of 64 bytes each. Two by two would
// load four tiles for four products instead of five; but weights are in the first cache, and of activations, which come
// from the second, twice as many would be loaded.
#pragma once

#include <cstdint>

#include "tile_shapes.h"
#ifndef DITQ_INSTRUCTIONS  // tests carry out others
#define DITQ_INSTRUCTIONS "amx_instructions.h"
#endif
#include DITQ_INSTRUCTIONS

namespace ditq {
namespace DITQ_LEVEL {
namespace {

// Tile registers 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights, in turns: while a product reads one, the other of
// the two is loaded.
struct Tile {
    static constexpr int ROWS = 16;
    static constexpr int PANELS = 4;
    static constexpr std::int64_t BLOCK = 384;  // 24 KB of panels, half of the first cache
    static constexpr std::int64_t FEWEST_ROWS = 512;
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

    // sums [16, 64] is or grows by the product of `count` dwords of inputs.
    void multiply(
        const Element* x, const std::int32_t* panels, std::int64_t panel_stride, const std::int32_t*,
        std::int64_t count, std::int32_t* sums, bool first) const {
        constexpr std::int64_t BYTES = 4 * 16 * PANELS;
        if (first) {
            zero<0>();
            zero<1>();
            zero<2>();
            zero<3>();
        } else {
            load<0>(sums, BYTES);
            load<1>(sums + 16, BYTES);
            load<2>(sums + 32, BYTES);
            load<3>(sums + 48, BYTES);
        }
        const std::uint64_t end = count;
        load<4>(x, CHUNK);
        for (std::uint64_t i = 0; i < end; i += 2 * dwords_) {
            const std::uint64_t next = i + dwords_, after = next + dwords_;
            if (next < end) load<5>(at(x, next), CHUNK);
            multiply_by_four<4>(panels + 16 * i, panel_stride);
            if (next >= end) break;
            if (after < end) load<4>(at(x, after), CHUNK);
            multiply_by_four<5>(panels + 16 * next, panel_stride);
        }
        store<0>(sums, BYTES);
        store<1>(sums + 16, BYTES);
        store<2>(sums + 32, BYTES);
        store<3>(sums + 48, BYTES);
    }

private:
    static const Element* at(const Element* x, std::uint64_t dword) {
        return x + dword / 16 * (ROWS * CHUNK) + dword % 16 * 4;
    }

    template <int X>
    static void multiply_by_four(const std::int32_t* panels, std::int64_t stride) {
        load<6>(panels, 64);
        load<7>(panels + stride, 64);
        dot<0, X, 6>();
        load<6>(panels + 2 * stride, 64);
        dot<1, X, 7>();
        load<7>(panels + 3 * stride, 64);
        dot<2, X, 6>();
        dot<3, X, 7>();
    }

    std::uint64_t dwords_;  // of inputs that one instruction takes
};

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
