// The 8-bit codes of optimizer state (bitsandbytes' dynamic map). rsaft_fast/abi/quantize.py explains it in closed
// form; here that form, its float32 operations in its order, is evaluated by the compiler, and the kernels look up what
// came out: codes agree to the bit.
#pragma once

#include "numeric.cuh"

namespace rsaft {

constexpr int BLOCK = 256; // elements that share an absmax
constexpr int CODES = 256;
constexpr float SMALLEST_ABSMAX = 1.17549435e-38f; // below it the reciprocal would overflow

// float_bits and bits_float for the compiler, which may not copy memory: of magnitudes from 2^-126 to 1.
constexpr float float_of(uint32_t bits) {
    float x = 1.0f + static_cast<float>(bits & 0x7fffffu) / 8388608.0f;
    for (uint32_t exponent = bits >> 23; exponent < 127; ++exponent) x /= 2.0f;
    return x;
}

constexpr uint32_t bits_of(float magnitude) {
    if (magnitude == 0.0f) return 0;
    uint32_t exponent = 127;
    for (; magnitude < 1.0f; --exponent) magnitude *= 2.0f;
    return (exponent << 23) + static_cast<uint32_t>((magnitude - 1.0f) * 8388608.0f);
}

// The fraction of the absmax that q stands for, q = |code - 127| (signed) or code + 1, not the last: 0 < q < 128 (256).
template <bool SIGNED> constexpr float value_of(int q) {
    int n = 0; // q = 2^n + f
    while (q >> (n + 1)) ++n;
    const int d = (SIGNED ? 6 : 7) - n;
    const float part = static_cast<float>(2 * q + 1) / static_cast<float>(2 << n) - 1.0f; // (f + 0.5) / 2^n
    const float power = (d & 1 ? 0.1f : 1.0f) * (d & 2 ? 0.01f : 1.0f) * (d & 4 ? 1e-4f : 1.0f);
    return power * (0.1f + 0.9f * part);
}

// The fraction of the absmax that a code stands for, as bits.
template <bool SIGNED> constexpr uint32_t decoded(int code) {
    if (code == (SIGNED ? 127 : 0)) return 0;
    if (code == 255) return bits_of(1.0f);
    if (!SIGNED) return bits_of(value_of<false>(code + 1));
    return code < 127 ? 0x80000000u | bits_of(value_of<true>(127 - code)) : bits_of(value_of<true>(code - 127));
}

// How far from zero's code the code of a magnitude a <= 1 is; the last, of 1, is 128 (signed) or 255.
template <bool SIGNED> constexpr int distance_of(float a) {
    constexpr double END[] = {1e-6 * (1 + 0.9 / (SIGNED ? 1 : 2)),
                              1e-5 * (1 + 0.9 / (SIGNED ? 2 : 4)),
                              1e-4 * (1 + 0.9 / (SIGNED ? 4 : 8)),
                              1e-3 * (1 + 0.9 / (SIGNED ? 8 : 16)),
                              1e-2 * (1 + 0.9 / (SIGNED ? 16 : 32)),
                              1e-1 * (1 + 0.9 / (SIGNED ? 32 : 64))};
    constexpr float POWER[] = {1e6f, 1e5f, 1e4f, 1e3f, 1e2f, 1e1f, 1.0f};
    if (a < static_cast<float>(0.5e-6 * (0.1 + (SIGNED ? 0.45 : 0.225)))) return 0;
    if (a >= static_cast<float>(1 - 0.225 / (SIGNED ? 64 : 128))) return SIGNED ? 128 : 255;
    int decade = 0;
    for (const double end : END) decade += a >= static_cast<float>(end);
    const int steps = 1 << (decade + !SIGNED);
    const float f = (a * POWER[decade] - 0.1f) * static_cast<float>(1 / 0.9) * static_cast<float>(steps);
    return steps + (f < 0.0f ? 0 : f < static_cast<float>(steps) ? static_cast<int>(f) : steps - 1) - !SIGNED;
}

// Magnitudes are told apart by cells of 2^16 neighbouring floats, 128 in a binade, from 2^-23 to 1: narrow enough that
// at most one code begins in each. A cell's entry, added to the bits of a magnitude in it, carries where that code
// begins, and has the code in byte 2. Cells are numbered by twelve bits of a float, so that no bit pattern leads out of
// the array; the numbers of what is below 2^-23 are not needed for cells, and hold the values of the codes.
constexpr int CELLS = 4096, CELL_BITS = 16;
constexpr uint32_t FIRST_CELL = 0x3400, LAST_CELL = 0x3f80; // upper halves of 2^-23 and of 1
constexpr uint32_t NEVER = 0xffffffffu;
// 2^-23. All that is no larger rounds to zero; and so does a NaN, which would not know its cell.
constexpr float LEAST_FRACTION = 1.1920929e-7f;

// Bits of the smallest magnitude whose code is this far from zero's.
template <bool SIGNED> constexpr uint32_t begin_of(int distance) {
    uint32_t low = FIRST_CELL << CELL_BITS, high = LAST_CELL << CELL_BITS;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (distance_of<SIGNED>(float_of(middle)) >= distance) high = middle;
        else low = middle + 1;
    }
    return low;
}

template <bool SIGNED> constexpr void fill(uint32_t (&book)[CELLS]) {
    for (int code = 0; code < CODES; ++code) book[code] = decoded<SIGNED>(code);
    constexpr uint32_t ZERO = SIGNED ? 127 : 0, ONE = CODES - 1;
    uint32_t code = ZERO, next = begin_of<SIGNED>(1);
    for (uint32_t cell = FIRST_CELL; cell <= LAST_CELL; ++cell) {
        uint32_t begins = 0;
        if (next >> CELL_BITS == cell) {
            begins = next - (cell << CELL_BITS);
            ++code;
            next = code < ONE ? begin_of<SIGNED>(static_cast<int>(code - ZERO + 1)) : NEVER;
        }
        book[cell % CELLS] = (code << CELL_BITS) - begins - (cell << CELL_BITS);
    }
}

struct alignas(16) Codebook {
    uint32_t exp_avg[CELLS], exp_avg_sq[CELLS];
};

constexpr Codebook codebook() {
    Codebook book{};
    fill<true>(book.exp_avg);
    fill<false>(book.exp_avg_sq);
    return book;
}

// In the kernels' memory; each block copies it into shared memory.
#if defined(__CUDACC__)
__device__
#endif
constexpr Codebook CODEBOOK = codebook();

// Eight codes, four a word from first to last: never single bytes, which the compiler would pull apart one by one.
using CodeWords = Words32<uint8_t>;

// Their values.
RSAFT_HD Pack<float> decode(const CodeWords &codes, float absmax, const uint32_t (&book)[CELLS]) {
    Pack<float> out;
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) out.v[k] = bits_float(book[codes.v[k / 4] >> 8 * (k % 4) & 0xffu]) * absmax;
    return out;
}

// The codes nearest to eight fractions of the absmax, value * inverse, in [-1, 1] or [0, 1].
template <bool SIGNED>
RSAFT_HD CodeWords encode(const Pack<float> &values, float inverse, const uint32_t (&book)[CELLS]) {
    CodeWords words;
#pragma unroll
    for (int first = 0; first < VECTOR; first += 4) {
        uint32_t x[4], code[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float fraction = values.v[first + k] * inverse;
            // Only +1 has a code of its own: -1 takes that of what is just short of it.
            if (SIGNED) fraction = fraction > -0.996f ? fraction : -0.996f;
            x[k] = float_bits(fraction);
            const float a = fabsf(fraction) > LEAST_FRACTION ? fabsf(fraction) : LEAST_FRACTION;
            code[k] = book[float_bits(a) >> CELL_BITS & (CELLS - 1)] + float_bits(a);
        }
        uint32_t codes = bytes_of(bytes_of(code[0], code[1], 0x62), bytes_of(code[2], code[3], 0x62), 0x5410);
        if (SIGNED) { // 254 - code where the sign is set, four at once
            const uint32_t minus = bytes_of(bytes_of(x[0], x[1], 0xfb), bytes_of(x[2], x[3], 0xfb), 0x5410);
            codes = (codes + (minus & 0x01010101u)) ^ minus;
        }
        words.v[first / 4] = codes;
    }
    return words;
}

// 0 for a subnormal absmax, whose reciprocal would overflow.
RSAFT_HD float inverse_of(float absmax) {
#if defined(__CUDA_ARCH__)
    // What a division does between 2^-126 and 2^126, without a look at its other operand.
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(absmax));
    inverse = __fmaf_rn(inverse, __fmaf_rn(-absmax, inverse, 1.0f), inverse);
    if (float_bits(absmax) - 0x00800000u < 0x7e000000u) return inverse;
#endif
    return absmax >= SMALLEST_ABSMAX ? 1.0f / absmax : 0.0f;
}

} // namespace rsaft
