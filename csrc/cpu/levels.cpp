#include "levels.h"

#ifdef DITQ_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ditq {

#define DITQ_WEIGHTS(LEVEL)                                                 \
    namespace LEVEL {                                                       \
    void round_weights(const WeightRounding&, std::int64_t, std::int64_t);  \
    void compensate(const Compensation&, std::int64_t, std::int64_t);       \
    }
#define DITQ_PRODUCTS(LEVEL)                                                            \
    namespace LEVEL {                                                                   \
    std::int32_t load_row(FloatType, const void*, std::int64_t, float*);                \
    void round_activations(const ActivationRounding&, std::int64_t, std::int64_t);      \
    void quantize_normed(const NormQuantize&, std::int64_t, std::int64_t);              \
    void quantize_gelu(const ActivationRounding&, std::int64_t, std::int64_t);          \
    extern const Int8ProductLevel int8_product;                                         \
    void multiply_few_rows(const FewRowsProduct&, std::int64_t, std::int64_t);          \
    }
DITQ_WEIGHTS(baseline)
#ifdef DITQ_X86
DITQ_WEIGHTS(avx2)
DITQ_WEIGHTS(avx512)
DITQ_PRODUCTS(avx2)
DITQ_PRODUCTS(avx512_vnni)
DITQ_PRODUCTS(amx)

namespace {

struct Cpu {
    bool avx2 = false, avx512 = false, avx512_vnni = false, amx = false;
};

// Linux lends the tiles' registers to a process that asks for them.
bool has_amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = d >> 24 & 1, int8 = d >> 25 & 1;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return tiles && int8 && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

Cpu this_cpu() {
    __builtin_cpu_init();
    Cpu cpu;
    cpu.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2");
    cpu.avx512 = cpu.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
    cpu.avx512_vnni = cpu.avx512 && __builtin_cpu_supports("avx512vnni");
    cpu.amx = cpu.avx512_vnni && has_amx();
    return cpu;
}

}  // namespace
#endif

const std::vector<WeightLevel>& weight_levels() {
    static const std::vector<WeightLevel> all = [] {
        std::vector<WeightLevel> found{{baseline::round_weights, baseline::compensate, true}};
#ifdef DITQ_X86
        const Cpu cpu = this_cpu();
        found.push_back({avx2::round_weights, avx2::compensate, cpu.avx2});
        found.push_back({avx512::round_weights, avx512::compensate, cpu.avx512});
#endif
        return found;
    }();
    return all;
}

#define DITQ_PRODUCT_LEVEL(LEVEL, RUNS) \
    {LEVEL::load_row,       LEVEL::round_activations, LEVEL::quantize_normed,   \
     LEVEL::quantize_gelu,  &LEVEL::int8_product,     LEVEL::multiply_few_rows, RUNS}

const std::vector<ProductLevel>& product_levels() {
    static const std::vector<ProductLevel> all = [] {
        std::vector<ProductLevel> found;
#ifdef DITQ_X86
        const Cpu cpu = this_cpu();
        found.push_back(ProductLevel DITQ_PRODUCT_LEVEL(avx2, cpu.avx2));
        found.push_back(ProductLevel DITQ_PRODUCT_LEVEL(avx512_vnni, cpu.avx512_vnni));
        found.push_back(ProductLevel DITQ_PRODUCT_LEVEL(amx, cpu.amx));
#endif
        return found;
    }();
    return all;
}

}  // namespace ditq
