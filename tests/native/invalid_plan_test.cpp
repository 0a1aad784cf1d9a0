// Plans and fronts that the engine has to refuse, because it would read or write wild memory.
#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "grid_case.h"
#include "plan_case.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

OpSpec& first_of(PlanCase& plan, Kind kind) {
    for (OpSpec& op : plan.ops) {
        if (op.kind == kind && op.level >= 0) return op;
    }
    throw std::logic_error("the plan has no such operation");
}

TermSpec& first_term(PlanCase& plan) { return plan.terms[first_of(plan, Kind::kAffine).first_term]; }

TermSpec& output_term(PlanCase& plan) { return plan.terms[plan.ops[plan.output].first_term]; }

// Of what is worked out for each place before the steps.
OpSpec& first_before(PlanCase& plan, Kind kind) {
    for (OpSpec& op : plan.ops) {
        if (op.kind == kind && op.level < 0 && !op.uniform) return op;
    }
    throw std::logic_error("the plan has no such operation");
}

OpSpec& before(PlanCase& plan) { return first_before(plan, Kind::kAffine); }

TermSpec& above_term(PlanCase& plan) { return plan.terms[before(plan).first_above]; }

TermSpec& tap(PlanCase& plan) { return plan.terms[first_of(plan, Kind::kLookup).first_above]; }

void build(const PlanCase& plan) { GridCase(plan, 1, 1).build(*find_kernels("auto")); }

void check_plans() {
    struct Change {
        const char* what;
        std::function<void(PlanCase&)> apply;
    };
    const auto& of = first_of;
    const std::vector<Change> changes = {
        {"unknown kind", [&](PlanCase& p) { of(p, Kind::kAdd).kind = static_cast<Kind>(11); }},
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
        {"no grid", [&](PlanCase& p) { p.height = 0; }},
        {"no columns", [&](PlanCase& p) { p.shape.width = 0; }},
        {"an endless grid", [&](PlanCase& p) { p.height = p.shape.width = int64_t{1} << 20; }},
        {"no bias", [&](PlanCase& p) { of(p, Kind::kAffine).bias = nullptr; }},
        {"no bias before the steps", [&](PlanCase& p) { before(p).bias = nullptr; }},
        {"unknown kind before the steps", [&](PlanCase& p) { before(p).kind = static_cast<Kind>(11); }},
        {"keys before the steps", [&](PlanCase& p) { before(p).kind = Kind::kStoreKeys; }},
        {"steps that are the same everywhere", [&](PlanCase& p) { of(p, Kind::kAffine).uniform = 1; }},
        {"places that are the same everywhere", [&](PlanCase& p) { before(p).uniform = 1; }},
        {"codes that are the same everywhere",
         [&](PlanCase& p) {
             OpSpec& op = before(p);
             op.kind = Kind::kLookup;
             op.num_above = op.num_once = 0;
             op.uniform = 1;
             op.above_level = -1;
         }},
        {"no order before the steps", [&](PlanCase& p) { before(p).above_level = -1; }},
        {"order beyond the last", [&](PlanCase& p) { before(p).above_level = p.num_ops(); }},
        {"order of what has no part above", [&](PlanCase& p) { of(p, Kind::kAdd).above_level = 0; }},
        {"order of a static vector", [&](PlanCase& p) { p.ops[0].above_level = 0; }},
        {"part above of an activation", [&](PlanCase& p) { of(p, Kind::kElu).num_above = 1; }},
        {"part of an activation that is the same everywhere", [&](PlanCase& p) { of(p, Kind::kElu).num_once = 1; }},
        {"part of a lookup that is the same everywhere", [&](PlanCase& p) { of(p, Kind::kLookup).num_once = 1; }},
        {"terms above before the first", [&](PlanCase& p) { before(p).first_above = -1; }},
        {"terms above beyond the last", [&](PlanCase& p) { before(p).num_above = kHuge; }},
        {"negative number of terms above", [&](PlanCase& p) { before(p).num_above = -1; }},
        {"uniform terms beyond the last", [&](PlanCase& p) { before(p).first_once = kHuge; before(p).num_once = 1; }},
        {"a uniform term of a place",
         [&](PlanCase& p) {
             before(p).first_once = before(p).first_above;
             before(p).num_once = 1;
         }},
        {"source of a term above", [&](PlanCase& p) { above_term(p).source = p.num_ops(); }},
        {"negative source of a term above", [&](PlanCase& p) { above_term(p).source = -1; }},
        {"a step's source above",
         [&](PlanCase& p) { above_term(p).source = &of(p, Kind::kAffine) - p.ops.data(); }},
        {"rows of what is not kept", [&](PlanCase& p) { above_term(p).first_row = -1; }},
        {"rows below", [&](PlanCase& p) { above_term(p).first_row = 1; }},
        {"rows far below", [&](PlanCase& p) { above_term(p).first_row = kHuge; }},
        {"rows far above", [&](PlanCase& p) { above_term(p).first_row = -kHuge - 1; }},
        {"no rows", [&](PlanCase& p) { above_term(p).num_rows = 0; }},
        {"many rows", [&](PlanCase& p) { above_term(p).num_rows = kHuge; }},
        {"columns of a term above far left", [&](PlanCase& p) { above_term(p).first_column = -kHuge - 1; }},
        {"no weights above", [&](PlanCase& p) { above_term(p).weights = nullptr; }},
        {"weights above of another size", [&](PlanCase& p) { above_term(p).num_weights += 1; }},
        {"rows above in a step", [&](PlanCase& p) { first_term(p).first_row = -1; }},
        {"tap in the own row", [&](PlanCase& p) { tap(p).first_row = 0; }},
        {"tap far above", [&](PlanCase& p) { tap(p).first_row = -kHuge - 1; }},
        {"tap far left", [&](PlanCase& p) { tap(p).first_column = -kHuge - 1; }},
        {"tap of a source", [&](PlanCase& p) { tap(p).source = 0; }},
        {"tap of another size", [&](PlanCase& p) { tap(p).num_weights -= 1; }},
        {"tap without a table", [&](PlanCase& p) { tap(p).weights = nullptr; }},
        {"order of a doubled vector", [&](PlanCase& p) { first_before(p, Kind::kConcatElu).above_level = 0; }},
        {"source of a doubled vector", [&](PlanCase& p) { first_before(p, Kind::kConcatElu).sources[0] = -1; }},
        {"doubled vector in one part", [&](PlanCase& p) { first_before(p, Kind::kConcatElu).paired = 0; }},
        {"keys read by an activation",
         [&](PlanCase& p) { of(p, Kind::kRelu).sources[0] = of(p, Kind::kAttend).sources[1]; }},
        {"keys read by a product",
         [&](PlanCase& p) { output_term(p).source = of(p, Kind::kAttend).sources[1]; }},
    };
    for (const Change& change : changes) {
        PlanCase plan = rich_plan();
        build(plan);
        const GridCase grid(plan, 1, 1);  // its memory is that of a plan which can be
        change.apply(plan);
        expect_refused(change.what, [&] { grid.build(*find_kernels("auto")); });
    }
}

// Attention keeps its values position by position, where no window finds them.
void check_values_of_attention() {
    PlanCase plan = rich_plan();
    const int64_t value = first_of(plan, Kind::kAttend).sources[2];
    OpSpec& output = plan.ops[plan.output];
    const int64_t count = plan.ops[value].channels * output.channels;
    plan.weights.emplace_back(count, 1.0f);
    output.first_above = static_cast<int64_t>(plan.terms.size());
    output.num_above = 1;
    output.above_level = 0;
    plan.terms.push_back({value, 0, 1, plan.weights.back().data(), count, -1, 1});
    expect_refused("a window of attention's values", [&] { build(plan); });
}

void check_fronts() {
    const PlanCase raster = rich_plan(), free = tiny_plan(3, 6);
    for (const PlanCase* plan : {&raster, &free}) {
        const int64_t width = plan->shape.width;
        const GridCase grid(*plan, 1, 1);
        const GridPlan engine = grid.build(*find_kernels("auto"));
        Grids grids = grid.begin();
        const auto refused = [&](const char* what, const std::function<void(GridTask&)>& change) {
            GridTask task = grid.task(grids);
            change(task);
            expect_refused(what, [&] { engine.run(task); });
            expect(same_bits(grids.codes, grid.codes), "codes although it was refused: ", what);
        };
        for (const int64_t size : {int64_t{0}, int64_t{-1}, width + 1, kHuge}) {
            refused("tile", [&](GridTask& task) { task.tile = size; });
            refused("offset", [&](GridTask& task) { task.offset = size; });
            expect_refused("tile", [&] { engine.memory_bytes(1, size, 1); });
            expect_refused("offset", [&] { engine.memory_bytes(1, width, size); });
        }
        for (const int64_t threads : {int64_t{0}, int64_t{-1}, int64_t{1025}, kHuge}) {
            refused("threads", [&](GridTask& task) { task.threads = threads; });
            refused("threads of steps", [&](GridTask& task) { task.step_threads = threads; });
        }
        refused("more threads in steps", [&](GridTask& task) { task.step_threads = task.threads + 1; });
        if (plan->attends()) {
            refused("tiles where there is attention", [&](GridTask& task) { task.tile = 1; task.offset = width; });
        }
    }
}

// Windows that reach far beyond the grid need more memory than can be counted.
void check_sizes() {
    PlanCase plan = random_plan(3);
    bool reached = false;
    for (OpSpec& op : plan.ops) {
        if (op.kind != Kind::kAffine || op.level < 0 || op.num_above == 0 || reached) continue;
        for (int64_t t = op.first_above; t < op.first_above + op.num_above; ++t) {
            TermSpec& term = plan.terms[t];
            if (term.first_row == 0) continue;
            term.first_row = 1 - (int64_t{1} << 31);
            term.first_column = 1 - (int64_t{1} << 31);
            reached = true;
        }
    }
    expect(reached, "a plan without windows above");
    const GridCase grid(plan, 1, 1);
    try {
        grid.build(*find_kernels("auto")).memory_bytes(1, plan.shape.width, 1);
    } catch (const std::bad_alloc&) {
        return;
    }
    expect(false, "counted more memory than there is");
}

}  // namespace

void test_invalid_plans() {
    check_plans();
    check_values_of_attention();
    check_fronts();
    check_sizes();
}

}  // namespace fastvq::cpu::testing
