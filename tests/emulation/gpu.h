// Thread blocks on the CPU, for tests: csrc's kernels for few rows are compiled by the host's compiler with this file
// included first, so that every index that they compute is computed, and every address that they read is read.
//
// Each thread of a block is a context of its own and runs until it has to wait for others: at a barrier of the block, or
// where a warp does something together. Blocks run one after another. Arithmetic is the host's fp32.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include <cuda_runtime_api.h>

#undef __shared__
#define __shared__ static  // one copy, which all threads of the block that is running see
#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;

namespace emulation {

constexpr int WARP = 32;
constexpr std::size_t STACK_BYTES = 128 << 10;

// A place where `expected` threads meet; the last to come does what has to be done with all of them there.
struct Meeting {
    int expected;
    int arrived = 0;
    unsigned long held = 0;  // how many times all were there
};

// A place in a thread of execution that can be gone back to. ucontext gives each thread its stack; from then on they
// change places by longjmp, which spares two system calls a time.
struct Place {
    jmp_buf here;
};

inline void go(Place& from, Place& to) {
    if (_setjmp(from.here) == 0) _longjmp(to.here, 1);
}

struct Block {
    Place scheduler;
    std::vector<Place> threads;
    std::vector<bool> begun, finished;
    std::vector<Meeting> warps;
    Meeting all;
    unsigned running = 0;
    bool progress = false;
};

inline Block* block = nullptr;
inline const std::function<void()>* body = nullptr;

inline void meet(Meeting& meeting, const std::function<void()>& together) {
    block->progress = true;
    if (++meeting.arrived == meeting.expected) {
        together();
        meeting.arrived = 0;
        ++meeting.held;
        return;
    }
    const unsigned self = block->running;
    for (const unsigned long before = meeting.held; meeting.held == before;) go(block->threads[self], block->scheduler);
    block->progress = true;
}

inline Meeting& warp() { return block->warps[threadIdx.x / WARP]; }
inline int lane() { return static_cast<int>(threadIdx.x % WARP); }

// What each lane brings to a meeting of its warp.
template <class Value>
Value* slots() {
    static std::vector<Value> values(1024);
    return values.data() + threadIdx.x / WARP * WARP;
}

inline void thread_main() {
    (*body)();
    block->finished[block->running] = true;
    block->progress = true;
    _longjmp(block->scheduler.here, 1);
}

// Goes to thread `index`, on `stack` if it has not begun, and returns when it waits or ends.
inline void resume(unsigned index, char* stack) {
    if (block->begun[index]) {
        go(block->scheduler, block->threads[index]);
        return;
    }
    block->begun[index] = true;
    ucontext_t thread;
    getcontext(&thread);
    thread.uc_stack.ss_sp = stack;
    thread.uc_stack.ss_size = STACK_BYTES;
    thread.uc_link = nullptr;
    makecontext(&thread, thread_main, 0);
    if (_setjmp(block->scheduler.here) == 0) setcontext(&thread);
}

inline void run_block(uint3 index, unsigned threads, const std::function<void()>& kernel) {
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() < threads) stacks.push_back(std::make_unique<char[]>(STACK_BYTES));
    Block current;
    current.threads.resize(threads);
    current.begun.assign(threads, false);
    current.finished.assign(threads, false);
    current.warps.assign(threads / WARP, Meeting{WARP});
    current.all.expected = static_cast<int>(threads);
    block = &current;
    body = &kernel;
    for (bool some = true; some;) {
        some = false;
        current.progress = false;
        for (unsigned i = 0; i < threads; ++i) {
            if (current.finished[i]) continue;
            some = true;
            current.running = i;
            threadIdx = {i, 0, 0};
            blockIdx = index;
            resume(i, stacks[i].get());
        }
        if (some && !current.progress) {
            std::fprintf(stderr, "threads wait for others that never come\n");
            std::abort();
        }
    }
}

}  // namespace emulation

// ---- What device code calls, and no host has ----

template <class T> T __ldg(const T* pointer) { return *pointer; }
template <class T> T __ldcs(const T* pointer) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % sizeof(T) != 0) {
        std::fprintf(stderr, "a vector is read from an address that is no multiple of its size\n");
        std::abort();
    }
    return *pointer;
}
inline uint4 __ldg(const uint4* pointer) { return __ldcs(pointer); }
inline float4 __ldg(const float4* pointer) { return __ldcs(pointer); }

inline int min(int a, int b) { return a < b ? a : b; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

inline std::uint32_t __byte_perm(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
    const std::uint64_t bytes = low | static_cast<std::uint64_t>(high) << 32;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<std::uint8_t>(bytes >> 8 * (selector >> 4 * i & 7)) << 8 * i;
    return result;
}

inline void __syncthreads() {
    emulation::meet(emulation::block->all, [] {});
}

inline float __shfl_xor_sync(unsigned, float value, int distance) {
    float* values = emulation::slots<float>();
    const int lane = emulation::lane();
    values[lane] = value;
    emulation::meet(emulation::warp(), [] {});
    const float other = values[lane ^ distance];
    emulation::meet(emulation::warp(), [] {});  // nobody overwrites what another has yet to read
    return other;
}
