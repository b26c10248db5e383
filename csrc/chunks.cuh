// The walk over a table: a block a chunk, packs by whole warps first where every list is 16-byte aligned, then single
// elements.
//
// An operation is a struct with
//     span(table, chunk)         what this chunk needs, read once a block; returns false to leave the chunk alone
//     at<N>(span, i, sums)       elements i to i + N - 1, N = VECTOR (aligned) or 1
//     finish(chunk, sums)        by one thread, with the block's sums
//     BLOCKS                     how many shall fit a multiprocessor at once: registers are limited to that
// On the host the same struct runs thread by thread with the same additions in the same order: tests compile the
// kernels for the CPU and run them on real tables.
#pragma once

#include "numeric.cuh"
#include "rsaft.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace rsaft {

constexpr int THREADS = 512, WARP = 32;

struct Span {
    int chunk, tensor;
    int64_t start; // first element of the chunk within its tensor
    int count;     // elements of the chunk
};

RSAFT_HD Span span_of(const rsaft_table &t, int chunk) {
    const int tensor = t.chunk_tensor[chunk];
    const int64_t start = static_cast<int64_t>(t.chunk_index[chunk]) * t.chunk_size;
    const int64_t left = t.numel[tensor] - start;
    return {chunk, tensor, start, static_cast<int>(left < t.chunk_size ? left : t.chunk_size)};
}

RSAFT_HD int64_t address_of(const rsaft_table &t, int list, int tensor) {
    return t.addresses[static_cast<int64_t>(list) * t.tensors + tensor];
}

RSAFT_HD int64_t gradient_of(const rsaft_table &t, int tensor) {
    return t.gradient ? t.gradient : address_of(t, RSAFT_GRAD, tensor);
}

// Chunks are multiples of 16 bytes, so the base addresses decide alignment.
template <class T> RSAFT_HD T *element(int64_t address, int64_t start) {
    return reinterpret_cast<T *>(static_cast<uintptr_t>(address)) + start;
}

template <int N> struct Sums {
    float v[N > 0 ? N : 1];
};

// One thread's share of a chunk.
template <class Op>
RSAFT_HD void walk(const Op &op, const typename Op::Here &here, int count, bool aligned, int thread,
                   Sums<Op::SUMS> &sums) {
    // Packs by whole warps: store_pack wants them.
    const int whole = aligned ? count / (WARP * VECTOR) * (WARP * VECTOR) : 0;
    for (int i = thread * VECTOR; i < whole; i += THREADS * VECTOR) op.template at<VECTOR>(here, i, sums);
    // The rest is short or rare: unrolling it would only cost registers.
#pragma unroll 1
    for (int i = whole + thread; i < count; i += THREADS) op.template at<1>(here, i, sums);
}

#if defined(__CUDACC__)

// Adds the threads' sums in a fixed tree; thread 0 has the result.
template <int N> __device__ __forceinline__ void block_sum(Sums<N> &sums) {
    __shared__ float partial[N][THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float x = sums.v[n];
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
        if (lane == 0) partial[n][warp] = x;
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float x = lane < THREADS / 32 ? partial[n][lane] : 0.0f;
#pragma unroll
            for (int offset = THREADS / 64; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
            sums.v[n] = x;
        }
    }
}

template <class Op>
__global__ void __launch_bounds__(THREADS, Op::BLOCKS) over_chunks(const rsaft_table t, const Op op) {
    const int chunk = op.chunk_of(blockIdx.x, t.chunks);
    const Span span = span_of(t, chunk);
    typename Op::Here here;
    Sums<Op::SUMS> sums{};
    const bool works = op.begin(t, span, here);
    if (works) walk(op, here, here.count, here.aligned, threadIdx.x, sums);
    if constexpr (Op::SUMS > 0) {
        block_sum<Op::SUMS>(sums);
        if (threadIdx.x == 0) op.finish(t, span, sums);
    }
}

template <class Op> int launch(const rsaft_table &t, const Op &op, void *stream) {
    if (t.chunks == 0) return 0;
    over_chunks<<<t.chunks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(t, op);
    return cudaGetLastError();
}

#else

template <int N> void block_sum(Sums<N> (&threads)[THREADS]) {
    for (int n = 0; n < N; ++n) {
        float warps[THREADS / 32];
        for (int warp = 0; warp < THREADS / 32; ++warp) {
            float lanes[32];
            for (int lane = 0; lane < 32; ++lane) lanes[lane] = threads[warp * 32 + lane].v[n];
            for (int offset = 16; offset > 0; offset /= 2)
                for (int lane = 0; lane < offset; ++lane) lanes[lane] += lanes[lane + offset];
            warps[warp] = lanes[0];
        }
        for (int offset = THREADS / 64; offset > 0; offset /= 2)
            for (int warp = 0; warp < offset; ++warp) warps[warp] += warps[warp + offset];
        threads[0].v[n] = warps[0];
    }
}

template <class Op> int launch(const rsaft_table &t, const Op &op, void *) {
    for (int block = 0; block < t.chunks; ++block) {
        const Span span = span_of(t, op.chunk_of(block, t.chunks));
        typename Op::Here here{};
        static Sums<Op::SUMS> sums[THREADS];
        const bool works = op.begin(t, span, here);
        for (int thread = 0; thread < THREADS; ++thread) {
            sums[thread] = {};
            if (works) walk(op, here, here.count, here.aligned, thread, sums[thread]);
        }
        if constexpr (Op::SUMS > 0) {
            block_sum<Op::SUMS>(sums);
            op.finish(t, span, sums[0]);
        }
    }
    return 0;
}

#endif

constexpr int INVALID = 1; // cudaErrorInvalidValue

// Calls f with a value of the element type that `dtype` names.
template <class F> int with_type(int dtype, F f) {
    if (dtype == RSAFT_F32) return f(float{});
    if (dtype == RSAFT_BF16) return f(bf16{});
    if (dtype == RSAFT_F16) return f(f16{});
    return INVALID;
}

inline bool is_valid(const rsaft_table *t) {
    return t != nullptr && t->tensors >= 0 && t->chunks >= 0 && t->chunk_size > 0 && t->chunk_size % 256 == 0 &&
           t->addresses != nullptr && t->numel != nullptr && t->group != nullptr &&
           (t->chunks == 0 || (t->chunk_tensor != nullptr && t->chunk_index != nullptr));
}

inline bool has_master(const rsaft_table &t) { return t.dtypes[RSAFT_MASTER] != RSAFT_ABSENT; }

// A master is float32 beside 16-bit weights, a backup of the weight's type.
inline bool can_restore(const rsaft_table &t) {
    if (!has_master(t)) return t.dtypes[RSAFT_BACKUP] == t.dtypes[RSAFT_WEIGHT];
    return t.dtypes[RSAFT_MASTER] == RSAFT_F32 && t.dtypes[RSAFT_WEIGHT] != RSAFT_F32;
}

// Only bf16 weights without master are rounded stochastically.
inline bool can_round(const rsaft_table &t) {
    return !t.stochastic || (t.dtypes[RSAFT_WEIGHT] == RSAFT_BF16 && !has_master(t) && t.parameter != nullptr);
}

} // namespace rsaft
