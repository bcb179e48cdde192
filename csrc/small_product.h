// The product for few rows: what it takes, and the two kernels that compute it.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "float_type.h"

namespace ditq {

// y[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n], for a weight of ditq_kernels/layer/formats.py.
struct SmallProduct {
    const void* x;                   // [rows, inputs], rows x_stride elements apart
    const std::uint8_t* qweight;     // [outputs, row_bytes]
    const float* scale;              // 8 bits: [groups, outputs]; 4 bits: [outputs]
    const std::uint8_t* group_code;  // 4 bits: [groups, outputs]
    const void* bias;                // [outputs], or null
    void* y;                         // [rows, outputs], of x's type
    FloatType x_type;
    FloatType bias_type;
    int bits;  // 8 or 4
    int rows;  // 1..16
    int outputs;
    int inputs;
    int groups;
    int group_shift;  // input k belongs to group k >> group_shift
    std::int64_t x_stride;
    std::int64_t row_bytes;
    bool silu;  // apply SiLU to x first
};

constexpr int SMALL_ROWS = 16;
constexpr int BLOCK = 128;  // inputs of a block of the 4-bit layout, and
constexpr int HALF_BLOCK = BLOCK / 2;

// Whether every row begins at a 16-byte boundary and 16-bit activations come in whole vectors: what the matrix kernel
// needs.
inline bool suits_matrix_instructions(const SmallProduct& p) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
    return p.x_type != FloatType::float32 && aligned(p.x) && aligned(p.qweight) && p.row_bytes % 16 == 0 &&
           p.inputs % 8 == 0 && p.x_stride % 8 == 0;
}

// Each enqueues the product and returns the launch's error.
cudaError_t launch_small_product_mma(const SmallProduct& product, cudaStream_t stream);  // suits_matrix_instructions only
cudaError_t launch_small_product_fma(const SmallProduct& product, cudaStream_t stream);  // anything

}  // namespace ditq
