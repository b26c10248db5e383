// Element types and 16-byte packs, the same on device and host: tests compile this for the CPU and hold it to float64.
#pragma once

#include <cmath>
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

// A pack as 32-bit words, two elements of 16 bits in each: taken apart and put together in half the instructions that
// it takes element by element.
template <class T> struct alignas(alignof(Pack<T>)) Words32 {
    uint32_t v[sizeof(Pack<T>) / 4];
};

template <class T> RSAFT_HD Words32<T> words_of(const Pack<T> &x) {
    Words32<T> words;
    memcpy(words.v, x.v, sizeof words.v);
    return words;
}

template <class T> RSAFT_HD Pack<T> as_pack(const Words32<T> &words) {
    Pack<T> x;
    memcpy(x.v, words.v, sizeof words.v);
    return x;
}

// Four bytes of the eight in (low, high): byte k is the one that hexadecimal digit k of `selector` numbers, 8 more: its
// sign, 0 or 0xff.
RSAFT_HD uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, selector);
#else
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    uint32_t out = 0;
    for (int k = 0; k < 4; ++k) {
        const uint32_t digit = selector >> 4 * k & 15, byte = static_cast<uint32_t>(both >> 8 * (digit & 7)) & 0xffu;
        out |= (digit & 8 ? (byte & 0x80u ? 0xffu : 0u) : byte) << 8 * k;
    }
    return out;
#endif
}

template <class T> RSAFT_HD Pack<float> to_floats(const Pack<T> &x) {
    Pack<float> out;
    if constexpr (std::is_same_v<T, bf16>) {
        const Words32<T> words = words_of(x);
#pragma unroll
        for (int k = 0; k < VECTOR; k += 2) {
            out.v[k] = bits_float(words.v[k / 2] << 16);
            out.v[k + 1] = bits_float(words.v[k / 2] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) out.v[k] = to_float(x.v[k]);
    }
    return out;
}

// Round to nearest even.
template <class T> RSAFT_HD Pack<T> from_floats(const Pack<float> &x) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, bf16>) { // two a conversion, which runs at a fraction of an addition's rate
        Words32<T> words;
#pragma unroll
        for (int k = 0; k < VECTOR; k += 2)
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words.v[k / 2]) : "f"(x.v[k + 1]), "f"(x.v[k]));
        return as_pack(words);
    } else
#endif
    {
        Pack<T> out;
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) out.v[k] = from_float<T>(x.v[k]);
        return out;
    }
}

// Addresses come from a table: without the hint the compiler issues generic accesses.
template <class T> RSAFT_HD void assume_global([[maybe_unused]] const T *p) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(p));
#endif
}

// Keeps a list's address in registers of the thread. What is the same for all threads the compiler would hold
// elsewhere, and take several instructions an access to add what is not.
template <class T> RSAFT_HD void hold([[maybe_unused]] T *&p) {
#if defined(__CUDA_ARCH__)
    asm("" : "+l"(p));
#endif
}

template <class T> RSAFT_HD Pack<T> load_pack(const T *p) {
    assume_global(p);
    return *reinterpret_cast<const Pack<T> *>(p);
}

template <class T> RSAFT_HD T load_one(const T *p) {
    assume_global(p);
    return *p;
}

template <class T> RSAFT_HD void store_one(T *p, T x) {
    assume_global(p);
    *p = x;
}

#if defined(__CUDA_ARCH__)
// In PTX, for the compiler takes a store of selected words apart into four of 4 bytes.
template <bool ONCE, class T> __device__ __forceinline__ void store_16(T *p, const uint4 &x) {
    const size_t at = __cvta_generic_to_global(p);
    if constexpr (ONCE)
        asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                     : "memory");
    else
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                     : "memory");
}

__device__ __forceinline__ uint4 of_neighbour(const uint4 &x) {
    return {__shfl_xor_sync(~0u, x.x, 1), __shfl_xor_sync(~0u, x.y, 1), __shfl_xor_sync(~0u, x.z, 1),
            __shfl_xor_sync(~0u, x.w, 1)};
}

// Word by word: a conditional between two structs selects an address, and puts both of them into local memory.
__device__ __forceinline__ uint4 select(bool first, const uint4 &a, const uint4 &b) {
    return {first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w};
}

// A pack of floats is two 16-byte stores, and a lane's own two halves lie side by side: each store of the warp would
// write half of every 32-byte sector, and the L2 take twice the writes. So two lanes exchange halves, and together
// write whole ones. The warp must be complete, and its lanes' packs consecutive. It waits until all of its lanes have
// read: what is written may be, elsewhere, what a neighbour reads (a backup in the gradient's memory).
template <bool ONCE> __device__ __forceinline__ void store_paired(float *p, const Pack<float> &x) {
    const bool odd = threadIdx.x & 1;
    const uint4 *halves = reinterpret_cast<const uint4 *>(&x);
    const uint4 low = halves[0], high = halves[1], other = of_neighbour(select(odd, low, high));
    __syncwarp();
    store_16<ONCE>(p - (odd ? 4 : 0), select(odd, other, low));
    store_16<ONCE>(p + (odd ? 4 : 8), select(odd, high, other));
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

// A pack as it is. Of floats a lane may copy other elements than its own, and no lane needs its neighbour's.
template <class T> RSAFT_HD void copy_pack(T *to, const T *from) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, float>) {
        const int lane = threadIdx.x % 32;
        assume_global(from);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // From the lane's pack to its four elements of this half of the warp's.
            const int at = 128 * half - 4 * lane;
            store_16<false>(to + at, *reinterpret_cast<const uint4 *>(from + at));
        }
        return;
    }
#endif
    store_pack(to, load_pack(from));
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
