// The product of few rows in fp32 arithmetic: for fp32 activations, which matrix instructions would cut short, and for
// rows that do not begin at 16-byte boundaries, which it reads element by element.
//
// A warp takes four outputs and four rows of x; each lane sums over its share of K, 16 stored bytes of each output at a
// time, and the warp adds the lanes' sums in a fixed order.
#include "activations.cuh"
#include "decode.cuh"
#include "launch.cuh"
#include "load_float.cuh"
#include "small_product.h"

namespace ditq {
namespace {

constexpr int WARPS = 4;
constexpr int OUTPUTS = 4;  // of a warp
constexpr int TOKENS = 4;   // of a block
constexpr int CHUNK = 16;   // stored bytes of an output that a lane takes at a time

// Four bytes of a row, zeros past its end. The loop stays a loop: what it serves is rare, and unrolled it would be most of
// the kernel.
__device__ __forceinline__ std::uint32_t load_word_by_bytes(const std::uint8_t* row, int first, int row_bytes) {
    std::uint32_t loaded = 0;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t byte = first + i < row_bytes ? row[first + i] : 0;
        loaded |= byte << (8 * i);
    }
    return loaded;
}

__device__ __forceinline__ uint4 load_codes(const std::uint8_t* row, int first, int row_bytes, bool vectors) {
    if (vectors) return __ldcs(reinterpret_cast<const uint4*>(row + first));
    return {
        load_word_by_bytes(row, first, row_bytes),
        load_word_by_bytes(row, first + 4, row_bytes),
        load_word_by_bytes(row, first + 8, row_bytes),
        load_word_by_bytes(row, first + 12, row_bytes),
    };
}

// Activations k .. k + 3 in fp32, zeros past K.
template <class T>
__device__ __forceinline__ float4 load_activations(const T* row, int k, int inputs, bool with_silu) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        T value = k + i < inputs ? row[k + i] : round_to<T>(0.0f);
        values[i] = to_float(with_silu ? silu(value) : value);
    }
    return {values[0], values[1], values[2], values[3]};
}
// The same for fp32 rows that begin at 16-byte boundaries, K a multiple of 4.
__device__ __forceinline__ float4 load_aligned_activations(const float* row, int k, int inputs, bool with_silu) {
    float4 values{};
    if (k < inputs) values = __ldg(reinterpret_cast<const float4*>(row + k));
    return with_silu ? float4{silu(values.x), silu(values.y), silu(values.z), silu(values.w)} : values;
}

__device__ __forceinline__ float add_product(float sum, float4 x, std::uint32_t weights) {
    sum = fmaf(x.x, int8_to_float(weights, 0), sum);
    sum = fmaf(x.y, int8_to_float(weights, 1), sum);
    sum = fmaf(x.z, int8_to_float(weights, 2), sum);
    return fmaf(x.w, int8_to_float(weights, 3), sum);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
    return value;
}

template <class T, int BITS>
__global__ void __launch_bounds__(32 * WARPS, 3) small_product_fma_kernel(const SmallProduct p) {
    const int lane = threadIdx.x % 32;
    const int first_output = (blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS;
    const int first_token = blockIdx.y * TOKENS;
    const int row_bytes = static_cast<int>(p.row_bytes);
    const bool weight_vectors = reinterpret_cast<std::uintptr_t>(p.qweight) % 16 == 0 && row_bytes % 16 == 0;
    const bool x_vectors = reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0 && p.x_stride % 4 == 0 && p.inputs % 4 == 0;

    // Past the end, the last output or row of x is read again and not stored.
    int n[OUTPUTS];
    const T* x[TOKENS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) n[i] = min(first_output + i, p.outputs - 1);
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) x[i] = static_cast<const T*>(p.x) + min(first_token + i, p.rows - 1) * p.x_stride;

    float total[OUTPUTS][TOKENS] = {};
    for (int first = lane * CHUNK; first < row_bytes; first += 32 * CHUNK) {
        uint4 codes[OUTPUTS];
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) {
            codes[i] = load_codes(p.qweight + n[i] * p.row_bytes, first, row_bytes, weight_vectors);
        }
        // The bytes hold one run of 16 inputs, or, 4 bits each, two: one in each half-block.
        const int k = BITS == 4 ? first / HALF_BLOCK * BLOCK + first % HALF_BLOCK : first;
#pragma unroll 1
        for (int run = 0; run < (BITS == 4 ? 2 : 1); ++run) {
            const int run_k = k + run * HALF_BLOCK;
            const int group_index = min(run_k >> p.group_shift, p.groups - 1);
            const std::int64_t parameters = static_cast<std::int64_t>(group_index) * p.outputs;
            Group group[OUTPUTS];
            if constexpr (BITS == 4) {
#pragma unroll
                for (int i = 0; i < OUTPUTS; ++i) group[i] = unpack_group(__ldg(p.group_code + parameters + n[i]));
            }
            float partial[OUTPUTS][TOKENS] = {};
            auto& sum = BITS == 4 ? total : partial;
#pragma unroll 1
            for (int index = 0; index < CHUNK / 4; ++index) {
                float4 activations[TOKENS];
#pragma unroll
                for (int i = 0; i < TOKENS; ++i) {
                    if constexpr (sizeof(T) == 4) {
                        activations[i] = x_vectors ? load_aligned_activations(x[i], run_k + 4 * index, p.inputs, p.silu)
                                                   : load_activations(x[i], run_k + 4 * index, p.inputs, p.silu);
                    } else {
                        activations[i] = load_activations(x[i], run_k + 4 * index, p.inputs, p.silu);
                    }
                }
#pragma unroll
                for (int i = 0; i < OUTPUTS; ++i) {
                    const std::uint32_t stored = word(codes[i], index);
                    const std::uint32_t weights =
                        BITS == 4 ? decode_four(low_nibbles(stored >> (4 * run)), group[i]) : stored;
#pragma unroll
                    for (int j = 0; j < TOKENS; ++j) sum[i][j] = add_product(sum[i][j], activations[j], weights);
                }
            }
            if constexpr (BITS == 8) {
#pragma unroll
                for (int i = 0; i < OUTPUTS; ++i) {
                    const float scale = __ldg(p.scale + parameters + n[i]);
#pragma unroll
                    for (int j = 0; j < TOKENS; ++j) total[i][j] += scale * partial[i][j];
                }
            }
        }
    }

#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
#pragma unroll
        for (int j = 0; j < TOKENS; ++j) {
            float sum = warp_sum(total[i][j]);
            const int output = first_output + i, token = first_token + j;
            if (lane != i * TOKENS + j || output >= p.outputs || token >= p.rows) continue;
            if (BITS == 4) sum *= p.scale[output];
            if (p.bias != nullptr) sum += load_float(p.bias, p.bias_type, output);
            static_cast<T*>(p.y)[static_cast<std::int64_t>(token) * p.outputs + output] = round_to<T>(sum);
        }
    }
}

template <class T>
cudaError_t launch(const SmallProduct& p, cudaStream_t stream) {
    const dim3 blocks((p.outputs + WARPS * OUTPUTS - 1) / (WARPS * OUTPUTS), (p.rows + TOKENS - 1) / TOKENS);
    const auto kernel = p.bits == 4 ? small_product_fma_kernel<T, 4> : small_product_fma_kernel<T, 8>;
    return enqueue(kernel, blocks, 32 * WARPS, p, stream);
}

}  // namespace

cudaError_t launch_small_product_fma(const SmallProduct& product, cudaStream_t stream) {
    switch (product.x_type) {
        case FloatType::float16: return launch<__half>(product, stream);
        case FloatType::bfloat16: return launch<__nv_bfloat16>(product, stream);
        default: return launch<float>(product, stream);
    }
}

}  // namespace ditq
