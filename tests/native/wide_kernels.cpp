// The kernels on vectors as wide as those of AVX-512, of two registers each: their bits can be compared where there is
// only AVX2.
#define FASTVQ_LANES 16
#define FASTVQ_ROWS 6
#define FASTVQ_KERNELS kWideKernels
#define FASTVQ_NAME "avx2 on 16 lanes"
#include "cpu/kernels_impl.h"
