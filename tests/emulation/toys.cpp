#include "toys.h"

#include <map>
#include <stdexcept>
#include <string>

#include "control.h"
#include "emulation.h"

namespace toys {
namespace {

float* memory() { return reinterpret_cast<float*>(emulation::dynamic_shared()); }
int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
}

template <class T>
T* copied(const std::vector<T>& values) {
    T* memory = nullptr;
    check(cudaMalloc(&memory, values.size() * sizeof(T)));
    check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return memory;
}

}  // namespace

__global__ void ring(Arguments arguments) {
    const unsigned thread = threadIdx.x;
    float mine = arguments.in[global_thread()];
    for (int round = 0; round < arguments.rounds; ++round) {
        memory()[thread] = mine;
        emulation::block_barrier(kWritten);
        mine = memory()[(thread + 1) % blockDim.x];
        emulation::block_barrier(kRead);
    }
    arguments.out[global_thread()] = mine;
}

__global__ void chain(Arguments arguments) {
    const unsigned block = blockIdx.x, thread = threadIdx.x;
    for (int round = 0; round < arguments.rounds; ++round) {
        if (block > 0) {
            if (thread == 0) {
                emulation::wait_at_least(&arguments.counters[block - 1], static_cast<uint32_t>(round + 1), kFlag);
            }
            emulation::block_barrier(kRead);
        }
        const int from = static_cast<int>(((block - 1) * arguments.rounds + round) * blockDim.x + thread);
        const int to = static_cast<int>((block * arguments.rounds + round) * blockDim.x + thread);
        const float before = block > 0 ? emulation::load(&arguments.out[from]) : arguments.in[thread];
        emulation::store(&arguments.out[to], before + 1.0f);
        emulation::block_barrier(kWritten);
        if (thread == 0) emulation::signal(&arguments.counters[block], kRaise);
    }
}

__global__ void deadlock(Arguments arguments) {
    if (threadIdx.x == 0) {
        emulation::wait_at_least(&arguments.counters[1 - blockIdx.x], 1, kFlag);
        emulation::signal(&arguments.counters[blockIdx.x], kRaise);
    }
    emulation::block_barrier(kWritten);
}

__global__ void split(Arguments) { emulation::block_barrier(threadIdx.x < 32 ? kWritten : kOther); }

__global__ void leave(Arguments) {
    if (threadIdx.x >= 32) emulation::block_barrier(kWritten);
}

__global__ void matrix(Arguments arguments) {
    const uint32_t* mine = arguments.fragments + global_thread() * 10;
    const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
    float sums[4] = {__uint_as_float(mine[6]), __uint_as_float(mine[7]), __uint_as_float(mine[8]),
                     __uint_as_float(mine[9])};
    emulation::mma_16x8x16(sums, a, b);
    for (int i = 0; i < 4; ++i) arguments.out[global_thread() * 4 + i] = sums[i];
}

__global__ void sums(Arguments arguments) {
    float narrow = arguments.in[threadIdx.x];
    double wide = narrow;
    for (int mask = 1; mask < 32; mask *= 2) {
        narrow += emulation::shuffle_xor(narrow, mask);
        wide += emulation::shuffle_xor(wide, mask);
    }
    arguments.out[threadIdx.x] = narrow;
    arguments.out[kThreads + threadIdx.x] = static_cast<float>(wide);
}

__global__ void shared(Arguments arguments) {
    if (threadIdx.x < 16) arguments.out[blockIdx.x * 16 + threadIdx.x] = memory()[threadIdx.x];
    if (threadIdx.x == 0 && arguments.rounds != 0) memory()[16] = 1.0f;
}

__global__ void handed(Arguments arguments) {
    if (threadIdx.x != 0) return;
    if (blockIdx.x == 0) {
        emulation::store(&arguments.out[0], 1.0f);
        emulation::signal(&arguments.counters[0], kRaise);
    } else {
        emulation::wait_at_least(&arguments.counters[0], 1, kFlag);
        const float found = arguments.rounds ? emulation::load(&arguments.out[0]) : arguments.out[0];
        emulation::store(&arguments.out[1], found);
    }
}

std::vector<float> run(const char* kernel, int blocks, int rounds, int64_t shared_bytes, const std::vector<float>& in,
                       const std::vector<uint32_t>& fragments, int64_t size) {
    static const std::map<std::string, void (*)(Arguments)> kernels = {
        {"ring", ring}, {"chain", chain},   {"deadlock", deadlock}, {"split", split},   {"leave", leave},
        {"sums", sums}, {"matrix", matrix}, {"shared", shared},     {"handed", handed},
    };
    const auto function = kernels.at(kernel);
    emulation::register_kernel<Arguments>(reinterpret_cast<const void*>(function));
    Arguments arguments{};
    std::vector<float> out(size);
    check(cudaMalloc(&arguments.out, size * sizeof(float)));
    arguments.rounds = rounds;
    arguments.in = copied(in);
    arguments.fragments = copied(fragments);
    arguments.counters = copied(std::vector<uint32_t>(blocks, 0));
    void* parameters[] = {&arguments};
    const auto free_all = [&] {
        for (const void* memory : {static_cast<const void*>(arguments.out), static_cast<const void*>(arguments.in),
                                   static_cast<const void*>(arguments.fragments),
                                   static_cast<const void*>(arguments.counters)}) {
            check(cudaFree(const_cast<void*>(memory)));
        }
    };
    try {
        check(cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(kThreads), parameters, shared_bytes));
        check(cudaMemcpy(out.data(), arguments.out, size * sizeof(float), cudaMemcpyDeviceToHost));
    } catch (...) {
        free_all();
        throw;
    }
    free_all();
    return out;
}

}  // namespace toys
