// Reading a vector whose float type is known at run time only.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "float_type.h"

namespace ditq {

// Element `index` in fp32: exact for each of the types.
__host__ __device__ inline float load_float(const void* values, FloatType type, std::int64_t index) {
    switch (type) {
        case FloatType::float16: return __half2float(static_cast<const __half*>(values)[index]);
        case FloatType::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[index]);
        default: return static_cast<const float*>(values)[index];
    }
}

}  // namespace ditq
