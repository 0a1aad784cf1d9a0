// Plans to test with, and the memory that they work on, laid out as the Python side does it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/step_plan.h"

namespace fastvq::cpu::testing {

// A plan in the tables that StepPlan takes, with the weights that they point to.
struct PlanCase {
    std::vector<OpSpec> ops;
    std::vector<TermSpec> terms;
    std::vector<std::vector<float>> weights;
    // By operation: how many columns left of the current one are read (-1: its past is not read), and whether attention
    // reads it as values.
    std::vector<int64_t> left;
    std::vector<bool> is_value;
    int64_t output = 0, height = 0;
    StepShape shape{};
    bool bf16 = false;

    PlanCase() = default;
    PlanCase(PlanCase&&) = default;
    PlanCase(const PlanCase&) = delete;  // its tables point into itself

    StepPlan build(const Kernels& kernels, int64_t threads) const;
    int64_t num_ops() const { return static_cast<int64_t>(ops.size()); }
};

// A plan of random blocks: every kind of operation comes up within a few seeds.
PlanCase random_plan(uint64_t seed);

// A plan with every kind of operation.
PlanCase rich_plan();

// A plan of one lookup, one activation and one product, whose rows cost next to nothing.
PlanCase tiny_plan(int64_t batch, int64_t width);

// Where the results of operations lie whose past is not kept.
enum class Layout {
    kScratch,  // one place for the current column, as the Python side does it
    kColumns,  // a place for every column, so that a test can see them all
};

// Floats in an allocation of exactly their size.
struct Buffer {
    std::vector<float> data;
    std::vector<float> before;   // data when the row began
    std::vector<bool> expected;  // whether the row has to write here
};

// The caches, inputs and outputs of one micro-batch.
class Memory {
   public:
    // What is not written yet, and what is never to be read, is NaN.
    Memory(const PlanCase& plan, Layout layout, uint64_t seed);

    void begin_row(int64_t row);
    // Leaves every code to be drawn.
    void forget_codes();
    // The current row. Views may be changed until the next one begins.
    RowTask task();

    const PlanCase& plan;
    std::vector<Buffer> kept;     // by operation; empty where it has no caches
    std::vector<Buffer> scratch;  // by operation; empty where it has caches or comes from the row phase
    std::vector<Buffer> inputs;   // by operation: values of the row phase, or what its step phase starts from
    std::vector<View> values, starts;
    std::vector<int64_t> codes, first_codes;  // [batch][height][width]
    std::vector<float> uniforms;
    std::vector<uint8_t> known;
    DrawOptions draw{};
    int64_t row = 0;

   private:
    View row_input(int64_t op, Random& random);

    const Layout layout_;
    const uint64_t seed_;
};

}  // namespace fastvq::cpu::testing
