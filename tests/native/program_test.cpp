// Programs of the CUDA engine: that they compute a plan, whatever the order in which blocks get on.
#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/program.h"
#include "plan_case.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

using cuda::Block;
using cuda::Code;
using cuda::Instr;
using cuda::Program;
using cuda::ProgramOptions;
using cuda::Step;
using cuda::StepCode;
using cuda::Stores;
using cuda::Wait;

Program make(const PlanCase& plan, const ProgramOptions& options) {
    return cuda::make_program(plan.ops, plan.terms, plan.output, plan.shape, options);
}

// Runs the blocks of a program one instruction at a time, in an order that only its waits hold back. Of every result
// it remembers the column it was computed for.
class Interpreter {
   public:
    // Block `first` gets ahead as far as waits let it, block `last` goes on only if no other can.
    Interpreter(const PlanCase& plan, const Program& program, uint64_t seed, int64_t first = -1, int64_t last = -1)
        : plan_(plan), program_(program), random_(seed), first_(first), last_(last), width_(plan.shape.width),
          counters_(cuda::counter_place(program.num_counters, 0)), codes_(plan.shape.batch * width_, false) {
        attention_.assign(plan.num_ops(), -1);
        for (const Instr& instr : program.instrs) {
            if (instr.code != Code::kAttend) continue;
            attention_[instr.op] = instr.op;
            if (instr.num_steps > 4) attention_[program.steps[instr.first_step + 4].op] = instr.op;
        }
        for (int64_t index = 0; index < plan.num_ops(); ++index) {
            const OpSpec& op = plan.ops[index];
            const int64_t jobs = attention_[index];
            const int64_t parts = jobs >= 0 ? plan.ops[jobs].heads * plan.shape.batch : op.channels;
            places_.push_back(is_scratch(index) ? 2 : width_);
            tags_.emplace_back(op.level < 0 ? 0 : places_.back() * parts, -1);
        }
        for (const Step& step : program.steps) {
            if (is_result(step)) stores_[step.op] = step.stores;
        }
        for (const Instr& instr : program.instrs) {
            if (instr.code == Code::kAttend) stores_[instr.op] = Stores::kFloats;
        }
        for (const Block& block : program.blocks) at_.push_back({0, block.first_instr});
    }

    static bool is_result(const Step& step) { return step.code != StepCode::kLoad && step.code != StepCode::kView; }

    void run() {
        for (const At& at : at_) load_early(at);
        std::vector<int64_t> order(at_.size());
        std::iota(order.begin(), order.end(), 0);
        for (int64_t left = static_cast<int64_t>(at_.size()); left > 0;) {
            // Now and then others come first; in between a block gets as far as it can.
            if (random_.chance(10)) {
                for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
            }
            if (first_ >= 0) std::iter_swap(order.begin(), std::find(order.begin(), order.end(), first_));
            if (last_ >= 0) std::iter_swap(order.end() - 1, std::find(order.begin(), order.end(), last_));
            const auto ready = std::find_if(order.begin(), order.end(), [&](int64_t b) { return can_go_on(b); });
            expect(ready != order.end(), "all blocks wait");
            if (step(*ready)) --left;
        }
        for (int64_t index = 0; index < plan_.num_ops(); ++index) {
            const std::vector<int64_t>& tags = tags_[index];
            const int64_t places = places_[index], parts = static_cast<int64_t>(tags.size()) / places;
            for (int64_t column = std::max<int64_t>(0, width_ - places); column < width_; ++column) {
                for (int64_t part = 0; part < parts; ++part) {
                    expect(tags[column % places * parts + part] == column, "operation ", index, " was not computed");
                }
            }
        }
        expect(std::find(codes_.begin(), codes_.end(), false) == codes_.end(), "a code was not drawn");
    }

   private:
    struct At {
        int64_t column;
        int32_t instr;
    };

    bool is_scratch(int64_t index) const {
        return plan_.left[index] < 0 && !plan_.is_value[index] && plan_.ops[index].kind != Kind::kStoreKeys;
    }

    bool reached(int64_t counter, int64_t per_column, int64_t column) const {
        return column < 0 ||
               counters_[cuda::counter_place(counter, column)] >= cuda::counter_target(per_column, column);
    }

    bool can_go_on(int64_t b) const {
        const At& at = at_[b];
        if (at.column == width_) return false;
        if (at.instr == program_.blocks[b].first_instr &&
            !reached(program_.finished_counter, program_.blocks.size(), at.column - 2)) {
            return false;
        }
        const Instr& instr = program_.instrs[at.instr];
        const auto begin = program_.waits.begin() + instr.first_wait;
        return std::all_of(begin, begin + instr.num_waits, [&](const Wait& wait) {
            return reached(wait.counter, wait.per_column, at.column - wait.lag);
        });
    }

    // Returns whether the block is through.
    bool step(int64_t b) {
        At& at = at_[b];
        const Instr& instr = program_.instrs[at.instr];
        column_ = at.column;
        execute(instr);
        if (instr.signal >= 0) ++counters_[cuda::counter_place(instr.signal, column_)];
        if (++at.instr == program_.blocks[b].last_instr) {
            ++counters_[cuda::counter_place(program_.finished_counter, column_)];
            at.instr = program_.blocks[b].first_instr;
            ++at.column;
        }
        if (at.column < width_) load_early(at);
        return at.column == width_;
    }

    // What an instruction loads before it waits, as soon as its block comes to it.
    void load_early(const At& at) {
        const Instr& instr = program_.instrs[at.instr];
        column_ = at.column;
        for (int32_t s = instr.first_step; s < instr.first_step + instr.num_early; ++s) load(instr, program_.steps[s]);
    }

    void load(const Instr& instr, const Step& step) {
        expect(step.code == StepCode::kLoad, "a load expected");
        const OpSpec& op = plan_.ops[step.op];
        if (step.starts) {
            expect(op.kind == Kind::kAffine || op.kind == Kind::kLookup, "operation ", step.op, " has no starts");
            return;
        }
        if (op.level >= 0) {
            expect(stores_.at(step.op) == Stores::kFloats, "operation ", step.op, " is loaded, but not stored as floats");
        }
        read(step.op, column_, instr.first, instr.count);
        if (step.planes[1] >= 0) read(step.op, column_, step.half + instr.first, instr.count);
    }

    void read(int64_t index, int64_t column, int64_t first, int64_t count) const {
        const OpSpec& op = plan_.ops[index];
        if (op.level < 0 || column < 0) return;
        const int64_t parts = static_cast<int64_t>(tags_[index].size()) / places_[index];
        const int64_t* tags = tags_[index].data() + column % places_[index] * parts;
        for (int64_t c = first; c < first + count; ++c) {
            for (int64_t sample = 0; sample < (attention_[index] >= 0 ? plan_.shape.batch : 1); ++sample) {
                const int64_t part = attention_[index] >= 0 ? job_of(plan_.ops[attention_[index]], sample, c) : c;
                expect(tags[part] == column, "channel ", c, " of operation ", index, " at column ", column, " holds ",
                       tags[part]);
            }
        }
    }

    // Of the attention whose result a channel is, or is an activation of.
    static int64_t job_of(const OpSpec& attention, int64_t sample, int64_t channel) {
        const int64_t width = attention.channels / attention.heads;
        return sample * attention.heads + channel % attention.channels / width;
    }

    void write(int64_t index, int64_t part) {
        const int64_t places = places_[index], parts = static_cast<int64_t>(tags_[index].size()) / places;
        int64_t& tag = tags_[index][column_ % places * parts + part];
        expect(tag == (places == 2 && column_ >= 2 ? column_ - 2 : -1) || places > 2 || width_ <= 2,
               "operation ", index, " is computed twice");
        expect(tag < column_, "operation ", index, " is computed twice");
        tag = column_;
    }

    void execute(const Instr& instr) {
        if (instr.code == Code::kDraw) {
            expect(instr.num_steps == 1 && program_.steps[instr.first_step].op == plan_.output, "a draw from elsewhere");
            read(plan_.output, column_, 0, plan_.shape.num_codes);
            for (int64_t sample = instr.first_job; sample < instr.last_job; ++sample) {
                expect(!codes_[sample * width_ + column_], "a code is drawn twice");
                codes_[sample * width_ + column_] = true;
            }
            return;
        }
        if (instr.code == Code::kAttend) return attend(instr);
        for (int32_t t = instr.first_term; t < instr.first_term + instr.num_terms; ++t) {
            const cuda::Term& term = program_.terms[t];
            const int64_t channels = plan_.ops[term.op].channels;
            if (plan_.ops[term.op].level >= 0) {
                expect(stores_.at(term.op) == (term.rounded ? Stores::kRounded : Stores::kFloats), "operation ", term.op,
                       " is not stored as it is read");
            }
            for (int64_t c = 0; c < term.depth / channels; ++c) {
                read(term.op, column_ + term.first_column + c, 0, channels);
            }
        }
        planes_.clear();
        before_ = nullptr;
        for (int32_t s = instr.first_step; s < instr.first_step + instr.num_steps; ++s) {
            const Step& step = program_.steps[s];
            if (s < instr.first_step + instr.num_loads) {
                if (s >= instr.first_step + instr.num_early) load(instr, step);
                hold(step);
            } else {
                compute(instr, step);
                before_ = &step;
            }
        }
    }

    // What planes hold: the operation whose values, or after num_ops() whose starts, and the half.
    void hold(const Step& step) {
        const int64_t what = step.op + (step.code == StepCode::kLoad && step.starts ? plan_.num_ops() : 0);
        planes_[step.planes[0]] = {what, 0};
        if (step.planes[1] >= 0) planes_[step.planes[1]] = {what, 1};
    }

    void expect_planes(const Step& step, int which, int64_t what, int64_t halves) const {
        for (int64_t half = 0; half < halves; ++half) {
            expect(planes_.at(step.sources[which][half]) == std::make_pair(what, half), "operation ", step.op,
                   " reads another one than ", what);
            expect(which > 0 || !step.forwarded || before_->planes[half] == step.sources[0][half], "operation ", step.op,
                   " takes what the step before has not computed");
        }
    }

    void compute(const Instr& instr, const Step& step) {
        const OpSpec& op = plan_.ops[step.op];
        const int64_t halves = op.paired ? 2 : 1;
        expect(step.half == op.channels / halves, "halves of ", step.half);
        switch (step.code) {
            case StepCode::kSum:
                expect(instr.code == Code::kAffine && instr.op == step.op, "sums of another product");
                expect_planes(step, 0, step.op + plan_.num_ops(), halves);
                break;
            case StepCode::kLookup:
                expect_planes(step, 0, step.op + plan_.num_ops(), halves);
                for (int64_t sample = 0; sample < plan_.shape.batch; ++sample) {
                    for (int64_t c = std::max<int64_t>(0, column_ - op.num_taps); c < column_; ++c) {
                        expect(codes_[sample * width_ + c], "a code is read before it is drawn");
                    }
                }
                break;
            case StepCode::kGlu:
            case StepCode::kTanh: expect_planes(step, 0, op.sources[0], 2); break;
            case StepCode::kConcatElu: expect_planes(step, 0, op.sources[0], 1); break;
            case StepCode::kAdd: expect_planes(step, 1, op.sources[1], halves); [[fallthrough]];
            default: expect_planes(step, 0, op.sources[0], halves);
        }
        if (op.kind != Kind::kStoreKeys) hold(step);
        for (int64_t half = 0; half < halves; ++half) {
            for (int64_t c = 0; c < instr.count; ++c) write(step.op, half * op.channels / 2 + instr.first + c);
        }
    }

    void attend(const Instr& instr) {
        const OpSpec& op = plan_.ops[instr.op];
        for (int64_t job = instr.first_job; job < instr.last_job; ++job) {
            const int64_t head = job % op.heads;
            read(op.sources[0], column_, head * instr.key_width, instr.key_width);
            for (int64_t c = 0; c < column_ + op.inclusive; ++c) {
                read(op.sources[1], c, head * instr.key_width, instr.key_width);
                read(op.sources[2], c, head * instr.value_width, instr.value_width);
            }
            write(instr.op, job);
            if (instr.num_steps > 4) write(program_.steps[instr.first_step + 4].op, job);
        }
    }

    const PlanCase& plan_;
    const Program& program_;
    Random random_;
    const int64_t first_, last_;
    const int64_t width_;
    int64_t column_ = 0;
    std::vector<uint32_t> counters_;
    std::vector<bool> codes_;
    std::vector<int64_t> attention_;  // by operation, that which computes it, or -1
    std::vector<int64_t> places_;
    std::vector<std::vector<int64_t>> tags_;  // by operation: [place][part], the column whose result lies there
    std::vector<At> at_;
    std::map<int32_t, Stores> stores_;                       // by operation that is computed
    std::map<int32_t, std::pair<int64_t, int64_t>> planes_;  // of the instruction
    const Step* before_ = nullptr;                           // likewise, the step that was computed last
};

// Every channel of every operation belongs to one task, and so does every job.
void check_slices(const PlanCase& plan, const Program& program) {
    std::vector<std::vector<int>> times(plan.num_ops() + 1);
    for (int64_t index = 0; index < plan.num_ops(); ++index) {
        const OpSpec& op = plan.ops[index];
        const int64_t jobs = op.kind == Kind::kAttend ? plan.shape.batch * op.heads : op.channels;
        if (op.level >= 0) times[index].resize(jobs);
    }
    times.back().resize(plan.shape.batch);
    for (const Instr& instr : program.instrs) {
        if (instr.code == Code::kDraw || instr.code == Code::kAttend) {
            std::vector<int>& seen = times[instr.code == Code::kDraw ? plan.num_ops() : instr.op];
            for (int64_t job = instr.first_job; job < instr.last_job; ++job) ++seen.at(job);
            if (instr.code == Code::kDraw || instr.num_steps == 4) continue;
            // Channels of what follows, for all samples of a head together.
            const Step& step = program.steps[instr.first_step + 4];
            const OpSpec &op = plan.ops[step.op], &attention = plan.ops[instr.op];
            for (int64_t job = instr.first_job; job < instr.last_job; ++job) {
                if (job / attention.heads > 0) continue;
                for (int64_t c = 0; c < op.channels; ++c) {
                    const int64_t head = c % attention.channels / instr.value_width;
                    if (head == job) ++times[step.op].at(c);
                }
            }
            continue;
        }
        expect(instr.first % cuda::kSliceStep == 0, "a slice begins at ", instr.first);
        for (int32_t s = instr.first_step + instr.num_loads; s < instr.first_step + instr.num_steps; ++s) {
            const int32_t index = program.steps[s].op;
            const OpSpec& op = plan.ops[index];
            const int64_t halves = op.paired ? 2 : 1, half = op.channels / halves;
            expect(instr.count % cuda::kSliceStep == 0 || instr.first + instr.count == half, "a slice of ", instr.count);
            for (int64_t which = 0; which < halves; ++which) {
                for (int64_t c = 0; c < instr.count; ++c) ++times[index].at(which * half + instr.first + c);
            }
        }
    }
    for (const std::vector<int>& seen : times) {
        expect(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }), "not computed just once");
    }
}

void check_waits(const Program& program) {
    std::vector<int64_t> signals(program.num_counters);
    for (const Instr& instr : program.instrs) {
        if (instr.signal >= 0) ++signals.at(instr.signal);
        expect(instr.num_waits <= cuda::kThreads, "more waits than threads");
    }
    for (const Wait& wait : program.waits) {
        expect(wait.per_column == signals.at(wait.counter) && wait.per_column > 0, "waits for ", wait.per_column,
               " of ", signals[wait.counter]);
        expect(wait.lag == 0 || wait.lag == 1, "a lag of ", wait.lag);
    }
    expect(signals.at(program.finished_counter) == 0, "a task raises the counter of finished columns");
}

float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

template <class T>
T element(const char* data, int64_t index) {
    T value;
    std::memcpy(&value, data + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
}

// The matrix [depth][columns] of an affine instruction, read from where the program says that it lies; `bytes` of it.
std::vector<float> unpack(const Instr& instr, cuda::Layout layout, const char* data, int64_t* bytes) {
    const int64_t columns = instr.columns;
    const bool whole = layout == cuda::Layout::kFloat;
    std::vector<float> matrix(instr.depth * columns, 0.0f);
    const int64_t tiles = (instr.depth + 15) / 16;
    int64_t place = 0;
    for (int64_t across = 0; across < columns / 16; ++across) {
        for (int64_t down = 0; down < tiles; ++down, place += 256) {
            for (int64_t lane = 0; lane < 32; ++lane) {
                for (int64_t i = 0; i < 8; ++i) {
                    const int64_t within = whole ? (i / 4 * 32 + lane) * 4 + i % 4 : lane * 8 + i;
                    const int64_t c = 16 * across + lane / 4 + 8 * (i / 2 % 2);
                    const int64_t k = 16 * down + 2 * (lane % 4) + i % 2 + 8 * (i / 4);
                    const float value = whole ? element<float>(data, place + within)
                                              : from_bf16(element<uint16_t>(data, place + within));
                    if (k < instr.depth) {
                        matrix[k * columns + c] = value;
                    } else {
                        expect(value == 0.0f, "a weight behind the last row");
                    }
                }
            }
        }
    }
    *bytes = (whole ? 4 : 2) * place;
    return matrix;
}

// The vectors of codes that a step reads; returns the first and last byte of Program::weights.
std::pair<int64_t, int64_t> check_table(const PlanCase& plan, const Program& program, const Instr& instr,
                                        const Step& step) {
    const OpSpec& op = plan.ops[step.op];
    const char* data = program.weights.data() + step.weights;
    const int64_t columns = instr.count * (op.paired ? 2 : 1), rows = step.num_taps * plan.shape.num_codes;
    expect(step.num_taps == op.num_taps, "another number of taps");
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t channel = c < instr.count ? instr.first + c : op.channels / 2 + instr.first + c - instr.count;
            expect(element<float>(data, row * columns + c) == op.weights[row * op.channels + channel],
                   "another vector of a code");
        }
    }
    expect(step.weights % 16 == 0, "vectors at ", step.weights);
    return {step.weights, step.weights + rows * columns * 4};
}

void check_weights(const PlanCase& plan, const Program& program, const ProgramOptions& options) {
    std::set<std::pair<int64_t, int64_t>> regions;  // first and last byte of Program::weights
    for (const Block& block : program.blocks) {
        expect(block.stationary_bytes + program.memory.bytes <= program.shared_bytes, "shared memory runs out");
        for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
            const Instr& instr = program.instrs[i];
            const OpSpec& op = plan.ops[instr.op];
            const int64_t first = instr.weights + (instr.stationary ? block.stationary_first : 0);
            const char* data = program.weights.data() + first;
            int64_t bytes = 0;
            const auto channel = [&](int64_t c) {
                return c < instr.count ? instr.first + c : instr.half + instr.first + c - instr.count;
            };
            if (instr.code == Code::kAffine) {
                expect(instr.columns <= cuda::kMostColumns, "too many columns");
                expect(instr.columns % 16 == 0 && instr.columns >= instr.count * instr.halves,
                       "columns without padding");
                const std::vector<float> matrix = unpack(instr, program.layout, data, &bytes);
                int64_t k = 0;
                for (int32_t t = 0; t < instr.num_terms; ++t) {
                    const TermSpec& spec = plan.terms[op.first_term + t];
                    const cuda::Term& term = program.terms[instr.first_term + t];
                    expect(term.op == spec.source && term.first_column == spec.first_column &&
                               term.depth == spec.num_columns * plan.ops[spec.source].channels,
                           "another term");
                    for (int64_t row = 0; row < term.depth; ++row, ++k) {
                        for (int64_t c = 0; c < instr.columns; ++c) {
                            float w = 0.0f;
                            if (c < instr.count * instr.halves) w = spec.weights[row * op.channels + channel(c)];
                            if (options.bf16) w = from_bf16(round_to_bf16(w));
                            expect(matrix[k * instr.columns + c] == w, "another weight");
                        }
                    }
                }
                expect(k == instr.depth, "a depth of ", instr.depth);
            }
            for (int32_t s = instr.first_step; s < instr.first_step + instr.num_steps; ++s) {
                if (program.steps[s].code == StepCode::kLookup) {
                    regions.insert(check_table(plan, program, instr, program.steps[s]));
                }
            }
            if (bytes == 0) continue;
            expect(first % 16 == 0 && first + bytes <= static_cast<int64_t>(program.weights.size()), "weights at ",
                   first);
            expect(!instr.stationary || instr.weights + bytes <= block.stationary_bytes, "weights are not copied");
            regions.insert({first, first + bytes});
        }
        expect(block.stationary_first % 16 == 0 && block.stationary_bytes % 16 == 0, "weights are not aligned");
    }
    int64_t end = 0;
    for (const auto& [first, last] : regions) {
        expect(first >= end, "weights overlap");
        end = last;
    }
    expect(program.shared_bytes <= options.shared_limit, "more shared memory than allowed");
}

std::string bytes_of(const Program& program) {
    std::string all;
    const auto add = [&](const auto& list) {
        all.append(reinterpret_cast<const char*>(list.data()), list.size() * sizeof(list[0]));
    };
    add(program.instrs);
    add(program.blocks);
    add(program.waits);
    add(program.terms);
    add(program.steps);
    add(program.weights);
    return all;
}

void test_plan(uint64_t seed) {
    const PlanCase plan = random_plan(seed);
    const bool bf16 = seed % 2 == 1;
    for (const int64_t blocks : {1, 2, 7, 40}) {
        for (const int64_t limit : {int64_t{96} << 10, int64_t{227} << 10}) {
            const ProgramOptions options{blocks, limit, bf16};
            const Program program = make(plan, options);
            expect(static_cast<int64_t>(program.blocks.size()) <= blocks, "too many blocks");
            check_slices(plan, program);
            check_waits(program);
            check_weights(plan, program, options);
            expect(bytes_of(program) == bytes_of(make(plan, options)), "another program for the same plan");
            const int64_t count = static_cast<int64_t>(program.blocks.size());
            Random random(seed);
            for (uint64_t order = 0; order < 6; ++order) {
                const int64_t first = random.below(count), last = random.below(count);
                const bool uneven = order % 2 == 1 && first != last;
                Interpreter(plan, program, 100 * seed + order, uneven ? first : -1, uneven ? last : -1).run();
            }
        }
    }
}

// Whether there is an order in which a program goes wrong, a given block being the fastest.
bool fails(const PlanCase& plan, const Program& program, int64_t fastest) {
    for (int64_t slowest = 0; slowest < static_cast<int64_t>(program.blocks.size()); ++slowest) {
        try {
            if (slowest != fastest) Interpreter(plan, program, slowest, fastest, slowest).run();
        } catch (const std::runtime_error&) {
            return true;
        }
    }
    return false;
}

// Without one of its waits a program goes wrong in some order: few are superfluous, and the interpreter notices.
void test_waits_are_needed() {
    const PlanCase plan = rich_plan();
    const Program program = make(plan, {12, int64_t{227} << 10, false});
    int64_t noticed = 0, all = 0;
    for (int64_t b = 0; b < static_cast<int64_t>(program.blocks.size()); ++b) {
        for (int32_t i = program.blocks[b].first_instr; i < program.blocks[b].last_instr; ++i) {
            for (int32_t w = 0; w < program.instrs[i].num_waits; ++w) {
                Program without = program;
                without.waits[program.instrs[i].first_wait + w].lag = 1000;
                ++all;
                noticed += fails(plan, without, b);
            }
        }
    }
    // The rest follow from the order of other blocks' instructions, task by task, and programs only reckon with units.
    expect(all > 50 && 3 * noticed > 2 * all, "only ", noticed, " of ", all, " waits are missed");
    Program unbounded = program;
    unbounded.finished_counter = 0;  // another counter, raised less often
    expect(fails(plan, unbounded, 0), "no one misses the wait for a column");
}

void test_memory_runs_out() {
    const PlanCase plan = rich_plan();
    const Program program = make(plan, {4, int64_t{227} << 10, false});
    // The work alone fits exactly: nothing is stationary.
    const Program streamed = make(plan, {4, program.memory.bytes, false});
    expect(streamed.shared_bytes == streamed.memory.bytes, "weights where there is no room");
    Interpreter(plan, streamed, 1).run();
    for (const ProgramOptions& options : {ProgramOptions{4, program.memory.bytes - 1, false},
                                          ProgramOptions{0, int64_t{227} << 10, false},
                                          ProgramOptions{4, -1, true}}) {
        bool refused = false;
        try {
            make(plan, options);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        expect(refused, "made a program for ", options.blocks, " blocks of ", options.shared_limit, " bytes");
    }
}

// A lookup, `layers` products of what is left of the current column, and logits of all of them.
PlanCase wide_plan(int64_t layers, int64_t channels) {
    PlanCase plan;
    plan.height = 1;
    plan.shape = {8, 3, 3, 5, 16};
    const auto add = [&](Kind kind, int64_t width, int64_t level) {
        OpSpec op{};
        op.kind = kind;
        op.channels = width;
        op.level = level;
        plan.ops.push_back(op);
        plan.left.push_back(-1);
        plan.is_value.push_back(false);
    };
    const auto weights = [&](int64_t count) {
        plan.weights.emplace_back(count, 1.0f);
        return plan.weights.back().data();
    };
    add(Kind::kLookup, 64, 0);
    plan.ops[0].num_taps = 1;
    plan.ops[0].weights = weights(plan.ops[0].num_weights = 5 * 64);
    plan.left[0] = 1;
    for (int64_t layer = 0; layer < layers; ++layer) {
        add(Kind::kAffine, channels, 0);
        plan.ops.back().first_term = layer;
        plan.ops.back().num_terms = 1;
        plan.terms.push_back({0, -1, 1, weights(64 * channels), 64 * channels});
    }
    add(Kind::kAffine, 5, 1);
    plan.ops.back().first_term = layers;
    plan.ops.back().num_terms = layers;
    for (int64_t layer = 0; layer < layers; ++layer) {
        plan.terms.push_back({1 + layer, 0, 1, weights(5 * channels), 5 * channels});
    }
    plan.output = plan.num_ops() - 1;
    return plan;
}

// The weights of a wide level are shared out evenly in few slices, and all of them stay where there is room.
void test_balance() {
    constexpr int64_t kLayers = 6, kChannels = 240, kBlocks = 7;
    const PlanCase plan = wide_plan(kLayers, kChannels);
    for (const bool bf16 : {false, true}) {
        const Program program = make(plan, {kBlocks, int64_t{227} << 10, bf16});
        int64_t most = 0, tasks = 0;
        for (const Block& block : program.blocks) {
            int64_t columns = 0;
            for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
                const Instr& instr = program.instrs[i];
                expect(instr.code != Code::kAffine || instr.stationary, "weights are streamed although there is room");
                if (instr.code != Code::kAffine || instr.op == plan.output) continue;
                columns += instr.columns;
                ++tasks;
            }
            most = std::max(most, columns);
        }
        const int64_t steps = kLayers * kChannels / 16;
        expect(most == (steps + kBlocks - 1) / kBlocks * 16, "a block has ", most, " of ", steps * 16, " columns");
        // At most one cut for each block beside those between layers, and those that keep slices narrow enough.
        const int64_t cuts = kLayers * (kChannels / cuda::kMostColumns);
        expect(tasks <= kLayers + kBlocks + cuts, tasks, " slices");
        Interpreter(plan, program, 1).run();
    }
}

}  // namespace

void test_programs(uint64_t num_plans) {
    for (uint64_t seed = 0; seed < num_plans; ++seed) {
        try {
            test_plan(seed);
        } catch (const std::runtime_error& error) {
            throw std::runtime_error("plan " + std::to_string(seed) + ": " + error.what());
        }
    }
    test_waits_are_needed();
    test_memory_runs_out();
    test_balance();
}

}  // namespace fastvq::cpu::testing
