// The engine with a tracer, a module of its own for benchmarks: built with -DFASTVQ_TRACE=ON.
#include <nanobind/nanobind.h>

#include "cuda/bindings.h"

NB_MODULE(_trace, m) { bind_cuda(m); }
