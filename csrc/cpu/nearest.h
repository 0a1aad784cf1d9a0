// Nearest codes of vectors, and statistics of the assignment.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace fastvq::cpu {

struct NearestTask {
    const void* x;  // [rows][depth], `stride` elements between rows
    Element element;
    int64_t rows;
    int64_t stride;
    int64_t depth;
    const float* codebook;  // [num_codes][depth]
    int64_t num_codes;
    int64_t* indices;  // out, [rows]

    // Statistics; null where they are not wanted.
    const uint8_t* mask;  // [rows], 0 for vectors that are left out of all statistics; null for none
    int64_t* counts;      // out, [num_codes]; with it sums and squared_error
    float* sums;          // out, [num_codes][depth]
    float* squared_error;  // out, one value
};

// indices[n] is the code k of least |c_k|^2 / 2 - x_n.c_k, both shifted by a centre of the codes where that helps: the
// lowest k among equal scores. Its squared distance exceeds the least by at most 16 u (|x| + |c|)^2, u = 2^-24, c being
// the longer of the code found and the nearest (sqrt(depth) instead of 16 beyond a depth of 256), for lengths from about
// 1e-18 to 1e18. Codes that are not finite are never chosen; a vector without a finite score has index 0, does not
// count, and is not summed.
//
// The matrix of scores never exists: a thread takes a block of vectors, and keeps the least scores while codes pass by.
// Results do not depend on the number of threads: scores of a vector are computed by one thread, and every element of
// the sums, accumulated in double, is owned by one thread that adds the vectors in their order.
void nearest_codes(const NearestTask& task, int64_t threads, const Kernels& kernels);

}  // namespace fastvq::cpu
