#include "cpu/residual.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/barrier.h"
#include "cpu/code_table.h"
#include "cpu/shared_pool.h"

namespace fastvq::cpu {
namespace {

// Columns whose sums a thread adds up at a time: a cache line of a vector.
constexpr int64_t kColumns = 16;
static_assert(kColumns % kSumPitch == 0);
// Vectors that go through a level before they go on to the next, so that the sums of a level stay in the cache.
constexpr int64_t kChunkRows = 512;
// In place of a code: of a vector that takes no part, and of one without a finite score, which has code 0 and does not
// count.
constexpr int32_t kAbsent = -1, kNone = -2;

void subtract(const float* __restrict code, float* __restrict residual, int64_t width) {
    for (int64_t d = 0; d < width; ++d) residual[d] -= code[d];
}

void add(const float* __restrict code, float* __restrict total, int64_t width) {
    for (int64_t d = 0; d < width; ++d) total[d] += code[d];
}

// What a thread works on, made before it runs: nothing may throw in a thread.
struct WorkSpace {
    std::unique_ptr<float[]> panels, residual, columns;
    std::vector<double> scratch, sums, totals;
    std::vector<int64_t> counts;
};

struct Residual {
    const ResidualTask& task;
    const NearestKernels& kernels;
    int64_t threads;
    int64_t block_rows = search_block_rows(kernels, task.rows, task.depth);
    int64_t num_blocks = ceil_div(task.rows, block_rows);
    std::vector<CodeTable> tables;
    std::unique_ptr<int32_t[]> assigned{task.counts ? new int32_t[task.levels * task.rows] : nullptr};  // by level
    std::vector<double> errors = std::vector<double>(task.counts ? task.levels * num_blocks : 0);
    int64_t parts = std::max<int64_t>(1, sum_parts(task.rows, task.num_codes, task.depth));
    int64_t groups = ceil_div(task.depth, kColumns);
    // Levels are shared among threads where there are fewer groups of columns.
    int64_t spans = std::min(task.levels, ceil_div(threads, groups));
    std::atomic<int64_t> next_block{0}, next_sum{0};
    Barrier barrier{threads};

    Residual(const ResidualTask& task, const NearestKernels& kernels, int64_t threads)
        : task(task), kernels(kernels), threads(threads) {
        const int64_t distinct = task.codebook_stride == 0 ? 1 : task.levels;
        tables.reserve(distinct);
        for (int64_t level = 0; level < distinct; ++level) {
            tables.emplace_back(codebook(level), task.num_codes, task.depth, kernels);
        }
    }

    const float* codebook(int64_t level) const { return task.codebooks + level * task.codebook_stride; }
    const CodeTable& table(int64_t level) const { return tables[task.codebook_stride == 0 ? 0 : level]; }

    WorkSpace work_space() const {
        WorkSpace own;
        own.panels.reset(new float[block_rows * task.depth]);
        own.residual.reset(new float[block_rows * task.depth]);
        own.scratch.resize(2 * task.num_codes + task.depth);
        if (task.counts == nullptr) return own;
        const int64_t most_levels = ceil_div(task.levels, spans);
        own.columns.reset(new float[kChunkRows * kColumns]);
        own.sums.resize(most_levels * task.num_codes * kColumns);
        own.totals.resize(parts > 1 ? own.sums.size() : 0);
        own.counts.resize(most_levels * task.num_codes);
        return own;
    }

    // Searches for whole panels, but for those none of whose vectors takes part.
    void search_level(int64_t level, int64_t rows, const uint8_t* present, WorkSpace& own, int32_t* found) const {
        const int64_t width = kernels.panel_rows;
        for (int64_t first = 0; first < rows;) {
            int64_t last = first;
            for (; last < rows; last += width) {
                if (std::memchr(present + last, 1, std::min(width, rows - last)) == nullptr) break;
            }
            if (last > first) {
                table(level).search(own.residual.get() + first * task.depth, Element::kFloat32, task.depth,
                                    std::min(last, rows) - first, own.panels.get(), found + first);
            }
            first = last + width;
        }
    }

    void search_block(int64_t block, WorkSpace& own) {
        const int64_t start = block * block_rows, rows = std::min(block_rows, task.rows - start), depth = task.depth;
        float *residual = own.residual.get(), *total = task.quantized + start * depth;
        for (int64_t i = 0; i < rows; ++i) {
            std::memcpy(residual + i * depth, task.x + (start + i) * task.stride, depth * sizeof(float));
        }
        std::fill(total, total + rows * depth, 0.0f);
        int32_t found[kLargestBlock * kMostPanelRows];
        int64_t index[kLargestBlock * kMostPanelRows];
        uint8_t present[kLargestBlock * kMostPanelRows];
        for (int64_t level = 0; level < task.levels; ++level) {
            for (int64_t i = 0; i < rows; ++i) {
                present[i] = task.depths == nullptr || level < task.depths[start + i];
            }
            search_level(level, rows, present, own, found);
            for (int64_t i = 0; i < rows; ++i) {
                index[i] = present[i] ? std::max(found[i], 0) : 0;
                task.indices[(start + i) * task.levels + level] = present[i] ? index[i] : -1;
                if (task.counts == nullptr) continue;
                assigned[level * task.rows + start + i] = !present[i] ? kAbsent : found[i] < 0 ? kNone : found[i];
            }
            if (task.counts) {
                errors[level * num_blocks + block] = kernels.squared_distances(
                    residual, Element::kFloat32, depth, rows, depth, codebook(level), index, present);
            }
            for (int64_t i = 0; i < rows; ++i) {
                if (!present[i]) continue;
                const float* code = codebook(level) + index[i] * depth;
                add(code, total + i * depth, depth);
                subtract(code, residual + i * depth, depth);
            }
        }
    }

    // Sums of some columns of the levels of a span. Of earlier levels only the codes are subtracted.
    void add_columns(int64_t group, int64_t span, WorkSpace& own) {
        const int64_t column = group * kColumns, width = std::min(kColumns, task.depth - column);
        const int64_t first = task.levels * span / spans, last = task.levels * (span + 1) / spans;
        const int64_t size = (last - first) * task.num_codes * kColumns;
        std::fill(own.counts.begin(), own.counts.end(), 0);
        std::fill(own.totals.begin(), own.totals.end(), 0.0);
        for (int64_t part = 0; part < parts; ++part) {
            std::fill_n(own.sums.begin(), size, 0.0);
            const int64_t end = task.rows * (part + 1) / parts;
            for (int64_t row = task.rows * part / parts; row < end; row += kChunkRows) {
                add_chunk(row, std::min(kChunkRows, end - row), column, width, first, last, own);
            }
            for (size_t i = 0; i < own.totals.size(); ++i) own.totals[i] += own.sums[i];
        }
        const double* sums = parts > 1 ? own.totals.data() : own.sums.data();
        for (int64_t k = 0; k < (last - first) * task.num_codes; ++k) {
            float* out = task.sums + (first * task.num_codes + k) * task.depth + column;
            for (int64_t d = 0; d < width; ++d) out[d] = static_cast<float>(sums[k * kColumns + d]);
        }
        if (group > 0) return;
        std::copy_n(own.counts.begin(), (last - first) * task.num_codes, task.counts + first * task.num_codes);
    }

    void add_chunk(int64_t start, int64_t rows, int64_t column, int64_t width, int64_t first, int64_t last,
                   WorkSpace& own) const {
        float* columns = own.columns.get();
        for (int64_t i = 0; i < rows; ++i) {
            std::memcpy(columns + i * kColumns, task.x + (start + i) * task.stride + column, width * sizeof(float));
        }
        for (int64_t level = 0; level < last; ++level) {
            const int32_t* codes = assigned.get() + level * task.rows + start;
            if (level >= first) {
                const int64_t place = (level - first) * task.num_codes;
                kernels.scatter_rows(columns, Element::kFloat32, kColumns, codes, rows, width, kColumns,
                                     own.sums.data() + place * kColumns, own.counts.data() + place);
            }
            if (level + 1 == last) continue;
            for (int64_t i = 0; i < rows; ++i) {
                if (codes[i] == kAbsent) continue;
                const int64_t code = std::max(codes[i], 0);
                subtract(codebook(level) + code * task.depth + column, columns + i * kColumns, width);
            }
        }
    }

    void add_errors() {
        for (int64_t level = 0; level < task.levels; ++level) {
            double error = 0.0;
            for (int64_t block = 0; block < num_blocks; ++block) error += errors[level * num_blocks + block];
            task.squared_errors[level] = static_cast<float>(error);
        }
    }

    void work(int64_t thread, WorkSpace& own) {
        const int64_t distinct = static_cast<int64_t>(tables.size());
        for (int64_t t = thread; t < distinct; t += threads) tables[t].find_centre(own.scratch.data());
        barrier.wait();
        for (CodeTable& one : tables) {
            one.pack(one.num_tiles() * thread / threads, one.num_tiles() * (thread + 1) / threads);
        }
        barrier.wait();
        for (int64_t block; (block = next_block.fetch_add(1, std::memory_order_relaxed)) < num_blocks;) {
            search_block(block, own);
        }
        if (task.counts == nullptr) return;
        barrier.wait();
        if (thread == 0) add_errors();
        for (int64_t sum; (sum = next_sum.fetch_add(1, std::memory_order_relaxed)) < groups * spans;) {
            add_columns(sum % groups, sum / groups, own);
        }
    }
};

}  // namespace

void residual_codes(const ResidualTask& task, int64_t threads, const Kernels& kernels) {
    const double products = static_cast<double>(task.rows) * task.num_codes * task.depth * task.levels;
    threads = std::clamp<int64_t>(static_cast<int64_t>(products / kLeastSearchWork), 1, threads);
    Residual residual(task, kernels.nearest, threads);
    std::vector<WorkSpace> spaces;
    for (int64_t thread = 0; thread < threads; ++thread) spaces.push_back(residual.work_space());
    run_shared_team(threads, [&](int64_t thread) { residual.work(thread, spaces[thread]); });
}

}  // namespace fastvq::cpu
