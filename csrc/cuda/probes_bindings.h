// Bindings of the probes; see probes.h.
#pragma once

#include <nanobind/nanobind.h>

void bind_probes(nanobind::module_& m);
