// The product of int8 activations with a stored weight on a CPU: what it takes. ditq_kernels/layer/reference.py says what
// is computed (linear_a8); here every bit is the same.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ditq {

enum class OutputType : int { float32, bfloat16, float16, int32 };

struct Int8Product {
    const std::int8_t* x;  // [rows, inputs]
    const float* sx;       // [rows]
    std::int64_t rows;
    std::int64_t inputs;

    const std::uint8_t* weight;  // [outputs, weight_row_bytes], int8 or nibbles, as packing.py lays them out
    std::int64_t weight_row_bytes;
    std::int64_t outputs;
    std::int64_t group;              // inputs of a group; all of them where there are no groups
    const std::uint8_t* group_code;  // [groups, outputs] of two-level formats, else null
    const float* scale;              // [outputs]; [groups, outputs] where sums are scaled group by group
    bool promoted;

    const float* bias;  // [outputs] or null
    void* out;          // [rows, outputs]
    OutputType out_type;

    // What the product is added to once it is rounded, times a row of gates for so many rows; both of out_type, rows so
    // many values apart. Or null.
    const void* residual;  // [rows, outputs]
    std::int64_t residual_stride;
    const void* gate;
    std::int64_t gate_stride;
    std::int64_t rows_per_gate;
    std::int64_t first_row;  // of `rows`, counted from the first gate's

    // What one task computes of the output: whole tiles of the level, and whole TASK_OUTPUTS.
    std::int64_t task_rows;
    std::int64_t task_outputs;
};

constexpr std::int64_t TASK_OUTPUTS = 64;

// One level of instructions.
struct Int8ProductLevel {
    std::int64_t tile_rows;
    std::int64_t fewest_rows;  // of a task, for which it is worth while to decode weights
    // Bytes of the activations as `arrange` lays them out, for `multiply` to read.
    std::size_t (*arranged_bytes)(const Int8Product&);
    // Tiles [first, last) of tile_rows rows.
    void (*arrange)(const Int8Product&, void* arranged, std::int64_t first, std::int64_t last);
    // Tasks [first, last): all stretches of rows of the first task_outputs outputs, then of the next.
    void (*multiply)(const Int8Product&, const void* arranged, std::int64_t first, std::int64_t last);
};

}  // namespace ditq
