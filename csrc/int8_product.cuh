// The int8 product of a tile of int8_product.h, for sm_90a: one warpgroup asks the copy engine for tiles of both
// operands, two multiply them. Thread blocks of a cluster lie one above the other and share the weights' tile: each
// fetches a slice and sends it to all. The grid is persistent.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper.cuh"
#include "int8_product.h"
#include "load_float.cuh"

namespace ditq {

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;           // threads
constexpr int CONSUMERS = 2;             // warpgroups that multiply
constexpr int FRAGMENT_ROWS = 64;        // of one matrix instruction
constexpr int STEP = 128;                // inputs that are fetched at a time: a row of 128 bytes
constexpr int INSTRUCTION_INPUTS = 32;   // of one matrix instruction
constexpr int SHARED_BYTES = 227 * 1024; // of one thread block
constexpr int BAND = 8;                  // rows of tiles that are computed together, to find weights in the L2 cache

// Numbers of barriers: of each warpgroup, and of whose turn it is.
constexpr int FIRST_GROUP = 1;
constexpr int FIRST_TURN = FIRST_GROUP + CONSUMERS;

// What the kernel needs beside the operands.
struct Int8Output {
    const float* sx;
    const float* scale;
    const void* bias;
    void* y;
    std::int64_t y_stride;
    FloatType bias_type;
    int rows;
    int outputs;
    int inputs;
};

// How a tile is computed.
template <class Tile>
struct Plan {
    static constexpr bool ping_pong = Tile::schedule == Schedule::ping_pong;
    static constexpr int fragments = Tile::rows / FRAGMENT_ROWS / (ping_pong ? 1 : CONSUMERS);  // of a warpgroup
    static constexpr int slice = Tile::outputs / Tile::cluster;  // of the weights, that one of the cluster fetches
    static constexpr int x_bytes = Tile::rows * STEP;
    static constexpr int stage_bytes = x_bytes + Tile::outputs * STEP;
    static constexpr int vector_bytes = CONSUMERS * 2 * Tile::outputs * 4;  // scales and biases of each warpgroup
    static constexpr int barrier_bytes = 256;
    static constexpr int fitting = (SHARED_BYTES - vector_bytes - barrier_bytes) / stage_bytes;
    static constexpr int stages = fitting < barrier_bytes / 16 ? fitting : barrier_bytes / 16;
    static constexpr int shared_bytes = stages * stage_bytes + vector_bytes + barrier_bytes;
    // Each warp says for itself that it has read a stage.
    static constexpr int releases = Tile::cluster * (ping_pong ? 1 : CONSUMERS) * WARPGROUP / WARP;
    static_assert(fragments >= 1 && Tile::outputs % 32 == 0 && slice % 8 == 0 && stages >= 2);
    // 128 registers hold accumulators at most.
    static_assert(fragments * Tile::outputs <= 256);
};

// Where a step's operands lie, and whether the barriers there are in an odd or even phase.
template <int STAGES>
struct Place {
    int stage = 0;
    std::uint32_t phase = 0;

    __device__ void advance(int steps = 1) {
        stage += steps;
        phase ^= static_cast<std::uint32_t>(stage / STAGES) & 1;
        stage %= STAGES;
    }
};

struct Origin {
    int row;
    int output;
};

// Where tile number `tile` of the cluster begins. Tiles that are computed at the same time form a compact patch.
template <class Tile>
__device__ Origin origin(int tile, const Int8Output& p) {
    constexpr int cluster_rows = Tile::rows * Tile::cluster, height = BAND / Tile::cluster;
    const int down = (p.rows + cluster_rows - 1) / cluster_rows;
    const int across = (p.outputs + Tile::outputs - 1) / Tile::outputs;
    const int first = tile / (height * across) * height, inside = tile % (height * across);
    const int band = min(down - first, height);
    return {(first + inside % band) * cluster_rows, inside / band * Tile::outputs};
}

// Of the cluster.
template <class Tile>
__host__ __device__ int tile_count(const Int8Output& p) {
    constexpr int cluster_rows = Tile::rows * Tile::cluster;
    return (p.rows + cluster_rows - 1) / cluster_rows * ((p.outputs + Tile::outputs - 1) / Tile::outputs);
}

struct SharedMemory {
    std::uint8_t* stages;
    float* vectors;        // of this warpgroup: scales, then biases
    std::uint64_t* full;   // stages that have arrived
    std::uint64_t* empty;  // stages that all blocks of the cluster have read
};

template <class Tile>
__device__ void fetch(
    const CUtensorMap& qx, const CUtensorMap& qweight, const Int8Output& p, const SharedMemory& shared) {
    using P = Plan<Tile>;
    const int rank = Tile::cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
    constexpr auto everyone = static_cast<std::uint16_t>((1u << Tile::cluster) - 1);
    Place<P::stages> place;
    const int tiles = tile_count<Tile>(p), clusters = gridDim.x / Tile::cluster;
    for (int tile = blockIdx.x / Tile::cluster; tile < tiles; tile += clusters) {
        const Origin at = origin<Tile>(tile, p);
        for (int k = 0; k < p.inputs; k += STEP) {
            std::uint8_t* x = shared.stages + place.stage * P::stage_bytes;
            std::uint8_t* weight = x + P::x_bytes + rank * P::slice * STEP;
            std::uint64_t* full = shared.full + place.stage;
            wait(shared.empty + place.stage, place.phase ^ 1);
            arrive_expecting(full, P::stage_bytes);
            copy_tile(x, qx, full, k, at.row + rank * Tile::rows);
            if constexpr (Tile::cluster > 1) {
                copy_tile_to(everyone, weight, qweight, full, k, at.output + rank * P::slice);
            } else {
                copy_tile(weight, qweight, full, k, at.output);
            }
            place.advance();
        }
    }
    // The other blocks have said all that they will say to this one's barriers: it may end.
    for (int stage = 0; stage < P::stages; ++stage, place.advance()) wait(shared.empty + place.stage, place.phase ^ 1);
}

template <class Output>
__device__ std::uint32_t pack(float first, float second) {
    if constexpr (std::is_same_v<Output, __half>) {
        const __half2 both = __floats2half2_rn(first, second);
        return reinterpret_cast<const std::uint32_t&>(both);
    } else {
        const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
        return reinterpret_cast<const std::uint32_t&>(both);
    }
}

// Of the four lanes of a quad, each gives its part of each of four words and gets all parts of its own.
__device__ inline void transpose_in_quad(std::uint32_t (&words)[4], int lane) {
    const bool odd = lane & 1, high = lane & 2;
    std::uint32_t even_word[2], odd_word[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // words 2 i and 2 i + 1: the odd lane takes the second
        const std::uint32_t given = odd ? words[2 * i] : words[2 * i + 1];
        const std::uint32_t got = __shfl_xor_sync(0xffffffff, given, 1);
        even_word[i] = odd ? got : words[2 * i];
        odd_word[i] = odd ? words[2 * i + 1] : got;
    }
    const std::uint32_t first = __shfl_xor_sync(0xffffffff, high ? even_word[0] : even_word[1], 2);
    const std::uint32_t second = __shfl_xor_sync(0xffffffff, high ? odd_word[0] : odd_word[1], 2);
    words[0] = high ? first : even_word[0];
    words[1] = high ? second : odd_word[0];
    words[2] = high ? even_word[1] : first;
    words[3] = high ? odd_word[1] : second;
}

// ((accumulator * sx[m]) * scale[n]) + bias[n], each step rounded by itself, as every backend does it.
template <class Output, int OUTPUTS>
__device__ void store(
    const int (&accumulators)[OUTPUTS / 2], const Int8Output& p, const float* scales, const float* biases, int row,
    const float (&sx)[2], int first_output) {
    const int lane = static_cast<int>(threadIdx.x) % WARP, quad = lane % 4;
#pragma unroll
    for (int n = 0; n < OUTPUTS; n += 32) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            std::uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = n + 8 * i + 2 * quad, at = (n + 8 * i) / 2 + 2 * half;
                float value[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float scaled = __fmul_rn(__int2float_rn(accumulators[at + j]), sx[half]);
                    value[j] = __fadd_rn(__fmul_rn(scaled, scales[column + j]), biases[column + j]);
                }
                words[i] = pack<Output>(value[0], value[1]);
            }
            transpose_in_quad(words, lane);
            const int m = row + 8 * half, output = first_output + n + 8 * quad;
            if (m < p.rows && output < p.outputs) {
                const auto offset = m * p.y_stride + output;
                *reinterpret_cast<uint4*>(static_cast<Output*>(p.y) + offset) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
}

template <class Tile, class Output>
__device__ void multiply(const Int8Output& p, const SharedMemory& shared, int consumer) {
    using P = Plan<Tile>;
    const int thread = static_cast<int>(threadIdx.x) % WARPGROUP, lane = thread % WARP;
    const int rank = Tile::cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
    const int steps = (p.inputs + STEP - 1) / STEP;
    const int first_row = (P::ping_pong ? 0 : consumer * P::fragments * FRAGMENT_ROWS) + thread / WARP * 16 + lane / 4;
    float *scales = shared.vectors, *biases = shared.vectors + Tile::outputs;
    const std::uint32_t stages = shared_address(shared.stages);

    // Each lane tells another block.
    const auto release = [&](int stage) {
        if (lane < Tile::cluster) arrive_at(shared.empty + stage, lane);
    };

    Place<P::stages> place;
    int accumulators[P::fragments][Tile::outputs / 2];
    const int tiles = tile_count<Tile>(p), clusters = gridDim.x / Tile::cluster;
    int turn = 0;
    for (int tile = blockIdx.x / Tile::cluster; tile < tiles; tile += clusters, ++turn) {
        if (P::ping_pong && turn % CONSUMERS != consumer) {
            place.advance(steps);
            continue;
        }
        Origin at = origin<Tile>(tile, p);
        at.row += rank * Tile::rows + first_row;
        float sx[P::fragments][2];
#pragma unroll
        for (int f = 0; f < P::fragments; ++f) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int m = at.row + f * FRAGMENT_ROWS + 8 * half;
                sx[f][half] = m < p.rows ? p.sx[m] : 0.0f;
            }
        }
        warpgroup_sync(FIRST_GROUP + consumer);  // the last tile's vectors have been read
        for (int n = thread; n < Tile::outputs; n += WARPGROUP) {
            const int output = at.output + n;
            scales[n] = output < p.outputs ? p.scale[output] : 0.0f;
            // Adding -0 changes nothing.
            biases[n] = p.bias != nullptr && output < p.outputs ? load_float(p.bias, p.bias_type, output) : -0.0f;
        }
        warpgroup_sync(FIRST_GROUP + consumer);

        // The other warpgroup's steps come before: whoever waits for a stage two rounds ahead takes an old one for it.
        if (P::ping_pong && turn > 0) warpgroup_await(FIRST_TURN + consumer);
        int last = 0;
        for (int step = 0; step < steps; ++step) {
            wait(shared.full + place.stage, place.phase);
            const std::uint32_t x = stages + place.stage * P::stage_bytes, weight = x + P::x_bytes;
            const std::uint32_t own = x + (P::ping_pong ? 0 : consumer * P::fragments * FRAGMENT_ROWS * STEP);
            matrix_fence();
#pragma unroll
            for (int k = 0; k < STEP; k += INSTRUCTION_INPUTS) {
#pragma unroll
                for (int f = 0; f < P::fragments; ++f) {
                    multiply_int8<Tile::outputs>(
                        accumulators[f], operand(own + f * FRAGMENT_ROWS * STEP + k), operand(weight + k),
                        step > 0 || k > 0);
                }
            }
            matrix_commit();
            if (step > 0) {  // this step's products run on while the last one's operands are given back
                matrix_wait<1>();
                release(last);
            }
            last = place.stage;
            place.advance();
        }
        if (P::ping_pong && tile + clusters < tiles) warpgroup_signal(FIRST_TURN + 1 - consumer);
        matrix_wait<0>();
        release(last);
#pragma unroll
        for (int f = 0; f < P::fragments; ++f) {
            store<Output, Tile::outputs>(
                accumulators[f], p, scales, biases, at.row + f * FRAGMENT_ROWS, sx[f], at.output);
        }
    }
}

template <class Tile, class Output>
__global__ void __launch_bounds__((1 + CONSUMERS) * WARPGROUP, 1) int8_product_kernel(
    const __grid_constant__ CUtensorMap qx, const __grid_constant__ CUtensorMap qweight, const Int8Output p) {
    using P = Plan<Tile>;
    extern __shared__ __align__(1024) std::uint8_t memory[];
    // The same for all lanes, which the compiler cannot tell from a division.
    const int warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / WARPGROUP, 0);
    SharedMemory shared;
    shared.stages = memory;
    shared.full = reinterpret_cast<std::uint64_t*>(memory + P::stages * P::stage_bytes);
    shared.empty = shared.full + P::stages;
    shared.vectors = reinterpret_cast<float*>(memory + P::stages * P::stage_bytes + P::barrier_bytes);

    if (threadIdx.x == 0) {
        prefetch(qx);
        prefetch(qweight);
        for (int stage = 0; stage < P::stages; ++stage) {
            barrier_init(shared.full + stage, 1);
            barrier_init(shared.empty + stage, P::releases);
        }
        publish_barriers();
    }
    if constexpr (Tile::cluster > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }
    wait_for_earlier_kernels();
    start_next_kernel();

    if (warpgroup == 0) {
        shrink_registers<40>();
        if (threadIdx.x == 0) fetch<Tile>(qx, qweight, p, shared);
    } else {
        grow_registers<232>();
        shared.vectors += (warpgroup - 1) * 2 * Tile::outputs;
        multiply<Tile, Output>(p, shared, warpgroup - 1);
    }
}

}  // namespace ditq
