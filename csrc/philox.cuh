// Rounding a float32 result to the weight's type: to nearest, or stochastically from Philox4x32-10 (Salmon et al., SC
// 2011). The bits of an element follow from seed, step, parameter and place alone (rsaft_fast/ops/philox.py).
#pragma once

#include "numeric.cuh"
#include "rsaft.h"

namespace rsaft {

// What is rounded: the two purposes draw from streams of their own.
enum { RSAFT_PERTURBATION = 0, RSAFT_UPDATE = 1 };

struct Words {
    uint32_t v[4];
};

RSAFT_HD uint32_t high_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __umulhi(a, b);
#else
    return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
#endif
}

RSAFT_HD Words philox(Words c, uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        constexpr uint32_t M0 = 0xd2511f53u, M1 = 0xcd9e8d57u;
        const uint32_t high0 = high_product(M0, c.v[0]), high1 = high_product(M1, c.v[2]);
        c = {{high1 ^ c.v[1] ^ k0, M1 * c.v[2], high0 ^ c.v[3] ^ k1, M0 * c.v[0]}};
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c;
}

// Element k of a pack takes half k & 1 of word k >> 1. Selected, not indexed: k is not always known to the compiler.
RSAFT_HD uint32_t random16(const Words &words, int k) {
    const uint32_t word = k & 4 ? (k & 2 ? words.v[3] : words.v[2]) : (k & 2 ? words.v[1] : words.v[0]);
    return k & 1 ? word >> 16 : word & 0xffffu;
}

// Up with the probability of the part cut off.
RSAFT_HD bf16 round_stochastically(float x, uint32_t bits16) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return from_float<bf16>(x);
    return {static_cast<uint16_t>((bits + bits16) >> 16)};
}

template <bool STOCHASTIC> struct Rounding {
    struct Drawn {};
    RSAFT_HD static Rounding of(const rsaft_table &, int, int64_t, double, int) { return {}; }
    RSAFT_HD Drawn draw(int) const { return {}; }
    template <class W> RSAFT_HD static W round(float x, const Drawn &, int) { return from_float<W>(x); }
};

template <> struct Rounding<true> {
    using Drawn = Words;
    int64_t start; // element, within its tensor, from which draw() counts; a multiple of VECTOR
    uint64_t seed;
    uint32_t parameter, step_and_purpose;

    RSAFT_HD static Rounding of(const rsaft_table &t, int tensor, int64_t start, double step, int purpose) {
        return {start, t.seed, static_cast<uint32_t>(t.parameter[tensor]),
                static_cast<uint32_t>(2 * static_cast<uint64_t>(step) + purpose)};
    }
    // The bits of the pack that element i is in.
    RSAFT_HD Words draw(int i) const {
        const uint64_t pack = static_cast<uint64_t>(start + i) / VECTOR;
        return philox({{static_cast<uint32_t>(pack), static_cast<uint32_t>(pack >> 32), parameter, step_and_purpose}},
                      seed);
    }
    template <class W> RSAFT_HD static W round(float x, const Words &words, int k) {
        return round_stochastically(x, random16(words, k % VECTOR));
    }
};

} // namespace rsaft
