// Grids filled by the engine: the bits of the slow way, whatever the tile, the threads and the batch.
#include "cpu/grid_plan.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <limits>
#include <new>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "grid_case.h"
#include "plan_case.h"
#include "tests.h"

namespace {

std::atomic<int64_t> aligned_bytes{0};

}  // namespace

// The engine's memory beside its weights is the only such array that is made while grids are filled.
void* operator new[](std::size_t size, std::align_val_t alignment) {
    aligned_bytes += static_cast<int64_t>(size);
    void* data = nullptr;
    if (posix_memalign(&data, static_cast<std::size_t>(alignment), size) != 0) throw std::bad_alloc();
    return data;
}

void operator delete[](void* data, std::align_val_t) noexcept { std::free(data); }

namespace fastvq::cpu::testing {
namespace {

struct Threads {
    int64_t all, step;
};

const std::vector<Threads> kThreads = {{1, 1}, {2, 2}, {3, 1}, {5, 3}};

void resize(PlanCase& plan, int64_t height, int64_t width) {
    plan.height = height;
    plan.shape.width = width;
    plan.shape.positions = height * width;
}

std::vector<int64_t> tiles_of(const PlanCase& plan) {
    const int64_t width = plan.shape.width;
    std::set<int64_t> tiles = {width};
    if (!plan.attends()) tiles.insert({1, std::min<int64_t>(2, width), std::min<int64_t>(3, width)});
    return {tiles.begin(), tiles.end()};
}

void fill(const GridPlan& engine, GridTask task, int64_t tile, int64_t offset, const Threads& threads) {
    task.tile = tile;
    task.offset = offset;
    task.threads = threads.all;
    task.step_threads = threads.step;
    const GridResult result = engine.run(task);
    expect(result.outcome == Outcome::kDone && result.sample == -1, "the grids were not filled");
    expect(result.above_seconds >= 0.0 && result.step_seconds > 0.0, "no time has passed");
}

void check_offsets(const GridCase& grid, const GridPlan& engine, int64_t tile) {
    const int64_t least = least_offset(grid.plan, tile);
    engine.memory_bytes(1, tile, least);
    if (least > 1) expect_refused("an offset too small", [&] { engine.memory_bytes(1, tile, least - 1); });
    Grids grids = grid.begin();
    GridTask task = grid.task(grids);
    task.tile = tile;
    task.offset = least - 1;
    expect_refused("a front that is none", [&] { engine.run(task); });
    expect(same_bits(grids.codes, grid.codes), "codes of a front that was refused");
}

void test_random_plan(const Kernels& kernels, uint64_t seed) {
    PlanCase plan = random_plan(seed);
    const int64_t width = plan.attends() ? plan.shape.width : 1 + static_cast<int64_t>(seed * 5 % 17);
    resize(plan, 2 + static_cast<int64_t>(seed % 3), width);
    const GridCase grid(plan, 1 + static_cast<int64_t>(seed % 3), seed);
    const GridPlan engine = grid.build(kernels);
    const Grids expected = grid.fill_slowly(kernels);
    for (const int64_t tile : tiles_of(plan)) {
        const std::string in_tiles = " in tiles of " + std::to_string(tile) + " of " + std::to_string(width);
        check_offsets(grid, engine, tile);
        const int64_t least = least_offset(plan, tile);
        for (const Threads& threads : kThreads) {
            const int64_t other = threads.all == 2 ? std::min(width, least + 1) : least;
            for (const int64_t offset : std::set<int64_t>{least, other}) {
                Grids grids = grid.begin();
                const int64_t before = aligned_bytes;
                fill(engine, grid.task(grids), tile, offset, threads);
                expect(aligned_bytes - before == engine.memory_bytes(grid.batch, tile, offset), "allocated ",
                       aligned_bytes - before, " bytes", in_tiles);
                expect(same_bits(grids.logits, expected.logits), "other logits", in_tiles, ", offset ", offset, ", on ",
                       threads.all, " threads");
                expect(grids == expected, "other codes", in_tiles, ", offset ", offset, ", on ", threads.all,
                       " threads");
            }
        }
        Grids alone = grid.begin();
        const GridTask last = grid.task_of(grid.batch - 1, alone);
        std::vector<StaticInput> statics = grid.statics;
        for (StaticInput& input : statics) input.data += (grid.batch - 1) * input.sample_stride;
        GridTask task = last;
        task.statics = statics.data();
        fill(engine, task, tile, least, {2, 1});
        const int64_t first = (grid.batch - 1) * grid.shape().positions();
        expect(std::equal(alone.codes.begin() + first, alone.codes.end(), expected.codes.begin() + first),
               "other codes of a sample alone", in_tiles);
        expect(std::equal(alone.logits.begin() + first * plan.shape.num_codes, alone.logits.end(),
                          expected.logits.begin() + first * plan.shape.num_codes),
               "other logits of a sample alone", in_tiles);
    }
}

// Plans that the random ones leave out: without a part above, and with columns to the left that rings keep twice.
void test_small_plan(const Kernels& kernels) {
    const PlanCase plan = tiny_plan(5, 19);
    const GridCase grid(plan, 3, 1);
    const GridPlan engine = grid.build(kernels);
    const Grids expected = grid.fill_slowly(kernels);
    for (const int64_t tile : {1, 2, 3, 19}) {
        for (const Threads& threads : kThreads) {
            Grids grids = grid.begin();
            fill(engine, grid.task(grids), tile, 1, threads);
            expect(grids == expected, "other bits without a part above in tiles of ", tile);
            GridTask task = grid.task(grids);
            task.logits = nullptr;
            grids.codes = grid.codes;
            fill(engine, task, tile, 1, threads);
            expect(grids.codes == expected.codes, "other codes where logits are not wanted");
            task.batch = 0;
            expect(engine.run(task).outcome == Outcome::kDone, "no samples");
        }
    }
}

// One plan, worked on by several callers at once, each with memory of its own.
void test_several_callers(const Kernels& kernels) {
    PlanCase plan = random_plan(10);
    resize(plan, 3, 9);
    const GridPlan engine = GridCase(plan, 1, 0).build(kernels);
    const int64_t tile = tiles_of(plan).front(), offset = least_offset(plan, tile);
    constexpr uint64_t kCallers = 4;
    std::vector<std::exception_ptr> errors(kCallers);
    std::vector<std::thread> callers;
    for (uint64_t caller = 0; caller < kCallers; ++caller) {
        callers.emplace_back([&, caller] {
            try {
                const GridCase grid(plan, 1 + static_cast<int64_t>(caller % 2), caller);
                Grids grids = grid.begin();
                fill(engine, grid.task(grids), tile, offset, kThreads[caller % 2]);
                expect(grids == grid.fill_slowly(kernels), "callers at the same time disturb each other");
            } catch (...) {
                errors[caller] = std::current_exception();
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
}

// What the engine asks, and what it has said by then.
struct Question {
    int64_t allowed;  // how often to go on
    int64_t asked = 0, complete = 0;
    std::thread::id asker = std::this_thread::get_id();
    bool other_asker = false, fewer = false;

    static bool answer(void* context, int64_t complete) {
        auto& question = *static_cast<Question*>(context);
        question.other_asker |= question.asker != std::this_thread::get_id();
        question.fewer |= complete < question.complete;
        question.complete = complete;
        return question.asked++ < question.allowed;
    }
};

GridResult run_asking(const GridPlan& engine, GridTask task, const Threads& threads, Question& question) {
    task.threads = threads.all;
    task.step_threads = threads.step;
    task.keep_going = Question::answer;
    task.context = &question;
    const GridResult result = engine.run(task);
    expect(!question.other_asker, "asked from another thread");
    expect(!question.fewer, "fewer rows are complete than before");
    return result;
}

// A plan whose logits at a place are moved by a static vector there alone.
PlanCase plan_with_context(int64_t height, int64_t width) {
    PlanCase plan = tiny_plan(height, width);
    OpSpec& output = plan.ops[plan.output];
    output.first_above = static_cast<int64_t>(plan.terms.size());
    output.num_above = 1;
    output.above_level = 0;
    plan.weights.emplace_back(output.channels, 1.0f);
    plan.terms.push_back({plan.num_ops(), 0, 1, plan.weights.back().data(), output.channels});
    OpSpec context{};
    context.kind = Kind::kStatic;
    context.channels = 1;
    context.level = -1;
    plan.ops.push_back(context);
    return plan;
}

void test_logits_that_are_not_finite(const Kernels& kernels) {
    constexpr int64_t kBatch = 8, kHeight = 3, kWidth = 5, kPositions = kHeight * kWidth;
    const PlanCase plan = plan_with_context(kHeight, kWidth);
    GridCase grid(plan, kBatch, 3);
    grid.forget_codes();
    const GridPlan engine = grid.build(kernels);
    std::vector<float> context(kBatch * kPositions);
    grid.statics.back() = {context.data(), kPositions, kWidth, 1};
    for (const float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        for (const int64_t tile : {1, 2, 5}) {
            for (const Threads& threads : kThreads) {
                for (const int64_t sample : {0, 3, 7}) {
                    constexpr int64_t kRow = 1, kColumn = 3;
                    const int64_t place = (sample * kHeight + kRow) * kWidth + kColumn;
                    context[place] = poison;
                    Grids grids = grid.begin();
                    GridTask task = grid.task(grids);
                    task.tile = tile;
                    Question question{kPositions};
                    const GridResult result = run_asking(engine, task, threads, question);
                    context[place] = 0.0f;
                    expect(question.complete <= kRow, "a row that could not be drawn is complete");
                    expect(result.outcome == Outcome::kNotDrawable, "drew from ", poison);
                    expect(result.sample == sample && result.row == kRow && result.column == kColumn, "named sample ",
                           result.sample, ", row ", result.row, ", column ", result.column, " for ", poison);
                    expect(grids.codes[place] == grid.codes[place], "a code where there was ", poison);
                    const auto turn = [&](int64_t row, int64_t column) {
                        return (column / tile + row) * tile + column % tile;
                    };
                    for (int64_t i = 0; i < kBatch * kPositions; ++i) {
                        const int64_t now = turn(i % kPositions / kWidth, i % kWidth), then = turn(kRow, kColumn);
                        const bool drawn = grids.codes[i] != grid.codes[i];
                        expect(drawn || now >= then, "no code before ", poison);
                        expect(!drawn || now <= then, "went on after ", poison);
                    }
                }
            }
        }
    }
}

// A NaN has to reach the logits, whatever it goes through.
void test_nan_is_not_lost(const Kernels& kernels) {
    for (uint64_t seed = 0; seed < 14; ++seed) {
        PlanCase plan = random_plan(seed);
        const auto lookup = std::find_if(plan.ops.begin(), plan.ops.end(),
                                         [](const OpSpec& op) { return op.kind == Kind::kLookup; });
        const std::vector<float> bias(lookup->channels, std::numeric_limits<float>::quiet_NaN());
        lookup->bias = bias.data();
        GridCase grid(plan, 2, seed);
        grid.forget_codes();
        Grids grids = grid.begin();
        const GridResult result = grid.build(kernels).run(grid.task(grids));
        expect(result.outcome == Outcome::kNotDrawable && result.sample == 0 && result.row == 0 && result.column == 0,
               "a NaN was lost in plan ", seed);
    }
}

void test_stop(const Kernels& kernels) {
    constexpr int64_t kHeight = 40, kWidth = 7, kAllowed = 3;
    const PlanCase plan = tiny_plan(kHeight, kWidth);
    GridCase grid(plan, 2, 1);
    grid.forget_codes();
    const GridPlan engine = grid.build(kernels);
    for (const Threads& threads : kThreads) {
        for (const int64_t tile : {1, 2, 7}) {
            Grids grids = grid.begin();
            GridTask task = grid.task(grids);
            task.tile = tile;
            Question all{kHeight * kWidth};
            expect(run_asking(engine, task, threads, all).outcome == Outcome::kDone, "stopped although it was not to");
            expect(all.complete == kHeight && all.asked >= kHeight, "not told of every row");
            Question question{kAllowed};
            grids = grid.begin();
            task.codes = grids.codes.data();
            task.logits = nullptr;
            expect(run_asking(engine, task, threads, question).outcome == Outcome::kStopped, "went on");
            expect(question.asked == kAllowed + 1, "asked ", question.asked, " times");
            const auto drawn = [&](int64_t row, int64_t column) {
                return grids.codes[row * kWidth + column] != grid.codes[row * kWidth + column];
            };
            for (int64_t row = 0; row < question.complete; ++row) {
                for (int64_t column = 0; column < kWidth; ++column) expect(drawn(row, column), "a row is not complete");
            }
            // Within a step after the answer.
            const int64_t rows = question.complete + (kWidth + tile - 1) / tile;
            for (int64_t row = rows; row < kHeight; ++row) expect(!drawn(row, 0), "went on for long");
        }
    }
    // Rows are made longer until one takes long enough for the question to come up in its midst.
    Outcome outcome = Outcome::kDone;
    for (int64_t width = 1 << 14; outcome == Outcome::kDone; width *= 4) {
        expect(width < (1 << 24), "never asked whether to go on");
        const PlanCase wide = tiny_plan(1, width);
        GridCase row(wide, 2, 1);
        row.forget_codes();
        Grids grids = row.begin();
        Question question{0};
        outcome = run_asking(row.build(kernels), row.task(grids), {2, 2}, question).outcome;
        if (question.complete == 1) {
            outcome = Outcome::kDone;  // asked when all was done
            continue;
        }
        const auto drawn = [&](int64_t b) {
            const auto begin = grids.codes.begin() + b * width;
            return std::find_if(begin, begin + width, [](int64_t code) { return code < 0; }) - begin;
        };
        expect(drawn(0) == drawn(1) && drawn(0) > 0 && drawn(0) < width, "left after columns ", drawn(0), " and ",
               drawn(1));
    }
}

}  // namespace

void test_every_kind_comes_up(uint64_t num_plans) {
    std::set<std::pair<Kind, bool>> seen, above;
    std::set<bool> inclusive, bf16;
    bool once = false, to_the_right = false;
    for (uint64_t seed = 0; seed < num_plans; ++seed) {
        const PlanCase plan = random_plan(seed);
        bf16.insert(plan.bf16);
        for (const OpSpec& op : plan.ops) {
            if (op.level >= 0) seen.insert({op.kind, op.paired});
            if (op.level >= 0 && op.num_above > 0) above.insert({op.kind, op.paired});
            if (op.kind == Kind::kAttend) inclusive.insert(op.inclusive);
            once = once || (op.level >= 0 && op.num_once > 0);
            for (int64_t t = op.first_above; t < op.first_above + op.num_above; ++t) {
                to_the_right = to_the_right || (op.level >= 0 && plan.terms[t].first_column > 0);
            }
        }
    }
    // All ten kinds, and six of them paired as well: gates and attention cannot be, concat_elu has to be.
    expect(seen.size() == 16 && inclusive.size() == 2 && bf16.size() == 2, "the random plans leave something out: ",
           seen.size(), " kinds");
    expect(above.size() == 4 && once && to_the_right, "the random plans leave out parts above: ", above.size(),
           " kinds");
}

void test_grids(const Kernels& kernels, uint64_t num_plans) {
    test_small_plan(kernels);
    test_logits_that_are_not_finite(kernels);
    test_nan_is_not_lost(kernels);
    test_stop(kernels);
    test_several_callers(kernels);
    for (uint64_t seed = 0; seed < num_plans; ++seed) {
        try {
            test_random_plan(kernels, seed);
        } catch (const std::exception& error) {
            throw std::runtime_error("plan " + std::to_string(seed) + ": " + error.what());
        }
    }
}

}  // namespace fastvq::cpu::testing
