// The AdamW update of a weight, whatever holds its moments: what both step kernels share.
#pragma once

#include <cmath>
#include <type_traits>

#include "chunks.cuh"
#include "coefficients.cuh"
#include "philox.cuh"
#include "restore.cuh"

namespace rsaft {

struct StepFlags {
    const float *skip, *first_inf;
    int restore;
};

// A tensor's coefficients, in float32 as the arithmetic below uses them.
struct Row {
    float factor, decay, beta1_c, beta2, beta2_c, bias2_sqrt, eps, step_size, bias2_inverse;
};

RSAFT_HD void update_moments(float grad, float &m, float &v, const Row &row) {
    grad *= row.factor;
    m = m + (grad - m) * row.beta1_c;
    v = v * row.beta2 + (grad * grad) * row.beta2_c;
}

// The order of operations is that of the plain-torch reference; multiply-adds stay unfused (-fmad=false).
RSAFT_HD float adamw(float base, float m, float v, const Row &row) {
    const float denominator = sqrtf(v) / row.bias2_sqrt + row.eps;
    return base * row.decay - row.step_size * (m / denominator);
}

// Beside 8-bit moments: square root and reciprocal in one instruction each instead of twelve, at most 3e-7 of the
// update off, where the moments themselves are known to a hundredth; the last two roundings are one. At 10 bytes an
// element, arithmetic would be the limit.
RSAFT_HD float adamw_nearly(float base, float m, float v, const Row &row) {
#if defined(__CUDA_ARCH__)
    float root, inverse;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fmaf_rn(root, row.bias2_inverse, row.eps)));
    return __fmaf_rn(-row.step_size, m * inverse, base * row.decay);
#else
    return adamw(base, m, v, row);
#endif
}

// A chunk's weight and where its unperturbed value is read: the master, the backup, or the weight itself.
template <class W, class G, bool MASTER, bool STOCHASTIC> struct Weights {
    static constexpr bool HAS_MASTER = MASTER;
    using Weight = W;
    using Gradient = G;
    using S = std::conditional_t<MASTER, float, W>;
    using Undo = Restore<W, MASTER>;
    using Keys = typename Rounding<STOCHASTIC>::Keys;
    W *weight;
    const G *grad; // null: this chunk is restored, not updated
    S *source;
    Row row;
    Rounding<STOCHASTIC> rounding;
    int count;
    bool aligned;

    static Keys keys_of(const rsaft_table &t) { return Rounding<STOCHASTIC>::keys_of(t); }

    // False where there is nothing to do.
    RSAFT_HD bool begin(const rsaft_table &t, const Span &s, const StepFlags &flags) {
        const int64_t target = address_of(t, RSAFT_WEIGHT, s.tensor), gradient = gradient_of(t, s.tensor);
        const bool perturbed = flags.restore && (flags.first_inf == nullptr || *flags.first_inf == 0.0f);
        int64_t from = MASTER ? address_of(t, RSAFT_MASTER, s.tensor) : 0;
        if (!MASTER && perturbed) from = address_of(t, RSAFT_BACKUP, s.tensor);
        const bool moved = perturbed && from != 0, updates = *flags.skip == 0.0f && gradient != 0;
        if (!updates && !moved) return false;
        if (!MASTER && from == 0) from = target;
        weight = element<W>(target, s.start);
        grad = updates ? element<const G>(gradient, s.start) : nullptr;
        source = element<S>(from, s.start);
        const double *c = t.coefficients + static_cast<int64_t>(COEFFICIENTS) * s.tensor;
        row = {float(c[0]), float(c[1]), float(c[2]), float(c[3]), float(c[4]), float(c[5]), float(c[6]), float(c[7]),
               1.0f / float(c[5])};
        rounding = Rounding<STOCHASTIC>::of(t, s.tensor, s.start, c[8], RSAFT_UPDATE);
        count = s.count;
        aligned = ((target | from | (updates ? gradient : 0)) & 15) == 0;
        return true;
    }

    template <int N> RSAFT_HD void undo(int i, Sums<0> &none) const {
        const typename Undo::Here here{weight, source, count, aligned};
        Undo{nullptr}.template at<N>(here, i, none);
    }

    // Eight weights from what has been loaded; the moments become the new ones.
    template <bool EXACT>
    RSAFT_HD Pack<W> updated(int i, Pack<S> &base, const Pack<G> &g, Pack<float> &m, Pack<float> &v,
                             const Keys &keys) const {
        const Pack<float> old = to_floats(base), gradient = to_floats(g);
        Pack<float> w;
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) {
            update_moments(gradient.v[k], m.v[k], v.v[k], row);
            w.v[k] = EXACT ? adamw(old.v[k], m.v[k], v.v[k], row) : adamw_nearly(old.v[k], m.v[k], v.v[k], row);
        }
        if constexpr (MASTER) base = w;
        return rounding.template round<W>(w, rounding.draw(i, keys));
    }

    RSAFT_HD void update_one(int i, float *exp_avg, float *exp_avg_sq, const Keys &keys) const {
        float m = load_one(exp_avg + i), v = load_one(exp_avg_sq + i);
        update_moments(to_float(load_one(grad + i)), m, v, row);
        const float w = adamw(to_float(load_one(source + i)), m, v, row);
        store_one(exp_avg + i, m);
        store_one(exp_avg_sq + i, v);
        if constexpr (MASTER) store_one(source + i, w);
        store_one(weight + i, rounding.template round<W>(w, rounding.draw(i, keys), i));
    }
};

// Calls f(Weights<...>) for the table's types. The types of weight and gradient, a master beside 16-bit weights, and
// stochastic rounding of bf16 without one: no other combination is compiled.
template <class F> int with_weights(const rsaft_table &t, F f) {
    return with_type(t.dtypes[RSAFT_WEIGHT], [&](auto w) {
        return with_type(t.dtypes[RSAFT_GRAD], [&](auto g) {
            using W = decltype(w);
            using G = decltype(g);
            if constexpr (sizeof(W) == 2)
                if (has_master(t)) return f(static_cast<Weights<W, G, true, false> *>(nullptr));
            if constexpr (std::is_same_v<W, bf16>)
                if (t.stochastic) return f(static_cast<Weights<W, G, false, true> *>(nullptr));
            return f(static_cast<Weights<W, G, false, false> *>(nullptr));
        });
    });
}

// The step over 8-bit moments (sam_adamw_step_8bit.cu); arguments have been checked.
int step_8bit(const rsaft_table &table, const StepFlags &flags, void *stream);

} // namespace rsaft
