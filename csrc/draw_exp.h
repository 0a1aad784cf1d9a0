// The exponential function of the draw, the same bits on processors and GPUs: no operation is fused with another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTVQ_EXP_FUNCTION __host__ __device__ __forceinline__
#else
#define FASTVQ_EXP_FUNCTION inline
#endif

namespace fastvq {
namespace unfused {

// Host code that includes this is compiled with -ffp-contract=off.
#if defined(__CUDA_ARCH__)
FASTVQ_EXP_FUNCTION float multiply(float a, float b) { return __fmul_rn(a, b); }
FASTVQ_EXP_FUNCTION float add(float a, float b) { return __fadd_rn(a, b); }
FASTVQ_EXP_FUNCTION float divide(float a, float b) { return __fdiv_rn(a, b); }
#else
FASTVQ_EXP_FUNCTION float multiply(float a, float b) { return a * b; }
FASTVQ_EXP_FUNCTION float add(float a, float b) { return a + b; }
FASTVQ_EXP_FUNCTION float divide(float a, float b) { return a / b; }
#endif

}  // namespace unfused

// exp(x) for x <= 0 (also -inf) within 2 units in the last place; 0 where the result would be subnormal. Own code,
// because it vectorises on every compiler and gives the same bits with every C library. Polynomial: Cephes expf.
FASTVQ_EXP_FUNCTION float exp_nonpositive(float x) {
    using unfused::add;
    using unfused::multiply;
    constexpr float kLowest = -87.0f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    const float clamped = x < kLowest ? kLowest : x;
    const float shifted = add(multiply(clamped, 1.44269504088896341f), kRound);
    const float n = add(shifted, -kRound);
    // log(2) in two parts, the first short enough for n times it to be exact.
    const float r = add(add(clamped, -multiply(n, 0.693359375f)), -multiply(n, -2.12194440e-4f));
    float p = 1.9875691500e-4f;
    p = add(multiply(p, r), 1.3981999507e-3f);
    p = add(multiply(p, r), 8.3334519073e-3f);
    p = add(multiply(p, r), 4.1665795894e-2f);
    p = add(multiply(p, r), 1.6666665459e-1f);
    p = add(multiply(p, r), 5.0000001201e-1f);
    const float y = add(add(multiply(multiply(p, r), r), r), 1.0f);
    const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
    float scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return x < kLowest ? 0.0f : multiply(y, scale);
}

// What a code weighs in a draw, before top-k and top-p.
FASTVQ_EXP_FUNCTION float draw_weight(float logit, float largest, float temperature) {
    return exp_nonpositive(unfused::divide(unfused::add(logit, -largest), temperature));
}

}  // namespace fastvq
