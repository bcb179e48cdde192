// The int8 product for Hopper: what it takes, and the tiles it is compiled for.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "float_type.h"

namespace ditq {

// y[m, n] = qx[m, :] . qweight[n, :] * sx[m] * scale[n] + bias[n]. All matrices are row-major and contiguous, on one
// device; inputs is a multiple of 16 and outputs of 8 (16-byte rows, which the tensor memory accelerator asks for).
struct Int8Product {
    const std::int8_t* qx;       // [rows, inputs]
    const float* sx;             // [rows]
    const std::int8_t* qweight;  // [outputs, inputs]
    const float* scale;          // [outputs]
    const void* bias;            // [outputs], or null
    void* y;                     // [rows, outputs]
    FloatType bias_type;
    FloatType y_type;  // float16 or bfloat16
    int rows;
    int outputs;
    int inputs;
    int device;
    int multiprocessors;
};

enum class Schedule { ping_pong, cooperative };

// Two warpgroups multiply: ping-pong gives each a tile of its own, so that one's epilogue hides behind the other's
// product; cooperative splits one tile, which leaves registers for a larger one.
template <int ROWS, int OUTPUTS, Schedule SCHEDULE>
struct TileShape {
    static constexpr int rows = ROWS;
    static constexpr int outputs = OUTPUTS;
    static constexpr Schedule schedule = SCHEDULE;
};

// ditq_kernels/layer/extension.py lists the same tiles. Widths that are no powers of two let the tiles of real layers
// come out even on 132 multiprocessors; csrc/README.md has the counts.
template <int INDEX> struct Int8Tile;
template <> struct Int8Tile<0> : TileShape<128, 192, Schedule::cooperative> {};
template <> struct Int8Tile<1> : TileShape<128, 256, Schedule::cooperative> {};
template <> struct Int8Tile<2> : TileShape<128, 144, Schedule::cooperative> {};
template <> struct Int8Tile<3> : TileShape<128, 96, Schedule::ping_pong> {};
template <> struct Int8Tile<4> : TileShape<64, 80, Schedule::ping_pong> {};
constexpr int INT8_TILES = 5;

// Bytes of scratch memory that a launch needs, often none.
template <int INDEX> std::size_t int8_workspace_bytes(const Int8Product& product);

// Enqueues the product; null, or why it was refused. Waits for nothing and allocates nothing.
template <int INDEX> const char* launch_int8_product(const Int8Product& product, void* workspace, cudaStream_t stream);

}  // namespace ditq
