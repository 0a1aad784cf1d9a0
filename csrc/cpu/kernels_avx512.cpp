#define FASTVQ_LANES 16
#define FASTVQ_ROWS 12
#define FASTVQ_KERNELS kAvx512Kernels
#define FASTVQ_NAME "avx512"
#include "cpu/kernels_impl.h"
