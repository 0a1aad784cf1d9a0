#include "cuda/program.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/program_steps.h"
#include "cuda/program_tasks.h"
#include "cuda/program_weights.h"

namespace fastvq::cuda {
namespace {

constexpr int64_t kMostSize = 1 << 24;  // keeps products of two sizes below 2^63 and sums of a few below 2^31
constexpr int32_t kAlwaysDone = 2;      // columns back, because of the wait at the start of a column

int32_t narrow(int64_t value) {
    if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("plan: too large");
    }
    return static_cast<int32_t>(value);
}

void check(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output, const StepShape& shape,
           const ProgramOptions& options) {
    check_plan(ops, terms, output, shape);
    if (options.blocks < 1 || options.blocks > 65535) {
        throw std::invalid_argument("blocks: expected 1 to 65535, got " + std::to_string(options.blocks));
    }
    if (std::max({shape.batch, shape.key_stride, shape.num_codes}) > kMostSize) {
        throw std::invalid_argument("shape: expected sizes of at most 2^24");
    }
    for (int64_t index = 0; index < static_cast<int64_t>(ops.size()); ++index) {
        const OpSpec& op = ops[index];
        require(op.channels <= kMostSize, index, "more than 2^24 channels");
        if (op.level < 0) continue;
        require(op.kind != Kind::kAttend || shape.batch * op.heads <= kMostSize, index,
                "more than 2^24 samples times heads");
        require(op.kind != Kind::kAffine || affine_depth(ops, terms, op) <= kMostSize, index,
                "more than 2^24 factors of a sum");
    }
}

class Planner {
   public:
    Planner(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output, const StepShape& shape,
            const ProgramOptions& options)
        : ops_(ops), terms_(terms), output_(output), shape_(shape), options_(options),
          lists_(ops, terms, shape, options.blocks), stores_(stores_of(ops, terms, output, lists_, options.bf16)) {
        program_.layout = options.bf16 ? Layout::kBfloat : Layout::kFloat;
    }

    Program run() {
        emit();
        add_waits();
        divide_memory();
        pack_weights(program_, ops_, terms_, shape_, options_.shared_limit);
        return std::move(program_);
    }

   private:
    int64_t num_ops() const { return static_cast<int64_t>(ops_.size()); }

    void emit() {
        for (const Unit& unit : lists_.units) {
            chains_.emplace_back();
            if (unit.jobs) continue;
            for (const std::vector<int64_t>& group : unit.groups) {
                chains_.back().push_back(make_chain(ops_, group, stores_));
            }
        }
        for (const std::vector<Task>& tasks : lists_.blocks) {
            Block block{};
            block.first_instr = narrow(program_.instrs.size());
            block.first_term = narrow(program_.terms.size());
            block.first_step = narrow(program_.steps.size());
            for (const Task& task : tasks) emit(task);
            block.last_instr = narrow(program_.instrs.size());
            block.last_term = narrow(program_.terms.size());
            block.last_step = narrow(program_.steps.size());
            program_.blocks.push_back(block);
            own_tasks_.emplace_back(lists_.units.size(), 0);
            for (const Task& task : tasks) ++own_tasks_.back()[task.unit];
        }
        program_.finished_counter = narrow(lists_.units.size());
        program_.num_counters = program_.finished_counter + 1;
    }

    void emit(const Task& task) {
        const Unit& unit = lists_.units[task.unit];
        if (unit.ops.empty()) {
            emit_jobs(Code::kDraw, output_, task, {output_});
        } else if (unit.jobs) {
            const int64_t index = unit.ops.front();
            const OpSpec& op = ops_[index];
            emit_jobs(Code::kAttend, index, task, {op.sources[0], op.sources[1], op.sources[2], index});
            if (unit.ops.size() > 1) follow(unit.ops[1]);
        }
        for (std::size_t g = 0; !unit.jobs && g < unit.groups.size(); ++g) {
            emit_slice(unit.groups[g].front(), task, chains_[task.unit][g]);
        }
        program_.instrs.back().signal = narrow(task.unit);
    }

    void emit_jobs(Code code, int64_t index, const Task& task, const std::vector<int64_t>& views) {
        Instr instr = blank(code, index);
        const OpSpec& op = ops_[index];
        instr.first_job = narrow(task.first);
        instr.last_job = narrow(task.first + task.count);
        if (code == Code::kAttend) {
            instr.heads = narrow(op.heads);
            instr.key_width = narrow(ops_[op.sources[0]].channels / op.heads);
            instr.value_width = narrow(op.channels / op.heads);
            instr.inclusive = op.inclusive;
            instr.attend = attend_work(narrow(task.count), instr.key_width, instr.value_width);
        }
        std::vector<Step> steps;
        for (const int64_t view : views) {
            Step step{};
            step.code = StepCode::kView;
            step.op = narrow(view);
            steps.push_back(step);
        }
        push(instr, steps);
    }

    // An activation of the result of the instruction emitted last, attention.
    void follow(int64_t index) {
        const Chain chain = make_chain(ops_, {index}, stores_);
        program_.steps.push_back(chain.steps.back());
        ++program_.instrs.back().num_steps;
    }

    // `index`: the product, if there is one.
    void emit_slice(int64_t index, const Task& task, const Chain& chain) {
        const OpSpec& op = ops_[index];
        Instr instr = blank(op.kind == Kind::kAffine ? Code::kAffine : Code::kChain, index);
        instr.first = narrow(task.first);
        instr.count = narrow(task.count);
        instr.half = narrow(half_width(op));
        instr.halves = op.paired ? 2 : 1;
        instr.many_items = has_many_items(instr.count, samples_at_once(narrow(shape_.batch)));
        instr.next_row = kThreads / instr.count;
        instr.next_channel = kThreads % instr.count;
        if (instr.code == Code::kAffine) {
            instr.first_term = narrow(program_.terms.size());
            instr.num_terms = narrow(op.num_terms);
            instr.columns = round_up(instr.count * instr.halves, kFragment);
            for (int64_t t = op.first_term; t < op.first_term + op.num_terms; ++t) {
                const TermSpec& spec = terms_[t];
                const int32_t depth = narrow(spec.num_columns * ops_[spec.source].channels);
                program_.terms.push_back({narrow(spec.source), narrow(spec.first_column), depth, instr.depth,
                                          stores_[spec.source] == Stores::kRounded});
                instr.depth += depth;
            }
            instr.affine = affine_work(program_.layout, instr.columns, instr.depth, narrow(shape_.batch));
        }
        most_planes_ = std::max(most_planes_, chain.planes);
        planes_of_many_ = std::max(planes_of_many_, chain.planes * (instr.many_items ? kManyItems : 1));
        push(instr, chain.steps);
    }

    void push(Instr& instr, const std::vector<Step>& steps) {
        instr.first_step = narrow(program_.steps.size());
        instr.num_steps = narrow(steps.size());
        instr.num_loads = narrow(std::count_if(steps.begin(), steps.end(),
                                               [](const Step& step) { return step.code == StepCode::kLoad; }));
        program_.steps.insert(program_.steps.end(), steps.begin(), steps.end());
        program_.instrs.push_back(instr);
    }

    static Instr blank(Code code, int64_t op) {
        Instr instr{};
        instr.code = code;
        instr.op = narrow(op);
        instr.signal = -1;
        return instr;
    }

    void divide_memory() {
        divide_memory(planes_of_many_);
        const BlockMemory& memory = program_.memory;
        if (memory.bytes > options_.shared_limit) {
            for (Instr& instr : program_.instrs) instr.many_items = 0;
            divide_memory(most_planes_);
        }
        if (memory.bytes > options_.shared_limit) {
            throw std::invalid_argument("shared memory: a block works on " + std::to_string(memory.bytes) +
                                        " bytes, but may have only " + std::to_string(options_.shared_limit));
        }
    }

    void divide_memory(int64_t planes) {
        BlockMemory& memory = program_.memory;
        memory = {};
        for (const Instr& instr : program_.instrs) {
            memory.planes = std::max(memory.planes, aligned(work_bytes(instr, shape_)));
        }
        memory.segments = memory.planes + planes * kThreads * 4;
        memory.program = memory.segments + aligned(kMaxTerms * sizeof(Segment));
        for (const Block& block : program_.blocks) {
            memory.bytes = std::max(memory.bytes, memory.program + held_program(block).bytes);
        }
    }

    // Units that an instruction reads, and how many columns back.
    std::vector<Wait> reads(const Instr& instr) const {
        std::vector<Wait> result;
        const auto add = [&](int64_t unit, int64_t lag) {
            if (lag < kAlwaysDone) result.push_back({narrow(unit), narrow(lists_.num_tasks[unit]), narrow(lag)});
        };
        const auto add_op = [&](int64_t index, int64_t lag) {
            if (ops_[index].level >= 0) add(lists_.unit_of[index], lag);
        };
        const int64_t draw = static_cast<int64_t>(lists_.units.size()) - 1;
        if (instr.code == Code::kAttend) {
            const OpSpec& op = ops_[instr.op];
            add_op(op.sources[0], 0);
            add_op(op.sources[1], instr.inclusive ? 0 : 1);
            add_op(op.sources[2], instr.inclusive ? 0 : 1);
            return result;
        }
        if (instr.code == Code::kDraw) {
            add_op(output_, 0);
            return result;
        }
        for (int32_t t = instr.first_term; t < instr.first_term + instr.num_terms; ++t) {
            const TermSpec& term = terms_[ops_[instr.op].first_term + t - instr.first_term];
            add_op(term.source, 1 - term.first_column - term.num_columns);
        }
        for (int32_t s = instr.first_step; s < instr.first_step + instr.num_steps; ++s) {
            const Step& step = program_.steps[s];
            if (step.code == StepCode::kLookup) add(draw, 1);
            if (step.code == StepCode::kLoad && !is_known(step, instr)) add_op(step.op, 0);
        }
        return result;
    }

    // Whether what a step loads needs no wait: it is there before the launch, or the same thread has computed it in the
    // same task.
    bool is_known(const Step& load, const Instr& instr) const {
        return load.starts || ops_[load.op].level < 0 || lists_.unit_of[load.op] == lists_.unit_of[instr.op];
    }

    // By unit, how many columns back its results are known to be there.
    using Known = std::vector<int32_t>;

    // Adds what follows from a unit being done with the column `lag` back: that, and what its tasks knew by then.
    void learn(Known& known, const Wait& read) const {
        const Known& then = known_after_[read.counter];
        for (std::size_t u = 0; u < known.size(); ++u) known[u] = std::min(known[u], then[u] + read.lag);
    }

    // Walks through a column of a block. `visit` gets every instruction and what is known before it, without its reads.
    template <class Visit>
    Known walk(const Block& block, Known known, Visit visit) const {
        // The column before has been walked through in the same way.
        for (int32_t& lag : known) lag = std::min(lag + 1, kAlwaysDone);
        const std::vector<int64_t>& own_tasks = own_tasks_[&block - program_.blocks.data()];
        for (int32_t i = block.first_instr; i < block.last_instr; ++i) {
            visit(i, known);
            for (const Wait& read : reads(program_.instrs[i])) learn(known, read);
            const int32_t done = program_.instrs[i].signal;
            if (done >= 0 && own_tasks[done] == lists_.num_tasks[done]) known[done] = 0;
        }
        return known;
    }

    // Drops every read that follows from others, those of earlier columns and of other blocks included: what an
    // instruction reads has mostly been waited for by something else that it reads.
    void add_waits() {
        known_after_.assign(lists_.units.size(), Known(lists_.units.size(), kAlwaysDone));
        for (std::size_t u = 0; u < lists_.units.size(); ++u) known_after_[u][u] = 0;
        std::vector<Known> known(program_.blocks.size(), Known(lists_.units.size(), kAlwaysDone));
        for (bool changed = true; changed;) {
            changed = false;
            for (std::size_t b = 0; b < program_.blocks.size(); ++b) {
                Known after = walk(program_.blocks[b], known[b], [&](int32_t i, const Known& before) {
                    const int32_t done = program_.instrs[i].signal;
                    if (done < 0) return;
                    Known now = before;
                    for (const Wait& read : reads(program_.instrs[i])) learn(now, read);
                    for (std::size_t u = 0; u < now.size(); ++u) {
                        if (now[u] >= known_after_[done][u]) continue;
                        known_after_[done][u] = now[u];
                        changed = true;
                    }
                });
                changed = changed || after != known[b];
                known[b] = std::move(after);
            }
        }
        for (std::size_t b = 0; b < program_.blocks.size(); ++b) {
            program_.blocks[b].first_wait = narrow(program_.waits.size());
            walk(program_.blocks[b], known[b], [&](int32_t i, const Known& before) {
                Instr& instr = program_.instrs[i];
                sort_loads(instr, before);
                const std::vector<Wait> wanted = reads(instr);
                instr.first_wait = narrow(program_.waits.size());
                for (std::size_t r = 0; r < wanted.size(); ++r) {
                    bool follows = before[wanted[r].counter] <= wanted[r].lag;
                    for (std::size_t other = 0; other < wanted.size(); ++other) {
                        const Wait &a = wanted[other], &b = wanted[r];
                        const bool same = a.counter == b.counter && a.lag == b.lag;  // of these the first stays
                        follows = follows || (a.lag + known_after_[a.counter][b.counter] <= b.lag &&
                                              (!same || other < r));
                    }
                    if (!follows) program_.waits.push_back(wanted[r]);
                }
                instr.num_waits = narrow(program_.waits.size()) - instr.first_wait;
            });
            program_.blocks[b].last_wait = narrow(program_.waits.size());
        }
    }

    // Loads of what is known before the instruction come first.
    void sort_loads(Instr& instr, const Known& before) {
        const auto first = program_.steps.begin() + instr.first_step, last = first + instr.num_steps;
        const auto known = std::stable_partition(first, last, [&](const Step& step) {
            return step.code == StepCode::kLoad &&
                   (is_known(step, instr) || before[lists_.unit_of[step.op]] <= 0);
        });
        instr.num_early = narrow(known - first);
    }

    const std::vector<OpSpec>& ops_;
    const std::vector<TermSpec>& terms_;
    const int64_t output_;
    const StepShape& shape_;
    const ProgramOptions& options_;
    const TaskLists lists_;
    const std::vector<Stores> stores_;
    Program program_{};
    std::vector<std::vector<Chain>> chains_;       // by unit and group
    int32_t most_planes_ = 0, planes_of_many_ = 0;  // where threads work on one item, or on many
    std::vector<std::vector<int64_t>> own_tasks_;  // by block and unit
    std::vector<Known> known_after_;               // by unit, once it is done
};

}  // namespace

int64_t work_bytes(const Instr& instr, const StepShape& shape) {
    switch (instr.code) {
        case Code::kAffine:
            return instr.affine.bytes;
        case Code::kAttend:
            return instr.attend.bytes;
        case Code::kDraw:
            return draw_work(shape.num_codes).bytes;
        default:
            return 0;
    }
}

Program make_program(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output,
                     const StepShape& shape, const ProgramOptions& options) {
    check(ops, terms, output, shape, options);
    return Planner(ops, terms, output, shape, options).run();
}

}  // namespace fastvq::cuda
