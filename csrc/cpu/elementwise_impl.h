// Functions of one element, for one instruction set: those with fused multiply-adds give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/vectors.h"

namespace fastvq::cpu {
namespace {

// exp(x) as (1 + fraction) * scale, within about 2 units in the last place for x in [-87, 88], clamped outside.
// Polynomial: Cephes expf.
struct Exp {
    Vector fraction, scale;
};

inline Exp split_exp(Vector x) {
    const Vector low = broadcast(-87.0f), high = broadcast(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vector shift = broadcast(12582912.0f);  // leaves the integer part in the low bits
    const Vector shifted = fused(x, broadcast(1.44269504088896341f), shift);
    const Vector n = shifted - shift;
    const Vector r = fused(n, broadcast(2.12194440e-4f), fused(n, broadcast(-0.693359375f), x));
    Vector p = broadcast(1.9875691500e-4f);
    p = fused(p, r, broadcast(1.3981999507e-3f));
    p = fused(p, r, broadcast(8.3334519073e-3f));
    p = fused(p, r, broadcast(4.1665795894e-2f));
    p = fused(p, r, broadcast(1.6666665459e-1f));
    p = fused(p, r, broadcast(5.0000001201e-1f));
    const IntVector exponent = (reinterpret_cast<IntVector>(shifted) - (0x4B400000 - 127)) << 23;
    return {fused(p * r, r, r), reinterpret_cast<Vector>(exponent)};
}

inline Vector exp_clamped(Vector x) {
    const Exp e = split_exp(x);
    return (e.fraction + 1.0f) * e.scale;
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp_clamped(-x)); }

// Subtracting 1 from exp(x) would lose the digits of a small x.
inline Vector exp_minus_one(Vector x) {
    const Exp e = split_exp(x);
    return fused(e.fraction, e.scale, e.scale - 1.0f);
}

inline Vector tanh(Vector x) {
    const Vector y = exp_minus_one(2.0f * x);
    return y / (y + 2.0f);
}

inline Vector elu(Vector x) { return x > 0.0f ? x : exp_minus_one(x); }

// Applies f to whole vectors, and to the rest through a padded copy.
template <class F>
inline void map(const float* x, float* y, int64_t n, F f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
    if (i < n) {
        float padded[kLanes] = {};
        std::memcpy(padded, x + i, (n - i) * sizeof(float));
        store(padded, f(load(padded)));
        std::memcpy(y + i, padded, (n - i) * sizeof(float));
    }
}

template <class F>
inline void map(const float* a, const float* b, float* y, int64_t n, F f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(a + i), load(b + i)));
    if (i < n) {
        float first[kLanes] = {}, second[kLanes] = {};
        std::memcpy(first, a + i, (n - i) * sizeof(float));
        std::memcpy(second, b + i, (n - i) * sizeof(float));
        store(first, f(load(first), load(second)));
        std::memcpy(y + i, first, (n - i) * sizeof(float));
    }
}

void apply_elu(const float* x, float* y, int64_t n) {
    map(x, y, n, [](Vector v) { return elu(v); });
}
void apply_elu_negated(const float* x, float* y, int64_t n) {
    map(x, y, n, [](Vector v) { return elu(-v); });
}
void apply_relu(const float* x, float* y, int64_t n) {
    map(x, y, n, [](Vector v) { return v < 0.0f ? Vector{} : v; });  // keeps NaN
}
void apply_add(const float* a, const float* b, float* y, int64_t n) {
    map(a, b, y, n, [](Vector u, Vector v) { return u + v; });
}
void apply_glu(const float* a, const float* b, float* y, int64_t n) {
    map(a, b, y, n, [](Vector u, Vector v) { return u * sigmoid(v); });
}
void apply_tanh(const float* a, const float* b, float* y, int64_t n) {
    map(a, b, y, n, [](Vector u, Vector v) { return tanh(u) * sigmoid(v); });
}

}  // namespace
}  // namespace fastvq::cpu
