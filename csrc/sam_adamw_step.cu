// Restore, unscale, clip and AdamW in one pass: the weight is read from where restoring would read it. Floor: 28 bytes
// a parameter, for float32 with backup and for bf16 weights with a float32 master alike.

#include "adamw.cuh"

namespace rsaft {

template <class Target> struct Step {
    static constexpr int SUMS = 0;
    static constexpr int BLOCKS = 2;
    StepFlags flags;
    typename Target::Keys keys;

    struct Here : Target {
        float *exp_avg, *exp_avg_sq;
    };

    // Last chunk first: the norm has just read the gradients in order, and the last of them may still be in L2.
    RSAFT_HD static int chunk_of(int block, int chunks) { return chunks - 1 - block; }

    RSAFT_HD bool begin(const rsaft_table &t, const Span &s, Here &here) const {
        if (!here.Target::begin(t, s, flags)) return false;
        const int64_t m = address_of(t, RSAFT_EXP_AVG, s.tensor), v = address_of(t, RSAFT_EXP_AVG_SQ, s.tensor);
        here.exp_avg = element<float>(m, s.start);
        here.exp_avg_sq = element<float>(v, s.start);
        if (here.grad != nullptr) here.aligned = here.aligned && ((m | v) & 15) == 0;
        return true;
    }

    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<0> &none) const {
        if (here.grad == nullptr) {
            here.template undo<N>(i, none);
        } else if constexpr (N == VECTOR) {
            auto source = load_pack(here.source + i);
            const auto grad = load_pack(here.grad + i);
            Pack<float> m = load_pack(here.exp_avg + i), v = load_pack(here.exp_avg_sq + i);
            const auto weight = here.template updated<true>(i, source, grad, m, v, keys);
            store_pack(here.exp_avg + i, m);
            store_pack(here.exp_avg_sq + i, v);
            if constexpr (Target::HAS_MASTER) store_pack(here.source + i, source);
            store_pack(here.weight + i, weight);
        } else {
            here.update_one(i, here.exp_avg, here.exp_avg_sq, keys);
        }
    }

    RSAFT_HD void finish(const rsaft_table &, const Span &, const Sums<0> &) const {}
};

} // namespace rsaft

using namespace rsaft;

extern "C" int rsaft_sam_adamw_step(const rsaft_table *table, const float *skip, const float *first_inf, int restore,
                                    void *stream) {
    if (!is_valid(table) || skip == nullptr || table->coefficients == nullptr || !can_round(*table)) return INVALID;
    if ((restore || has_master(*table)) && !can_restore(*table)) return INVALID;
    const int32_t *dtypes = table->dtypes;
    const int moments = dtypes[RSAFT_EXP_AVG];
    if (dtypes[RSAFT_EXP_AVG_SQ] != moments) return INVALID;
    const StepFlags flags{skip, first_inf, restore};
    if (moments == RSAFT_U8) {
        const bool scaled = dtypes[RSAFT_EXP_AVG_ABSMAX] == RSAFT_F32 && dtypes[RSAFT_EXP_AVG_SQ_ABSMAX] == RSAFT_F32;
        return scaled ? step_8bit(*table, flags, stream) : INVALID;
    }
    if (moments != RSAFT_F32) return INVALID;
    return with_weights(*table, [&](auto *target) {
        using Target = std::remove_pointer_t<decltype(target)>;
        return launch(*table, Step<Target>{flags, Target::keys_of(*table)}, stream);
    });
}
