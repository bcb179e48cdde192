// What Hopper (sm_90a) has and CUDA C++ has no words for: barriers in shared memory that count bytes, copies of tiles
// by the tensor memory accelerator, blocks of a cluster, and matrix instructions of four warps. (PTX ISA: mbarrier,
// cp.async.bulk.tensor, cluster barriers, wgmma.)
#pragma once

#include <cstdint>

#include <cuda.h>

namespace ditq {

// ---- Threads ----

__device__ inline std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Of the block within its cluster.
__device__ inline std::uint32_t cluster_rank() {
    std::uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of the cluster meet. What they wrote is not shown to each other: barriers are published before.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Four warps meet; `number` tells their barrier from others'.
__device__ inline void warpgroup_sync(int number) { asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory"); }

// One warpgroup lets another one go on, which waits for it at the barrier of this number.
__device__ inline void warpgroup_signal(int number) { asm volatile("bar.arrive %0, 256;" ::"r"(number) : "memory"); }
__device__ inline void warpgroup_await(int number) { asm volatile("bar.sync %0, 256;" ::"r"(number) : "memory"); }

template <int REGISTERS>
__device__ inline void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ inline void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Waits for the kernels before this one in the stream, of which it may have been started ahead.
__device__ inline void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel in the stream be started ahead, if it asks for it: it waits as above before it touches anything.
__device__ inline void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- Barriers in shared memory ----

__device__ inline void barrier_init(std::uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Shows initialised barriers to the copy engine and to the cluster; a meeting must follow.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive_expecting(std::uint64_t* barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
        : "memory");
}

// At the same place in the shared memory of the block `rank` of the cluster. Releases nothing to that block: what is
// told is that something was read.
__device__ inline void arrive_at(std::uint64_t* barrier, std::uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// Until the phase of this parity is complete.
__device__ inline void wait(std::uint64_t* barrier, std::uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- Copies of tiles ----

__device__ inline void copy_tile(
    void* to, const CUtensorMap& matrix, std::uint64_t* barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to)),
        "l"(reinterpret_cast<std::uint64_t>(&matrix)), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}

// To the same place in each block of the cluster whose bit is set in `blocks`, and counted at the barrier there.
__device__ inline void copy_tile_to(
    std::uint16_t blocks, void* to, const CUtensorMap& matrix, std::uint64_t* barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(reinterpret_cast<std::uint64_t>(&matrix)), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks)
        : "memory");
}

__device__ inline void prefetch(const CUtensorMap& matrix) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<std::uint64_t>(&matrix)) : "memory");
}

// ---- Matrix instructions ----

// Registers that matrix instructions accumulate in may be touched behind the wait for them only.
__device__ inline void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ inline void matrix_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Of rows of 128 bytes in shared memory, swizzled by the copy, that begin at a multiple of 1024 bytes; `address` may
// lie a multiple of 32 bytes further along the first row.
__device__ inline std::uint64_t operand(std::uint32_t address) {
    constexpr std::uint64_t eight_rows = 8 * 128 / 16, swizzle_128_bytes = 1;
    return (address & 0x3ffff) / 16 | eight_rows << 32 | swizzle_128_bytes << 62;
}

// accumulators += a [64, 32] times b [OUTPUTS, 32] transposed, int8; without what was in them before, unless `adds`.
template <int OUTPUTS>
__device__ void multiply_int8(int (&accumulators)[OUTPUTS / 2], std::uint64_t a, std::uint64_t b, int adds);

// The registers that an instruction accumulates in: their names in its text, and as operands.
#define DITQ_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DITQ_NAMES_32 DITQ_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DITQ_NAMES_48 DITQ_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define DITQ_NAMES_64 DITQ_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DITQ_NAMES_80 DITQ_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define DITQ_NAMES_96 DITQ_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DITQ_NAMES_112 DITQ_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define DITQ_NAMES_128 DITQ_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DITQ_SIXTEEN(d, i)                                                                                \
    "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]),           \
        "+r"(d[i + 6]), "+r"(d[i + 7]), "+r"(d[i + 8]), "+r"(d[i + 9]), "+r"(d[i + 10]), "+r"(d[i + 11]), \
        "+r"(d[i + 12]), "+r"(d[i + 13]), "+r"(d[i + 14]), "+r"(d[i + 15])
#define DITQ_OPERANDS_16(d) DITQ_SIXTEEN(d, 0)
#define DITQ_OPERANDS_32(d) DITQ_OPERANDS_16(d), DITQ_SIXTEEN(d, 16)
#define DITQ_OPERANDS_48(d) DITQ_OPERANDS_32(d), DITQ_SIXTEEN(d, 32)
#define DITQ_OPERANDS_64(d) DITQ_OPERANDS_48(d), DITQ_SIXTEEN(d, 48)
#define DITQ_OPERANDS_80(d) DITQ_OPERANDS_64(d), DITQ_SIXTEEN(d, 64)
#define DITQ_OPERANDS_96(d) DITQ_OPERANDS_80(d), DITQ_SIXTEEN(d, 80)
#define DITQ_OPERANDS_112(d) DITQ_OPERANDS_96(d), DITQ_SIXTEEN(d, 96)
#define DITQ_OPERANDS_128(d) DITQ_OPERANDS_112(d), DITQ_SIXTEEN(d, 112)

// REGISTERS are half the outputs; A, B and ADDS number the operands behind them.
#define DITQ_MULTIPLY_INT8(OUTPUTS, REGISTERS, A, B, ADDS)                                                     \
    template <>                                                                                                \
    __device__ inline void multiply_int8<OUTPUTS>(                                                             \
        int (&d)[OUTPUTS / 2], std::uint64_t a, std::uint64_t b, int adds) {                                   \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADDS ", 0;\n"                                       \
                     "wgmma.mma_async.sync.aligned.m64n" #OUTPUTS "k32.s32.s8.s8 {" DITQ_NAMES_##REGISTERS "}" \
                     ", %" #A ", %" #B ", p;\n}"                                                               \
                     : DITQ_OPERANDS_##REGISTERS(d)                                                            \
                     : "l"(a), "l"(b), "r"(adds));                                                             \
    }

DITQ_MULTIPLY_INT8(64, 32, 32, 33, 34)
DITQ_MULTIPLY_INT8(96, 48, 48, 49, 50)
DITQ_MULTIPLY_INT8(128, 64, 64, 65, 66)
DITQ_MULTIPLY_INT8(160, 80, 80, 81, 82)
DITQ_MULTIPLY_INT8(192, 96, 96, 97, 98)
DITQ_MULTIPLY_INT8(256, 128, 128, 129, 130)

}  // namespace ditq
