// Kernels of one instruction set. Included by one source file per instruction set, each of which defines FASTVQ_LANES,
// FASTVQ_ROWS (rows of a register tile), FASTVQ_KERNELS and FASTVQ_NAME (the table's variable and name).
#include <cstring>

#include "cpu/attend_impl.h"
#include "cpu/elementwise_impl.h"
#include "cpu/kernels.h"
#include "cpu/nearest_impl.h"
#include "cpu/product_impl.h"
#include "cpu/vectors.h"

namespace fastvq::cpu {

extern const Kernels FASTVQ_KERNELS;
const Kernels FASTVQ_KERNELS = {FASTVQ_NAME, apply_elu,  apply_elu_negated, apply_relu,      apply_add,
                                apply_glu,   apply_tanh, attend,            kNearestKernels, kProductKernels};

}  // namespace fastvq::cpu
