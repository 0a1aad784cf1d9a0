// Threads that begin together and are joined at the end.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastvq::cpu {

// Calls work(thread) for 0 .. threads - 1, thread 0 being the caller. Work must not throw.
template <class Work>
void run_team(int64_t threads, const Work& work) {
    // They begin once all of them exist: a barrier would wait forever for one that could not be made.
    enum { kWait, kGo, kGiveUp };
    std::atomic<int> signal{kWait};
    const auto begin = [&](int64_t thread) {
        while (signal.load() == kWait) std::this_thread::yield();
        if (signal.load() == kGo) work(thread);
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(begin, thread);
    } catch (...) {
        signal.store(kGiveUp);
        for (std::thread& other : others) other.join();
        throw;
    }
    signal.store(kGo);
    work(0);
    for (std::thread& other : others) other.join();
}

}  // namespace fastvq::cpu
