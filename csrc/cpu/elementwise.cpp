#include "cpu/elementwise.h"

#include <algorithm>

#include "cpu/shared_pool.h"

namespace fastvq::cpu {
namespace {

// Elements that take longer than waking a thread does.
constexpr int64_t kLeastWork = 1 << 14;

}  // namespace

Function function_named(const std::string& name, const Kernels& kernels) {
    if (name == "elu") return {kernels.elu, nullptr};
    if (name == "elu_negated") return {kernels.elu_negated, nullptr};
    if (name == "relu") return {kernels.relu, nullptr};
    if (name == "add") return {nullptr, kernels.add};
    if (name == "glu") return {nullptr, kernels.glu};
    if (name == "tanh") return {nullptr, kernels.tanh};
    return {};
}

void elementwise(const ElementwiseTask& task, const Function& function, int64_t threads) {
    threads = std::clamp<int64_t>(task.rows * task.channels / kLeastWork, 1, std::min(threads, task.rows));
    run_shared_team(threads, [&](int64_t thread) {
        const int64_t last = task.rows * (thread + 1) / threads;
        for (int64_t row = task.rows * thread / threads; row < last; ++row) {
            const float* first = task.first + row * task.first_stride;
            float* out = task.out + row * task.out_stride;
            if (function.unary != nullptr) {
                function.unary(first, out, task.channels);
            } else {
                function.binary(first, task.second + row * task.second_stride, out, task.channels);
            }
        }
    });
}

}  // namespace fastvq::cpu
