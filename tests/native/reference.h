// What the engine computes, in scalar double precision, with bounds for the error that float32 allows.
#pragma once

#include <cstdint>
#include <vector>

#include "plan_case.h"

namespace fastvq::cpu::testing {

struct Expected {
    double value;
    double tolerance;  // 0: the same float
};

// Exponentials of the engine are good to about 2 units in the last place.
Expected elu(double x);
Expected relu(double x);
Expected glu(double a, double b);
Expected gated_tanh(double a, double b);

// One head. Keys and values are [count][width].
std::vector<Expected> attention(const std::vector<double>& query, const std::vector<double>& keys,
                                const std::vector<double>& values, int64_t count);

// A NaN is expected where the value is one.
void expect_close(float actual, const Expected& expected, const char* what);

// Checks what the step phase of a row has left in memory: every result of every operation from the inputs it found,
// every code, and that nothing else was written.
void check_row(Memory& memory);

// a * b + sum, rounded once or, not fused, twice.
float multiply_add(float a, float b, float sum, bool fused);
// What is left of a weight in bfloat16.
float upper_half(float x);

}  // namespace fastvq::cpu::testing
