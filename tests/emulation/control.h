// What a test can choose about the emulated device and its launches, and see of them.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace emulation {

struct Settings {
    // Chooses the policy (seed % kPolicies, see below) and the random numbers of every launch from now on.
    uint64_t seed = 0;
    // Loads and stores of shared state between two at which another thread may go on, on average; 0: none does.
    int64_t switch_every = 50;
    // Sites that nobody stops at: a barrier or wait that lets everybody through, a signal that is not given.
    std::set<int> disabled;
    // What is stored as shared state is seen by loads of shared state alone until the launch ends, as if every plain
    // load came from a cache that was filled before.
    bool hide_stores = false;
    // A launch with more switches than this is taken to run in circles.
    int64_t most_switches = 2'000'000'000;
    // Names of sites, by number, for messages.
    std::vector<std::string> site_names;

    // The device.
    int multiprocessors = 4;
    int64_t shared_per_block = 232448;  // with the attribute of the function set to it; 48 KiB without
    int64_t shared_per_multiprocessor = 233472;
    int64_t shared_reserved = 1024;  // for every block, by the system
    int threads_per_multiprocessor = 2048;
    int blocks_per_multiprocessor = 1;  // as far as registers allow
};

// Who goes on: anybody; all in turn; in turn backwards; the first that can (block 0 runs ahead); the last that can; or
// by ranks that are drawn anew now and then, of blocks, warps or threads.
enum class Policy { kRandom, kForward, kBackward, kFirst, kLast, kBlocks, kWarps, kThreads };
constexpr int kPolicies = 8;

// Takes effect at the next launch; the count of launches that goes into their random numbers starts again.
void configure(const Settings& settings);
const Settings& settings();

// How often threads passed each site since the last reset, disabled ones included; by site.
std::vector<int64_t> passed_sites();
void reset_passed_sites();
// Switches between threads in the last launch.
int64_t last_switches();

// Kernels are launched by address; this says how one is called.
using Invoke = void (*)(const void* kernel, void** arguments);
void register_kernel(const void* kernel, Invoke invoke);

template <class Arguments>
void register_kernel(const void* kernel) {
    register_kernel(kernel, [](const void* function, void** arguments) {
        reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(function))(*static_cast<Arguments*>(arguments[0]));
    });
}

// Runs a kernel. Throws Error when its threads wait for each other in vain or barriers are misused.
void launch(const void* kernel, int blocks, int threads, void** arguments, int64_t shared_bytes);

}  // namespace emulation
