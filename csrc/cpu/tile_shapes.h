// The shapes of AMX's tile registers.
#pragma once

#include <cstdint>

namespace ditq {

// As the processor reads it.
struct alignas(64) TileShapes {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
};

}  // namespace ditq
