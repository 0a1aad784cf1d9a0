// Attention of one query, for one instruction set: those with fused multiply-adds give the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/elementwise_impl.h"
#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace fastvq::cpu {
namespace {

// Of the weights, whatever the width of a vector.
constexpr int kPartialSums = 16;

inline float sum_of(const Vector (&partial)[kPartialSums / kLanes]) {
    float sums[kPartialSums];
    std::memcpy(sums, partial, sizeof(sums));
    for (int half = kPartialSums / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
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
            sum = fused(broadcast(a.query[d] * scale), load(a.keys + d * a.key_stride + j), sum);
        }
        store(a.scores + j, sum);
        // Rows of keys are padded to whole vectors; what lies behind the last position must not count.
        for (int64_t i = a.count - j; i < kLanes; ++i) a.scores[j + i] = -INFINITY;
        sum = load(a.scores + j);
        peaks = sum > peaks ? sum : peaks;
    }
    float largest = peaks[0];
    for (int i = 1; i < kLanes; ++i) largest = std::max(largest, peaks[i]);
    Vector totals[kPartialSums / kLanes] = {};
    for (int64_t j = 0; j < a.count; j += kLanes) {
        const Vector weight = exp_clamped(load(a.scores + j) - largest);
        store(a.scores + j, weight);
        totals[j / kLanes % (kPartialSums / kLanes)] += weight;
    }
    const float total = sum_of(totals);
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
            sums[j % 4] = fused(broadcast(a.scores[j]), v, sums[j % 4]);
        }
        const Vector sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * inverse;
        std::memcpy(a.out + e, &sum, width * sizeof(float));
    }
}

}  // namespace
}  // namespace fastvq::cpu
