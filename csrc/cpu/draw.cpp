#include "cpu/draw.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

namespace fastvq::cpu {
namespace {

// exp(x) for x <= 0 (also -inf) within 2 units in the last place; 0 where the result would be subnormal. Own code,
// because it vectorises on every compiler and gives the same bits with every C library. Polynomial: Cephes expf.
inline float exp_nonpositive(float x) {
    constexpr float kLowest = -87.0f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    const float clamped = x < kLowest ? kLowest : x;
    const float shifted = clamped * 1.44269504088896341f + kRound;
    const float n = shifted - kRound;
    // log(2) in two parts, the first short enough for n times it to be exact.
    const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = (p * r) * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
    float scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return x < kLowest ? 0.0f : y * scale;
}

// The largest logit, or a NaN when the row holds a NaN or +inf.
inline float checked_max(const float* logits, int64_t count) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float largest = -kInfinity;
    int32_t bad = 0;
    for (int64_t k = 0; k < count; ++k) {
        bad |= !(logits[k] < kInfinity);
        largest = logits[k] > largest ? logits[k] : largest;
    }
    return bad ? std::numeric_limits<float>::quiet_NaN() : largest;
}

// Sets the weights of codes left out by top-k and top-p to 0. Codes rank by logit, the lower index first among equals.
void filter(const float* logits, int64_t count, const DrawOptions& options, DrawScratch& scratch) {
    float* weights = scratch.weights.data();
    int32_t* order = scratch.order.data();
    std::iota(order, order + count, 0);
    const auto before = [logits](int32_t a, int32_t b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    };
    int64_t kept = options.top_k;
    if (kept < count) {
        std::nth_element(order, order + kept, order + count, before);
    }
    if (options.top_p < 1.0f) {
        std::sort(order, order + kept, before);
        double total = 0.0;
        for (int64_t rank = 0; rank < kept; ++rank) total += weights[order[rank]];
        const float threshold = options.top_p * static_cast<float>(total);
        double sum = weights[order[0]];
        int64_t rank = 1;
        while (rank < kept && static_cast<float>(sum) < threshold) sum += weights[order[rank++]];
        kept = rank;
    }
    for (int64_t rank = kept; rank < count; ++rank) weights[order[rank]] = 0.0f;
}

}  // namespace

int64_t draw_rows(const float* logits, const float* uniforms, int64_t rows, int64_t num_codes,
                  const DrawOptions& options, DrawScratch& scratch, int64_t* tokens) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const bool filtered = options.top_k < num_codes || options.top_p < 1.0f;
    // A copy, because a weight written through a float pointer might be the option as far as the compiler knows.
    const float temperature = options.temperature;
    float* weights = scratch.weights.data();
    for (int64_t row = 0; row < rows; ++row, logits += num_codes) {
        const float u = uniforms[row];
        const float largest = checked_max(logits, num_codes);
        if (!(u >= 0.0f && u < 1.0f) || !(largest > -kInfinity)) return row;
        for (int64_t k = 0; k < num_codes; ++k) {
            weights[k] = exp_nonpositive((logits[k] - largest) / temperature);
        }
        if (filtered) filter(logits, num_codes, options, scratch);

        double total = 0.0;
        for (int64_t k = 0; k < num_codes; ++k) total += weights[k];
        const float target = u * static_cast<float>(total);
        // The total is at least 1, the weight of the largest logit, and u is at most 1 - 2^-24, so the product rounds
        // below it and the loop ends inside the row.
        double sum = weights[0];
        int64_t token = 0;
        while (static_cast<float>(sum) <= target) sum += weights[++token];
        tokens[row] = token;
    }
    return -1;
}

}  // namespace fastvq::cpu
