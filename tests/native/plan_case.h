// Plans to test with, and for their step phase the memory that it works on, laid out as the Python side does it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/draw.h"
#include "plan_spec.h"

namespace fastvq::cpu::testing {

// A plan in the tables that engines take, with the weights that they point to.
struct PlanCase {
    std::vector<OpSpec> ops;
    std::vector<TermSpec> terms;
    std::vector<std::vector<float>> weights;
    // By operation: how many columns left of the current one steps read (-1: none), and whether attention reads it as
    // values.
    std::vector<int64_t> left;
    std::vector<bool> is_value;
    int64_t output = 0, height = 0;
    int64_t right = 0;  // columns to the right that are read in rows above
    StepShape shape{};
    bool bf16 = false;

    PlanCase() = default;
    PlanCase(PlanCase&&) = default;
    PlanCase(const PlanCase&) = delete;  // its tables point into itself

    bool attends() const;
    int64_t num_ops() const { return static_cast<int64_t>(ops.size()); }
};

// A plan of random blocks, with parts above the steps: every kind of operation comes up within a few seeds.
PlanCase random_plan(uint64_t seed);

// A plan with every kind of operation.
PlanCase rich_plan();

// A plan of one lookup, one product of columns to the left, and logits: no part above, and steps that cost next to
// nothing.
PlanCase tiny_plan(int64_t height, int64_t width);

// Where an operation's vectors lie: sample b, column c at data + b * batch_stride + c * column_stride.
struct View {
    float* data;
    int64_t batch_stride;
    int64_t column_stride;
};

// Floats in an allocation of exactly their size.
struct Buffer {
    std::vector<float> data;
    std::vector<float> before;   // data when the row began
    std::vector<bool> expected;  // whether the row has to write here
};

// The caches, inputs and outputs of one micro-batch of the step phase.
class Memory {
   public:
    // What is not written yet, and what is never to be read, is NaN.
    Memory(const PlanCase& plan, uint64_t seed);

    void begin_row(int64_t row);

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

    const uint64_t seed_;
};

}  // namespace fastvq::cpu::testing
