// Stands for kernels that the machine cannot run: they only have a name.
#include "cpu/kernels.h"

namespace fastvq::cpu {

const Kernels kAvx512Kernels = [] {
    Kernels named{};
    named.name = "avx512";
    return named;
}();

}  // namespace fastvq::cpu
