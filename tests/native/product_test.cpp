// Products that are summed in a fixed order, on arrays of exactly their size, against one multiply-add after the other.
#include "cpu/product.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "reference.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// One history of samples [rows][places + taps - 1][channels], whose windows of `rows` x `taps` are one factor of the
// product.
struct Input {
    int64_t rows, taps, channels;
    int64_t gap = 0;  // floats between columns that belong to nobody
    std::vector<float> data{};
    std::vector<int64_t> places{};

    int64_t column_stride() const { return channels + gap; }
    int64_t row_stride() const { return (static_cast<int64_t>(places.size()) + taps - 1) * column_stride(); }
    int64_t depth() const { return rows * taps * channels; }
};

enum class Start { kNone, kBias, kSamples, kOut };

struct Problem {
    int64_t samples, width, parts, columns;
    Start start_kind;
    bool bf16;
    std::vector<Input> inputs;
    std::vector<int32_t> order;           // some of twice as many places
    std::vector<int64_t> out_places;      // with gaps between them
    std::vector<std::vector<float>> weights;  // of each input
    std::vector<float> start;
    int64_t depth = 0;

    int64_t num_places() const { return 2 * width; }
    int64_t out_size() const { return out_places.back() + columns; }

    Placed<const float> placed_start(const float* out) const {
        switch (start_kind) {
            case Start::kBias:
                return {start.data(), 0, nullptr};
            case Start::kSamples:
                return {start.data(), columns, nullptr};
            case Start::kOut:
                return {out, out_size(), out_places.data()};
            default:
                return {};
        }
    }

    // What lies between rows of the output is NaN before, and has to be after.
    std::vector<float> fresh_out() const {
        std::vector<float> out(samples * out_size(), kNaN);
        if (start_kind != Start::kOut) return out;
        for (int64_t m = 0; m < samples * width; ++m) {
            float* to = out.data() + m / width * out_size() + out_places[order[m % width]];
            std::memcpy(to, start.data() + m * columns, columns * sizeof(float));
        }
        return out;
    }

    PackedProduct pack(const Kernels& kernels) const {
        std::vector<PackedProduct::Matrix> matrices;
        for (std::size_t i = 0; i < inputs.size(); ++i) matrices.push_back({weights[i].data(), inputs[i].depth()});
        return PackedProduct(matrices, columns, parts, bf16, kernels);
    }

    // Samples `first` to `last` alone, by a call of solve(task).
    template <class Solve>
    std::vector<float> solve_by(int64_t first, int64_t last, const Solve& solve) const {
        std::vector<float> out = fresh_out();
        std::vector<Run> runs;
        for (const Input& input : inputs) {
            const int64_t sample_stride = input.rows * input.row_stride();
            for (int64_t row = 0; row < input.rows; ++row) {
                const float* data = input.data.data() + first * sample_stride + row * input.row_stride();
                for (int64_t tap = 0; tap < (input.gap == 0 ? 1 : input.taps); ++tap) {
                    runs.push_back({{data + tap * input.column_stride(), sample_stride, input.places.data()},
                                    (input.gap == 0 ? input.taps : 1) * input.channels});
                }
            }
        }
        ProductTask task{};
        task.runs = runs.data();
        task.samples = last - first;
        task.order = order.data();
        task.width = width;
        task.start = placed_start(out.data());
        if (task.start.data != nullptr) task.start.data += first * task.start.sample_stride;
        task.out = {out.data() + first * out_size(), out_size(), out_places.data()};
        solve(task);
        return out;
    }

    std::vector<float> solve(const PackedProduct& product, int64_t first, int64_t last, int64_t threads) const {
        return solve_by(first, last, [&](const ProductTask& task) { product.run(task, threads); });
    }

    std::vector<float> expected(bool fused) const {
        std::vector<float> out = fresh_out();
        const std::vector<float> before = out;
        const Placed<const float> from = placed_start(before.data());
        for (int64_t m = 0; m < samples * width; ++m) {
            const int64_t sample = m / width, place = order[m % width];
            for (int64_t n = 0; n < columns; ++n) {
                float sum = from.data == nullptr ? 0.0f : from.at(sample, place)[n];
                for (std::size_t i = 0; i < inputs.size(); ++i) {
                    const Input& input = inputs[i];
                    const float* weight = weights[i].data() + n;
                    for (int64_t row = 0; row < input.rows; ++row) {
                        const float* x = input.data.data() + (sample * input.rows + row) * input.row_stride() +
                                         input.places[place];
                        for (int64_t k = 0; k < input.taps * input.channels; ++k, weight += columns) {
                            const float value = x[k / input.channels * input.column_stride() + k % input.channels];
                            sum = multiply_add(value, bf16 ? upper_half(*weight) : *weight, sum, fused);
                        }
                    }
                }
                out[sample * out_size() + out_places[place] + n] = sum;
            }
        }
        return out;
    }
};

// Where the places of a sample lie, in an order of their own.
std::vector<int64_t> shuffled_places(int64_t count, int64_t stride, Random& random) {
    std::vector<int64_t> places(count);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t j = random.below(i + 1);
        places[i] = places[j];
        places[j] = i * stride;
    }
    return places;
}

Problem make_problem(int64_t samples, int64_t width, int64_t columns, std::vector<Input> inputs, Start start,
                     Random& random) {
    const int64_t parts = columns % 2 == 0 ? 1 + random.below(2) : 1;
    Problem p{samples, width, parts, columns, start, random.chance(30), std::move(inputs), {}, {}, {}, {}};
    for (const int64_t place : shuffled_places(p.num_places(), 1, random)) {
        if (static_cast<int64_t>(p.order.size()) < width) p.order.push_back(static_cast<int32_t>(place));
    }
    p.out_places = shuffled_places(p.num_places(), columns + random.below(3), random);
    std::swap(p.out_places.back(), *std::max_element(p.out_places.begin(), p.out_places.end()));
    for (Input& input : p.inputs) {
        input.gap = random.chance(30) ? 1 + random.below(3) : 0;
        input.places = shuffled_places(p.num_places(), input.column_stride(), random);
        input.data.assign(samples * input.rows * input.row_stride(), kNaN);
        for (std::size_t i = 0; i < input.data.size(); ++i) {
            const bool gap = static_cast<int64_t>(i) % input.column_stride() >= input.channels;
            if (!gap) input.data[i] = random.symmetric(2.0f);
        }
        p.weights.emplace_back(input.depth() * columns);
        for (float& w : p.weights.back()) w = random.symmetric(1.0f);
        p.depth += input.depth();
    }
    p.start.resize(samples * width * columns);
    for (float& s : p.start) s = random.symmetric(3.0f);
    return p;
}

// In rectangles, as threads have them: cut anywhere, and some of them empty.
std::vector<float> solve_in_shares(const Problem& p, const PackedProduct& product, Random& random) {
    return p.solve_by(0, p.samples, [&](const ProductTask& task) {
        const int64_t rows = p.samples * p.width, panels = product.panels();
        const int64_t row = random.below(rows + 1), panel = random.below(panels + 1);
        for (const auto& [first_row, last_row] : {std::pair(row, rows), std::pair(int64_t{0}, row)}) {
            product.run_share(task, {first_row, last_row, panel, panels});
            product.run_share(task, {first_row, last_row, 0, panel});
        }
    });
}

void check_problem(const Problem& p, const Kernels& kernels, Random& random) {
    const PackedProduct product = p.pack(kernels);
    expect(product.depth() == p.depth && product.columns() == p.columns, "other sizes");
    const std::vector<float> expected = p.expected(product.fused()), all = p.solve(product, 0, p.samples, 1);
    expect(same_bits(all, expected), p.samples, " samples of ", p.width, " x ", p.depth, " x ", p.columns,
           ": other bits than one after the other");
    for (int64_t threads : {2, 3, 7}) {
        expect(same_bits(p.solve(product, 0, p.samples, threads), all), "other bits with ", threads, " threads");
    }
    expect(same_bits(solve_in_shares(p, product, random), all), "other bits in shares");
    for (int64_t sample = 0; sample < p.samples; ++sample) {
        const std::vector<float> alone = p.solve(product, sample, sample + 1, 1);
        expect(std::memcmp(alone.data() + sample * p.out_size(), all.data() + sample * p.out_size(),
                           p.out_size() * sizeof(float)) == 0,
               "other bits of sample ", sample, " alone");
    }
}

// Every row and panel belongs to one thread.
void check_splits(Random& random) {
    for (int repeat = 0; repeat < 200; ++repeat) {
        const int64_t threads = 1 + random.below(9), rows = 1 + random.below(30), panels = 1 + random.below(12);
        const ProductSplit split(threads, panels, (rows + 3) / 4);
        expect(split.across * split.down <= threads, "more shares than threads");
        std::vector<int> seen(rows * panels);
        for (int64_t thread = 0; thread < threads; ++thread) {
            const ProductShare share = split.share(thread, rows, panels);
            for (int64_t row = share.first_row; row < share.last_row; ++row) {
                for (int64_t panel = share.first_panel; panel < share.last_panel; ++panel) ++seen[row * panels + panel];
            }
        }
        expect(seen == std::vector<int>(seen.size(), 1), "a share that nobody has, or two");
    }
}

}  // namespace

void test_product(const Kernels& kernels) {
    Random random(3);
    const std::vector<Start> starts = {Start::kNone, Start::kBias, Start::kSamples, Start::kOut};
    const auto any_start = [&] { return random.pick(starts); };
    const auto input = [&](int64_t rows, int64_t taps, int64_t channels) { return Input{rows, taps, channels}; };
    check_splits(random);
    // Every number of rows, each of them alone as well, and of columns around those of panels.
    for (int64_t rows = 1; rows <= 70; ++rows) {
        const int64_t columns = 1 + random.below(70);
        const std::vector<Input> inputs = {input(1, 1, 1 + random.below(40))};
        check_problem(make_problem(rows, 1, columns, inputs, any_start(), random), kernels, random);
    }
    // Windows over several histories.
    for (int i = 0; i < 40; ++i) {
        std::vector<Input> inputs;
        for (int64_t n = 1 + random.below(3); n > 0; --n) {
            inputs.push_back(input(1 + random.below(4), 1 + random.below(5), 1 + random.below(20)));
        }
        check_problem(
            make_problem(random.below(5), 1 + random.below(20), 1 + random.below(70), inputs, any_start(), random),
            kernels, random);
    }
    // Enough for several threads in both directions, and for sums that are put down and taken up again.
    for (Start start : starts) {
        check_problem(make_problem(3, 47, 70, {input(2, 3, 150), input(1, 1, 301)}, start, random), kernels, random);
        check_problem(make_problem(1, 13, 161, {input(1, 1, 2113)}, start, random), kernels, random);
        check_problem(make_problem(5, 61, 7, {input(3, 5, 100)}, start, random), kernels, random);
    }
}

void test_products_agree(const std::vector<const Kernels*>& all) {
    Random random(4);
    for (int i = 0; i < 3; ++i) {
        std::vector<Input> inputs = {{2, 3, 150}, {1, 1, 301}};
        const Problem p = make_problem(2, 19, 70, std::move(inputs), Start::kBias, random);
        std::vector<float> results[2];  // fused and not
        for (const Kernels* kernels : all) {
            const PackedProduct product = p.pack(*kernels);
            const std::vector<float> out = p.solve(product, 0, p.samples, 1);
            std::vector<float>& result = results[product.fused()];
            if (!result.empty()) {
                expect(same_bits(out, result), "other bits on ", kernels->name);
            }
            result = out;
        }
    }
}

}  // namespace fastvq::cpu::testing
