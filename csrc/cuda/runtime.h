// Calls of the CUDA runtime whose errors become exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastvq::cuda {

inline void check_call(cudaError_t error, const char* call) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// The device for as long as this lives; the one before it afterwards. Errors on the way back have nowhere to go.
class OnDevice {
   public:
    explicit OnDevice(int device) {
        check_call(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) check_call(cudaSetDevice(device), "cudaSetDevice");
        changed_ = device != before_;
    }
    ~OnDevice() {
        if (changed_) static_cast<void>(cudaSetDevice(before_));
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

   private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace fastvq::cuda
