// Codes of several levels, each nearest to what the levels before it left over of a vector.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace fastvq::cpu {

struct ResidualTask {
    const float* x;  // [rows][depth], `stride` elements between rows
    int64_t rows;
    int64_t stride;
    int64_t depth;
    const float* codebooks;    // [levels][num_codes][depth]
    int64_t codebook_stride;   // elements between those of two levels; 0 if all have one
    int64_t levels;
    int64_t num_codes;
    const int64_t* depths;  // [rows], how many levels a vector takes part in; null if in all
    int64_t* indices;       // out, [rows][levels]; -1 at levels that a vector takes no part in
    float* quantized;       // out, [rows][depth], the sum of a vector's codes

    // Statistics; null where they are not wanted.
    int64_t* counts;        // out, [levels][num_codes]; with it sums and squared_errors
    float* sums;            // out, [levels][num_codes][depth]
    float* squared_errors;  // out, [levels]
};

// r_0 = x, and at level q the code is the one that nearest_codes finds for r_q, r_{q+1} = r_q - code. Indices and
// statistics have the bits that nearest_codes gives for r_q, with any number of threads.
//
// A thread takes a block of vectors through all levels while their residuals are in its cache; they never exist for all
// vectors. Sums are added up afterwards, columns by columns, for which residuals are computed a second time.
void residual_codes(const ResidualTask& task, int64_t threads, const Kernels& kernels);

}  // namespace fastvq::cpu
