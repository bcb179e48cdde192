// In the place of csrc/launch.cuh: runs a kernel's blocks on the CPU, one after another.
#pragma once

#include "gpu.h"

namespace ditq {

template <class Parameters>
cudaError_t enqueue(
    void (*kernel)(Parameters), dim3 blocks, unsigned threads, const Parameters& parameters, cudaStream_t) {
    const std::function<void()> body = [&] { kernel(parameters); };
    for (unsigned y = 0; y < blocks.y; ++y) {
        for (unsigned x = 0; x < blocks.x; ++x) emulation::run_block({x, y, 0}, threads, body);
    }
    return cudaSuccess;
}

}  // namespace ditq
