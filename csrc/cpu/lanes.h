// What stands in a register of the level of instructions that a file is compiled for (DITQ_LANES, the floats in one).
#pragma once

#include <cstdint>

namespace ditq {
namespace DITQ_LEVEL {
namespace {

constexpr int LANES = DITQ_LANES;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef std::int32_t IntLanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
