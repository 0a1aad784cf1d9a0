// Python bindings. Only binding files know nanobind. Tensors come as addresses; the Python side has checked dtype, device
// and layout, and what is checked here keeps a mistake there from reading or writing wild memory.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <map>
#include <stdexcept>
#include <memory>
#include <numeric>
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
#include "cpu/grid_plan.h"
#include "cpu/kernels.h"
#include "cpu/nearest.h"
#include "cpu/product.h"
#include "cpu/residual.h"
#include "cpu/shared_pool.h"

#if defined(FASTVQ_WITH_CUDA)
#include "cuda/bindings.h"
#endif

namespace nb = nanobind;

namespace {

using fastvq::draw_options;
using fastvq::expect;
using fastvq::pointer;

// Raised together with the number in fastvq/_engine.py when a signature changes.
constexpr int kInterface = 10;

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

void residual_codes(uintptr_t x, int64_t rows, int64_t stride, int64_t depth, uintptr_t codebooks,
                    int64_t codebook_stride, int64_t levels, int64_t num_codes, uintptr_t depths, uintptr_t indices,
                    uintptr_t quantized, uintptr_t counts, uintptr_t sums, uintptr_t squared_errors, int64_t threads,
                    const std::string& kernels) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
    expect(num_codes >= 1 && num_codes <= kMost, "num_codes", "1 to 2^30");
    expect(depth >= 1 && depth <= kMost, "depth", "1 to 2^30");
    expect(levels >= 1 && levels <= kMost, "levels", "1 to 2^30");
    expect(rows >= 0, "rows", "a count");
    expect(stride >= 0, "stride", "0 or more elements");
    expect(codebook_stride == 0 || codebook_stride == num_codes * depth, "codebook_stride", "0 or num_codes * depth");
    expect(threads >= 1 && threads <= 1024, "threads", "1 to 1024");
    fastvq::cpu::ResidualTask task{};
    task.x = pointer<const float>("x", x, rows);
    task.rows = rows;
    task.stride = stride;
    task.depth = depth;
    task.codebooks = pointer<const float>("codebooks", codebooks, num_codes);
    task.codebook_stride = codebook_stride;
    task.levels = levels;
    task.num_codes = num_codes;
    task.depths = pointer<const int64_t>("depths", depths, 0);
    task.indices = pointer<int64_t>("indices", indices, rows);
    task.quantized = pointer<float>("quantized", quantized, rows);
    if (counts != 0) {
        task.counts = pointer<int64_t>("counts", counts, num_codes);
        task.sums = pointer<float>("sums", sums, num_codes);
        task.squared_errors = pointer<float>("squared_errors", squared_errors, 1);
    }
    const auto& found = kernels_named(kernels);
    nb::gil_scoped_release release;
    fastvq::cpu::residual_codes(task, threads, found);
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
    const std::vector<fastvq::cpu::PackedProduct::Matrix> matrices{{data, depth}};
    return std::make_unique<fastvq::cpu::PackedProduct>(matrices, columns, 1, false, found);
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
    const int64_t places = samples > 0 ? width : 0;
    std::vector<int32_t> order(places);
    std::iota(order.begin(), order.end(), 0);
    std::map<int64_t, std::vector<int64_t>> tables;  // by stride, and their elements stay where they are
    const auto table = [&](int64_t stride) {
        std::vector<int64_t>& offsets = tables[stride];
        for (int64_t place = static_cast<int64_t>(offsets.size()); place < places; ++place) {
            offsets.push_back(place * stride);
        }
        return offsets.data();
    };
    std::vector<fastvq::cpu::Run> runs;
    expect(inputs.size() % kInputFields == 0, "inputs", "6 numbers each");
    int64_t depth = 0;
    for (auto field = inputs.begin(); field != inputs.end(); field += kInputFields) {
        const auto* data = pointer<const float>("input", field[0], samples);
        expect(field[4] >= 1 && field[4] <= product.depth(), "runs", "1 to depth");
        expect(field[5] >= 1 && field[5] <= product.depth(), "length", "1 to depth");
        for (int64_t run = 0; run < field[4] && samples > 0; ++run) {
            runs.push_back({{data + run * field[3], field[1], table(field[2])}, field[5]});
        }
        depth += field[4] * field[5];
    }
    expect(depth == product.depth(), "inputs", "runs that make up the depth");
    fastvq::cpu::ProductTask task{};
    task.runs = runs.data();
    task.samples = samples;
    task.order = order.data();
    task.width = width;
    task.start = {pointer<const float>("start", start, start != 0), start_sample_stride, table(start_position_stride)};
    task.out = {pointer<float>("out", out, samples), out_sample_stride, table(out_position_stride)};
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

// A field of a struct that Python fills in, as (name, offset).
#define FASTVQ_FIELD(Struct, field) fields.append(nb::make_tuple(#field, offsetof(Struct, field)))

nb::dict plan_layout() {
    using fastvq::OpSpec;
    using fastvq::TermSpec;
    using fastvq::cpu::StaticInput;
    nb::dict layout;
    nb::list kinds;
#define FASTVQ_KIND_NAME(name, text) kinds.append(text);
    FASTVQ_KINDS(FASTVQ_KIND_NAME)
#undef FASTVQ_KIND_NAME
    layout["kinds"] = kinds;
    {
        nb::list fields;
        FASTVQ_FIELD(OpSpec, kind);
        FASTVQ_FIELD(OpSpec, channels);
        FASTVQ_FIELD(OpSpec, level);
        FASTVQ_FIELD(OpSpec, paired);
        FASTVQ_FIELD(OpSpec, sources);
        FASTVQ_FIELD(OpSpec, heads);
        FASTVQ_FIELD(OpSpec, inclusive);
        FASTVQ_FIELD(OpSpec, first_term);
        FASTVQ_FIELD(OpSpec, num_terms);
        FASTVQ_FIELD(OpSpec, num_taps);
        FASTVQ_FIELD(OpSpec, weights);
        FASTVQ_FIELD(OpSpec, num_weights);
        FASTVQ_FIELD(OpSpec, above_level);
        FASTVQ_FIELD(OpSpec, uniform);
        FASTVQ_FIELD(OpSpec, first_once);
        FASTVQ_FIELD(OpSpec, num_once);
        FASTVQ_FIELD(OpSpec, first_above);
        FASTVQ_FIELD(OpSpec, num_above);
        FASTVQ_FIELD(OpSpec, bias);
        layout["op"] = nb::make_tuple(sizeof(OpSpec), fields);
    }
    {
        nb::list fields;
        FASTVQ_FIELD(TermSpec, source);
        FASTVQ_FIELD(TermSpec, first_column);
        FASTVQ_FIELD(TermSpec, num_columns);
        FASTVQ_FIELD(TermSpec, weights);
        FASTVQ_FIELD(TermSpec, num_weights);
        FASTVQ_FIELD(TermSpec, first_row);
        FASTVQ_FIELD(TermSpec, num_rows);
        layout["term"] = nb::make_tuple(sizeof(TermSpec), fields);
    }
    {
        nb::list fields;
        FASTVQ_FIELD(StaticInput, data);
        FASTVQ_FIELD(StaticInput, sample_stride);
        FASTVQ_FIELD(StaticInput, row_stride);
        FASTVQ_FIELD(StaticInput, column_stride);
        layout["static"] = nb::make_tuple(sizeof(StaticInput), fields);
    }
    return layout;
}
#undef FASTVQ_FIELD

std::unique_ptr<fastvq::cpu::GridPlan> make_grid_plan(uintptr_t ops, int64_t num_ops, uintptr_t terms,
                                                      int64_t num_terms, int64_t output, int64_t height, int64_t width,
                                                      int64_t num_codes, bool bf16, const std::string& kernels) {
    std::vector<fastvq::OpSpec> op_specs = fastvq::op_table(ops, num_ops);
    std::vector<fastvq::TermSpec> term_specs = fastvq::term_table(terms, num_terms);
    const auto& found = kernels_named(kernels);
    nb::gil_scoped_release release;
    return std::make_unique<fastvq::cpu::GridPlan>(std::move(op_specs), std::move(term_specs), output,
                                                   fastvq::cpu::GridShape{height, width, num_codes}, bf16, found);
}

int64_t grid_memory(const fastvq::cpu::GridPlan& plan, int64_t batch, int64_t tile, int64_t offset) {
    expect(batch >= 0 && batch < fastvq::kTableLimit, "batch", "0 to 2^24");
    return plan.memory_bytes(batch, tile, offset);
}

// What a call tells Python while it runs, and what came of that.
struct Listener {
    const nb::callable& rows_complete;
    int64_t told = 0;
    std::exception_ptr error;

    bool go_on(int64_t complete) {
        nb::gil_scoped_acquire acquire;
        try {
            if (PyErr_CheckSignals() != 0) throw nb::python_error();
            if (complete > told) rows_complete(complete - told);
            told = complete;
            return true;
        } catch (...) {
            error = std::current_exception();
            return false;
        }
    }
};

nb::tuple run_grid(const fastvq::cpu::GridPlan& plan, int64_t batch, int64_t tile, int64_t offset, int64_t threads,
                   int64_t step_threads, uintptr_t statics, uintptr_t codes, uintptr_t uniforms, uintptr_t known,
                   uintptr_t logits, float temperature, int64_t top_k, float top_p,
                   const nb::callable& rows_complete) {
    using namespace fastvq::cpu;
    const GridShape& shape = plan.shape();
    expect(batch >= 0 && batch < fastvq::kTableLimit, "batch", "0 to 2^24");
    GridTask task{};
    task.batch = batch;
    task.tile = tile;
    task.offset = offset;
    task.threads = threads;
    task.step_threads = step_threads;
    task.statics = pointer<const StaticInput>("statics", statics, plan.num_ops());
    for (int64_t op = 0; op < plan.num_ops(); ++op) {
        if (plan.reads_static(op)) {
            pointer<const float>("statics", reinterpret_cast<uintptr_t>(task.statics[op].data), 1);
        }
    }
    const int64_t positions = batch * shape.positions();
    task.codes = pointer<int64_t>("codes", codes, positions);
    task.uniforms = pointer<const float>("uniforms", uniforms, positions);
    task.known = pointer<const uint8_t>("known", known, positions);
    task.logits = pointer<float>("logits", logits, logits != 0);
    for (int64_t i = 0; i < positions; ++i) {
        expect(task.known[i] == 0 || (task.codes[i] >= 0 && task.codes[i] < shape.num_codes), "codes",
               "known codes of 0 to num_codes - 1");
    }
    task.draw = draw_options(shape.num_codes, temperature, top_k, top_p);
    Listener listener{rows_complete, 0, nullptr};
    task.context = &listener;
    task.keep_going = [](void* context, int64_t complete) {
        return static_cast<Listener*>(context)->go_on(complete);
    };
    GridResult result;
    {
        nb::gil_scoped_release release;
        result = plan.run(task);
    }
    if (listener.error) std::rethrow_exception(listener.error);
    nb::object bad = nb::none();
    if (result.outcome == Outcome::kNotDrawable) bad = nb::make_tuple(result.sample, result.row, result.column);
    return nb::make_tuple(bad, result.above_seconds, result.step_seconds);
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
    m.def("residual_codes", &residual_codes, nb::arg("x"), nb::arg("rows"), nb::arg("stride"), nb::arg("depth"),
          nb::arg("codebooks"), nb::arg("codebook_stride"), nb::arg("levels"), nb::arg("num_codes"), nb::arg("depths"),
          nb::arg("indices"), nb::arg("quantized"), nb::arg("counts"), nb::arg("sums"), nb::arg("squared_errors"),
          nb::arg("threads"), nb::arg("kernels"),
          "Codes of all levels of a residual quantiser, and statistics unless counts is 0; arrays by address.");
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
    m.attr("PLAN_LAYOUT") = plan_layout();
    nb::class_<fastvq::cpu::GridPlan>(m, "GridPlan")
        .def_prop_ro("weight_bytes", &fastvq::cpu::GridPlan::weight_bytes)
        .def_prop_ro("kernels", &fastvq::cpu::GridPlan::kernels_name)
        .def_prop_ro("fused", &fastvq::cpu::GridPlan::fused)
        .def("memory_bytes", &grid_memory, nb::arg("batch"), nb::arg("tile"), nb::arg("offset"),
             "Bytes that filling grids takes beside the weights.")
        .def("run", &run_grid, nb::arg("batch"), nb::arg("tile"), nb::arg("offset"), nb::arg("threads"),
             nb::arg("step_threads"), nb::arg("statics"), nb::arg("codes"), nb::arg("uniforms"), nb::arg("known"),
             nb::arg("logits"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("rows_complete"),
             "Fills grids; arrays by address. Returns None, or sample, row and column of logits that are not finite, and "
             "the seconds above and in steps.");
    m.def("make_grid_plan", &make_grid_plan, nb::arg("ops"), nb::arg("num_ops"), nb::arg("terms"), nb::arg("num_terms"),
          nb::arg("output"), nb::arg("height"), nb::arg("width"), nb::arg("num_codes"), nb::arg("bf16"),
          nb::arg("kernels"), "Packs the weights of a plan; tables of the structs in PLAN_LAYOUT by address.");
    m.def("leave_thread_pool", &fastvq::cpu::leave_loaded_pool,
          "From now on work runs on threads of its own, not on those of the framework.");
    m.def("build_info", &build_info,
          "Compiler, language standard, instruction sets of this machine, and the thread pool that is shared, if any.");
}
