// The products for CPUs at levels that this one may not have, whose few instructions are carried out one by one,
// for Python to call.
#include <cstdint>
#include <vector>

#include "int8_product.h"

namespace ditq {
namespace avx512_vnni {
extern const Int8ProductLevel int8_product;
}
namespace amx {
extern const Int8ProductLevel int8_product;
}
}  // namespace ditq

extern "C" void product(
    const char* level, const std::int8_t* x, const float* sx, std::int64_t rows, std::int64_t inputs,
    const std::uint8_t* weight, std::int64_t weight_row_bytes, std::int64_t outputs, std::int64_t group,
    const std::uint8_t* group_code, const float* scale, int promoted, const float* bias, void* out, int out_type,
    const void* residual, std::int64_t residual_stride, const void* gate, std::int64_t gate_stride,
    std::int64_t rows_per_gate, std::int64_t task_tiles, std::int64_t task_outputs) {
    const ditq::Int8ProductLevel& product =
        level[1] == 'v' ? ditq::avx512_vnni::int8_product : ditq::amx::int8_product;
    const ditq::Int8Product given{
        x, sx, rows, inputs, weight, weight_row_bytes, outputs, group, group_code, scale, promoted != 0, bias, out,
        static_cast<ditq::OutputType>(out_type), residual, residual_stride, gate, gate_stride,
        rows_per_gate, 0, task_tiles * product.tile_rows,
        task_outputs};
    std::vector<std::uint8_t> arranged(product.arranged_bytes(given) + 64);
    void* aligned = arranged.data() + 64 - reinterpret_cast<std::uintptr_t>(arranged.data()) % 64;
    product.arrange(given, aligned, 0, (rows + product.tile_rows - 1) / product.tile_rows);
    const std::int64_t stretches = (rows + given.task_rows - 1) / given.task_rows;
    product.multiply(given, aligned, 0, (outputs + task_outputs - 1) / task_outputs * stretches);
}
