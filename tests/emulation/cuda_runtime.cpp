#include "cuda_runtime.h"

#include <cstdlib>
#include <map>

#include "control.h"

namespace {

constexpr int64_t kSharedWithoutAsking = 48 << 10;

cudaError_t last = cudaSuccess;

cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last = error;
    return error;
}

std::map<const void*, int64_t>& asked_shared() {
    static std::map<const void*, int64_t> bytes;
    return bytes;
}

int64_t allowed_shared(const void* kernel) {
    const auto found = asked_shared().find(kernel);
    return std::max(kSharedWithoutAsking, found == asked_shared().end() ? 0 : found->second);
}

int64_t resident_blocks(int threads, int64_t shared_bytes) {
    const emulation::Settings& device = emulation::settings();
    const int64_t by_shared = device.shared_per_multiprocessor / (shared_bytes + device.shared_reserved);
    const int64_t by_threads = device.threads_per_multiprocessor / threads;
    return std::min<int64_t>({device.blocks_per_multiprocessor, by_shared, by_threads});
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorNotReady: return "cudaErrorNotReady";
        case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
        case cudaErrorNotSupported: return "cudaErrorNotSupported";
        case cudaErrorUnknown: return "cudaErrorUnknown";
    }
    return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last; }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const emulation::Settings& of = emulation::settings();
    if (device != 0) return result(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(kSharedWithoutAsking); break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMultiProcessorCount: *value = of.multiprocessors; break;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(of.shared_per_multiprocessor); break;
        case cudaDevAttrCooperativeLaunch: *value = 1; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(of.shared_per_block); break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *value = static_cast<int>(of.shared_reserved); break;
        default: return result(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
        value > emulation::settings().shared_per_block) {
        return result(cudaErrorInvalidValue);
    }
    asked_shared()[kernel] = value;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          std::size_t shared_bytes) {
    if (threads < 1) return result(cudaErrorInvalidValue);
    const auto bytes = static_cast<int64_t>(shared_bytes);
    *blocks = bytes > allowed_shared(kernel) ? 0 : static_cast<int>(resident_blocks(threads, bytes));
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    *memory = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (posix_memalign(memory, 256, bytes) != 0) return result(cudaErrorMemoryAllocation);
    std::memset(*memory, 0xFF, bytes);
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
    if (bytes > 0) std::memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* memory, int value, std::size_t bytes) {
    if (bytes > 0) std::memset(memory, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
    return cudaMemset(memory, value, bytes);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                        std::size_t shared_bytes, cudaStream_t) {
    const auto bytes = static_cast<int64_t>(shared_bytes);
    if (grid.x < 1 || grid.y != 1 || grid.z != 1 || block.x < 32 || block.x % 32 != 0 || block.x > 1024 ||
        block.y != 1 || block.z != 1) {
        return result(cudaErrorInvalidConfiguration);
    }
    if (bytes > allowed_shared(kernel)) return result(cudaErrorInvalidValue);
    const int64_t resident = emulation::settings().multiprocessors * resident_blocks(static_cast<int>(block.x), bytes);
    if (grid.x > resident) return result(cudaErrorCooperativeLaunchTooLarge);
    emulation::launch(kernel, static_cast<int>(grid.x), static_cast<int>(block.x), arguments, bytes);
    return cudaSuccess;
}
