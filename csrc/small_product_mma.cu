// The product of few 16-bit rows with matrix instructions. The weight is the left operand, decoded in registers; up to 8
// (or 16) rows of x are the right one. Reading each stored weight once is what it costs; csrc/README.md has the floors.
//
// A warp takes 16 (or 32) outputs and walks K in steps of 64 stored bytes of each; the warps of a block take turns at the
// steps and add up at the end, in a fixed order. No activation is needed by two warps of a block, so that nothing is
// staged in shared memory: each is loaded once, straight to the register from which it is multiplied.
#include "activations.cuh"
#include "decode.cuh"
#include "launch.cuh"
#include "load_float.cuh"
#include "mma.cuh"
#include "small_product.h"

namespace ditq {
namespace {

constexpr int WARPS = 8;
constexpr int STEP_BYTES = 64;  // four lanes, 16 bytes each
constexpr int TILE_OUTPUTS = 16;
constexpr int TILE_TOKENS = 8;
constexpr int GROUP_32_SHIFT = 5;

// Where a lane stands in the operands' layouts (mma.cuh).
struct Lane {
    int row;     // 0..7
    int column;  // 0..3
};

// What a lane needs of one step of one output: 16 stored bytes, which are two runs of inputs, each within one group.
template <int BITS> struct Piece;
template <> struct Piece<4> {
    uint4 codes;                 // low nibbles: the first run, high nibbles: the second
    std::uint8_t group_code[2];  // of either run
};
template <> struct Piece<8> {
    uint4 codes;  // words 0, 1: the first run, words 2, 3: the second
    float scale[2];
};

// The first input of run 0 or 1 in `step`. All four lanes of a row must meet in one group per run where the group scales
// the sum and not the weight: with groups of 32 int8 a lane's 16 bytes are two separate eights.
template <int BITS>
__device__ __forceinline__ int run_start(const SmallProduct& p, Lane lane, int step, int run) {
    if constexpr (BITS == 4) {
        return step * BLOCK + run * HALF_BLOCK + 16 * lane.column;
    } else {
        const bool apart = p.group_shift == GROUP_32_SHIFT;
        return step * STEP_BYTES + (apart ? 32 * run + 8 * lane.column : 16 * lane.column + 8 * run);
    }
}

// Weights are read once: they need not stay in any cache.
template <class Vector>
__device__ __forceinline__ Vector load_once(const std::uint8_t* bytes) {
    return __ldcs(reinterpret_cast<const Vector*>(bytes));
}

template <int BITS>
__device__ __forceinline__ uint4 load_codes(const SmallProduct& p, Lane lane, int n, int step) {
    const std::uint8_t* row = p.qweight + n * p.row_bytes;
    if constexpr (BITS == 4) {
        return load_once<uint4>(row + step * STEP_BYTES + 16 * lane.column);
    } else {
        uint4 codes{};
        const int first = run_start<8>(p, lane, step, 0);
        const int second = run_start<8>(p, lane, step, 1);
        if (second == first + 8) {
            if (first < p.inputs) codes = load_once<uint4>(row + first);
        } else {
            if (first < p.inputs) {
                const uint2 loaded = load_once<uint2>(row + first);
                codes.x = loaded.x;
                codes.y = loaded.y;
            }
            if (second < p.inputs) {
                const uint2 loaded = load_once<uint2>(row + second);
                codes.z = loaded.x;
                codes.w = loaded.y;
            }
        }
        return codes;
    }
}

template <int BITS>
__device__ __forceinline__ Piece<BITS> load_piece(const SmallProduct& p, Lane lane, int n, int step) {
    Piece<BITS> piece;
    piece.codes = load_codes<BITS>(p, lane, n, step);
#pragma unroll
    for (int run = 0; run < 2; ++run) {
        // Codes past K stand in the last group; they meet zeros.
        const int group = min(run_start<BITS>(p, lane, step, run) >> p.group_shift, p.groups - 1);
        const std::int64_t index = static_cast<std::int64_t>(group) * p.outputs + n;
        if constexpr (BITS == 4) {
            piece.group_code[run] = __ldg(p.group_code + index);
        } else {
            piece.scale[run] = __ldg(p.scale + index);
        }
    }
    return piece;
}

// Weights of four neighbouring inputs to two words of an operand: inputs 0 and 2, inputs 1 and 3.
template <class T>
__device__ __forceinline__ void decode_word(const Piece<4>& piece, int run, int index, std::uint32_t (&pairs)[2]) {
    const PairGroup<T> group = pair_group<T>(unpack_group(piece.group_code[run]));
    const std::uint32_t codes = word(piece.codes, index) >> (4 * run);
    pairs[0] = nibble_pair<T>(codes, group);
    pairs[1] = nibble_pair<T>(codes >> 8, group);
}
template <class T>
__device__ __forceinline__ void decode_word(const Piece<8>& piece, int run, int index, std::uint32_t (&pairs)[2]) {
    const std::uint32_t codes = word(piece.codes, 2 * run + index);
    pairs[0] = int8_pair<T>(codes);
    pairs[1] = int8_pair<T>(codes >> 8);
}

// Activations of four neighbouring inputs, in the order of decode_word.
__device__ __forceinline__ void arrange(const Eight& eight, int half, std::uint32_t (&pairs)[2]) {
    const std::uint32_t first = eight.words[2 * half];
    const std::uint32_t second = eight.words[2 * half + 1];
    pairs[0] = __byte_perm(first, second, 0x5410);
    pairs[1] = __byte_perm(first, second, 0x7632);
}

// total += scale * partial, for the two outputs of a lane.
__device__ __forceinline__ void promote(float (&total)[4], const float (&partial)[4], float scale, float scale_8_below) {
    total[0] += scale * partial[0];
    total[1] += scale * partial[1];
    total[2] += scale_8_below * partial[2];
    total[3] += scale_8_below * partial[3];
}

template <class T, int BITS, int OUTPUT_TILES, int TOKEN_TILES>
__global__ void __launch_bounds__(32 * WARPS, OUTPUT_TILES == 1 ? 4 : 2)
    small_product_mma_kernel(const SmallProduct p) {
    constexpr int OUTPUTS = OUTPUT_TILES * TILE_OUTPUTS;
    constexpr int TOKENS = TOKEN_TILES * TILE_TOKENS;
    constexpr int RUN_EIGHTS = BITS == 4 ? 2 : 1;  // inputs of a run, in eights

    const int warp = threadIdx.x / 32;
    const Lane lane{static_cast<int>(threadIdx.x % 32) / 4, static_cast<int>(threadIdx.x % 4)};
    const int first_output = blockIdx.x * OUTPUTS;
    const int steps = static_cast<int>((p.row_bytes + STEP_BYTES - 1) / STEP_BYTES);

    int n[2 * OUTPUT_TILES];  // this lane's outputs; past the end, the last one is read again and not stored
    const T* x[TOKEN_TILES];
#pragma unroll
    for (int i = 0; i < 2 * OUTPUT_TILES; ++i) n[i] = min(first_output + 8 * i + lane.row, p.outputs - 1);
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
        x[i] = static_cast<const T*>(p.x) + min(TILE_TOKENS * i + lane.row, p.rows - 1) * p.x_stride;
    }

    float total[OUTPUT_TILES][TOKEN_TILES][4] = {};
    Piece<BITS> pieces[2 * OUTPUT_TILES];
    if (warp < steps) {
#pragma unroll
        for (int i = 0; i < 2 * OUTPUT_TILES; ++i) pieces[i] = load_piece<BITS>(p, lane, n[i], warp);
    }
    for (int step = warp; step < steps; step += WARPS) {
        // The next step's weights are on their way while this one's are multiplied.
        Piece<BITS> next[2 * OUTPUT_TILES];
        if (step + WARPS < steps) {
#pragma unroll
            for (int i = 0; i < 2 * OUTPUT_TILES; ++i) next[i] = load_piece<BITS>(p, lane, n[i], step + WARPS);
        }
#pragma unroll
        for (int run = 0; run < 2; ++run) {
            const int k = run_start<BITS>(p, lane, step, run);
            float partial[OUTPUT_TILES][TOKEN_TILES][4] = {};
            auto& sum = BITS == 4 ? total : partial;
#pragma unroll
            for (int eight = 0; eight < RUN_EIGHTS; ++eight) {
                Eight activations[TOKEN_TILES];
#pragma unroll
                for (int i = 0; i < TOKEN_TILES; ++i) {
                    const bool present = TILE_TOKENS * i + lane.row < p.rows && k + 8 * eight < p.inputs;
                    activations[i] = load_eight(x[i], k + 8 * eight, present, p.silu);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    std::uint32_t right[TOKEN_TILES][2];
#pragma unroll
                    for (int i = 0; i < TOKEN_TILES; ++i) arrange(activations[i], half, right[i]);
#pragma unroll
                    for (int tile = 0; tile < OUTPUT_TILES; ++tile) {
                        std::uint32_t above[2], below[2];  // outputs 0..7 and 8..15 of the tile
                        decode_word<T>(pieces[2 * tile], run, 2 * eight + half, above);
                        decode_word<T>(pieces[2 * tile + 1], run, 2 * eight + half, below);
                        const std::uint32_t left[4] = {above[0], below[0], above[1], below[1]};
#pragma unroll
                        for (int i = 0; i < TOKEN_TILES; ++i) multiply_accumulate<T>(sum[tile][i], left, right[i]);
                    }
                }
            }
            if constexpr (BITS == 8) {
#pragma unroll
                for (int tile = 0; tile < OUTPUT_TILES; ++tile) {
#pragma unroll
                    for (int i = 0; i < TOKEN_TILES; ++i) {
                        const float above = pieces[2 * tile].scale[run], below = pieces[2 * tile + 1].scale[run];
                        promote(total[tile][i], partial[tile][i], above, below);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * OUTPUT_TILES; ++i) pieces[i] = next[i];
    }

    // The warps' sums, added in the order of the warps. A row is 4 words longer than it need be: the eight rows and four
    // columns of lanes then write to different banks.
    __shared__ float sums[WARPS][TOKENS][OUTPUTS + 4];
#pragma unroll
    for (int tile = 0; tile < OUTPUT_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) {
#pragma unroll
            for (int element = 0; element < 4; ++element) {
                const int token = TILE_TOKENS * i + 2 * lane.column + element % 2;
                sums[warp][token][TILE_OUTPUTS * tile + lane.row + 8 * (element / 2)] = total[tile][i][element];
            }
        }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < TOKENS * OUTPUTS; index += 32 * WARPS) {
        const int token = index / OUTPUTS, output = first_output + index % OUTPUTS;
        if (token >= p.rows || output >= p.outputs) continue;
        float sum = 0;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) sum += sums[other][token][index % OUTPUTS];
        if (BITS == 4) sum *= p.scale[output];
        if (p.bias != nullptr) sum += load_float(p.bias, p.bias_type, output);
        static_cast<T*>(p.y)[static_cast<std::int64_t>(token) * p.outputs + output] = round_to<T>(sum);
    }
}

template <class T, int BITS, int OUTPUT_TILES, int TOKEN_TILES>
cudaError_t launch(const SmallProduct& p, cudaStream_t stream) {
    constexpr int OUTPUTS = OUTPUT_TILES * TILE_OUTPUTS;
    const unsigned blocks = (p.outputs + OUTPUTS - 1) / OUTPUTS;
    return enqueue(small_product_mma_kernel<T, BITS, OUTPUT_TILES, TOKEN_TILES>, blocks, 32 * WARPS, p, stream);
}

// What a warp loads of x, and its SiLU, serve all its outputs: the more there is of it, the more outputs are worth having.
constexpr int FEW_ROWS = 4;

template <class T, int BITS>
cudaError_t launch_for_rows(const SmallProduct& p, cudaStream_t stream) {
    if (p.rows <= FEW_ROWS && !p.silu) return launch<T, BITS, 1, 1>(p, stream);
    return p.rows <= TILE_TOKENS ? launch<T, BITS, 2, 1>(p, stream) : launch<T, BITS, 2, 2>(p, stream);
}

template <class T>
cudaError_t launch_for_bits(const SmallProduct& p, cudaStream_t stream) {
    return p.bits == 4 ? launch_for_rows<T, 4>(p, stream) : launch_for_rows<T, 8>(p, stream);
}

}  // namespace

cudaError_t launch_small_product_mma(const SmallProduct& product, cudaStream_t stream) {
    return product.x_type == FloatType::bfloat16 ? launch_for_bits<__nv_bfloat16>(product, stream)
                                                 : launch_for_bits<__half>(product, stream);
}

}  // namespace ditq
