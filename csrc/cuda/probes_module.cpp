// A module of its own, for benchmarks: built with -DFASTVQ_PROBES=ON.
#include <cstdint>

#include <nanobind/nanobind.h>

#include "cuda/probes.h"

namespace nb = nanobind;

NB_MODULE(_probes, m) {
    m.def(
        "barrier",
        [](int blocks, int64_t rounds, int device) {
            nb::gil_scoped_release release;
            return fastvq::cuda::barrier_microseconds(blocks, rounds, device);
        },
        nb::arg("blocks"), nb::arg("rounds"), nb::arg("device"),
        "Microseconds that all blocks of a launch take to meet; 0 blocks: one for each multiprocessor.");
    m.def(
        "flag_hop",
        [](int64_t rounds, int device) {
            nb::gil_scoped_release release;
            return fastvq::cuda::flag_hop_microseconds(rounds, device);
        },
        nb::arg("rounds"), nb::arg("device"), "Microseconds from a block raising a counter to another having seen it.");
    m.def(
        "launch",
        [](int64_t count, int device) {
            fastvq::cuda::LaunchGap gap{};
            {
                nb::gil_scoped_release release;
                gap = fastvq::cuda::launch_microseconds(count, device);
            }
            return nb::make_tuple(gap.plain, gap.graph);
        },
        nb::arg("count"), nb::arg("device"),
        "Microseconds from one empty kernel to the next, on a stream and inside a graph.");
}
