// Filling grids: what is in memory while it lasts, and who does what when.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

#include "cpu/barrier.h"
#include "cpu/grid_plan.h"
#include "cpu/shared_pool.h"

namespace fastvq::cpu {
namespace {

constexpr std::size_t kAlignment = 64;

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double>(to - from).count(); }

// Whichever thread comes first, the lowest place is reported.
void keep_first(std::atomic<int64_t>& found, int64_t place) {
    int64_t before = found.load();
    while ((before < 0 || place < before) && !found.compare_exchange_weak(before, place)) {
    }
}

}  // namespace

// How large what is: floats per sample.
class GridPlan::Memory {
   public:
    // Throws std::bad_alloc if that is more than can be counted.
    Memory(const GridPlan& plan, const Front& front, int64_t batch) : plan_(plan), front_(front) {
        constexpr int64_t kMost = int64_t{1} << 50;
        for (int64_t index = 0; index < plan.num_ops(); ++index) {
            const Past& past = plan.pasts_[index];
            rings.push_back(past.kept ? Ring(front, plan.specs_[index].channels, past.above, past.left, past.right)
                                      : Ring());
            const Ring& ring = rings.back();
            const double vectors = std::max({static_cast<double>(ring.rows) * ring.pitch + ring.window(),
                                             static_cast<double>(front.rows()) * front.tile,
                                             static_cast<double>(plan.shape_.key_stride())});
            if (vectors * plan.specs_[index].channels > kMost) throw std::bad_alloc();
            total += value(index) + start(index) + once(index);
            if (total > kMost / std::max<int64_t>(1, batch)) throw std::bad_alloc();
        }
    }

    int64_t value(int64_t index) const {
        const OpSpec& op = plan_.specs_[index];
        if (op.kind == Kind::kStatic) return 0;
        if (op.uniform) return op.channels;
        if (op.kind == Kind::kStoreKeys) return op.channels * plan_.shape_.key_stride();
        if (plan_.pasts_[index].kept) return rings[index].floats();
        if (plan_.values_[index]) return op.channels * plan_.shape_.positions();
        return op.channels * front_.rows() * (op.level < 0 ? front_.tile : 1);
    }

    // Of what the part above hands over to the steps.
    int64_t start(int64_t index) const {
        const OpSpec& op = plan_.specs_[index];
        return op.level >= 0 && op.num_above > 0 ? op.channels * front_.rows() * front_.tile : 0;
    }

    // Of what the part above begins with.
    int64_t once(int64_t index) const {
        const OpSpec& op = plan_.specs_[index];
        return op.num_once > 0 && !op.uniform ? op.channels : 0;
    }

    std::vector<Ring> rings;  // by operation; empty where its past is not kept
    int64_t total = 0;

   private:
    const GridPlan& plan_;
    const Front& front_;
};

int64_t GridPlan::memory_bytes(int64_t batch, int64_t tile, int64_t offset) const {
    return Memory(*this, front_of(tile, offset), batch).total * batch * static_cast<int64_t>(sizeof(float));
}

// What the threads of a call share.
class GridPlan::Grid {
   public:
    struct Part {
        std::vector<Run> runs;
        ProductTask task{};
    };
    struct OpPlace {
        Placed<float> value{};
        Placed<const float> start{};  // of the steps
        const int64_t* copies = nullptr;  // of rings that keep some columns twice
        Part once, above, step;
    };

    Grid(const GridPlan& plan, const GridTask& task, const Front& front)
        : task(task), front(front), memory(plan, front, task.batch), places(front), ops(plan.num_ops()), plan_(plan) {
        const int64_t floats = memory.total * task.batch;
        storage_.reset(static_cast<float*>(::operator new[](std::max<int64_t>(1, floats) * sizeof(float),
                                                            std::align_val_t{kAlignment})));
        float* next = storage_.get();
        const auto take = [&](int64_t per_sample) {
            float* data = next;
            next += per_sample * task.batch;
            return data;
        };
        for (int64_t index = 0; index < plan.num_ops(); ++index) place_value(index, take(memory.value(index)));
        for (int64_t index = 0; index < plan.num_ops(); ++index) {
            const OpSpec& op = plan.specs_[index];
            if (op.kind != Kind::kAffine && op.kind != Kind::kLookup) continue;
            place_products(index, take(memory.start(index)), take(memory.once(index)));
        }
        for (int64_t index = 0; index < plan.num_ops(); ++index) {
            if (memory.rings[index].channels > 0) clear(index);
        }
    }

    const GridTask& task;
    const Front front;
    const Memory memory;
    Places places;
    std::vector<OpPlace> ops;

    // Zeros to the left of a row that begins with this step, and to the right of one that ends.
    void clear_sides(int64_t index) const {
        const Ring& ring = memory.rings[index];
        if (ring.period == 0) return;  // whole rows keep them
        for (int64_t tile = 0; tile < places.num_tiles(); ++tile) {
            const int64_t column = places.first_column(tile), row = places.tile_row(tile);
            if (column == 0) clear_columns(index, row, -ring.left, 0);
            if (column + front.tile >= front.width) clear_columns(index, row, front.width, front.width + ring.right);
        }
    }

   private:
    struct Deleter {
        void operator()(float* data) const { ::operator delete[](data, std::align_val_t{kAlignment}); }
    };

    void place_value(int64_t index, float* data) {
        const OpSpec& op = plan_.specs_[index];
        const Ring& ring = memory.rings[index];
        PlaceRule rule;
        OpPlace& to = ops[index];
        to.value = {data, memory.value(index), nullptr};
        if (op.kind == Kind::kStatic) {
            const StaticInput& input = task.statics[index];
            to.value = {const_cast<float*>(input.data), input.sample_stride, nullptr};  // read only
            rule.row = input.row_stride;
            rule.column = input.column_stride;
            if (op.uniform) return;
        } else if (op.uniform || op.kind == Kind::kStoreKeys) {
            return;
        } else if (ring.channels > 0) {
            rule.ring = &ring;
            PlaceRule copy = rule;
            copy.copy = true;
            if (ring.period > 0) to.copies = places.table(places.add(copy));
        } else if (plan_.values_[index]) {
            rule.row = front.width * op.channels;
            rule.column = op.channels;
        } else if (op.level < 0) {
            rule.place = op.channels;
        } else {
            rule.tile = op.channels;
        }
        to.value.places = places.table(places.add(rule));
    }

    void place_products(int64_t index, float* start, float* once) {
        const OpSpec& op = plan_.specs_[index];
        OpPlace& to = ops[index];
        Placed<const float> begin{plan_.ops_[index].bias.data(), 0, nullptr};
        if (op.num_once > 0) {
            place_part(to.once, op.first_once, op.num_once);
            to.once.task.start = begin;
            to.once.task.out = op.uniform ? to.value : Placed<float>{once, op.channels, nullptr};
            begin = {to.once.task.out.data, op.channels, nullptr};
        }
        Placed<float> handed = to.value;
        if (op.level >= 0 && op.num_above > 0) {
            PlaceRule rule;
            rule.place = op.channels;
            handed = {start, memory.start(index), places.table(places.add(rule))};
        }
        if (op.kind == Kind::kAffine) place_part(to.above, op.first_above, op.num_above);
        to.above.task.start = begin;
        to.above.task.out = handed;
        to.start = op.num_above > 0 ? Placed<const float>{handed.data, handed.sample_stride, handed.places} : begin;
        if (op.kind == Kind::kAffine && op.level >= 0) place_part(to.step, op.first_term, op.num_terms);
        to.step.task.start = to.start;
        to.step.task.out = to.value;
    }

    void place_part(Part& part, int64_t first, int64_t count) {
        for (int64_t t = first; t < first + count; ++t) {
            const TermSpec& term = plan_.terms_[t];
            const Placed<float>& value = ops[term.source].value;
            const int64_t channels = plan_.specs_[term.source].channels;
            if (term.is_direct()) {
                part.runs.push_back({{value.data, value.sample_stride, value.places}, channels});
                continue;
            }
            for (int64_t row = 0; row < term.num_rows; ++row) {
                PlaceRule rule;
                rule.ring = &memory.rings[term.source];
                rule.above = -(term.first_row + row);
                rule.first_column = term.first_column;
                const int64_t* table = places.table(places.add(rule));
                part.runs.push_back(
                    {{value.data, value.sample_stride, table}, term.num_columns * channels, rule.ring->zeros()});
            }
        }
        part.task.runs = part.runs.data();
        part.task.samples = task.batch;
    }

    // What no operation writes and some read: the row above the grid, and both sides.
    void clear(int64_t index) const {
        const Ring& ring = memory.rings[index];
        float* data = ops[index].value.data;
        for (int64_t b = 0; b < task.batch; ++b, data += ring.floats()) {
            std::fill_n(data + ring.zeros(), ring.window() * ring.channels, 0.0f);
            for (int64_t row = 0; row < ring.rows && ring.period == 0; ++row) {
                float* slot = data + row * ring.pitch * ring.channels;
                std::fill_n(slot, ring.left * ring.channels, 0.0f);
                std::fill_n(slot + (ring.left + front.width) * ring.channels, ring.right * ring.channels, 0.0f);
            }
        }
    }

    void clear_columns(int64_t index, int64_t row, int64_t first, int64_t last) const {
        const Ring& ring = memory.rings[index];
        for (int64_t b = 0; b < task.batch; ++b) {
            float* data = ops[index].value.data + b * ring.floats();
            for (int64_t column = first; column < last; ++column) {
                float* vector = data + ring.offset(row, column);
                std::fill_n(vector, ring.channels, 0.0f);
                if (ring.twice(ring.place(column))) {
                    std::fill_n(vector + ring.period * ring.channels, ring.channels, 0.0f);
                }
            }
        }
    }

    const GridPlan& plan_;
    std::unique_ptr<float[], Deleter> storage_;
};

// One thread's part of a call, on cache lines of its own.
class alignas(kAlignment) GridPlan::Worker {
   public:
    Worker(const GridPlan& plan, Grid& grid, int64_t thread)
        : plan_(plan), grid_(grid), task_(grid.task), kernels_(plan.kernels_), thread_(thread),
          scratch_(plan.shape_.num_codes), scores_(plan.shape_.key_stride()) {}

    // Everything that is the same at all positions.
    void run_once() {
        const std::vector<int32_t> only{0};
        for (const int64_t index : plan_.once_) {
            const OpSpec& op = plan_.specs_[index];
            if (op.kind == Kind::kStatic) continue;
            if (op.kind != Kind::kAffine) {
                for (int64_t b = 0; b < task_.batch; ++b) elementwise(op, index, b, 0, 0, half_width(op));
                continue;
            }
            const PackedProduct* product = plan_.ops_[index].once.get();
            if (product == nullptr) {
                for (int64_t b = 0; b < task_.batch; ++b) {
                    std::copy_n(plan_.ops_[index].bias.data(), op.channels, at(index, b, 0));
                }
                continue;
            }
            ProductTask once = grid_.ops[index].once.task;
            once.order = only.data();
            once.width = 1;
            product->run_share(once, {0, task_.batch, 0, product->panels()});
        }
    }

    // This thread's share of what is done before the steps of a tile; `go` is asked between operations.
    template <class Go>
    void run_above(int64_t level, const Go& go) {
        const std::vector<int32_t>& order = grid_.places.all();
        const int64_t width = static_cast<int64_t>(order.size()), rows = task_.batch * width;
        if (level == 0) {
            for (int64_t index = thread_; index < plan_.num_ops(); index += task_.threads) {
                if (grid_.memory.rings[index].channels > 0) grid_.clear_sides(index);
            }
        }
        int64_t panels = 0;
        for (const int64_t index : plan_.above_levels_[level]) {
            if (const auto& product = plan_.ops_[index].above) panels += product->panels();
        }
        // Threads in columns and rows, over the panels of all products of a level.
        const int64_t tiles = (rows + kernels_.gathered.rows - 1) / kernels_.gathered.rows;
        const ProductShare all = ProductSplit(task_.threads, std::max<int64_t>(1, panels), tiles)
                                     .share(thread_, rows, panels);
        int64_t before = 0;
        for (const int64_t index : plan_.above_levels_[level]) {
            const PackedProduct* product = plan_.ops_[index].above.get();
            if (product == nullptr) {
                const int64_t first = rows * thread_ / task_.threads, last = rows * (thread_ + 1) / task_.threads;
                for (int64_t row = first; row < last; ++row) above_row(index, row / width, order[row % width]);
                continue;
            }
            ProductShare share = all;
            share.first_panel = std::clamp<int64_t>(all.first_panel - before, 0, product->panels());
            share.last_panel = std::clamp<int64_t>(all.last_panel - before, 0, product->panels());
            before += product->panels();
            if (share.first_panel == share.last_panel || share.first_row == share.last_row) continue;
            ProductTask above = grid_.ops[index].above.task;
            above.order = order.data();
            above.width = width;
            product->run_share(above, share);
            copy_panels(index, *product, share, order);
            if (!go()) return;
        }
    }

    // This thread's channels of the operations of a level, at the places of this turn.
    void run_step(int64_t level, const std::vector<int32_t>& order) {
        for (const int64_t index : plan_.levels_[level]) {
            const OpSpec& op = plan_.specs_[index];
            if (op.kind == Kind::kAttend) {
                attend(op, index, order);
                continue;
            }
            const Range range = owned(op);
            if (range.first == range.last) continue;
            if (op.kind == Kind::kAffine) {
                affine(op, index, range, order);
            } else {
                for (int64_t b = 0; b < task_.batch; ++b) {
                    for (const int32_t place : order) {
                        if (op.kind == Kind::kLookup) {
                            lookup(op, index, b, place, range);
                        } else if (op.kind == Kind::kStoreKeys) {
                            store_keys(op, index, b, place, range);
                        } else {
                            elementwise(op, index, b, place, range.first, range.last);
                        }
                    }
                }
            }
            copy_owned(op, index, range, order);
        }
    }

    // Draws the codes of this thread's share of the samples and places. Returns a position, counted through all grids,
    // that cannot be drawn, or -1.
    int64_t draw(const std::vector<int32_t>& order) {
        const int64_t width = static_cast<int64_t>(order.size()), rows = task_.batch * width;
        for (int64_t row = rows * thread_ / task_.step_threads; row < rows * (thread_ + 1) / task_.step_threads; ++row) {
            const int64_t b = row / width, place = order[row % width];
            const int64_t position = b * plan_.shape_.positions() + position_of(place);
            const float* logits = at(plan_.output_, b, place);
            if (task_.logits != nullptr) {
                std::copy_n(logits, plan_.shape_.num_codes, task_.logits + position * plan_.shape_.num_codes);
            }
            if (task_.known[position]) continue;
            if (draw_rows(logits, task_.uniforms + position, 1, plan_.shape_.num_codes, task_.draw, scratch_,
                          task_.codes + position) >= 0) {
                return position;
            }
        }
        return -1;
    }

   private:
    struct Range {
        int64_t first, last;
    };

    // Channels of one half of a vector, or of the whole vector if it is not paired.
    Range owned(const OpSpec& op) const {
        const int64_t channels = half_width(op), panels = (channels + kPanel - 1) / kPanel;
        return {std::min(channels, panels * thread_ / task_.step_threads * kPanel),
                std::min(channels, panels * (thread_ + 1) / task_.step_threads * kPanel)};
    }

    float* at(int64_t index, int64_t sample, int64_t place) const { return grid_.ops[index].value.at(sample, place); }

    int64_t position_of(int64_t place) const {
        return grid_.places.row(place) * plan_.shape_.width + grid_.places.column(place);
    }

    void affine(const OpSpec& op, int64_t index, const Range& range, const std::vector<int32_t>& order) const {
        const PackedProduct& product = *plan_.ops_[index].step;
        ProductTask step = grid_.ops[index].step.task;
        step.order = order.data();
        step.width = static_cast<int64_t>(order.size());
        const int64_t columns = kernels_.gathered.columns;
        const int64_t first = range.first / columns, last = (range.last + columns - 1) / columns;
        for (int64_t half = 0; half < (op.paired ? 2 : 1); ++half) {
            const int64_t base = half * product.part_panels();
            product.run_share(step, {0, task_.batch * step.width, base + first, base + last});
        }
    }

    void lookup(const OpSpec& op, int64_t index, int64_t b, int64_t place, const Range& range) const {
        const float* table = plan_.ops_[index].step_table.data();
        const int64_t row = grid_.places.row(place), column = grid_.places.column(place);
        const int64_t* codes = task_.codes + b * plan_.shape_.positions() + row * plan_.shape_.width;
        for_halves(op, range, [&](int64_t first, int64_t n) {
            float* out = at(index, b, place) + first;
            std::copy_n(grid_.ops[index].start.at(b, place) + first, n, out);
            for (int64_t t = std::max<int64_t>(0, op.num_taps - column); t < op.num_taps; ++t) {
                const int64_t code = codes[column + t - op.num_taps];
                kernels_.add(out, table + (t * plan_.shape_.num_codes + code) * op.channels + first, out, n);
            }
        });
    }

    // Of an operation without a product above: a lookup's taps, or what is known element by element.
    void above_row(int64_t index, int64_t b, int64_t place) const {
        const OpSpec& op = plan_.specs_[index];
        if (op.kind != Kind::kLookup && op.kind != Kind::kAffine) {
            elementwise(op, index, b, place, 0, half_width(op));
        } else {
            float* out = grid_.ops[index].above.task.out.at(b, place);
            std::copy_n(grid_.ops[index].above.task.start.at(b, place), op.channels, out);
            const float* table = plan_.ops_[index].above_table.data();
            for (int64_t t = 0; op.kind == Kind::kLookup && t < op.num_above; ++t) {
                const TermSpec& tap = plan_.terms_[op.first_above + t];
                const int64_t row = grid_.places.row(place) + tap.first_row;
                const int64_t column = grid_.places.column(place) + tap.first_column;
                if (row < 0 || column < 0 || column >= plan_.shape_.width) continue;
                const int64_t code = task_.codes[b * plan_.shape_.positions() + row * plan_.shape_.width + column];
                kernels_.add(out, table + (t * plan_.shape_.num_codes + code) * op.channels, out, op.channels);
            }
        }
        if (op.level < 0) copy_place(index, b, place, 0, op.channels);
    }

    // Calls f(first channel, number of channels) for each stretch of channels.
    template <class F>
    static void for_halves(const OpSpec& op, const Range& range, F f) {
        f(range.first, range.last - range.first);
        if (op.paired) f(op.channels / 2 + range.first, range.last - range.first);
    }

    // Channels [first, last) of the halves, or of the vector.
    void elementwise(const OpSpec& op, int64_t index, int64_t b, int64_t place, int64_t first, int64_t last) const {
        float* out = at(index, b, place);
        const float* x = at(op.sources[0], b, place);
        const int64_t n = last - first;
        switch (op.kind) {
            case Kind::kConcatElu:
                kernels_.elu(x + first, out + first, n);
                kernels_.elu_negated(x + first, out + op.channels / 2 + first, n);
                break;
            case Kind::kGlu:
                kernels_.glu(x + first, x + op.channels + first, out + first, n);
                break;
            case Kind::kTanh:
                kernels_.tanh(x + first, x + op.channels + first, out + first, n);
                break;
            default:
                for_halves(op, {first, last}, [&](int64_t c, int64_t m) {
                    if (op.kind == Kind::kElu) {
                        kernels_.elu(x + c, out + c, m);
                    } else if (op.kind == Kind::kRelu) {
                        kernels_.relu(x + c, out + c, m);
                    } else {
                        kernels_.add(x + c, at(op.sources[1], b, place) + c, out + c, m);
                    }
                });
        }
    }

    // Keys lie one channel after the other, so that scores of consecutive positions are one vector.
    void store_keys(const OpSpec& op, int64_t index, int64_t b, int64_t place, const Range& range) const {
        const float* key = at(op.sources[0], b, place);
        float* out = at(index, b, 0) + position_of(place);
        for_halves(op, range, [&](int64_t first, int64_t n) {
            for (int64_t c = first; c < first + n; ++c) out[c * plan_.shape_.key_stride()] = key[c];
        });
    }

    void attend(const OpSpec& op, int64_t index, const std::vector<int32_t>& order) {
        const int64_t key_width = plan_.specs_[op.sources[0]].channels / op.heads;
        const int64_t value_width = op.channels / op.heads, stride = plan_.shape_.key_stride();
        const int64_t jobs = task_.batch * op.heads, place = order.front();  // raster order has one place at a time
        const Placed<float>& values = grid_.ops[op.sources[2]].value;
        for (int64_t job = jobs * thread_ / task_.step_threads; job < jobs * (thread_ + 1) / task_.step_threads; ++job) {
            const int64_t b = job / op.heads, head = job % op.heads;
            Attend a{};
            a.query = at(op.sources[0], b, place) + head * key_width;
            a.keys = at(op.sources[1], b, 0) + head * key_width * stride;
            a.key_stride = stride;
            a.values = values.data + b * values.sample_stride + head * value_width;
            a.value_stride = op.channels;
            a.count = position_of(place) + (op.inclusive ? 1 : 0);
            a.key_width = key_width;
            a.value_width = value_width;
            a.scores = scores_.data();
            a.out = at(index, b, place) + head * value_width;
            kernels_.attend(a);
        }
    }

    // The second copy of some channels of a vector, where its ring keeps one.
    void copy_place(int64_t index, int64_t b, int64_t place, int64_t first, int64_t n) const {
        const int64_t* copies = grid_.ops[index].copies;
        if (copies == nullptr || copies[place] == 0) return;
        float* vector = at(index, b, place) + first;
        std::copy_n(vector, n, vector + copies[place]);
    }

    void copy_owned(const OpSpec& op, int64_t index, const Range& range, const std::vector<int32_t>& order) const {
        if (grid_.ops[index].copies == nullptr) return;
        for (int64_t b = 0; b < task_.batch; ++b) {
            for (const int32_t place : order) {
                for_halves(op, range, [&](int64_t first, int64_t n) { copy_place(index, b, place, first, n); });
            }
        }
    }

    void copy_panels(int64_t index, const PackedProduct& product, const ProductShare& share,
                     const std::vector<int32_t>& order) const {
        const OpSpec& op = plan_.specs_[index];
        if (op.level >= 0 || grid_.ops[index].copies == nullptr) return;
        const int64_t width = static_cast<int64_t>(order.size()), columns = kernels_.gathered.columns;
        for (int64_t panel = share.first_panel; panel < share.last_panel; ++panel) {
            const int64_t within = panel % product.part_panels() * columns;
            const int64_t first = panel / product.part_panels() * half_width(op) + within;
            const int64_t n = std::min(columns, half_width(op) - within);
            for (int64_t row = share.first_row; row < share.last_row; ++row) {
                copy_place(index, row / width, order[row % width], first, n);
            }
        }
    }

    const GridPlan& plan_;
    Grid& grid_;
    const GridTask& task_;
    const Kernels& kernels_;
    const int64_t thread_;
    DrawScratch scratch_;
    std::vector<float> scores_;
};

GridResult GridPlan::run(const GridTask& task) const {
    if (task.threads < 1 || task.threads > 1024 || task.step_threads < 1 || task.step_threads > task.threads) {
        throw std::invalid_argument("threads: expected 1 to 1024, and no more for the steps");
    }
    const Front front = front_of(task.tile, task.offset);
    GridResult result;
    if (task.batch == 0) return result;
    Grid grid(*this, task, front);
    Barrier all(task.threads), step(task.step_threads);
    std::atomic<bool> stop{false};
    std::atomic<int64_t> failed{-1};
    // Made before any thread is: memory may run out, and nothing may throw in a thread.
    std::vector<Worker> workers;
    workers.reserve(task.threads);
    for (int64_t thread = 0; thread < task.threads; ++thread) workers.emplace_back(*this, grid, thread);
    workers.front().run_once();
    const auto num_levels = static_cast<int64_t>(levels_.size()), num_above = static_cast<int64_t>(above_levels_.size());
    int64_t told = 0, complete = 0;
    auto asked = Clock::now();
    // By the calling thread alone.
    const auto ask = [&] {
        const auto now = Clock::now();
        if (stop.load()) return;
        if (complete == told && now - asked < std::chrono::milliseconds(50)) return;
        asked = now;
        told = complete;
        if (task.keep_going != nullptr && !task.keep_going(task.context, complete)) stop.store(true);
    };
    const auto ended = [&] { return failed.load() >= 0 || stop.load(); };
    const auto work = [&](int64_t thread) {
        Worker& worker = workers[thread];
        const auto go = [&] {
            if (thread == 0) ask();
            return !stop.load();
        };
        for (int64_t number = 0; number < front.steps(); ++number) {
            const auto begin = Clock::now();
            if (thread == 0) grid.places.begin(number);
            all.wait();
            for (int64_t level = 0; level < num_above; ++level) {
                worker.run_above(level, go);
                all.wait();
            }
            const auto middle = Clock::now();
            for (int64_t turn = 0; thread < task.step_threads && turn < front.tile; ++turn) {
                const std::vector<int32_t>& order = grid.places.at_turn(turn);
                if (order.empty() || ended()) break;
                for (int64_t level = 0; level < num_levels; ++level) {
                    worker.run_step(level, order);
                    step.wait();
                }
                const int64_t position = worker.draw(order);
                if (position >= 0) keep_first(failed, position);
                // Asked before the barrier, so that all threads leave at the same column.
                if (thread == 0) ask();
                step.wait();
            }
            if (thread == 0) {
                result.above_seconds += seconds(begin, middle);
                result.step_seconds += seconds(middle, Clock::now());
                if (!ended()) complete = front.complete(number);
                ask();
            }
            all.wait();
            // Written before the barrier, so that all threads leave after the same tile.
            if (ended()) break;
        }
    };
    run_shared_team(task.threads, work);
    if (const int64_t position = failed.load(); position >= 0) {
        result.outcome = Outcome::kNotDrawable;
        result.sample = position / shape_.positions();
        result.row = position % shape_.positions() / shape_.width;
        result.column = position % shape_.width;
    } else if (stop.load()) {
        result.outcome = Outcome::kStopped;
    }
    return result;
}

}  // namespace fastvq::cpu
