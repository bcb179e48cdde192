// AMX. T, SUM, X and W are numbers of tile registers, which are part of the instructions' text; intrinsics would want
// literals.
#pragma once

#include <cstdint>

#include "tile_shapes.h"

namespace ditq {
namespace DITQ_LEVEL {
namespace {

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

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
