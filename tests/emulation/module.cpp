// The CUDA engine's bindings on the emulated device, with the controls of the latter.
#include <nanobind/nanobind.h>

#include "control.h"
#include "controls.h"
#include "cuda/bindings.h"
#include "cuda/step_kernel.h"

NB_MODULE(fastvq_emulated, m) {
    emulation::register_kernel<fastvq::cuda::StepArgs>(fastvq::cuda::step_kernel());
    bind_controls(m);
    bind_toys(m);
    bind_cuda(m);
}
