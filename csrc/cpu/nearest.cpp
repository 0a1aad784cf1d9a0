#include "cpu/nearest.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/barrier.h"
#include "cpu/shared_pool.h"

namespace fastvq::cpu {
namespace {

// Vectors of a block and the codes that pass by share a second-level cache of at least 512 KiB.
constexpr int64_t kBlockBytes = 1 << 17;
constexpr int64_t kCodeBytes = 1 << 18;
constexpr int64_t kLargestBlock = 8;  // panels
// So many blocks keep many threads busy, where there are enough vectors.
constexpr int64_t kWantedBlocks = 64;
// Multiply-adds that take longer than making a thread does.
constexpr int64_t kLeastWork = 1 << 22;
// A thread's share of the columns of the sums starts at a cache line of them.
constexpr int64_t kColumnGroup = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Without a branch, which the compiler turns into vectors.
bool all_finite(const float* x, int64_t n) {
    uint32_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        found |= (bits & 0x7F800000u) == 0x7F800000u;
    }
    return found == 0;
}

struct Search {
    const NearestTask& task;
    const NearestKernels& kernels;
    int64_t threads;
    int64_t num_tiles = ceil_div(task.num_codes, kernels.tile_codes);
    int64_t panel_bytes = kernels.panel_rows * task.depth * static_cast<int64_t>(sizeof(float));
    // Of fixed size whatever the number of threads, because errors are summed block by block.
    int64_t block_rows =
        std::clamp<int64_t>(std::min(kBlockBytes / panel_bytes, task.rows / (kernels.panel_rows * kWantedBlocks)), 1,
                            kLargestBlock) *
        kernels.panel_rows;
    int64_t num_blocks = ceil_div(task.rows, block_rows);

    std::vector<float> mean = std::vector<float>(task.depth);
    std::unique_ptr<float[]> tiles{new float[num_tiles * kernels.tile_codes * task.depth]};
    std::unique_ptr<float[]> half_norms{new float[num_tiles * kernels.tile_codes]};
    // The code that a vector counts for, or -1.
    std::unique_ptr<int32_t[]> assigned{task.counts ? new int32_t[task.rows] : nullptr};
    std::vector<double> errors = std::vector<double>(task.counts ? num_blocks : 0);
    std::vector<double> sums = std::vector<double>(task.counts ? task.num_codes * task.depth : 0);
    std::atomic<int64_t> next_block{0};
    Barrier barrier{threads};

    void find_mean() {
        std::vector<double> total(task.depth);
        int64_t count = 0;
        for (int64_t k = 0; k < task.num_codes; ++k) {
            const float* code = task.codebook + k * task.depth;
            if (!all_finite(code, task.depth)) continue;
            ++count;
            kernels.add(code, Element::kFloat32, task.depth, total.data());
        }
        for (int64_t d = 0; d < task.depth; ++d) {
            mean[d] = static_cast<float>(total[d] / static_cast<double>(std::max<int64_t>(count, 1)));
        }
    }

    // Negated, so that a score is a sum. A code that is not finite has an infinite half norm or NaN, and so its scores,
    // which are never the least; the same holds for those that fill up the last tile.
    void pack_codes(int64_t thread) {
        const int64_t width = kernels.tile_codes;
        for (int64_t t = num_tiles * thread / threads; t < num_tiles * (thread + 1) / threads; ++t) {
            const int64_t first = t * width, present = std::min(width, task.num_codes - first);
            float* norms = half_norms.get() + first;
            kernels.pack_codes(task.codebook + first * task.depth, present, task.depth, mean.data(),
                               tiles.get() + first * task.depth, norms);
            std::fill(norms + present, norms + width, std::numeric_limits<float>::infinity());
        }
    }

    const void* row(int64_t n) const {
        const int64_t size = task.element == Element::kFloat32 ? 4 : 2;
        return static_cast<const char*>(task.x) + n * task.stride * size;
    }

    void search_block(int64_t block, float* panels) {
        const int64_t first = block * block_rows, rows = std::min(block_rows, task.rows - first);
        const int64_t width = kernels.panel_rows, used = ceil_div(rows, width);
        const int64_t tile_size = kernels.tile_codes * task.depth;
        float best[kLargestBlock * kMostPanelRows];
        int32_t index[kLargestBlock * kMostPanelRows];
        std::fill(best, best + used * width, std::numeric_limits<float>::infinity());
        std::fill(index, index + used * width, -1);
        for (int64_t p = 0; p < used; ++p) {
            kernels.pack_rows(row(first + p * width), task.element, task.stride, rows - p * width, task.depth, mean.data(),
                         panels + p * width * task.depth);
        }
        const int64_t step = std::max<int64_t>(1, kCodeBytes / (tile_size * static_cast<int64_t>(sizeof(float))));
        for (int64_t t = 0; t < num_tiles; t += step) {
            for (int64_t p = 0; p < used; ++p) {
                kernels.scan(panels + p * width * task.depth, tiles.get() + t * tile_size,
                             half_norms.get() + t * kernels.tile_codes, task.depth, std::min(step, num_tiles - t),
                             static_cast<int32_t>(t * kernels.tile_codes), best + p * width, index + p * width);
            }
        }
        double error = 0.0;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t n = first + i;
            const int32_t found = std::isfinite(best[i]) ? index[i] : -1;
            task.indices[n] = std::max(found, 0);
            if (!task.counts) continue;
            const bool wanted = task.mask == nullptr || task.mask[n] != 0;
            assigned[n] = wanted ? found : -1;
            if (wanted) {
                error += kernels.squared_distance(row(n), task.element, task.codebook + task.indices[n] * task.depth,
                                                  task.depth);
            }
        }
        if (task.counts) errors[block] = error;
    }

    void add_columns(int64_t begin, int64_t end) {
        const int64_t size = task.element == Element::kFloat32 ? 4 : 2;
        for (int64_t n = 0; n < task.rows; ++n) {
            if (assigned[n] < 0) continue;
            kernels.add(static_cast<const char*>(row(n)) + begin * size, task.element, end - begin,
                        sums.data() + assigned[n] * task.depth + begin);
        }
        for (int64_t k = 0; k < task.num_codes; ++k) {
            for (int64_t d = begin; d < end; ++d) {
                task.sums[k * task.depth + d] = static_cast<float>(sums[k * task.depth + d]);
            }
        }
    }

    void finish() {
        std::fill(task.counts, task.counts + task.num_codes, 0);
        for (int64_t n = 0; n < task.rows; ++n) {
            if (assigned[n] >= 0) ++task.counts[assigned[n]];
        }
        double error = 0.0;
        for (double part : errors) error += part;
        *task.squared_error = static_cast<float>(error);
    }

    void work(int64_t thread, float* panels) {
        pack_codes(thread);
        barrier.wait();
        for (int64_t block; (block = next_block.fetch_add(1, std::memory_order_relaxed)) < num_blocks;) {
            search_block(block, panels);
        }
        if (!task.counts) return;
        barrier.wait();
        const int64_t groups = ceil_div(task.depth, kColumnGroup), sharing = std::min(threads, groups);
        if (thread < sharing) {
            add_columns(groups * thread / sharing * kColumnGroup,
                        std::min(groups * (thread + 1) / sharing * kColumnGroup, task.depth));
        }
        if (thread == threads - 1) finish();
    }
};

}  // namespace

void nearest_codes(const NearestTask& task, int64_t threads, const Kernels& kernels) {
    const double products = static_cast<double>(task.rows) * task.num_codes * task.depth;
    threads = std::clamp<int64_t>(static_cast<int64_t>(products / kLeastWork), 1, threads);
    Search search{task, kernels.nearest, threads};
    search.find_mean();
    // Made before any thread is: memory may run out, and nothing may throw in a thread.
    std::vector<std::unique_ptr<float[]>> panels(threads);
    for (auto& own : panels) own.reset(new float[search.block_rows * task.depth]);
    run_shared_team(threads, [&](int64_t thread) { search.work(thread, panels[thread].get()); });
}

}  // namespace fastvq::cpu
