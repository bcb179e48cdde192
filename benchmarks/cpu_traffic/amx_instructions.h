// AMX, of which only the lines of memory that it touches are kept: for a simulator of caches.
#pragma once

#include <cstdint>

#include "tile_shapes.h"

namespace ditq {
namespace DITQ_LEVEL {
namespace {

inline void configure(const TileShapes&) {}
inline void release() {}
template <int T>
void zero() {}
template <int T>
void load(const void* from, std::int64_t stride) {
    for (int row = 0; row < 16; ++row) (void)*(static_cast<const volatile std::uint8_t*>(from) + row * stride);
}
template <int T>
void store(void* to, std::int64_t stride) {
    for (int row = 0; row < 16; ++row) *(static_cast<volatile std::uint8_t*>(to) + row * stride) = 0;
}
template <int SUM, int X, int W>
void dot() {}

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
