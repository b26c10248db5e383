// Putting a chunk's weights back; used by itself and by the step that is skipped.
#pragma once

#include <type_traits>

#include "chunks.cuh"

namespace rsaft {

template <class W, bool MASTER> struct Restore {
    static constexpr int SUMS = 0;
    static constexpr int BLOCKS = 2;
    using S = std::conditional_t<MASTER, float, W>;
    const float *found_inf;

    struct Here {
        W *weight;
        const S *source;
        int count;
        bool aligned;
    };

    RSAFT_HD static int chunk_of(int block, int) { return block; }

    RSAFT_HD bool begin(const rsaft_table &t, const Span &s, Here &here) const {
        const int64_t weight = address_of(t, RSAFT_WEIGHT, s.tensor);
        const int64_t source = address_of(t, MASTER ? RSAFT_MASTER : RSAFT_BACKUP, s.tensor);
        here = {element<W>(weight, s.start), element<const S>(source, s.start), s.count, ((weight | source) & 15) == 0};
        // After a perturbation that was a no-op the weights are intact and the backup is not. What has no backup was
        // not perturbed.
        return *found_inf == 0.0f && source != 0;
    }

    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<0> &) const {
        if constexpr (N == VECTOR) {
            // A backup is copied as it is: NaN payloads survive.
            if constexpr (std::is_same_v<S, W>) copy_pack(here.weight + i, here.source + i);
            else store_pack(here.weight + i, from_floats<W>(load_pack(here.source + i)));
        } else {
            store_one(here.weight + i, back(load_one(here.source + i)));
        }
    }

    RSAFT_HD static W back(S source) {
        if constexpr (std::is_same_v<S, W>) return source;
        else return from_float<W>(to_float(source));
    }

    RSAFT_HD void finish(const rsaft_table &, const Span &, const Sums<0> &) const {}
};

} // namespace rsaft
