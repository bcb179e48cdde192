// AVX-512 VNNI, carried out one instruction at a time.
#pragma once

#include <cstdint>

namespace ditq {
namespace DITQ_LEVEL {
namespace {

typedef std::int32_t Dwords __attribute__((vector_size(64), aligned(4), may_alias));

// Each dword of `sum` grows by the products of its four bytes.
inline Dwords dot(Dwords sum, Dwords unsigned_bytes, Dwords signed_bytes) {
    for (int i = 0; i < 64; ++i) {
        const std::int32_t x = reinterpret_cast<const std::uint8_t*>(&unsigned_bytes)[i];
        sum[i / 4] += x * reinterpret_cast<const std::int8_t*>(&signed_bytes)[i];
    }
    return sum;
}

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
