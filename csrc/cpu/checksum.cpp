#include "cpu/checksum.h"

#include <cstring>

namespace fastvq::cpu {
namespace {

// Bytes that are read at a time, the numbers in them, and how many such strips have keys of their own: as many as leave
// room in the first cache.
constexpr int64_t kStrip = 256;
constexpr int64_t kNumbers = kStrip / 4;
constexpr int64_t kStrips = 32;

constexpr uint64_t mix(uint64_t x) {  // MurmurHash3's finalizer
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDu;
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53u;
    return x ^ (x >> 33);
}

struct Keys {
    uint32_t values[kStrips][kNumbers];
    constexpr Keys() : values() {
        for (int64_t i = 0; i < kStrips * kNumbers; ++i) {
            values[i / kNumbers][i % kNumbers] = static_cast<uint32_t>(mix(static_cast<uint64_t>(i) + 1));
        }
    }
};

constexpr Keys kKeys;

// The hash NH (Black et al. 1999, "UMAC"): products of 32-bit numbers, of which every instruction set makes several at a
// time. Sums of words times weights would be faster still, and blind to what floats of few digits trade places.
uint64_t sum_of_products(const unsigned char* strip, const uint32_t* keys) {
    constexpr int64_t kPairs = kNumbers / 2;
    uint64_t sum = 0;
    for (int64_t i = 0; i < kPairs; ++i) {
        uint32_t one, other;
        std::memcpy(&one, strip + 4 * i, 4);
        std::memcpy(&other, strip + 4 * (kPairs + i), 4);
        sum += static_cast<uint64_t>(one + keys[i]) * (other + keys[kPairs + i]);
    }
    return sum;
}

// Weights are rarely in a near cache when a call begins. Addresses past the end do no harm.
void fetch_ahead(const unsigned char* strip) {
#if defined(__GNUC__)
    for (int64_t line = 0; line < kStrip; line += 64) __builtin_prefetch(strip + 2048 + line);
#else
    static_cast<void>(strip);
#endif
}

}  // namespace

uint64_t checksum(const Bytes* blocks, int64_t count) {
    uint64_t total = 0, pieces = 0;
    for (const Bytes* block = blocks; block != blocks + count; ++block) {
        for (int64_t at = 0; at < block->count;) {
            uint64_t sum = 0;
            for (int64_t i = 0; i < kStrips && at < block->count; ++i, at += kStrip) {
                const unsigned char* strip = block->data + at;
                unsigned char rest[kStrip];
                if (block->count - at < kStrip) {
                    std::memset(rest, 0, kStrip);
                    std::memcpy(rest, strip, block->count - at);
                    strip = rest;
                } else {
                    fetch_ahead(strip);
                }
                sum += sum_of_products(strip, kKeys.values[i]);
            }
            total += mix(sum + mix(++pieces));
        }
    }
    return total;
}

}  // namespace fastvq::cpu
