#include "cpu/code_table.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastvq::cpu {
namespace {

// Vectors of a block and the codes that pass by share a second-level cache of at least 512 KiB.
constexpr int64_t kBlockBytes = 1 << 17;
constexpr int64_t kCodeBytes = 1 << 18;
// So many blocks keep many threads busy, where there are enough vectors.
constexpr int64_t kWantedBlocks = 64;
// Sums so few stay in a second-level cache in double, and vectors are added to them in the order in which they come, by
// parts. Sorting them by code first takes longer than adding up parts of so many vectors.
constexpr int64_t kMostScattered = 1 << 14;
constexpr int64_t kPartRows = 4096;
constexpr int64_t kLeastParts = 8;
constexpr int64_t kMostParts = 32;
// Of codes that can be told from others: float32 holds their half norm.
constexpr double kLargestSquare = std::numeric_limits<float>::max();

}  // namespace

int64_t search_block_rows(const NearestKernels& kernels, int64_t rows, int64_t depth) {
    const int64_t panel_bytes = kernels.panel_rows * depth * static_cast<int64_t>(sizeof(float));
    const int64_t panels = std::min(kBlockBytes / panel_bytes, rows / (kernels.panel_rows * kWantedBlocks));
    return std::clamp<int64_t>(panels, 1, kLargestBlock) * kernels.panel_rows;
}

int64_t sum_parts(int64_t rows, int64_t num_codes, int64_t depth) {
    const bool few = num_codes * ceil_div(depth, kSumPitch) * kSumPitch <= kMostScattered;
    return few && rows >= kLeastParts * kPartRows ? std::min(rows / kPartRows, kMostParts) : 0;
}

CodeTable::CodeTable(const float* codebook, int64_t num_codes, int64_t depth, const NearestKernels& kernels)
    : codebook_(codebook),
      num_codes_(num_codes),
      depth_(depth),
      kernels_(kernels),
      num_tiles_(ceil_div(num_codes, kernels.tile_codes)),
      centre_(depth),
      tiles_(new float[num_tiles_ * kernels.tile_codes * depth]),
      half_norms_(new float[num_tiles_ * kernels.tile_codes]) {}

// The mean m of the codes that are not longer than 2 r, r being the length of the second shortest code; zeros if that
// would cost accuracy. An error matters between two codes only, and the longer of any two has at least length r, so
// everything is measured by max(|c|, r), and longer codes have no say. The error of a score is that of its product, some
// u |x - m| |c - m|, and without a centre at most u (|x| + |c|)^2 / 4. If |m| |c - m| <= max(|c|, r)^2 / 4 for all codes,
// a centre leaves it about there. Of the shortest code that is not asked if |c| <= r / 4: vectors half-way to another one
// are too far from the origin to be harmed.
void CodeTable::find_centre(double* scratch) {
    double *squares = scratch, *centred = squares + num_codes_, *total = centred + num_codes_;
    std::fill(total, total + depth_, 0.0);
    kernels_.squares(codebook_, num_codes_, depth_, centre_.data(), squares);
    double least = kLargestSquare, second = kLargestSquare;
    int64_t shortest = -1;
    for (int64_t k = 0; k < num_codes_; ++k) {
        if (!(squares[k] < second)) continue;
        second = std::max(least, squares[k]);
        if (squares[k] < least) {
            least = squares[k];
            shortest = k;
        }
    }
    const double limit = std::min(4 * second, kLargestSquare);
    int64_t count = 0;
    for (int64_t k = 0; k < num_codes_; ++k) {
        if (!(squares[k] <= limit)) continue;
        ++count;
        kernels_.add(codebook_ + k * depth_, Element::kFloat32, depth_, total);
    }
    double square = 0.0;
    for (int64_t d = 0; d < depth_; ++d) {
        centre_[d] = static_cast<float>(total[d] / static_cast<double>(std::max<int64_t>(count, 1)));
        square += static_cast<double>(centre_[d]) * centre_[d];
    }
    kernels_.squares(codebook_, num_codes_, depth_, centre_.data(), centred);
    for (int64_t k = 0; k < num_codes_; ++k) {
        if (!(squares[k] <= kLargestSquare) || (k == shortest && 16 * least <= second)) continue;
        const double length = std::max(squares[k], second);
        if (16 * square * centred[k] > length * length) {
            std::fill(centre_.begin(), centre_.end(), 0.0f);
            return;
        }
    }
}

// Negated, so that a score is a sum. A code that is not finite has an infinite half norm or NaN, and so its scores, which
// are never the least; the same holds for those that fill up the last tile.
void CodeTable::pack(int64_t begin, int64_t end) {
    const int64_t width = kernels_.tile_codes;
    for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * width, present = std::min(width, num_codes_ - first);
        float* norms = half_norms_.get() + first;
        kernels_.pack_codes(codebook_ + first * depth_, present, depth_, centre_.data(), tiles_.get() + first * depth_,
                            norms);
        std::fill(norms + present, norms + width, std::numeric_limits<float>::infinity());
    }
}

void CodeTable::search(const void* x, Element element, int64_t stride, int64_t rows, float* panels,
                       int32_t* found) const {
    const int64_t width = kernels_.panel_rows, used = ceil_div(rows, width);
    const int64_t tile_size = kernels_.tile_codes * depth_;
    const int64_t size = element == Element::kFloat32 ? 4 : 2;
    float best[kLargestBlock * kMostPanelRows];
    int32_t index[kLargestBlock * kMostPanelRows];
    std::fill(best, best + used * width, std::numeric_limits<float>::infinity());
    std::fill(index, index + used * width, -1);
    for (int64_t p = 0; p < used; ++p) {
        kernels_.pack_rows(static_cast<const char*>(x) + p * width * stride * size, element, stride, rows - p * width,
                           depth_, centre_.data(), panels + p * width * depth_);
    }
    const int64_t step = std::max<int64_t>(1, kCodeBytes / (tile_size * static_cast<int64_t>(sizeof(float))));
    for (int64_t t = 0; t < num_tiles_; t += step) {
        for (int64_t p = 0; p < used; ++p) {
            kernels_.scan(panels + p * width * depth_, tiles_.get() + t * tile_size,
                          half_norms_.get() + t * kernels_.tile_codes, depth_, std::min(step, num_tiles_ - t),
                          static_cast<int32_t>(t * kernels_.tile_codes), best + p * width, index + p * width);
        }
    }
    for (int64_t i = 0; i < rows; ++i) found[i] = std::isfinite(best[i]) ? index[i] : -1;
}

}  // namespace fastvq::cpu
