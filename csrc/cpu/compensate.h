// Rounding a block of columns on a CPU, each column's error carried over to those behind it: what it takes.
// ditq_kernels/layer/compensation.py says what is computed.
#pragma once

#include <cstdint>

namespace ditq {

struct Compensation {
    const float* exact;   // [columns, rows], as are wanted, step, zero, errors and codes
    const float* wanted;  // with the errors of all earlier blocks made up for
    const float* within;  // [columns, columns]: below the diagonal what a column takes of each earlier one's error
    const float* step;    // above zero
    const float* zero;
    std::int64_t columns;
    std::int64_t rows;
    float low;
    float high;

    float* errors;
    float* codes;
};

// Rows [first, last).
using Compensate = void (*)(const Compensation&, std::int64_t first, std::int64_t last);

}  // namespace ditq
