// What the kernels need from the hardware, each under one name, so that they also run on threads of the host (fibers,
// FASTVQ_EMULATED) and every place where threads wait for each other can be switched off there by its number.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#if defined(FASTVQ_EMULATED)
#include "emulation.h"
#endif

#define FASTVQ_DEVICE __device__ __forceinline__
#if defined(__CUDACC__)
#define FASTVQ_UNROLL _Pragma("unroll")
#define FASTVQ_ROLLED _Pragma("unroll 1")
#else
#define FASTVQ_UNROLL
#define FASTVQ_ROLLED
#endif

namespace fastvq::cuda {

// Every barrier, wait and signal of the kernels. Tests remove them one by one and expect that to be noticed.
enum class Site : int {
    kWaitSources,     // flags of the units that a task reads
    kWaitColumn,      // all blocks are through with the column before the last
    kSignalTask,
    kSignalColumn,
    kPieceCopied,  // a thread's own copies
    kProgramHeld,  // block barriers from here on
    kBeforeSignal,
    kAfterWait,
    kPieceStaged,
    kPieceUsed,
    kPartialsWritten,
    kPartialsUsed,
    kAttendStrands,
    kAttendUsed,
    kDrawMax,
    kDrawRanks,
    kDrawSorted,
    kDrawWeights,
    kDrawScan,
    kDrawFirst,
    kCount,
};

#if defined(FASTVQ_EMULATED)

FASTVQ_DEVICE void block_barrier(Site site) { emulation::block_barrier(static_cast<int>(site)); }
FASTVQ_DEVICE void warp_barrier() { emulation::warp_barrier(); }
FASTVQ_DEVICE float shuffle_xor(float value, int mask) { return emulation::shuffle_xor(value, mask); }
FASTVQ_DEVICE double shuffle_xor(double value, int mask) { return emulation::shuffle_xor(value, mask); }
// By one thread; what other blocks wrote before they signalled is visible to it afterwards, and to its block after a
// block barrier.
FASTVQ_DEVICE void wait_at_least(const uint32_t* counter, uint32_t value, Site site) {
    emulation::wait_at_least(counter, value, static_cast<int>(site));
}
// By one thread, after a block barrier: publishes what its block wrote.
FASTVQ_DEVICE void signal(uint32_t* counter, Site site) { emulation::signal(counter, static_cast<int>(site)); }
// Reads and writes of what other blocks write and read during the launch: past the first-level cache.
template <class T>
FASTVQ_DEVICE T load_shared_state(const T* address) {
    return emulation::load(address);
}
template <class T>
FASTVQ_DEVICE void store_shared_state(T* address, T value) {
    emulation::store(address, value);
}
// The first `count` of four numbers of shared state; the others are anything.
FASTVQ_DEVICE float4 load_first(const float4* address, int count) {
    const auto* numbers = reinterpret_cast<const float*>(address);
    const auto one = [&](int i) { return i < count ? emulation::load(numbers + i) : NAN; };
    return {one(0), one(1), one(2), one(3)};
}
// Starts a copy of 16 bytes to shared memory, which is done after wait_for_copies by the same thread.
FASTVQ_DEVICE void copy_shared_state(void* to, const void* from) { emulation::copy_later(to, from); }
FASTVQ_DEVICE void wait_for_copies(Site site) { emulation::copy_now(static_cast<int>(site)); }
FASTVQ_DEVICE void mma_16x8x16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::mma_16x8x16(sums, a, b);
}
FASTVQ_DEVICE char* dynamic_shared() { return emulation::dynamic_shared(); }
// Weights that are read once per column: not worth a place in the first-level cache.
FASTVQ_DEVICE uint4 load_streamed(const uint4* address) { return *address; }
// *address = min(*address, value), whoever else does the same.
FASTVQ_DEVICE void lower(unsigned long long* address, unsigned long long value) {
    if (value < *address) *address = value;
}
FASTVQ_DEVICE int64_t clocks() { return emulation::clocks(); }
FASTVQ_DEVICE int64_t nanoseconds() { return emulation::clocks(); }
FASTVQ_DEVICE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
FASTVQ_DEVICE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
FASTVQ_DEVICE uint32_t bf16_of(float x) {
    const uint32_t bits = bits_of(x);
    return x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : 0x7FFF;
}
// Both to nearest, ties to even; `low` in the lower half.
FASTVQ_DEVICE uint32_t pack_bf16(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }

#else

FASTVQ_DEVICE void block_barrier(Site) { __syncthreads(); }
FASTVQ_DEVICE void warp_barrier() { __syncwarp(); }
FASTVQ_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
FASTVQ_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

FASTVQ_DEVICE void wait_at_least(const uint32_t* counter, uint32_t value, Site) {
    uint32_t seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (static_cast<int32_t>(seen - value) < 0);
}
FASTVQ_DEVICE void signal(uint32_t* counter, Site) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

template <class T>
FASTVQ_DEVICE T load_shared_state(const T* address) {
    return __ldcg(address);
}
template <class T>
FASTVQ_DEVICE void store_shared_state(T* address, T value) {
    __stcg(address, value);
}

FASTVQ_DEVICE float4 load_first(const float4* address, int) { return __ldcg(address); }

FASTVQ_DEVICE void copy_shared_state(void* to, const void* from) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
FASTVQ_DEVICE void wait_for_copies(Site) { asm volatile("cp.async.wait_all;" ::: "memory"); }

// sums[16][8] += A[16][16] B[16][8] in bfloat16: the sums of lane l are at rows l / 4 and l / 4 + 8, columns
// 2 (l % 4) and the next; b holds B[2 (l % 4) + i % 2 + 8 (i / 2)][l / 4], i = 0 .. 3.
FASTVQ_DEVICE void mma_16x8x16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FASTVQ_DEVICE uint4 load_streamed(const uint4* address) { return __ldcg(address); }
FASTVQ_DEVICE void lower(unsigned long long* address, unsigned long long value) { atomicMin(address, value); }
FASTVQ_DEVICE int64_t clocks() { return clock64(); }
FASTVQ_DEVICE int64_t nanoseconds() {
    int64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}
FASTVQ_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
FASTVQ_DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

FASTVQ_DEVICE char* dynamic_shared() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

#endif

}  // namespace fastvq::cuda
