// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011, section 3.3).
// Included once per instruction set.

#include "common/host_device.h"

namespace dd::DD_ISA {

DD_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
DD_HOST_DEVICE uint32_t high_word(uint64_t product) { return static_cast<uint32_t>(product >> 32); }
DD_HOST_DEVICE uint32_t low_word(uint64_t product) { return static_cast<uint32_t>(product); }

// Turns a counter c[0..3] into four random words, in place. Word is uint32_t, or a vector type for
// which wide_product, high_word and low_word are overloaded.
template <class Word>
DD_HOST_DEVICE void philox4x32_10(Word c[4], uint32_t key0, uint32_t key1) {
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        auto product0 = wide_product(c[0], 0xD2511F53u);
        auto product1 = wide_product(c[2], 0xCD9E8D57u);
        c[0] = high_word(product1) ^ c[1] ^ key0;
        c[2] = high_word(product0) ^ c[3] ^ key1;
        c[1] = low_word(product1);
        c[3] = low_word(product0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

}  // namespace dd::DD_ISA
