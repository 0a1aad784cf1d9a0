// Vectors of FASTVQ_LANES floats. Included by one source file per instruction set, each of which defines FASTVQ_LANES and
// FASTVQ_ROWS (rows of a register tile).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastvq::cpu {
namespace {

constexpr int kLanes = FASTVQ_LANES;
constexpr int kTileRows = FASTVQ_ROWS;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;

typedef float Vector __attribute__((vector_size(FASTVQ_LANES * 4)));
typedef int32_t IntVector __attribute__((vector_size(FASTVQ_LANES * 4)));
typedef uint32_t WordVector __attribute__((vector_size(FASTVQ_LANES * 4)));
typedef uint16_t HalfVector __attribute__((vector_size(FASTVQ_LANES * 2)));

inline Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

inline WordVector load_words(const uint16_t* p) {
    HalfVector half;
    std::memcpy(&half, p, sizeof(half));
    return __builtin_convertvector(half, WordVector);
}

// bfloat16
inline Vector load(const uint16_t* p) { return reinterpret_cast<Vector>(load_words(p) << 16); }

inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }

inline Vector broadcast(float x) { return x - Vector{}; }

// a * b + sum. With kFused it is rounded once. The compiler fuses nothing else, so sets of kernels with it agree in bits.
#if defined(__AVX512F__) && FASTVQ_LANES == 16
constexpr bool kFused = true;
inline Vector fused(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
#elif defined(__FMA__) && FASTVQ_LANES == 16
constexpr bool kFused = true;
inline Vector fused(Vector a, Vector b, Vector sum) {
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, sizeof(x));
    std::memcpy(y, &b, sizeof(y));
    std::memcpy(z, &sum, sizeof(z));
    for (int half = 0; half < 2; ++half) z[half] = _mm256_fmadd_ps(x[half], y[half], z[half]);
    std::memcpy(&sum, z, sizeof(z));
    return sum;
}
#elif defined(__FMA__) && FASTVQ_LANES == 8
constexpr bool kFused = true;
inline Vector fused(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
#elif defined(__aarch64__) && FASTVQ_LANES == 4
constexpr bool kFused = true;
inline Vector fused(Vector a, Vector b, Vector sum) {
    return reinterpret_cast<Vector>(vfmaq_f32(reinterpret_cast<float32x4_t>(sum), reinterpret_cast<float32x4_t>(a),
                                              reinterpret_cast<float32x4_t>(b)));
}
#else
constexpr bool kFused = false;
inline Vector fused(Vector a, Vector b, Vector sum) { return sum + a * b; }
#endif

}  // namespace
}  // namespace fastvq::cpu
