// Compiled once for each level of instructions (DITQ_LEVEL, a namespace, and DITQ_LANES, the floats in a register), with
// -ffp-contract=off.
#include "compensate.h"

#include <cstring>
#include <vector>

namespace ditq {
namespace DITQ_LEVEL {
namespace {

constexpr int LANES = DITQ_LANES;
constexpr int STRIP = 4;  // registers of rows at once: what one waits for, the others have time to compute

// Adding it and taking it away again rounds to the nearest integer, ties to even, below 2^22 in magnitude; what is
// larger lies outside of all codes, before and after.
constexpr float TO_INTEGER = 12582912.0f;

struct Register {
    typedef float Type __attribute__((vector_size(4 * LANES)));
};
struct Single {
    using Type = float;
};

template <class Kind>
typename Kind::Type load(const float* from) {
    typename Kind::Type values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
template <class Kind>
void store(float* to, typename Kind::Type values) { std::memcpy(to, &values, sizeof values); }

// COUNT registers of rows from `first` on; `made`, a row of them a column, keeps their errors close together.
template <class Kind, int COUNT>
void round_rows(const Compensation& given, std::int64_t first, float* made) {
    using Values = typename Kind::Type;
    constexpr std::int64_t WIDTH = sizeof(Values) / sizeof(float);
    const Values low = Values{} + given.low, high = Values{} + given.high, to_integer = Values{} + TO_INTEGER;
    for (std::int64_t k = 0; k < given.columns; ++k) {
        const std::int64_t here = k * given.rows + first;
        const float* taken = given.within + k * given.columns;
        Values target[COUNT];
        for (int i = 0; i < COUNT; ++i) target[i] = load<Kind>(given.wanted + here + i * WIDTH);
        const float* earlier = made;
        for (std::int64_t j = 0; j < k; ++j, earlier += COUNT * WIDTH) {
            for (int i = 0; i < COUNT; ++i) target[i] += load<Kind>(earlier + i * WIDTH) * taken[j];
        }
        for (int i = 0; i < COUNT; ++i) {
            const std::int64_t place = here + i * WIDTH;
            const Values step = load<Kind>(given.step + place), zero = load<Kind>(given.zero + place);
            Values code = (target[i] / step + to_integer) - to_integer + zero;
            code = code > low ? code : low;
            code = code < high ? code : high;
            const Values error = load<Kind>(given.exact + place) - (code - zero) * step;
            store<Kind>(given.codes + place, code);
            store<Kind>(given.errors + place, error);
            store<Kind>(made + (k * COUNT + i) * WIDTH, error);
        }
    }
}

}  // namespace

void compensate(const Compensation& given, std::int64_t first, std::int64_t last) {
    std::vector<float> made(given.columns * STRIP * LANES);
    for (; first + STRIP * LANES <= last; first += STRIP * LANES) round_rows<Register, STRIP>(given, first, made.data());
    for (; first < last; ++first) round_rows<Single, 1>(given, first, made.data());
}

}  // namespace DITQ_LEVEL
}  // namespace ditq
