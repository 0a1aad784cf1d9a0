#pragma once

#include <cstdint>
#include <cstring>

namespace fastvq::cpu {

// Without a branch, which the compiler turns into vectors.
inline bool all_finite(const float* x, int64_t n) {
    uint32_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        found |= (bits & 0x7F800000u) == 0x7F800000u;
    }
    return found == 0;
}

}  // namespace fastvq::cpu
