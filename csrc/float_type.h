// The floating-point types that cross the boundary between the binding and the kernels: a value, because a bias may have
// another type than the activations, and kernels are compiled once for all of them.
#pragma once

namespace ditq {

enum class FloatType : int { float32, float16, bfloat16 };

}  // namespace ditq
