// The emulation under the sanitizers: kernels that are right, and kernels of which a sanitizer has to find the fault.
//
//     toys_test            runs those that are right, under every policy
//     toys_test race       a barrier is missing: for ThreadSanitizer
//     toys_test overrun    writes behind shared memory: for AddressSanitizer
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "control.h"
#include "emulation.h"
#include "toys.h"

namespace {

std::vector<float> numbers(int count) {
    std::vector<float> values(count);
    for (int i = 0; i < count; ++i) values[i] = static_cast<float>(i);
    return values;
}

void expect(bool condition, const char* what) {
    if (!condition) throw std::runtime_error(what);
}

void check_ring() {
    const auto in = numbers(3 * toys::kThreads);
    const auto out = toys::run("ring", 3, 5, toys::kThreads * 4, in, {}, 3 * toys::kThreads);
    for (int i = 0; i < 3 * toys::kThreads; ++i) {
        expect(out[i] == in[i / toys::kThreads * toys::kThreads + (i + 5) % toys::kThreads], "ring: wrong neighbour");
    }
}

void check_chain() {
    const auto in = numbers(toys::kThreads);
    const auto out = toys::run("chain", 4, 3, 0, in, {}, 4 * 3 * toys::kThreads);
    for (int i = 0; i < 4 * 3 * toys::kThreads; ++i) {
        const int block = i / (3 * toys::kThreads);
        expect(out[i] == in[i % toys::kThreads] + static_cast<float>(block + 1), "chain: wrong number");
    }
}

[[maybe_unused]] void check_error(const char* kernel, int blocks, const char* message) {
    try {
        toys::run(kernel, blocks, 1, 0, {}, {}, 1);
    } catch (const emulation::Error& error) {
        expect(std::strstr(error.what(), message) != nullptr, error.what());
        return;
    }
    throw std::runtime_error(std::string(kernel) + ": no error");
}

}  // namespace

int main(int argc, char** argv) {
    try {
        emulation::Settings settings;
        const std::string what = argc > 1 ? argv[1] : "";
        if (what == "race") {
            settings.disabled = {toys::kRead};
            emulation::configure(settings);
            check_ring();
        } else if (what == "overrun") {
            toys::run("shared", 1, 1, 64, {}, {}, 16);
        } else {
            for (int seed = 0; seed < 3 * emulation::kPolicies; ++seed) {
                settings.seed = static_cast<uint64_t>(seed);
                emulation::configure(settings);
                check_ring();
                check_chain();
#if !defined(EMULATION_TSAN)  // hidden stores and errors pass between fibers unseen
                settings.hide_stores = true;
                emulation::configure(settings);
                settings.hide_stores = false;
                check_chain();
                check_error("deadlock", 2, "deadlock, no thread can go on: block 0: 1 thread waiting at site 2");
                check_error("split", 1, "meet at different places");
                check_error("leave", 1, " the kernel");
#endif
            }
        }
    } catch (const std::exception& error) {
        std::printf("FAILED: %s\n", error.what());
        return 1;
    }
    std::printf("passed\n");
    return 0;
}
