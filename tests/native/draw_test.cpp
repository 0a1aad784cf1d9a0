// Draws against the definition in double precision, and their edge cases.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "cpu/draw.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLargestUniform = 1.0f - 0x1p-24f;
constexpr int64_t kUntouched = -7;

DrawOptions everything(int64_t num_codes) { return {1.0f, num_codes, 1.0f}; }

// Draws from one row, in memory of exactly its size.
int64_t draw_one(const std::vector<float>& logits, float uniform, DrawOptions options) {
    const int64_t num_codes = static_cast<int64_t>(logits.size());
    DrawScratch scratch(num_codes);
    const std::vector<float> uniforms(1, uniform);
    std::vector<int64_t> tokens(1, kUntouched);
    const int64_t bad = draw_rows(logits.data(), uniforms.data(), 1, num_codes, options, scratch, tokens.data());
    expect(bad == -1 || (bad == 0 && tokens[0] == kUntouched), "a row that cannot be drawn left a token");
    return tokens[0];
}

void expect_token(const std::vector<float>& logits, float uniform, DrawOptions options, int64_t token,
                  const char* what) {
    const int64_t drawn = draw_one(logits, uniform, options);
    expect(drawn == token, "draw, ", what, ": ", drawn, " instead of ", token);
}

// Whether the token is one that the definition allows, give or take rounding where codes meet.
bool allowed(const std::vector<float>& logits, float uniform, DrawOptions options, int64_t token) {
    constexpr double kMargin = 1e-5;
    const int64_t num_codes = static_cast<int64_t>(logits.size());
    std::vector<int64_t> order(num_codes);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
    std::vector<double> weights(num_codes);
    for (int64_t k = 0; k < num_codes; ++k) {
        weights[k] = std::exp((static_cast<double>(logits[k]) - logits[order[0]]) / options.temperature);
    }
    for (int64_t rank = options.top_k; rank < num_codes; ++rank) weights[order[rank]] = 0.0;
    const double before = std::accumulate(weights.begin(), weights.end(), 0.0);
    // The most likely codes whose share reaches top_p. Rounding may end that a code earlier or later.
    int64_t fewest = num_codes, most = num_codes;
    double sum = 0.0;
    for (int64_t rank = 0; rank < num_codes && options.top_p < 1.0f; ++rank) {
        sum += weights[order[rank]];
        if (fewest == num_codes && sum >= (options.top_p - kMargin) * before) fewest = rank + 1;
        if (sum >= (options.top_p + kMargin) * before) {
            most = rank + 1;
            break;
        }
    }
    for (int64_t kept = fewest; kept <= most; ++kept) {
        std::vector<double> chosen = weights;
        for (int64_t rank = kept; rank < num_codes; ++rank) chosen[order[rank]] = 0.0;
        const double total = std::accumulate(chosen.begin(), chosen.end(), 0.0);
        const double below = std::accumulate(chosen.begin(), chosen.begin() + token, 0.0);
        const double target = uniform * total, margin = kMargin * total;
        const bool meets = below - margin <= target && target <= below + chosen[token] + margin;
        if (chosen[token] > 0.0 && meets) return true;
    }
    return false;
}

void check_random_rows() {
    Random random(11);
    for (const int64_t num_codes : {1, 2, 3, 15, 16, 17, 100, 512}) {
        for (int repeat = 0; repeat < 60; ++repeat) {
            const float spread = random.pick<float>({0.0f, 1.0f, 8.0f, 60.0f});
            std::vector<float> logits(num_codes);
            for (float& logit : logits) {
                logit = random.symmetric(spread);
                if (random.chance(30)) logit = std::round(logit);  // codes of one rank
                if (random.chance(10)) logit = -kInfinity;
            }
            logits[random.below(num_codes)] = spread;
            DrawOptions options = everything(num_codes);
            if (random.chance(50)) options.temperature = 0.05f + 3.0f * random.uniform();
            if (random.chance(50)) options.top_k = 1 + random.below(num_codes);
            if (random.chance(50)) options.top_p = 1.0f - random.uniform();
            const float uniform = random.pick<float>({0.0f, kLargestUniform, random.uniform(), random.uniform()});
            const int64_t token = draw_one(logits, uniform, options);
            expect(token >= 0 && token < num_codes && allowed(logits, uniform, options, token), "draw: token ", token,
                   " of ", num_codes, " codes at ", uniform, ", top_k ", options.top_k, ", top_p ", options.top_p);
        }
    }
}

void check_edges() {
    const DrawOptions all = everything(3);
    expect_token({5.0f}, kLargestUniform, everything(1), 0, "one code");
    expect_token({0.0f, 0.0f, 0.0f}, 0.0f, all, 0, "lowest number");
    expect_token({0.0f, 0.0f, 0.0f}, kLargestUniform, all, 2, "highest number");
    expect_token({-kInfinity, 0.0f, -kInfinity}, 0.0f, all, 1, "impossible codes at the lowest number");
    expect_token({-kInfinity, 0.0f, -kInfinity}, kLargestUniform, all, 1, "impossible codes at the highest number");
    expect_token({-3e38f, 3e38f, 0.0f}, 0.5f, all, 1, "differences beyond float32");
    expect_token({-1000.0f, 0.0f, -1000.0f}, 0.0f, all, 1, "weights that underflow");
    expect_token({1.0f, 1.0f + 0x1p-23f, 1.0f}, 0.0f, {1e-37f, 3, 1.0f}, 1, "lowest temperature");
    expect_token({-30.0f, 30.0f, 0.0f}, 0.9f, {1e38f, 3, 1.0f}, 2, "highest temperature");
    expect_token({1.0f, 1.0f, 1.0f}, kLargestUniform, {1.0f, 1, 1.0f}, 0, "top-k among equals");
    expect_token({0.0f, 1.0f, 1.0f}, 0.0f, {1.0f, 2, 1.0f}, 1, "top-k");
    expect_token({1.0f, 1.0f, 1.0f}, kLargestUniform, {1.0f, 3, 1e-30f}, 0, "top-p among equals");
    expect_token({0.0f, 9.0f, 1.0f}, 0.0f, {1.0f, 3, 0.5f}, 1, "top-p");
    expect_token({0.0f, -kInfinity, -kInfinity}, 0.5f, {1.0f, 2, 0.5f}, 0, "top-k among impossible codes");
    for (const float bad : {kNaN, kInfinity}) {
        for (const int64_t place : {0, 1, 2}) {
            std::vector<float> logits = {0.0f, 1.0f, 2.0f};
            logits[place] = bad;
            expect_token(logits, 0.5f, all, kUntouched, "logit that is not finite");
        }
    }
    expect_token({-kInfinity, -kInfinity, -kInfinity}, 0.5f, all, kUntouched, "nothing possible");
    for (const float bad : {1.0f, -0x1p-24f, 2.0f, kNaN, kInfinity, -kInfinity}) {
        expect_token({0.0f, 0.0f, 0.0f}, bad, all, kUntouched, "number outside [0, 1)");
    }
}

void check_several_rows() {
    const std::vector<float> logits = {0.0f, 9.0f, 9.0f, 0.0f, 0.0f, kNaN, 0.0f, 0.0f};
    const std::vector<float> uniforms = {0.5f, 0.5f, 0.5f, 0.5f};
    std::vector<int64_t> tokens(4, kUntouched);
    DrawScratch scratch(2);
    const auto draw = [&](int64_t rows) {
        return draw_rows(logits.data(), uniforms.data(), rows, 2, everything(2), scratch, tokens.data());
    };
    expect(draw(0) == -1 && tokens[0] == kUntouched, "draw: no rows");
    expect(draw(4) == 2, "draw: the row that cannot be drawn");
    expect(tokens == std::vector<int64_t>({1, 0, kUntouched, kUntouched}), "draw: tokens around a bad row");
}

}  // namespace

void test_draw() {
    check_edges();
    check_several_rows();
    check_random_rows();
}

}  // namespace fastvq::cpu::testing
