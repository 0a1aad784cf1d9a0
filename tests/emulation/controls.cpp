#include "controls.h"

#include <nanobind/stl/set.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "control.h"
#include "toys.h"

namespace nb = nanobind;

void bind_controls(nb::module_& m) {
    nb::set_leak_warnings(false);
    m.attr("POLICIES") = emulation::kPolicies;
    m.def(
        "configure",
        [](uint64_t seed, int64_t switch_every, const std::set<int>& disabled, bool hide_stores, int64_t most_switches,
           const std::vector<std::string>& site_names, int multiprocessors, int64_t shared_per_block,
           int blocks_per_multiprocessor) {
            emulation::Settings settings;
            settings.seed = seed;
            settings.switch_every = switch_every;
            settings.disabled = disabled;
            settings.hide_stores = hide_stores;
            settings.most_switches = most_switches;
            settings.site_names = site_names;
            settings.multiprocessors = multiprocessors;
            settings.shared_per_block = shared_per_block;
            settings.blocks_per_multiprocessor = blocks_per_multiprocessor;
            emulation::configure(settings);
        },
        nb::kw_only(), nb::arg("seed") = 0, nb::arg("switch_every") = emulation::Settings().switch_every,
        nb::arg("disabled") = std::set<int>(), nb::arg("hide_stores") = false,
        nb::arg("most_switches") = emulation::Settings().most_switches,
        nb::arg("site_names") = std::vector<std::string>(),
        nb::arg("multiprocessors") = emulation::Settings().multiprocessors,
        nb::arg("shared_per_block") = emulation::Settings().shared_per_block,
        nb::arg("blocks_per_multiprocessor") = emulation::Settings().blocks_per_multiprocessor,
        "How launches from now on are run; what is not given is as at the start.");
    m.def("passed_sites", &emulation::passed_sites, "How often threads passed each site since the last reset.");
    m.def("reset_passed_sites", &emulation::reset_passed_sites);
    m.def("last_switches", &emulation::last_switches, "Switches between threads in the last launch.");
}

void bind_toys(nb::module_& m) {
    m.attr("TOY_THREADS") = toys::kThreads;
    m.def(
        "run_toy",
        [](const std::string& kernel, int blocks, int rounds, int64_t shared_bytes, const std::vector<float>& values,
           const std::vector<uint32_t>& fragments, int64_t size) {
            return toys::run(kernel.c_str(), blocks, rounds, shared_bytes, values, fragments, size);
        },
        nb::arg("kernel"), nb::kw_only(), nb::arg("blocks") = 1, nb::arg("rounds") = 1, nb::arg("shared_bytes") = 0,
        nb::arg("values") = std::vector<float>(), nb::arg("fragments") = std::vector<uint32_t>(), nb::arg("size") = 1,
        "What a kernel of toys.h writes, NaN where it writes nothing.");
}
