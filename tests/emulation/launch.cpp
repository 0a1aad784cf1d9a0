#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <sstream>

#include "cuda_runtime.h"
#include "emulation.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

std::vector<int64_t>& site_counts();

namespace {

// Stacks are kept for later launches.
Fiber* stack(std::size_t index, void (*entry)(void*), void* argument) {
    static std::vector<std::unique_ptr<Fiber>> kept;
    if (index < kept.size()) {
        kept[index]->restart(entry, argument);
    } else {
        kept.push_back(std::make_unique<Fiber>(entry, argument, index));
    }
    return kept[index].get();
}

const char* name(Stop stop) {
    switch (stop) {
        case Stop::kWarpBarrier: return "warp barrier";
        case Stop::kShuffle: case Stop::kShuffleDouble: return "shuffle";
        case Stop::kMatrix: return "matrix instruction";
        default: return "barrier";
    }
}

}  // namespace

void Launch::Free::operator()(char* memory) const { std::free(memory); }

Launch::Launch(const Settings& settings, uint64_t number, const void* kernel, Invoke invoke, int blocks, int threads,
               void** arguments, int64_t shared_bytes)
    : settings_(settings), kernel_(kernel), invoke_(invoke), arguments_(arguments), num_threads_(threads),
      random_(settings.seed * 1000003 + number), policy_(static_cast<Policy>(settings.seed % kPolicies)) {
    const int count = blocks * threads;
    threads_.resize(count);
    order_.resize(count);
    rank_.resize(count);
    // Memory that is allocated or cleared by a library while a fiber runs would look to ThreadSanitizer like the fiber's.
    waiting_.reserve(count);
    was_runnable_.resize(count);
    runnable_.resize((count + 63) / 64);
    for (int t = 0; t < count; ++t) {
        threads_[t].block = t / threads;
        threads_[t].index = t % threads;
        threads_[t].fiber = stack(t, begin, this);
        if (t % threads == 0) blocks_.push_back({t, threads});
        if (t % 32 == 0) warps_.push_back({t, 32});
    }
    std::iota(order_.begin(), order_.end(), 0);
    std::iota(rank_.begin(), rank_.end(), 0);
    for (int t = 0; t < count; ++t) set_runnable(t, true);
    for (int b = 0; b < blocks; ++b) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 2 * kSharedOffset, kSharedOffset + shared_bytes) != 0) throw std::bad_alloc();
        std::memset(memory, 0xFF, kSharedOffset + shared_bytes);
        shared_.emplace_back(static_cast<char*>(memory));
    }
}

Launch::~Launch() {
    for (const auto& [word, value] : hidden_) std::memcpy(reinterpret_cast<void*>(word * 4), &value, 4);
}

void Launch::run() {
    gridDim = dim3(static_cast<unsigned>(blocks_.size()));
    blockDim = dim3(static_cast<unsigned>(num_threads_));
    caller_ = std::make_unique<Fiber>();
    detail::hide_stores = settings_.hide_stores;
    detail::loads_until_switch = until_switch();
    happens_before(&started_);
    current_ = pick();
    threadIdx = {static_cast<unsigned>(current().index), 0, 0};
    blockIdx = {static_cast<unsigned>(current().block), 0, 0};
    Fiber::switch_between(*caller_, *current().fiber);
    happens_after(&ended_);
    detail::hide_stores = false;
    if (error_) std::rethrow_exception(error_);
}

void Launch::begin(void* argument) {
    Launch& launch = *static_cast<Launch*>(argument);
    launch.current().fiber->entered();
    try {
        happens_after(&launch.started_);
        launch.invoke_(launch.kernel_, launch.arguments_);
        happens_before(&launch.ended_);
        Thread& self = launch.current();
        for (Group* group : {&launch.blocks_[self.block], &launch.warps_[launch.current_ / 32]}) {
            if (group->arrived > 0) {
                throw Error(launch.place(launch.current_) + " leaves the kernel while others wait at the " +
                            name(group->stop) + " " + launch.site_name(group->site));
            }
            ++group->left;
        }
        self.stop = Stop::kLeft;
        ++launch.num_left_;
        launch.set_runnable(launch.current_, false);
    } catch (...) {
        launch.error_ = std::current_exception();
    }
    if (!launch.error_ && launch.num_left_ < static_cast<int>(launch.threads_.size())) launch.go_on();
    Fiber::switch_between(*launch.current().fiber, *launch.caller_);
    std::abort();
}

bool Launch::passes(int site) {
    ++site_counts()[site];
    return settings_.disabled.count(site) != 0;
}

void Launch::meet_block(int site) {
    Group& group = blocks_[current().block];
    void* met = &group.met[group.turn & 1];
    happens_before(met);
    arrive(group, Stop::kBlockBarrier, site, "block");
    if (group.arrived == group.size) {
        release(group);
        let_others();
    } else {
        go_on();
    }
    happens_after(met);
}

// The thread that runs joins those that wait.
void Launch::arrive(Group& group, Stop stop, int site, const char* what) {
    if (group.left > 0) {
        throw Error(place(current_) + " comes to the " + name(stop) + " " + site_name(site) + " when another of its " +
                    what + " has left the kernel");
    }
    if (group.arrived > 0 && (group.stop != stop || group.site != site)) {
        throw Error("threads of one " + std::string(what) + " meet at different places: " + place(current_) + " at the " +
                    name(stop) + " " + site_name(site) + ", others at the " + name(group.stop) + " " +
                    site_name(group.site));
    }
    group.stop = stop;
    group.site = site;
    ++group.arrived;
    current().stop = stop;
    current().site = site;
    set_runnable(current_, false);
}

void Launch::release(Group& group) {
    for (int t = group.first; t < group.first + group.size; ++t) {
        threads_[t].stop = Stop::kNone;
        set_runnable(t, true);
    }
    group.arrived = 0;
    ++group.turn;
}

void Launch::wait(const uint32_t* counter, uint32_t value, int site) {
    if (static_cast<int32_t>(*counter - value) < 0) {
        Thread& self = current();
        self.stop = Stop::kFlag;
        self.site = site;
        self.counter = counter;
        self.value = value;
        waiting_.push_back(current_);
        set_runnable(current_, false);
        go_on();
    } else {
        let_others();
    }
    happens_after(const_cast<uint32_t*>(counter));
}

void Launch::signal(uint32_t* counter, int) {
    happens_before(counter);
    ++*counter;
    const auto still = std::partition(waiting_.begin(), waiting_.end(), [&](int t) {
        return threads_[t].counter != counter || static_cast<int32_t>(*counter - threads_[t].value) < 0;
    });
    for (auto t = still; t != waiting_.end(); ++t) {
        threads_[*t].stop = Stop::kNone;
        set_runnable(*t, true);
    }
    waiting_.erase(still, waiting_.end());
    let_others();
}

// The thread that runs could go on, but another may.
void Launch::let_others() { go_on(); }

void Launch::go_on() {
    if (num_runnable_ == 0 || ++switches_ > settings_.most_switches) {
        const bool stuck = num_runnable_ == 0;
        error_ = std::make_exception_ptr(
            Error((stuck ? "deadlock, no thread can go on: " : "no end after many switches: ") + report()));
        Fiber::switch_between(*current().fiber, *caller_);
        std::abort();
    }
    const int before = current_;
    current_ = pick();
    if (current_ == before) return;
    threadIdx.x = static_cast<unsigned>(current().index);
    blockIdx.x = static_cast<unsigned>(current().block);
    Fiber::switch_between(*threads_[before].fiber, *current().fiber);
}

void Launch::set_runnable(int thread, bool runnable) {
    const int rank = rank_[thread];
    uint64_t& word = runnable_[rank / 64];
    const uint64_t bit = uint64_t{1} << (rank % 64);
    if (runnable == ((word & bit) != 0)) return;
    word ^= bit;
    num_runnable_ += runnable ? 1 : -1;
}

// The first that can run from some rank on, in a circle.
int Launch::pick() {
    const int count = static_cast<int>(threads_.size());
    int from = 0;
    switch (policy_) {
        case Policy::kRandom: from = static_cast<int>(random_.below(count)); break;
        case Policy::kForward:
        case Policy::kBackward: from = (rank_[current_] + 1) % count; break;
        default: break;
    }
    if (policy_ >= Policy::kBackward && policy_ != Policy::kFirst && --until_ranked_ < 0) rank();
    const int words = static_cast<int>(runnable_.size());
    uint64_t mask = ~uint64_t{0} << (from % 64);
    for (int i = 0, w = from / 64; i <= words; ++i, w = (w + 1) % words, mask = ~uint64_t{0}) {
        if (const uint64_t found = runnable_[w] & mask) return order_[w * 64 + __builtin_ctzll(found)];
    }
    std::abort();
}

// Ranks by the policy. Those that are drawn hold for a random number of choices, few or many.
void Launch::rank() {
    const int count = static_cast<int>(threads_.size());
    until_ranked_ = INT64_MAX;
    std::iota(order_.begin(), order_.end(), 0);
    const int size = policy_ == Policy::kBlocks ? num_threads_ : policy_ == Policy::kWarps ? 32 : 1;
    if (policy_ == Policy::kBackward || policy_ == Policy::kLast) {
        std::reverse(order_.begin(), order_.end());
    } else {
        for (int i = count / size - 1; i > 0; --i) {
            const auto from = order_.begin() + size * random_.below(i + 1);
            if (from != order_.begin() + size * i) std::swap_ranges(from, from + size, order_.begin() + size * i);
        }
        until_ranked_ = random_.below(int64_t{1} << (4 + random_.below(15)));
    }
    for (int t = 0; t < count; ++t) was_runnable_[t] = runnable_[rank_[t] / 64] >> (rank_[t] % 64) & 1;
    for (uint64_t& word : runnable_) word = 0;
    num_runnable_ = 0;
    for (int r = 0; r < count; ++r) rank_[order_[r]] = r;
    for (int t = 0; t < count; ++t) set_runnable(t, was_runnable_[t] != 0);
}

int64_t Launch::until_switch() {
    return settings_.switch_every > 0 ? random_.below(2 * settings_.switch_every) : INT64_MAX;
}

// Half words, words and whole numbers of words, each aligned to its size.
void check_shared(uintptr_t first, int64_t bytes) {
    if (bytes == 2 ? first % 2 != 0 : bytes % 4 != 0 || first % 4 != 0) {
        throw Error("shared state: expected half a word or whole words");
    }
}

void Launch::hidden_load(const void* address, void* value, int64_t bytes) const {
    const auto first = reinterpret_cast<uintptr_t>(address);
    check_shared(first, bytes);
    const int64_t part = std::min<int64_t>(bytes, 4);
    for (int64_t i = 0; i < bytes; i += part) {
        const auto found = hidden_.find((first + i) / 4);
        if (found == hidden_.end()) continue;
        const auto* word = reinterpret_cast<const char*>(&found->second);
        std::memcpy(static_cast<char*>(value) + i, word + (first + i) % 4, part);
    }
}

void Launch::hidden_store(void* address, const void* value, int64_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(address);
    check_shared(first, bytes);
    const int64_t part = std::min<int64_t>(bytes, 4);
    for (int64_t i = 0; i < bytes; i += part) {
        const uintptr_t word = (first + i) / 4;
        if (hidden_.count(word) == 0) std::memcpy(&hidden_[word], reinterpret_cast<void*>(word * 4), 4);
        std::memcpy(reinterpret_cast<char*>(&hidden_[word]) + (first + i) % 4, static_cast<const char*>(value) + i,
                    part);
    }
}

std::string Launch::site_name(int site) const {
    const auto& names = settings_.site_names;
    return site < static_cast<int>(names.size()) ? names[site] : "site " + std::to_string(site);
}

std::string Launch::place(int thread) const {
    return "thread " + std::to_string(threads_[thread].index) + " of block " + std::to_string(threads_[thread].block);
}

// What the threads of each block are at; those at the same place are counted.
std::string Launch::report() const {
    std::ostringstream text;
    for (std::size_t b = 0; b < blocks_.size(); ++b) {
        std::vector<std::pair<std::string, int>> counts;
        for (int t = blocks_[b].first; t < blocks_[b].first + blocks_[b].size; ++t) {
            const Thread& thread = threads_[t];
            std::ostringstream at;
            if (thread.stop == Stop::kNone) {
                at << "running";
            } else if (thread.stop == Stop::kLeft) {
                at << "through";
            } else if (thread.stop == Stop::kFlag) {
                at << "waiting at " << site_name(thread.site) << " for " << thread.value << ", counted "
                   << *thread.counter;
            } else if (thread.stop == Stop::kBlockBarrier) {
                at << "at the barrier " << site_name(thread.site);
            } else {
                at << "at a " << name(thread.stop);
            }
            const auto same = [&](const auto& entry) { return entry.first == at.str(); };
            const auto found = std::find_if(counts.begin(), counts.end(), same);
            if (found == counts.end()) {
                counts.emplace_back(at.str(), 1);
            } else {
                ++found->second;
            }
        }
        text << (b ? "; " : "") << "block " << b << ": ";
        for (std::size_t i = 0; i < counts.size(); ++i) {
            text << (i ? ", " : "") << counts[i].second << (counts[i].second == 1 ? " thread " : " threads ")
                 << counts[i].first;
        }
    }
    return text.str();
}

}  // namespace emulation
