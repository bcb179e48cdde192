// Runs one product of few rows on emulated thread blocks. Usage: small_product PROBLEM RESULT.
//
// PROBLEM holds 13 int64: x type, bias type (-1: none), bits, rows, outputs, inputs, groups, group shift, x stride in
// elements, row bytes, SiLU, kernel (0: matrix instructions, 1: without, 2: as the binding chooses), misalignment of x
// and the weight in bytes; then, each with its length in bytes before it: x, qweight, scale, group_code, bias. RESULT
// receives y and, as its last byte, the kernel that ran.
//
// Every operand ends where memory ends (but for what alignment to 16 bytes leaves), so that a read past it is fatal.
#include "gpu.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "small_product.h"

namespace {

constexpr std::size_t ALIGNMENT = 16;

std::vector<char> read_bytes(std::FILE* file, std::size_t count) {
    std::vector<char> bytes(count);
    if (count != 0 && std::fread(bytes.data(), 1, count, file) != count) std::abort();
    return bytes;
}

std::int64_t read_number(std::FILE* file) {
    std::int64_t number;
    if (std::fread(&number, sizeof(number), 1, file) != 1) std::abort();
    return number;
}

// A copy with a forbidden page behind it, and `misalignment` bytes after a 16-byte boundary.
char* guarded(const std::vector<char>& bytes, std::size_t misalignment = 0) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t needed = (bytes.size() + misalignment + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const std::size_t pages = (needed + page - 1) / page * page;
    char* memory = static_cast<char*>(mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory + pages, page, PROT_NONE) != 0) std::abort();
    std::memset(memory, 0xFF, pages);  // NaN, should it be read
    char* begin = memory + pages - needed + misalignment;
    std::memcpy(begin, bytes.data(), bytes.size());
    return begin;
}

}  // namespace

int main(int, char** paths) {
    std::FILE* file = std::fopen(paths[1], "rb");
    if (file == nullptr) std::abort();
    std::int64_t header[13];
    for (std::int64_t& number : header) number = read_number(file);
    std::vector<char> operands[5];
    for (auto& operand : operands) operand = read_bytes(file, static_cast<std::size_t>(read_number(file)));
    std::fclose(file);

    const std::size_t misalignment = static_cast<std::size_t>(header[12]);
    ditq::SmallProduct p{};
    p.x_type = static_cast<ditq::FloatType>(header[0]);
    if (header[1] >= 0) {
        p.bias_type = static_cast<ditq::FloatType>(header[1]);
        p.bias = guarded(operands[4]);
    }
    p.bits = static_cast<int>(header[2]);
    p.rows = static_cast<int>(header[3]);
    p.outputs = static_cast<int>(header[4]);
    p.inputs = static_cast<int>(header[5]);
    p.groups = static_cast<int>(header[6]);
    p.group_shift = static_cast<int>(header[7]);
    p.x_stride = header[8];
    p.row_bytes = header[9];
    p.silu = header[10] != 0;
    p.x = guarded(operands[0], misalignment);
    p.qweight = reinterpret_cast<std::uint8_t*>(guarded(operands[1], misalignment));
    p.scale = reinterpret_cast<float*>(guarded(operands[2]));
    p.group_code = reinterpret_cast<std::uint8_t*>(guarded(operands[3]));
    const std::size_t element = p.x_type == ditq::FloatType::float32 ? 4 : 2;
    const std::vector<char> poison(static_cast<std::size_t>(p.rows) * p.outputs * element, '\xFF');
    char* y = guarded(poison);
    p.y = y;

    const bool matrix = header[11] == 2 ? ditq::suits_matrix_instructions(p) : header[11] == 0;
    (matrix ? ditq::launch_small_product_mma : ditq::launch_small_product_fma)(p, nullptr);

    std::FILE* result = std::fopen(paths[2], "wb");
    const char kernel = matrix ? 0 : 1;
    if (result == nullptr || std::fwrite(y, 1, poison.size(), result) != poison.size()) std::abort();
    if (std::fwrite(&kernel, 1, 1, result) != 1 || std::fclose(result) != 0) std::abort();
    return 0;
}
