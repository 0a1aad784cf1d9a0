#include "cpu/kernels.h"

#include <cstring>

namespace fastvq::cpu {
namespace {

bool runs_here(const Kernels& kernels) {
#ifdef FASTVQ_X86_KERNELS
    __builtin_cpu_init();
    if (&kernels == &kAvx512Kernels) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }
    if (&kernels == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &kBaselineKernels;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
    // Widest first.
    static const Kernels* const all[] = {
#ifdef FASTVQ_X86_KERNELS
        &kAvx512Kernels,
        &kAvx2Kernels,
#endif
        &kBaselineKernels,
    };
    for (const Kernels* kernels : all) {
        const bool wanted = std::strcmp(name, "auto") == 0 || std::strcmp(name, kernels->name) == 0;
        if (wanted && runs_here(*kernels)) return kernels;
    }
    return nullptr;
}

}  // namespace fastvq::cpu
