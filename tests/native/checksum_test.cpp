// The checksum of memory: every byte counts, nothing else is read.
#include <set>
#include <vector>

#include "check.h"
#include "cpu/checksum.h"
#include "tests.h"

namespace fastvq::cpu::testing {

void test_checksum() {
    Random random(1);
    for (const int64_t size : {1, 7, 8, 9, 64, 8191, 8192, 8193, 8200, 20001}) {
        // In memory of exactly its size.
        std::vector<unsigned char> data(size);
        for (unsigned char& byte : data) byte = static_cast<unsigned char>(random.below(256));
        const unsigned char other[3] = {1, 2, 3};
        const auto now = [&] {
            const Bytes blocks[] = {{other, 3}, {data.data(), size}, {nullptr, 0}};
            return checksum(blocks, 3);
        };
        const uint64_t first = now();
        expect(now() == first, "checksum of ", size, " bytes: not the same twice");
        std::set<uint64_t> seen = {first};
        const int64_t step = size < 100 ? 1 : size / 97;
        for (int64_t place = size - 1; place >= 0; place -= step) {
            data[place] ^= 0x80;
            expect(seen.insert(now()).second, "checksum of ", size, " bytes: byte ", place, " does not count");
            data[place] ^= 0x80;
        }
    }
    expect(checksum(nullptr, 0) == 0, "checksum of nothing");
}

}  // namespace fastvq::cpu::testing
