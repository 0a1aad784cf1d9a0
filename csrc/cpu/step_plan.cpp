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

// Whichever thread comes first, the lowest sample is reported.
void keep_first(std::atomic<int64_t>& found, int64_t place) {
    int64_t before = found.load();
    while ((before < 0 || place < before) && !found.compare_exchange_weak(before, place)) {
    }
}

}  // namespace

StepPlan::StepPlan(std::vector<OpSpec> specs, std::vector<TermSpec> terms, int64_t output, StepShape shape, bool bf16,
                   int64_t threads, const Kernels& kernels)
    : specs_(std::move(specs)), terms_(std::move(terms)), ops_(specs_.size()), output_(output), shape_(shape),
      bf16_(bf16), threads_(threads), kernels_(kernels) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("shape: expected 1 to 1024 threads");
    check_plan(specs_, terms_, output, shape);
    for (int64_t index = 0; index < num_ops(); ++index) {
        OpSpec& op = specs_[index];
        if (op.level < 0) continue;
        levels_.resize(std::max<int64_t>(levels_.size(), op.level + 1));
        levels_[op.level].push_back(index);
        if (op.kind == Kind::kAffine) pack(index);
        if (op.kind == Kind::kLookup) ops_[index].table.assign(op.weights, op.weights + op.num_weights);
    }
    // The caller's arrays may be gone from here on.
    for (OpSpec& op : specs_) op.weights = nullptr;
    for (TermSpec& term : terms_) term.weights = nullptr;
}

// Channels [first, last) of one half of a vector, or of the whole vector if it is not paired.
StepPlan::Range StepPlan::owned(const OpSpec& op, int64_t thread) const {
    const int64_t channels = half_width(op);
    const int64_t panels = (channels + kPanel - 1) / kPanel;
    return {std::min(channels, panels * thread / threads_ * kPanel),
            std::min(channels, panels * (thread + 1) / threads_ * kPanel)};
}

void StepPlan::pack(int64_t index) {
    const OpSpec& spec = specs_[index];
    Op& op = ops_[index];
    const int64_t channels = spec.channels;
    op.depth = affine_depth(specs_, terms_, spec);
    const int64_t element = bf16_ ? sizeof(uint16_t) : sizeof(float);
    for (int64_t thread = 0; thread < threads_; ++thread) {
        Share share;
        const Range range = owned(spec, thread);
        for (int64_t half = 0; half < (spec.paired ? 2 : 1); ++half) {
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
            for (int64_t t = spec.first_term; t < spec.first_term + spec.num_terms; ++t) {
                const TermSpec& term = terms_[t];
                const int64_t depth = term.num_columns * specs_[term.source].channels;
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
    fastvq::check_views(specs_, terms_, values, starts);
}

// One thread's part of a row, on cache lines of its own.
class alignas(kAlignment) StepPlan::Worker {
   public:
    Worker(const StepPlan& plan, const RowTask& task, int64_t thread)
        : plan_(plan), task_(task), thread_(thread), scratch_(plan.shape_.num_codes), scores_(plan.shape_.key_stride) {}

    void run(int64_t column) {
        column_ = column;
        for (const int64_t index : plan_.levels_[level_]) {
            const OpSpec& op = plan_.specs_[index];
            switch (op.kind) {
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

    void lookup(const OpSpec& op, int64_t index) const {
        const int64_t channels = op.channels, taps = op.num_taps;
        const float* table = plan_.ops_[index].table.data();
        for (int64_t b = 0; b < plan_.shape_.batch; ++b) {
            const int64_t* codes = task_.codes + b * task_.code_stride;
            for_owned(op, [&](int64_t first, int64_t n) {
                float* out = at(index, b) + first;
                std::memcpy(out, start(index, b) + first, n * sizeof(float));
                for (int64_t t = 0; t < taps; ++t) {
                    const int64_t c = column_ + t - taps;
                    if (c < 0) continue;
                    const float* vector = table + (t * plan_.shape_.num_codes + codes[c]) * channels + first;
                    plan_.kernels_.add(out, vector, out, n);
                }
            });
        }
    }

    void affine(const OpSpec& op, int64_t index) const {
        const Share& share = plan_.ops_[index].shares[thread_];
        if (share.columns.empty()) return;
        Segment segments[kMaxSegments];
        int64_t count = 0;
        Product product{};
        product.weights = share.weights;
        product.bf16 = plan_.bf16_;
        product.columns = share.columns.data();
        product.widths = share.widths.data();
        product.num_panels = static_cast<int64_t>(share.columns.size());
        product.depth = plan_.ops_[index].depth;
        for (int64_t t = op.first_term; t < op.first_term + op.num_terms; ++t) {
            const TermSpec& term = plan_.terms_[t];
            const View& view = task_.values[term.source];
            segments[count++] = {view.data + (column_ + term.first_column) * view.column_stride, view.batch_stride,
                                 term.num_columns * plan_.specs_[term.source].channels};
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

    void elementwise(const OpSpec& op, int64_t index) const {
        const Kernels& k = plan_.kernels_;
        const Range range = plan_.owned(op, thread_);
        const int64_t first = range.first, n = range.last - range.first;
        if (n == 0) return;
        for (int64_t b = 0; b < plan_.shape_.batch; ++b) {
            float* out = at(index, b);
            const float* x = at(op.sources[0], b);
            switch (op.kind) {
                case Kind::kConcatElu:
                    k.elu(x + first, out + first, n);
                    k.elu_negated(x + first, out + op.channels / 2 + first, n);
                    break;
                case Kind::kGlu:
                    k.glu(x + first, x + op.channels + first, out + first, n);
                    break;
                case Kind::kTanh:
                    k.tanh(x + first, x + op.channels + first, out + first, n);
                    break;
                default:
                    for_owned(op, [&](int64_t c, int64_t m) {
                        if (op.kind == Kind::kElu) {
                            k.elu(x + c, out + c, m);
                        } else if (op.kind == Kind::kRelu) {
                            k.relu(x + c, out + c, m);
                        } else {
                            k.add(x + c, at(op.sources[1], b) + c, out + c, m);
                        }
                    });
            }
        }
    }

    // Keys lie one channel after the other, so that scores of consecutive positions are one vector.
    void store_keys(const OpSpec& op, int64_t index) const {
        const View& cache = task_.values[index];
        const int64_t position = task_.row * plan_.shape_.width + column_;
        for (int64_t b = 0; b < plan_.shape_.batch; ++b) {
            const float* key = at(op.sources[0], b);
            float* out = cache.data + b * cache.batch_stride + position;
            for_owned(op, [&](int64_t first, int64_t n) {
                for (int64_t c = first; c < first + n; ++c) out[c * plan_.shape_.key_stride] = key[c];
            });
        }
    }

    void attend(const OpSpec& op, int64_t index) {
        const int64_t position = task_.row * plan_.shape_.width + column_;
        const int64_t key_width = plan_.specs_[op.sources[0]].channels / op.heads;
        const int64_t value_width = op.channels / op.heads;
        const View& keys = task_.values[op.sources[1]];
        const View& values = task_.values[op.sources[2]];
        const int64_t jobs = plan_.shape_.batch * op.heads;
        for (int64_t job = jobs * thread_ / plan_.threads_; job < jobs * (thread_ + 1) / plan_.threads_; ++job) {
            const int64_t b = job / op.heads, head = job % op.heads;
            Attend a{};
            a.query = at(op.sources[0], b) + head * key_width;
            a.keys = keys.data + b * keys.batch_stride + head * key_width * plan_.shape_.key_stride;
            a.key_stride = plan_.shape_.key_stride;
            // The view starts at this row; attention reads from the first position of the grid.
            a.values = values.data + b * values.batch_stride -
                       task_.row * plan_.shape_.width * values.column_stride + head * value_width;
            a.value_stride = values.column_stride;
            a.count = position + (op.inclusive ? 1 : 0);
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
