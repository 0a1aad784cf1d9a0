// The tests that lie in files of their own. Each throws at the first failure.
#pragma once

#include "cpu/kernels.h"

namespace fastvq::cpu::testing {

void test_kernels(const Kernels& kernels);
void test_draw();
void test_nearest(const Kernels& kernels);

}  // namespace fastvq::cpu::testing
