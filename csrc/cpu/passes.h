// Passes over activations that quantize what they compute. ditq_kernels/layer/reference.py says what that is; here it is
// the same up to the order of sums and the rounding of exponentials.
#pragma once

#include <cstdint>

#include "quantize_activation.h"

namespace ditq {

// Rows are read as `rounding` says, and normalised before they are rounded.
struct NormQuantize {
    ActivationRounding rounding;
    float eps;
    std::int64_t tokens;  // rows of a sample
    // In fp32, or null: [inputs] of the norm; [samples, inputs] of the modulation, `gain` being one plus its scale.
    const float* weight;
    const float* bias;
    const float* gain;
    const float* shift;
};

using QuantizeNormed = void (*)(const NormQuantize&, std::int64_t first, std::int64_t last);
// GELU in the form with tanh.
using QuantizeGelu = void (*)(const ActivationRounding&, std::int64_t first, std::int64_t last);

}  // namespace ditq
