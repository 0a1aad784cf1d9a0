// Sets of kernels with fused multiply-adds against each other, bit by bit.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Of all magnitudes, and at times what is special.
std::vector<float> wide_values(int64_t count, Random& random) {
    static const std::vector<float> special = {0.0f,  -0.0f,  kInfinity, -kInfinity, kNaN,  1e-45f, -1e-40f,
                                               87.0f, -87.0f, 88.0f,     -88.0f,     3e38f, -3e38f, 1.0f};
    std::vector<float> values(count);
    for (float& x : values) {
        x = random.chance(10) ? random.pick(special) : std::ldexp(random.symmetric(1.0f), random.below(40) - 30);
    }
    return values;
}

// NaN is NaN, whatever it carries.
bool same(const std::vector<float>& a, const std::vector<float>& b) {
    for (size_t i = 0; i < a.size(); ++i) {
        const bool both = std::isnan(a[i]) && std::isnan(b[i]);
        if (!both && std::memcmp(&a[i], &b[i], sizeof(float)) != 0) return false;
    }
    return true;
}

void check_functions(const Kernels& one, const Kernels& other, int64_t count, Random& random) {
    const std::vector<float> a = wide_values(count, random), b = wide_values(count, random);
    std::vector<float> x(count), y(count);
    for (const auto function : {&Kernels::elu, &Kernels::elu_negated, &Kernels::relu}) {
        (one.*function)(a.data(), x.data(), count);
        (other.*function)(a.data(), y.data(), count);
        expect(same(x, y), "other bits of a function of one on ", other.name);
    }
    for (const auto function : {&Kernels::add, &Kernels::glu, &Kernels::tanh}) {
        (one.*function)(a.data(), b.data(), x.data(), count);
        (other.*function)(a.data(), b.data(), y.data(), count);
        expect(same(x, y), "other bits of a function of two on ", other.name);
    }
}

void check_attention(const Kernels& one, const Kernels& other, int64_t count, Random& random) {
    const int64_t key_width = 1 + random.below(40), value_width = 1 + random.below(40);
    const int64_t key_stride = (count + 15) / 16 * 16;
    std::vector<float> query(key_width), keys(key_width * key_stride), values(count * value_width);
    const float bound = random.pick<float>({0.1f, 1.0f, 10.0f});
    for (float& q : query) q = random.symmetric(bound);
    for (float& k : keys) k = random.symmetric(bound);
    for (float& v : values) v = random.symmetric(3.0f);
    const auto attended = [&](const Kernels& kernels) {
        std::vector<float> scores(key_stride), out(value_width, kNaN);
        kernels.attend({query.data(), keys.data(), key_stride, values.data(), value_width, count, key_width, value_width,
                        scores.data(), out.data()});
        return out;
    };
    expect(same(attended(one), attended(other)), "other bits of attention to ", count, " positions on ", other.name);
}

}  // namespace

void test_kernels_agree(const std::vector<const Kernels*>& all) {
    Random random(5);
    const Kernels* first = nullptr;
    for (const Kernels* kernels : all) {
        if (!kernels->gathered.fused) continue;
        if (first == nullptr) {
            first = kernels;
            continue;
        }
        for (int64_t count = 1; count <= 70; ++count) {
            for (int repeat = 0; repeat < 3; ++repeat) check_functions(*first, *kernels, count, random);
        }
        for (int64_t count = 1; count <= 100; ++count) {
            for (int repeat = 0; repeat < 5; ++repeat) check_attention(*first, *kernels, count, random);
        }
    }
}

}  // namespace fastvq::cpu::testing
