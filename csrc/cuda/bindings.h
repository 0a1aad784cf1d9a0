// Bindings of the CUDA engine; see engine.h.
#pragma once

#include <nanobind/nanobind.h>

void bind_cuda(nanobind::module_& m);
