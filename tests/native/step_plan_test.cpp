// Tests of the engines without Python. Usage: step_plan_test NUMBER_OF_RANDOM_PLANS
#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <iostream>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/step_plan.h"
#include "plan_case.h"
#include "reference.h"
#include "tests.h"

namespace fastvq::cpu {
#ifdef FASTVQ_X86_KERNELS
extern const Kernels kWideKernels;
#endif
}  // namespace fastvq::cpu

namespace fastvq::cpu::testing {
namespace {

const std::vector<int64_t> kThreads = {1, 2, 3, 5};
constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

std::vector<const Kernels*> kernels_here() {
    std::vector<const Kernels*> found;
    for (const char* name : {"avx512", "avx2", "baseline"}) {
        if (const Kernels* kernels = find_kernels(name)) found.push_back(kernels);
    }
    return found;
}

// With one for comparison that no engine uses.
std::vector<const Kernels*> kernels_to_compare() {
    std::vector<const Kernels*> found = kernels_here();
#ifdef FASTVQ_X86_KERNELS
    if (find_kernels("avx2") != nullptr) found.push_back(&kWideKernels);
#endif
    return found;
}

// All that rows leave behind.
struct Trace {
    std::vector<float> kept, scratch;
    std::vector<int64_t> codes;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

Trace fill_grid(const StepPlan& step, Memory& memory, bool check) {
    Trace trace;
    for (int64_t row = 0; row < memory.plan.height; ++row) {
        memory.begin_row(row);
        step.check_views(memory.values.data(), memory.starts.data());
        int64_t bad = -1;
        expect(step.run_row(memory.task(), &bad) == Outcome::kDone && bad == -1, "the row was not filled");
        if (check) check_row(memory);
        for (const Buffer& buffer : memory.kept) {
            trace.kept.insert(trace.kept.end(), buffer.data.begin(), buffer.data.end());
        }
        for (const Buffer& buffer : memory.scratch) {
            trace.scratch.insert(trace.scratch.end(), buffer.data.begin(), buffer.data.end());
        }
    }
    trace.codes = memory.codes;
    return trace;
}

void test_random_plan(const Kernels& kernels, uint64_t seed) {
    const PlanCase plan = random_plan(seed);
    Trace first;
    for (const int64_t threads : kThreads) {
        const StepPlan step = plan.build(kernels, threads);
        Memory columns(plan, Layout::kColumns, seed);
        const Trace trace = fill_grid(step, columns, threads == 1);
        if (threads == 1) first = trace;
        expect(same_bits(trace.kept, first.kept) && same_bits(trace.scratch, first.scratch) &&
                   trace.codes == first.codes,
               threads, " threads give other bits than 1");
        Memory scratch(plan, Layout::kScratch, seed);
        const Trace reused = fill_grid(step, scratch, false);
        expect(same_bits(reused.kept, first.kept) && reused.codes == first.codes, threads,
               " threads give other bits where scratch is used again");
    }
}

void test_every_kind_comes_up(uint64_t num_plans) {
    std::set<std::pair<Kind, bool>> seen;
    std::set<bool> inclusive, bf16;
    std::set<int64_t> batches;
    for (uint64_t seed = 0; seed < num_plans; ++seed) {
        const PlanCase plan = random_plan(seed);
        batches.insert(plan.shape.batch);
        bf16.insert(plan.bf16);
        for (const OpSpec& op : plan.ops) {
            if (op.level >= 0) seen.insert({op.kind, op.paired});
            if (op.kind == Kind::kAttend) inclusive.insert(op.inclusive);
        }
    }
    // All ten kinds, and six of them paired as well: gates and attention cannot be, concat_elu has to be.
    expect(seen.size() == 16 && inclusive.size() == 2 && bf16.size() == 2 && batches.size() == 4,
           "the random plans leave something out: ", seen.size(), " kinds");
}

// One plan, worked on by several callers at once, each with memory of its own.
void test_several_callers(const Kernels& kernels) {
    const PlanCase plan = random_plan(10);
    for (const int64_t threads : {int64_t{1}, int64_t{2}}) {
        const StepPlan step = plan.build(kernels, threads);
        constexpr uint64_t kCallers = 4;
        std::vector<Trace> traces(kCallers);
        std::vector<std::exception_ptr> errors(kCallers);
        std::vector<std::thread> callers;
        for (uint64_t caller = 0; caller < kCallers; ++caller) {
            callers.emplace_back([&, caller] {
                try {
                    Memory memory(plan, Layout::kScratch, caller);
                    traces[caller] = fill_grid(step, memory, false);
                } catch (...) {
                    errors[caller] = std::current_exception();
                }
            });
        }
        for (std::thread& caller : callers) caller.join();
        for (uint64_t caller = 0; caller < kCallers; ++caller) {
            if (errors[caller]) std::rethrow_exception(errors[caller]);
            Memory memory(plan, Layout::kScratch, caller);
            const Trace alone = fill_grid(step, memory, false);
            expect(same_bits(alone.kept, traces[caller].kept) && alone.codes == traces[caller].codes,
                   "callers at the same time disturb each other");
        }
    }
}

void test_logits_that_are_not_finite(const Kernels& kernels) {
    constexpr int64_t kBatch = 8, kWidth = 5;
    const PlanCase plan = tiny_plan(kBatch, kWidth);
    const int64_t channels = plan.ops[plan.output].channels;
    for (const int64_t threads : kThreads) {
        const StepPlan step = plan.build(kernels, threads);
        for (const float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            for (const int64_t sample : {0, 3, 7}) {
                Memory memory(plan, Layout::kScratch, sample);
                memory.begin_row(0);
                memory.forget_codes();
                constexpr int64_t kColumn = 3;
                std::vector<float> start(kBatch * kWidth * channels);
                start[(sample * kWidth + kColumn) * channels + 1] = poison;
                memory.starts[plan.output] = {start.data(), kWidth * channels, channels};
                int64_t bad = -1;
                expect(step.run_row(memory.task(), &bad) == Outcome::kNotDrawable, "drew from ", poison);
                expect(bad == sample * kWidth + kColumn, "named ", bad, " as the place of ", poison);
                for (int64_t b = 0; b < kBatch; ++b) {
                    for (int64_t column = 0; column < kWidth; ++column) {
                        const bool drawn = memory.codes[b * kWidth + column] >= 0;
                        expect(drawn || column >= kColumn, "no code before ", poison);
                        expect(!drawn || column <= kColumn, "went on after ", poison);
                        expect(!drawn || b != sample || column != kColumn, "a code where there was ", poison);
                    }
                }
            }
        }
    }
}

// A NaN has to reach the logits, whatever it goes through.
void test_nan_is_not_lost(const Kernels& kernels) {
    for (uint64_t seed = 0; seed < 14; ++seed) {
        const PlanCase plan = random_plan(seed);
        const StepPlan step = plan.build(kernels, 2);
        Memory memory(plan, Layout::kScratch, seed);
        memory.begin_row(0);
        memory.forget_codes();
        const auto lookup = std::find_if(plan.ops.begin(), plan.ops.end(),
                                         [](const OpSpec& op) { return op.kind == Kind::kLookup; });
        const std::vector<float> start(lookup->channels, std::numeric_limits<float>::quiet_NaN());
        memory.starts[lookup - plan.ops.begin()] = {const_cast<float*>(start.data()), 0, 0};
        int64_t bad = -1;
        expect(step.run_row(memory.task(), &bad) == Outcome::kNotDrawable, "a NaN was lost in plan ", seed);
    }
}

struct Question {
    int64_t allowed;  // how often to go on
    int64_t asked = 0;
    std::thread::id asker{};
};

bool answer(void* context) {
    auto& question = *static_cast<Question*>(context);
    question.asker = std::this_thread::get_id();
    return question.asked++ < question.allowed;
}

// Rows are made longer until one takes long enough for the question to come up.
void test_stop(const Kernels& kernels) {
    constexpr int64_t kBatch = 2;
    for (const int64_t threads : kThreads) {
        Outcome outcome = Outcome::kDone;
        for (int64_t width = 1 << 14; outcome == Outcome::kDone; width *= 4) {
            expect(width < (1 << 24), "never asked whether to go on");
            const PlanCase plan = tiny_plan(kBatch, width);
            const StepPlan step = plan.build(kernels, threads);
            Memory memory(plan, Layout::kScratch, 1);
            memory.begin_row(0);
            memory.forget_codes();
            Question question{1};
            RowTask task = memory.task();
            task.keep_going = answer;
            task.context = &question;
            int64_t bad = -1;
            outcome = step.run_row(task, &bad);
            if (outcome == Outcome::kDone) continue;
            expect(outcome == Outcome::kStopped && bad == -1, "stopped with another outcome");
            expect(question.asked == 2, "asked ", question.asked, " times instead of 2");
            expect(question.asker == std::this_thread::get_id(), "asked from another thread");
            const auto drawn = [&](int64_t b) {
                const auto begin = memory.codes.begin() + b * width;
                return std::find_if(begin, begin + width, [](int64_t code) { return code < 0; }) - begin;
            };
            expect(drawn(0) == drawn(1), "threads left at different columns");
            expect(drawn(0) > 0 && drawn(0) < width, "left after column ", drawn(0), " of ", width);
        }
    }
}

OpSpec& first_of(PlanCase& plan, Kind kind) {
    for (OpSpec& op : plan.ops) {
        if (op.kind == kind && op.level >= 0) return op;
    }
    throw std::logic_error("the plan has no such operation");
}

TermSpec& first_term(PlanCase& plan) { return plan.terms[first_of(plan, Kind::kAffine).first_term]; }

TermSpec& output_term(PlanCase& plan) { return plan.terms[plan.ops[plan.output].first_term]; }

template <class Call>
void expect_refused(const std::string& what, Call call) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return;
    }
    expect(false, "accepted: ", what);
}

void test_invalid_plans(const Kernels& kernels) {
    struct Change {
        const char* what;
        std::function<void(PlanCase&)> apply;
    };
    const auto& of = first_of;
    const std::vector<Change> changes = {
        {"unknown kind", [&](PlanCase& p) { of(p, Kind::kAdd).kind = static_cast<Kind>(10); }},
        {"negative kind", [&](PlanCase& p) { of(p, Kind::kAdd).kind = static_cast<Kind>(-1); }},
        {"no channels", [&](PlanCase& p) { of(p, Kind::kAdd).channels = 0; }},
        {"too many channels", [&](PlanCase& p) { of(p, Kind::kLookup).channels = kHuge; }},
        {"too many channels of the row phase", [&](PlanCase& p) { p.ops[0].channels = kHuge; }},
        {"odd halves",
         [&](PlanCase& p) {
             for (OpSpec& op : p.ops) op.channels += op.paired;
         }},
        {"level", [&](PlanCase& p) { of(p, Kind::kLookup).level = kHuge; }},
        {"negative source", [&](PlanCase& p) { of(p, Kind::kRelu).sources[0] = -1; }},
        {"source beyond the last", [&](PlanCase& p) { of(p, Kind::kRelu).sources[0] = p.num_ops(); }},
        {"second source", [&](PlanCase& p) { of(p, Kind::kAdd).sources[1] = kHuge; }},
        {"channels of an activation", [&](PlanCase& p) { of(p, Kind::kElu).channels += 2; }},
        {"channels of a concatenation", [&](PlanCase& p) { of(p, Kind::kConcatElu).channels += 2; }},
        {"channels of a gate", [&](PlanCase& p) { of(p, Kind::kGlu).channels += 1; }},
        {"channels of keys", [&](PlanCase& p) { of(p, Kind::kStoreKeys).channels += 2; }},
        {"an operation that reads itself",
         [&](PlanCase& p) { of(p, Kind::kAdd).sources[0] = &of(p, Kind::kAdd) - p.ops.data(); }},
        {"a source of a later level", [&](PlanCase& p) { p.ops[output_term(p).source].level -= 1; }},
        {"a product's source of the same level", [&](PlanCase& p) { p.ops[p.output].level -= 1; }},
        {"concatenation in one part", [&](PlanCase& p) { of(p, Kind::kConcatElu).paired = false; }},
        {"gate of unpaired halves",
         [&](PlanCase& p) { p.ops[of(p, Kind::kGlu).sources[0]].paired = false; }},
        {"paired gate", [&](PlanCase& p) { of(p, Kind::kGlu).paired = true; }},
        {"no taps", [&](PlanCase& p) { of(p, Kind::kLookup).num_taps = 0; }},
        {"no table", [&](PlanCase& p) { of(p, Kind::kLookup).weights = nullptr; }},
        {"table of another size", [&](PlanCase& p) { of(p, Kind::kLookup).num_weights += 1; }},
        {"taps beyond the table", [&](PlanCase& p) { of(p, Kind::kLookup).num_taps = kHuge; }},
        {"no terms", [&](PlanCase& p) { of(p, Kind::kAffine).num_terms = 0; }},
        {"too many terms", [&](PlanCase& p) { of(p, Kind::kAffine).num_terms = 17; }},
        {"terms before the first", [&](PlanCase& p) { of(p, Kind::kAffine).first_term = -1; }},
        {"terms beyond the last", [&](PlanCase& p) { of(p, Kind::kAffine).first_term = p.terms.size(); }},
        {"terms far away", [&](PlanCase& p) { of(p, Kind::kAffine).first_term = kHuge; }},
        {"source of a term", [&](PlanCase& p) { first_term(p).source = p.num_ops(); }},
        {"no columns", [&](PlanCase& p) { first_term(p).num_columns = 0; }},
        {"columns to the right", [&](PlanCase& p) { first_term(p).first_column += 3; }},
        {"columns far right", [&](PlanCase& p) { first_term(p).first_column = kHuge; }},
        {"columns far left", [&](PlanCase& p) { first_term(p).first_column = -kHuge; }},
        {"many columns", [&](PlanCase& p) { first_term(p).num_columns = kHuge; }},
        {"no weights", [&](PlanCase& p) { first_term(p).weights = nullptr; }},
        {"weights of another size", [&](PlanCase& p) { first_term(p).num_weights -= 1; }},
        {"no heads", [&](PlanCase& p) { of(p, Kind::kAttend).heads = 0; }},
        {"heads that do not divide", [&](PlanCase& p) { of(p, Kind::kAttend).heads = 1000; }},
        {"keys that are not stored",
         [&](PlanCase& p) { of(p, Kind::kAttend).sources[1] = of(p, Kind::kAttend).sources[0]; }},
        {"keys stored while they are read",
         [&](PlanCase& p) {
             OpSpec& attend = of(p, Kind::kAttend);
             attend.inclusive = false;
             p.ops[attend.sources[1]].level = attend.level;
         }},
        {"no output", [&](PlanCase& p) { p.output = -1; }},
        {"output beyond the last", [&](PlanCase& p) { p.output = p.num_ops(); }},
        {"output of other width", [&](PlanCase& p) { p.output = 0; }},
        {"codes", [&](PlanCase& p) { p.shape.num_codes = 0; }},
        {"more codes than logits", [&](PlanCase& p) { p.shape.num_codes += 1; }},
        {"no samples", [&](PlanCase& p) { p.shape.batch = 0; }},
        {"no columns in the grid", [&](PlanCase& p) { p.shape.width = 0; }},
        {"a row beyond the grid", [&](PlanCase& p) { p.shape.width = p.shape.positions + 1; }},
        {"short rows of keys", [&](PlanCase& p) { p.shape.key_stride = 0; }},
        {"rows of keys without padding", [&](PlanCase& p) { p.shape.key_stride += 1; }},
        {"endless rows of keys", [&](PlanCase& p) { p.shape.key_stride = kHuge - 15; }},
    };
    for (const Change& change : changes) {
        PlanCase plan = rich_plan();
        plan.build(kernels, 2);
        change.apply(plan);
        expect_refused(change.what, [&] { plan.build(kernels, 2); });
    }
    const PlanCase plan = rich_plan();
    for (const int64_t threads : {int64_t{0}, int64_t{-1}, int64_t{100000}, kHuge}) {
        expect_refused("threads", [&] { plan.build(kernels, threads); });
    }
}

void test_invalid_views(const Kernels& kernels) {
    const PlanCase plan = rich_plan();
    const StepPlan step = plan.build(kernels, 2);
    for (int64_t index = 0; index < plan.num_ops(); ++index) {
        const OpSpec& op = plan.ops[index];
        const auto refused = [&](const char* what, const std::function<void(Memory&)>& change) {
            Memory memory(plan, Layout::kScratch, 1);
            memory.begin_row(0);
            step.check_views(memory.values.data(), memory.starts.data());
            change(memory);
            expect_refused(what, [&] { step.check_views(memory.values.data(), memory.starts.data()); });
        };
        refused("no values", [&](Memory& memory) { memory.values[index].data = nullptr; });
        if (op.level >= 0 && (op.kind == Kind::kAffine || op.kind == Kind::kLookup)) {
            refused("no start", [&](Memory& memory) { memory.starts[index].data = nullptr; });
        }
        if (plan.left[index] >= 0) {
            refused("no past", [&](Memory& memory) { memory.values[index].column_stride = 0; });
        }
        const auto several = [&](const TermSpec& term) { return term.source == index && term.num_columns > 1; };
        if (std::any_of(plan.terms.begin(), plan.terms.end(), several)) {
            refused("columns apart", [&](Memory& memory) { memory.values[index].column_stride += 1; });
        }
    }
}

int run(uint64_t num_plans) {
    std::string name;
    int failures = 0;
    const auto test = [&](const std::string& what, const std::function<void()>& body) {
        try {
            body();
        } catch (const std::exception& error) {
            std::cerr << "FAILED: " << what << ": " << error.what() << std::endl;
            ++failures;
        }
    };
    test("cases", [&] { test_every_kind_comes_up(num_plans); });
    test("checksum", test_checksum);
    test("draw", test_draw);
    test("kernels of all instruction sets", [] { test_kernels_agree(kernels_to_compare()); });
    test("products of all instruction sets", [] { test_products_agree(kernels_to_compare()); });
    test("programs of the CUDA engine", [&] { test_programs(num_plans); });
    for (const Kernels* kernels : kernels_here()) {
        const std::string on = std::string(" on ") + kernels->name;
        test("kernels" + on, [&] { test_kernels(*kernels); });
        test("nearest codes" + on, [&] { test_nearest(*kernels); });
        test("products" + on, [&] { test_product(*kernels); });
        test("invalid plans" + on, [&] { test_invalid_plans(*kernels); });
        test("invalid views" + on, [&] { test_invalid_views(*kernels); });
        test("logits that are not finite" + on, [&] { test_logits_that_are_not_finite(*kernels); });
        test("NaN" + on, [&] { test_nan_is_not_lost(*kernels); });
        test("stop" + on, [&] { test_stop(*kernels); });
        test("several callers" + on, [&] { test_several_callers(*kernels); });
        for (uint64_t seed = 0; seed < num_plans; ++seed) {
            test("plan " + std::to_string(seed) + on, [&] { test_random_plan(*kernels, seed); });
        }
        std::cout << "tested on " << kernels->name << std::endl;
    }
    return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastvq::cpu::testing

int main(int argc, char** argv) {
    if (argc != 2) {
        std::cerr << "usage: " << argv[0] << " NUMBER_OF_RANDOM_PLANS" << std::endl;
        return 2;
    }
    return fastvq::cpu::testing::run(std::stoull(argv[1]));
}
