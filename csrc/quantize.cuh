// The 8-bit codes of optimizer state (bitsandbytes' dynamic map), in closed form: rsaft_fast/ops/quantize.py explains
// it, and these are its float32 operations in its order, so that codes agree to the bit.
#pragma once

#include <cmath>

#include "numeric.cuh"

namespace rsaft {

constexpr int BLOCK = 256; // elements that share an absmax
constexpr int CODES = 256;
constexpr float SMALLEST_ABSMAX = 1.17549435e-38f; // below it the reciprocal would overflow

// The fraction of the absmax that a code stands for.
template <bool SIGNED> RSAFT_HD float decode(int code) {
    if (code == 255) return 1.0f;
    if (code == (SIGNED ? 127 : 0)) return 0.0f;
    const int q = !SIGNED ? code + 1 : code < 127 ? 127 - code : code - 127;
    // 2q + 1 = 2^(n + 1) (1 + (f + 0.5) / 2^n) for q = 2^n + f: exponent and mantissa are what is wanted, exactly.
    const uint32_t bits = float_bits(static_cast<float>(2 * q + 1));
    const int n = static_cast<int>(bits >> 23) - 128, d = (SIGNED ? 6 : 7) - n;
    const float part = bits_float((bits & 0x7fffffu) | 0x3f800000u) - 1.0f;
    const float power = (d & 1 ? 0.1f : 1.0f) * (d & 2 ? 0.01f : 1.0f) * (d & 4 ? 1e-4f : 1.0f);
    const float value = power * (0.1f + 0.9f * part);
    return SIGNED && code < 127 ? -value : value;
}

// A magnitude is on one of nine levels: 0 rounds to zero, 1 to 7 are the decades, 8 rounds to one. Where level j ends:
template <bool SIGNED> RSAFT_HD float level_end(int level) {
    constexpr double END[] = {0.5e-6 * (0.1 + (SIGNED ? 0.45 : 0.225)),
                              1e-6 * (1 + 0.9 / (SIGNED ? 1 : 2)),
                              1e-5 * (1 + 0.9 / (SIGNED ? 2 : 4)),
                              1e-4 * (1 + 0.9 / (SIGNED ? 4 : 8)),
                              1e-3 * (1 + 0.9 / (SIGNED ? 8 : 16)),
                              1e-2 * (1 + 0.9 / (SIGNED ? 16 : 32)),
                              1e-1 * (1 + 0.9 / (SIGNED ? 32 : 64)),
                              1 - 0.225 / (SIGNED ? 64 : 128)};
    return static_cast<float>(END[level]);
}

// What the magnitudes of one binade are encoded by. Levels are wider than three binades, so one may end in it, and the
// next begins there, with twice the steps.
struct alignas(16) Binade {
    float end;          // of the level that the binade begins on; infinite where it does not end here
    float power, above; // 10^(6 - decade) on that level and on the next
    float steps;        // (1 / 0.9) 2^n on that level
};

// The last level's power only has to bring [end, 1] into its first step; level 0's, everything below it.
RSAFT_HD float power_of(int level) {
    constexpr float POWER[] = {0.0f, 1e6f, 1e5f, 1e4f, 1e3f, 1e2f, 1e1f, 1.0f, 0.102f};
    return POWER[level];
}

constexpr int BINADES = 128; // up to 1

template <bool SIGNED> RSAFT_HD Binade binade(int exponent) {
    const float begin = bits_float(static_cast<uint32_t>(exponent) << 23), end = bits_float((exponent + 1u) << 23);
    int level = 0;
    float ends = bits_float(0x7f800000u);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float limit = level_end<SIGNED>(j);
        level += begin >= limit;
        ends = begin < limit && limit < end ? limit : ends;
    }
    const float steps = bits_float(static_cast<uint32_t>(126 + level + !SIGNED) << 23);
    return {ends, power_of(level), power_of(level < 8 ? level + 1 : 8), static_cast<float>(1 / 0.9) * steps};
}

RSAFT_HD float add_towards_zero(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rz(a, b);
#else
    const double sum = static_cast<double>(a) + b;
    const float nearest = static_cast<float>(sum);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafterf(nearest, 0.0f) : nearest;
#endif
}

// The code nearest to a fraction x of the absmax, |x| <= 1, in its low byte.
template <bool SIGNED> RSAFT_HD uint32_t encode(float x, const Binade *binades) {
    // Only +1 has a code of its own: -1 goes the way of what is just short of it, to the same code as ever.
    if (SIGNED) x = x > -0.996f ? x : -0.996f;
    const float a = SIGNED ? fabsf(x) : x;
    // Without the exponent's highest bit: no x, were it NaN, leads out of the table.
    const Binade row = binades[float_bits(x) >> 23 & (BINADES - 1)];
    const bool above = a >= row.end;
    const float power = above ? row.above : row.power, scale = above ? row.steps + row.steps : row.steps;
    const float f = (a * power - 0.1f) * scale;
    // q = 2^n + f cut to an integer, short of 2^(n + 1): 2^n is the scale without its mantissa, the other with a
    // full one.
    const float steps = bits_float(float_bits(scale) & 0xff800000u), most = bits_float(float_bits(scale) | 0x7fffffu);
    // Cut by additions that round towards zero: conversions run at a fraction of their rate.
    const float sum = add_towards_zero(f, steps), q = sum < most ? sum : most;
    if (!SIGNED) return float_bits(add_towards_zero(q > 1.0f ? q : 1.0f, 8388607.0f));
    const uint32_t whole = float_bits(add_towards_zero(q, 8388608.0f));
    return x < 0.0f ? 127 - whole : 127 + whole;
}

RSAFT_HD float inverse_of(float absmax) { return absmax >= SMALLEST_ABSMAX ? 1.0f / absmax : 0.0f; }

} // namespace rsaft
