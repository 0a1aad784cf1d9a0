#define FASTVQ_LANES 8
#define FASTVQ_ROWS 6
#define FASTVQ_KERNELS kAvx2Kernels
#define FASTVQ_NAME "avx2"
#include "cpu/kernels_impl.h"
