// Compiled once for each level of instructions (DITQ_LEVEL, a namespace, and DITQ_LANES, the floats in a register), with
// -ffp-contract=off.
#include "passes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "activation_row.h"
#include "lanes.h"

namespace ditq {
namespace DITQ_LEVEL {
namespace {

Lanes& at(float* values) { return *reinterpret_cast<Lanes*>(values); }
const Lanes& at(const float* values) { return *reinterpret_cast<const Lanes*>(values); }
IntLanes bits_of(Lanes values) { return reinterpret_cast<const IntLanes&>(values); }

// A buffer of a row, which is computed in whole registers: behind the last value are others, which nothing reads.
std::vector<float> row_of(std::int64_t inputs) { return std::vector<float>(inputs + MOST_LANES); }

// Bits of the largest magnitude, those of an infinity or above if a value is not finite.
class Most {
public:
    void see(Lanes values) {
        const IntLanes magnitude = bits_of(values) & 0x7fffffff;
        most_ = magnitude > most_ ? magnitude : most_;
    }
    void see(float value) {
        std::int32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        rest_ = std::max(rest_, bits & 0x7fffffff);
    }
    std::int32_t bits() const {
        std::int32_t found = rest_;
        for (int i = 0; i < LANES; ++i) found = std::max<std::int32_t>(found, most_[i]);
        return found;
    }

private:
    IntLanes most_ = {};
    std::int32_t rest_ = 0;
};

// The sum of what `term` makes of the values: in fp32 within a stretch, in fp64 over stretches.
template <class Term>
double sum(const float* values, std::int64_t inputs, Term term) {
    constexpr std::int64_t STRETCH = 8 * LANES;
    double total = 0;
    std::int64_t k = 0;
    while (k + LANES <= inputs) {
        const std::int64_t end = std::min(inputs - LANES, k + STRETCH - LANES);
        Lanes lanes = {};
        for (; k <= end; k += LANES) lanes += term(at(values + k));
        for (int i = 0; i < LANES; ++i) total += lanes[i];
    }
    if (k < inputs) {
        const Lanes rest = term(at(values + k));
        for (int i = 0; k + i < inputs; ++i) total += rest[i];
    }
    return total;
}

// `put` of every register of a row, in place; what stands behind the last value is not counted.
template <class Put>
std::int32_t transform(float* values, std::int64_t inputs, Put put) {
    Most most;
    std::int64_t k = 0;
    for (; k + LANES <= inputs; k += LANES) most.see(at(values + k) = put(k, at(values + k)));
    if (k < inputs) {
        at(values + k) = put(k, at(values + k));
        for (; k < inputs; ++k) most.see(values[k]);
    }
    return most.bits();
}

// 2^n, n whole and of -126 to 127.
Lanes power_of_two(Lanes n) {
    const Lanes shifted = n + 12582912.0f;  // n in the lowest bits
    const IntLanes bits = (bits_of(shifted) << 23) + (127 << 23);
    return reinterpret_cast<const Lanes&>(bits);
}

// exp of -87 to 87, to about one unit in the last place: 2^n * exp(r), |r| <= ln(2) / 2, of which a polynomial of degree
// six, Taylor's.
Lanes exponential(Lanes x) {
    constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    const Lanes n = (x * LOG2_E + 12582912.0f) - 12582912.0f;
    const Lanes r = (x - n * LN2_HIGH) - n * LN2_LOW;
    Lanes p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    return (p * (r * r) + r + 1.0f) * power_of_two(n);
}

// x * (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
Lanes gelu(Lanes x) {
    constexpr float FARTHEST = 87.0f, TWO_ROOTS = 1.59576912f;
    const Lanes exponent = (x * x * 0.044715f + 1.0f) * x * -TWO_ROOTS;
    const Lanes low = exponent < -FARTHEST ? Lanes{} - FARTHEST : exponent;  // NaN stays
    return x / (exponential(low > FARTHEST ? Lanes{} + FARTHEST : low) + 1.0f);
}

const void* row(const ActivationRounding& given, std::int64_t m) {
    const std::int64_t bytes = given.type == FloatType::float32 ? 4 : 2;
    return static_cast<const std::uint8_t*>(given.x) + m * given.row_stride * bytes;
}

void put_row(const ActivationRounding& given, std::int64_t m, const float* values, std::int32_t most) {
    round_row(values, most, given.amax, given.inputs, given.codes + m * given.inputs, given.scale + m);
}

}  // namespace

void quantize_normed(const NormQuantize& given, std::int64_t first, std::int64_t last) {
    const ActivationRounding& rounding = given.rounding;
    const std::int64_t inputs = rounding.inputs;
    std::vector<float> values = row_of(inputs);
    for (std::int64_t m = first; m < last; ++m) {
        load_row(rounding.type, row(rounding, m), inputs, values.data());
        const auto mean = static_cast<float>(sum(values.data(), inputs, [](Lanes x) { return x; }) / inputs);
        const auto squared = [mean](Lanes x) { return (x - mean) * (x - mean); };
        const auto variance = static_cast<float>(sum(values.data(), inputs, squared) / inputs);
        const float factor = 1.0f / std::sqrt(variance + given.eps);
        const std::int64_t sample = m / given.tokens * inputs;
        const std::int32_t most = transform(values.data(), inputs, [&](std::int64_t k, Lanes x) {
            Lanes y = (x - mean) * factor;
            if (given.weight != nullptr) y = y * at(given.weight + k);
            if (given.bias != nullptr) y = y + at(given.bias + k);
            if (given.gain != nullptr) y = y * at(given.gain + sample + k);
            if (given.shift != nullptr) y = y + at(given.shift + sample + k);
            return y;
        });
        put_row(rounding, m, values.data(), most);
    }
}

void quantize_gelu(const ActivationRounding& given, std::int64_t first, std::int64_t last) {
    std::vector<float> values = row_of(given.inputs);
    for (std::int64_t m = first; m < last; ++m) {
        load_row(given.type, row(given, m), given.inputs, values.data());
        const std::int32_t most =
            transform(values.data(), given.inputs, [](std::int64_t, Lanes x) { return gelu(x); });
        put_row(given, m, values.data(), most);
    }
}

}  // namespace DITQ_LEVEL
}  // namespace ditq
