// Codes of several levels in one pass, on arrays of exactly their size, against the levels one after the other.
#include "cpu/residual.h"

#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/nearest.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Result {
    std::vector<int64_t> indices, counts;
    std::vector<float> quantized, sums, squared_errors;
};

void expect_same(const Result& a, const Result& b, const char* what) {
    const auto same = [](const std::vector<float>& x, const std::vector<float>& y) {
        return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
    };
    expect(a.indices == b.indices, what, ": other indices");
    expect(same(a.quantized, b.quantized), what, ": another sum of codes");
    expect(a.counts == b.counts, what, ": other counts");
    expect(same(a.sums, b.sums), what, ": other sums");
    expect(same(a.squared_errors, b.squared_errors), what, ": other errors");
}

struct Problem {
    int64_t rows, stride, depth, levels, num_codes;
    bool shared;
    std::vector<float> x, codebooks;
    std::vector<int64_t> depths;

    const float* codebook(int64_t level) const { return codebooks.data() + (shared ? 0 : level * num_codes * depth); }
    bool takes_part(int64_t n, int64_t level) const { return depths.empty() || level < depths[n]; }

    Result empty() const {
        return {std::vector<int64_t>(rows * levels, -7), std::vector<int64_t>(levels * num_codes, -7),
                std::vector<float>(rows * depth, kNaN), std::vector<float>(levels * num_codes * depth, kNaN),
                std::vector<float>(levels, kNaN)};
    }

    Result solve(int64_t threads, const Kernels& kernels, bool statistics) const {
        Result r = empty();
        ResidualTask task{};
        task.x = x.data();
        task.rows = rows;
        task.stride = stride;
        task.depth = depth;
        task.codebooks = codebooks.data();
        task.codebook_stride = shared ? 0 : num_codes * depth;
        task.levels = levels;
        task.num_codes = num_codes;
        task.depths = depths.empty() ? nullptr : depths.data();
        task.indices = r.indices.data();
        task.quantized = r.quantized.data();
        if (statistics) {
            task.counts = r.counts.data();
            task.sums = r.sums.data();
            task.squared_errors = r.squared_errors.data();
        }
        residual_codes(task, threads, kernels);
        return r;
    }

    Result levels_in_turn(const Kernels& kernels) const {
        Result r = empty();
        std::vector<float> residual(rows * depth);
        for (int64_t n = 0; n < rows; ++n) {
            std::memcpy(residual.data() + n * depth, x.data() + n * stride, depth * sizeof(float));
        }
        r.quantized.assign(rows * depth, 0.0f);
        for (int64_t level = 0; level < levels; ++level) {
            std::vector<int64_t> indices(rows, -7);
            std::vector<uint8_t> mask(rows);
            for (int64_t n = 0; n < rows; ++n) mask[n] = takes_part(n, level);
            NearestTask task{};
            task.x = residual.data();
            task.element = Element::kFloat32;
            task.rows = rows;
            task.stride = depth;
            task.depth = depth;
            task.codebook = codebook(level);
            task.num_codes = num_codes;
            task.indices = indices.data();
            task.mask = depths.empty() ? nullptr : mask.data();
            task.counts = r.counts.data() + level * num_codes;
            task.sums = r.sums.data() + level * num_codes * depth;
            task.squared_error = r.squared_errors.data() + level;
            nearest_codes(task, 1, kernels);
            for (int64_t n = 0; n < rows; ++n) {
                r.indices[n * levels + level] = mask[n] ? indices[n] : -1;
                if (!mask[n]) continue;
                for (int64_t d = 0; d < depth; ++d) {
                    const float code = codebook(level)[indices[n] * depth + d];
                    r.quantized[n * depth + d] += code;
                    residual[n * depth + d] -= code;
                }
            }
        }
        return r;
    }
};

enum class Size { kSmall, kLarge, kLong };

Problem random_problem(Size size, Random& random) {
    const bool large = size == Size::kLarge, tall = size == Size::kLong;
    Problem p{};
    p.rows = tall ? 33000 + random.below(3000) : large ? 2000 : random.below(300);
    p.depth = tall ? 1 + random.below(20) : large ? 60 : 1 + random.below(70);
    p.levels = tall ? 2 : 1 + random.below(6);
    p.num_codes = tall ? 1 + random.below(9) : large ? 150 : 1 + random.below(90);
    p.stride = p.depth + random.below(3);
    p.shared = random.chance(30);
    p.x.resize(p.rows > 0 ? (p.rows - 1) * p.stride + p.depth : 0, kNaN);
    p.codebooks.resize((p.shared ? 1 : p.levels) * p.num_codes * p.depth);
    for (float& v : p.x) v = random.symmetric(8.0f);
    for (float& c : p.codebooks) c = random.symmetric(4.0f);
    // A vector and a code that are not finite.
    if (!p.x.empty() && random.chance(40)) p.x[random.below(p.x.size())] = kNaN;
    if (random.chance(40)) p.codebooks[random.below(p.codebooks.size())] = kNaN;
    if (random.chance(60)) {
        p.depths.resize(p.rows);
        const int64_t run = 1 + random.below(60);
        for (int64_t n = 0; n < p.rows; ++n) {
            p.depths[n] = n % run == 0 ? random.below(p.levels + 1) : p.depths[n - 1];
        }
    }
    return p;
}

}  // namespace

void test_residual(const Kernels& kernels) {
    Random random(7);
    for (int i = 0; i < 66; ++i) {
        // Enough work for several threads, and enough vectors to be added up in parts.
        const Problem p = random_problem(i < 60 ? Size::kSmall : i < 63 ? Size::kLarge : Size::kLong, random);
        const Result expected = p.levels_in_turn(kernels);
        for (int64_t threads : {1, 2, 3, 5}) {
            expect_same(p.solve(threads, kernels, true), expected, "statistics");
            const Result found = p.solve(threads, kernels, false);
            expect(found.indices == expected.indices, "other indices without statistics");
        }
    }
}

}  // namespace fastvq::cpu::testing
