// Rounding a float32 result to the weight's type: to nearest, or stochastically from Philox4x32-10 (Salmon et al., SC
// 2011). The bits of an element follow from seed, step, parameter and place alone (rsaft_fast/abi/philox.py).
#pragma once

#include "numeric.cuh"
#include "rsaft.h"

namespace rsaft {

// What is rounded: the two purposes draw from streams of their own.
enum { RSAFT_PERTURBATION = 0, RSAFT_UPDATE = 1 };

struct Words {
    uint32_t v[4];
};

// The key of each round. They follow from the seed alone: made once on the host, so that a round reads its own from the
// launch's parameters instead of adding them up for every pack.
struct RoundKeys {
    uint32_t v[10][2];
};

inline RoundKeys round_keys(uint64_t seed) {
    RoundKeys keys;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (auto &round : keys.v) {
        round[0] = k0, round[1] = k1;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return keys;
}

RSAFT_HD Words philox(Words c, const RoundKeys &keys) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        // Both halves of a product by one multiplication.
        const uint64_t p0 = static_cast<uint64_t>(0xd2511f53u) * c.v[0];
        const uint64_t p1 = static_cast<uint64_t>(0xcd9e8d57u) * c.v[2];
        c = {{static_cast<uint32_t>(p1 >> 32) ^ c.v[1] ^ keys.v[round][0], static_cast<uint32_t>(p1),
              static_cast<uint32_t>(p0 >> 32) ^ c.v[3] ^ keys.v[round][1], static_cast<uint32_t>(p0)}};
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

// Eight at once: an infinity stays one under any addition below 2^16, so that a NaN alone is looked for. The GPU's
// arithmetic knows one NaN, 0x7fffffff, the largest of all integers; the smaller one stays a NaN under the addition.
RSAFT_HD Pack<bf16> round_stochastically(const Pack<float> &x, const Words &random) {
#if defined(__CUDA_ARCH__)
    Words32<bf16> out;
#pragma unroll
    for (int k = 0; k < VECTOR; k += 2) {
        const int low = min(__float_as_int(x.v[k]), 0x7fff0000), high = min(__float_as_int(x.v[k + 1]), 0x7fff0000);
        out.v[k / 2] = bytes_of(low + (random.v[k / 2] & 0xffffu), high + (random.v[k / 2] >> 16), 0x7632);
    }
    return as_pack(out);
#else
    Pack<bf16> out;
    for (int k = 0; k < VECTOR; ++k) out.v[k] = round_stochastically(x.v[k], random16(random, k));
    return out;
#endif
}

template <bool STOCHASTIC> struct Rounding {
    struct Keys {};
    struct Drawn {};
    static Keys keys_of(const rsaft_table &) { return {}; }
    RSAFT_HD static Rounding of(const rsaft_table &, int, int64_t, double, int) { return {}; }
    RSAFT_HD Drawn draw(int, const Keys &) const { return {}; }
    template <class W> RSAFT_HD static W round(float x, const Drawn &, int) { return from_float<W>(x); }
    template <class W> RSAFT_HD static Pack<W> round(const Pack<float> &x, const Drawn &) { return from_floats<W>(x); }
};

template <> struct Rounding<true> {
    using Keys = RoundKeys;
    using Drawn = Words;
    uint32_t low, high; // pack of eight elements, within its tensor, from which draw() counts
    uint32_t parameter, step_and_purpose;

    static Keys keys_of(const rsaft_table &t) { return round_keys(t.seed); }
    // `start`, an element within its tensor, is a multiple of VECTOR.
    RSAFT_HD static Rounding of(const rsaft_table &t, int tensor, int64_t start, double step, int purpose) {
        const uint64_t first = static_cast<uint64_t>(start) / VECTOR;
        return {static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32),
                static_cast<uint32_t>(t.parameter[tensor]),
                static_cast<uint32_t>(2 * static_cast<uint64_t>(step) + purpose)};
    }
    // The bits of the pack that element i is in.
    RSAFT_HD Words draw(int i, const Keys &keys) const {
        const uint32_t pack = low + static_cast<uint32_t>(i) / VECTOR;
        return philox({{pack, high + (pack < low), parameter, step_and_purpose}}, keys);
    }
    template <class W> RSAFT_HD static W round(float x, const Words &words, int k) {
        return round_stochastically(x, random16(words, k % VECTOR));
    }
    template <class W> RSAFT_HD static Pack<W> round(const Pack<float> &x, const Words &words) {
        return round_stochastically(x, words);
    }
};

} // namespace rsaft
