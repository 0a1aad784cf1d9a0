// Tests of the engines without Python. Usage: native_test NUMBER_OF_RANDOM_PLANS
#include <exception>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "tests.h"

namespace fastvq::cpu {
#ifdef FASTVQ_X86_KERNELS
extern const Kernels kWideKernels;
#endif
}  // namespace fastvq::cpu

namespace fastvq::cpu::testing {
namespace {

std::vector<const Kernels*> kernels_here() {
    std::vector<const Kernels*> found;
    for (const char* name : {"avx512", "avx2", "baseline"}) {
        if (const Kernels* kernels = find_kernels(name)) found.push_back(kernels);
    }
    return found;
}

// With one for comparison that no engine uses.
std::vector<const Kernels*> kernels_to_compare() {
    std::vector<const Kernels*> found = kernels_here();
#ifdef FASTVQ_X86_KERNELS
    if (find_kernels("avx2") != nullptr) found.push_back(&kWideKernels);
#endif
    return found;
}

int run(uint64_t num_plans) {
    int failures = 0;
    const auto test = [&](const std::string& what, const std::function<void()>& body) {
        try {
            body();
        } catch (const std::exception& error) {
            std::cerr << "FAILED: " << what << ": " << error.what() << std::endl;
            ++failures;
        }
    };
    test("cases", [&] { test_every_kind_comes_up(num_plans); });
    test("checksum", test_checksum);
    test("draw", test_draw);
    test("places", test_places);
    test("invalid plans", test_invalid_plans);
    test("kernels of all instruction sets", [] { test_kernels_agree(kernels_to_compare()); });
    test("products of all instruction sets", [] { test_products_agree(kernels_to_compare()); });
    test("programs of the CUDA engine", [&] { test_programs(num_plans); });
    for (const Kernels* kernels : kernels_here()) {
        const std::string on = std::string(" on ") + kernels->name;
        test("kernels" + on, [&] { test_kernels(*kernels); });
        test("nearest codes" + on, [&] { test_nearest(*kernels); });
        test("products" + on, [&] { test_product(*kernels); });
        test("residual codes" + on, [&] { test_residual(*kernels); });
        test("grids" + on, [&] { test_grids(*kernels, num_plans); });
        std::cout << "tested on " << kernels->name << std::endl;
    }
    return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastvq::cpu::testing

int main(int argc, char** argv) {
    if (argc != 2) {
        std::cerr << "usage: " << argv[0] << " NUMBER_OF_RANDOM_PLANS" << std::endl;
        return 2;
    }
    return fastvq::cpu::testing::run(std::stoull(argv[1]));
}
