#include "plan_case.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastvq::cpu::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kUnknownCode = std::numeric_limits<int64_t>::min() / 4;  // reading a table there cannot go unnoticed
constexpr int64_t kRowsAbove = 1, kRightColumns = 1;

bool is_gate(Kind kind) { return kind == Kind::kGlu || kind == Kind::kTanh; }

// Columns, and rows, of an operation that an affine operation reads.
struct Window {
    int64_t source;
    int64_t first_column = 0;
    int64_t num_columns = 1;
    int64_t first_row = 0;
    int64_t num_rows = 1;
};

// Adds operations at the level that their sources allow.
class Builder {
   public:
    explicit Builder(uint64_t seed) : random(seed), above_(seed + 1000) { plan.right = above_.below(3); }

    int64_t channels(int64_t op) const { return plan.ops[op].channels; }

    // Worked out before the steps, from what is the same everywhere, what is known of each place, and rows above.
    int64_t row_input(int64_t channels) {
        const int64_t label = add_op(Kind::kStatic, 1 + above_.below(9), -1, {});
        plan.ops[label].uniform = 1;
        const int64_t bare = uniform(Kind::kAffine, 6, {});
        const int64_t seen = uniform(Kind::kAffine, 12, {label, bare});
        embedding_ = uniform(above_.chance(50) ? Kind::kGlu : Kind::kTanh, 6, {seen});
        const int64_t context = add_op(Kind::kStatic, 1 + above_.below(20), -1, {});
        inputs_ = {context};
        const int64_t first = before(channels, 0, {{context}});
        const int64_t doubled = add_op(Kind::kConcatElu, 2 * channels, -1, {first});
        plan.ops[doubled].paired = 1;
        plan.ops[doubled].above_level = 1;
        // Of its own row what is left of the place, and the place.
        const int64_t column = -above_.below(3), row = -above_.below(3);
        const int64_t out = before(channels, 2, {{doubled, column, 1 - column, row, 1 - row}});
        inputs_.insert(inputs_.end(), {first, doubled, out});
        return out;
    }

    int64_t lookup(int64_t channels, int64_t taps) {
        const int64_t op = add_op(Kind::kLookup, channels, 0, {});
        plan.ops[op].num_taps = taps;
        plan.ops[op].weights = random_weights(random, taps * plan.shape.num_codes * channels, 1.0f);
        plan.ops[op].num_weights = taps * plan.shape.num_codes * channels;
        return op;
    }

    int64_t affine(int64_t channels, const std::vector<Window>& windows) {
        int64_t level = 0, depth = 0;
        for (const Window& window : windows) {
            if (window.first_column + window.num_columns == 1) level = std::max(level, level_of(window.source) + 1);
            depth += window.num_columns * this->channels(window.source);
        }
        const int64_t op = add_op(Kind::kAffine, channels, level, {});
        plan.ops[op].first_term = static_cast<int64_t>(plan.terms.size());
        plan.ops[op].num_terms = static_cast<int64_t>(windows.size());
        for (const Window& window : windows) add_term(random, window, channels, depth);
        return op;
    }

    int64_t elementwise(Kind kind, int64_t a, int64_t b = -1) {
        int64_t level = 0;
        for (const int64_t source : {a, b}) {
            // Attention hands out work differently from operations that go channel by channel.
            if (source >= 0) level = std::max(level, level_of(source) + (plan.ops[source].kind == Kind::kAttend));
        }
        const int64_t out = kind == Kind::kConcatElu ? 2 * channels(a) : is_gate(kind) ? channels(a) / 2 : channels(a);
        return add_op(kind, out, level, {a, b});
    }

    // A gate one level later needs no halves split alike.
    int64_t late_gate(Kind kind, int64_t source) {
        const int64_t op = elementwise(kind, source);
        plan.ops[op].level = level_of(source) + 1;
        return op;
    }

    int64_t attend(int64_t query, int64_t key, int64_t value, int64_t heads, bool inclusive) {
        int64_t level = level_of(query) + 1;
        if (inclusive) level = std::max({level, level_of(key) + 1, level_of(value) + 1});
        if (level == level_of(key)) ++level;
        const int64_t op = add_op(Kind::kAttend, channels(value), level, {query, key, value});
        plan.ops[op].heads = heads;
        plan.ops[op].inclusive = inclusive;
        return op;
    }

    PlanCase finish(int64_t output) {
        plan.output = output;
        pair();
        store_keys();
        plan.left.assign(plan.num_ops(), -1);
        plan.is_value.assign(plan.num_ops(), false);
        for (const OpSpec& op : plan.ops) {
            for (int64_t t = op.first_term; t < op.first_term + op.num_terms; ++t) {
                const TermSpec& term = plan.terms[t];
                if (term.first_column < 0) {
                    plan.left[term.source] = std::max(plan.left[term.source], -term.first_column);
                }
            }
            if (op.kind == Kind::kAttend) plan.is_value[op.sources[2]] = true;
        }
        for (int64_t index = 0; index < plan.num_ops(); ++index) add_above(index);
        return std::move(plan);
    }

    Random random;
    PlanCase plan;

   private:
    int64_t level_of(int64_t op) const { return plan.ops[op].level; }

    int64_t add_op(Kind kind, int64_t channels, int64_t level, const std::vector<int64_t>& sources) {
        OpSpec op{};
        op.kind = kind;
        op.channels = channels;
        op.level = level;
        std::fill(std::begin(op.sources), std::end(op.sources), -1);
        std::copy(sources.begin(), sources.end(), op.sources);
        plan.ops.push_back(op);
        return plan.num_ops() - 1;
    }

    int64_t uniform(Kind kind, int64_t channels, const std::vector<int64_t>& sources) {
        const bool affine = kind == Kind::kAffine;
        const int64_t op = add_op(kind, channels, -1, affine ? std::vector<int64_t>{} : sources);
        plan.ops[op].uniform = 1;
        plan.ops[op].first_once = static_cast<int64_t>(plan.terms.size());
        plan.ops[op].num_once = affine ? static_cast<int64_t>(sources.size()) : 0;
        for (const int64_t source : sources) {
            if (affine) add_term(above_, {source}, channels, 10);
        }
        return op;
    }

    int64_t before(int64_t channels, int64_t above_level, const std::vector<Window>& windows) {
        const int64_t op = add_op(Kind::kAffine, channels, -1, {});
        plan.ops[op].above_level = above_level;
        add_above_terms(op, windows);
        add_once(op);
        return op;
    }

    void add_once(int64_t op) {
        if (embedding_ < 0 || above_.chance(50)) return;
        plan.ops[op].first_once = static_cast<int64_t>(plan.terms.size());
        plan.ops[op].num_once = 1;
        add_term(above_, {embedding_}, channels(op), channels(embedding_));
    }

    void add_above_terms(int64_t op, const std::vector<Window>& windows) {
        plan.ops[op].first_above = static_cast<int64_t>(plan.terms.size());
        plan.ops[op].num_above = static_cast<int64_t>(windows.size());
        int64_t depth = 0;
        for (const Window& window : windows) depth += window.num_rows * window.num_columns * channels(window.source);
        for (const Window& window : windows) add_term(above_, window, channels(op), 2 * depth);
    }

    // Of an operation of the step phase; plans without inputs have no part above.
    void add_above(int64_t op) {
        const Kind kind = plan.ops[op].kind;
        if (kind != Kind::kAffine && kind != Kind::kLookup) return;
        plan.ops[op].bias = random_weights(above_, channels(op), 0.5f);
        if (plan.ops[op].level < 0 || inputs_.empty()) return;
        if (kind == Kind::kLookup) return add_taps_above(op);
        add_once(op);
        const std::vector<Window> windows = windows_above();
        if (windows.empty()) return;
        add_above_terms(op, windows);
        plan.ops[op].above_level = 3;  // after all inputs
    }

    std::vector<Window> windows_above() {
        std::vector<Window> windows;
        for (int64_t left = above_.below(4); left > 0; --left) {
            const int64_t rows = 1 + above_.below(2), between = above_.below(2), first = column_above();
            const int64_t last = first + above_.below(plan.right - first + 1), source = above_.below(plan.num_ops());
            const OpSpec& from = plan.ops[source];
            if (above_.chance(30)) {
                windows.push_back({above_.pick(inputs_)});
            } else if (!from.uniform && from.kind != Kind::kStatic && from.kind != Kind::kStoreKeys &&
                       !plan.is_value[source]) {
                windows.push_back({source, first, last - first + 1, -rows - between, rows});
            }
        }
        return windows;
    }

    void add_taps_above(int64_t op) {
        plan.ops[op].num_above = 1 + above_.below(3);
        plan.ops[op].first_above = static_cast<int64_t>(plan.terms.size());
        plan.ops[op].above_level = 0;
        for (int64_t tap = 0; tap < plan.ops[op].num_above; ++tap) {
            const int64_t count = plan.shape.num_codes * channels(op), column = column_above();
            plan.terms.push_back({-1, column, 1, random_weights(above_, count, 1.0f), count, -1 - above_.below(2), 1});
        }
    }

    int64_t column_above() { return plan.right - above_.below(plan.right + 3); }

    void add_term(Random& from, const Window& window, int64_t channels, int64_t depth) {
        const int64_t count = window.num_rows * window.num_columns * this->channels(window.source) * channels;
        const float* weights = random_weights(from, count, std::sqrt(3.0f / static_cast<float>(depth)));
        plan.terms.push_back({window.source, window.first_column, window.num_columns, weights, count, window.first_row,
                              window.num_rows});
    }

    const float* random_weights(Random& from, int64_t count, float bound) {
        std::vector<float> weights(count);
        for (float& weight : weights) weight = from.symmetric(bound);
        plan.weights.push_back(std::move(weights));
        return plan.weights.back().data();
    }

    // Both halves of a gate's source have to be split between threads alike, and so has everything that they are made
    // from within the level.
    void pair() {
        for (int64_t index = plan.num_ops() - 1; index >= 0; --index) {
            OpSpec& op = plan.ops[index];
            if (is_gate(op.kind)) {
                OpSpec& source = plan.ops[op.sources[0]];
                source.paired = source.paired || source.level == op.level;
            } else if (op.kind == Kind::kConcatElu) {
                op.paired = true;
            } else if (op.paired && (op.kind == Kind::kAdd || op.kind == Kind::kElu || op.kind == Kind::kRelu)) {
                for (const int64_t source : op.sources) {
                    if (source >= 0) plan.ops[source].paired = true;
                }
            }
        }
    }

    // Keys get to their cache by operations of their own, which come after all others.
    void store_keys() {
        const int64_t count = plan.num_ops();
        for (int64_t index = 0; index < count; ++index) {
            if (plan.ops[index].kind != Kind::kAttend) continue;
            const int64_t key = plan.ops[index].sources[1];
            const int64_t store = add_op(Kind::kStoreKeys, channels(key), level_of(key), {key});
            plan.ops[store].paired = plan.ops[key].paired;
            plan.ops[index].sources[1] = store;
        }
    }

    Random above_;  // of its own, so that steps are what they are without a part above
    int64_t embedding_ = -1;
    std::vector<int64_t> inputs_;  // known above for each place
};

const std::vector<int64_t> kChannels = {1, 3, 7, 16, 20, 31, 32, 33, 48, 64, 70, 100};

int64_t add_block(Builder& make, int64_t x, int64_t row, int64_t which) {
    Random& random = make.random;
    const int64_t width = make.channels(x), inner = random.pick(kChannels);
    const int64_t left = 1 + random.below(3);
    const Window recent = random.chance(50) ? Window{0, -left, left} : Window{0, -left, left + 1};
    const auto over = [&](int64_t source) { return Window{source, recent.first_column, recent.num_columns}; };
    const Kind gate = random.chance(50) ? Kind::kGlu : Kind::kTanh;
    const bool inclusive = random.chance(50);
    const int64_t heads = 1 + random.below(3);
    switch (which) {
        case 0: {  // the gated block of PixelSNAIL
            const int64_t hidden = make.affine(inner, {over(make.elementwise(Kind::kConcatElu, x)), {row}});
            const int64_t seen = make.elementwise(Kind::kConcatElu, hidden);
            const int64_t halves = make.affine(2 * width, {over(seen), {row}});
            return make.elementwise(Kind::kAdd, x, make.elementwise(gate, halves));
        }
        case 1: {  // as above with other activations, and sums of paired vectors
            const int64_t hidden = make.affine(inner, {over(make.elementwise(Kind::kElu, x))});
            const int64_t a = make.affine(2 * width, {{make.elementwise(Kind::kRelu, hidden)}});
            const int64_t b = make.lookup(2 * width, 1 + random.below(2));
            const int64_t sum = make.elementwise(Kind::kAdd, make.elementwise(Kind::kElu, a), b);
            return make.elementwise(Kind::kAdd, make.elementwise(gate, make.elementwise(Kind::kRelu, sum)), x);
        }
        case 2: {  // attention with widths of its own for keys and values
            const int64_t key_width = heads * (1 + random.below(20));
            const int64_t value_width = heads * random.pick(kChannels);
            const int64_t query = make.affine(key_width, {{x}, {row}});
            int64_t key_source = x;
            if (random.chance(50)) key_source = make.affine(inner, {{make.elementwise(Kind::kElu, x)}});
            const int64_t key = make.affine(key_width, {{key_source}});
            const int64_t value = make.affine(value_width, {{key_source}, {row}});
            const int64_t found = make.attend(query, key, value, heads, inclusive);
            return make.affine(width, {{make.elementwise(Kind::kElu, found)}, {x}});
        }
        case 3: {  // only columns to the left, which is work for the first level
            const int64_t before = make.affine(width, {{x, -left, left}});
            return make.elementwise(Kind::kAdd, make.elementwise(Kind::kElu, before), x);
        }
        case 4: {  // a gate on doubled vectors that were not made by a product, and one that waits
            const int64_t gated = make.elementwise(gate, make.elementwise(Kind::kConcatElu, x));
            const int64_t late = make.late_gate(gate, make.affine(2 * width, {{gated}}));
            return make.elementwise(Kind::kAdd, late, x);
        }
        case 5: {  // keys that a gate reads too
            const int64_t key = make.affine(2 * heads * (1 + random.below(20)), {{x}, {row}});
            const int64_t gated = make.elementwise(gate, key);
            const int64_t value = make.affine(heads * (1 + random.below(40)), {{gated}});
            const int64_t query = make.affine(make.channels(key), {{gated}});
            return make.affine(inner, {{make.attend(query, key, value, heads, inclusive)}, {x}});
        }
        default: {  // as many terms as there may be
            std::vector<Window> windows;
            while (windows.size() < 14) windows.push_back(random.chance(30) ? over(x) : Window{x});
            windows.push_back({row});
            windows.push_back(over(x));
            return make.affine(inner, windows);
        }
    }
}

constexpr int64_t kBlocks = 7;

}  // namespace

bool PlanCase::attends() const {
    return std::any_of(ops.begin(), ops.end(), [](const OpSpec& op) { return op.kind == Kind::kAttend; });
}

PlanCase random_plan(uint64_t seed) {
    Builder make(seed);
    Random& random = make.random;
    PlanCase& plan = make.plan;
    const int64_t batches[] = {1, 3, 8, 13};
    const int64_t batch = batches[seed % 4];
    const int64_t width = 1 + random.below(7);
    plan.height = 1 + random.below(3);
    plan.bf16 = seed / 4 % 2 == 1;
    // Sometimes as many positions as a row of keys has room for.
    const int64_t positions = random.chance(25) && width * plan.height <= 16 ? 16 : width * plan.height;
    plan.shape = {batch, width, positions, 1 + random.below(40), (positions + 15) / 16 * 16};
    const int64_t channels = random.pick(kChannels);
    const int64_t row = make.row_input(random.pick(kChannels));
    // Columns to the left may be read from operations that come later at a position.
    const int64_t before = make.affine(channels, {{row, -2, 2}});
    int64_t x = make.elementwise(Kind::kAdd, make.lookup(channels, 1 + random.below(3)), before);
    const int64_t blocks = 1 + random.below(3);
    for (int64_t block = 0; block < blocks; ++block) {
        x = add_block(make, x, row, (static_cast<int64_t>(seed) + 3 * block) % kBlocks);
    }
    const int64_t last = make.affine(make.channels(row), {{make.elementwise(Kind::kRelu, x)}});
    plan.terms[plan.ops[before].first_term].source = last;
    return make.finish(make.affine(plan.shape.num_codes, {{last}}));
}

PlanCase rich_plan() {
    Builder make(1);
    make.plan.height = 2;
    make.plan.shape = {3, 4, 8, 6, 16};
    const int64_t row = make.row_input(5);
    int64_t x = make.lookup(40, 2);
    for (int64_t block = 0; block < kBlocks; ++block) x = add_block(make, x, row, block);
    const int64_t gated = make.elementwise(Kind::kGlu, make.affine(14, {{x, -1, 2}}));
    return make.finish(make.affine(6, {{make.elementwise(Kind::kTanh, make.affine(30, {{gated}}))}}));
}

PlanCase tiny_plan(int64_t height, int64_t width) {
    Builder make(1);
    make.plan.height = height;
    const int64_t positions = height * width;
    make.plan.shape = {1, width, positions, 5, (positions + 15) / 16 * 16};
    const int64_t x = make.elementwise(Kind::kRelu, make.lookup(8, 2));
    return make.finish(make.affine(5, {{make.affine(8, {{x, -2, 2}, {x}})}}));
}

Memory::Memory(const PlanCase& plan, uint64_t seed) : plan(plan), seed_(seed) {
    const StepShape& shape = plan.shape;
    kept.resize(plan.num_ops());
    scratch.resize(plan.num_ops());
    inputs.resize(plan.num_ops());
    values.assign(plan.num_ops(), View{});
    starts.assign(plan.num_ops(), View{});
    for (int64_t index = 0; index < plan.num_ops(); ++index) {
        const OpSpec& op = plan.ops[index];
        if (op.level < 0) continue;
        const int64_t columns = shape.width + plan.left[index] + kRightColumns;
        if (op.kind == Kind::kStoreKeys) {
            kept[index].data.assign(shape.batch * op.channels * shape.key_stride, kNaN);
        } else if (plan.left[index] >= 0) {
            kept[index].data.assign(shape.batch * (kRowsAbove + plan.height) * columns * op.channels, kNaN);
            // Zeros around the grid.
            for (int64_t i = 0; i < static_cast<int64_t>(kept[index].data.size()); ++i) {
                const int64_t column = i / op.channels % columns;
                if (column < plan.left[index] || column >= plan.left[index] + shape.width) kept[index].data[i] = 0.0f;
            }
        } else if (plan.is_value[index]) {
            kept[index].data.assign(shape.batch * shape.positions * op.channels, kNaN);
        }
    }
    Random random(seed);
    const int64_t cells = shape.batch * plan.height * shape.width;
    for (int64_t i = 0; i < cells; ++i) {
        known.push_back(random.chance(20));
        codes.push_back(known.back() ? random.below(shape.num_codes) : kUnknownCode);
        uniforms.push_back(random.uniform());
    }
    codes.shrink_to_fit();
    uniforms.shrink_to_fit();
    known.shrink_to_fit();
    first_codes = codes;
    draw.temperature = random.chance(50) ? 1.0f : 0.1f + 2.0f * random.uniform();
    draw.top_k = random.chance(50) ? shape.num_codes : 1 + random.below(shape.num_codes);
    draw.top_p = random.chance(50) ? 1.0f : 1.0f - random.uniform();
}

View Memory::row_input(int64_t op, Random& random) {
    // One vector for all, one per sample, or one per sample and column.
    const int64_t channels = plan.ops[op].channels, kind = random.below(3);
    const int64_t samples = kind == 0 ? 1 : plan.shape.batch, columns = kind == 2 ? plan.shape.width : 1;
    std::vector<float>& data = inputs[op].data;
    data = std::vector<float>(samples * columns * channels);
    for (float& x : data) x = random.symmetric(1.0f);
    return {data.data(), kind == 0 ? 0 : columns * channels, columns == 1 ? 0 : channels};
}

void Memory::begin_row(int64_t new_row) {
    row = new_row;
    const StepShape& shape = plan.shape;
    for (int64_t index = 0; index < plan.num_ops(); ++index) {
        const OpSpec& op = plan.ops[index];
        Random random(seed_ + 1000 * index + row);
        if (op.level < 0) {
            values[index] = row_input(index, random);
            continue;
        }
        if (op.kind == Kind::kAffine || op.kind == Kind::kLookup) starts[index] = row_input(index, random);
        float* data = kept[index].data.data();
        if (op.kind == Kind::kStoreKeys) {
            values[index] = {data, op.channels * shape.key_stride, 0};
        } else if (plan.left[index] >= 0) {
            const int64_t columns = shape.width + plan.left[index] + kRightColumns;
            const int64_t first = ((kRowsAbove + row) * columns + plan.left[index]) * op.channels;
            values[index] = {data + first, (kRowsAbove + plan.height) * columns * op.channels, op.channels};
        } else if (plan.is_value[index]) {
            values[index] = {data + row * shape.width * op.channels, shape.positions * op.channels, op.channels};
        } else {
            // A place for every column, so that a test can see them all.
            scratch[index].data = std::vector<float>(shape.batch * shape.width * op.channels, kNaN);
            values[index] = {scratch[index].data.data(), shape.width * op.channels, op.channels};
        }
    }
    for (std::vector<Buffer>* buffers : {&kept, &scratch, &inputs}) {
        for (Buffer& buffer : *buffers) {
            buffer.before = buffer.data;
            buffer.expected.assign(buffer.data.size(), false);
        }
    }
}

}  // namespace fastvq::cpu::testing
