// Kernels of products whose rows are gathered, for one instruction set.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace fastvq::cpu {
namespace {

// Rows so few that the sums of one panel would wait for each other.
constexpr int kFewRows = kTileRows / 3;

// Whether there is nothing to add to any row.
template <int kRows>
bool all_zeros(const Run& run, const int64_t* places) {
    if (run.zeros < 0) return false;
    for (int m = 0; m < kRows; ++m) {
        if (run.rows.places[places[m]] != run.zeros) return false;
    }
    return true;
}

// Bits depend neither on kRows nor on kPanels: every output has a lane of its own and takes its products one after the
// other.
template <class Weight, int kRows, int kPanels>
void gathered_tile(const ProductTile& t) {
    constexpr int kVectors = kPanels * kTileVectors, kColumns = kPanels * kTileColumns;
    int64_t samples[kRows], places[kRows];
    for (int64_t m = 0, sample = t.sample, position = t.position; m < kRows; ++m) {
        samples[m] = sample;
        places[m] = t.order[position];
        if (++position == t.width) {
            position = 0;
            ++sample;
        }
    }
    for (int64_t line = 0; line < t.ahead_lines; ++line) {
        __builtin_prefetch(t.ahead + line * kLineFloats * static_cast<int64_t>(sizeof(float)));
    }
    // Outputs of different rows lie far apart, and a store that misses the caches holds up others.
    for (int m = 0; m < kRows; ++m) {
        const float* out = t.out.at(samples[m], places[m]);
        for (int64_t n = 0; n < t.columns; n += kLineFloats) __builtin_prefetch(out + n, 1);
    }
    Vector sums[kRows][kVectors];
    for (int m = 0; m < kRows; ++m) {
        float padded[kColumns] = {};
        const float* start = padded;
        if (t.start.data != nullptr) {
            start = t.start.at(samples[m], places[m]);
            if (t.columns < kColumns) {
                std::memcpy(padded, start, t.columns * sizeof(float));
                start = padded;
            }
        }
        for (int v = 0; v < kVectors; ++v) sums[m][v] = load(start + v * kLanes);
    }
    const auto* panel = static_cast<const Weight*>(t.panel);
    const Run* run = t.runs;
    for (int64_t left = t.depth, skip = t.skip; left > 0; ++run, skip = 0) {
        const int64_t length = std::min(run->length - skip, left);
        left -= length;
        if (all_zeros<kRows>(*run, places)) {
            panel += length * kTileColumns;
            continue;
        }
        const float* rows[kRows];
        for (int m = 0; m < kRows; ++m) rows[m] = run->rows.at(samples[m], places[m]) + skip;
        for (int64_t k = 0; k < length; ++k, panel += kTileColumns) {
            Vector weights[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                weights[v] = load(panel + v / kTileVectors * t.pitch + v % kTileVectors * kLanes);
            }
            for (int m = 0; m < kRows; ++m) {
                const Vector x = broadcast(rows[m][k]);
                for (int v = 0; v < kVectors; ++v) sums[m][v] = fused(x, weights[v], sums[m][v]);
            }
        }
    }
    for (int m = 0; m < kRows; ++m) {
        float* out = t.out.at(samples[m], places[m]);
        if (t.columns >= kColumns) {
            for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, sums[m][v]);
        } else {
            float padded[kColumns];
            for (int v = 0; v < kVectors; ++v) store(padded + v * kLanes, sums[m][v]);
            std::memcpy(out, padded, t.columns * sizeof(float));
        }
    }
}

template <class Weight, int kRows>
void gathered_tile_of(const ProductTile& t) {
    if constexpr (kRows > 0) {
        if (t.rows != kRows) return gathered_tile_of<Weight, kRows - 1>(t);
        if constexpr (kRows <= kFewRows) {
            if (t.columns > kTileColumns) return gathered_tile<Weight, kRows, 2>(t);
        }
        gathered_tile<Weight, kRows, 1>(t);
    }
}

void gathered(const ProductTile& t) {
    if (t.bf16) {
        gathered_tile_of<uint16_t, kTileRows>(t);
    } else {
        gathered_tile_of<float, kTileRows>(t);
    }
}

constexpr ProductKernels kProductKernels = {kTileRows, kFewRows, kTileColumns, kFused, gathered};

}  // namespace
}  // namespace fastvq::cpu
