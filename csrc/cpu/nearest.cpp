#include "cpu/nearest.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/barrier.h"
#include "cpu/code_table.h"
#include "cpu/shared_pool.h"

namespace fastvq::cpu {
namespace {

// A thread's share of the columns of a sum starts at a cache line of them.
constexpr int64_t kColumnGroup = 16;
// Vectors are sorted by several threads where each has so many of them for a code of its own table.
constexpr int64_t kLeastSorted = 8;

struct Search {
    const NearestTask& task;
    const NearestKernels& kernels;
    int64_t threads;
    int64_t block_rows = search_block_rows(kernels, task.rows, task.depth);
    int64_t num_blocks = ceil_div(task.rows, block_rows);

    CodeTable codes{task.codebook, task.num_codes, task.depth, kernels};
    // The code that a vector counts for, or -1.
    std::unique_ptr<int32_t[]> assigned{task.counts ? new int32_t[task.rows] : nullptr};
    std::vector<double> errors = std::vector<double>(task.counts ? num_blocks : 0);
    int64_t pitch = ceil_div(task.depth, kSumPitch) * kSumPitch;
    // 0: vectors are sorted.
    int64_t parts = task.counts ? sum_parts(task.rows, task.num_codes, task.depth) : 0;
    int64_t part_size = task.num_codes * pitch;
    std::unique_ptr<double[]> part_sums{new double[parts * part_size]};
    std::unique_ptr<int64_t[]> part_counts{new int64_t[parts * task.num_codes]};
    std::vector<std::vector<double>> totals =
        std::vector<std::vector<double>>(parts > 0 ? threads : 0, std::vector<double>(pitch));
    bool sorted = task.counts && parts == 0;
    // The vectors that count, by code and in their order, and as many numbers behind them as a kernel looks ahead.
    std::unique_ptr<int64_t[]> order{sorted ? new int64_t[task.rows + kLookAhead] : nullptr};
    int64_t sorters = std::clamp<int64_t>(task.rows / (kLeastSorted * task.num_codes), 1, threads);
    // [sorters][num_codes]: how many vectors of a code there are in a thread's share, then where they go.
    std::vector<int64_t> places = std::vector<int64_t>(sorted ? sorters * task.num_codes : 0);
    std::atomic<int64_t> next_block{0}, next_part{0};
    Barrier barrier{threads};

    const void* row(int64_t n) const {
        const int64_t size = task.element == Element::kFloat32 ? 4 : 2;
        return static_cast<const char*>(task.x) + n * task.stride * size;
    }

    void search_block(int64_t block, float* panels) {
        const int64_t first = block * block_rows, rows = std::min(block_rows, task.rows - first);
        int32_t found[kLargestBlock * kMostPanelRows];
        codes.search(row(first), task.element, task.stride, rows, panels, found);
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t n = first + i;
            task.indices[n] = std::max(found[i], 0);
            if (task.counts) assigned[n] = task.mask == nullptr || task.mask[n] != 0 ? found[i] : -1;
        }
        if (!task.counts) return;
        errors[block] = kernels.squared_distances(row(first), task.element, task.stride, rows, task.depth, task.codebook,
                                                  task.indices + first, task.mask ? task.mask + first : nullptr);
    }

    // A stable counting sort in three steps: count shares, turn counts into places, put vectors there.
    void count_share(int64_t sorter) {
        int64_t* counts = places.data() + sorter * task.num_codes;
        for (int64_t n = share(sorter); n < share(sorter + 1); ++n) {
            if (assigned[n] >= 0) ++counts[assigned[n]];
        }
    }

    void find_places() {
        int64_t next = 0;
        for (int64_t k = 0; k < task.num_codes; ++k) {
            const int64_t first = next;
            for (int64_t s = 0; s < sorters; ++s) {
                const int64_t count = places[s * task.num_codes + k];
                places[s * task.num_codes + k] = next;
                next += count;
            }
            task.counts[k] = next - first;
        }
        std::fill(order.get() + next, order.get() + next + kLookAhead, 0);
    }

    void add_errors() {
        double error = 0.0;
        for (double part : errors) error += part;
        *task.squared_error = static_cast<float>(error);
    }

    void sort_share(int64_t sorter) {
        int64_t* next = places.data() + sorter * task.num_codes;
        for (int64_t n = share(sorter); n < share(sorter + 1); ++n) {
            if (assigned[n] >= 0) order[next[assigned[n]]++] = n;
        }
    }

    int64_t share(int64_t sorter) const { return task.rows * sorter / sorters; }

    // Work lies along a line: code after code, the groups of columns of each, and of a group one step for every vector
    // and one for writing the sum. A thread does the groups that begin in its piece of the line, so that even a code that
    // has all the vectors is shared.
    void add_share(int64_t thread) {
        const int64_t groups = ceil_div(task.depth, kColumnGroup);
        int64_t total = 0;
        for (int64_t k = 0; k < task.num_codes; ++k) total += (task.counts[k] + 1) * groups;
        const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
        int64_t at = 0, first = 0;
        for (int64_t k = 0; k < task.num_codes && at < end; ++k) {
            const int64_t count = task.counts[k], steps = count + 1;
            const int64_t from = std::clamp<int64_t>(ceil_div(std::max<int64_t>(begin - at, 0), steps), 0, groups);
            const int64_t to = std::clamp<int64_t>(ceil_div(end - at, steps), 0, groups);
            if (from < to) {
                const int64_t column = from * kColumnGroup, last = std::min(to * kColumnGroup, task.depth);
                const int64_t size = task.element == Element::kFloat32 ? 4 : 2;
                kernels.sum_rows(static_cast<const char*>(task.x) + column * size, task.element, task.stride,
                                 order.get() + first, count, last - column, task.sums + k * task.depth + column);
            }
            at += steps * groups;
            first += count;
        }
    }

    void scatter_part(int64_t part) {
        const int64_t first = task.rows * part / parts, last = task.rows * (part + 1) / parts;
        double* sums = part_sums.get() + part * part_size;
        int64_t* counts = part_counts.get() + part * task.num_codes;
        std::fill(sums, sums + part_size, 0.0);
        std::fill(counts, counts + task.num_codes, 0);
        kernels.scatter_rows(row(first), task.element, task.stride, assigned.get() + first, last - first, task.depth,
                             pitch, sums, counts);
    }

    void add_parts(int64_t thread) {
        std::vector<double>& total = totals[thread];
        for (int64_t k = task.num_codes * thread / threads; k < task.num_codes * (thread + 1) / threads; ++k) {
            std::fill(total.begin(), total.end(), 0.0);
            int64_t count = 0;
            for (int64_t part = 0; part < parts; ++part) {
                const double* sums = part_sums.get() + part * part_size + k * pitch;
                for (int64_t d = 0; d < pitch; ++d) total[d] += sums[d];
                count += part_counts[part * task.num_codes + k];
            }
            for (int64_t d = 0; d < task.depth; ++d) task.sums[k * task.depth + d] = static_cast<float>(total[d]);
            task.counts[k] = count;
        }
    }

    void work(int64_t thread, float* panels) {
        codes.pack(codes.num_tiles() * thread / threads, codes.num_tiles() * (thread + 1) / threads);
        barrier.wait();
        for (int64_t block; (block = next_block.fetch_add(1, std::memory_order_relaxed)) < num_blocks;) {
            search_block(block, panels);
        }
        if (!task.counts) return;
        barrier.wait();
        if (thread == 0) add_errors();
        if (parts > 0) {
            for (int64_t part; (part = next_part.fetch_add(1, std::memory_order_relaxed)) < parts;) scatter_part(part);
            barrier.wait();
            add_parts(thread);
            return;
        }
        if (thread < sorters) count_share(thread);
        barrier.wait();
        if (thread == 0) find_places();
        barrier.wait();
        if (thread < sorters) sort_share(thread);
        barrier.wait();
        add_share(thread);
    }
};

}  // namespace

void nearest_codes(const NearestTask& task, int64_t threads, const Kernels& kernels) {
    const double products = static_cast<double>(task.rows) * task.num_codes * task.depth;
    threads = std::clamp<int64_t>(static_cast<int64_t>(products / kLeastSearchWork), 1, threads);
    Search search{task, kernels.nearest, threads};
    search.codes.find_centre(std::vector<double>(2 * task.num_codes + task.depth).data());
    // Made before any thread is: memory may run out, and nothing may throw in a thread.
    std::vector<std::unique_ptr<float[]>> panels(threads);
    for (auto& own : panels) own.reset(new float[search.block_rows * task.depth]);
    run_shared_team(threads, [&](int64_t thread) { search.work(thread, panels[thread].get()); });
}

}  // namespace fastvq::cpu
