// The boundary to PyTorch, on its stable ABI: schemas, checks, and tensors to pointers. Nothing here waits for the device.
//
// The implementations are registered for every device, so that a wrong shape is called a wrong shape on the CPU too; that
// the tensors are on no CUDA device is the last of the checks.
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "int8_product.h"
#include "small_product.h"

namespace ditq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Checks ----

// std::runtime_error, which reaches Python as RuntimeError, with the parts as its message.
template <class... Parts>
void require(bool fulfilled, const Parts&... parts) {
    if (fulfilled) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

std::string shape_text(const std::int64_t* sizes, std::size_t count) {
    std::ostringstream text;
    for (std::size_t i = 0; i < count; ++i) text << (i == 0 ? "[" : ", ") << sizes[i];
    return text.str() + (count == 0 ? "[]" : "]");
}

template <std::size_t DIMENSIONS>
void require_shape(const char* name, const Tensor& tensor, const std::array<std::int64_t, DIMENSIONS>& shape) {
    const auto sizes = tensor.sizes();
    bool same = sizes.size() == DIMENSIONS;
    for (std::size_t i = 0; same && i < DIMENSIONS; ++i) same = sizes[i] == shape[i];
    require(same, name, " must be ", shape_text(shape.data(), DIMENSIONS), ", got ",
            shape_text(sizes.data(), sizes.size()));
}

void require_dimensions(const char* name, const Tensor& tensor, std::int64_t count) {
    require(tensor.dim() == count, name, " must have ", count, " dimensions, got ", tensor.dim());
}

void require_type(const char* name, const Tensor& tensor, ScalarType type) {
    const auto found = tensor.scalar_type();
    require(found == type, name, " must be ", toString(type), ", got ", toString(found));
}

void require_contiguous(const char* name, const Tensor& tensor) {
    require(tensor.is_contiguous(), name, " must be contiguous");
}

// A dimension that kernels may count in 32 bits, with room to round it up to whole tiles.
int size_of(const char* name, std::int64_t size) {
    constexpr std::int64_t most = std::numeric_limits<int>::max() / 2;
    require(size <= most, name, " must be at most ", most, ", got ", size);
    return static_cast<int>(size);
}

FloatType float_type(const char* name, ScalarType type) {
    switch (type) {
        case ScalarType::Float: return FloatType::float32;
        case ScalarType::Half: return FloatType::float16;
        case ScalarType::BFloat16: return FloatType::bfloat16;
        default: require(false, name, " must be Float, Half or BFloat16, got ", toString(type));
    }
    return FloatType::float32;
}

struct Bias {
    const void* values = nullptr;
    FloatType type = FloatType::float32;
};

Bias check_bias(const OptionalTensor& bias, std::int64_t outputs) {
    if (!bias) return {};
    require_shape<1>("bias", *bias, {outputs});
    require_contiguous("bias", *bias);
    return {bias->const_data_ptr(), float_type("bias", bias->scalar_type())};
}

void require_same_device(const char* name, const Tensor& tensor, const char* input_name, const Tensor& input) {
    require(tensor.device() == input.device(), name, " and ", input_name, " must be on one device");
}

void require_cuda(const char* name, const Tensor& tensor) {
    require(tensor.is_cuda(), name, " must be on a CUDA device; for other devices there is the reference backend");
}

void require_success(cudaError_t status, const char* what) {
    require(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// ---- The device ----

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    require_success(cudaDeviceGetAttribute(&value, which, device), "reading a device attribute");
    return value;
}

// PyTorch's current stream. The function is in libtorch_cuda.so, which is looked for among the libraries that the process
// has and is not linked to: the same file then loads under a PyTorch without CUDA.
cudaStream_t current_stream(int device) {
    using Function = AOTITorchError (*)(std::int32_t, void**);
    static const Function function = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    require(function != nullptr, "this PyTorch has no CUDA streams: install one that is built for CUDA");
    void* stream = nullptr;
    require(function(device, &stream) == AOTI_TORCH_SUCCESS, "PyTorch gave no current CUDA stream");
    return static_cast<cudaStream_t>(stream);
}

// ---- Few rows ----

bool is_group_size(std::int64_t group) { return group == 0 || group == 32 || group == 64 || group == 128; }

int group_shift(std::int64_t group) {
    int shift = 31;  // no groups: every input is in group 0
    if (group != 0) {
        for (shift = 0; (std::int64_t{1} << shift) < group;) ++shift;
    }
    return shift;
}

Tensor small_product(
    const Tensor& x, const Tensor& qweight, const Tensor& scale, const OptionalTensor& group_code,
    const OptionalTensor& bias, std::int64_t bits, std::int64_t group, bool silu) {
    require(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
    require(is_group_size(group), "group must be 0 (one per output), 32, 64 or 128, got ", group);
    require_dimensions("x", x, 2);
    require_dimensions("qweight", qweight, 2);
    SmallProduct p{};
    p.bits = static_cast<int>(bits);
    p.silu = silu;
    p.x_type = float_type("x", x.scalar_type());
    require(x.size(0) <= SMALL_ROWS, "x must have at most ", SMALL_ROWS, " rows, got ", x.size(0));
    p.rows = static_cast<int>(x.size(0));
    p.inputs = size_of("the columns of x", x.size(1));
    p.outputs = size_of("the rows of qweight", qweight.size(0));
    require(p.inputs > 0, "x must have columns");
    require(x.stride(1) == 1 || p.inputs == 1, "neighbours in a row of x must be neighbours in memory");
    p.x_stride = p.rows == 1 ? p.inputs : x.stride(0);
    p.groups = group == 0 ? 1 : static_cast<int>((p.inputs + group - 1) / group);
    p.group_shift = group_shift(group);
    p.row_bytes = bits == 8 ? p.inputs : static_cast<std::int64_t>((p.inputs + BLOCK - 1) / BLOCK) * HALF_BLOCK;

    require_type("qweight", qweight, bits == 8 ? ScalarType::Char : ScalarType::Byte);
    require_shape<2>("qweight", qweight, {p.outputs, p.row_bytes});
    require_contiguous("qweight", qweight);
    require_type("scale", scale, ScalarType::Float);
    if (bits == 8 && group != 0) {
        require_shape<2>("scale", scale, {p.groups, p.outputs});
    } else {
        require_shape<1>("scale", scale, {p.outputs});
    }
    require_contiguous("scale", scale);
    require(group_code.has_value() == (bits == 4), "group_code belongs to 4-bit weights, and to no others");
    if (group_code) {
        require_type("group_code", *group_code, ScalarType::Byte);
        require_shape<2>("group_code", *group_code, {p.groups, p.outputs});
        require_contiguous("group_code", *group_code);
        require_same_device("group_code", *group_code, "x", x);
        p.group_code = static_cast<const std::uint8_t*>(group_code->const_data_ptr());
    }
    const Bias added = check_bias(bias, p.outputs);
    if (bias) require_same_device("bias", *bias, "x", x);
    require_same_device("qweight", qweight, "x", x);
    require_same_device("scale", scale, "x", x);
    require_cuda("x", x);

    const std::array<std::int64_t, 2> shape{p.rows, p.outputs};
    Tensor y = torch::stable::new_empty(x, {shape.data(), shape.size()});
    if (p.rows == 0 || p.outputs == 0) return y;
    p.x = x.const_data_ptr();
    p.qweight = static_cast<const std::uint8_t*>(qweight.const_data_ptr());
    p.scale = static_cast<const float*>(scale.const_data_ptr());
    p.bias = added.values;
    p.bias_type = added.type;
    p.y = y.mutable_data_ptr();

    const int device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const auto launch = suits_matrix_instructions(p) ? launch_small_product_mma : launch_small_product_fma;
    require_success(launch(p, current_stream(device)), "small_product");
    return y;
}

// ---- int8 ----

using Int8Launch = const char* (*)(const Int8Product&, cudaStream_t);

template <std::size_t... INDICES>
constexpr std::array<Int8Launch, sizeof...(INDICES)> int8_launches(std::index_sequence<INDICES...>) {
    return {launch_int8_product<INDICES>...};
}

void require_vectors(const char* name, const void* pointer) {
    require(reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0, name, " must begin at a 16-byte boundary");
}

void int8_product(
    const Tensor& qx, const Tensor& sx, const Tensor& qweight, const Tensor& scale, const OptionalTensor& bias,
    const Tensor& y, std::int64_t tile) {
    static constexpr auto launches = int8_launches(std::make_index_sequence<INT8_TILES>{});
    require(tile >= 0 && tile < INT8_TILES, "tile must be 0 to ", INT8_TILES - 1, ", got ", tile);
    require(y.scalar_type() == ScalarType::Half || y.scalar_type() == ScalarType::BFloat16,
            "y must be Half or BFloat16, got ", toString(y.scalar_type()));
    require_dimensions("qx", qx, 2);
    require_dimensions("qweight", qweight, 2);
    Int8Product p{};
    p.y_type = float_type("y", y.scalar_type());
    p.rows = size_of("the rows of qx", qx.size(0));
    p.inputs = size_of("the columns of qx", qx.size(1));
    p.outputs = size_of("the rows of qweight", qweight.size(0));
    require(p.inputs > 0 && p.inputs % 16 == 0, "the columns of qx must be a multiple of 16, got ", p.inputs);
    require(p.outputs % 8 == 0, "the rows of qweight must be a multiple of 8, got ", p.outputs);
    require_type("qx", qx, ScalarType::Char);
    require_contiguous("qx", qx);
    require_type("sx", sx, ScalarType::Float);
    require_shape<1>("sx", sx, {p.rows});
    require_contiguous("sx", sx);
    require_type("qweight", qweight, ScalarType::Char);
    require_shape<2>("qweight", qweight, {p.outputs, p.inputs});
    require_contiguous("qweight", qweight);
    require_type("scale", scale, ScalarType::Float);
    require_shape<1>("scale", scale, {p.outputs});
    require_contiguous("scale", scale);
    require_shape<2>("y", y, {p.rows, p.outputs});
    require(y.stride(1) == 1, "neighbours in a row of y must be neighbours in memory");
    p.y_stride = p.rows <= 1 || p.outputs == 0 ? p.outputs : y.stride(0);
    require(p.y_stride >= p.outputs && p.y_stride % 8 == 0,
            "the rows of y must lie a multiple of 8 elements apart, and not in each other, got ", p.y_stride);
    const Bias added = check_bias(bias, p.outputs);
    if (bias) require_same_device("bias", *bias, "qx", qx);
    require_same_device("sx", sx, "qx", qx);
    require_same_device("qweight", qweight, "qx", qx);
    require_same_device("scale", scale, "qx", qx);
    require_same_device("y", y, "qx", qx);
    require_cuda("qx", qx);

    if (p.rows == 0 || p.outputs == 0) return;
    p.qx = static_cast<const std::int8_t*>(qx.const_data_ptr());
    p.sx = static_cast<const float*>(sx.const_data_ptr());
    p.qweight = static_cast<const std::int8_t*>(qweight.const_data_ptr());
    p.scale = static_cast<const float*>(scale.const_data_ptr());
    p.bias = added.values;
    p.bias_type = added.type;
    p.y = y.mutable_data_ptr();
    require_vectors("qx", p.qx);
    require_vectors("qweight", p.qweight);
    require_vectors("y", p.y);

    p.device = qx.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(p.device);
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, p.device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, p.device);
    require(major == 9 && minor == 0, "int8_product is built for compute capability 9.0, and this device has ", major,
            ".", minor, "; use the triton backend");
    p.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, p.device);
    const char* refusal = launches[static_cast<std::size_t>(tile)](p, current_stream(p.device));
    require(refusal == nullptr, "int8_product: ", refusal == nullptr ? "" : refusal);
}

STABLE_TORCH_LIBRARY(ditq_cuda, library) {
    library.def(
        "small_product(Tensor x, Tensor qweight, Tensor scale, Tensor? group_code, Tensor? bias, int bits, int group, "
        "bool silu) -> Tensor");
    library.def(
        "int8_product(Tensor qx, Tensor sx, Tensor qweight, Tensor scale, Tensor? bias, Tensor(a!) y, int tile) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ditq_cuda, CompositeExplicitAutograd, library) {
    library.impl("small_product", TORCH_BOX(&small_product));
    library.impl("int8_product", TORCH_BOX(&int8_product));
}

}  // namespace
}  // namespace ditq
