// AMX, carried out one instruction at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "tile_shapes.h"

namespace ditq {
namespace DITQ_LEVEL {
namespace {

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

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
