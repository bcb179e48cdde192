// The matrix instruction of sm_80 and later: a 16 x 16 operand times a 16 x 8 operand, in fp32. tests/emulation has a
// file of this name with the same layout in plain C++.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace ditq {

// total += a * b. Lane (g, t) = (lane / 4, lane % 4) holds of a: rows g (words 0, 2) and g + 8 (words 1, 3), columns 2t,
// 2t + 1 (words 0, 1) and 8 more (words 2, 3); of b: column g, rows 2t, 2t + 1 and 8 more; of the total: rows g and
// g + 8, columns 2t, 2t + 1. Which inputs stand behind the sixteen k does not matter as long as a and b agree.
template <class T>
__device__ __forceinline__ void multiply_accumulate(
    float (&total)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply_accumulate<__nv_bfloat16>(
    float (&total)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_accumulate<__half>(
    float (&total)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace ditq
