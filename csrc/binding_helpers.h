// What the binding files share: checks of addresses and numbers that come from Python, and the tables of a plan.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/draw.h"
#include "plan_spec.h"

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

constexpr int64_t kTableLimit = 1 << 24;

// Operations and terms as the Python side has written them.
inline std::vector<OpSpec> op_table(uintptr_t ops, int64_t num_ops) {
    expect(num_ops >= 1 && num_ops < kTableLimit, "num_ops", "1 to 2^24");
    const auto* data = pointer<const OpSpec>("ops", ops, num_ops);
    std::vector<OpSpec> specs(data, data + num_ops);
    for (const OpSpec& op : specs) {
        expect(op.channels >= 1 && op.channels < kTableLimit, "channels", "1 to 2^24");
        pointer<const float>("weights", reinterpret_cast<uintptr_t>(op.weights), op.num_weights);
        pointer<const float>("bias", reinterpret_cast<uintptr_t>(op.bias), op.bias != nullptr);
    }
    return specs;
}

inline std::vector<TermSpec> term_table(uintptr_t terms, int64_t num_terms) {
    expect(num_terms >= 0 && num_terms < kTableLimit, "num_terms", "0 to 2^24");
    const auto* data = pointer<const TermSpec>("terms", terms, num_terms);
    std::vector<TermSpec> specs(data, data + num_terms);
    for (const TermSpec& term : specs) {
        pointer<const float>("weights", reinterpret_cast<uintptr_t>(term.weights), term.num_weights);
    }
    return specs;
}

}  // namespace fastvq
