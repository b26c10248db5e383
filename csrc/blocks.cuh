// The second walk over a table: a warp a quantisation block, so that what its elements share is a warp's reduction.
//
// An operation is a struct with
//     begin(table, chunk, here)      what this chunk needs; returns false to leave the chunk alone
//     updates(here)                  false: the chunk is restored, by undo<N>(here, i, none), as walk() calls it
//     update<WHOLE>(here, book, ...) a lane's elements of a block; returns the lane's largest
//     finish<WHOLE>(here, book, ...) the same lane again, with the block's largest
// WHOLE: all 256 elements are there and every list is aligned to its pack. On the host a warp is its 32 lanes in turn,
// first all updates, then the rest: maxima do not depend on the order.
#pragma once

#include "chunks.cuh"
#include "quantize.cuh"

namespace rsaft {

static_assert(WARP * VECTOR == BLOCK, "a warp's lanes hold a block of elements, a pack each");

// Largest magnitudes, as bits: they order like the magnitudes, and a NaN comes out on top, as torch's amax has it.
struct Largest {
    uint32_t m = 0, v = 0;

    RSAFT_HD void take(const Largest &other) {
        m = m > other.m ? m : other.m;
        v = v > other.v ? v : other.v;
    }
};

RSAFT_HD Largest largest_of(const Pack<float> &m, const Pack<float> &v) {
    Largest most;
#if defined(__CUDA_ARCH__)
    // |m| costs nothing to a maximum of floats; no v has a sign, not even a NaN of the GPU's making.
    float top = fabsf(m.v[0]);
#pragma unroll
    for (int k = 1; k < VECTOR; ++k) asm("max.NaN.f32 %0, %0, %1;" : "+f"(top) : "f"(fabsf(m.v[k])));
    most.m = float_bits(top);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) most.v = max(most.v, float_bits(v.v[k]));
#else
    for (int k = 0; k < VECTOR; ++k) most.take({float_bits(fabsf(m.v[k])), float_bits(fabsf(v.v[k]))});
#endif
    return most;
}

// Where a lane's elements begin in the chunk, and how many there are.
struct Place {
    uint32_t i;
    int n;

    RSAFT_HD Place(int i, int count)
        : i(static_cast<uint32_t>(i)), n(count - i < 0 ? 0 : count - i < VECTOR ? count - i : VECTOR) {}
};

// WHOLE: in one access; else element by element, those that are not there `otherwise`.
template <bool WHOLE, class T> RSAFT_HD Pack<T> load(const T *list, const Place &at, T otherwise) {
    list += at.i;
    if constexpr (WHOLE) return load_pack(list);
    assume_global(list);
    Pack<T> x;
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) x.v[k] = k < at.n ? list[k] : otherwise;
    return x;
}

template <bool WHOLE> RSAFT_HD CodeWords load_codes(const uint8_t *list, const Place &at, uint8_t otherwise) {
    assume_global(list);
    if constexpr (WHOLE) return *reinterpret_cast<const CodeWords *>(list + at.i);
    return words_of(load<false>(list, at, otherwise));
}

template <bool WHOLE, class T> RSAFT_HD void store(T *list, const Place &at, const Pack<T> &x) {
    list += at.i;
    if constexpr (WHOLE) return store_pack(list, x);
    assume_global(list);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k)
        if (k < at.n) list[k] = x.v[k];
}

template <bool WHOLE> RSAFT_HD void store_codes(uint8_t *list, const Place &at, const CodeWords &x) {
    assume_global(list);
    if constexpr (WHOLE) *reinterpret_cast<CodeWords *>(list + at.i) = x;
    else store<false>(list, at, as_pack(x));
}

#if defined(__CUDACC__)

template <class Op> struct AsWalk {
    static constexpr int SUMS = 0;
    using Here = typename Op::Here;
    Op op;
    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<0> &none) const {
        op.template undo<N>(here, i, none);
    }
};

template <bool WHOLE, class Op>
__device__ __forceinline__ void one_block(const Op &op, const typename Op::Here &here, const Codebook &book, int i) {
    const Place at(i, here.count);
    typename Op::Lane values;
    Largest most = op.template update<WHOLE>(here, book, at, values);
    most.m = __reduce_max_sync(0xffffffffu, most.m);
    most.v = __reduce_max_sync(0xffffffffu, most.v);
    op.template finish<WHOLE>(here, book, at, most, values);
}

template <class Op> __global__ void __launch_bounds__(THREADS, 2) over_blocks(const rsaft_table t, const Op op) {
    __shared__ Codebook book;
    typename Op::Here here;
    if (!op.begin(t, span_of(t, op.chunk_of(blockIdx.x, t.chunks)), here)) return;
    if (!op.updates(here)) {
        Sums<0> none;
        walk(AsWalk<Op>{op}, here, here.count, here.aligned, threadIdx.x, none);
        return;
    }
    constexpr int COPIES = sizeof(Codebook) / sizeof(uint4);
#pragma unroll
    for (int i = 0; i < COPIES; i += THREADS)
        reinterpret_cast<uint4 *>(&book)[i + threadIdx.x] = reinterpret_cast<const uint4 *>(&CODEBOOK)[i + threadIdx.x];
    static_assert(COPIES % THREADS == 0, "as many copies a thread");
    __syncthreads();
    // Whole blocks in a loop of their own: what the others ask for every element is not asked here.
    const int whole = here.aligned ? here.count / BLOCK * BLOCK : 0;
    const int end = (here.count + BLOCK - 1) / BLOCK * BLOCK;
    int i = threadIdx.x * VECTOR;
#pragma unroll 1
    for (; i < whole; i += THREADS * VECTOR) one_block<true>(op, here, book, i);
#pragma unroll 1
    for (; i < end; i += THREADS * VECTOR) one_block<false>(op, here, book, i);
}

template <class Op> int launch_blocks(const rsaft_table &t, const Op &op, void *stream) {
    if (t.chunks == 0) return 0;
    over_blocks<<<t.chunks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(t, op);
    return cudaGetLastError();
}

#else

template <bool WHOLE, class Op> void block_on_host(const Op &op, const typename Op::Here &here, int first) {
    typename Op::Lane values[WARP];
    Largest most;
    for (int lane = 0; lane < WARP; ++lane)
        most.take(op.template update<WHOLE>(here, CODEBOOK, Place(first + lane * VECTOR, here.count), values[lane]));
    for (int lane = 0; lane < WARP; ++lane)
        op.template finish<WHOLE>(here, CODEBOOK, Place(first + lane * VECTOR, here.count), most, values[lane]);
}

template <class Op> int launch_blocks(const rsaft_table &t, const Op &op, void *) {
    Sums<0> none;
    for (int block = 0; block < t.chunks; ++block) {
        typename Op::Here here{};
        if (!op.begin(t, span_of(t, op.chunk_of(block, t.chunks)), here)) continue;
        if (!op.updates(here)) {
            for (int i = 0; i < here.count; ++i) op.template undo<1>(here, i, none);
            continue;
        }
        const int whole = here.aligned ? here.count / BLOCK * BLOCK : 0;
        for (int i = 0; i < here.count; i += BLOCK)
            i < whole ? block_on_host<true>(op, here, i) : block_on_host<false>(op, here, i);
    }
    return 0;
}

#endif

} // namespace rsaft
