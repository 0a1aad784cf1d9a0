// Products of matrices, of which every output is summed in one fixed order.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace fastvq::cpu {

// The left side and the output, as rows (sample, position): row m of `rows` samples times `width` positions.
struct ProductTask {
    std::vector<Run> runs;  // of which a row consists, one after the other
    int64_t samples;
    int64_t width;
    Strided<const float> start;  // what is added to: zeros if null; may be `out`, and nothing else that overlaps it
    Strided<float> out;
};

// The right side, packed once.
//
// out[m][n] = start[m][n] + sum over k of row m[k] * weight[k][n], one multiply-add after the other with ascending k. So
// an output's bits depend on its row, its column of weights and its start alone, not on how many rows there are, nor on
// tiles, threads or the width of vectors: instruction sets whose multiply-adds are fused (`fused`) agree, the others
// round products as well, and agree with each other.
class PackedProduct {
   public:
    // weights: [depth][columns].
    PackedProduct(const float* weights, int64_t depth, int64_t columns, const Kernels& kernels);

    void run(const ProductTask& task, int64_t threads) const;

    int64_t depth() const { return depth_; }
    int64_t columns() const { return columns_; }
    int64_t weight_bytes() const;
    bool fused() const { return kernels_.fused; }

   private:
    struct Share;
    struct Deleter {
        void operator()(float* data) const;
    };
    void run_share(const ProductTask& task, const Share& share) const;

    int64_t depth_, columns_, panels_;
    const ProductKernels& kernels_;
    std::unique_ptr<float[], Deleter> packed_;  // [panels][depth][columns of a panel], zeros behind the last column
};

}  // namespace fastvq::cpu
