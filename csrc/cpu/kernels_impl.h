// Kernels of the step phase. Included by one source file per instruction set, each of which defines FASTVQ_LANES,
// FASTVQ_ROWS (rows of a register tile), FASTVQ_KERNELS and FASTVQ_NAME (the table's variable and name).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/nearest_impl.h"
#include "cpu/product_impl.h"
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
    const Vector shifted = x * 1.44269504088896341f + 12582912.0f;  // the integer part in the low bits
    const Vector n = shifted - 12582912.0f;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const IntVector exponent = (reinterpret_cast<IntVector>(shifted) - (0x4B400000 - 127)) << 23;
    return {(p * r) * r + r, reinterpret_cast<Vector>(exponent)};
}

inline Vector exp_clamped(Vector x) {
    const Exp e = split_exp(x);
    return (e.fraction + 1.0f) * e.scale;
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp_clamped(-x)); }

// Subtracting 1 from exp(x) would lose the digits of a small x.
inline Vector exp_minus_one(Vector x) {
    const Exp e = split_exp(x);
    return e.fraction * e.scale + (e.scale - 1.0f);
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

void attend(const Attend& a) {
    if (a.count == 0) {
        std::memset(a.out, 0, a.value_width * sizeof(float));
        return;
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.key_width));
    Vector peaks = broadcast(-INFINITY);
    for (int64_t j = 0; j < a.count; j += kLanes) {
        Vector sum = {};
        for (int64_t d = 0; d < a.key_width; ++d) {
            sum += broadcast(a.query[d] * scale) * load(a.keys + d * a.key_stride + j);
        }
        store(a.scores + j, sum);
        // Rows of keys are padded to whole vectors; what lies behind the last position must not count.
        for (int64_t i = a.count - j; i < kLanes; ++i) a.scores[j + i] = -INFINITY;
        sum = load(a.scores + j);
        peaks = sum > peaks ? sum : peaks;
    }
    float largest = peaks[0];
    for (int i = 1; i < kLanes; ++i) largest = std::max(largest, peaks[i]);
    Vector totals = {};
    for (int64_t j = 0; j < a.count; j += kLanes) {
        const Vector weight = exp_clamped(load(a.scores + j) - largest);
        store(a.scores + j, weight);
        totals += weight;
    }
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += totals[i];
    const float inverse = 1.0f / total;
    for (int64_t e = 0; e < a.value_width; e += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, a.value_width - e);
        const float* values = a.values + e;
        Vector sums[4] = {};  // four chains, because one addition waits for the last
        for (int64_t j = 0; j < a.count; ++j, values += a.value_stride) {
            Vector v = {};
            if (width == kLanes) {
                v = load(values);
            } else {
                std::memcpy(&v, values, width * sizeof(float));
            }
            sums[j % 4] += broadcast(a.scores[j]) * v;
        }
        const Vector sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * inverse;
        std::memcpy(a.out + e, &sum, width * sizeof(float));
    }
}

}  // namespace

extern const Kernels FASTVQ_KERNELS;
const Kernels FASTVQ_KERNELS = {FASTVQ_NAME, apply_elu,  apply_elu_negated, apply_relu,
                                apply_add,   apply_glu,  apply_tanh, attend,            kNearestKernels,
                                kProductKernels};

}  // namespace fastvq::cpu
