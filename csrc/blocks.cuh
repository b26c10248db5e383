// The second walk over a table: a warp a quantisation block, so that what its elements share is a warp's reduction.
//
// An operation is a struct with
//     begin(table, chunk, here)      what this chunk needs; returns false to leave the chunk alone
//     updates(here)                  false: the chunk is restored, by undo<N>(here, i, none), as walk() calls it
//     update(here, book, ...)        a lane's elements of a block; returns the lane's largest
//     store(here, book, ..., most)   the same lane again, with the block's largest
// On the host a warp is its 32 lanes in turn, first all updates, then all stores: maxima do not depend on the order.
#pragma once

#include "chunks.cuh"
#include "quantize.cuh"

namespace rsaft {

static_assert(WARP * VECTOR == BLOCK, "a warp's lanes hold a block of elements, a pack each");

// The value of every code and the encoding of every binade, made once a thread block, in shared memory: looked up, they
// cost a third of what they do computed for each element, which would make this kernel wait for arithmetic, not memory.
struct Codebook {
    float exp_avg[CODES], exp_avg_sq[CODES];
    Binade binades[BINADES], binades_sq[BINADES];

    RSAFT_HD void fill(int i) {
        if (i < CODES) {
            exp_avg[i] = decode<true>(i);
            exp_avg_sq[i] = decode<false>(i);
        } else if (i < CODES + BINADES) {
            binades[i - CODES] = binade<true>(i - CODES);
            binades_sq[i - CODES] = binade<false>(i - CODES);
        }
    }
};
static_assert(CODES + BINADES <= THREADS, "one entry a thread");

// Largest magnitudes, as bits: they order like the magnitudes, and a NaN comes out on top, as torch's amax has it.
struct Largest {
    uint32_t m = 0, v = 0;

    RSAFT_HD void take(uint32_t other_m, uint32_t other_v) {
        m = m > other_m ? m : other_m;
        v = v > other_v ? v : other_v;
    }
    RSAFT_HD void take(float other_m, float other_v) {
        take(float_bits(other_m) & 0x7fffffffu, float_bits(other_v) & 0x7fffffffu);
    }
};

// A pack as the words that it was loaded in. Two branches that meet must agree on those: else the compiler takes the
// elements apart in both, for three instructions and a register more for each.
template <class T> struct alignas(alignof(Pack<T>)) Words32 {
    uint32_t v[sizeof(Pack<T>) / 4];
};

template <class T> RSAFT_HD void keep([[maybe_unused]] Words32<T> &words) {
#if defined(__CUDA_ARCH__)
#pragma unroll
    for (uint32_t &word : words.v) asm("" : "+r"(word));
#endif
}

template <class T> RSAFT_HD Pack<T> as_pack(const Words32<T> &words) {
    Pack<T> x;
    memcpy(x.v, words.v, sizeof words.v);
    return x;
}

// Elements i to i + n - 1, those beyond them `otherwise`.
template <class T> RSAFT_HD Words32<T> load_words(const T *p, int n, bool whole, T otherwise) {
    assume_global(p);
    if (whole) return *reinterpret_cast<const Words32<T> *>(p);
    Pack<T> x;
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) x.v[k] = k < n ? p[k] : otherwise;
    Words32<T> words;
    memcpy(words.v, x.v, sizeof words.v);
    keep(words);
    return words;
}

template <class T> RSAFT_HD void store_some(T *p, int n, const Pack<T> &x) {
    assume_global(p);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k)
        if (k < n) p[k] = x.v[k];
}

// A lane's elements of a block: where they begin, and how many there are.
struct Place {
    int i, n;
    bool whole; // the block is, and may be accessed in packs

    RSAFT_HD Place(int block, int lane, int count, bool aligned)
        : i(block * BLOCK + lane * VECTOR), n(count - i < 0 ? 0 : count - i < VECTOR ? count - i : VECTOR),
          whole(aligned && (block + 1) * BLOCK <= count) {}
};

#if defined(__CUDACC__)

template <class Op> struct AsWalk {
    static constexpr int SUMS = 0;
    using Here = typename Op::Here;
    Op op;
    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<0> &none) const {
        op.template undo<N>(here, i, none);
    }
};

template <class Op> __global__ void __launch_bounds__(THREADS, 2) over_blocks(const rsaft_table t, const Op op) {
    __shared__ Codebook book;
    typename Op::Here here;
    if (!op.begin(t, span_of(t, blockIdx.x), here)) return;
    if (!op.updates(here)) {
        Sums<0> none;
        walk(AsWalk<Op>{op}, here, here.count, here.aligned, threadIdx.x, none);
        return;
    }
    book.fill(threadIdx.x);
    __syncthreads();
    const int lane = threadIdx.x % WARP, blocks = (here.count + BLOCK - 1) / BLOCK;
#pragma unroll 1
    for (int block = threadIdx.x / WARP; block < blocks; block += THREADS / WARP) {
        const Place at(block, lane, here.count, here.aligned);
        typename Op::Lane values;
        Largest most = op.update(here, book, block, at.i, at.n, at.whole, values);
        most.m = __reduce_max_sync(0xffffffffu, most.m);
        most.v = __reduce_max_sync(0xffffffffu, most.v);
        op.store(here, book, block, at.i, at.n, at.whole, most, values);
    }
}

template <class Op> int launch_blocks(const rsaft_table &t, const Op &op, void *stream) {
    if (t.chunks == 0) return 0;
    over_blocks<<<t.chunks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(t, op);
    return cudaGetLastError();
}

#else

template <class Op> void block_on_host(const Op &op, const typename Op::Here &here, const Codebook &book, int block) {
    typename Op::Lane values[WARP];
    Largest most;
    for (int lane = 0; lane < WARP; ++lane) {
        const Place at(block, lane, here.count, here.aligned);
        const Largest lanes = op.update(here, book, block, at.i, at.n, at.whole, values[lane]);
        most.take(lanes.m, lanes.v);
    }
    for (int lane = 0; lane < WARP; ++lane) {
        const Place at(block, lane, here.count, here.aligned);
        op.store(here, book, block, at.i, at.n, at.whole, most, values[lane]);
    }
}

template <class Op> int launch_blocks(const rsaft_table &t, const Op &op, void *) {
    Codebook book;
    for (int i = 0; i < THREADS; ++i) book.fill(i);
    Sums<0> none;
    for (int chunk = 0; chunk < t.chunks; ++chunk) {
        typename Op::Here here{};
        if (!op.begin(t, span_of(t, chunk), here)) continue;
        if (!op.updates(here))
            for (int i = 0; i < here.count; ++i) op.template undo<1>(here, i, none);
        else
            for (int block = 0; block * BLOCK < here.count; ++block) block_on_host(op, here, book, block);
    }
    return 0;
}

#endif

} // namespace rsaft
