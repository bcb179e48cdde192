// Rounding activations to int8 on a CPU: what it takes. ditq_kernels/layer/reference.py says what is computed
// (quantize_activation); here every bit is the same, in one pass over each row.
#pragma once

#include <cstdint>

#include "float_types.h"

namespace ditq {

struct ActivationRounding {
    const void* x;  // [rows, inputs], rows row_stride elements apart
    FloatType type;
    std::int64_t rows;
    std::int64_t inputs;
    std::int64_t row_stride;
    const float* amax;  // the calibrated reach of all rows; null: each row's own

    std::int8_t* codes;  // [rows, inputs]
    float* scale;        // [rows]
};

// A row of `inputs` values in fp32, and zeros behind the last, fewer than MOST_LANES. Returns the bits of the largest
// magnitude, those of an infinity or above if one is not finite.
using LoadRow = std::int32_t (*)(FloatType, const void* from, std::int64_t inputs, float* to);
constexpr std::int64_t MOST_LANES = 16;

using RoundActivations = void (*)(const ActivationRounding&, std::int64_t first, std::int64_t last);

}  // namespace ditq
