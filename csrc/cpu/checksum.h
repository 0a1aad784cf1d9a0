// A checksum of memory in which every position counts differently.
#pragma once

#include <cstdint>

namespace fastvq::cpu {

struct Bytes {
    const unsigned char* data;
    int64_t count;
};

// Of all blocks, one after the other. Blocks of the same sizes with other contents, also with the same in another order,
// have the same checksum with probability 2^-32 unless made for it.
uint64_t checksum(const Bytes* blocks, int64_t count);

}  // namespace fastvq::cpu
