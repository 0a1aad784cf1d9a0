// Python bindings. Only binding files know nanobind. Tensors come as addresses; the Python side has checked dtype, device
// and layout, and what is checked here keeps a mistake there from reading or writing wild memory.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "binding_helpers.h"
#include "cpu/checksum.h"
#include "cpu/draw.h"
#include "cpu/elementwise.h"
#include "cpu/ema.h"
#include "cpu/kernels.h"
#include "cpu/nearest.h"
#include "cpu/product.h"
#include "cpu/shared_pool.h"
#include "cpu/step_plan.h"

#if defined(FASTVQ_WITH_CUDA)
#include "cuda/bindings.h"
#endif

namespace nb = nanobind;

namespace {

using fastvq::draw_options;
using fastvq::expect;
using fastvq::pointer;

// Raised together with the number in fastvq/_engine.py when a signature changes.
constexpr int kInterface = 8;

int64_t draw(uintptr_t logits, uintptr_t uniforms, uintptr_t tokens, int64_t rows, int64_t num_codes,
             float temperature, int64_t top_k, float top_p) {
    constexpr int64_t kMaxCodes = std::numeric_limits<int32_t>::max();
    expect(num_codes >= 1 && num_codes <= kMaxCodes, "num_codes", "1 to 2^31 - 1");
    expect(rows >= 0 && rows <= std::numeric_limits<int64_t>::max() / 8 / num_codes, "rows",
           "a count of rows that fits in memory");
    const auto options = draw_options(num_codes, temperature, top_k, top_p);
    const auto* logit_data = pointer<const float>("logits", logits, rows);
    const auto* uniform_data = pointer<const float>("uniforms", uniforms, rows);
    auto* token_data = pointer<int64_t>("tokens", tokens, rows);
    if (rows == 0) return -1;
    nb::gil_scoped_release release;
    fastvq::cpu::DrawScratch scratch(num_codes);
    return fastvq::cpu::draw_rows(logit_data, uniform_data, rows, num_codes, options, scratch,
                                  token_data);
}

const fastvq::cpu::Kernels& kernels_named(const std::string& name) {
    const auto* found = fastvq::cpu::find_kernels(name.c_str());
    expect(found != nullptr, "kernels", "auto, or avx512, avx2 or baseline where the processor has it");
    return *found;
}

void nearest_codes(uintptr_t x, int64_t element, int64_t rows, int64_t stride, int64_t depth, uintptr_t codebook,
                   int64_t num_codes, uintptr_t indices, uintptr_t mask, uintptr_t counts, uintptr_t sums,
                   uintptr_t squared_error, int64_t threads, const std::string& kernels) {
    using fastvq::cpu::Element;
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
    expect(num_codes >= 1 && num_codes <= kMost, "num_codes", "1 to 2^30");
    expect(depth >= 1 && depth <= kMost, "depth", "1 to 2^30");
    expect(rows >= 0, "rows", "a count");
    expect(stride >= 0, "stride", "0 or more elements");
    expect(element >= 0 && element <= 2, "element", "0 (float32), 1 (bfloat16) or 2 (float16)");
    expect(threads >= 1 && threads <= 1024, "threads", "1 to 1024");
    fastvq::cpu::NearestTask task{};
    task.element = static_cast<Element>(element);
    task.x = task.element == Element::kFloat32 ? static_cast<const void*>(pointer<const float>("x", x, rows))
                                               : static_cast<const void*>(pointer<const uint16_t>("x", x, rows));
    task.rows = rows;
    task.stride = stride;
    task.depth = depth;
    task.codebook = pointer<const float>("codebook", codebook, num_codes);
    task.num_codes = num_codes;
    task.indices = pointer<int64_t>("indices", indices, rows);
    if (counts != 0) {
        task.mask = pointer<const uint8_t>("mask", mask, 0);
        task.counts = pointer<int64_t>("counts", counts, num_codes);
        task.sums = pointer<float>("sums", sums, num_codes);
        task.squared_error = pointer<float>("squared_error", squared_error, 1);
    }
    const auto& found = kernels_named(kernels);
    nb::gil_scoped_release release;
    fastvq::cpu::nearest_codes(task, threads, found);
}

void ema_update(uintptr_t counts, bool whole_counts, uintptr_t sums, int64_t num_codes, int64_t depth,
                uintptr_t cluster_size, uintptr_t embedding_sum, uintptr_t embedding, double decay, double eps,
                bool skip_unusable, int64_t threads) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
    expect(num_codes >= 0 && num_codes <= kMost, "num_codes", "0 to 2^30");
    expect(depth >= 0 && depth <= kMost, "depth", "0 to 2^30");
    expect(decay >= 0.0 && decay <= 1.0, "decay", "0 to 1");
    expect(eps > 0.0 && std::isfinite(eps), "eps", "a positive number");
    expect(threads >= 1 && threads <= 1024, "threads", "1 to 1024");
    const int64_t size = num_codes * depth;
    fastvq::cpu::EmaTask task{};
    if (whole_counts) {
        task.counts = pointer<const int64_t>("counts", counts, num_codes);
    } else {
        task.float_counts = pointer<const float>("counts", counts, num_codes);
    }
    task.sums = pointer<const float>("sums", sums, size);
    task.num_codes = num_codes;
    task.depth = depth;
    task.cluster_size = pointer<float>("cluster_size", cluster_size, num_codes);
    task.embedding_sum = pointer<float>("embedding_sum", embedding_sum, size);
    task.embedding = pointer<float>("embedding", embedding, size);
    task.decay = decay;
    task.eps = eps;
    task.skip_unusable = skip_unusable;
    nb::gil_scoped_release release;
    fastvq::cpu::ema_update(task, threads);
}

uint64_t checksum(uintptr_t blocks, int64_t count) {
    expect(count >= 0 && count < fastvq::kTableLimit, "count", "0 to 2^24");
    const auto* data = pointer<const int64_t>("blocks", blocks, count);
    std::vector<fastvq::cpu::Bytes> list;
    for (int64_t i = 0; i < count; ++i, data += 2) {
        expect(data[1] >= 0, "bytes", "a count");
        list.push_back({pointer<const unsigned char>("block", data[0], data[1]), data[1]});
    }
    nb::gil_scoped_release release;
    return fastvq::cpu::checksum(list.data(), count);
}

std::unique_ptr<fastvq::cpu::PackedProduct> make_product(uintptr_t weights, int64_t depth, int64_t columns,
                                                         const std::string& kernels) {
    expect(depth >= 1 && depth < fastvq::kTableLimit, "depth", "1 to 2^24");
    expect(columns >= 1 && columns < fastvq::kTableLimit, "columns", "1 to 2^24");
    const auto* data = pointer<const float>("weights", weights, depth);
    const auto& found = kernels_named(kernels);
    nb::gil_scoped_release release;
    return std::make_unique<fastvq::cpu::PackedProduct>(data, depth, columns, found);
}

// Address, strides of samples, positions and runs, number of runs, and their length.
constexpr size_t kInputFields = 6;

void run_product(const fastvq::cpu::PackedProduct& product, int64_t samples, int64_t width,
                 const std::vector<int64_t>& inputs, uintptr_t start, int64_t start_sample_stride,
                 int64_t start_position_stride, uintptr_t out, int64_t out_sample_stride, int64_t out_position_stride,
                 int64_t threads) {
    expect(samples >= 0 && samples < fastvq::kTableLimit, "samples", "0 to 2^24");
    expect(width >= 1 && width < fastvq::kTableLimit, "width", "1 to 2^24");
    expect(threads >= 1 && threads <= 1024, "threads", "1 to 1024");
    const int64_t columns = product.columns();
    const auto nested = [&](int64_t inner, int64_t inner_stride, int64_t outer, int64_t outer_stride) {
        return (inner <= 1 || inner_stride >= columns) &&
               (outer <= 1 || outer_stride >= std::max<int64_t>(inner - 1, 0) * inner_stride + columns);
    };
    expect(nested(width, out_position_stride, samples, out_sample_stride) ||
               nested(samples, out_sample_stride, width, out_position_stride),
           "out", "rows that do not overlap");
    fastvq::cpu::ProductTask task{};
    task.samples = samples;
    task.width = width;
    task.start = {pointer<const float>("start", start, start != 0), start_sample_stride, start_position_stride};
    task.out = {pointer<float>("out", out, samples), out_sample_stride, out_position_stride};
    expect(inputs.size() % kInputFields == 0, "inputs", "6 numbers each");
    int64_t depth = 0;
    for (auto field = inputs.begin(); field != inputs.end(); field += kInputFields) {
        const auto* data = pointer<const float>("input", field[0], samples);
        expect(field[4] >= 1 && field[4] <= product.depth(), "runs", "1 to depth");
        expect(field[5] >= 1 && field[5] <= product.depth(), "length", "1 to depth");
        for (int64_t run = 0; run < field[4] && samples > 0; ++run) {
            task.runs.push_back({{data + run * field[3], field[1], field[2]}, field[5]});
        }
        depth += field[4] * field[5];
    }
    expect(depth == product.depth(), "inputs", "runs that make up the depth");
    nb::gil_scoped_release release;
    product.run(task, threads);
}

void elementwise(const std::string& kind, uintptr_t first, int64_t first_stride, uintptr_t second,
                 int64_t second_stride, uintptr_t out, int64_t out_stride, int64_t rows, int64_t channels,
                 int64_t threads, const std::string& kernels) {
    const auto function = fastvq::cpu::function_named(kind, kernels_named(kernels));
    expect(function.unary != nullptr || function.binary != nullptr, "kind", "elu, elu_negated, relu, add, glu or tanh");
    expect(rows >= 0 && rows < fastvq::kTableLimit, "rows", "0 to 2^24");
    expect(channels >= 1 && channels < fastvq::kTableLimit, "channels", "1 to 2^24");
    expect(rows <= 1 || out_stride >= channels, "out", "rows that do not overlap");
    expect(threads >= 1 && threads <= 1024, "threads", "1 to 1024");
    if (rows == 0) return;
    fastvq::cpu::ElementwiseTask task{};
    task.first = pointer<const float>("first", first, rows);
    task.first_stride = first_stride;
    if (function.binary != nullptr) task.second = pointer<const float>("second", second, rows);
    task.second_stride = second_stride;
    task.out = pointer<float>("out", out, rows);
    task.out_stride = out_stride;
    task.rows = rows;
    task.channels = channels;
    nb::gil_scoped_release release;
    fastvq::cpu::elementwise(task, function, threads);
}

constexpr int64_t kViewFields = 3;

std::unique_ptr<fastvq::cpu::StepPlan> make_step_plan(uintptr_t ops, int64_t num_ops, uintptr_t terms,
                                                      int64_t num_terms, int64_t output, int64_t batch, int64_t width,
                                                      int64_t positions, int64_t num_codes, int64_t key_stride,
                                                      bool bf16, int64_t threads, const std::string& kernels) {
    using namespace fastvq::cpu;
    std::vector<fastvq::OpSpec> op_specs = fastvq::op_table(ops, num_ops);
    std::vector<fastvq::TermSpec> term_specs = fastvq::term_table(terms, num_terms);
    const Kernels& found = kernels_named(kernels);
    const fastvq::StepShape shape{batch, width, positions, num_codes, key_stride};
    nb::gil_scoped_release release;
    return std::make_unique<StepPlan>(std::move(op_specs), std::move(term_specs), output, shape, bf16,
                                      threads, found);
}

std::vector<fastvq::cpu::View> views(const char* name, uintptr_t address, int64_t count) {
    const auto* data = pointer<const int64_t>(name, address, count);
    std::vector<fastvq::cpu::View> result;
    for (int64_t i = 0; i < count; ++i, data += kViewFields) {
        result.push_back({pointer<float>(name, data[0], data[0] != 0), data[1], data[2]});
    }
    return result;
}

int64_t run_row(const fastvq::cpu::StepPlan& plan, int64_t row, uintptr_t values, uintptr_t starts, uintptr_t codes,
                int64_t code_stride, uintptr_t uniforms, int64_t uniform_stride, uintptr_t known, int64_t known_stride,
                float temperature, int64_t top_k, float top_p) {
    using namespace fastvq::cpu;
    const fastvq::StepShape& shape = plan.shape();
    expect(row >= 0 && row < shape.positions / shape.width, "row", "a row of the grid");
    const std::vector<View> value_views = views("values", values, plan.num_ops());
    const std::vector<View> start_views = views("starts", starts, plan.num_ops());
    plan.check_views(value_views.data(), start_views.data());
    RowTask task{};
    task.row = row;
    task.values = value_views.data();
    task.starts = start_views.data();
    task.codes = pointer<int64_t>("codes", codes, shape.batch);
    task.code_stride = code_stride;
    task.uniforms = pointer<const float>("uniforms", uniforms, shape.batch);
    task.uniform_stride = uniform_stride;
    task.known = pointer<const uint8_t>("known", known, shape.batch);
    task.known_stride = known_stride;
    for (int64_t b = 0; b < shape.batch; ++b) {
        for (int64_t c = 0; c < shape.width; ++c) {
            const int64_t code = task.codes[b * code_stride + c];
            expect(task.known[b * known_stride + c] == 0 || (code >= 0 && code < shape.num_codes), "codes",
                   "known codes of 0 to num_codes - 1");
        }
    }
    task.draw = draw_options(shape.num_codes, temperature, top_k, top_p);
    task.keep_going = [](void*) {
        nb::gil_scoped_acquire acquire;
        return PyErr_CheckSignals() == 0;
    };
    int64_t bad = -1;
    Outcome outcome;
    {
        nb::gil_scoped_release release;
        outcome = plan.run_row(task, &bad);
    }
    if (outcome == Outcome::kStopped) throw nb::python_error();
    return outcome == Outcome::kNotDrawable ? bad : -1;
}

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    return "msvc " + std::to_string(_MSC_FULL_VER);
#else
    return "unknown";
#endif
}

// Instruction sets that this processor and operating system offer and engines may choose from.
nb::list instruction_sets() {
    nb::list names;
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2")) names.append("sse4.2");
    if (__builtin_cpu_supports("avx")) names.append("avx");
    if (__builtin_cpu_supports("avx2")) names.append("avx2");
    if (__builtin_cpu_supports("fma")) names.append("fma");
    if (__builtin_cpu_supports("avx512f")) names.append("avx512f");
    if (__builtin_cpu_supports("avx512bw")) names.append("avx512bw");
    if (__builtin_cpu_supports("avx512vnni")) names.append("avx512vnni");
    if (__builtin_cpu_supports("avx512bf16")) names.append("avx512bf16");
#elif defined(__aarch64__) || defined(_M_ARM64)
    names.append("neon");
#endif
    return names;
}

nb::dict build_info() {
    nb::dict info;
    info["compiler"] = compiler();
    info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
    info["instruction_sets"] = instruction_sets();
    info["thread_pool"] = fastvq::cpu::loaded_pool_path();
    return info;
}

}  // namespace

NB_MODULE(_ext, m) {
    // Plans live as long as the priors they were made for, often to the end of the process. That is no leak.
    nb::set_leak_warnings(false);
    m.attr("INTERFACE") = kInterface;
#if defined(FASTVQ_WITH_CUDA)
    m.attr("CUDA") = true;
    bind_cuda(m);
#else
    m.attr("CUDA") = false;
#endif
    m.def("draw", &draw, nb::arg("logits"), nb::arg("uniforms"), nb::arg("tokens"), nb::arg("rows"),
          nb::arg("num_codes"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"),
          "Inverse-CDF draw; arrays by address. Returns -1, or the first row that cannot be drawn.");
    m.def("nearest_codes", &nearest_codes, nb::arg("x"), nb::arg("element"), nb::arg("rows"), nb::arg("stride"),
          nb::arg("depth"), nb::arg("codebook"), nb::arg("num_codes"), nb::arg("indices"), nb::arg("mask"),
          nb::arg("counts"), nb::arg("sums"), nb::arg("squared_error"), nb::arg("threads"), nb::arg("kernels"),
          "Nearest codes, and statistics unless counts is 0; arrays by address.");
    m.def("ema_update", &ema_update, nb::arg("counts"), nb::arg("whole_counts"), nb::arg("sums"), nb::arg("num_codes"),
          nb::arg("depth"), nb::arg("cluster_size"), nb::arg("embedding_sum"), nb::arg("embedding"), nb::arg("decay"),
          nb::arg("eps"), nb::arg("skip_unusable"), nb::arg("threads"),
          "Moving averages of a codebook and its codes, in place; arrays by address, counts int64 or float.");
    m.def("checksum", &checksum, nb::arg("blocks"), nb::arg("count"),
          "Position-dependent checksum of memory; a table of addresses and bytes by address.");
    nb::class_<fastvq::cpu::PackedProduct>(m, "PackedProduct")
        .def_prop_ro("weight_bytes", &fastvq::cpu::PackedProduct::weight_bytes)
        .def_prop_ro("fused", &fastvq::cpu::PackedProduct::fused)
        .def("run", &run_product, nb::arg("samples"), nb::arg("width"), nb::arg("inputs"), nb::arg("start"),
             nb::arg("start_sample_stride"), nb::arg("start_position_stride"), nb::arg("out"),
             nb::arg("out_sample_stride"), nb::arg("out_position_stride"), nb::arg("threads"),
             "start + rows of the inputs @ weights, for every position of the samples; arrays by address.");
    m.def("make_product", &make_product, nb::arg("weights"), nb::arg("depth"), nb::arg("columns"), nb::arg("kernels"),
          "Packs the right side of products that are summed in a fixed order; arrays by address.");
    m.def("elementwise", &elementwise, nb::arg("kind"), nb::arg("first"), nb::arg("first_stride"), nb::arg("second"),
          nb::arg("second_stride"), nb::arg("out"), nb::arg("out_stride"), nb::arg("rows"), nb::arg("channels"),
          nb::arg("threads"), nb::arg("kernels"),
          "A function of one element, or of two, over rows; arrays by address, 0 for a second one that is not read.");
    nb::class_<fastvq::cpu::StepPlan>(m, "StepPlan")
        .def_prop_ro("weight_bytes", &fastvq::cpu::StepPlan::weight_bytes)
        .def_prop_ro("kernels", &fastvq::cpu::StepPlan::kernels_name)
        .def("run_row", &run_row, nb::arg("row"), nb::arg("values"), nb::arg("starts"), nb::arg("codes"),
             nb::arg("code_stride"), nb::arg("uniforms"), nb::arg("uniform_stride"), nb::arg("known"),
             nb::arg("known_stride"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"),
             "Fills a row; arrays by address. Returns -1, or sample * width + column of logits that are not finite.");
    m.def("make_step_plan", &make_step_plan, nb::arg("ops"), nb::arg("num_ops"), nb::arg("terms"),
          nb::arg("num_terms"), nb::arg("output"), nb::arg("batch"), nb::arg("width"), nb::arg("positions"),
          nb::arg("num_codes"), nb::arg("key_stride"), nb::arg("bf16"), nb::arg("threads"), nb::arg("kernels"),
          "Packs the weights of a plan's step phase; tables by address.");
    m.def("leave_thread_pool", &fastvq::cpu::leave_loaded_pool,
          "From now on work runs on threads of its own, not on those of the framework.");
    m.def("build_info", &build_info,
          "Compiler, language standard, instruction sets of this machine, and the thread pool that is shared, if any.");
}
