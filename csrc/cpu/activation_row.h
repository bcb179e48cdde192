// What passes over activations have in common, at the level of instructions that a file is compiled for.
#pragma once

#include "quantize_activation.h"

namespace ditq {
namespace DITQ_LEVEL {

// As LoadRow says.
std::int32_t load_row(FloatType, const void* from, std::int64_t inputs, float* to);

// Codes and scale of a row of fp32 values, and zeros behind them; `most` are the bits of the largest magnitude.
void round_row(
    const float* values, std::int32_t most, const float* amax, std::int64_t inputs, std::int8_t* codes, float* scale);

}  // namespace DITQ_LEVEL
}  // namespace ditq
