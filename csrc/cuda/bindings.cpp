// As in csrc/bindings.cpp, tensors come as addresses that the Python side has checked. Those in device memory cannot be
// looked into here.
#include "cuda/bindings.h"

#include <memory>
#include <string>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include "binding_helpers.h"
#include "cuda/engine.h"
#include "cuda/runtime.h"

#ifndef FASTVQ_CUDA_ARCHITECTURES
#define FASTVQ_CUDA_ARCHITECTURES ""
#endif

namespace nb = nanobind;

namespace fastvq::cuda {
namespace {

// Views come as int64 [2][num_ops][4].
static_assert(sizeof(DeviceView) == 4 * sizeof(int64_t), "a view is four numbers");

std::unique_ptr<StepEngine> make_cuda_plan(uintptr_t ops, int64_t num_ops, uintptr_t terms, int64_t num_terms,
                                           int64_t output, int64_t batch, int64_t width, int64_t positions,
                                           int64_t num_codes, int64_t key_stride, bool bf16,
                                           int64_t device, int64_t blocks, int64_t shared_limit) {
    const std::vector<OpSpec> specs = op_table(ops, num_ops);
    const std::vector<TermSpec> term_specs = term_table(terms, num_terms);
    expect(device >= 0 && device < 1 << 16, "device", "the number of a device");
    expect(blocks >= 0 && blocks < 1 << 16, "blocks", "0 to 65535");
    const StepShape shape{batch, width, positions, num_codes, key_stride};
    const EngineSettings settings{static_cast<int>(device), bf16, static_cast<int>(blocks), shared_limit};
    nb::gil_scoped_release release;
    return std::make_unique<StepEngine>(specs, term_specs, output, shape, settings);
}

void run_row(const StepEngine& engine, int64_t row, uintptr_t host_views, uintptr_t device_views, uintptr_t codes,
             int64_t code_stride, uintptr_t uniforms, int64_t uniform_stride, uintptr_t known, int64_t known_stride,
             float temperature, int64_t top_k, float top_p, uintptr_t status, uintptr_t stream) {
    const int64_t batch = engine.shape().batch, num_views = 2 * engine.num_ops();
    const auto* numbers = pointer<const int64_t>("host_views", host_views, num_views);
    std::vector<DeviceView> views;
    for (int64_t i = 0; i < num_views; ++i, numbers += 4) {
        auto* data = pointer<float>("host_views", numbers[0], numbers[0] != 0);
        views.push_back({data, numbers[1], numbers[2], numbers[3]});
    }
    RowLaunch launch{};
    launch.row = row;
    launch.host_views = views.data();
    launch.device_views = pointer<const DeviceView>("device_views", device_views, num_views);
    launch.codes = pointer<int64_t>("codes", codes, batch);
    launch.code_stride = code_stride;
    launch.uniforms = pointer<const float>("uniforms", uniforms, batch);
    launch.uniform_stride = uniform_stride;
    launch.known = pointer<const uint8_t>("known", known, batch);
    launch.known_stride = known_stride;
    launch.draw = draw_options(engine.shape().num_codes, temperature, top_k, top_p);
    launch.status = pointer<unsigned long long>("status", status, 1);
    launch.stream = reinterpret_cast<cudaStream_t>(stream);
    nb::gil_scoped_release release;
    engine.run_row(launch);
}

#if defined(FASTVQ_TRACE)

const char* name_of(Code code) {
    switch (code) {
        case Code::kChain: return "chain";
        case Code::kAffine: return "affine";
        case Code::kAttend: return "attention";
        case Code::kDraw: return "draw";
    }
    return "";
}

// A dictionary for each instruction of a block.
nb::list program_of(const StepEngine& engine, int block) {
    expect(block >= 0 && block < engine.blocks(), "block", "one of the launch");
    nb::list result;
    for (const Instr& instr : engine.program(block)) {
        nb::dict entry;
        entry["code"] = name_of(instr.code);
        entry["op"] = instr.op;
        entry["depth"] = instr.depth;
        entry["columns"] = instr.columns;
        entry["steps"] = instr.num_steps - instr.num_loads;
        entry["loads"] = instr.num_loads;
        entry["waits"] = instr.num_waits;
        entry["signals"] = instr.signal >= 0;
        entry["jobs"] = instr.last_job - instr.first_job;
        result.append(entry);
    }
    return result;
}

void set_trace(StepEngine& engine, uintptr_t times, int64_t count) {
    const int64_t wanted = engine.blocks() * engine.shape().width * engine.instructions() * kMarks;
    expect(times == 0 || count == wanted, "count", std::to_string(wanted).c_str());
    engine.set_trace(pointer<int64_t>("times", times, 0));
}

#endif

nb::dict cuda_info() {
    nb::dict info;
#if defined(CUDART_VERSION)
    info["compiled"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
    info["compiled"] = "emulated";
#endif
    info["architectures"] = FASTVQ_CUDA_ARCHITECTURES;
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    info["device_count"] = error == cudaSuccess ? count : 0;
    if (error == cudaSuccess) {
        info["error"] = nb::none();
    } else {
        info["error"] = std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error);
    }
    return info;
}

}  // namespace
}  // namespace fastvq::cuda

void bind_cuda(nb::module_& m) {
    using namespace fastvq::cuda;
    nb::class_<StepEngine>(m, "CudaPlan")
#if defined(FASTVQ_TRACE)
        .def("program", &program_of, nb::arg("block"), "The instructions of a block, a dictionary each.")
        .def("set_trace", &set_trace, nb::arg("times"), nb::arg("count"),
             "Where rows note times, int64 [blocks][width][instructions][5] by address; 0 for nowhere.")
#endif
        .def_prop_ro("weight_bytes", &StepEngine::weight_bytes)
        .def_prop_ro("stationary_bytes", &StepEngine::stationary_bytes)
        .def_prop_ro("blocks", &StepEngine::blocks)
        .def_prop_ro("threads", [](const StepEngine&) { return kThreads; })
        .def_prop_ro("instructions", &StepEngine::instructions)
        .def_prop_ro("waits", &StepEngine::waits)
        .def_prop_ro("shared_bytes", &StepEngine::shared_bytes)
        .def("run_row", &run_row, nb::arg("row"), nb::arg("host_views"), nb::arg("device_views"), nb::arg("codes"),
             nb::arg("code_stride"), nb::arg("uniforms"), nb::arg("uniform_stride"), nb::arg("known"),
             nb::arg("known_stride"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("status"),
             nb::arg("stream"),
             "Enqueues a row; arrays by address, views int64 [2][ops][4]: data, strides of samples and columns, mask.");
    m.def("make_cuda_plan", &make_cuda_plan, nb::arg("ops"), nb::arg("num_ops"), nb::arg("terms"), nb::arg("num_terms"),
          nb::arg("output"), nb::arg("batch"), nb::arg("width"), nb::arg("positions"), nb::arg("num_codes"),
          nb::arg("key_stride"), nb::arg("bf16"), nb::arg("device"), nb::arg("blocks"),
          nb::arg("shared_limit"), "Packs the weights of a plan's step phase for a GPU; tables by address.");
    m.def("cuda_info", &cuda_info, "Version and architectures compiled for, and the devices, or why there are none.");
}
