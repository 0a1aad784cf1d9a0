// What the binding files share: checks of addresses and numbers that come from Python, and the tables of a plan.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/draw.h"
#include "step_spec.h"

namespace fastvq {

template <typename T>
T* pointer(const char* name, uintptr_t address, int64_t count) {
    if (count > 0 && (address == 0 || address % alignof(T) != 0)) {
        throw std::invalid_argument(std::string(name) + ": expected the address of an aligned array, got " +
                                    std::to_string(address));
    }
    return reinterpret_cast<T*>(address);
}

inline void expect(bool condition, const char* name, const char* expected) {
    if (!condition) throw std::invalid_argument(std::string(name) + ": expected " + expected);
}

inline cpu::DrawOptions draw_options(int64_t num_codes, float temperature, int64_t top_k, float top_p) {
    expect(std::isnormal(temperature) && temperature > 0.0f, "temperature", "a positive normal float32");
    expect(top_k >= 1 && top_k <= num_codes, "top_k", "1 to num_codes");
    expect(top_p > 0.0f && top_p <= 1.0f, "top_p", "a value in (0, 1]");
    return {temperature, top_k, top_p};
}

// Columns of the tables that describe operations and terms; fastvq/sampling writes them.
constexpr int64_t kOpFields = 14;
constexpr int64_t kTermFields = 5;
constexpr int64_t kTableLimit = 1 << 24;

inline std::vector<OpSpec> op_table(uintptr_t ops, int64_t num_ops) {
    expect(num_ops >= 1 && num_ops < kTableLimit, "num_ops", "1 to 2^24");
    const auto* d = pointer<const int64_t>("ops", ops, num_ops);
    std::vector<OpSpec> specs;
    for (int64_t i = 0; i < num_ops; ++i, d += kOpFields) {
        expect(d[1] >= 1 && d[1] < kTableLimit, "channels", "1 to 2^24");
        specs.push_back({static_cast<Kind>(d[0]), d[1], d[2], d[3] != 0, {d[4], d[5], d[6]}, d[7], d[8] != 0, d[9],
                         d[10], d[11], pointer<const float>("weights", d[12], d[13]), d[13]});
    }
    return specs;
}

inline std::vector<TermSpec> term_table(uintptr_t terms, int64_t num_terms) {
    expect(num_terms >= 0 && num_terms < kTableLimit, "num_terms", "0 to 2^24");
    const auto* d = pointer<const int64_t>("terms", terms, num_terms);
    std::vector<TermSpec> specs;
    for (int64_t i = 0; i < num_terms; ++i, d += kTermFields) {
        specs.push_back({d[0], d[1], d[2], pointer<const float>("weights", d[3], 1), d[4]});
    }
    return specs;
}

}  // namespace fastvq
