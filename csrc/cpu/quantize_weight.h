// Rounding weights to nearest on a CPU: what it takes. ditq_kernels/layer/quantizer.py says what is computed; here the
// same is computed in one pass over each row.
#pragma once

#include <cstdint>

#include "float_types.h"

namespace ditq {

// How the levels of a group are placed, in the order of cpu_extension.RULES.
enum class RangeRule : std::int32_t { symmetric, eighth_level, free_zero_point, symmetric_int8 };

struct WeightRounding {
    const void* weight;  // [rows, inputs], rows row_stride elements apart
    FloatType weight_type;  // no fp16
    std::int64_t rows;
    std::int64_t inputs;
    std::int64_t row_stride;
    std::int64_t group;  // inputs of a group; all of them where there are no groups
    const RangeRule* rules;
    const float* ratios;  // by which ranges are shrunk; every rule is tried with each
    int rule_count;
    int ratio_count;
    bool two_level;       // 4-bit codes, a multiplier and a zero point per group; or int8 codes and a scale per group
    const float* limits;  // [16], the largest multiplier beside each zero point

    std::uint8_t* codes;       // [rows, inputs]
    float* scale;              // [rows] of two levels; [groups, rows] else
    std::uint8_t* multiplier;  // [groups, rows], of two levels
    std::uint8_t* zero_point;  // likewise
    // Per row: its errors are so close that another order of summation may prefer another candidate; it holds a value
    // that is not finite, and nothing was written for it.
    std::uint8_t* doubtful;
    std::uint8_t* broken;
};

using RoundWeights = void (*)(const WeightRounding&, std::int64_t first, std::int64_t last);

}  // namespace ditq
