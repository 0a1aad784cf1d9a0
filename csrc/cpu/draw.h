// Draws codes from logits by inverse CDF, at uniform numbers given by the caller.
#pragma once

#include <cstdint>
#include <vector>

namespace fastvq::cpu {

struct DrawOptions {
    float temperature;  // positive, normal
    int64_t top_k;      // codes kept by rank, 1..num_codes; num_codes keeps all
    float top_p;        // in (0, 1]; 1 keeps all
};

// Work space for rows of up to num_codes codes, made once and used for any number of rows by one thread at a time.
struct DrawScratch {
    explicit DrawScratch(int64_t num_codes) : weights(num_codes), order(num_codes) {}

    std::vector<float> weights;
    std::vector<int32_t> order;
};

// Writes tokens[i] for each row logits[i * num_codes .. (i + 1) * num_codes) and uniforms[i].
//
// Definition, in float32: weight w[k] = exp((logit[k] - max) / temperature), 0 for codes that top-k or top-p leave out.
// c[k] is the sum of w[0..k], accumulated in double and rounded to float32 at every k, which is what PyTorch's cumsum
// does on a CPU. The token is the first k with c[k] > u * c[last]. A code of weight 0 is never drawn, because c does not
// grow there.
//
// Returns -1, or the first row that cannot be drawn: a NaN or +inf logit, every logit -inf, or a uniform outside [0, 1).
// The tokens of that row and of later ones are not written.
int64_t draw_rows(const float* logits, const float* uniforms, int64_t rows, int64_t num_codes,
                  const DrawOptions& options, DrawScratch& scratch, int64_t* tokens);

}  // namespace fastvq::cpu
