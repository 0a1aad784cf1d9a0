// Failures of a test, and random numbers that are the same with every standard library.
#pragma once

#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace fastvq::cpu::testing {

// The parts of the message are put together only when the condition does not hold.
template <class... Parts>
void expect(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream message;
    message.precision(9);
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class Call>
void expect_refused(const char* what, const Call& call) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return;
    }
    expect(false, "accepted: ", what);
}

class Random {
   public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u) {}

    uint64_t next() {  // splitmix64
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }

    int64_t below(int64_t count) { return static_cast<int64_t>(next() % static_cast<uint64_t>(count)); }
    bool chance(int percent) { return below(100) < percent; }
    float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }  // [0, 1)
    float symmetric(float bound) { return (2.0f * uniform() - 1.0f) * bound; }

    template <class T>
    T pick(const std::vector<T>& from) {
        return from[below(static_cast<int64_t>(from.size()))];
    }

   private:
    uint64_t state_;
};

}  // namespace fastvq::cpu::testing
