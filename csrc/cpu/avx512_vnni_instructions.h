// AVX-512 VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ditq {
namespace DITQ_LEVEL {
namespace {

typedef std::int32_t Dwords __attribute__((vector_size(64), aligned(4), may_alias));

// Each dword of `sum` grows by the products of its four bytes.
inline Dwords dot(Dwords sum, Dwords unsigned_bytes, Dwords signed_bytes) {
    return reinterpret_cast<Dwords>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(unsigned_bytes),
        reinterpret_cast<__m512i>(signed_bytes)));
}

}  // namespace
}  // namespace DITQ_LEVEL
}  // namespace ditq
