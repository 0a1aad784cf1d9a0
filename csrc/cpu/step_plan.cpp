#include "cpu/step_plan.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/barrier.h"
#include "cpu/shared_pool.h"

namespace fastvq::cpu {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr int64_t kMaxSegments = 16;
constexpr int64_t kMaxSize = int64_t{1} << 31;

void require(bool condition, int64_t op, const char* what) {
    if (!condition) throw std::invalid_argument("operation " + std::to_string(op) + ": " + what);
}

// Whether count == a * b * c, for positive factors of any size.
bool is_product(int64_t count, int64_t a, int64_t b, int64_t c) {
    return count > 0 && count % a == 0 && count / a % b == 0 && count / a / b == c;
}

// Whichever thread comes first, the lowest sample is reported.
void keep_first(std::atomic<int64_t>& found, int64_t place) {
    int64_t before = found.load();
    while ((before < 0 || place < before) && !found.compare_exchange_weak(before, place)) {
    }
}

uint16_t round_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

}  // namespace

StepPlan::StepPlan(std::vector<OpSpec> ops, const std::vector<TermSpec>& terms, int64_t output, StepShape shape,
                   bool bf16, int64_t threads, const Kernels& kernels)
    : output_(output), shape_(shape), bf16_(bf16), threads_(threads), kernels_(kernels) {
    if (shape.batch < 1 || shape.width < 1 || shape.num_codes < 1 || shape.positions < shape.width || threads < 1 ||
        threads > 1024 || shape.key_stride < shape.positions || shape.key_stride % 16 != 0 ||
        std::max({shape.batch, shape.num_codes, shape.key_stride}) >= kMaxSize) {
        throw std::invalid_argument("shape: expected positive sizes and key rows padded to a multiple of 16");
    }
    // All operations are stored before any is checked, because terms may read later ones.
    for (const OpSpec& spec : ops) {
        require(spec.channels >= 1 && spec.channels < kMaxSize && (!spec.paired || spec.channels % 2 == 0), num_ops(),
                "bad number of channels");
        ops_.emplace_back();
        ops_.back().spec = spec;
    }
    int64_t num_levels = 0;
    for (int64_t index = 0; index < num_ops(); ++index) {
        check(ops_[index].spec, index, terms);
        num_levels = std::max(num_levels, ops_[index].spec.level + 1);
    }
    if (output < 0 || output >= num_ops() || ops_[output].spec.channels != shape.num_codes ||
        ops_[output].spec.level < 0) {
        throw std::invalid_argument("output: expected an operation of the step phase with a logit per code");
    }
    levels_.resize(num_levels);
    for (int64_t index = 0; index < num_ops(); ++index) {
        Op& op = ops_[index];
        if (op.spec.level < 0) continue;
        levels_[op.spec.level].push_back(index);
        if (op.spec.kind == Kind::kAffine) pack(op, terms);
        if (op.spec.kind == Kind::kLookup) {
            const int64_t size = op.spec.num_taps * shape.num_codes * op.spec.channels;
            op.table.assign(op.spec.weights, op.spec.weights + size);
        }
    }
}

void StepPlan::check(const OpSpec& op, int64_t index, const std::vector<TermSpec>& terms) const {
    if (op.level < 0) return;  // worked out before the row starts
    require(op.level < num_ops(), index, "its level is beyond the number of operations");
    const auto source = [&](int which) -> const OpSpec& {
        const int64_t at = op.sources[which];
        require(at >= 0 && at < num_ops(), index, "a source does not exist");
        return ops_[at].spec;
    };
    const auto same = [&](const OpSpec& from, int64_t channels) {
        require(from.channels == channels, index, "channels of a source do not fit");
    };
    // Within a level a thread goes on with the channels it has computed itself; all others are known a level later.
    const auto known = [&](int which, bool split_alike) {
        const OpSpec& from = source(which);
        const bool own = split_alike && from.kind != Kind::kAttend && op.sources[which] < index;
        require(from.level < op.level || (from.level == op.level && own), index, "a source is not known at its level");
    };
    switch (op.kind) {
        case Kind::kLookup:
            require(op.num_taps >= 1 && op.weights != nullptr &&
                        is_product(op.num_weights, op.channels, shape_.num_codes, op.num_taps),
                    index, "a lookup needs taps and a table of their size");
            break;
        case Kind::kAffine:
            require(op.first_term >= 0 && op.num_terms >= 1 && op.num_terms <= kMaxSegments &&
                        op.first_term <= static_cast<int64_t>(terms.size()) - op.num_terms,
                    index, "terms do not exist");
            for (int64_t t = op.first_term; t < op.first_term + op.num_terms; ++t) {
                const TermSpec& term = terms[t];
                require(term.source >= 0 && term.source < num_ops(), index, "a source does not exist");
                const OpSpec& from = ops_[term.source].spec;
                require(term.num_columns >= 1 && term.first_column > -kMaxSize &&
                            term.first_column <= 1 - term.num_columns,
                        index, "a term reads columns that are not known yet");
                require(term.first_column <= -term.num_columns || from.level < op.level, index,
                        "a source is not known at its level");
                require(term.weights != nullptr &&
                            is_product(term.num_weights, op.channels, from.channels, term.num_columns),
                        index, "a term needs weights of its size");
            }
            break;
        case Kind::kElu:
        case Kind::kRelu:
            same(source(0), op.channels);
            known(0, source(0).paired == op.paired);
            break;
        case Kind::kConcatElu:
            same(source(0), op.channels / 2);
            require(op.paired, index, "concatenated halves must be paired");
            known(0, !source(0).paired);
            break;
        case Kind::kAdd:
            for (int which = 0; which < 2; ++which) {
                same(source(which), op.channels);
                known(which, source(which).paired == op.paired);
            }
            break;
        case Kind::kGlu:
        case Kind::kTanh:
            same(source(0), 2 * op.channels);
            require(!op.paired, index, "what a gate gives cannot be paired");
            known(0, source(0).paired);
            break;
        case Kind::kStoreKeys:
            same(source(0), op.channels);
            known(0, source(0).paired == op.paired);
            break;
        case Kind::kAttend:
            require(op.heads >= 1 && source(0).channels == source(1).channels && source(2).channels == op.channels &&
                        op.channels % op.heads == 0 && source(0).channels % op.heads == 0 &&
                        source(1).kind == Kind::kStoreKeys && source(1).level >= 0,
                    index, "attention needs query, stored keys and values of fitting widths");
            for (int which = 0; which < (op.inclusive ? 3 : 1); ++which) known(which, false);
            // Keys are loaded by whole vectors, so even where the own position does not count nobody may be writing it.
            require(source(1).level != op.level, index, "keys are stored at the level that reads them");
            break;
        default:
            require(false, index, "unknown kind");
    }
}

// Channels [first, last) of one half of a vector, or of the whole vector if it is not paired.
StepPlan::Range StepPlan::owned(const OpSpec& op, int64_t thread) const {
    const int64_t channels = op.paired ? op.channels / 2 : op.channels;
    const int64_t panels = (channels + kPanel - 1) / kPanel;
    return {std::min(channels, panels * thread / threads_ * kPanel),
            std::min(channels, panels * (thread + 1) / threads_ * kPanel)};
}

void StepPlan::pack(Op& op, const std::vector<TermSpec>& terms) {
    const int64_t channels = op.spec.channels;
    op.terms.assign(terms.begin() + op.spec.first_term, terms.begin() + op.spec.first_term + op.spec.num_terms);
    for (const TermSpec& term : op.terms) op.depth += term.num_columns * ops_[term.source].spec.channels;
    const int64_t element = bf16_ ? sizeof(uint16_t) : sizeof(float);
    for (int64_t thread = 0; thread < threads_; ++thread) {
        Share share;
        const Range range = owned(op.spec, thread);
        for (int64_t half = 0; half < (op.spec.paired ? 2 : 1); ++half) {
            const int64_t base = half * channels / 2;
            for (int64_t c = range.first; c < range.last; c += kPanel) {
                share.columns.push_back(base + c);
                share.widths.push_back(std::min(kPanel, range.last - c));
            }
        }
        const int64_t panels = static_cast<int64_t>(share.columns.size());
        const int64_t bytes = panels * op.depth * kPanel * element;
        share.storage = std::make_unique<char[]>(bytes + kAlignment);
        void* aligned = share.storage.get();
        std::size_t space = bytes + kAlignment;
        share.weights = std::align(kAlignment, bytes, aligned, space);
        weight_bytes_ += bytes;
        int64_t place = 0;
        for (int64_t p = 0; p < panels; ++p) {
            for (const TermSpec& term : op.terms) {
                const int64_t depth = term.num_columns * ops_[term.source].spec.channels;
                for (int64_t k = 0; k < depth; ++k) {
                    for (int64_t c = 0; c < kPanel; ++c, ++place) {
                        const bool exists = c < share.widths[p];
                        const float w = exists ? term.weights[k * channels + share.columns[p] + c] : 0.0f;
                        if (bf16_) {
                            static_cast<uint16_t*>(share.weights)[place] = round_to_bf16(w);
                        } else {
                            static_cast<float*>(share.weights)[place] = w;
                        }
                    }
                }
            }
        }
        op.shares.push_back(std::move(share));
    }
}

void StepPlan::check_views(const View* values, const View* starts) const {
    for (int64_t index = 0; index < num_ops(); ++index) {
        const OpSpec& op = ops_[index].spec;
        require(op.level < 0 || values[index].data != nullptr, index, "no memory for its values");
        const bool begins = op.kind == Kind::kAffine || op.kind == Kind::kLookup;
        require(op.level < 0 || !begins || starts[index].data != nullptr, index, "no start from the rows above");
        if (op.level < 0) continue;
        for (const TermSpec& term : ops_[index].terms) {
            const int64_t stride = values[term.source].column_stride;
            require(values[term.source].data != nullptr, index, "no values of a source");
            require(term.num_columns == 1 || stride == ops_[term.source].spec.channels, index, "columns lie apart");
            require(term.first_column == 0 || stride != 0, index, "columns of a source are not kept");
        }
        const int64_t sources = op.kind == Kind::kAttend ? 3 : op.kind == Kind::kAdd ? 2 : begins ? 0 : 1;
        for (int64_t s = 0; s < sources; ++s) {
            require(values[op.sources[s]].data != nullptr, index, "no values of a source");
        }
    }
}

// One thread's part of a row, on cache lines of its own.
class alignas(kAlignment) StepPlan::Worker {
   public:
    Worker(const StepPlan& plan, const RowTask& task, int64_t thread)
        : plan_(plan), task_(task), thread_(thread), scratch_(plan.shape_.num_codes), scores_(plan.shape_.key_stride) {}

    void run(int64_t column) {
        column_ = column;
        for (const int64_t index : plan_.levels_[level_]) {
            const Op& op = plan_.ops_[index];
            switch (op.spec.kind) {
                case Kind::kLookup:
                    lookup(op, index);
                    break;
                case Kind::kAffine:
                    affine(op, index);
                    break;
                case Kind::kStoreKeys:
                    store_keys(op, index);
                    break;
                case Kind::kAttend:
                    attend(op, index);
                    break;
                default:
                    elementwise(op, index);
            }
        }
    }

    void set_level(int64_t level) { level_ = level; }

    // Draws the codes of this thread's share of the samples. Returns the first sample that cannot be drawn, or -1.
    int64_t draw(int64_t column) {
        column_ = column;
        const int64_t batch = plan_.shape_.batch;
        for (int64_t b = batch * thread_ / plan_.threads_; b < batch * (thread_ + 1) / plan_.threads_; ++b) {
            if (task_.known[b * task_.known_stride + column]) continue;
            int64_t* code = task_.codes + b * task_.code_stride + column;
            if (draw_rows(at(plan_.output_, b), task_.uniforms + b * task_.uniform_stride + column, 1,
                          plan_.shape_.num_codes, task_.draw, scratch_, code) >= 0) {
                return b;
            }
        }
        return -1;
    }

   private:
    float* at(int64_t index, int64_t sample) const {
        const View& view = task_.values[index];
        return view.data + sample * view.batch_stride + column_ * view.column_stride;
    }

    const float* start(int64_t index, int64_t sample) const {
        const View& view = task_.starts[index];
        return view.data + sample * view.batch_stride + column_ * view.column_stride;
    }

    // Calls f(first channel, number of channels) for each stretch of channels that this thread owns.
    template <class F>
    void for_owned(const OpSpec& op, F f) const {
        const Range range = plan_.owned(op, thread_);
        if (range.first == range.last) return;
        f(range.first, range.last - range.first);
        if (op.paired) f(op.channels / 2 + range.first, range.last - range.first);
    }

    void lookup(const Op& op, int64_t index) const {
        const int64_t channels = op.spec.channels, taps = op.spec.num_taps;
        for (int64_t b = 0; b < plan_.shape_.batch; ++b) {
            const int64_t* codes = task_.codes + b * task_.code_stride;
            for_owned(op.spec, [&](int64_t first, int64_t n) {
                float* out = at(index, b) + first;
                std::memcpy(out, start(index, b) + first, n * sizeof(float));
                for (int64_t t = 0; t < taps; ++t) {
                    const int64_t c = column_ + t - taps;
                    if (c < 0) continue;
                    const float* vector = op.table.data() + (t * plan_.shape_.num_codes + codes[c]) * channels + first;
                    plan_.kernels_.add(out, vector, out, n);
                }
            });
        }
    }

    void affine(const Op& op, int64_t index) const {
        const Share& share = op.shares[thread_];
        if (share.columns.empty()) return;
        Segment segments[kMaxSegments];
        int64_t count = 0;
        Product product{};
        product.weights = share.weights;
        product.bf16 = plan_.bf16_;
        product.columns = share.columns.data();
        product.widths = share.widths.data();
        product.num_panels = static_cast<int64_t>(share.columns.size());
        product.depth = op.depth;
        for (const TermSpec& term : op.terms) {
            const View& view = task_.values[term.source];
            segments[count++] = {view.data + (column_ + term.first_column) * view.column_stride, view.batch_stride,
                                 term.num_columns * plan_.ops_[term.source].spec.channels};
        }
        product.segments = segments;
        product.num_segments = count;
        product.start = start(index, 0);
        product.start_stride = task_.starts[index].batch_stride;
        product.out = at(index, 0);
        product.out_stride = task_.values[index].batch_stride;
        product.rows = plan_.shape_.batch;
        plan_.kernels_.product(product);
    }

    void elementwise(const Op& op, int64_t index) const {
        const Kernels& k = plan_.kernels_;
        const Range range = plan_.owned(op.spec, thread_);
        const int64_t first = range.first, n = range.last - range.first;
        if (n == 0) return;
        for (int64_t b = 0; b < plan_.shape_.batch; ++b) {
            float* out = at(index, b);
            const float* x = at(op.spec.sources[0], b);
            switch (op.spec.kind) {
                case Kind::kConcatElu:
                    k.elu(x + first, out + first, n);
                    k.elu_negated(x + first, out + op.spec.channels / 2 + first, n);
                    break;
                case Kind::kGlu:
                    k.glu(x + first, x + op.spec.channels + first, out + first, n);
                    break;
                case Kind::kTanh:
                    k.tanh(x + first, x + op.spec.channels + first, out + first, n);
                    break;
                default:
                    for_owned(op.spec, [&](int64_t c, int64_t m) {
                        if (op.spec.kind == Kind::kElu) {
                            k.elu(x + c, out + c, m);
                        } else if (op.spec.kind == Kind::kRelu) {
                            k.relu(x + c, out + c, m);
                        } else {
                            k.add(x + c, at(op.spec.sources[1], b) + c, out + c, m);
                        }
                    });
            }
        }
    }

    // Keys lie one channel after the other, so that scores of consecutive positions are one vector.
    void store_keys(const Op& op, int64_t index) const {
        const View& cache = task_.values[index];
        const int64_t position = task_.row * plan_.shape_.width + column_;
        for (int64_t b = 0; b < plan_.shape_.batch; ++b) {
            const float* key = at(op.spec.sources[0], b);
            float* out = cache.data + b * cache.batch_stride + position;
            for_owned(op.spec, [&](int64_t first, int64_t n) {
                for (int64_t c = first; c < first + n; ++c) out[c * plan_.shape_.key_stride] = key[c];
            });
        }
    }

    void attend(const Op& op, int64_t index) {
        const int64_t position = task_.row * plan_.shape_.width + column_;
        const int64_t key_width = plan_.ops_[op.spec.sources[0]].spec.channels / op.spec.heads;
        const int64_t value_width = op.spec.channels / op.spec.heads;
        const View& keys = task_.values[op.spec.sources[1]];
        const View& values = task_.values[op.spec.sources[2]];
        const int64_t jobs = plan_.shape_.batch * op.spec.heads;
        for (int64_t job = jobs * thread_ / plan_.threads_; job < jobs * (thread_ + 1) / plan_.threads_; ++job) {
            const int64_t b = job / op.spec.heads, head = job % op.spec.heads;
            Attend a{};
            a.query = at(op.spec.sources[0], b) + head * key_width;
            a.keys = keys.data + b * keys.batch_stride + head * key_width * plan_.shape_.key_stride;
            a.key_stride = plan_.shape_.key_stride;
            // The view starts at this row; attention reads from the first position of the grid.
            a.values = values.data + b * values.batch_stride -
                       task_.row * plan_.shape_.width * values.column_stride + head * value_width;
            a.value_stride = values.column_stride;
            a.count = position + (op.spec.inclusive ? 1 : 0);
            a.key_width = key_width;
            a.value_width = value_width;
            a.scores = scores_.data();
            a.out = at(index, b) + head * value_width;
            plan_.kernels_.attend(a);
        }
    }

    const StepPlan& plan_;
    const RowTask& task_;
    const int64_t thread_;
    int64_t column_ = 0, level_ = 0;
    DrawScratch scratch_;
    std::vector<float> scores_;
};

Outcome StepPlan::run_row(const RowTask& task, int64_t* bad) const {
    Barrier barrier(threads_);
    std::atomic<bool> stop{false};
    std::atomic<int64_t> failed{-1};
    // Made before any thread is: memory may run out, and nothing may throw in a thread.
    std::vector<Worker> workers;
    workers.reserve(threads_);
    for (int64_t thread = 0; thread < threads_; ++thread) workers.emplace_back(*this, task, thread);
    const auto work = [&](int64_t thread) {
        Worker& worker = workers[thread];
        auto asked = std::chrono::steady_clock::now();
        for (int64_t column = 0; column < shape_.width; ++column) {
            for (int64_t level = 0; level < static_cast<int64_t>(levels_.size()); ++level) {
                worker.set_level(level);
                worker.run(column);
                barrier.wait();
            }
            const int64_t sample = worker.draw(column);
            if (sample >= 0) keep_first(failed, sample * shape_.width + column);
            if (thread == 0 && task.keep_going != nullptr) {
                const auto now = std::chrono::steady_clock::now();
                if (now - asked > std::chrono::milliseconds(50)) {
                    asked = now;
                    if (!task.keep_going(task.context)) stop.store(true);
                }
            }
            barrier.wait();
            // Written before the barrier, so that all threads leave at the same column.
            if (failed.load() >= 0 || stop.load()) break;
        }
    };
    run_shared_team(threads_, work);
    if (failed.load() >= 0) {
        *bad = failed.load();
        return Outcome::kNotDrawable;
    }
    return stop.load() ? Outcome::kStopped : Outcome::kDone;
}

}  // namespace fastvq::cpu
