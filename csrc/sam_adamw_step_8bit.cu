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
    typename Target::Keys keys;

    struct Here : Target {
        uint8_t *exp_avg, *exp_avg_sq;
        float *absmax, *absmax_sq; // of the chunk's first block
    };

    struct Lane {
        Pack<float> m, v;
    };

    // Last chunk first: the norm has just read the gradients in order, and the last of them may still be in L2.
    RSAFT_HD static int chunk_of(int block, int chunks) { return chunks - 1 - block; }

    RSAFT_HD bool begin(const rsaft_table &t, const Span &s, Here &here) const {
        if (!here.Target::begin(t, s, flags)) return false;
        const int64_t m = address_of(t, RSAFT_EXP_AVG, s.tensor), v = address_of(t, RSAFT_EXP_AVG_SQ, s.tensor);
        here.exp_avg = element<uint8_t>(m, s.start);
        here.exp_avg_sq = element<uint8_t>(v, s.start);
        const int64_t first_block = static_cast<int64_t>(static_cast<uint64_t>(s.start) / BLOCK);
        here.absmax = element<float>(address_of(t, RSAFT_EXP_AVG_ABSMAX, s.tensor), first_block);
        here.absmax_sq = element<float>(address_of(t, RSAFT_EXP_AVG_SQ_ABSMAX, s.tensor), first_block);
        if (here.grad != nullptr) here.aligned = here.aligned && ((m | v) & 7) == 0;
        hold(here.weight);
        hold(here.grad);
        hold(here.source);
        hold(here.exp_avg);
        hold(here.exp_avg_sq);
        hold(here.absmax);
        hold(here.absmax_sq);
        return true;
    }

    RSAFT_HD static bool updates(const Here &here) { return here.grad != nullptr; }

    template <int N> RSAFT_HD void undo(const Here &here, int i, Sums<0> &none) const {
        here.template undo<N>(i, none);
    }

    // A lane's weights, and its largest moments. Elements that are not there count as zero and decide no absmax.
    template <bool WHOLE>
    RSAFT_HD Largest update(const Here &here, const Codebook &book, const Place &at, Lane &lane) const {
        Pack<S> source = load<WHOLE>(here.source, at, S{});
        const Pack<G> grad = load<WHOLE>(here.grad, at, G{});
        const CodeWords m = load_codes<WHOLE>(here.exp_avg, at, 127), v = load_codes<WHOLE>(here.exp_avg_sq, at, 0);
        assume_global(here.absmax);
        assume_global(here.absmax_sq);
        lane.m = decode(m, here.absmax[at.i / BLOCK], book.exp_avg);
        lane.v = decode(v, here.absmax_sq[at.i / BLOCK], book.exp_avg_sq);
        const Pack<W> weight = here.template updated<false>(static_cast<int>(at.i), source, grad, lane.m, lane.v, keys);
        store<WHOLE>(here.weight, at, weight);
        if constexpr (Target::HAS_MASTER) store<WHOLE>(here.source, at, source);
        return largest_of(lane.m, lane.v);
    }

    // The lane's codes, once the block's absmax are known.
    template <bool WHOLE>
    RSAFT_HD void finish(const Here &here, const Codebook &book, const Place &at, const Largest &most,
                         const Lane &lane) const {
        const float absmax = bits_float(most.m), absmax_sq = bits_float(most.v);
        store_codes<WHOLE>(here.exp_avg, at, encode<true>(lane.m, inverse_of(absmax), book.exp_avg));
        store_codes<WHOLE>(here.exp_avg_sq, at, encode<false>(lane.v, inverse_of(absmax_sq), book.exp_avg_sq));
        if (at.i % BLOCK == 0) {
            assume_global(here.absmax);
            assume_global(here.absmax_sq);
            here.absmax[at.i / BLOCK] = absmax;
            here.absmax_sq[at.i / BLOCK] = absmax_sq;
        }
    }
};

int step_8bit(const rsaft_table &table, const StepFlags &flags, void *stream) {
    return with_weights(table, [&](auto *target) {
        using Target = std::remove_pointer_t<decltype(target)>;
        return launch_blocks(table, Step8<Target>{flags, Target::keys_of(table)}, stream);
    });
}

} // namespace rsaft
