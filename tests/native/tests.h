// The tests that lie in files of their own. Each throws at the first failure.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace fastvq::cpu::testing {

void test_checksum();
void test_kernels(const Kernels& kernels);
void test_kernels_agree(const std::vector<const Kernels*>& all);
void test_draw();
void test_nearest(const Kernels& kernels);
void test_product(const Kernels& kernels);
void test_residual(const Kernels& kernels);
void test_products_agree(const std::vector<const Kernels*>& all);
void test_programs(uint64_t num_plans);
void test_places();
void test_invalid_plans();
void test_every_kind_comes_up(uint64_t num_plans);
void test_grids(const Kernels& kernels, uint64_t num_plans);

}  // namespace fastvq::cpu::testing
