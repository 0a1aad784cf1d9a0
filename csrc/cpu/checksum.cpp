#include "cpu/checksum.h"

#include <algorithm>
#include <cstring>

namespace fastvq::cpu {
namespace {

// Words that share a table of keys, which stays in the first cache.
constexpr int64_t kWords = 1024;

constexpr uint64_t mix(uint64_t x) {  // MurmurHash3's finalizer
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDu;
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53u;
    return x ^ (x >> 33);
}

struct Keys {
    uint32_t low[kWords];
    uint32_t high[kWords];
    constexpr Keys() : low(), high() {
        for (int64_t i = 0; i < kWords; ++i) {
            const uint64_t key = mix(static_cast<uint64_t>(i) + 1);
            low[i] = static_cast<uint32_t>(key);
            high[i] = static_cast<uint32_t>(key >> 32);
        }
    }
};

constexpr Keys kKeys;

// The hash NH (Black et al. 1999, "UMAC"): products of 32-bit numbers, of which every instruction set makes several at a
// time. Sums of words times weights would be faster still, and blind to what floats of few digits trade places.
uint64_t sum_of_products(const unsigned char* data, int64_t words) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < words; ++i) {
        uint64_t word;
        std::memcpy(&word, data + 8 * i, 8);
        const uint32_t low = static_cast<uint32_t>(word) + kKeys.low[i];
        const uint32_t high = static_cast<uint32_t>(word >> 32) + kKeys.high[i];
        sum += static_cast<uint64_t>(low) * high;
    }
    return sum;
}

}  // namespace

uint64_t checksum(const Bytes* blocks, int64_t count) {
    uint64_t total = 0, pieces = 0;
    for (const Bytes* block = blocks; block != blocks + count; ++block) {
        int64_t at = 0;
        for (int64_t words; (words = std::min(kWords, (block->count - at) / 8)) > 0; at += 8 * words) {
            total += mix(sum_of_products(block->data + at, words) + mix(++pieces));
        }
        unsigned char rest[8] = {};
        if (at < block->count) std::memcpy(rest, block->data + at, block->count - at);
        total += mix(sum_of_products(rest, 1) + mix(++pieces));
    }
    return total;
}

}  // namespace fastvq::cpu
