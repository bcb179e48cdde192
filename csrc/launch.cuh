// Enqueueing a kernel. tests/emulation has a file of this name that runs the kernel's threads on the CPU.
#pragma once

#include <cuda_runtime_api.h>

namespace ditq {

template <class Parameters>
cudaError_t enqueue(
    void (*kernel)(Parameters), dim3 blocks, unsigned threads, const Parameters& parameters, cudaStream_t stream) {
    kernel<<<blocks, threads, 0, stream>>>(parameters);
    return cudaGetLastError();
}

}  // namespace ditq
