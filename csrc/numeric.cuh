// Element types and 16-byte packs, the same on device and host: tests compile this for the CPU and hold it to float64.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define RSAFT_HD __host__ __device__ __forceinline__
#else
#define RSAFT_HD inline
#endif

namespace rsaft {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

RSAFT_HD uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

RSAFT_HD float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

RSAFT_HD float to_float(float x) { return x; }
RSAFT_HD float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
RSAFT_HD float to_float(f16 x) {
#if defined(__CUDACC__)
    __half_raw raw;
    raw.x = x.bits;
    return __half2float(__half(raw));
#else
    _Float16 half;
    memcpy(&half, &x.bits, sizeof half);
    return static_cast<float>(half);
#endif
}

// Round to nearest even.
template <class T> RSAFT_HD T from_float(float x);
template <> RSAFT_HD float from_float<float>(float x) { return x; }
template <> RSAFT_HD bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__)
    // One instruction instead of six; it differs in the payload of a NaN alone.
    bf16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
#else
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}
template <> RSAFT_HD f16 from_float<f16>(float x) {
#if defined(__CUDACC__)
    return {__half_raw(__float2half_rn(x)).x};
#else
    const _Float16 half = static_cast<_Float16>(x);
    f16 out;
    memcpy(&out.bits, &half, sizeof half);
    return out;
#endif
}

// A thread works on VECTOR elements at a time: one 16-byte access in 16-bit types, two in float32, 8 bytes of codes.
constexpr int VECTOR = 8;

template <class T> struct alignas(sizeof(T) == 1 ? 8 : 16) Pack {
    T v[VECTOR];
};

// Addresses come from a table: without the hint the compiler issues generic accesses.
template <class T> RSAFT_HD void assume_global([[maybe_unused]] const T *p) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(p));
#endif
}

template <class T> RSAFT_HD Pack<T> load_pack(const T *p) {
    assume_global(p);
    return *reinterpret_cast<const Pack<T> *>(p);
}

#if defined(__CUDA_ARCH__)
template <bool ONCE, class T> __device__ __forceinline__ void store_16(T *p, const uint4 &x) {
    assume_global(p);
    if constexpr (ONCE) __stcs(reinterpret_cast<uint4 *>(p), x);
    else *reinterpret_cast<uint4 *>(p) = x;
}

__device__ __forceinline__ uint4 of_neighbour(const uint4 &x) {
    return {__shfl_xor_sync(~0u, x.x, 1), __shfl_xor_sync(~0u, x.y, 1), __shfl_xor_sync(~0u, x.z, 1),
            __shfl_xor_sync(~0u, x.w, 1)};
}

// A pack of floats is two 16-byte stores, and a lane's own two halves lie side by side: each store of the warp would write
// half of every 32-byte sector, and the L2 take twice the writes. So two lanes exchange halves, and together write whole
// ones. The warp must be complete, and its lanes' packs consecutive. It waits until all of its lanes have read: what is
// written may be, elsewhere, what a neighbour reads (a backup in the gradient's memory).
template <bool ONCE> __device__ __forceinline__ void store_paired(float *p, const Pack<float> &x) {
    const bool odd = threadIdx.x & 1;
    const uint4 *halves = reinterpret_cast<const uint4 *>(&x);
    const uint4 low = halves[0], high = halves[1], other = of_neighbour(odd ? low : high);
    __syncwarp();
    store_16<ONCE>(odd ? p - 4 : p, odd ? other : low);
    store_16<ONCE>(odd ? p + 4 : p + 8, odd ? high : other);
}
#endif

// By whole warps, lane after lane: what walk() and Place see to.
template <class T> RSAFT_HD void store_pack(T *p, const Pack<T> &x) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, float>) {
        store_paired<false>(p, x);
        return;
    }
#endif
    assume_global(p);
    *reinterpret_cast<Pack<T> *>(p) = x;
}

// The same for memory that is not touched again soon: it leaves the L2 first, and what will be read again stays.
template <class T> RSAFT_HD Pack<T> load_pack_once(const T *p) {
#if defined(__CUDA_ARCH__)
    Pack<T> x;
#pragma unroll
    for (unsigned i = 0; i < sizeof x / sizeof(uint4); ++i)
        reinterpret_cast<uint4 *>(&x)[i] = __ldcs(reinterpret_cast<const uint4 *>(p) + i);
    return x;
#else
    return load_pack(p);
#endif
}

template <class T> RSAFT_HD void store_pack_once(T *p, const Pack<T> &x) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, float>) store_paired<true>(p, x);
    else store_16<true>(p, *reinterpret_cast<const uint4 *>(&x));
#else
    store_pack(p, x);
#endif
}

} // namespace rsaft
