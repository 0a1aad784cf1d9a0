// The moving averages that a codebook consists of.
#pragma once

#include <cstdint>

namespace fastvq::cpu {

struct EmaTask {
    // [num_codes], how many vectors each code has got; one of the two is null.
    const int64_t* counts;
    const float* float_counts;
    const float* sums;  // [num_codes][depth], the sum of these vectors
    int64_t num_codes;
    int64_t depth;
    float* cluster_size;   // in and out, [num_codes]
    float* embedding_sum;  // in and out, [num_codes][depth]
    float* embedding;      // out, [num_codes][depth]
    double decay;
    double eps;
    bool skip_unusable;
};

// With N the cluster sizes, m the sums and e the codes: N_k = decay N_k + (1 - decay) counts_k, m likewise, and
// e_k = m_k / ((N_k + eps) / (N + num_codes eps) N), N without an index being the total. Where that is not positive codes
// keep their place. With skip_unusable nothing happens if a sum is not finite or the counts' total is not positive.
// Results do not depend on the number of threads.
void ema_update(const EmaTask& task, int64_t threads);

}  // namespace fastvq::cpu
