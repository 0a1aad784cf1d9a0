// Products of matrices, of which every output is summed in one fixed order.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace fastvq::cpu {

// The left side and the output: a row for each of some places of every sample.
struct ProductTask {
    const Run* runs;  // of which a row consists, one after the other
    int64_t samples;
    const int32_t* order;  // the places of a sample, numbered as in tables of places
    int64_t width;         // how many
    Placed<const float> start;  // what is added to: zeros without data; may be `out`, and nothing else that overlaps it
    Placed<float> out;
};

// A rectangle of a product: rows, and panels of columns.
struct ProductShare {
    int64_t first_row, last_row;
    int64_t first_panel, last_panel;
};

// Threads in columns and rows of a grid: so that the one with the most has the least, and reads few weights.
struct ProductSplit {
    int64_t across, down;

    ProductSplit(int64_t threads, int64_t panels, int64_t tiles);
    // What of some rows and panels a thread has; nothing for those beyond the grid.
    ProductShare share(int64_t thread, int64_t rows, int64_t panels) const;
};

// The right side, packed once.
//
// out[m][n] = start[m][n] + sum over k of row m[k] * weight[k][n], one multiply-add after the other with ascending k. So
// an output's bits depend on its row, its column of weights and its start alone, not on how many rows there are, nor on
// tiles, threads or the width of vectors: instruction sets whose multiply-adds are fused (`fused`) agree, the others
// round products as well, and agree with each other.
class PackedProduct {
   public:
    // weights: matrices [depth][columns], of which the depths add up. Columns come in `parts` equal parts, each of which
    // begins a panel. bf16: keep the upper halves of weights, rounded.
    struct Matrix {
        const float* weights;
        int64_t depth;
    };
    PackedProduct(const std::vector<Matrix>& matrices, int64_t columns, int64_t parts, bool bf16,
                  const Kernels& kernels);

    void run(const ProductTask& task, int64_t threads) const;
    void run_share(const ProductTask& task, const ProductShare& share) const;

    int64_t depth() const { return depth_; }
    int64_t columns() const { return columns_; }
    int64_t panels() const { return parts_ * part_panels_; }
    int64_t part_panels() const { return part_panels_; }
    int64_t weight_bytes() const;
    bool fused() const { return kernels_.fused; }

   private:
    struct Deleter {
        void operator()(char* data) const;
    };
    int64_t element() const { return bf16_ ? 2 : 4; }

    int64_t depth_, columns_, parts_, part_panels_;
    bool bf16_;
    const ProductKernels& kernels_;
    std::unique_ptr<char[], Deleter> packed_;  // [panels][depth][columns of a panel], zeros behind a part's last column
};

}  // namespace fastvq::cpu
