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
// A thread's share of the columns of a sum starts at a cache line of them.
constexpr int64_t kColumnGroup = 16;
// Vectors are sorted by several threads where each has so many of them for a code of its own table.
constexpr int64_t kLeastSorted = 8;
// Sums so few stay in a second-level cache in double, and vectors are added to them in the order in which they come, by
// parts. Sorting them by code first takes longer than adding up parts of so many vectors.
constexpr int64_t kMostScattered = 1 << 14;
constexpr int64_t kPartRows = 4096;
constexpr int64_t kLeastParts = 8;
constexpr int64_t kMostParts = 32;
// Of codes that can be told from others: float32 holds their half norm.
constexpr double kLargestSquare = std::numeric_limits<float>::max();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

    std::vector<float> centre = std::vector<float>(task.depth);
    std::unique_ptr<float[]> tiles{new float[num_tiles * kernels.tile_codes * task.depth]};
    std::unique_ptr<float[]> half_norms{new float[num_tiles * kernels.tile_codes]};
    // The code that a vector counts for, or -1.
    std::unique_ptr<int32_t[]> assigned{task.counts ? new int32_t[task.rows] : nullptr};
    std::vector<double> errors = std::vector<double>(task.counts ? num_blocks : 0);
    // Of fixed number whatever the number of threads, because they are summed one by one. 0: vectors are sorted.
    int64_t pitch = ceil_div(task.depth, kSumPitch) * kSumPitch;
    int64_t parts = task.counts && task.num_codes * pitch <= kMostScattered && task.rows >= kLeastParts * kPartRows
                        ? std::min(task.rows / kPartRows, kMostParts)
                        : 0;
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

    // The mean m of the codes that are not longer than 2 r, r being the length of the second shortest code; zeros if that
    // would cost accuracy. An error matters between two codes only, and the longer of any two has at least length r, so
    // everything is measured by max(|c|, r), and longer codes have no say. The error of a score is that of its product,
    // some u |x - m| |c - m|, and without a centre at most u (|x| + |c|)^2 / 4. If |m| |c - m| <= max(|c|, r)^2 / 4 for
    // all codes, a centre leaves it about there. Of the shortest code that is not asked if |c| <= r / 4: vectors half-way
    // to another one are too far from the origin to be harmed.
    void find_centre() {
        const int64_t size = task.num_codes;
        std::vector<double> squares(size), centred(size), total(task.depth);
        kernels.squares(task.codebook, size, task.depth, centre.data(), squares.data());
        double least = kLargestSquare, second = kLargestSquare;
        int64_t shortest = -1;
        for (int64_t k = 0; k < size; ++k) {
            if (!(squares[k] < second)) continue;
            second = std::max(least, squares[k]);
            if (squares[k] < least) {
                least = squares[k];
                shortest = k;
            }
        }
        const double limit = std::min(4 * second, kLargestSquare);
        int64_t count = 0;
        for (int64_t k = 0; k < size; ++k) {
            if (!(squares[k] <= limit)) continue;
            ++count;
            kernels.add(task.codebook + k * task.depth, Element::kFloat32, task.depth, total.data());
        }
        double square = 0.0;
        for (int64_t d = 0; d < task.depth; ++d) {
            centre[d] = static_cast<float>(total[d] / static_cast<double>(std::max<int64_t>(count, 1)));
            square += static_cast<double>(centre[d]) * centre[d];
        }
        kernels.squares(task.codebook, size, task.depth, centre.data(), centred.data());
        for (int64_t k = 0; k < size; ++k) {
            if (!(squares[k] <= kLargestSquare) || (k == shortest && 16 * least <= second)) continue;
            const double length = std::max(squares[k], second);
            if (16 * square * centred[k] > length * length) {
                std::fill(centre.begin(), centre.end(), 0.0f);
                return;
            }
        }
    }

    // Negated, so that a score is a sum. A code that is not finite has an infinite half norm or NaN, and so its scores,
    // which are never the least; the same holds for those that fill up the last tile.
    void pack_codes(int64_t thread) {
        const int64_t width = kernels.tile_codes;
        for (int64_t t = num_tiles * thread / threads; t < num_tiles * (thread + 1) / threads; ++t) {
            const int64_t first = t * width, present = std::min(width, task.num_codes - first);
            float* norms = half_norms.get() + first;
            kernels.pack_codes(task.codebook + first * task.depth, present, task.depth, centre.data(),
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
            kernels.pack_rows(row(first + p * width), task.element, task.stride, rows - p * width, task.depth, centre.data(),
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
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t n = first + i;
            const int32_t found = std::isfinite(best[i]) ? index[i] : -1;
            task.indices[n] = std::max(found, 0);
            if (task.counts) assigned[n] = task.mask == nullptr || task.mask[n] != 0 ? found : -1;
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
        pack_codes(thread);
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
    threads = std::clamp<int64_t>(static_cast<int64_t>(products / kLeastWork), 1, threads);
    Search search{task, kernels.nearest, threads};
    search.find_centre();
    // Made before any thread is: memory may run out, and nothing may throw in a thread.
    std::vector<std::unique_ptr<float[]>> panels(threads);
    for (auto& own : panels) own.reset(new float[search.block_rows * task.depth]);
    run_shared_team(threads, [&](int64_t thread) { search.work(thread, panels[thread].get()); });
}

}  // namespace fastvq::cpu
