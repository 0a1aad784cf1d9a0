// Functions of one element over rows of floats.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/kernels.h"

namespace fastvq::cpu {

// Rows of `channels` floats, a stride apart. `out` may be an input; otherwise they must not overlap.
struct ElementwiseTask {
    const float* first;
    int64_t first_stride;
    const float* second;  // of functions of two
    int64_t second_stride;
    float* out;
    int64_t out_stride;
    int64_t rows;
    int64_t channels;
};

// A function by its name in Kernels. One of the two is null, both if there is none of that name.
struct Function {
    void (*unary)(const float* x, float* y, int64_t n);
    void (*binary)(const float* a, const float* b, float* y, int64_t n);
};

Function function_named(const std::string& name, const Kernels& kernels);

void elementwise(const ElementwiseTask& task, const Function& function, int64_t threads);

}  // namespace fastvq::cpu
