// The controls of control.h, and the kernels of toys.h, for Python.
#pragma once

#include <nanobind/nanobind.h>

void bind_controls(nanobind::module_& m);
void bind_toys(nanobind::module_& m);
