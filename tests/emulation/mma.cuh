// In the place of csrc/mma.cuh: the matrix instruction, from the layouts in NVIDIA's PTX documentation for
// mma.m16n8k16 with 16-bit operands: element i of a lane's part of A stands in row g (+ 8 for i = 2, 3, 6, 7) and column
// 2 t + i % 2 (+ 8 for i >= 4); element i of B in row 2 t + i % 2 (+ 8 for i >= 2) and column g; element i of C in row g
// (+ 8 for i >= 2) and column 2 t + i % 2.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gpu.h"

namespace ditq {

struct MatrixSlot {
    float* total;
    const std::uint32_t* a;
    const std::uint32_t* b;
};

template <class T>
float element(const std::uint32_t* words, int index) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(words) + 2 * index, 2);
    return static_cast<float>(value);
}

template <class T>
void multiply_warp(const MatrixSlot* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < emulation::WARP; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; ++i) {
            const bool below = i == 2 || i == 3 || i == 6 || i == 7;
            a[g + (below ? 8 : 0)][2 * t + i % 2 + (i >= 4 ? 8 : 0)] = element<T>(lanes[lane].a, i);
        }
        for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + (i >= 2 ? 8 : 0)][g] = element<T>(lanes[lane].b, i);
    }
    for (int lane = 0; lane < emulation::WARP; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
            float sum = lanes[lane].total[i];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            lanes[lane].total[i] = sum;
        }
    }
}

template <class T>
void multiply_accumulate(float (&total)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    MatrixSlot* slots = emulation::slots<MatrixSlot>();
    slots[emulation::lane()] = {total, a, b};
    emulation::meet(emulation::warp(), [&] { multiply_warp<T>(slots); });
}

}  // namespace ditq
