// Nearest codes and their statistics, on arrays of exactly their size, against sums in double.
#include "cpu/nearest.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/ema.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Result {
    std::vector<int64_t> indices, counts;
    std::vector<float> sums;
    float squared_error = kNaN;

    bool operator==(const Result& other) const {
        return indices == other.indices && counts == other.counts && sums == other.sums &&
               std::memcmp(&squared_error, &other.squared_error, sizeof(float)) == 0;
    }
};

struct Problem {
    int64_t rows, stride, depth, num_codes;
    Element element;
    std::vector<float> values;    // of x, as read back from its elements
    std::vector<float> floats;    // x as float
    std::vector<uint16_t> words;  // x as bfloat16 or float16
    std::vector<float> codebook;
    std::vector<uint8_t> mask;

    Result solve(int64_t threads, const Kernels& kernels, bool statistics) const {
        Result r{std::vector<int64_t>(rows, -7), std::vector<int64_t>(num_codes, -7),
                 std::vector<float>(num_codes * depth, kNaN)};
        NearestTask task{};
        task.x = element == Element::kFloat32 ? static_cast<const void*>(floats.data()) : words.data();
        task.element = element;
        task.rows = rows;
        task.stride = stride;
        task.depth = depth;
        task.codebook = codebook.data();
        task.num_codes = num_codes;
        task.indices = r.indices.data();
        if (statistics) {
            task.mask = mask.empty() ? nullptr : mask.data();
            task.counts = r.counts.data();
            task.sums = r.sums.data();
            task.squared_error = &r.squared_error;
        }
        nearest_codes(task, threads, kernels);
        return r;
    }

    double squared_distance(int64_t n, int64_t k) const {
        double total = 0.0;
        for (int64_t d = 0; d < depth; ++d) {
            const double gap = static_cast<double>(values[n * depth + d]) - codebook[k * depth + d];
            total += gap * gap;
        }
        return total;
    }
};

// Quarters up to 8 are exact in every element type.
enum class Size { kSmall, kLarge, kLong };

Problem random_problem(Size size_class, Random& random) {
    const bool large = size_class == Size::kLarge, tall = size_class == Size::kLong;
    Problem p{};
    p.rows = tall ? 33000 + random.below(3000) : large ? 2000 : random.below(150);
    p.depth = tall ? 1 + random.below(20) : large ? 60 : 1 + random.below(70);
    p.num_codes = tall ? 1 + random.below(9) : large ? 150 : 1 + random.below(90);
    p.stride = p.depth + random.below(3);
    p.element = random.pick<Element>({Element::kFloat32, Element::kBFloat16, Element::kFloat16});
    const int64_t size = p.rows > 0 ? (p.rows - 1) * p.stride + p.depth : 0;
    (p.element == Element::kFloat32 ? p.floats.resize(size, kNaN) : p.words.resize(size, 0x7FFF));
    p.values.resize(p.rows * p.depth);
    for (int64_t n = 0; n < p.rows; ++n) {
        for (int64_t d = 0; d < p.depth; ++d) {
            const float value = static_cast<float>(random.below(65) - 32) / 4.0f;
            p.values[n * p.depth + d] = value;
            if (p.element == Element::kFloat32) {
                p.floats[n * p.stride + d] = value;
                continue;
            }
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof(bits));
            const uint32_t half = value == 0.0f ? 0 : ((bits >> 16) & 0x8000) | (((bits & 0x7FFFFFFF) - 0x38000000) >> 13);
            p.words[n * p.stride + d] = static_cast<uint16_t>(p.element == Element::kBFloat16 ? bits >> 16 : half);
        }
    }
    p.codebook.resize(p.num_codes * p.depth);
    for (float& c : p.codebook) c = random.symmetric(8.0f);
    const int far = random.pick<int>({0, 0, 5, 50});  // in percent
    for (int64_t k = 0; k < p.num_codes; ++k) {
        if (!random.chance(far)) continue;
        for (int64_t d = 0; d < p.depth; ++d) p.codebook[k * p.depth + d] *= 1e5f;
    }
    if (random.chance(50)) {
        p.mask.resize(p.rows);
        for (uint8_t& m : p.mask) m = random.chance(70);
    }
    return p;
}

void check_problem(const Problem& p, const Kernels& kernels) {
    const Result result = p.solve(1, kernels, true);
    std::vector<int64_t> counts(p.num_codes);
    std::vector<double> sums(p.num_codes * p.depth), lengths(p.num_codes);
    for (int64_t k = 0; k < p.num_codes; ++k) {
        for (int64_t d = 0; d < p.depth; ++d) lengths[k] += std::pow(p.codebook[k * p.depth + d], 2.0);
        lengths[k] = std::sqrt(lengths[k]);
    }
    double error = 0.0;
    for (int64_t n = 0; n < p.rows; ++n) {
        const int64_t found = result.indices[n];
        expect(found >= 0 && found < p.num_codes, "index ", found, " of ", p.num_codes);
        const double distance = p.squared_distance(n, found);
        double least = std::numeric_limits<double>::infinity(), length = 0.0;
        int64_t nearest = 0;
        for (int64_t k = 0; k < p.num_codes; ++k) {
            const double other = p.squared_distance(n, k);
            if (other < least) {
                least = other;
                nearest = k;
            }
        }
        for (int64_t d = 0; d < p.depth; ++d) length += std::pow(p.values[n * p.depth + d], 2.0);
        const double longer = std::max(lengths[found], lengths[nearest]);
        const double bound = 16 * 0x1p-24 * std::pow(std::sqrt(length) + longer, 2.0);
        expect(distance - least <= bound, "vector ", n, ": ", distance, " instead of ", least);
        if (!p.mask.empty() && !p.mask[n]) continue;
        ++counts[found];
        error += distance;
        for (int64_t d = 0; d < p.depth; ++d) sums[found * p.depth + d] += p.values[n * p.depth + d];
    }
    expect(result.counts == counts, "counts differ");
    for (size_t i = 0; i < sums.size(); ++i) {
        expect(result.sums[i] == static_cast<float>(sums[i]), "sum ", result.sums[i], " instead of ", sums[i]);
    }
    expect(std::abs(result.squared_error - error) <= 1e-5 * error, "error ", result.squared_error, " not ", error);
    for (int64_t threads : {2, 3, 5}) {
        expect(p.solve(threads, kernels, true) == result, "other results with ", threads, " threads");
        expect(p.solve(threads, kernels, false).indices == result.indices, "other indices without statistics");
    }
}

// The averages that statistics move, with some codes that have no vector.
void check_ema(int64_t num_codes, int64_t depth, bool whole, double decay, Random& random) {
    std::vector<int64_t> counts(num_codes);
    for (int64_t& count : counts) count = random.chance(30) ? 0 : random.below(50);
    counts[0] = 3;
    const std::vector<float> float_counts(counts.begin(), counts.end());
    std::vector<float> sums(num_codes * depth), size(num_codes), total(num_codes * depth);
    for (float& s : sums) s = random.symmetric(9.0f);
    for (float& n : size) n = random.uniform() + 0.5f;
    for (float& m : total) m = random.symmetric(2.0f);
    std::vector<std::vector<float>> results;
    for (int64_t threads : {1, 2, 3}) {
        std::vector<float> n = size, m = total, e(num_codes * depth, kNaN);
        EmaTask task{};
        task.counts = whole ? counts.data() : nullptr;
        task.float_counts = whole ? nullptr : float_counts.data();
        task.sums = sums.data();
        task.num_codes = num_codes;
        task.depth = depth;
        task.cluster_size = n.data();
        task.embedding_sum = m.data();
        task.embedding = e.data();
        task.decay = decay;
        task.eps = 1e-3;
        task.skip_unusable = true;
        ema_update(task, threads);
        double all = 0.0;
        for (float one : n) all += one;
        for (int64_t k = 0; k < num_codes; ++k) {
            const double smoothed = (n[k] + 1e-3) / (all + num_codes * 1e-3) * all;
            expect(std::abs(n[k] - (decay * size[k] + (1 - decay) * counts[k])) <= 1e-5, "size of code ", k);
            for (int64_t i = k * depth; i < (k + 1) * depth; ++i) {
                expect(std::abs(m[i] - (decay * total[i] + (1 - decay) * sums[i])) <= 1e-5, "sum ", i);
                expect(std::abs(e[i] * smoothed - m[i]) <= 1e-5, "code ", k, ": ", e[i]);
            }
        }
        const std::vector<float> moved_size = n, moved = m, codes = e;
        const float kept = std::exchange(sums.back(), kNaN);
        ema_update(task, threads);
        sums.back() = kept;
        expect(n == moved_size && m == moved && e == codes, "moved by sums that are not finite");
        if (!results.empty()) expect(results.back() == e, "other codes with ", threads, " threads");
        results.push_back(e);
    }
}

}  // namespace

void test_nearest(const Kernels& kernels) {
    Random random(5);
    for (int i = 0; i < 60; ++i) check_problem(random_problem(Size::kSmall, random), kernels);
    // Enough work for several threads, and enough vectors to be added up in parts.
    for (Size size : {Size::kLarge, Size::kLong}) {
        for (int i = 0; i < 3; ++i) check_problem(random_problem(size, random), kernels);
    }
    for (double decay : {0.0, 0.9, 1.0}) {
        check_ema(1 + random.below(40), 1 + random.below(20), random.chance(50), decay, random);
        check_ema(4099, 67, random.chance(50), decay, random);
    }
}

}  // namespace fastvq::cpu::testing
