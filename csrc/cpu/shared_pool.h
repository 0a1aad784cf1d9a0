// The threads of an OpenMP runtime that the process has loaded already.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/team.h"

namespace fastvq::cpu {

// Calls work(data, thread) for thread 0 .. threads - 1 on the pool that a framework in this process uses, thread 0 being
// the caller. False, and nothing has been called, if there is no such pool, it was left, or it does not give so many
// threads.
bool run_on_loaded_pool(int64_t threads, void (*work)(void*, int64_t), void* data);

// Never runs on that pool again. For children of fork, where the runtime would wait for threads that only the parent has.
void leave_loaded_pool();

// File of the runtime that owns the pool; empty if there is none.
const std::string& loaded_pool_path();

// run_team on that pool where there is one. After an operation its threads wait actively for the next one, for
// milliseconds, and would take the cores from threads made here.
template <class Work>
void run_shared_team(int64_t threads, const Work& work) {
    if (threads == 1) {
        work(0);
        return;
    }
    const auto call = [](void* data, int64_t thread) { (*static_cast<const Work*>(data))(thread); };
    if (!run_on_loaded_pool(threads, call, const_cast<Work*>(&work))) run_team(threads, work);
}

}  // namespace fastvq::cpu
