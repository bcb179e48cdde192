// The boundary to PyTorch of what runs on CPUs, on its stable ABI.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "quantize_weight.h"

namespace ditq {

#define DITQ_DECLARE(LEVEL) \
    namespace LEVEL { void round_weights(const WeightRounding&, std::int64_t, std::int64_t); }
DITQ_DECLARE(baseline)
#ifdef DITQ_X86
DITQ_DECLARE(avx2)
DITQ_DECLARE(avx512)
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr std::int64_t WEIGHTS_PER_TASK = 1 << 16;

struct Level {
    RoundWeights round_weights;
    bool runs_here;
};

// From the least to the most that a CPU may have; cpu_extension.LEVELS has their names.
const std::vector<Level>& levels() {
    static const std::vector<Level> all = [] {
        std::vector<Level> found{{baseline::round_weights, true}};
#ifdef DITQ_X86
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
        found.push_back({avx2::round_weights, avx2});
        found.push_back({avx512::round_weights, avx512});
#endif
        return found;
    }();
    return all;
}

// How many levels run on this CPU: each of the first so many.
std::int64_t level_count() {
    std::int64_t count = 0;
    for (const Level& level : levels()) count += level.runs_here;
    return count;
}

template <class T>
T* pointer(const OptionalTensor& tensor) {
    return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// Only cpu_extension.py calls it, which makes the tensors.
void quantize_weight(
    Tensor weight, std::int64_t group, Tensor rules, Tensor ratios, OptionalTensor limits, Tensor codes, Tensor scale,
    OptionalTensor multiplier, OptionalTensor zero_point, Tensor doubtful, Tensor broken, std::int64_t level) {
    WeightRounding given{};
    given.weight = weight.const_data_ptr();
    given.weight_type = weight.scalar_type() == ScalarType::BFloat16 ? WeightType::bfloat16 : WeightType::float32;
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
    const RoundWeights round = levels().at(level < 0 ? level_count() - 1 : level).round_weights;
    const std::int64_t rows_per_task = std::max<std::int64_t>(1, WEIGHTS_PER_TASK / std::max<std::int64_t>(1, given.inputs));
    torch::stable::parallel_for(0, given.rows, rows_per_task, [&](std::int64_t first, std::int64_t last) {
        round(given, first, last);
    });
}

STABLE_TORCH_LIBRARY(ditq_cpu, library) {
    library.def(
        "quantize_weight(Tensor weight, int group, Tensor rules, Tensor ratios, Tensor? limits, Tensor(a!) codes, "
        "Tensor(b!) scale, Tensor(c!)? multiplier, Tensor(d!)? zero_point, Tensor(e!) doubtful, Tensor(f!) broken, "
        "int level) -> ()");
    library.def("level_count() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ditq_cpu, CPU, library) { library.impl("quantize_weight", TORCH_BOX(&quantize_weight)); }

STABLE_TORCH_LIBRARY_IMPL(ditq_cpu, CompositeExplicitAutograd, library) {
    library.impl("level_count", TORCH_BOX(&level_count));
}

}  // namespace
}  // namespace ditq
