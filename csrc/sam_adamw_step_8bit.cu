// The same step over 8-bit moments: decode, update in float32, take each block's new absmax, encode. Floor: 10.1 bytes
// a parameter for bf16 weights with backup.

#include "adamw.cuh"
#include "blocks.cuh"
#include "quantize.cuh"

namespace rsaft {

// A warp works on a block of 256 elements, 8 a lane: then both absmax are warp reductions, the codes of a lane one
// 8-byte access and 16-bit weights one of 16. Sixteen elements a lane would make the codes 16-byte accesses too, but
// hold 32 moments in registers between decoding and encoding instead of 16, and a second 512-thread block would not
// fit.
template <class Target> struct Step8 {
    using W = typename Target::Weight;
    using G = typename Target::Gradient;
    using S = typename Target::S;
    StepFlags flags;

    struct Here : Target {
        uint8_t *exp_avg, *exp_avg_sq;
        float *absmax, *absmax_sq; // of the chunk's first block
    };

    struct Lane {
        float m[VECTOR], v[VECTOR];
    };

    RSAFT_HD bool begin(const rsaft_table &t, const Span &s, Here &here) const {
        if (!here.Target::begin(t, s, flags)) return false;
        const int64_t m = address_of(t, RSAFT_EXP_AVG, s.tensor), v = address_of(t, RSAFT_EXP_AVG_SQ, s.tensor);
        here.exp_avg = element<uint8_t>(m, s.start);
        here.exp_avg_sq = element<uint8_t>(v, s.start);
        const int64_t first_block = static_cast<int64_t>(static_cast<uint64_t>(s.start) / BLOCK);
        here.absmax = element<float>(address_of(t, RSAFT_EXP_AVG_ABSMAX, s.tensor), first_block);
        here.absmax_sq = element<float>(address_of(t, RSAFT_EXP_AVG_SQ_ABSMAX, s.tensor), first_block);
        if (here.grad != nullptr) here.aligned = here.aligned && ((m | v) & 7) == 0;
        return true;
    }

    RSAFT_HD static bool updates(const Here &here) { return here.grad != nullptr; }

    template <int N> RSAFT_HD void undo(const Here &here, int i, Sums<0> &none) const {
        here.template undo<N>(i, none);
    }

    // Elements i to i + n - 1 of the chunk, n <= 8, fewer in its last block: the weights, and the lane's largest
    // moments.
    RSAFT_HD Largest update(const Here &here, const Codebook &book, int block, int i, int n, bool whole,
                            Lane &lane) const {
        Words32<S> source_words;
        Words32<G> grad_words;
        Words32<uint8_t> m_words, v_words;
        // One branch for all four, so that they are in flight together. Elements that are not there count as zero and
        // decide no absmax.
        if (whole) {
            source_words = load_words(here.source + i, n, true, S{});
            grad_words = load_words(here.grad + i, n, true, G{});
            m_words = load_words(here.exp_avg + i, n, true, uint8_t{127});
            v_words = load_words(here.exp_avg_sq + i, n, true, uint8_t{0});
        } else {
            source_words = load_words(here.source + i, n, false, S{});
            grad_words = load_words(here.grad + i, n, false, G{});
            m_words = load_words(here.exp_avg + i, n, false, uint8_t{127});
            v_words = load_words(here.exp_avg_sq + i, n, false, uint8_t{0});
        }
        Pack<S> source = as_pack(source_words);
        const Pack<G> grad = as_pack(grad_words);
        const Pack<uint8_t> m = as_pack(m_words), v = as_pack(v_words);
        assume_global(here.absmax);
        assume_global(here.absmax_sq);
        const float scale = here.absmax[block], scale_sq = here.absmax_sq[block];
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) {
            lane.m[k] = book.exp_avg[m.v[k]] * scale;
            lane.v[k] = book.exp_avg_sq[v.v[k]] * scale_sq;
        }
        const Pack<W> weight = here.template updated<false>(i, source, grad, lane.m, lane.v);
        if (whole) {
            store_pack(here.weight + i, weight);
            if constexpr (Target::HAS_MASTER) store_pack(here.source + i, source);
        } else {
            store_some(here.weight + i, n, weight);
            if constexpr (Target::HAS_MASTER) store_some(here.source + i, n, source);
        }
        Largest most{};
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) most.take(lane.m[k], lane.v[k]);
        return most;
    }

    template <bool SIGNED>
    RSAFT_HD static void store_codes(uint8_t *to, const Binade *binades, int n, bool whole, float inverse,
                                     const float (&values)[VECTOR]) {
        Pack<uint8_t> codes;
#pragma unroll
        for (int k = 0; k < VECTOR; ++k)
            codes.v[k] = static_cast<uint8_t>(encode<SIGNED>(values[k] * inverse, binades));
        if (whole) store_pack(to, codes);
        else store_some(to, n, codes);
    }

    // The lane's codes, once the block's absmax are known.
    RSAFT_HD void store(const Here &here, const Codebook &book, int block, int i, int n, bool whole,
                        const Largest &most, const Lane &lane) const {
        const float absmax = bits_float(most.m), absmax_sq = bits_float(most.v);
        store_codes<true>(here.exp_avg + i, book.binades, n, whole, inverse_of(absmax), lane.m);
        store_codes<false>(here.exp_avg_sq + i, book.binades_sq, n, whole, inverse_of(absmax_sq), lane.v);
        if (i % BLOCK == 0) {
            assume_global(here.absmax);
            assume_global(here.absmax_sq);
            here.absmax[block] = absmax;
            here.absmax_sq[block] = absmax_sq;
        }
    }
};

int step_8bit(const rsaft_table &table, const StepFlags &flags, void *stream) {
    return with_weights(table, [&](auto *target) {
        return launch_blocks(table, Step8<std::remove_pointer_t<decltype(target)>>{flags}, stream);
    });
}

} // namespace rsaft
