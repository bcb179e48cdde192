// Compiled once for each level of instructions (DITQ_LEVEL, a namespace, and DITQ_LANES, the floats in a register), with
// -ffp-contract=off: each operation is rounded by itself, as PyTorch's are.
#include "quantize_weight.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"

namespace ditq {
namespace DITQ_LEVEL {
namespace {

constexpr int BLOCK = 128;  // elements whose squares are summed in fp32; blocks are summed in fp64

// Adding it and taking it away again rounds to the nearest integer, ties to even, below 2^22 in magnitude.
constexpr float TO_INTEGER = 12582912.0f;
// Sums of at most a few thousand squares differ by less than this share between any two orders that are in use.
constexpr double CLOSEST = 1e-5;
// From here on a sum in fp32 may be infinite.
constexpr double OVERFLOWS = std::numeric_limits<float>::max() * (1 - CLOSEST);

// Of sums of `count` squares: PyTorch adds in eight lanes or more, and lanes at last, so that no square is rounded more
// often than this; nor is one here. Each sum may be as far off.
double close(std::int64_t count) { return std::min(CLOSEST, 2 * (count / 8 + 16) * 0x1p-24); }

Lanes all(float value) { return Lanes{} + value; }
Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }

// The lanes in one: halves, and halves of these.
template <int COUNT, class Operation>
float folded(const float* values, Operation combine) {
    if constexpr (COUNT == 1) {
        return values[0];
    } else {
        constexpr int HALF = COUNT / 2;
        float halves[HALF];
        for (int i = 0; i < HALF; ++i) halves[i] = combine(values[i], values[i + HALF]);
        return folded<HALF>(halves, combine);
    }
}
float sum(const Lanes& values) {
    return folded<LANES>(reinterpret_cast<const float*>(&values), [](float a, float b) { return a + b; });
}
float largest(const Lanes& values) {
    return folded<LANES>(reinterpret_cast<const float*>(&values), [](float a, float b) { return a > b ? a : b; });
}

const Lanes& at(const float* values) { return *reinterpret_cast<const Lanes*>(values); }
// One instruction, where std::fmax and std::fmin look after NaN, of which there is none here.
float most(float a, float b) { return a > b ? a : b; }
float least(float a, float b) { return a < b ? a : b; }
float positive(float step) { return step > 0 ? step : 1.0f; }

// The values step * (code - zero) with codes of low .. high.
struct Grid {
    float step;
    float zero;
};

struct Range {
    float above;
    float below;
};

Grid fit(RangeRule rule, Range range, float high) {
    const auto [above, below] = range;
    const float half = std::floor(high / 2);
    switch (rule) {
        case RangeRule::symmetric: return {most(above, below) / half, half + 1};
        case RangeRule::eighth_level: {
            const float fewer = half, more = half + 1;
            if (below >= above) return {most(below / more, above / fewer), more};
            return {most(above / more, below / fewer), fewer};
        }
        case RangeRule::free_zero_point: {
            const float step = (above + below) / high;
            const float zero = least(most(std::nearbyint(below / positive(step)), 0.0f), high);
            return {most(above / most(high - zero, 1.0f), below / most(zero, 1.0f)), zero};
        }
        default: return {most(above, below) / high, 0.0f};
    }
}

// The multiple of `step` that is nearest, of `lowest` to `highest`, which are whole.
Lanes nearest(Lanes w, Lanes step, Lanes lowest, Lanes highest) {
    const Lanes whole = (w / step + all(TO_INTEGER)) - all(TO_INTEGER);
    return smaller(larger(whole, lowest), highest);
}

class Row {
public:
    Row(const WeightRounding& given, std::int64_t padded)
        : given_(given), low_(given.two_level ? 0.0f : -127.0f), high_(given.two_level ? 15.0f : 127.0f),
          values_(padded), codes_(padded), grids_(padded / given_padded_group()),
          candidates_(given.rule_count * given.ratio_count) {}

    void round(std::int64_t n) {
        load(n);
        const std::int64_t group = given_padded_group();
        close_ = false;
        bool finite = true;
        for (std::size_t g = 0; g < grids_.size(); ++g) finite &= fit_group(g, values_.data() + g * group, group);
        given_.broken[n] = !finite;
        given_.doubtful[n] = false;
        if (!finite) return;
        if (given_.two_level) {
            store_two_levels(n, group);
        } else {
            for (std::size_t g = 0; g < grids_.size(); ++g) given_.scale[g * given_.rows + n] = grids_[g].step;
        }
        for (std::size_t g = 0; g < grids_.size(); ++g) round_group(g, group);
        std::memcpy(given_.codes + n * given_.inputs, codes_.data(), given_.inputs);
        given_.doubtful[n] = close_;
    }

private:
    // Whole lanes; a group that is all of the row may be no multiple of them.
    std::int64_t given_padded_group() const { return (given_.group + LANES - 1) / LANES * LANES; }

    void load(std::int64_t n) {
        const std::int64_t first = n * given_.row_stride;
        if (given_.weight_type == FloatType::float32) {
            std::memcpy(values_.data(), static_cast<const float*>(given_.weight) + first, 4 * given_.inputs);
            return;
        }
        const std::uint16_t* from = static_cast<const std::uint16_t*>(given_.weight) + first;
        std::uint32_t* to = reinterpret_cast<std::uint32_t*>(values_.data());
        for (std::int64_t k = 0; k < given_.inputs; ++k) to[k] = static_cast<std::uint32_t>(from[k]) << 16;
    }

    bool fit_group(std::size_t g, const float* w, std::int64_t group) {
        Lanes high = {}, low = {}, poison = {};
        for (std::int64_t k = 0; k < group; k += LANES) {
            high = larger(at(w + k), high);
            low = smaller(at(w + k), low);
            poison += at(w + k) * all(0.0f);  // NaN of what is not finite
        }
        if (!(sum(poison) == 0.0f)) return false;
        grids_[g] = best(w, group, {largest(high), largest(all(0.0f) - low)});
        return true;
    }

    Grid best(const float* w, std::int64_t group, Range range) {
        int count = 0;
        for (int i = 0; i < given_.ratio_count; ++i) {
            const Range shrunk{range.above * given_.ratios[i], range.below * given_.ratios[i]};
            for (int j = 0; j < given_.rule_count; ++j) candidates_[count++] = fit(given_.rules[j], shrunk, high_);
        }
        if (count == 1) return candidates_[0];
        Grid chosen = candidates_[0];
        double least = 0;
        for (int i = 0; i < count; i += 2) {
            const Grid pair[2] = {candidates_[i], candidates_[i + 1 < count ? i + 1 : i]};
            double errors[2];
            squared_errors(w, group, pair, errors);
            if (i == 0) least = errors[0];
            for (int one = 0; one < 2; ++one) {
                const Grid& grid = pair[one];
                if ((grid.step != chosen.step || grid.zero != chosen.zero) && prefers(errors[one], least)) {
                    chosen = grid;
                    least = errors[one];
                }
            }
        }
        return chosen;
    }

    bool prefers(double error, double before) {
        const double larger_one = std::max(error, before);
        close_ |= std::fabs(error - before) <= close(given_.group) * larger_one && larger_one > 0;
        close_ |= !(larger_one < OVERFLOWS);
        return error < before;
    }

    // Of two grids at once: what one waits for, the other has time to compute.
    void squared_errors(const float* w, std::int64_t group, const Grid (&grids)[2], double (&totals)[2]) const {
        const Lanes step[2] = {all(positive(grids[0].step)), all(positive(grids[1].step))};
        const Lanes lowest[2] = {all(low_ - grids[0].zero), all(low_ - grids[1].zero)};
        const Lanes highest[2] = {all(high_ - grids[0].zero), all(high_ - grids[1].zero)};
        totals[0] = totals[1] = 0;
        for (std::int64_t start = 0; start < group; start += BLOCK) {
            const std::int64_t end = std::min(start + BLOCK, group);
            Lanes squares[2] = {};
            for (std::int64_t k = start; k < end; k += LANES) {
                const Lanes here = at(w + k);
                for (int one = 0; one < 2; ++one) {
                    const Lanes error = here - nearest(here, step[one], lowest[one], highest[one]) * step[one];
                    squares[one] += error * error;
                }
            }
            for (int one = 0; one < 2; ++one) totals[one] += sum(squares[one]);
        }
    }

    void store_two_levels(std::int64_t n, std::int64_t group) {
        float scale = 0;
        for (const Grid& grid : grids_) scale = most(scale, grid.step / given_.limits[static_cast<int>(grid.zero)]);
        given_.scale[n] = scale;
        for (std::size_t g = 0; g < grids_.size(); ++g) {
            Grid& grid = grids_[g];
            const float wanted = grid.step / positive(scale);
            const float up = least(most(std::ceil(wanted), 1.0f), given_.limits[static_cast<int>(grid.zero)]);
            const float down = most(std::floor(wanted), 1.0f);
            float multiplier = up;
            if (down != up) {
                const float* w = values_.data() + g * group;
                double errors[2];
                squared_errors(w, group, {{scale * up, grid.zero}, {scale * down, grid.zero}}, errors);
                if (prefers(errors[1], errors[0])) multiplier = down;
            }
            grid.step = scale * multiplier;
            given_.multiplier[g * given_.rows + n] = static_cast<std::uint8_t>(multiplier);
            given_.zero_point[g * given_.rows + n] = static_cast<std::uint8_t>(grid.zero);
        }
    }

    void round_group(std::size_t g, std::int64_t group) {
        const Lanes step = all(positive(grids_[g].step)), zero = all(grids_[g].zero);
        const float* w = values_.data() + g * group;
        std::uint8_t* codes = codes_.data() + g * group;
        std::int32_t whole[BLOCK];
        for (std::int64_t start = 0; start < group; start += BLOCK) {
            const std::int64_t count = std::min<std::int64_t>(BLOCK, group - start);
            for (std::int64_t k = 0; k < count; k += LANES) {
                const Lanes multiple = nearest(at(w + start + k), step, all(low_) - zero, all(high_) - zero);
                *reinterpret_cast<IntLanes*>(whole + k) = __builtin_convertvector(multiple + zero, IntLanes);
            }
            for (std::int64_t k = 0; k < count; ++k) codes[start + k] = static_cast<std::uint8_t>(whole[k]);
        }
    }

    const WeightRounding& given_;
    const float low_;
    const float high_;
    std::vector<float> values_;  // of the row, and zeros up to whole groups: every range holds zero
    std::vector<std::uint8_t> codes_;
    std::vector<Grid> grids_;
    std::vector<Grid> candidates_;  // of one group
    bool close_ = false;
};

}  // namespace

void round_weights(const WeightRounding& given, std::int64_t first, std::int64_t last) {
    const std::int64_t groups = (given.inputs + given.group - 1) / given.group;
    const std::int64_t padded = (given.group + LANES - 1) / LANES * LANES;
    Row row(given, groups * padded);
    for (std::int64_t n = first; n < last; ++n) row.round(n);
}

}  // namespace DITQ_LEVEL
}  // namespace ditq
