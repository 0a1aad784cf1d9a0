#include "cpu/draw.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "draw_exp.h"

namespace fastvq::cpu {
namespace {

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
            weights[k] = draw_weight(logits[k], largest, temperature);
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
