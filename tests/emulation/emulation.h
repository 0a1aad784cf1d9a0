// The CUDA thread model on the host, as far as csrc/cuda/device.h needs it: what a kernel calls.
//
// Every thread of a launch is a fiber; one thread of the operating system runs them all, one at a time. At each call
// below, and now and then at a load or store of shared state, the next one is chosen by a policy that depends on a seed
// (see control.h), so that an order which a missing barrier allows comes up. What cannot be right ends the launch with an
// Error: threads of a block at different barriers, threads that leave while others wait, and waits that nobody ends.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace emulation {

class Error : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

// Threads of a block, or of a warp of 32, meet. Every thread has to come to the same call.
void block_barrier(int site);
void warp_barrier();
float shuffle_xor(float value, int mask);
double shuffle_xor(double value, int mask);

// A thread stops until static_cast<int32_t>(*counter - value) >= 0.
void wait_at_least(const uint32_t* counter, uint32_t value, int site);
// Adds 1.
void signal(uint32_t* counter, int site);

// Copies 16 bytes of shared state, both places aligned to as much, when the thread comes to copy_now.
void copy_later(void* to, const void* from);
inline void copy_now(int site);

// sums[16][8] += A[16][16] B[16][8]; bfloat16 products are added in float32 by ascending depth. Fragments as PTX has them
// for mma.m16n8k16: lane l holds, of A, rows l / 4 (+ 8 in a[1] and a[3]) and depths 2 (l % 4) and the next (+ 8 in a[2]
// and a[3]); of B, the same depths (+ 8 in b[1]) of column l / 4; of the sums, rows l / 4 (+ 8 in sums[2] and sums[3]) and
// columns 2 (l % 4) and the next.
void mma_16x8x16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// How often threads have changed so far, the only clock there is.
int64_t clocks();

// The block's dynamic shared memory: of exactly the size of the launch, aligned to 16 bytes and no more, all ones
// (a NaN in every type) at the start.
char* dynamic_shared();

namespace detail {

struct Copy {
    void* to;
    const void* from;
};
struct alignas(16) Vector {
    uint32_t words[4];
};
// The copies of the thread that runs, and whether it has any left.
bool next_copy(Copy& copy);
// Whether nobody stops at a site.
bool passes(int site);

extern int64_t loads_until_switch;
extern bool hide_stores;
void switch_point();
void hidden_load(const void* address, void* value, int64_t bytes);
void hidden_store(void* address, const void* value, int64_t bytes);

inline void maybe_switch() {
#if defined(EMULATION_TSAN)
    switch_point();  // the count is no memory of the kernel
#else
    if (--loads_until_switch < 0) switch_point();
#endif
}

}  // namespace detail

// Memory that other blocks write, or read, during the launch.
template <class T>
inline T load(const T* address) {
    static_assert(std::is_trivially_copyable_v<T>);
    detail::maybe_switch();
    T value = *address;
    if (detail::hide_stores) detail::hidden_load(address, &value, sizeof(T));
    return value;
}
template <class T>
inline void store(T* address, T value) {
    static_assert(std::is_trivially_copyable_v<T>);
    detail::maybe_switch();
    if (detail::hide_stores) {
        detail::hidden_store(address, &value, sizeof(T));
    } else {
        *address = value;
    }
}

inline void copy_now(int site) {
    if (detail::passes(site)) return;
    for (detail::Copy copy; detail::next_copy(copy);) {
        *static_cast<detail::Vector*>(copy.to) = load(static_cast<const detail::Vector*>(copy.from));
    }
}

}  // namespace emulation
