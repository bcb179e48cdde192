// The boundary to PyTorch of what runs on CPUs, on its stable ABI. Only cpu_extension.py calls these operators, which makes
// and checks the tensors.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "compensate.h"
#include "few_rows_product.h"
#include "int8_product.h"
#include "levels.h"
#include "quantize_activation.h"
#include "quantize_weight.h"

namespace ditq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr std::int64_t WEIGHTS_PER_TASK = 1 << 16;
constexpr std::int64_t ACTIVATIONS_PER_TASK = 1 << 14;
constexpr std::int64_t COMPENSATED_ROWS = 64;
constexpr std::int64_t TASKS_PER_THREAD = 4;
constexpr std::int64_t LAID_OUT_ROWS = 128;  // at a time
constexpr std::int64_t ROUNDED_ROWS = 32;  // at a time, or a tile's if these are more
constexpr std::int64_t MOST_TASK_ROWS = 1024;  // whose sums the second cache may hold
constexpr std::size_t KEPT_ACTIVATIONS = 5 << 18;  // bytes that a second cache of 2 MB keeps beside sums and panels
constexpr std::int64_t WIDEST_TASK = 3 * TASK_OUTPUTS;
constexpr std::int64_t ROWS_AT_ONCE = 8192;  // bounds the memory in which activations are laid out

// The level asked for, or (-1) the last that runs on this CPU.
template <class Level>
const Level& chosen(const std::vector<Level>& levels, std::int64_t level) {
    return levels.at(level < 0 ? running(levels) - 1 : level);
}

template <class T>
T* pointer(const OptionalTensor& tensor) {
    return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

FloatType float_type(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::BFloat16: return FloatType::bfloat16;
        case ScalarType::Half: return FloatType::float16;
        default: return FloatType::float32;
    }
}

OutputType output_type(const Tensor& tensor) {
    if (tensor.scalar_type() == ScalarType::Int) return OutputType::int32;
    return static_cast<OutputType>(float_type(tensor));
}
static_assert(static_cast<int>(OutputType::float16) == static_cast<int>(FloatType::float16));

std::int64_t divided_up(std::int64_t size, std::int64_t by) { return (size + by - 1) / by; }

void quantize_weight(
    Tensor weight, std::int64_t group, Tensor rules, Tensor ratios, OptionalTensor limits, Tensor codes, Tensor scale,
    OptionalTensor multiplier, OptionalTensor zero_point, Tensor doubtful, Tensor broken, std::int64_t level) {
    WeightRounding given{};
    given.weight = weight.const_data_ptr();
    given.weight_type = float_type(weight);
    given.rows = weight.size(0);
    given.inputs = weight.size(1);
    given.row_stride = weight.stride(0);
    given.group = group;
    given.rules = static_cast<const RangeRule*>(rules.const_data_ptr());
    given.ratios = static_cast<const float*>(ratios.const_data_ptr());
    given.rule_count = static_cast<int>(rules.size(0));
    given.ratio_count = static_cast<int>(ratios.size(0));
    given.two_level = multiplier.has_value();
    given.limits = pointer<float>(limits);
    given.codes = static_cast<std::uint8_t*>(codes.mutable_data_ptr());
    given.scale = static_cast<float*>(scale.mutable_data_ptr());
    given.multiplier = pointer<std::uint8_t>(multiplier);
    given.zero_point = pointer<std::uint8_t>(zero_point);
    given.doubtful = static_cast<std::uint8_t*>(doubtful.mutable_data_ptr());
    given.broken = static_cast<std::uint8_t*>(broken.mutable_data_ptr());
    const RoundWeights round = chosen(weight_levels(), level).round_weights;
    const std::int64_t rows_per_task = std::max<std::int64_t>(1, WEIGHTS_PER_TASK / given.inputs);
    torch::stable::parallel_for(0, given.rows, rows_per_task, [&](std::int64_t first, std::int64_t last) {
        round(given, first, last);
    });
}

void compensate(
    Tensor exact, Tensor wanted, Tensor within, Tensor step, Tensor zero, std::int64_t low, std::int64_t high,
    Tensor errors, Tensor codes, std::int64_t level) {
    Compensation given{};
    given.exact = static_cast<const float*>(exact.const_data_ptr());
    given.wanted = static_cast<const float*>(wanted.const_data_ptr());
    given.within = static_cast<const float*>(within.const_data_ptr());
    given.step = static_cast<const float*>(step.const_data_ptr());
    given.zero = static_cast<const float*>(zero.const_data_ptr());
    given.columns = exact.size(0);
    given.rows = exact.size(1);
    given.low = static_cast<float>(low);
    given.high = static_cast<float>(high);
    given.errors = static_cast<float*>(errors.mutable_data_ptr());
    given.codes = static_cast<float*>(codes.mutable_data_ptr());
    const Compensate compensate = chosen(weight_levels(), level).compensate;
    torch::stable::parallel_for(0, given.rows, COMPENSATED_ROWS, [&](std::int64_t first, std::int64_t last) {
        compensate(given, first, last);
    });
}

ActivationRounding rounding_of(const Tensor& x, const OptionalTensor& amax) {
    ActivationRounding given{};
    given.x = x.const_data_ptr();
    given.type = float_type(x);
    given.rows = x.size(0);
    given.inputs = x.size(1);
    given.row_stride = x.stride(0);
    given.amax = pointer<float>(amax);
    return given;
}

// Codes and scales of the rows of `x`, which `quantize` fills: [first, last) of what it is given.
template <class Quantize>
std::tuple<Tensor, Tensor> codes_of(const Tensor& x, const OptionalTensor& amax, Quantize quantize) {
    Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Char);
    Tensor scale = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
    ActivationRounding given = rounding_of(x, amax);
    given.codes = static_cast<std::int8_t*>(codes.mutable_data_ptr());
    given.scale = static_cast<float*>(scale.mutable_data_ptr());
    const std::int64_t rows_per_task = std::max<std::int64_t>(1, ACTIVATIONS_PER_TASK / given.inputs);
    torch::stable::parallel_for(0, given.rows, rows_per_task, [&](std::int64_t first, std::int64_t last) {
        quantize(given, first, last);
    });
    return {codes, scale};
}

std::tuple<Tensor, Tensor> quantize_activation(Tensor x, OptionalTensor amax, std::int64_t level) {
    return codes_of(x, amax, chosen(product_levels(), level).round_activations);
}

std::tuple<Tensor, Tensor> gelu_quantize(Tensor x, OptionalTensor amax, std::int64_t level) {
    return codes_of(x, amax, chosen(product_levels(), level).quantize_gelu);
}

std::tuple<Tensor, Tensor> norm_quantize(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor gain, OptionalTensor shift,
    OptionalTensor amax, std::int64_t tokens, double eps, std::int64_t level) {
    const QuantizeNormed quantize = chosen(product_levels(), level).quantize_normed;
    return codes_of(x, amax, [&](const ActivationRounding& rounding, std::int64_t first, std::int64_t last) {
        const NormQuantize given{
            rounding, static_cast<float>(eps), tokens, pointer<float>(weight), pointer<float>(bias),
            pointer<float>(gain), pointer<float>(shift)};
        quantize(given, first, last);
    });
}

struct Release {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// Sets the size of the tasks of `given`: at most MOST_TASK_ROWS rows, some tasks for each thread; and wide ones where all
// activations of a task would be fetched from behind the second cache again for every TASK_OUTPUTS outputs.
void set_task(const Int8ProductLevel& product, Int8Product& given) {
    const std::int64_t tiles = divided_up(given.rows, product.tile_rows), threads = torch::stable::get_num_threads();
    const auto set = [&](std::int64_t outputs) {
        const std::int64_t columns = divided_up(given.outputs, outputs);
        const std::int64_t wanted = divided_up(TASKS_PER_THREAD * threads, columns);
        const std::int64_t fewest = divided_up(given.rows, MOST_TASK_ROWS);
        const std::int64_t most = std::max<std::int64_t>(1, given.rows / product.fewest_rows);
        const std::int64_t stretches = std::max(fewest, std::min(wanted, most));
        given.task_rows = divided_up(tiles, stretches) * product.tile_rows;
        given.task_outputs = outputs;
        // Outputs of the thread that has the most.
        return divided_up(columns * divided_up(given.rows, given.task_rows), threads) * given.task_rows * outputs;
    };
    const std::int64_t narrow = set(TASK_OUTPUTS);
    if (product.arranged_bytes(given) / divided_up(given.rows, given.task_rows) <= KEPT_ACTIVATIONS) return;
    std::int64_t outputs = WIDEST_TASK;
    while (set(outputs) > narrow + narrow / 16) outputs -= TASK_OUTPUTS;
}

// `lay_out` fills the tiles [first, last) of the activations as the product reads them.
template <class LayOut>
void multiply(const Int8ProductLevel& product, Int8Product given, std::int64_t fewest_tiles, LayOut lay_out) {
    set_task(product, given);
    const std::int64_t tiles = divided_up(given.rows, product.tile_rows);
    const std::unique_ptr<void, Release> arranged(
        ::operator new(product.arranged_bytes(given), std::align_val_t{64}));
    torch::stable::parallel_for(0, tiles, fewest_tiles, [&](std::int64_t first, std::int64_t last) {
        lay_out(given, arranged.get(), first, last);
    });
    const std::int64_t tasks =
        divided_up(given.outputs, given.task_outputs) * divided_up(given.rows, given.task_rows);
    torch::stable::parallel_for(0, tasks, 1, [&](std::int64_t first, std::int64_t last) {
        product.multiply(given, arranged.get(), first, last);
    });
}

// The values of a bias in fp32; none of nothing.
std::vector<float> in_fp32(const OptionalTensor& bias, const ProductLevel& product) {
    if (!bias) return {};
    std::vector<float> values(bias->numel() + MOST_LANES);
    product.load_row(float_type(*bias), bias->const_data_ptr(), bias->numel(), values.data());
    return values;
}

template <class Product>
void set_weight(
    Product& given, const Tensor& qweight, const Tensor& scale, const OptionalTensor& group_code, std::int64_t group,
    bool promoted) {
    given.weight = static_cast<const std::uint8_t*>(qweight.const_data_ptr());
    given.weight_row_bytes = qweight.size(1);
    given.outputs = qweight.size(0);
    given.group = group;
    given.group_code = pointer<std::uint8_t>(group_code);
    given.scale = static_cast<const float*>(scale.const_data_ptr());
    given.promoted = promoted;
}

// All rows of `given`, ROWS_AT_ONCE at a time; `lay_out` as multiply takes it, and the first of the rows.
template <class LayOut>
Tensor multiply_all(
    const ProductLevel& product, Int8Product given, const OptionalTensor& bias, Tensor out, std::int64_t fewest_tiles,
    LayOut lay_out) {
    const std::vector<float> bias_values = in_fp32(bias, product);
    given.bias = bias ? bias_values.data() : nullptr;
    given.out_type = output_type(out);
    const std::int64_t out_row_bytes = given.outputs * static_cast<std::int64_t>(out.element_size());
    for (std::int64_t first_row = 0; first_row < out.size(0); first_row += ROWS_AT_ONCE) {
        Int8Product part = given;
        part.rows = std::min(ROWS_AT_ONCE, out.size(0) - first_row);
        part.sx += first_row;
        part.first_row = first_row;
        if (given.residual != nullptr) {
            const std::int64_t row_bytes = given.residual_stride * static_cast<std::int64_t>(out.element_size());
            part.residual = static_cast<const std::uint8_t*>(given.residual) + first_row * row_bytes;
        }
        part.out = static_cast<std::uint8_t*>(out.mutable_data_ptr()) + first_row * out_row_bytes;
        multiply(
            *product.int8_product, part, fewest_tiles,
            [&](const Int8Product& rows, void* arranged, std::int64_t first, std::int64_t last) {
                lay_out(first_row, rows, arranged, first, last);
            });
    }
    return out;
}

constexpr ScalarType OUTPUT_SCALARS[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Int};

Tensor linear_a8(
    Tensor qx, Tensor sx, Tensor qweight, Tensor scale, OptionalTensor group_code, OptionalTensor bias,
    std::int64_t group, bool promoted, std::int64_t out_type, OptionalTensor residual, OptionalTensor gate,
    std::int64_t level) {
    const ProductLevel& product = chosen(product_levels(), level);
    Int8Product given{};
    given.sx = static_cast<const float*>(sx.const_data_ptr());
    given.inputs = qx.size(1);
    set_weight(given, qweight, scale, group_code, group, promoted);
    if (residual) {
        given.residual = residual->const_data_ptr();
        given.residual_stride = residual->stride(0);
        given.gate = gate->const_data_ptr();
        given.gate_stride = gate->stride(0);
        given.rows_per_gate = residual->size(0) / gate->size(0);
    }
    const auto* codes = static_cast<const std::int8_t*>(qx.const_data_ptr());
    return multiply_all(
        product, given, bias, torch::stable::new_empty(qx, {qx.size(0), given.outputs}, OUTPUT_SCALARS[out_type]),
        divided_up(LAID_OUT_ROWS, product.int8_product->tile_rows),
        [&](std::int64_t first_row, Int8Product rows, void* arranged, std::int64_t first, std::int64_t last) {
            rows.x = codes + first_row * rows.inputs;
            product.int8_product->arrange(rows, arranged, first, last);
        });
}

// Rows are rounded a tile at a time, into the layout that the product reads.
Tensor quantized_linear(
    Tensor x, OptionalTensor amax, Tensor qweight, Tensor scale, OptionalTensor group_code, OptionalTensor bias,
    std::int64_t group, bool promoted, std::int64_t level) {
    const ProductLevel& product = chosen(product_levels(), level);
    const ActivationRounding all = rounding_of(x, amax);
    const std::unique_ptr<float[]> factors(new float[all.rows]);
    Int8Product given{};
    given.sx = factors.get();
    given.inputs = all.inputs;
    set_weight(given, qweight, scale, group_code, group, promoted);
    const std::int64_t tile_rows = product.int8_product->tile_rows;
    given.rows = tile_rows;
    const auto tile_bytes = static_cast<std::int64_t>(product.int8_product->arranged_bytes(given));
    const std::int64_t row_bytes = all.row_stride * static_cast<std::int64_t>(x.element_size());
    return multiply_all(
        product, given, bias, torch::stable::new_empty(x, {all.rows, given.outputs}), divided_up(ROUNDED_ROWS, tile_rows),
        [&](std::int64_t first_row, const Int8Product& rows, void* arranged, std::int64_t first, std::int64_t last) {
            const std::int64_t at_once = divided_up(ROUNDED_ROWS, tile_rows);
            const std::unique_ptr<std::int8_t[]> codes(new std::int8_t[at_once * tile_rows * all.inputs]);
            ActivationRounding rounded = all;
            rounded.codes = codes.get();
            for (std::int64_t tile = first; tile < last; tile += at_once) {
                const std::int64_t tiles = std::min(at_once, last - tile), row = tile * tile_rows;
                Int8Product part = rows;
                part.rows = std::min(tiles * tile_rows, rows.rows - row);
                part.x = codes.get();
                rounded.x = static_cast<const std::uint8_t*>(all.x) + (first_row + row) * row_bytes;
                rounded.scale = factors.get() + first_row + row;
                product.round_activations(rounded, 0, part.rows);
                auto* to = static_cast<std::uint8_t*>(arranged) + tile * tile_bytes;
                product.int8_product->arrange(part, to, 0, tiles);
            }
        });
}

// The product in fp32; with false, and nothing computed, if a value is above `largest` or not finite.
std::tuple<Tensor, bool> few_rows(
    Tensor x, Tensor qweight, Tensor scale, OptionalTensor group_code, OptionalTensor bias, std::int64_t group,
    bool promoted, double largest, std::int64_t level) {
    const ProductLevel& product = chosen(product_levels(), level);
    FewRowsProduct given{};
    given.rows = x.size(0);
    given.inputs = x.size(1);
    given.x_stride = divided_up(given.inputs, FEW_ROWS_PADDING) * FEW_ROWS_PADDING;
    set_weight(given, qweight, scale, group_code, group, promoted);
    Tensor out = torch::stable::new_empty(x, {given.rows, given.outputs}, ScalarType::Float);

    std::vector<float> padded(given.rows * given.x_stride);
    const auto* from = static_cast<const std::uint8_t*>(x.const_data_ptr());
    const std::int64_t row_bytes = x.stride(0) * static_cast<std::int64_t>(x.element_size());
    std::int32_t most = 0;
    for (std::int64_t row = 0; row < given.rows; ++row) {
        float* to = padded.data() + row * given.x_stride;
        most = std::max(most, product.load_row(float_type(x), from + row * row_bytes, given.inputs, to));
    }
    float magnitude;
    std::memcpy(&magnitude, &most, sizeof magnitude);
    if (!(magnitude <= largest)) return {out, false};

    const std::vector<float> bias_values = in_fp32(bias, product);
    given.bias = bias ? bias_values.data() : nullptr;
    given.x = padded.data();
    given.out = static_cast<float*>(out.mutable_data_ptr());
    const std::int64_t outputs_per_task = std::max<std::int64_t>(1, WEIGHTS_PER_TASK / given.x_stride);
    torch::stable::parallel_for(0, given.outputs, outputs_per_task, [&](std::int64_t first, std::int64_t last) {
        product.multiply_few_rows(given, first, last);
    });
    return {out, true};
}

STABLE_TORCH_LIBRARY(ditq_cpu, library) {
    library.def(
        "quantize_weight(Tensor weight, int group, Tensor rules, Tensor ratios, Tensor? limits, Tensor(a!) codes, "
        "Tensor(b!) scale, Tensor(c!)? multiplier, Tensor(d!)? zero_point, Tensor(e!) doubtful, Tensor(f!) broken, "
        "int level) -> ()");
    library.def(
        "compensate(Tensor exact, Tensor wanted, Tensor within, Tensor step, Tensor zero, int low, int high, "
        "Tensor(a!) errors, Tensor(b!) codes, int level) -> ()");
    const std::string weight = "Tensor qweight, Tensor scale, Tensor? group_code, Tensor? bias, int group, bool promoted";
    library.def("quantize_activation(Tensor x, Tensor? amax, int level) -> (Tensor, Tensor)");
    library.def("gelu_quantize(Tensor x, Tensor? amax, int level) -> (Tensor, Tensor)");
    library.def(
        "norm_quantize(Tensor x, Tensor? weight, Tensor? bias, Tensor? gain, Tensor? shift, Tensor? amax, int tokens, "
        "float eps, int level) -> (Tensor, Tensor)");
    library.def(
        ("linear_a8(Tensor qx, Tensor sx, " + weight +
         ", int out_type, Tensor? residual, Tensor? gate, int level) -> Tensor").c_str());
    library.def(("quantized_linear(Tensor x, Tensor? amax, " + weight + ", int level) -> Tensor").c_str());
    library.def(("few_rows(Tensor x, " + weight + ", float largest, int level) -> (Tensor, bool)").c_str());
    library.def("weight_level_count() -> int");
    library.def("product_level_count() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ditq_cpu, CPU, library) {
    library.impl("quantize_weight", TORCH_BOX(&quantize_weight));
    library.impl("compensate", TORCH_BOX(&compensate));
    library.impl("quantize_activation", TORCH_BOX(&quantize_activation));
    library.impl("gelu_quantize", TORCH_BOX(&gelu_quantize));
    library.impl("norm_quantize", TORCH_BOX(&norm_quantize));
    library.impl("linear_a8", TORCH_BOX(&linear_a8));
    library.impl("quantized_linear", TORCH_BOX(&quantized_linear));
    library.impl("few_rows", TORCH_BOX(&few_rows));
}

// How many levels run on this CPU: each of the first so many.
std::int64_t weight_level_count() { return running(weight_levels()); }
std::int64_t product_level_count() { return running(product_levels()); }

STABLE_TORCH_LIBRARY_IMPL(ditq_cpu, CompositeExplicitAutograd, library) {
    library.impl("weight_level_count", TORCH_BOX(&weight_level_count));
    library.impl("product_level_count", TORCH_BOX(&product_level_count));
}

}  // namespace
}  // namespace ditq
