// The int8 product for Hopper: what it takes, and the tiles it is compiled for.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "float_type.h"

namespace ditq {

// y[m, n] = qx[m, :] . qweight[n, :] * sx[m] * scale[n] + bias[n]. All matrices are row-major, on one device, and but for
// y contiguous; inputs is a multiple of 16 and outputs of 8, and all begin at multiples of 16 bytes: what the tensor
// memory accelerator reads, and stores of 16 bytes.
struct Int8Product {
    const std::int8_t* qx;       // [rows, inputs]
    const float* sx;             // [rows]
    const std::int8_t* qweight;  // [outputs, inputs]
    const float* scale;          // [outputs]
    const void* bias;            // [outputs], or null
    void* y;                     // [rows, outputs], rows y_stride apart, a multiple of 8
    FloatType bias_type;
    FloatType y_type;  // float16 or bfloat16
    int rows;
    int outputs;
    int inputs;
    std::int64_t y_stride;
    int device;
    int multiprocessors;
};

enum class Schedule { ping_pong, cooperative };

// Two warpgroups multiply: ping-pong gives each a tile of its own, so that one's epilogue hides behind the other's
// product; cooperative splits one tile, which leaves registers for a larger one. CLUSTER thread blocks, one above the
// other, share the tile of weights that they all need.
template <int ROWS, int OUTPUTS, int CLUSTER, Schedule SCHEDULE>
struct TileShape {
    static constexpr int rows = ROWS;
    static constexpr int outputs = OUTPUTS;
    static constexpr int cluster = CLUSTER;
    static constexpr Schedule schedule = SCHEDULE;
};

// ditq_kernels/layer/extension.py lists the same tiles.
template <int INDEX> struct Int8Tile;
template <> struct Int8Tile<0> : TileShape<128, 256, 2, Schedule::cooperative> {};
template <> struct Int8Tile<1> : TileShape<128, 192, 2, Schedule::cooperative> {};
template <> struct Int8Tile<2> : TileShape<128, 160, 2, Schedule::cooperative> {};
template <> struct Int8Tile<3> : TileShape<128, 128, 2, Schedule::ping_pong> {};
template <> struct Int8Tile<4> : TileShape<128, 96, 2, Schedule::ping_pong> {};
template <> struct Int8Tile<5> : TileShape<64, 128, 4, Schedule::ping_pong> {};
template <> struct Int8Tile<6> : TileShape<64, 96, 4, Schedule::ping_pong> {};
template <> struct Int8Tile<7> : TileShape<64, 64, 2, Schedule::ping_pong> {};
constexpr int INT8_TILES = 8;

// Enqueues the product; null, or why it was refused. Waits for nothing and allocates nothing.
template <int INDEX> const char* launch_int8_product(const Int8Product& product, cudaStream_t stream);

}  // namespace ditq
