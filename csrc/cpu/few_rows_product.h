// The product of a few rows in fp32 with a stored weight on a CPU, each weight read once: what it takes.
#pragma once

#include <cstdint>

namespace ditq {

// out[m, n] = sum_k x[m, k] * w[n, k] + bias[n] in fp32, w as ditq_kernels/layer/reference.py decodes it: its scale is
// applied to sums, of an output or of a group.
struct FewRowsProduct {
    const float* x;  // [rows, padded inputs], zeros behind the last input
    std::int64_t rows;
    std::int64_t inputs;
    std::int64_t x_stride;  // inputs rounded up to a multiple of FEW_ROWS_PADDING

    const std::uint8_t* weight;  // this and the next as in Int8Product
    std::int64_t weight_row_bytes;
    std::int64_t outputs;
    std::int64_t group;
    const std::uint8_t* group_code;
    const float* scale;
    bool promoted;

    const float* bias;  // [outputs] or null
    float* out;         // [rows, outputs]
};

constexpr std::int64_t FEW_ROWS_PADDING = 128;

// Outputs [first, last).
using MultiplyFewRows = void (*)(const FewRowsProduct&, std::int64_t first, std::int64_t last);

}  // namespace ditq
