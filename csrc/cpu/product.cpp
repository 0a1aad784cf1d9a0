#include "cpu/product.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "cpu/shared_pool.h"
#include "plan_spec.h"

namespace fastvq::cpu {
namespace {

// A part of a panel of 32 KiB stays near while tiles pass by.
constexpr int64_t kPanelFloats = 1 << 13;
// Parts of rows of 256 KiB stay in a second-level cache while panels pass by.
constexpr int64_t kBlockFloats = 1 << 16;
// Multiply-adds that take longer than waking a thread does.
constexpr int64_t kLeastWork = 1 << 19;
constexpr int64_t kLineBytes = kLineFloats * static_cast<int64_t>(sizeof(float));
constexpr std::align_val_t kAlignment{kLineBytes};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t depth_of(const std::vector<PackedProduct::Matrix>& matrices) {
    int64_t depth = 0;
    for (const auto& matrix : matrices) depth += matrix.depth;
    return depth;
}

}  // namespace

ProductSplit::ProductSplit(int64_t threads, int64_t panels, int64_t tiles) : across(1) {
    int64_t least = panels * tiles + 1;
    for (int64_t n = std::min(threads, panels); n >= 1; --n) {
        const int64_t most = ceil_div(panels, n) * ceil_div(tiles, threads / n);
        if (most < least) {
            least = most;
            across = n;
        }
    }
    down = std::max<int64_t>(1, std::min(threads / across, tiles));
}

ProductShare ProductSplit::share(int64_t thread, int64_t rows, int64_t panels) const {
    if (thread >= across * down) return {0, 0, 0, 0};
    const int64_t n = thread % across, m = thread / across;
    return {rows * m / down, rows * (m + 1) / down, panels * n / across, panels * (n + 1) / across};
}

void PackedProduct::Deleter::operator()(char* data) const { ::operator delete[](data, kAlignment); }

PackedProduct::PackedProduct(const std::vector<Matrix>& matrices, int64_t columns, int64_t parts, bool bf16,
                             const Kernels& kernels)
    : depth_(depth_of(matrices)),
      columns_(columns),
      parts_(parts),
      part_panels_(ceil_div(columns / parts, kernels.gathered.columns)),
      bf16_(bf16),
      kernels_(kernels.gathered),
      packed_(static_cast<char*>(::operator new[](weight_bytes(), kAlignment))) {
    char* to = packed_.get();
    const int64_t width = columns / parts;
    for (int64_t panel = 0; panel < panels(); ++panel) {
        const int64_t within = panel % part_panels_ * kernels_.columns;
        const int64_t first = panel / part_panels_ * width + within;
        const int64_t present = std::min(kernels_.columns, width - within);
        for (const Matrix& matrix : matrices) {
            for (int64_t k = 0; k < matrix.depth; ++k, to += kernels_.columns * element()) {
                const float* from = matrix.weights + k * columns + first;
                std::memset(to, 0, kernels_.columns * element());
                if (!bf16_) {
                    std::memcpy(to, from, present * sizeof(float));
                    continue;
                }
                for (int64_t c = 0; c < present; ++c) {
                    const uint16_t half = round_to_bf16(from[c]);
                    std::memcpy(to + c * sizeof(half), &half, sizeof(half));
                }
            }
        }
    }
}

int64_t PackedProduct::weight_bytes() const { return panels() * depth_ * kernels_.columns * element(); }

void PackedProduct::run_share(const ProductTask& task, const ProductShare& share) const {
    const int64_t rows = share.last_row - share.first_row;
    if (rows <= 0) return;
    // A single tile passes over its weights once: there is nothing to keep in a cache.
    const int64_t parts = rows <= kernels_.rows ? 1 : ceil_div(depth_, kPanelFloats / kernels_.columns);
    const int64_t blocks = ceil_div(rows * ceil_div(depth_, parts), kBlockFloats);
    const int64_t pitch = depth_ * kernels_.columns, part_width = columns_ / parts_;
    ProductTile tile{};
    tile.pitch = pitch;
    tile.bf16 = bf16_;
    tile.order = task.order;
    tile.width = task.width;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first_row = share.first_row + rows * block / blocks;
        const int64_t block_rows = share.first_row + rows * (block + 1) / blocks - first_row;
        const int64_t tiles = ceil_div(block_rows, kernels_.rows);
        const int64_t together = block_rows <= kernels_.few_rows ? 2 : 1;
        tile.runs = task.runs;
        tile.skip = 0;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t begin = depth_ * part / parts;
            tile.depth = depth_ * (part + 1) / parts - begin;
            const int64_t lines = tile.depth * kernels_.columns * element() / kLineBytes;
            for (int64_t panel = share.first_panel, next; panel < share.last_panel; panel = next) {
                const int64_t within = panel % part_panels_;
                next = std::min({panel + together, share.last_panel, panel - within + part_panels_});
                const int64_t column = panel / part_panels_ * part_width + within * kernels_.columns;
                tile.columns = std::min((next - panel) * kernels_.columns, part_width - within * kernels_.columns);
                const char* weights = packed_.get() + (panel * pitch + begin * kernels_.columns) * element();
                tile.panel = weights;
                tile.out = task.out;
                tile.out.data += column;
                tile.start = {tile.out.data, tile.out.sample_stride, tile.out.places};
                if (part == 0) {
                    tile.start = task.start;
                    if (tile.start.data != nullptr) tile.start.data += column;
                }
                // The next panel comes nearer while tiles pass by this one. With a single tile the processor sees to
                // that.
                tile.ahead_lines = tiles > 1 && next < share.last_panel ? lines / tiles : 0;
                tile.ahead = weights + (tile.ahead_lines > 0 ? pitch * element() : 0);
                for (int64_t t = 0; t < tiles; ++t, tile.ahead += tile.ahead_lines * kLineBytes) {
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
    const ProductSplit split(threads, panels(), ceil_div(rows, kernels_.rows));
    run_shared_team(split.across * split.down,
                    [&](int64_t thread) { run_share(task, split.share(thread, rows, panels())); });
}

}  // namespace fastvq::cpu
