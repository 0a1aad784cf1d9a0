// The threads of one launch and the choice of the next one to run.
#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "control.h"
#include "emulation.h"
#include "fibers.h"

namespace emulation {

// splitmix64: the same numbers with every standard library.
class Random {
   public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u) {}
    uint64_t next() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t count) { return static_cast<int64_t>(next() % static_cast<uint64_t>(count)); }

   private:
    uint64_t state_;
};

enum class Stop { kNone, kBlockBarrier, kWarpBarrier, kShuffle, kShuffleDouble, kMatrix, kFlag, kLeft };

struct Thread {
    Fiber* fiber = nullptr;
    int block = 0, index = 0;
    Stop stop = Stop::kNone;
    int site = 0;
    // Flag.
    const uint32_t* counter = nullptr;
    uint32_t value = 0;
    std::deque<detail::Copy> copies;
    // Shuffle.
    double given = 0.0, taken = 0.0;
    int mask = 0;
    // Matrix.
    float* sums = nullptr;
    const uint32_t *a = nullptr, *b = nullptr;
};

// Threads that meet: those of a block, or of a warp.
struct Group {
    int first = 0, size = 0, arrived = 0, left = 0;
    Stop stop = Stop::kNone;
    int site = 0;
    char met[2] = {};  // places for happens_before, taken in turn
    int turn = 0;
};

class Launch {
   public:
    Launch(const Settings& settings, uint64_t number, const void* kernel, Invoke invoke, int blocks, int threads,
           void** arguments, int64_t shared_bytes);
    ~Launch();
    void run();

    // Of the thread that runs.
    void meet_block(int site);
    // True for the thread that comes last, which does what all of them came for before they go on.
    template <class Work>
    void meet_warp(Stop stop, const Work& work);
    void wait(const uint32_t* counter, uint32_t value, int site);
    void signal(uint32_t* counter, int site);
    void let_others();
    Thread& current() { return threads_[current_]; }
    Thread* warp() { return &threads_[current_ / 32 * 32]; }
    char* shared() { return shared_[current().block].get() + kSharedOffset; }
    bool passes(int site);
    int64_t until_switch();

    void hidden_load(const void* address, void* value, int64_t bytes) const;
    void hidden_store(void* address, const void* value, int64_t bytes);
    int64_t switches() const { return switches_; }

   private:
    // Shared memory starts behind the start of an allocation, so that it is not aligned to more than 16 bytes.
    static constexpr int64_t kSharedOffset = 16;
    struct Free {
        void operator()(char* memory) const;
    };

    [[noreturn]] static void begin(void* self);
    void arrive(Group& group, Stop stop, int site, const char* what);
    void release(Group& group);
    void go_on();
    void set_runnable(int thread, bool runnable);
    int pick();
    void rank();
    std::string place(int thread) const;
    std::string site_name(int site) const;
    std::string report() const;

    const Settings settings_;
    const void* kernel_;
    const Invoke invoke_;
    void** const arguments_;
    const int num_threads_;
    Random random_;
    const Policy policy_;
    std::vector<Thread> threads_;
    std::vector<Group> blocks_, warps_;
    std::vector<std::unique_ptr<char[], Free>> shared_;
    std::vector<int> waiting_;  // for flags
    std::unordered_map<uintptr_t, uint32_t> hidden_;  // by address / 4
    std::vector<int> order_, rank_;   // threads by rank, ranks by thread
    std::vector<uint64_t> runnable_;  // bits by rank
    std::vector<char> was_runnable_;  // room for rank
    int num_runnable_ = 0, num_left_ = 0, current_ = 0;
    int64_t switches_ = 0, until_ranked_ = 0;
    std::unique_ptr<Fiber> caller_;
    std::exception_ptr error_;
    char started_ = 0, ended_ = 0;
};

template <class Work>
void Launch::meet_warp(Stop stop, const Work& work) {
    Group& group = warps_[current_ / 32];
    void* met = &group.met[group.turn & 1];
    // Only a warp barrier orders memory.
    if (stop == Stop::kWarpBarrier) happens_before(met);
    arrive(group, stop, 0, "warp");
    if (group.arrived == group.size) {
        work();
        release(group);
        let_others();
    } else {
        go_on();
    }
    if (stop == Stop::kWarpBarrier) happens_after(met);
}

}  // namespace emulation
