// What one of several threads does of a product by AMX, on zeros; with "idle" last, all but the product.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "int8_product.h"

namespace ditq {
namespace amx {
extern const Int8ProductLevel int8_product;
}
}  // namespace ditq

namespace {

void* zeros(std::size_t bytes) {
    bytes = (bytes + 127) / 64 * 64;
    return std::memset(std::aligned_alloc(64, bytes), 0, bytes);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 8) return 1;
    const auto number = [&](int i) { return std::stoll(arguments[i]); };
    ditq::Int8Product given{};
    given.rows = number(1);
    given.inputs = number(2);
    given.outputs = number(3);
    given.task_rows = number(4);
    given.task_outputs = number(5);
    const std::int64_t threads = number(6);
    given.group = given.weight_row_bytes = given.inputs;
    given.x = static_cast<std::int8_t*>(zeros(given.rows * given.inputs));
    given.sx = static_cast<float*>(zeros(4 * given.rows));
    given.weight = static_cast<std::uint8_t*>(zeros(given.outputs * given.inputs));
    given.scale = static_cast<float*>(zeros(4 * given.outputs));
    given.out = zeros(2 * given.rows * given.outputs);
    given.out_type = ditq::OutputType::bfloat16;
    const void* arranged = zeros(ditq::amx::int8_product.arranged_bytes(given));
    const std::int64_t stretches = (given.rows + given.task_rows - 1) / given.task_rows;
    const std::int64_t tasks = (given.outputs + given.task_outputs - 1) / given.task_outputs * stretches;
    if (arguments[7] != std::string("idle")) ditq::amx::int8_product.multiply(given, arranged, 0, tasks / threads);
}
