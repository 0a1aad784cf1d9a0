#include "grid_case.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>

#include "reference.h"

namespace fastvq::cpu::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kUnknownCode = std::numeric_limits<int64_t>::min() / 4;

class SlowFill {
   public:
    SlowFill(const GridCase& grid, const Kernels& kernels)
        : grid_(grid), plan_(grid.plan), kernels_(kernels), shape_(grid.shape()), values_(plan_.num_ops()),
          order_(plan_.num_ops()) {
        for (int64_t index = 0; index < plan_.num_ops(); ++index) {
            values_[index].assign(grid.batch * shape_.positions() * plan_.ops[index].channels, kNaN);
        }
        std::iota(order_.begin(), order_.end(), 0);
        std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return rank(a) < rank(b); });
        for (const TermSpec& term : plan_.terms) {
            weights_.emplace_back(term.weights, term.weights + term.num_weights);
            for (float& weight : weights_.back()) weight = plan_.bf16 ? upper_half(weight) : weight;
        }
    }

    Grids fill() {
        grids_ = grid_.begin();
        DrawScratch scratch(shape_.num_codes);
        for (row_ = 0; row_ < shape_.height; ++row_) {
            for (column_ = 0; column_ < shape_.width; ++column_) {
                for (sample_ = 0; sample_ < grid_.batch; ++sample_) {
                    for (const int64_t index : order_) compute(index, value(index, row_, column_));
                    const int64_t cell = (sample_ * shape_.height + row_) * shape_.width + column_;
                    const float* logits = value(plan_.output, row_, column_);
                    std::copy_n(logits, shape_.num_codes, grids_.logits.data() + cell * shape_.num_codes);
                    if (grid_.known[cell]) continue;
                    const int64_t bad = draw_rows(logits, &grid_.uniforms[cell], 1, shape_.num_codes, grid_.draw,
                                                  scratch, &grids_.codes[cell]);
                    expect(bad == -1, "a plan whose logits are not finite");
                }
            }
        }
        return grids_;
    }

   private:
    // What is the same everywhere, then what is worked out before the steps, then the steps.
    std::tuple<int64_t, int64_t> rank(int64_t index) const {
        const OpSpec& op = plan_.ops[index];
        if (op.uniform || op.kind == Kind::kStatic) return {0, 0};
        return op.level < 0 ? std::tuple(int64_t{1}, op.above_level) : std::tuple(int64_t{2}, op.level);
    }

    float* value(int64_t index, int64_t row, int64_t column) {
        const int64_t position = (sample_ * shape_.height + row) * shape_.width + column;
        return values_[index].data() + position * plan_.ops[index].channels;
    }

    void compute(int64_t index, float* out) {
        const OpSpec& op = plan_.ops[index];
        const auto source = [&](int which) { return value(op.sources[which], row_, column_); };
        switch (op.kind) {
            case Kind::kStatic: {
                const StaticInput& input = grid_.statics[index];
                std::copy_n(input.data + sample_ * input.sample_stride + row_ * input.row_stride +
                                column_ * input.column_stride,
                            op.channels, out);
                return;
            }
            case Kind::kAffine:
                std::copy_n(op.bias, op.channels, out);
                for (const auto& [first, count] : {std::pair(op.first_once, op.num_once),
                                                   std::pair(op.first_above, op.num_above),
                                                   std::pair(op.first_term, op.num_terms)}) {
                    for (int64_t t = first; t < first + count; ++t) add_term(t, op.channels, out);
                }
                return;
            case Kind::kLookup:
                std::copy_n(op.bias, op.channels, out);
                for (int64_t t = op.first_above; t < op.first_above + op.num_above; ++t) {
                    const TermSpec& tap = plan_.terms[t];
                    add_code(tap.weights, row_ + tap.first_row, column_ + tap.first_column, op.channels, out);
                }
                for (int64_t t = 0; t < op.num_taps; ++t) {
                    const float* table = op.weights + t * shape_.num_codes * op.channels;
                    add_code(table, row_, column_ + t - op.num_taps, op.channels, out);
                }
                return;
            case Kind::kElu:
                return kernels_.elu(source(0), out, op.channels);
            case Kind::kConcatElu:
                kernels_.elu(source(0), out, op.channels / 2);
                return kernels_.elu_negated(source(0), out + op.channels / 2, op.channels / 2);
            case Kind::kRelu:
                return kernels_.relu(source(0), out, op.channels);
            case Kind::kAdd:
                return kernels_.add(source(0), source(1), out, op.channels);
            case Kind::kGlu:
                return kernels_.glu(source(0), source(0) + op.channels, out, op.channels);
            case Kind::kTanh:
                return kernels_.tanh(source(0), source(0) + op.channels, out, op.channels);
            case Kind::kStoreKeys:
                std::copy_n(source(0), op.channels, out);
                return;
            case Kind::kAttend:
                return attend(op, out);
        }
    }

    void add_term(int64_t t, int64_t channels, float* out) {
        const TermSpec& term = plan_.terms[t];
        const int64_t depth = plan_.ops[term.source].channels;
        const std::vector<float> zeros(depth, 0.0f);
        const float* weights = weights_[t].data();
        for (int64_t i = 0; i < term.num_rows * term.num_columns; ++i) {
            const int64_t row = row_ + term.first_row + i / term.num_columns;
            const int64_t column = column_ + term.first_column + i % term.num_columns;
            const float* x = zeros.data();
            if (row >= 0 && column >= 0 && column < shape_.width) x = value(term.source, row, column);
            for (int64_t k = 0; k < depth; ++k, weights += channels) {
                for (int64_t c = 0; c < channels; ++c) {
                    out[c] = multiply_add(x[k], weights[c], out[c], kernels_.gathered.fused);
                }
            }
        }
    }

    void add_code(const float* table, int64_t row, int64_t column, int64_t channels, float* out) {
        if (row < 0 || column < 0 || column >= shape_.width) return;
        const int64_t code = grids_.codes[(sample_ * shape_.height + row) * shape_.width + column];
        for (int64_t c = 0; c < channels; ++c) out[c] += table[code * channels + c];
    }

    void attend(const OpSpec& op, float* out) {
        const int64_t stride = shape_.key_stride(), key_channels = plan_.ops[op.sources[1]].channels;
        std::vector<float> keys(key_channels * stride, kNaN), scores(stride);
        const float* first_key = value(op.sources[1], 0, 0);
        const int64_t count = row_ * shape_.width + column_ + op.inclusive;
        for (int64_t i = 0; i < key_channels * count; ++i) {
            keys[i % key_channels * stride + i / key_channels] = first_key[i];
        }
        for (int64_t head = 0; head < op.heads; ++head) {
            Attend a{};
            a.key_width = key_channels / op.heads;
            a.value_width = op.channels / op.heads;
            a.query = value(op.sources[0], row_, column_) + head * a.key_width;
            a.keys = keys.data() + head * a.key_width * stride;
            a.key_stride = stride;
            a.values = value(op.sources[2], 0, 0) + head * a.value_width;
            a.value_stride = op.channels;
            a.count = count;
            a.scores = scores.data();
            a.out = out + head * a.value_width;
            kernels_.attend(a);
        }
    }

    const GridCase& grid_;
    const PlanCase& plan_;
    const Kernels& kernels_;
    const GridShape shape_;
    std::vector<std::vector<float>> values_;  // by operation: [batch][height][width][channels]
    std::vector<int64_t> order_;
    std::vector<std::vector<float>> weights_;  // by term
    Grids grids_;
    int64_t sample_ = 0, row_ = 0, column_ = 0;
};

}  // namespace

GridCase::GridCase(const PlanCase& plan, int64_t batch, uint64_t seed)
    : plan(plan), batch(batch), inputs(plan.num_ops()), statics(plan.num_ops()) {
    Random random(seed);
    for (int64_t index = 0; index < plan.num_ops(); ++index) {
        const OpSpec& op = plan.ops[index];
        if (op.kind != Kind::kStatic) continue;
        // One vector for all, or for each sample, row or column.
        const bool each[] = {random.chance(70), !op.uniform && random.chance(70), !op.uniform && random.chance(70)};
        const int64_t sizes[] = {batch, plan.height, plan.shape.width};
        int64_t strides[3], count = op.channels;
        for (int axis = 2; axis >= 0; --axis) {
            strides[axis] = each[axis] ? count : 0;
            if (each[axis]) count *= sizes[axis];
        }
        inputs[index].resize(count);
        for (float& x : inputs[index]) x = random.symmetric(1.0f);
        statics[index] = {inputs[index].data(), strides[0], strides[1], strides[2]};
    }
    const int64_t cells = batch * shape().positions();
    codes.assign(cells, kUnknownCode);
    known.assign(cells, 0);
    uniforms.resize(cells);
    for (int64_t i = 0; i < cells; ++i) {
        uniforms[i] = random.uniform();
        known[i] = random.chance(20);
        if (known[i]) codes[i] = random.below(plan.shape.num_codes);
    }
    draw.temperature = random.chance(50) ? 1.0f : 0.1f + 2.0f * random.uniform();
    draw.top_k = random.chance(50) ? plan.shape.num_codes : 1 + random.below(plan.shape.num_codes);
    draw.top_p = random.chance(50) ? 1.0f : 1.0f - random.uniform();
}

GridPlan GridCase::build(const Kernels& kernels) const {
    return GridPlan(plan.ops, plan.terms, plan.output, shape(), plan.bf16, kernels);
}

GridTask GridCase::task(Grids& grids) const {
    const int64_t width = plan.shape.width;
    return {batch, width, 1, 1, 1, statics.data(), grids.codes.data(), uniforms.data(), known.data(),
            grids.logits.data(), draw, nullptr, nullptr};
}

GridTask GridCase::task_of(int64_t sample, Grids& grids) const {
    GridTask one = task(grids);
    const int64_t first = sample * shape().positions();
    one.batch = 1;
    one.codes += first;
    one.uniforms += first;
    one.known += first;
    one.logits += first * plan.shape.num_codes;
    return one;
}

Grids GridCase::begin() const {
    return {codes, std::vector<float>(codes.size() * plan.shape.num_codes, kNaN)};
}

void GridCase::forget_codes() {
    std::fill(known.begin(), known.end(), 0);
    std::fill(codes.begin(), codes.end(), kUnknownCode);
}

Grids GridCase::fill_slowly(const Kernels& kernels) const { return SlowFill(*this, kernels).fill(); }

bool reaches_slowly(const Front& front, int64_t above, int64_t right) {
    for (int64_t tile = 0; tile < front.tiles(); ++tile) {
        const int64_t last = std::min((tile + 1) * front.tile, front.width) - 1;
        for (int64_t column = 0; column <= std::min(last + right, front.width - 1); ++column) {
            // Both steps from that in which the upper row begins.
            if (column / front.tile >= tile + front.offset * above) return false;
        }
    }
    return true;
}

int64_t least_offset(const PlanCase& plan, int64_t tile) {
    for (int64_t offset = 1;; ++offset) {
        const Front front{plan.height, plan.shape.width, tile, offset};
        bool reaches = true;
        for (const OpSpec& op : plan.ops) {
            for (int64_t t = op.first_above; t < op.first_above + op.num_above; ++t) {
                const TermSpec& term = plan.terms[t];
                const int64_t right = term.first_column + term.num_columns - 1;
                for (int64_t row = term.first_row; row < std::min<int64_t>(0, term.first_row + term.num_rows); ++row) {
                    reaches = reaches && reaches_slowly(front, -row, right);
                }
            }
        }
        if (reaches) return offset;
    }
}

}  // namespace fastvq::cpu::testing
