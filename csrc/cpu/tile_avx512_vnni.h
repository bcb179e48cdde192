// Products of int8 by AVX-512 VNNI, which multiplies unsigned by signed bytes: activations are shifted by 128, and every
// sum starts at what the shift adds to it, taken away.
#pragma once

#include <cstdint>

#ifndef DITQ_INSTRUCTIONS  // tests carry out others
#define DITQ_INSTRUCTIONS "avx512_vnni_instructions.h"
#endif
#include DITQ_INSTRUCTIONS

namespace ditq {
namespace DITQ_LEVEL {
namespace {

struct Tile {
    static constexpr int ROWS = 12;
    static constexpr int PANELS = 2;
    static constexpr std::int64_t BLOCK = 640;
    static constexpr std::int64_t FEWEST_ROWS = 192;
    using Element = std::int8_t;
    static constexpr bool SHIFTED = true;

    explicit Tile(std::int64_t) {}

    static constexpr int CHUNK = 4;
    static std::int8_t arranged(std::int8_t code) { return static_cast<std::int8_t>(code ^ 0x80); }

    // sums [ROWS, 32] starts at `start` or grows by it, and by the product of `count` dwords.
    void multiply(
        const Element* x, const std::int32_t* panels, std::int64_t panel_stride, const std::int32_t* start,
        std::int64_t count, std::int32_t* sums, bool first) const {
        Dwords total[ROWS][PANELS];
        for (int row = 0; row < ROWS; ++row) {
            for (int panel = 0; panel < PANELS; ++panel) {
                total[row][panel] = *reinterpret_cast<const Dwords*>(start + 16 * panel);
                if (!first) total[row][panel] += *reinterpret_cast<const Dwords*>(sums + row * 32 + 16 * panel);
            }
        }
        const auto* quads = reinterpret_cast<const std::int32_t*>(x);
        for (std::int64_t i = 0; i < count; ++i) {
            const Dwords left = *reinterpret_cast<const Dwords*>(panels + 16 * i);
            const Dwords right = *reinterpret_cast<const Dwords*>(panels + panel_stride + 16 * i);
            for (int row = 0; row < ROWS; ++row) {
                const Dwords quad = Dwords{} + quads[i * ROWS + row];
                total[row][0] = dot(total[row][0], quad, left);
                total[row][1] = dot(total[row][1], quad, right);
            }
        }
        for (int row = 0; row < ROWS; ++row) {
            for (int panel = 0; panel < PANELS; ++panel) {
                *reinterpret_cast<Dwords*>(sums + row * 32 + 16 * panel) = total[row][panel];
            }
        }
    }
};

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
