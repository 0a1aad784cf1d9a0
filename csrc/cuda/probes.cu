#include "cuda/probes.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/runtime.h"

namespace fastvq::cuda {
namespace {

constexpr int kProbeThreads = 32;
// Counters are 32 bits wide and differences of them are compared with a sign.
constexpr int64_t kMostSignals = int64_t{1} << 30;
constexpr int64_t kMostLaunches = 1 << 16;
// Counters lie this far apart, so that no two of them share a line of the cache.
constexpr int kCounterStride = 64;

__global__ void meet(uint32_t* counter, uint32_t rounds) {
    for (uint32_t round = 1; round <= rounds; ++round) {
        if (threadIdx.x == 0) {
            signal(counter, Site::kSignalColumn);
            wait_at_least(counter, round * gridDim.x, Site::kWaitColumn);
        }
        block_barrier(Site::kAfterWait);
    }
}

__global__ void pass_on(uint32_t* counters, uint32_t rounds) {
    if (threadIdx.x != 0) return;
    uint32_t* const mine = counters + blockIdx.x * kCounterStride;
    const uint32_t* const other = counters + (1 - blockIdx.x) * kCounterStride;
    for (uint32_t round = 1; round <= rounds; ++round) {
        if (blockIdx.x == 0) signal(mine, Site::kSignalTask);
        wait_at_least(other, round, Site::kWaitSources);
        if (blockIdx.x == 1) signal(mine, Site::kSignalTask);
    }
}

__global__ void nothing() {}

#define FASTVQ_CHECK(call) check_call(call, #call)

void expect(bool condition, const char* name, const char* expected, int64_t got) {
    if (condition) return;
    throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

int existing(int device) {
    int count = 0;
    FASTVQ_CHECK(cudaGetDeviceCount(&count));
    expect(device >= 0 && device < count, "device", "the number of a GPU", device);
    return device;
}

// A stream with two events on it.
class Clock {
   public:
    Clock() {
        try {
            FASTVQ_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
            FASTVQ_CHECK(cudaEventCreate(&start_));
            FASTVQ_CHECK(cudaEventCreate(&stop_));
        } catch (...) {
            release();
            throw;
        }
    }
    ~Clock() { release(); }
    Clock(const Clock&) = delete;
    Clock& operator=(const Clock&) = delete;

    cudaStream_t stream() const { return stream_; }

    // Of what a function enqueues.
    template <class Enqueue>
    double microseconds(Enqueue enqueue) {
        FASTVQ_CHECK(cudaEventRecord(start_, stream_));
        enqueue();
        FASTVQ_CHECK(cudaGetLastError());
        FASTVQ_CHECK(cudaEventRecord(stop_, stream_));
        FASTVQ_CHECK(cudaEventSynchronize(stop_));
        float milliseconds = 0.0f;
        FASTVQ_CHECK(cudaEventElapsedTime(&milliseconds, start_, stop_));
        return 1e3 * static_cast<double>(milliseconds);
    }

   private:
    void release() {
        if (start_ != nullptr) static_cast<void>(cudaEventDestroy(start_));
        if (stop_ != nullptr) static_cast<void>(cudaEventDestroy(stop_));
        if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));
    }

    cudaStream_t stream_ = nullptr;
    cudaEvent_t start_ = nullptr;
    cudaEvent_t stop_ = nullptr;
};

class Counters {
   public:
    explicit Counters(int count) : count_(count) {
        FASTVQ_CHECK(cudaMalloc(&data_, bytes()));
    }
    ~Counters() { static_cast<void>(cudaFree(data_)); }
    Counters(const Counters&) = delete;
    Counters& operator=(const Counters&) = delete;

    uint32_t* data() const { return data_; }
    void clear(cudaStream_t stream) { FASTVQ_CHECK(cudaMemsetAsync(data_, 0, bytes(), stream)); }
    uint32_t read(int index) const {
        uint32_t value = 0;
        FASTVQ_CHECK(cudaMemcpy(&value, data_ + index * kCounterStride, sizeof(value), cudaMemcpyDeviceToHost));
        return value;
    }

   private:
    size_t bytes() const { return sizeof(uint32_t) * kCounterStride * static_cast<size_t>(count_); }

    int count_;
    uint32_t* data_ = nullptr;
};

// Microseconds of a cooperative launch of a kernel over counters, after one with fewer rounds.
double cooperative(const void* kernel, int blocks, int64_t rounds, Counters& counters) {
    Clock clock;
    double spent = 0.0;
    for (const int64_t count : {std::min<int64_t>(rounds, 100), rounds}) {
        counters.clear(clock.stream());
        uint32_t* data = counters.data();
        auto width = static_cast<uint32_t>(count);
        void* arguments[] = {&data, &width};
        spent = clock.microseconds([&] {
            FASTVQ_CHECK(cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kProbeThreads),
                                                     arguments, 0, clock.stream()));
        });
    }
    return spent;
}

void expect_count(uint32_t found, int64_t expected) {
    if (found == expected) return;
    throw std::runtime_error("probe: a counter should be " + std::to_string(expected) + " and is " +
                             std::to_string(found));
}

class Graph {
   public:
    Graph() = default;
    ~Graph() {
        if (executable_ != nullptr) static_cast<void>(cudaGraphExecDestroy(executable_));
        if (graph_ != nullptr) static_cast<void>(cudaGraphDestroy(graph_));
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    template <class Enqueue>
    void capture(cudaStream_t stream, Enqueue enqueue) {
        FASTVQ_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        enqueue();
        FASTVQ_CHECK(cudaStreamEndCapture(stream, &graph_));
        FASTVQ_CHECK(cudaGraphInstantiateWithFlags(&executable_, graph_, 0));
    }
    void launch(cudaStream_t stream) const { FASTVQ_CHECK(cudaGraphLaunch(executable_, stream)); }

   private:
    cudaGraph_t graph_ = nullptr;
    cudaGraphExec_t executable_ = nullptr;
};

}  // namespace

double barrier_microseconds(int blocks, int64_t rounds, int device) {
    const OnDevice here(existing(device));
    int multiprocessors = 0;
    FASTVQ_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    if (blocks == 0) blocks = multiprocessors;
    expect(blocks >= 1 && blocks <= multiprocessors, "blocks", "0, or at most the number of multiprocessors", blocks);
    expect(rounds >= 1 && rounds <= kMostSignals / blocks, "rounds", "1 to 2^30 / blocks", rounds);
    Counters counters(1);
    const double spent = cooperative(reinterpret_cast<const void*>(&meet), blocks, rounds, counters);
    expect_count(counters.read(0), rounds * blocks);
    return spent / static_cast<double>(rounds);
}

double flag_hop_microseconds(int64_t rounds, int device) {
    const OnDevice here(existing(device));
    expect(rounds >= 1 && rounds <= kMostSignals, "rounds", "1 to 2^30", rounds);
    Counters counters(2);
    const double spent = cooperative(reinterpret_cast<const void*>(&pass_on), 2, rounds, counters);
    for (const int block : {0, 1}) expect_count(counters.read(block), rounds);
    return spent / static_cast<double>(2 * rounds);
}

LaunchGap launch_microseconds(int64_t count, int device) {
    const OnDevice here(existing(device));
    expect(count >= 1 && count <= kMostLaunches, "count", "1 to 65536", count);
    Clock clock;
    const auto launches = [&] {
        for (int64_t i = 0; i < count; ++i) {
            nothing<<<1, kProbeThreads, 0, clock.stream()>>>();
            FASTVQ_CHECK(cudaGetLastError());
        }
    };
    clock.microseconds(launches);
    const double plain = clock.microseconds(launches);
    Graph graph;
    graph.capture(clock.stream(), launches);
    const auto replay = [&] { graph.launch(clock.stream()); };
    clock.microseconds(replay);
    const double together = clock.microseconds(replay);
    return {plain / static_cast<double>(count), together / static_cast<double>(count)};
}

}  // namespace fastvq::cuda
