#define FASTVQ_LANES 4
#define FASTVQ_ROWS 6
#define FASTVQ_KERNELS kBaselineKernels
#define FASTVQ_NAME "baseline"
#include "cpu/kernels_impl.h"
