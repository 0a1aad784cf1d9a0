#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace fastvq::cpu::testing {
namespace {

constexpr double kUnit = 0x1p-24;       // largest relative error of one rounding
constexpr double kExp = 5 * kUnit;      // and of an exponential
constexpr double kTiny = 0x1p-120;      // exponentials below exp(-87) may be anything as small as this

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

const char* name_of(Kind kind) {
    const char* names[] = {"lookup", "affine", "elu", "concat_elu", "relu", "add", "glu", "tanh", "store_keys",
                           "attend"};
    return names[static_cast<int64_t>(kind)];
}

class RowCheck {
   public:
    explicit RowCheck(Memory& memory) : memory_(memory), plan_(memory.plan), shape_(memory.plan.shape) {}

    void run() {
        for (index_ = 0; index_ < plan_.num_ops(); ++index_) {
            if (op().level < 0) continue;
            if (op().kind == Kind::kAffine) read_weights();
            for (int64_t b = 0; b < shape_.batch; ++b) {
                for (int64_t column = 0; column < shape_.width; ++column) check_vector(b, column);
            }
        }
        check_codes();
        check_rest(memory_.kept);
        check_rest(memory_.scratch);
        check_rest(memory_.inputs);
    }

   private:
    const OpSpec& op() const { return plan_.ops[index_]; }

    int64_t code(int64_t sample, int64_t column) const {
        return memory_.codes[(sample * plan_.height + memory_.row) * shape_.width + column];
    }

    // The vector of an operation at a column of this row. Left of the grid there are zeros.
    std::vector<double> vector(int64_t source, int64_t sample, int64_t column) const {
        const int64_t channels = plan_.ops[source].channels;
        if (column < 0) return std::vector<double>(channels, 0.0);
        return read(memory_.values[source], sample, column, channels);
    }

    static std::vector<double> read(const View& view, int64_t sample, int64_t column, int64_t channels) {
        const float* data = view.data + sample * view.batch_stride + column * view.column_stride;
        return std::vector<double>(data, data + channels);
    }

    void read_weights() {
        weights_.clear();
        for (int64_t t = op().first_term; t < op().first_term + op().num_terms; ++t) {
            const TermSpec& term = plan_.terms[t];
            weights_.emplace_back(term.weights, term.weights + term.num_weights);
            if (!plan_.bf16) continue;
            for (double& weight : weights_.back()) weight = upper_half(static_cast<float>(weight));
        }
    }

    void check_vector(int64_t b, int64_t column) {
        const std::vector<Expected> expected = compute(b, column);
        const View& view = memory_.values[index_];
        const int64_t position = memory_.row * shape_.width + column;
        for (int64_t c = 0; c < op().channels; ++c) {
            float* place = view.data + b * view.batch_stride + column * view.column_stride + c;
            if (op().kind == Kind::kStoreKeys) {
                place = view.data + (b * op().channels + c) * shape_.key_stride + position;
            }
            Buffer& buffer = memory_.kept[index_].data.empty() ? memory_.scratch[index_] : memory_.kept[index_];
            buffer.expected[place - buffer.data.data()] = true;
            expect_close(*place, expected[c], name_of(op().kind));
        }
    }

    std::vector<Expected> compute(int64_t b, int64_t column) const {
        std::vector<Expected> out;
        switch (op().kind) {
            case Kind::kLookup:
                return lookup(b, column);
            case Kind::kAffine:
                return affine(b, column);
            case Kind::kAttend:
                return attend(b, column);
            case Kind::kElu:
                for (const double x : vector(op().sources[0], b, column)) out.push_back(elu(x));
                return out;
            case Kind::kConcatElu:
                for (const double x : vector(op().sources[0], b, column)) out.push_back(elu(x));
                for (const double x : vector(op().sources[0], b, column)) out.push_back(elu(-x));
                return out;
            case Kind::kRelu:
                for (const double x : vector(op().sources[0], b, column)) out.push_back(relu(x));
                return out;
            case Kind::kAdd: {
                const std::vector<double> x = vector(op().sources[0], b, column);
                const std::vector<double> y = vector(op().sources[1], b, column);
                for (int64_t c = 0; c < op().channels; ++c) out.push_back({x[c] + y[c], 0.0});
                return out;
            }
            case Kind::kGlu:
            case Kind::kTanh: {
                const std::vector<double> x = vector(op().sources[0], b, column);
                const auto gate = op().kind == Kind::kGlu ? glu : gated_tanh;
                for (int64_t c = 0; c < op().channels; ++c) out.push_back(gate(x[c], x[op().channels + c]));
                return out;
            }
            case Kind::kStoreKeys:
                for (const double x : vector(op().sources[0], b, column)) out.push_back({x, 0.0});
                return out;
            default:
                throw std::logic_error("no operation of the step phase");
        }
    }

    std::vector<Expected> lookup(int64_t b, int64_t column) const {
        const std::vector<double> start = read(memory_.starts[index_], b, column, op().channels);
        std::vector<Expected> out;
        for (int64_t c = 0; c < op().channels; ++c) {
            double sum = start[c], size = std::abs(start[c]);
            for (int64_t tap = 0; tap < op().num_taps; ++tap) {
                const int64_t from = column + tap - op().num_taps;
                if (from < 0) continue;
                const double x = op().weights[(tap * shape_.num_codes + code(b, from)) * op().channels + c];
                sum += x;
                size += std::abs(x);
            }
            out.push_back({sum, op().num_taps * kUnit * size});
        }
        return out;
    }

    std::vector<Expected> affine(int64_t b, int64_t column) const {
        const int64_t channels = op().channels;
        std::vector<double> sums = read(memory_.starts[index_], b, column, channels), sizes(channels);
        for (int64_t c = 0; c < channels; ++c) sizes[c] = std::abs(sums[c]);
        int64_t depth = 0;
        for (int64_t t = 0; t < op().num_terms; ++t) {
            const TermSpec& term = plan_.terms[op().first_term + t];
            const double* weights = weights_[t].data();
            for (int64_t k = 0; k < term.num_columns; ++k) {
                for (const double x : vector(term.source, b, column + term.first_column + k)) {
                    for (int64_t c = 0; c < channels; ++c) {
                        sums[c] += x * weights[c];
                        sizes[c] += std::abs(x * weights[c]);
                    }
                    weights += channels;
                    ++depth;
                }
            }
        }
        std::vector<Expected> out;
        for (int64_t c = 0; c < channels; ++c) {
            out.push_back({sums[c], static_cast<double>(depth + 2) * kUnit * sizes[c]});
        }
        return out;
    }

    std::vector<Expected> attend(int64_t b, int64_t column) const {
        const int64_t position = memory_.row * shape_.width + column, count = position + op().inclusive;
        const std::vector<double> query = vector(op().sources[0], b, column);
        const int64_t key_width = static_cast<int64_t>(query.size()) / op().heads;
        const int64_t value_width = op().channels / op().heads;
        // Earlier rows are only in the caches, whose content was checked then.
        const float* keys = memory_.kept[op().sources[1]].data.data() + b * query.size() * shape_.key_stride;
        const float* cache = memory_.kept[op().sources[2]].data.data() + b * shape_.positions * op().channels;
        std::vector<Expected> out;
        for (int64_t head = 0; head < op().heads; ++head) {
            std::vector<double> asked(query.begin() + head * key_width, query.begin() + (head + 1) * key_width);
            std::vector<double> seen, found;
            for (int64_t j = 0; j < count; ++j) {
                for (int64_t d = 0; d < key_width; ++d) {
                    seen.push_back(keys[(head * key_width + d) * shape_.key_stride + j]);
                }
                for (int64_t e = 0; e < value_width; ++e) {
                    found.push_back(cache[j * op().channels + head * value_width + e]);
                }
            }
            if (count == 0) found.clear();
            for (const Expected& one : attention(asked, seen, found, count)) out.push_back(one);
        }
        out.resize(op().channels, {0.0, 0.0});  // nothing to attend to
        return out;
    }

    // Drawing itself has a test of its own; here each code has to be the one of its logits and number.
    void check_codes() {
        DrawScratch scratch(shape_.num_codes);
        for (int64_t b = 0; b < shape_.batch; ++b) {
            for (int64_t column = 0; column < shape_.width; ++column) {
                const int64_t cell = (b * plan_.height + memory_.row) * shape_.width + column;
                int64_t token = memory_.first_codes[cell];
                if (!memory_.known[cell]) {
                    const View& logits = memory_.values[plan_.output];
                    draw_rows(logits.data + b * logits.batch_stride + column * logits.column_stride,
                              &memory_.uniforms[cell], 1, shape_.num_codes, memory_.draw, scratch, &token);
                }
                expect(memory_.codes[cell] == token, "code ", memory_.codes[cell], " instead of ", token);
            }
        }
    }

    static void check_rest(const std::vector<Buffer>& buffers) {
        for (const Buffer& buffer : buffers) {
            for (std::size_t i = 0; i < buffer.data.size(); ++i) {
                expect(buffer.expected[i] || std::memcmp(&buffer.data[i], &buffer.before[i], sizeof(float)) == 0,
                       "wrote where nothing was to be written");
            }
        }
    }

    Memory& memory_;
    const PlanCase& plan_;
    const StepShape& shape_;
    int64_t index_ = 0;
    std::vector<std::vector<double>> weights_;  // of the terms of the current operation
};

}  // namespace

Expected elu(double x) { return x > 0.0 ? Expected{x, 0.0} : Expected{std::expm1(x), kExp * std::abs(std::expm1(x))}; }

Expected relu(double x) { return {x < 0.0 ? 0.0 : x, 0.0}; }

Expected glu(double a, double b) {
    const double value = a * std::max(sigmoid(b), 1e-300);  // not NaN for infinite a: the engine's gate never closes
    return {value, (kExp + 4 * kUnit) * std::abs(value) + kTiny * std::abs(a)};
}

Expected gated_tanh(double a, double b) {
    const double gate = sigmoid(b), content = std::tanh(a);
    return {content * gate, (3 * kExp + 8 * kUnit) * std::abs(content * gate) + kTiny};
}

std::vector<Expected> attention(const std::vector<double>& query, const std::vector<double>& keys,
                                const std::vector<double>& values, int64_t count) {
    if (count == 0) return {};
    const int64_t key_width = static_cast<int64_t>(query.size());
    const int64_t value_width = static_cast<int64_t>(values.size()) / count;
    const double scale = 1.0 / std::sqrt(static_cast<double>(key_width));
    std::vector<double> scores(count, 0.0);
    double size = 0.0;  // largest sum of absolute products
    for (int64_t j = 0; j < count; ++j) {
        double sum = 0.0;
        for (int64_t d = 0; d < key_width; ++d) {
            const double product = query[d] * scale * keys[j * key_width + d];
            scores[j] += product;
            sum += std::abs(product);
        }
        size = std::max(size, sum);
    }
    const double largest = *std::max_element(scores.begin(), scores.end());
    double total = 0.0;
    for (double& score : scores) total += score = std::exp(score - largest);
    // An error of a score is a relative error of its weight.
    const double weight_error = 2.0 * static_cast<double>(key_width + 6) * kUnit * size + kExp;
    const double error = 2.0 * weight_error + static_cast<double>(2 * count + 16) * kUnit;
    std::vector<Expected> out(value_width, {0.0, 0.0});
    for (int64_t e = 0; e < value_width; ++e) {
        double absolute = 0.0;
        for (int64_t j = 0; j < count; ++j) {
            const double product = scores[j] / total * values[j * value_width + e];
            out[e].value += product;
            absolute += std::abs(product);
        }
        out[e].tolerance = error * absolute + kTiny;
    }
    return out;
}

void expect_close(float actual, const Expected& expected, const char* what) {
    const float rounded = static_cast<float>(expected.value);
    const bool same = actual == rounded || (std::isnan(actual) && std::isnan(rounded));
    expect(same || std::abs(actual - expected.value) <= expected.tolerance, what, ": ", actual, " instead of ",
           expected.value, " +- ", expected.tolerance);
}

float multiply_add(float a, float b, float sum, bool fused) {
    if (fused) return std::fma(a, b, sum);
    volatile float product = a * b;  // rounded before it is added, whatever the compiler would fuse
    return product + sum;
}

float upper_half(float x) {
    int exponent;
    const float fraction = std::frexp(x, &exponent);  // 8 bits are kept, ties to even
    return std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8);
}

void check_row(Memory& memory) { RowCheck(memory).run(); }

}  // namespace fastvq::cpu::testing
