// Kernels of the search for nearest codes, for one instruction set.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace fastvq::cpu {
namespace {

typedef double DoubleVector __attribute__((vector_size(FASTVQ_LANES * 8)));
// Of the size of a register: compilers keep larger ones in memory where sums live long.
typedef float HalfFloats __attribute__((vector_size(FASTVQ_LANES * 2)));
typedef double HalfDoubles __attribute__((vector_size(FASTVQ_LANES * 4)));

struct Half {
    uint16_t bits;
};

// The exponent is rebiased by a product, which is right for subnormal numbers too; only infinity and NaN keep theirs.
inline Vector load(const Half* p) {
    const WordVector bits = load_words(&p->bits);
    const Vector scaled = reinterpret_cast<Vector>((bits & 0x7FFF) << 13) * 0x1p112f;
    const WordVector special = reinterpret_cast<WordVector>((bits & 0x7C00) == 0x7C00) & 0x7F800000;
    return reinterpret_cast<Vector>(reinterpret_cast<WordVector>(scaled) | special | ((bits & 0x8000) << 16));
}

// The first `count` lanes; zeros behind them.
template <class T>
inline Vector load_part(const T* p, int64_t count) {
    T padded[kLanes] = {};
    std::memcpy(padded, p, count * sizeof(T));
    return load(padded);
}

template <class T>
inline Vector load_up_to(const T* p, int64_t count) {
    return count >= kLanes ? load(p) : load_part(p, count);
}

// sums += x, the first kLanes / 2 of it and the others.
inline void add_wide(const float* x, HalfDoubles (&sums)[2]) {
    for (int i = 0; i < 2; ++i) {
        HalfFloats part;
        std::memcpy(&part, x + i * (kLanes / 2), sizeof(part));
        sums[i] += __builtin_convertvector(part, HalfDoubles);
    }
}

inline void add_wide(Vector x, HalfDoubles (&sums)[2]) {
    float parts[kLanes];
    store(parts, x);
    add_wide(parts, sums);
}

template <class T>
inline void add_wide(const T* x, HalfDoubles (&sums)[2]) {
    add_wide(load(x), sums);
}

template <class F>
inline auto with_element(Element element, const void* x, F f) {
    switch (element) {
        case Element::kBFloat16:
            return f(static_cast<const uint16_t*>(x));
        case Element::kFloat16:
            return f(static_cast<const Half*>(x));
        default:
            return f(static_cast<const float*>(x));
    }
}

// Lane l of the result: b[l ^ kStep] where l has the bit kStep set, else a[l] (kHigh: b[l], else a[l ^ kStep]).
template <int kStep, bool kHigh, int... kLane>
inline Vector merge(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
    constexpr int kFrom = kHigh ? 0 : kStep, kOther = kHigh ? kStep : 0;
#if defined(__clang__)
    return __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + (kLane ^ kFrom) : (kLane ^ kOther))...);
#else
    return __builtin_shuffle(a, b, IntVector{((kLane & kStep) ? kLanes + (kLane ^ kFrom) : (kLane ^ kOther))...});
#endif
}

// Transposes a square of kLanes vectors by exchanging halves, quarters and so on.
template <int kStep = 1>
inline void transpose(Vector (&v)[kLanes]) {
    if constexpr (kStep < kLanes) {
        using Lanes = std::make_integer_sequence<int, kLanes>;
        for (int i = 0; i < kLanes; ++i) {
            if (i & kStep) continue;
            const Vector a = v[i], b = v[i | kStep];
            v[i] = merge<kStep, false>(a, b, Lanes());
            v[i | kStep] = merge<kStep, true>(a, b, Lanes());
        }
        transpose<2 * kStep>(v);
    }
}

// kLanes values of each of `rows` rows minus shift, transposed: v[i] holds value i of every row.
template <class T>
inline void load_square(const T* x, int64_t stride, int64_t rows, int64_t width, const float* shift,
                        Vector (&v)[kLanes]) {
    const Vector away = load_up_to(shift, width);
    for (int r = 0; r < kLanes; ++r) v[r] = r < rows ? load_up_to(x + r * stride, width) - away : Vector{};
    transpose(v);
}

template <class T>
void pack_rows_of(const T* x, int64_t stride, int64_t rows, int64_t depth, const float* shift, float* panel) {
    for (int64_t part = 0; part < kTileColumns; part += kLanes) {
        for (int64_t d = 0; d < depth; d += kLanes) {
            Vector v[kLanes];
            load_square(x + part * stride + d, stride, rows - part, depth - d, shift + d, v);
            const int64_t wanted = std::min<int64_t>(kLanes, depth - d);
            for (int64_t i = 0; i < wanted; ++i) store(panel + (d + i) * kTileColumns + part, v[i]);
        }
    }
}

void pack_rows(const void* x, Element element, int64_t stride, int64_t rows, int64_t depth, const float* shift,
               float* panel) {
    with_element(element, x, [&](auto* data) { pack_rows_of(data, stride, rows, depth, shift, panel); });
}

void pack_codes(const float* codes, int64_t count, int64_t depth, const float* shift, float* tile, float* half_norms) {
    for (int64_t part = 0; part < kTileRows; part += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, kTileRows - part);
        DoubleVector squares = {};
        for (int64_t d = 0; d < depth; d += kLanes) {
            Vector v[kLanes];
            load_square(codes + part * depth + d, depth, count - part, depth - d, shift + d, v);
            const int64_t wanted = std::min<int64_t>(kLanes, depth - d);
            for (int64_t i = 0; i < wanted; ++i) {
                const Vector negated = -v[i];
                std::memcpy(tile + (d + i) * kTileRows + part, &negated, width * sizeof(float));
                const DoubleVector wide = __builtin_convertvector(v[i], DoubleVector);
                squares += wide * wide;
            }
        }
        for (int64_t c = 0; c < width; ++c) half_norms[part + c] = static_cast<float>(squares[c] / 2);
    }
}

// kTileRows codes times kTileVectors vectors of rows stay in registers over the whole depth, and so do the least scores.
void scan(const float* panel, const float* tiles, const float* start, int64_t depth, int64_t num_tiles, int32_t first,
          float* best, int32_t* index) {
    Vector least[kTileVectors];
    IntVector where[kTileVectors];
    std::memcpy(least, best, sizeof(least));
    std::memcpy(where, index, sizeof(where));
    const float* code = tiles;
    for (int64_t t = 0; t < num_tiles; ++t, start += kTileRows, first += kTileRows) {
        Vector sums[kTileRows][kTileVectors] = {};
        const float* row = panel;
        for (int64_t d = 0; d < depth; ++d, row += kTileColumns, code += kTileRows) {
            Vector x[kTileVectors];
            for (int v = 0; v < kTileVectors; ++v) x[v] = load(row + v * kLanes);
            for (int c = 0; c < kTileRows; ++c) {
                const Vector factor = broadcast(code[c]);
                for (int v = 0; v < kTileVectors; ++v) sums[c][v] = fused(factor, x[v], sums[c][v]);
            }
        }
        for (int c = 0; c < kTileRows; ++c) {
            // Added last: errors of the sum then are those of the product, which is small for vectors near the origin.
            const Vector from = broadcast(start[c]);
            for (int v = 0; v < kTileVectors; ++v) {
                sums[c][v] += from;
                const IntVector less = sums[c][v] < least[v];
                least[v] = less ? sums[c][v] : least[v];
                where[v] = less ? IntVector{} + (first + c) : where[v];
            }
        }
    }
    std::memcpy(best, least, sizeof(least));
    std::memcpy(index, where, sizeof(where));
}

template <class T>
double squared_distances_of(const T* x, int64_t stride, int64_t rows, int64_t depth, const float* codes,
                            const int64_t* index, const uint8_t* mask) {
    HalfDoubles total[2] = {};
    for (int64_t n = 0; n < rows; ++n) {
        if (mask != nullptr && mask[n] == 0) continue;
        const T* row = x + n * stride;
        const float* code = codes + index[n] * depth;
        Vector sum = {};
        int64_t d = 0;
        for (; d + kLanes <= depth; d += kLanes) {
            const Vector gap = load(row + d) - load(code + d);
            sum = fused(gap, gap, sum);
        }
        if (d < depth) {
            const Vector gap = load_part(row + d, depth - d) - load_part(code + d, depth - d);
            sum = fused(gap, gap, sum);
        }
        add_wide(sum, total);
    }
    const HalfDoubles both = total[0] + total[1];
    double result = 0.0;
    for (int i = 0; i < kLanes / 2; ++i) result += both[i];
    return result;
}

double squared_distances(const void* x, Element element, int64_t stride, int64_t rows, int64_t depth,
                         const float* codes, const int64_t* index, const uint8_t* mask) {
    return with_element(element, x, [&](auto* data) {
        return squared_distances_of(data, stride, rows, depth, codes, index, mask);
    });
}

template <class T>
void scatter_rows_of(const T* x, int64_t stride, const int32_t* code, int64_t rows, int64_t depth, int64_t pitch,
                     double* sums, int64_t* counts) {
    for (int64_t n = 0; n < rows; ++n) {
        if (code[n] < 0) continue;
        ++counts[code[n]];
        const T* row = x + n * stride;
        double* sum = sums + code[n] * pitch;
        for (int64_t d = 0; d < depth; d += kLanes) {
            const Vector numbers = d + kLanes <= depth ? load(row + d) : load_part(row + d, depth - d);
            DoubleVector total;
            std::memcpy(&total, sum + d, sizeof(total));
            total += __builtin_convertvector(numbers, DoubleVector);
            std::memcpy(sum + d, &total, sizeof(total));
        }
    }
}

void scatter_rows(const void* x, Element element, int64_t stride, const int32_t* code, int64_t rows, int64_t depth,
                  int64_t pitch, double* sums, int64_t* counts) {
    static_assert(kSumPitch % kLanes == 0);
    with_element(element, x, [&](auto* data) {
        scatter_rows_of(data, stride, code, rows, depth, pitch, sums, counts);
    });
}

// Sums of kVectors vectors of columns stay in registers; with kPart the last of them has only `rest` columns.
template <int kVectors, bool kPart, class T>
void sum_columns(const T* x, int64_t stride, const int64_t* order, int64_t count, int64_t rest, float* sums) {
    constexpr int64_t kLine = 64 / sizeof(T);
    constexpr int kWhole = kPart ? kVectors - 1 : kVectors;
    HalfDoubles total[kVectors][2] = {};
    for (int64_t i = 0; i < count; ++i) {
        const T* ahead = x + order[i + kLookAhead] * stride;
        for (int64_t d = 0; d < kVectors * kLanes; d += kLine) __builtin_prefetch(ahead + d);
        const T* row = x + order[i] * stride;
        for (int v = 0; v < kWhole; ++v) add_wide(row + v * kLanes, total[v]);
        if (kPart) add_wide(load_part(row + kWhole * kLanes, rest), total[kVectors - 1]);
    }
    for (int v = 0; v < kVectors; ++v) {
        float sum[kLanes];
        for (int i = 0; i < 2; ++i) {
            const HalfFloats part = __builtin_convertvector(total[v][i], HalfFloats);
            std::memcpy(sum + i * (kLanes / 2), &part, sizeof(part));
        }
        std::memcpy(sums + v * kLanes, sum, (v < kWhole ? kLanes : rest) * sizeof(float));
    }
}

template <class T>
void sum_rows_of(const T* x, int64_t stride, const int64_t* order, int64_t count, int64_t depth, float* sums) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= depth; d += 4 * kLanes) sum_columns<4, false>(x + d, stride, order, count, 0, sums + d);
    if (d + 2 * kLanes <= depth) {
        sum_columns<2, false>(x + d, stride, order, count, 0, sums + d);
        d += 2 * kLanes;
    }
    if (d + kLanes <= depth) {
        sum_columns<1, false>(x + d, stride, order, count, 0, sums + d);
        d += kLanes;
    }
    if (d < depth) sum_columns<1, true>(x + d, stride, order, count, depth - d, sums + d);
}

void sum_rows(const void* x, Element element, int64_t stride, const int64_t* order, int64_t count, int64_t depth,
              float* sums) {
    with_element(element, x, [&](auto* data) { sum_rows_of(data, stride, order, count, depth, sums); });
}

template <class T>
void add_row(const T* x, int64_t depth, double* sums) {
    for (int64_t d = 0; d < depth; d += kLanes, sums += kLanes) {
        const DoubleVector values = __builtin_convertvector(load_up_to(x + d, depth - d), DoubleVector);
        DoubleVector sum;
        if (depth - d >= kLanes) {
            std::memcpy(&sum, sums, sizeof(sum));
            sum += values;
            std::memcpy(sums, &sum, sizeof(sum));
        } else {
            for (int64_t i = 0; i < depth - d; ++i) sums[i] += values[i];
        }
    }
}

void add(const void* x, Element element, int64_t depth, double* sums) {
    with_element(element, x, [&](auto* data) { add_row(data, depth, sums); });
}

void squares(const float* codes, int64_t count, int64_t depth, const float* shift, double* squares) {
    for (int64_t k = 0; k < count; ++k, codes += depth) {
        HalfDoubles sums[2] = {};
        for (int64_t d = 0; d < depth; d += kLanes) {
            const Vector gap = load_up_to(codes + d, depth - d) - load_up_to(shift + d, depth - d);
            HalfDoubles wide[2] = {};
            add_wide(gap, wide);
            for (int i = 0; i < 2; ++i) sums[i] += wide[i] * wide[i];
        }
        const HalfDoubles both = sums[0] + sums[1];
        squares[k] = 0.0;
        for (int i = 0; i < kLanes / 2; ++i) squares[k] += both[i];
    }
}

static_assert(kTileColumns <= kMostPanelRows, "blocks have room for panels of this size");

constexpr NearestKernels kNearestKernels = {kTileColumns,      kTileRows, pack_rows,    pack_codes, scan,
                                            squared_distances, sum_rows,  scatter_rows, add,        squares};

}  // namespace
}  // namespace fastvq::cpu
