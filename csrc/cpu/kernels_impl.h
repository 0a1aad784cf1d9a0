// Kernels of the step phase. Included by one source file per instruction set, each of which defines FASTVQ_LANES,
// FASTVQ_ROWS (rows of a register tile), FASTVQ_KERNELS and FASTVQ_NAME (the table's variable and name).
#include <cstring>

#include "cpu/attend_impl.h"
#include "cpu/elementwise_impl.h"
#include "cpu/kernels.h"
#include "cpu/nearest_impl.h"
#include "cpu/product_impl.h"
#include "cpu/vectors.h"

namespace fastvq::cpu {
namespace {

// kRows samples times kTileColumns channels, accumulated in registers.
template <int kRows, class Weight>
void tile(const Product& product, const Weight* panel, int64_t row, int64_t column, int64_t width) {
    Vector sums[kRows][kTileVectors];
    const float* start = product.start + row * product.start_stride + column;
    if (width >= kTileColumns) {
        for (int m = 0; m < kRows; ++m) {
            for (int v = 0; v < kTileVectors; ++v) sums[m][v] = load(start + m * product.start_stride + v * kLanes);
        }
    } else {
        for (int m = 0; m < kRows; ++m) {
            float padded[kTileColumns] = {};
            std::memcpy(padded, start + m * product.start_stride, width * sizeof(float));
            for (int v = 0; v < kTileVectors; ++v) sums[m][v] = load(padded + v * kLanes);
        }
    }
    for (int64_t s = 0; s < product.num_segments; ++s) {
        const int64_t stride = product.segments[s].stride;
        const float* data = product.segments[s].data + row * stride;
        for (int64_t k = 0; k < product.segments[s].depth; ++k, panel += kPanel) {
            Vector weights[kTileVectors];
            for (int v = 0; v < kTileVectors; ++v) weights[v] = load(panel + v * kLanes);
            for (int m = 0; m < kRows; ++m) {
                const Vector x = broadcast(data[m * stride + k]);
                for (int v = 0; v < kTileVectors; ++v) sums[m][v] = fused(x, weights[v], sums[m][v]);
            }
        }
    }
    float* out = product.out + row * product.out_stride + column;
    for (int m = 0; m < kRows; ++m, out += product.out_stride) {
        if (width >= kTileColumns) {
            for (int v = 0; v < kTileVectors; ++v) store(out + v * kLanes, sums[m][v]);
        } else {
            float padded[kTileColumns];
            for (int v = 0; v < kTileVectors; ++v) store(padded + v * kLanes, sums[m][v]);
            std::memcpy(out, padded, width * sizeof(float));
        }
    }
}

template <class Weight, int kRows>
void tile_of(int64_t rows, const Product& product, const Weight* panel, int64_t row, int64_t column, int64_t width) {
    if constexpr (kRows > 0) {
        if (rows == kRows) {
            tile<kRows, Weight>(product, panel, row, column, width);
        } else {
            tile_of<Weight, kRows - 1>(rows, product, panel, row, column, width);
        }
    }
}

template <class Weight>
void multiply(const Product& product) {
    const auto* weights = static_cast<const Weight*>(product.weights);
    // Tiles of nearly equal height: one of 12 rows and one of 1 would take as long as two of 12.
    const int64_t tiles = (product.rows + kTileRows - 1) / kTileRows;
    for (int64_t p = 0; p < product.num_panels; ++p, weights += product.depth * kPanel) {
        for (int64_t part = 0; part < product.widths[p]; part += kTileColumns) {
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t first = product.rows * t / tiles, last = product.rows * (t + 1) / tiles;
                tile_of<Weight, kTileRows>(last - first, product, weights + part, first, product.columns[p] + part,
                                           product.widths[p] - part);
            }
        }
    }
}

void product(const Product& p) {
    if (p.bf16) {
        multiply<uint16_t>(p);
    } else {
        multiply<float>(p);
    }
}

}  // namespace

extern const Kernels FASTVQ_KERNELS;
const Kernels FASTVQ_KERNELS = {FASTVQ_NAME, product,    apply_elu,  apply_elu_negated, apply_relu,
                                apply_add,   apply_glu,  apply_tanh, attend,            kNearestKernels,
                                kProductKernels};

}  // namespace fastvq::cpu
