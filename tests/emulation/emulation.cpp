#include "emulation.h"

#include <cstring>
#include <map>
#include <mutex>

#include "control.h"
#include "cuda_runtime.h"
#include "launch.h"

namespace emulation {
namespace {

constexpr int kMostSites = 256;

Settings chosen;
uint64_t launches = 0;
int64_t switches = 0;
Launch* running = nullptr;

std::map<const void*, Invoke>& kernels() {
    static std::map<const void*, Invoke> known;
    return known;
}

Launch& here() {
    if (running == nullptr) throw Error("called outside a launch");
    return *running;
}

float from_bfloat16(uint32_t bits) { return __uint_as_float(bits << 16); }

void multiply(Thread* warp) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Thread& thread = warp[lane];
        const int row = lane / 4, depth = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            for (int r = 0; r < 4; ++r) {
                a[row + 8 * (r % 2)][depth + 8 * (r / 2) + i] = from_bfloat16(thread.a[r] >> (16 * i) & 0xFFFF);
            }
            for (int r = 0; r < 2; ++r) b[depth + 8 * r + i][row] = from_bfloat16(thread.b[r] >> (16 * i) & 0xFFFF);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = warp[lane].sums[i];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            warp[lane].sums[i] = sum;
        }
    }
}

double shuffle(double value, int mask, Stop stop) {
    Launch& launch = here();
    launch.current().given = value;
    launch.current().mask = mask;
    launch.meet_warp(stop, [&] {
        Thread* warp = launch.warp();
        for (int lane = 0; lane < 32; ++lane) {
            if (warp[lane].mask != mask || mask < 0 || mask > 31) throw Error("shuffle: lanes differ in their mask");
            warp[lane].taken = warp[lane ^ mask].given;
        }
    });
    return launch.current().taken;
}

}  // namespace

std::vector<int64_t>& site_counts() {
    static std::vector<int64_t> counts(kMostSites);
    return counts;
}

void configure(const Settings& settings) {
    chosen = settings;
    launches = 0;
}
const Settings& settings() { return chosen; }
std::vector<int64_t> passed_sites() { return site_counts(); }
void reset_passed_sites() { site_counts().assign(kMostSites, 0); }
int64_t last_switches() { return switches; }
void register_kernel(const void* kernel, Invoke invoke) { kernels()[kernel] = invoke; }

void launch(const void* kernel, int blocks, int threads, void** arguments, int64_t shared_bytes) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    Launch launch(chosen, launches++, kernel, kernels().at(kernel), blocks, threads, arguments, shared_bytes);
    running = &launch;
    struct Done {
        ~Done() {
            switches = running->switches();
            running = nullptr;
        }
    } done;
    launch.run();
}

void block_barrier(int site) {
    Launch& launch = here();
    if (launch.passes(site)) return detail::maybe_switch();
    launch.meet_block(site);
}

void warp_barrier() {
    here().meet_warp(Stop::kWarpBarrier, [] {});
}

float shuffle_xor(float value, int mask) { return static_cast<float>(shuffle(value, mask, Stop::kShuffle)); }
double shuffle_xor(double value, int mask) { return shuffle(value, mask, Stop::kShuffleDouble); }

void wait_at_least(const uint32_t* counter, uint32_t value, int site) {
    Launch& launch = here();
    if (launch.passes(site)) return detail::maybe_switch();
    launch.wait(counter, value, site);
}

void signal(uint32_t* counter, int site) {
    Launch& launch = here();
    if (launch.passes(site)) return detail::maybe_switch();
    launch.signal(counter, site);
}

void copy_later(void* to, const void* from) {
    const auto places = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if (places % sizeof(detail::Vector) != 0) throw Error("copy: expected places aligned to 16 bytes");
    here().current().copies.push_back({to, from});
}

void mma_16x8x16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Launch& launch = here();
    Thread& self = launch.current();
    self.sums = sums;
    self.a = a;
    self.b = b;
    launch.meet_warp(Stop::kMatrix, [&] { multiply(launch.warp()); });
}

int64_t clocks() { return here().switches(); }

char* dynamic_shared() { return here().shared(); }

namespace detail {

bool next_copy(Copy& copy) {
    std::deque<Copy>& copies = here().current().copies;
    if (copies.empty()) return false;
    copy = copies.front();
    copies.pop_front();
    return true;
}

bool passes(int site) { return here().passes(site); }

int64_t loads_until_switch = INT64_MAX;
bool hide_stores = false;

void switch_point() {
#if defined(EMULATION_TSAN)
    if (--loads_until_switch >= 0) return;
#endif
    Launch& launch = here();
    loads_until_switch = launch.until_switch();
    launch.let_others();
}
void hidden_load(const void* address, void* value, int64_t bytes) { here().hidden_load(address, value, bytes); }
void hidden_store(void* address, const void* value, int64_t bytes) { here().hidden_store(address, value, bytes); }

}  // namespace detail
}  // namespace emulation
