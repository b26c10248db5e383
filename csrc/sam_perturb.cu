// Perturbation in place: w + scale * g with the old bits to a backup, or rounded from a float32 master. What was applied
// at the weight's precision is summed against what was wanted. Floor: 16 bytes a parameter in float32 with backup, 8
// with bf16 weights and a master.

#include <type_traits>

#include "chunks.cuh"

namespace rsaft {

template <class W, class G, bool MASTER, bool ADAPTIVE> struct Perturb {
    static constexpr int SUMS = 3;
    using S = std::conditional_t<MASTER, float, W>;
    const double *scales;
    const float *found_inf;

    struct Here {
        W *weight;
        const G *grad; // null: no gradient, back up only
        S *source;     // the master, or where the backup goes
        float scale;
        int count;
        bool aligned;
    };

    // Last chunk first: the norm has just read the gradients in order, and the last of them may still be in L2.
    RSAFT_HD static int chunk_of(int block, int chunks) { return chunks - 1 - block; }

    RSAFT_HD bool begin(const rsaft_table &t, const Span &s, Here &here) const {
        const int64_t weight = address_of(t, RSAFT_WEIGHT, s.tensor), grad = address_of(t, RSAFT_GRAD, s.tensor);
        const int64_t source = address_of(t, MASTER ? RSAFT_MASTER : RSAFT_BACKUP, s.tensor);
        here = {element<W>(weight, s.start),
                grad ? element<const G>(grad, s.start) : nullptr,
                element<S>(source, s.start),
                static_cast<float>(scales[t.group[s.tensor]]),
                s.count,
                ((weight | grad | source) & 15) == 0};
        return *found_inf == 0.0f && (grad != 0 || !MASTER);
    }

    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<3> &sums) const {
        if constexpr (N == VECTOR) {
            Pack<S> source;
            Pack<W> weight;
            if constexpr (MASTER) {
                source = load_pack(here.source + i);
            } else {
                weight = load_pack(here.weight + i);
                store_pack(here.source + i, weight);
            }
            if (here.grad == nullptr) return;
            const Pack<G> grad = load_pack(here.grad + i);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                const W old = MASTER ? from_float<W>(to_float(source.v[k])) : weight.v[k];
                const float base = MASTER ? to_float(source.v[k]) : to_float(weight.v[k]);
                weight.v[k] = moved(base, old, to_float(grad.v[k]), here.scale, sums);
            }
            store_pack(here.weight + i, weight);
        } else {
            const S source = MASTER ? here.source[i] : S{};
            const W old = MASTER ? from_float<W>(to_float(source)) : here.weight[i];
            if constexpr (!MASTER) here.source[i] = old;
            if (here.grad == nullptr) return;
            const float base = MASTER ? to_float(source) : to_float(old);
            here.weight[i] = moved(base, old, to_float(here.grad[i]), here.scale, sums);
        }
    }

    RSAFT_HD static W moved(float base, W old, float grad, float scale, Sums<3> &sums) {
        float wanted = scale * grad;
        if constexpr (ADAPTIVE) wanted *= base * base;
        const W out = from_float<W>(base + wanted);
        const float applied = to_float(out) - to_float(old);
        sums.v[0] += applied * applied;
        sums.v[1] += applied * wanted;
        sums.v[2] += wanted * wanted;
        return out;
    }

    RSAFT_HD void finish(const rsaft_table &t, const Span &s, const Sums<3> &sums) const {
        for (int n = 0; n < 3; ++n) t.perturbation_sums[3 * s.chunk + n] = static_cast<double>(sums.v[n]);
    }
};

} // namespace rsaft

using namespace rsaft;

extern "C" int rsaft_sam_perturb(const rsaft_table *table, const double *scales, const float *found_inf, void *stream) {
    if (table == nullptr || table->chunk_size % VECTOR != 0) return 1;
    const bool master = table->dtypes[RSAFT_MASTER] == RSAFT_F32;
    if (!master && table->dtypes[RSAFT_BACKUP] != table->dtypes[RSAFT_WEIGHT]) return 1;
    return with_type(table->dtypes[RSAFT_WEIGHT], [&](auto w) {
        return with_type(table->dtypes[RSAFT_GRAD], [&](auto g) {
            using W = decltype(w);
            using G = decltype(g);
            if (master)
                return table->adaptive ? launch(*table, Perturb<W, G, true, true>{scales, found_inf}, stream)
                                       : launch(*table, Perturb<W, G, true, false>{scales, found_inf}, stream);
            return table->adaptive ? launch(*table, Perturb<W, G, false, true>{scales, found_inf}, stream)
                                   : launch(*table, Perturb<W, G, false, false>{scales, found_inf}, stream);
        });
    });
}
