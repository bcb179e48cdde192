// The floating-point types of tensors that kernels for CPUs read and write.
#pragma once

#include <cstdint>

namespace ditq {

enum class FloatType : int { float32, bfloat16, float16 };

}  // namespace ditq
