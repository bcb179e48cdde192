// Activations: their types, SiLU, and eight of them as matrix operands.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decode.cuh"

namespace ditq {

template <class T> __device__ __forceinline__ float to_float(T value) { return static_cast<float>(value); }

template <class T> __device__ __forceinline__ T round_to(float value);
template <> __device__ __forceinline__ float round_to(float value) { return value; }
template <> __device__ __forceinline__ __half round_to(float value) { return __float2half_rn(value); }
template <> __device__ __forceinline__ __nv_bfloat16 round_to(float value) { return __float2bfloat16_rn(value); }

// x / (1 + e^-x). The fast forms are off by a few units of fp32's last place, which the rounding to 16 bits swallows (and
// give 0 below -87, for numbers smaller than 1e-35); an fp32 activation keeps all its bits and gets the slow ones.
template <class T> __device__ __forceinline__ T silu(T value) {
    const float x = to_float(value);
    if constexpr (sizeof(T) == 4) {
        return x / (1.0f + expf(-x));
    } else {
        return round_to<T>(__fdividef(x, 1.0f + __expf(-x)));
    }
}

// Eight activations of a row, two a word, in their order.
struct Eight {
    std::uint32_t words[4];
};

template <class T> __device__ __forceinline__ void apply_silu(Eight& eight) {
    using Pair = typename UnitStep<T>::Pair;
#pragma unroll
    for (std::uint32_t& word : eight.words) {
        Pair pair = bits_of<Pair>(word);
        pair.x = silu(pair.x);
        pair.y = silu(pair.y);
        word = bits_of<std::uint32_t>(pair);
    }
}

// Activations k .. k + 7, or zeros if `present` is false. Kept in L1: the other blocks of a multiprocessor read them too.
template <class T>
__device__ __forceinline__ Eight load_eight(const T* row, int k, bool present, bool with_silu) {
    Eight eight{};
    if (present) {
        const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(row + k));
        eight = {{loaded.x, loaded.y, loaded.z, loaded.w}};
        if (with_silu) apply_silu<T>(eight);
    }
    return eight;
}

}  // namespace ditq
