// The 8-bit codes of optimizer state (bitsandbytes' dynamic map), in closed form: rsaft_fast/ops/quantize.py explains it,
// and these are its float32 operations in its order, so that codes agree to the bit.
#pragma once

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

// Where decade j ends and j + 1 begins.
template <bool SIGNED> RSAFT_HD constexpr float decade_limit(int j) {
    constexpr double POWER[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1};
    return static_cast<float>(POWER[j] * (1 + 0.9 / (1 << (SIGNED ? j : j + 1))));
}

// The code nearest to a fraction x of the absmax, |x| <= 1. Three comparisons find the decade out of seven.
template <bool SIGNED> RSAFT_HD uint32_t encode(float x) {
    constexpr float L0 = decade_limit<SIGNED>(0), L1 = decade_limit<SIGNED>(1), L2 = decade_limit<SIGNED>(2),
                    L3 = decade_limit<SIGNED>(3), L4 = decade_limit<SIGNED>(4), L5 = decade_limit<SIGNED>(5);
    constexpr float ZERO = static_cast<float>(0.5e-6 * (0.1 + (SIGNED ? 0.45 : 0.225)));
    constexpr float ONE = static_cast<float>(1 - 0.225 / (SIGNED ? 64 : 128));
    const float a = bits_float(float_bits(x) & 0x7fffffffu);
    const bool bit2 = a >= L3, bit1 = a >= (bit2 ? L5 : L1);
    const bool bit0 = !(bit2 && bit1) && a >= (bit2 ? L4 : bit1 ? L2 : L0);
    // 10^(6 - decade); the products are exact.
    const float power = (bit2 ? (bit1 ? 1.0f : 1e2f) : bit1 ? 1e4f : 1e6f) * (bit0 ? 0.1f : 1.0f);
    const float steps = (bit2 ? 16.0f : 1.0f) * (bit1 ? 4.0f : 1.0f) * (bit0 ? 2.0f : 1.0f) * (SIGNED ? 1.0f : 2.0f);
    float f = ((a * power - 0.1f) * static_cast<float>(1 / 0.9)) * steps;
    f = f > 0.0f ? f : 0.0f;
    f = f < steps - 1.0f ? f : steps - 1.0f;
#if defined(__CUDA_ARCH__)
    // Cut to an integer by an addition: conversions run at a fraction of its rate.
    const uint32_t q = float_bits(__fadd_rz(f, 8388608.0f + steps)) & 0xffu;
#else
    const uint32_t q = static_cast<uint32_t>(f) + static_cast<uint32_t>(steps);
#endif
    uint32_t code = !SIGNED ? q - 1 : x < 0.0f ? 127 - q : 127 + q;
    code = a < ZERO ? (SIGNED ? 127 : 0) : code;
    return x >= ONE ? 255 : code;
}

RSAFT_HD float inverse_of(float absmax) { return absmax >= SMALLEST_ABSMAX ? 1.0f / absmax : 0.0f; }

} // namespace rsaft
