#include "cpu/product.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "cpu/shared_pool.h"

namespace fastvq::cpu {
namespace {

// A part of a panel of 32 KiB stays near while tiles pass by.
constexpr int64_t kPanelFloats = 1 << 13;
// Parts of rows of 256 KiB stay in a second-level cache while panels pass by.
constexpr int64_t kBlockFloats = 1 << 16;
// Multiply-adds that take longer than waking a thread does.
constexpr int64_t kLeastWork = 1 << 19;
constexpr std::align_val_t kAlignment{kLineFloats * sizeof(float)};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// A rectangle of tiles and panels.
struct PackedProduct::Share {
    int64_t first_row, last_row;
    int64_t first_panel, last_panel;
};

void PackedProduct::Deleter::operator()(float* data) const { ::operator delete[](data, kAlignment); }

PackedProduct::PackedProduct(const float* weights, int64_t depth, int64_t columns, const Kernels& kernels)
    : depth_(depth),
      columns_(columns),
      panels_(ceil_div(columns, kernels.gathered.columns)),
      kernels_(kernels.gathered),
      packed_(static_cast<float*>(::operator new[](weight_bytes(), kAlignment))) {
    float* to = packed_.get();
    for (int64_t panel = 0; panel < panels_; ++panel) {
        const int64_t first = panel * kernels_.columns, present = std::min(kernels_.columns, columns - first);
        for (int64_t k = 0; k < depth; ++k, to += kernels_.columns) {
            std::memcpy(to, weights + k * columns + first, present * sizeof(float));
            std::fill(to + present, to + kernels_.columns, 0.0f);
        }
    }
}

int64_t PackedProduct::weight_bytes() const {
    return panels_ * depth_ * kernels_.columns * static_cast<int64_t>(sizeof(float));
}

void PackedProduct::run_share(const ProductTask& task, const Share& share) const {
    const int64_t rows = share.last_row - share.first_row;
    // A single tile passes over its weights once: there is nothing to keep in a cache.
    const int64_t parts = rows <= kernels_.rows ? 1 : ceil_div(depth_, kPanelFloats / kernels_.columns);
    const int64_t blocks = ceil_div(rows * ceil_div(depth_, parts), kBlockFloats);
    const int64_t panel_floats = depth_ * kernels_.columns;
    ProductTile tile{};
    tile.pitch = panel_floats;
    tile.width = task.width;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first_row = share.first_row + rows * block / blocks;
        const int64_t block_rows = share.first_row + rows * (block + 1) / blocks - first_row;
        const int64_t tiles = ceil_div(block_rows, kernels_.rows);
        const int64_t together = block_rows <= kernels_.few_rows ? 2 : 1;
        tile.runs = task.runs.data();
        tile.skip = 0;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t begin = depth_ * part / parts;
            tile.depth = depth_ * (part + 1) / parts - begin;
            const int64_t lines = tile.depth * kernels_.columns / kLineFloats;
            for (int64_t panel = share.first_panel; panel < share.last_panel; panel += together) {
                const int64_t next = std::min(panel + together, share.last_panel);
                const int64_t column = panel * kernels_.columns;
                tile.columns = std::min(next * kernels_.columns, columns_) - column;
                tile.panel = packed_.get() + panel * panel_floats + begin * kernels_.columns;
                tile.out = task.out;
                tile.out.data += column;
                tile.start = {tile.out.data, tile.out.sample_stride, tile.out.position_stride};
                if (part == 0) {
                    tile.start = task.start;
                    if (tile.start.data != nullptr) tile.start.data += column;
                }
                // The next panel comes nearer while tiles pass by this one. With a single tile the processor sees to that.
                tile.ahead_lines = tiles > 1 && next < share.last_panel ? lines / tiles : 0;
                tile.ahead = tile.panel + (tile.ahead_lines > 0 ? panel_floats : 0);
                for (int64_t t = 0; t < tiles; ++t, tile.ahead += tile.ahead_lines * kLineFloats) {
                    // Of nearly equal height: one of 12 rows and one of 1 would take as long as two of 12.
                    const int64_t row = first_row + block_rows * t / tiles;
                    tile.rows = first_row + block_rows * (t + 1) / tiles - row;
                    tile.sample = row / task.width;
                    tile.position = row % task.width;
                    kernels_.tile(tile);
                }
            }
            if (part + 1 == parts) break;
            for (tile.skip += tile.depth; tile.skip >= tile.runs->length; ++tile.runs) tile.skip -= tile.runs->length;
        }
    }
}

void PackedProduct::run(const ProductTask& task, int64_t threads) const {
    const int64_t rows = task.samples * task.width;
    if (rows == 0) return;
    const double products = static_cast<double>(rows) * columns_ * depth_;
    threads = std::clamp<int64_t>(static_cast<int64_t>(products / kLeastWork), 1, threads);
    const int64_t tiles = ceil_div(rows, kernels_.rows);
    // Threads in columns and rows of a grid: so that the one with the most has the least, and reads few weights.
    int64_t across = 1, least = panels_ * tiles + 1;
    for (int64_t n = std::min(threads, panels_); n >= 1; --n) {
        const int64_t most = ceil_div(panels_, n) * ceil_div(tiles, threads / n);
        if (most < least) {
            least = most;
            across = n;
        }
    }
    const int64_t down = std::min(threads / across, tiles);
    run_shared_team(across * down, [&](int64_t thread) {
        const int64_t n = thread % across, m = thread / across;
        run_share(task, {rows * m / down, rows * (m + 1) / down, panels_ * n / across, panels_ * (n + 1) / across});
    });
}

}  // namespace fastvq::cpu
