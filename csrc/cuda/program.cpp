#include "cuda/program.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastvq::cuda {
namespace {

constexpr int64_t kMostSize = 1 << 24;  // keeps products of two sizes below 2^63 and sums of a few below 2^31
constexpr int64_t kFragment = 16;       // columns and rows of a tile of weights
// Channels times samples that are worth a block of their own where there are no weights.
constexpr int64_t kLightWork = 16 * kThreads;

struct Unit {
    int64_t level = 0;
    std::vector<int64_t> ops;  // in the order in which they run; none: the draw
    bool jobs = false;         // `width` counts jobs instead of channels of a half
    int64_t width = 0;
    int64_t step = 1;          // slices are whole multiples of it
    int64_t most = 0;          // and where there are weights, at most as wide as this
    int64_t cost = 0;          // of one channel or job: products per sample, roughly
    bool weighty = false;      // has weights that stay with a block
    bool late = false;         // waits for the draw of the last column
};

struct Task {
    int64_t unit, first, count;
};

struct Part {
    std::vector<Task> tasks;
    int64_t cost = 0;
};

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Code code_of(Kind kind) {
    switch (kind) {
        case Kind::kLookup: return Code::kLookup;
        case Kind::kAffine: return Code::kAffine;
        case Kind::kElu: return Code::kElu;
        case Kind::kConcatElu: return Code::kConcatElu;
        case Kind::kRelu: return Code::kRelu;
        case Kind::kAdd: return Code::kAdd;
        case Kind::kGlu: return Code::kGlu;
        case Kind::kTanh: return Code::kTanh;
        case Kind::kStoreKeys: return Code::kStoreKeys;
        case Kind::kAttend: return Code::kAttend;
    }
    throw std::invalid_argument("unknown kind");
}

// Cuts units one after the other into at most `blocks` parts whose greatest cost is as small as possible, if parts are
// taken from the sequence in order. `take` gets the steps of a unit that go into the current part, and whether another
// part begins before them.
template <class Take>
int64_t cut(const std::vector<Unit>& units, const std::vector<int64_t>& which, int64_t limit, Take take) {
    int64_t parts = 0, room = 0;
    for (const int64_t u : which) {
        const Unit& unit = units[u];
        const int64_t cost = unit.cost * unit.step;
        int64_t done = 0;
        const int64_t steps = quotient_up(unit.width, unit.step);
        while (done < steps) {
            const bool fresh = parts == 0 || room < cost;
            if (fresh) {
                ++parts;
                room = limit;
            }
            const int64_t count = std::min(steps - done, room / cost);
            take(u, done, count, fresh);
            room -= count * cost;
            done += count;
        }
    }
    return parts;
}

class Planner {
   public:
    Planner(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output, const StepShape& shape,
            const ProgramOptions& options)
        : ops_(ops), terms_(terms), output_(output), shape_(shape), options_(options) {}

    Program run() {
        check();
        program_.layout = !options_.bf16 ? Layout::kFloat
                          : options_.fragments && shape_.batch >= kFragmentSamples ? Layout::kFragments
                                                                                   : Layout::kBfloat;
        make_units();
        assign();
        emit();
        pack();
        return std::move(program_);
    }

   private:
    int64_t num_ops() const { return static_cast<int64_t>(ops_.size()); }

    void check() const {
        check_plan(ops_, terms_, output_, shape_);
        if (options_.blocks < 1 || options_.blocks > 65535) {
            throw std::invalid_argument("blocks: expected 1 to 65535, got " + std::to_string(options_.blocks));
        }
        if (std::max({shape_.batch, shape_.key_stride, shape_.num_codes}) > kMostSize) {
            throw std::invalid_argument("shape: expected sizes of at most 2^24");
        }
        for (int64_t index = 0; index < num_ops(); ++index) {
            const OpSpec& op = ops_[index];
            require(op.channels <= kMostSize, index, "more than 2^24 channels");
            if (op.level < 0) continue;
            require(op.kind != Kind::kAttend || shape_.batch * op.heads <= kMostSize, index,
                    "more than 2^24 samples times heads");
            require(op.kind != Kind::kAffine || affine_depth(ops_, terms_, op) <= kMostSize, index,
                    "more than 2^24 factors of a sum");
        }
    }

    // Operations linked by reading each other's channels within a level, and last the draw.
    void make_units() {
        std::vector<int64_t> leader(num_ops());
        std::iota(leader.begin(), leader.end(), 0);
        const auto find = [&](int64_t index) {
            while (leader[index] != index) index = leader[index] = leader[leader[index]];
            return index;
        };
        for (int64_t index = 0; index < num_ops(); ++index) {
            const OpSpec& op = ops_[index];
            if (op.level < 0 || op.kind == Kind::kAttend) continue;
            for (int s = 0; s < num_sources(op); ++s) {
                if (ops_[op.sources[s]].level != op.level) continue;
                const int64_t a = find(index), b = find(op.sources[s]);
                leader[std::max(a, b)] = std::min(a, b);
            }
        }
        unit_of_.assign(num_ops(), -1);
        int64_t num_levels = 0;
        for (int64_t index = 0; index < num_ops(); ++index) {
            if (ops_[index].level < 0) continue;
            const int64_t first = find(index);
            if (first == index) {
                unit_of_[index] = static_cast<int64_t>(units_.size());
                units_.emplace_back();
                units_.back().level = ops_[index].level;
                num_levels = std::max(num_levels, ops_[index].level + 1);
            }
            unit_of_[index] = unit_of_[first];
            units_[unit_of_[index]].ops.push_back(index);
        }
        for (Unit& unit : units_) measure(unit);
        Unit draw;
        draw.level = num_levels;
        draw.jobs = true;
        draw.width = shape_.batch;
        draw.cost = quotient_up(8 * shape_.num_codes, shape_.batch);
        units_.push_back(draw);
    }

    void measure(Unit& unit) {
        const OpSpec& first = ops_[unit.ops.front()];
        if (first.kind == Kind::kAttend) {
            unit.jobs = true;
            unit.width = shape_.batch * first.heads;
            const int64_t widths = (ops_[first.sources[0]].channels + first.channels) / first.heads;
            unit.cost = quotient_up(shape_.positions * widths, 2 * shape_.batch);
            return;
        }
        unit.width = half_width(first);
        const bool fragments = program_.layout == Layout::kFragments;
        int64_t halves = 1;  // the fewest and most of its products
        bool whole = false;
        std::vector<bool> late(num_ops());
        for (const int64_t index : unit.ops) {
            const OpSpec& op = ops_[index];
            unit.cost += 8;
            late[index] = op.kind == Kind::kLookup;
            for (int s = 0; s < num_sources(op); ++s) late[index] = late[index] || late[op.sources[s]];
            unit.late = unit.late || late[index];
            if (op.kind != Kind::kAffine) continue;
            unit.weighty = true;
            unit.cost += affine_depth(ops_, terms_, op) * (op.paired ? 2 : 1);
            halves = std::max<int64_t>(halves, op.paired ? 2 : 1);
            whole = whole || !op.paired;
        }
        // What does not need the last draw comes first.
        std::stable_partition(unit.ops.begin(), unit.ops.end(), [&](int64_t index) { return !late[index]; });
        unit.most = max_columns(program_.layout) / halves / kSliceStep * kSliceStep;
        unit.step = std::min<int64_t>(unit.most, fragments && whole ? kFragment : kSliceStep);
        unit.most = unit.most / unit.step * unit.step;
    }

    void assign() {
        blocks_.resize(options_.blocks);
        num_tasks_.assign(units_.size(), 0);
        total_cost_.assign(options_.blocks, 0);
        for (int64_t level = 0; level <= units_.back().level; ++level) {
            std::vector<int64_t> weighty;
            std::vector<Part> parts, light;
            for (int64_t u = 0; u < static_cast<int64_t>(units_.size()); ++u) {
                if (units_[u].level != level) continue;
                if (units_[u].weighty) {
                    weighty.push_back(u);
                } else {
                    cut_light(u, light);
                }
            }
            cut_weighty(weighty, parts);
            level_cost_.assign(options_.blocks, 0);
            give(parts, true);
            give(light, false);
        }
    }

    // All of a level's weights are shared out at once, so that many units give each block a few wide slices.
    void cut_weighty(const std::vector<int64_t>& which, std::vector<Part>& parts) const {
        if (which.empty()) return;
        int64_t least = 1, most = 0;
        for (const int64_t u : which) {
            least = std::max(least, units_[u].cost * units_[u].step);
            most += units_[u].cost * units_[u].step * quotient_up(units_[u].width, units_[u].step);
        }
        const auto nothing = [](int64_t, int64_t, int64_t, bool) {};
        while (least < most) {
            const int64_t middle = least + (most - least) / 2;
            if (cut(units_, which, middle, nothing) <= options_.blocks) {
                most = middle;
            } else {
                least = middle + 1;
            }
        }
        cut(units_, which, least, [&](int64_t u, int64_t step, int64_t count, bool fresh) {
            if (fresh) parts.emplace_back();
            const Unit& unit = units_[u];
            const int64_t end = std::min(unit.width, (step + count) * unit.step);
            for (int64_t first = step * unit.step; first < end; first += unit.most) {
                const int64_t width = std::min(unit.most, end - first);
                parts.back().tasks.push_back({u, first, width});
                parts.back().cost += width * unit.cost;
            }
        });
    }

    void cut_light(int64_t u, std::vector<Part>& parts) const {
        const Unit& unit = units_[u];
        const int64_t steps = quotient_up(unit.width, unit.step);
        const int64_t wanted = unit.jobs ? steps : quotient_up(unit.width * shape_.batch, kLightWork);
        const int64_t pieces = std::min({steps, wanted, options_.blocks});
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t first = steps * piece / pieces * unit.step;
            const int64_t last = std::min(unit.width, steps * (piece + 1) / pieces * unit.step);
            parts.push_back({{{u, first, last - first}}, (last - first) * unit.cost});
        }
    }

    // The costliest first, each to the block that has least to do at this level, then in all.
    void give(std::vector<Part>& parts, bool keeps_weights) {
        std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.cost > b.cost; });
        for (const Part& part : parts) {
            int64_t best = 0;
            for (int64_t b = 1; b < options_.blocks; ++b) {
                if (std::make_pair(level_cost_[b], total_cost_[b]) <
                    std::make_pair(level_cost_[best], total_cost_[best])) {
                    best = b;
                }
            }
            level_cost_[best] += part.cost;
            if (keeps_weights) total_cost_[best] += part.cost;
            for (const Task& task : part.tasks) {
                blocks_[best].push_back(task);
                ++num_tasks_[task.unit];
            }
        }
    }

    void emit() {
        blocks_.erase(std::remove_if(blocks_.begin(), blocks_.end(), [](const auto& tasks) { return tasks.empty(); }),
                      blocks_.end());
        term_of_.assign(num_ops(), 0);
        for (int64_t index = 0; index < num_ops(); ++index) {
            const OpSpec& op = ops_[index];
            if (op.level < 0 || op.kind != Kind::kAffine) continue;
            term_of_[index] = static_cast<int64_t>(program_.terms.size());
            for (int64_t t = op.first_term; t < op.first_term + op.num_terms; ++t) {
                const int64_t depth = terms_[t].num_columns * ops_[terms_[t].source].channels;
                program_.terms.push_back({narrow(terms_[t].source), narrow(terms_[t].first_column), narrow(depth)});
            }
        }
        for (std::vector<Task>& tasks : blocks_) {
            // Products of columns that are known already run while the last column's codes are being drawn.
            std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
                const Unit &p = units_[a.unit], &q = units_[b.unit];
                return std::make_pair(p.level, p.late) < std::make_pair(q.level, q.late);
            });
            Block block{};
            block.first_instr = narrow(program_.instrs.size());
            for (const Task& task : tasks) emit(task);
            block.last_instr = narrow(program_.instrs.size());
            program_.blocks.push_back(block);
            add_waits(tasks, block);
        }
        program_.finished_counter = narrow(units_.size());
        program_.num_counters = program_.finished_counter + 1;
        program_.work_bytes = kCommonBytes;
        for (const Instr& instr : program_.instrs) {
            program_.work_bytes = std::max(program_.work_bytes, kCommonBytes + work_bytes(instr, shape_));
        }
        if (program_.work_bytes > options_.shared_limit) {
            throw std::invalid_argument("shared memory: a block works on " + std::to_string(program_.work_bytes) +
                                        " bytes, but may have only " + std::to_string(options_.shared_limit));
        }
    }

    void emit(const Task& task) {
        const Unit& unit = units_[task.unit];
        if (unit.ops.empty()) {
            Instr instr = blank(Code::kDraw, output_);
            instr.sources[0] = narrow(output_);
            set_range(instr, task, unit);
            program_.instrs.push_back(instr);
        }
        for (const int64_t index : unit.ops) {
            const OpSpec& op = ops_[index];
            Instr instr = blank(code_of(op.kind), index);
            for (int s = 0; s < num_sources(op); ++s) instr.sources[s] = narrow(op.sources[s]);
            set_range(instr, task, unit);
            switch (op.kind) {
                case Kind::kLookup:
                    instr.num_taps = narrow(op.num_taps);
                    break;
                case Kind::kAffine:
                    instr.first_term = narrow(term_of_[index]);
                    instr.num_terms = narrow(op.num_terms);
                    instr.depth = narrow(affine_depth(ops_, terms_, op));
                    instr.layout = program_.layout;
                    instr.columns = round_up(instr.count * instr.halves,
                                             program_.layout == Layout::kFragments ? kFragment : kSliceStep);
                    break;
                case Kind::kAttend:
                    instr.heads = narrow(op.heads);
                    instr.key_width = narrow(ops_[op.sources[0]].channels / op.heads);
                    instr.value_width = narrow(op.channels / op.heads);
                    instr.inclusive = op.inclusive;
                    break;
                default:
                    break;
            }
            program_.instrs.push_back(instr);
        }
        program_.instrs.back().signal = narrow(task.unit);
    }

    static Instr blank(Code code, int64_t op) {
        Instr instr{};
        instr.code = code;
        instr.op = narrow(op);
        std::fill(std::begin(instr.sources), std::end(instr.sources), -1);
        instr.signal = -1;
        return instr;
    }

    void set_range(Instr& instr, const Task& task, const Unit& unit) const {
        const OpSpec& op = ops_[instr.op];
        instr.half = narrow(half_width(op));
        instr.halves = op.paired ? 2 : 1;
        instr.first = unit.jobs ? 0 : narrow(task.first);
        instr.count = unit.jobs ? instr.half : narrow(task.count);
        if (unit.jobs) {
            instr.first_job = narrow(task.first);
            instr.last_job = narrow(task.first + task.count);
        }
    }

    // Units that an instruction reads, and how many columns back. Two columns back everything is done anyway.
    std::vector<Wait> reads(const Instr& instr) const {
        std::vector<Wait> result;
        const auto add = [&](int64_t unit, int64_t lag) {
            if (lag < 2) result.push_back({narrow(unit), narrow(num_tasks_[unit]), narrow(lag)});
        };
        const auto add_op = [&](int64_t index, int64_t lag) {
            if (ops_[index].level >= 0) add(unit_of_[index], lag);
        };
        const int64_t draw = static_cast<int64_t>(units_.size()) - 1;
        switch (instr.code) {
            case Code::kLookup:
                add(draw, 1);
                break;
            case Code::kAffine:
                for (int32_t t = instr.first_term; t < instr.first_term + instr.num_terms; ++t) {
                    const TermSpec& term = terms_[ops_[instr.op].first_term + t - instr.first_term];
                    add_op(term.source, 1 - term.first_column - term.num_columns);
                }
                break;
            case Code::kAttend:
                add_op(instr.sources[0], 0);
                add_op(instr.sources[1], instr.inclusive ? 0 : 1);
                add_op(instr.sources[2], instr.inclusive ? 0 : 1);
                break;
            case Code::kDraw:
                add_op(output_, 0);
                break;
            default:
                for (const int32_t source : instr.sources) {
                    // Of its own unit it reads the channels that its own task has computed.
                    if (source >= 0 && unit_of_[source] != unit_of_[instr.op]) add_op(source, 0);
                }
        }
        return result;
    }

    void add_waits(const std::vector<Task>& tasks, const Block& block) {
        constexpr int32_t kUnknown = 2;
        std::vector<int64_t> own(units_.size(), 0);
        for (const Task& task : tasks) ++own[task.unit];
        // For each unit, how many columns back its results are known to the block. At the start of a column that is
        // what the block has waited for in the column before, one column further back.
        std::vector<int32_t> known(units_.size(), kUnknown);
        for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
            for (const Wait& read : reads(program_.instrs[i])) {
                known[read.counter] = std::min(known[read.counter], read.lag + 1);
            }
        }
        for (std::size_t u = 0; u < units_.size(); ++u) {
            if (own[u] == num_tasks_[u]) known[u] = 0;  // all of it is computed here, before it is read
        }
        for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
            Instr& instr = program_.instrs[i];
            instr.first_wait = narrow(program_.waits.size());
            for (const Wait& read : reads(instr)) {
                if (known[read.counter] <= read.lag) continue;
                known[read.counter] = read.lag;
                // Of two waits for one unit the later column covers both.
                const auto before = std::find_if(program_.waits.begin() + instr.first_wait, program_.waits.end(),
                                                 [&](const Wait& wait) { return wait.counter == read.counter; });
                if (before == program_.waits.end()) {
                    program_.waits.push_back(read);
                } else {
                    *before = read;
                }
            }
            instr.num_waits = narrow(program_.waits.size()) - instr.first_wait;
        }
    }

    // Where the weights of each block lie, and what they are.
    void pack() {
        int64_t size = 0;
        const int64_t room = options_.shared_limit - program_.work_bytes;
        program_.shared_bytes = program_.work_bytes;
        for (Block& block : program_.blocks) {
            std::vector<int32_t> products;
            for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
                if (program_.instrs[i].code == Code::kAffine) products.push_back(i);
            }
            // The largest first: what is left over then is small.
            std::stable_sort(products.begin(), products.end(), [&](int32_t a, int32_t b) {
                return region_bytes(program_.instrs[a]) > region_bytes(program_.instrs[b]);
            });
            block.stationary_first = size;
            for (const int32_t i : products) {
                Instr& instr = program_.instrs[i];
                const int64_t bytes = region_bytes(instr);
                if (block.stationary_bytes + bytes > room) continue;
                instr.stationary = 1;
                instr.weights = block.stationary_bytes;
                block.stationary_bytes += bytes;
            }
            size += block.stationary_bytes;
            program_.shared_bytes = std::max(program_.shared_bytes, block.stationary_bytes + program_.work_bytes);
        }
        for (Instr& instr : program_.instrs) {
            if (instr.stationary || region_bytes(instr) == 0) continue;
            instr.weights = size;
            size += region_bytes(instr);
        }
        program_.weights.assign(size, 0);
        for (const Block& block : program_.blocks) {
            for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
                const Instr& instr = program_.instrs[i];
                char* data = program_.weights.data() + (instr.stationary ? block.stationary_first : 0) + instr.weights;
                if (instr.code == Code::kAffine) pack_product(instr, data);
                if (instr.code == Code::kLookup) pack_table(instr, data);
            }
        }
    }

    int64_t region_bytes(const Instr& instr) const {
        int64_t bytes = 0;
        if (instr.code == Code::kAffine) {
            const int64_t depth =
                instr.layout == Layout::kFragments ? quotient_up(instr.depth, kFragment) * kFragment : instr.depth;
            bytes = depth * instr.columns * (instr.layout == Layout::kFloat ? sizeof(float) : sizeof(uint16_t));
        } else if (instr.code == Code::kLookup) {
            bytes = instr.num_taps * shape_.num_codes * instr.count * instr.halves * sizeof(float);
        }
        return quotient_up(bytes, 16) * 16;
    }

    // The operation's channel that a column of an instruction belongs to.
    static int64_t channel(const Instr& instr, int64_t column) {
        return instr.first + (column < instr.count ? column : instr.half + column - instr.count);
    }

    void pack_product(const Instr& instr, char* data) const {
        const OpSpec& op = ops_[instr.op];
        const int64_t columns = instr.count * instr.halves;
        const int64_t tiles = quotient_up(instr.depth, kFragment);
        int64_t k = 0;
        for (int64_t t = op.first_term; t < op.first_term + op.num_terms; ++t) {
            const int64_t depth = terms_[t].num_columns * ops_[terms_[t].source].channels;
            const float* weights = terms_[t].weights;
            for (int64_t last = k + depth; k < last; ++k, weights += op.channels) {
                for (int64_t c = 0; c < columns; ++c) {
                    const float w = weights[channel(instr, c)];
                    if (instr.layout == Layout::kFloat) {
                        reinterpret_cast<float*>(data)[k * instr.columns + c] = w;
                        continue;
                    }
                    int64_t place = k * instr.columns + c;
                    if (instr.layout == Layout::kFragments) {
                        const int64_t row = c % kFragment, column = k % kFragment;
                        const int64_t lane = row % 8 * 4 + column % 8 / 2;
                        const int64_t i = column % 2 + row / 8 * 2 + column / 8 * 4;
                        place = ((c / kFragment * tiles + k / kFragment) * 32 + lane) * 8 + i;
                    }
                    reinterpret_cast<uint16_t*>(data)[place] = round_to_bf16(w);
                }
            }
        }
    }

    void pack_table(const Instr& instr, char* data) const {
        const OpSpec& op = ops_[instr.op];
        const int64_t columns = instr.count * instr.halves;
        float* out = reinterpret_cast<float*>(data);
        for (int64_t row = 0; row < op.num_taps * shape_.num_codes; ++row) {
            for (int64_t c = 0; c < columns; ++c) *out++ = op.weights[row * op.channels + channel(instr, c)];
        }
    }

    static int32_t narrow(int64_t value) {
        if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
            throw std::invalid_argument("plan: too large");
        }
        return static_cast<int32_t>(value);
    }

    const std::vector<OpSpec>& ops_;
    const std::vector<TermSpec>& terms_;
    const int64_t output_;
    const StepShape& shape_;
    const ProgramOptions& options_;
    Program program_{};
    std::vector<Unit> units_;
    std::vector<int64_t> unit_of_;    // by operation
    std::vector<int64_t> term_of_;    // by operation: its first term in the program
    std::vector<int64_t> num_tasks_;  // by unit
    std::vector<std::vector<Task>> blocks_;
    std::vector<int64_t> level_cost_, total_cost_;  // by block
};

}  // namespace

int64_t work_bytes(const Instr& instr, const StepShape& shape) {
    switch (instr.code) {
        case Code::kAffine:
            return affine_work(instr.layout, instr.columns, instr.depth, static_cast<int>(shape.batch)).bytes;
        case Code::kAttend:
            return attend_work(shape.positions, instr.key_width, instr.value_width).bytes;
        case Code::kDraw:
            return draw_work(shape.num_codes).bytes;
        default:
            return 0;
    }
}

Program make_program(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output,
                     const StepShape& shape, const ProgramOptions& options) {
    return Planner(ops, terms, output, shape, options).run();
}

}  // namespace fastvq::cuda
