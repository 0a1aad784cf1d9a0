// The kernels one by one, on arrays of exactly their size and at the edges of the number range.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "reference.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
const std::vector<float> kEdges = {0.0f,   -0.0f,   1e-40f, -1e-40f, 1e-8f, -1e-8f, 87.0f,  -87.0f,
                                   88.5f,  -88.5f,  104.0f, -104.0f, 1e4f,  -1e4f,  3e38f,  -3e38f,
                                   kInfinity, -kInfinity, kNaN};

// Usual values, and at times an edge.
std::vector<float> random_values(int64_t count, Random& random) {
    std::vector<float> values(count);
    for (float& x : values) x = random.chance(15) ? random.pick(kEdges) : random.symmetric(10.0f);
    return values;
}

using Unary = void (*)(const float*, float*, int64_t);
using Binary = void (*)(const float*, const float*, float*, int64_t);

void check_unary(Unary kernel, Expected (*reference)(double), const char* name, int64_t count, Random& random) {
    const std::vector<float> x = random_values(count, random);
    std::vector<float> y(count);
    kernel(x.data(), y.data(), count);
    for (int64_t i = 0; i < count; ++i) expect_close(y[i], reference(x[i]), name);
}

void check_binary(Binary kernel, Expected (*reference)(double, double), const char* name, int64_t count,
                  Random& random) {
    const std::vector<float> a = random_values(count, random), b = random_values(count, random);
    std::vector<float> y(count);
    kernel(a.data(), b.data(), y.data(), count);
    for (int64_t i = 0; i < count; ++i) expect_close(y[i], reference(a[i], b[i]), name);
}

// Scores from 0 to far beyond what an exponential can hold, and caches whose unused part is poisoned.
void check_attend(const Kernels& kernels, int64_t count, Random& random) {
    const int64_t key_width = 1 + random.below(20), value_width = 1 + random.below(40);
    const int64_t key_stride = (count + 15) / 16 * 16;
    const float bound = random.pick<float>({0.0f, 1.0f, 30.0f});
    std::vector<float> query(key_width), keys(key_width * key_stride, kNaN), values(count * value_width);
    std::vector<float> scores(key_stride), out(value_width, kNaN);
    std::vector<double> exact_keys(count * key_width);
    for (float& x : query) x = random.symmetric(bound);
    for (float& x : values) x = random.symmetric(2.0f);
    for (int64_t d = 0; d < key_width; ++d) {
        for (int64_t j = 0; j < count; ++j) {
            exact_keys[j * key_width + d] = keys[d * key_stride + j] = random.symmetric(bound);
        }
    }
    Attend a{};
    a.query = query.data();
    a.keys = keys.data();
    a.key_stride = key_stride;
    a.values = values.data();
    a.value_stride = value_width;
    a.count = count;
    a.key_width = key_width;
    a.value_width = value_width;
    a.scores = scores.data();
    a.out = out.data();
    kernels.attend(a);
    std::vector<Expected> expected = attention({query.begin(), query.end()}, exact_keys,
                                               {values.begin(), values.end()}, count);
    expected.resize(value_width, {0.0, 0.0});
    for (int64_t e = 0; e < value_width; ++e) expect_close(out[e], expected[e], "attend");
}

}  // namespace

void test_kernels(const Kernels& kernels) {
    Random random(7);
    for (int64_t count = 0; count <= 50; ++count) {
        check_unary(kernels.elu, elu, "elu", count, random);
        check_unary(kernels.elu_negated, [](double x) { return elu(-x); }, "elu_negated", count, random);
        check_unary(kernels.relu, relu, "relu", count, random);
        check_binary(kernels.add, [](double a, double b) { return Expected{a + b, 0.0}; }, "add", count, random);
        check_binary(kernels.glu, glu, "glu", count, random);
        check_binary(kernels.tanh, gated_tanh, "tanh", count, random);
        for (int repeat = 0; repeat < 3; ++repeat) check_attend(kernels, count, random);
    }
}

}  // namespace fastvq::cpu::testing
