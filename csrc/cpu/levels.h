// The levels of instructions that kernels are compiled for, and which of them run on this CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "compensate.h"
#include "few_rows_product.h"
#include "int8_product.h"
#include "passes.h"
#include "quantize_activation.h"
#include "quantize_weight.h"

namespace ditq {

struct WeightLevel {
    RoundWeights round_weights;
    Compensate compensate;
    bool runs_here;
};

struct ProductLevel {
    LoadRow load_row;
    RoundActivations round_activations;
    QuantizeNormed quantize_normed;
    QuantizeGelu quantize_gelu;
    const Int8ProductLevel* int8_product;
    MultiplyFewRows multiply_few_rows;
    bool runs_here;
};

// From the least to the most that a CPU may have; cpu_extension.py has their names.
const std::vector<WeightLevel>& weight_levels();
const std::vector<ProductLevel>& product_levels();

template <class Level>
std::int64_t running(const std::vector<Level>& levels) {
    std::int64_t count = 0;
    for (const Level& level : levels) count += level.runs_here;
    return count;
}

}  // namespace ditq
