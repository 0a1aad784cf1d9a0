// The codes of a codebook, ready to be searched.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace fastvq::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Multiply-adds that take longer than making a thread does.
constexpr double kLeastSearchWork = 1 << 22;
// Most panels of a block.
constexpr int64_t kLargestBlock = 8;

// How many vectors a thread searches for at a time. The same whatever the number of threads, because errors are summed
// block by block.
int64_t search_block_rows(const NearestKernels& kernels, int64_t rows, int64_t depth);

// In how many parts the sums of vectors are added up, each in double, where sums are so few that a second-level cache
// holds them: parts are of fixed number whatever the number of threads, because they are summed one by one. 0 where
// vectors of a code are added to one sum in their order. Part p begins at vector rows * p / parts.
int64_t sum_parts(int64_t rows, int64_t num_codes, int64_t depth);

class CodeTable {
   public:
    // codebook: [num_codes][depth].
    CodeTable(const float* codebook, int64_t num_codes, int64_t depth, const NearestKernels& kernels);

    // First by one thread. scratch: 2 * num_codes + depth numbers.
    void find_centre(double* scratch);

    // Then by any, each some of the tiles.
    void pack(int64_t begin, int64_t end);
    int64_t num_tiles() const { return num_tiles_; }

    // found[n] = the code nearest to vector n as nearest.h says, -1 where no code has a finite score. panels: work space
    // of as many whole panels as there are vectors; at most kLargestBlock.
    void search(const void* x, Element element, int64_t stride, int64_t rows, float* panels, int32_t* found) const;

   private:
    const float* codebook_;
    int64_t num_codes_, depth_;
    const NearestKernels& kernels_;
    int64_t num_tiles_;
    std::vector<float> centre_;
    std::unique_ptr<float[]> tiles_, half_norms_;
};

}  // namespace fastvq::cpu
