// Perturbation in place: w + scale * g with the old bits to a backup, or rounded from a float32 master. What was
// applied at the weight's precision is summed against what was wanted. Floor: 16 bytes a parameter in float32 with
// backup, 8 with bf16 weights and a master.

#include <type_traits>

#include "chunks.cuh"
#include "philox.cuh"

namespace rsaft {

template <class W, class G, bool MASTER, bool STOCHASTIC> struct Perturb {
    static constexpr int SUMS = 3;
    // Three where the registers do: exchanging halves of float32 weights takes more than a third allows.
    // And on sm_100 two values of the stochastic one would lie in local memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    static constexpr int BLOCKS = sizeof(W) == 2 && !STOCHASTIC ? 3 : 2;
#else
    static constexpr int BLOCKS = sizeof(W) == 2 ? 3 : 2;
#endif
    using S = std::conditional_t<MASTER, float, W>;
    const double *scales;
    const float *found_inf;
    typename Rounding<STOCHASTIC>::Keys keys;

    struct Here {
        W *weight;
        const G *grad; // null: no gradient, back up only
        S *source;     // the master, or where the backup goes: the gradient's own memory, perhaps
        Rounding<STOCHASTIC> rounding;
        float scale;
        int count;
        bool aligned, adaptive;
    };

    // Last chunk first: the norm has just read the gradients in order, and the last of them may still be in L2.
    RSAFT_HD static int chunk_of(int block, int chunks) { return chunks - 1 - block; }

    RSAFT_HD bool begin(const rsaft_table &t, const Span &s, Here &here) const {
        const int64_t weight = address_of(t, RSAFT_WEIGHT, s.tensor), grad = address_of(t, RSAFT_GRAD, s.tensor);
        const int64_t source = address_of(t, MASTER ? RSAFT_MASTER : RSAFT_BACKUP, s.tensor);
        const double step = STOCHASTIC ? t.steps[s.tensor] : 0.0f;
        here = {element<W>(weight, s.start),
                grad ? element<const G>(grad, s.start) : nullptr,
                element<S>(source, s.start),
                Rounding<STOCHASTIC>::of(t, s.tensor, s.start, step, RSAFT_PERTURBATION),
                static_cast<float>(scales[t.group[s.tensor]]),
                s.count,
                ((weight | grad | source) & 15) == 0,
                t.adaptive != 0};
        // Without a source there would be no way back.
        return *found_inf == 0.0f && source != 0 && (grad != 0 || !MASTER);
    }

    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<3> &sums) const {
        if constexpr (N == VECTOR) {
            Pack<S> source;
            Pack<W> weight;
            Pack<G> grad;
            if constexpr (MASTER) source = load_pack(here.source + i);
            else weight = load_pack(here.weight + i);
            if (here.grad != nullptr) grad = load_pack(here.grad + i);
            if constexpr (!MASTER) store_pack(here.source + i, weight);
            if (here.grad == nullptr) return;
            const Pack<float> gradient = to_floats(grad);
            Pack<float> base, wanted, moved;
            if constexpr (MASTER) {
                base = source;
                weight = from_floats<W>(source);
            } else {
                base = to_floats(weight);
            }
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                wanted.v[k] = wanted_of(here, base.v[k], gradient.v[k]);
                moved.v[k] = base.v[k] + wanted.v[k];
            }
            const Pack<float> old = to_floats(weight);
            weight = here.rounding.template round<W>(moved, here.rounding.draw(i, keys));
            const Pack<float> now = to_floats(weight);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) add(now.v[k] - old.v[k], wanted.v[k], sums);
            store_pack(here.weight + i, weight);
        } else {
            const S source = MASTER ? load_one(here.source + i) : S{};
            const W old = MASTER ? from_float<W>(to_float(source)) : load_one(here.weight + i);
            const float grad = here.grad ? to_float(load_one(here.grad + i)) : 0.0f;
            if constexpr (!MASTER) store_one(here.source + i, old);
            if (here.grad == nullptr) return;
            const float base = MASTER ? to_float(source) : to_float(old);
            const float wanted = wanted_of(here, base, grad);
            const W out = here.rounding.template round<W>(base + wanted, here.rounding.draw(i, keys), i);
            store_one(here.weight + i, out);
            add(to_float(out) - to_float(old), wanted, sums);
        }
    }

    RSAFT_HD static float wanted_of(const Here &here, float base, float grad) {
        const float wanted = here.scale * grad;
        return here.adaptive ? wanted * (base * base) : wanted;
    }

    RSAFT_HD static void add(float applied, float wanted, Sums<3> &sums) {
        sums.v[0] += applied * applied;
        sums.v[1] += applied * wanted;
        sums.v[2] += wanted * wanted;
    }

    RSAFT_HD void finish(const rsaft_table &t, const Span &s, const Sums<3> &sums) const {
        for (int n = 0; n < 3; ++n) t.perturbation_sums[3 * s.chunk + n] = static_cast<double>(sums.v[n]);
    }
};

} // namespace rsaft

using namespace rsaft;

extern "C" int rsaft_sam_perturb(const rsaft_table *table, const double *scales, const float *found_inf, void *stream) {
    if (!is_valid(table) || scales == nullptr || found_inf == nullptr || !can_restore(*table)) return INVALID;
    if ((table->chunks > 0 && table->perturbation_sums == nullptr) || !can_round(*table)) return INVALID;
    if (table->stochastic && table->steps == nullptr) return INVALID;
    return with_type(table->dtypes[RSAFT_WEIGHT], [&](auto w) {
        return with_type(table->dtypes[RSAFT_GRAD], [&](auto g) {
            using W = decltype(w);
            using G = decltype(g);
            if constexpr (sizeof(W) == 2)
                if (has_master(*table))
                    return launch(*table, Perturb<W, G, true, false>{scales, found_inf, {}}, stream);
            if constexpr (std::is_same_v<W, bf16>)
                if (table->stochastic) {
                    const RoundKeys keys = round_keys(table->seed);
                    return launch(*table, Perturb<W, G, false, true>{scales, found_inf, keys}, stream);
                }
            return launch(*table, Perturb<W, G, false, false>{scales, found_inf, {}}, stream);
        });
    });
}
