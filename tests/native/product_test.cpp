// Products that are summed in a fixed order, on arrays of exactly their size, against one multiply-add after the other.
#include "cpu/product.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A volatile product is rounded before it is added, whatever the compiler would fuse.
float multiply_add(float a, float b, float sum, bool fused) {
    if (fused) return std::fma(a, b, sum);
    volatile float product = a * b;
    return product + sum;
}

// One history of samples [rows][columns][channels], whose windows of `rows` x `taps` are one factor of the product.
struct Input {
    int64_t rows, taps, channels;
    int64_t gap;  // floats between columns that belong to nobody
    std::vector<float> data;

    int64_t column_stride() const { return channels + gap; }
    int64_t row_stride(int64_t width) const { return (width + taps - 1) * column_stride(); }
    int64_t depth() const { return rows * taps * channels; }
};

enum class Start { kNone, kBias, kSamples, kOut };

struct Problem {
    int64_t samples, width, columns;
    int64_t out_gap;
    Start start_kind;
    std::vector<Input> inputs;
    std::vector<float> weights, start;
    int64_t depth = 0;

    int64_t out_stride() const { return columns + out_gap; }

    Strided<const float> strided_start(const float* out) const {
        switch (start_kind) {
            case Start::kBias:
                return {start.data(), 0, 0};
            case Start::kSamples:
                return {start.data(), columns, 0};
            case Start::kOut:
                return {out, width * out_stride(), out_stride()};
            default:
                return {};
        }
    }

    // What lies between rows of the output is NaN before, and has to be after.
    std::vector<float> fresh_out() const {
        std::vector<float> out(samples * width * out_stride(), kNaN);
        if (start_kind != Start::kOut) return out;
        for (int64_t m = 0; m < samples * width; ++m) {
            std::memcpy(out.data() + m * out_stride(), start.data() + m * columns, columns * sizeof(float));
        }
        return out;
    }

    // Samples `first` to `last` alone.
    std::vector<float> solve(const PackedProduct& product, int64_t first, int64_t last, int64_t threads) const {
        std::vector<float> out = fresh_out();
        ProductTask task{};
        task.samples = last - first;
        task.width = width;
        for (const Input& input : inputs) {
            const int64_t row_stride = input.row_stride(width), sample_stride = input.rows * row_stride;
            for (int64_t row = 0; row < input.rows; ++row) {
                const float* data = input.data.data() + first * sample_stride + row * row_stride;
                for (int64_t tap = 0; tap < (input.gap == 0 ? 1 : input.taps); ++tap) {
                    task.runs.push_back({{data + tap * input.column_stride(), sample_stride, input.column_stride()},
                                         (input.gap == 0 ? input.taps : 1) * input.channels});
                }
            }
        }
        task.start = strided_start(out.data());
        if (task.start.data != nullptr) task.start.data += first * task.start.sample_stride;
        task.out = {out.data() + first * width * out_stride(), width * out_stride(), out_stride()};
        product.run(task, threads);
        return out;
    }

    std::vector<float> expected(bool fused) const {
        std::vector<float> out = fresh_out();
        const std::vector<float> before = out;
        const Strided<const float> from = strided_start(before.data());
        for (int64_t m = 0; m < samples * width; ++m) {
            const int64_t sample = m / width, position = m % width;
            for (int64_t n = 0; n < columns; ++n) {
                float sum = from.data == nullptr ? 0.0f : from.at(sample, position)[n];
                const float* weight = weights.data() + n;
                for (const Input& input : inputs) {
                    for (int64_t row = 0; row < input.rows; ++row) {
                        const float* x = input.data.data() +
                                         (sample * input.rows + row) * input.row_stride(width) +
                                         position * input.column_stride();
                        for (int64_t k = 0; k < input.taps * input.channels; ++k, weight += columns) {
                            const float value = x[k / input.channels * input.column_stride() + k % input.channels];
                            sum = multiply_add(value, *weight, sum, fused);
                        }
                    }
                }
                out[m * out_stride() + n] = sum;
            }
        }
        return out;
    }
};

bool same_bits(const float* a, const float* b, int64_t count) {
    return count == 0 || std::memcmp(a, b, count * sizeof(float)) == 0;
}

Problem make_problem(int64_t samples, int64_t width, int64_t columns, std::vector<Input> inputs, Start start,
                     Random& random) {
    Problem p{samples, width, columns, random.below(3), start, std::move(inputs), {}, {}};
    for (Input& input : p.inputs) {
        input.gap = random.chance(30) ? 1 + random.below(3) : 0;
        input.data.assign(samples * input.rows * input.row_stride(width), kNaN);
        for (size_t i = 0; i < input.data.size(); ++i) {
            if (static_cast<int64_t>(i) % input.column_stride() < input.channels) input.data[i] = random.symmetric(2.0f);
        }
        p.depth += input.depth();
    }
    p.weights.resize(p.depth * columns);
    for (float& w : p.weights) w = random.symmetric(1.0f);
    p.start.resize(samples * width * columns);
    for (float& s : p.start) s = random.symmetric(3.0f);
    return p;
}

void check_problem(const Problem& p, const Kernels& kernels) {
    const PackedProduct product(p.weights.data(), p.depth, p.columns, kernels);
    const std::vector<float> expected = p.expected(product.fused()), all = p.solve(product, 0, p.samples, 1);
    const int64_t per_sample = p.width * p.out_stride();
    expect(same_bits(all.data(), expected.data(), p.samples * per_sample), p.samples, " samples of ", p.width, " x ",
           p.depth, " x ", p.columns, ": other bits than one after the other");
    for (int64_t threads : {2, 3, 7}) {
        const std::vector<float> again = p.solve(product, 0, p.samples, threads);
        expect(same_bits(again.data(), all.data(), p.samples * per_sample), "other bits with ", threads, " threads");
    }
    for (int64_t sample = 0; sample < p.samples; ++sample) {
        const std::vector<float> alone = p.solve(product, sample, sample + 1, 1);
        expect(same_bits(alone.data() + sample * per_sample, all.data() + sample * per_sample, per_sample),
               "other bits of sample ", sample, " alone");
    }
}

}  // namespace

void test_product(const Kernels& kernels) {
    Random random(3);
    const std::vector<Start> starts = {Start::kNone, Start::kBias, Start::kSamples, Start::kOut};
    const auto any_start = [&] { return random.pick(starts); };
    const auto input = [&](int64_t rows, int64_t taps, int64_t channels) { return Input{rows, taps, channels, 0, {}}; };
    // Every number of rows, each of them alone as well, and of columns around those of panels.
    for (int64_t rows = 1; rows <= 70; ++rows) {
        const int64_t columns = 1 + random.below(70);
        check_problem(make_problem(rows, 1, columns, {input(1, 1, 1 + random.below(40))}, any_start(), random), kernels);
    }
    // Windows over several histories.
    for (int i = 0; i < 40; ++i) {
        std::vector<Input> inputs;
        for (int64_t n = 1 + random.below(3); n > 0; --n) {
            inputs.push_back(input(1 + random.below(4), 1 + random.below(5), 1 + random.below(20)));
        }
        check_problem(make_problem(random.below(5), 1 + random.below(20), 1 + random.below(70), inputs, any_start(), random),
                      kernels);
    }
    // Enough for several threads in both directions, and for sums that are put down and taken up again.
    for (Start start : starts) {
        check_problem(make_problem(3, 47, 70, {input(2, 3, 150), input(1, 1, 301)}, start, random), kernels);
        check_problem(make_problem(1, 13, 161, {input(1, 1, 2113)}, start, random), kernels);
        check_problem(make_problem(5, 61, 7, {input(3, 5, 100)}, start, random), kernels);
    }
}

void test_products_agree(const std::vector<const Kernels*>& all) {
    Random random(4);
    for (int i = 0; i < 3; ++i) {
        std::vector<Input> inputs = {{2, 3, 150, 0, {}}, {1, 1, 301, 0, {}}};
        const Problem p = make_problem(2, 19, 70, std::move(inputs), Start::kBias, random);
        std::vector<float> results[2];  // fused and not
        for (const Kernels* kernels : all) {
            const PackedProduct product(p.weights.data(), p.depth, p.columns, *kernels);
            const std::vector<float> out = p.solve(product, 0, p.samples, 1);
            std::vector<float>& result = results[product.fused()];
            if (!result.empty()) {
                expect(same_bits(out.data(), result.data(), out.size()), "other bits on ", kernels->name);
            }
            result = out;
        }
    }
}

}  // namespace fastvq::cpu::testing
