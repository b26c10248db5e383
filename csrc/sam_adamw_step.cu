// Restore, unscale, clip and AdamW in one pass: the weight is read from where restoring would read it. A first, tiny
// kernel turns hyper-parameters, step counts and the norms into eight numbers a tensor. Floor: 28 bytes a parameter, for
// float32 with backup and for bf16 weights with a float32 master alike.

#include <cmath>
#include <type_traits>

#include "chunks.cuh"
#include "restore.cuh"

namespace rsaft {

constexpr int HYPER = 6, COEFFICIENTS = 8;

struct CoefficientInputs {
    const double *hyper, *norm;
    const float *second_inf, *first_inf, *scaler_inf, *grad_scale;
    float *skip;
    int64_t *skipped;
    int count;
};

RSAFT_HD bool skips(const CoefficientInputs &in) {
    return *in.second_inf != 0.0f || (in.first_inf && *in.first_inf != 0.0f) || (in.scaler_inf && *in.scaler_inf != 0.0f);
}

RSAFT_HD void write_coefficients(const rsaft_table &t, const CoefficientInputs &in, bool skip, int tensor) {
    const double *hyper = in.hyper + HYPER * t.group[tensor];
    const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4];
    const bool present = address_of(t, RSAFT_GRAD, tensor) != 0;
    const float taken = t.steps[tensor] + (present && !skip ? 1.0f : 0.0f);
    t.steps[tensor] = taken;
    const double step = taken;
    const double factor = in.grad_scale ? 1.0 / static_cast<double>(*in.grad_scale) : 1.0;
    const double clip = hyper[5] / (*in.norm * factor + 1e-6);
    double *out = t.coefficients + COEFFICIENTS * tensor;
    out[0] = (clip < 1.0 ? clip : 1.0) * factor;
    out[1] = 1.0 - lr * weight_decay;
    out[2] = 1.0 - beta1;
    out[3] = beta2;
    out[4] = 1.0 - beta2;
    out[5] = sqrt(1.0 - pow(beta2, step));
    out[6] = eps;
    out[7] = lr / (1.0 - pow(beta1, step));
}

// Eight numbers of a tensor, in float32 as the arithmetic below uses them.
struct Row {
    float factor, decay, beta1_c, beta2, beta2_c, bias2_sqrt, eps, step_size;
};

// The order of operations is that of the plain-torch reference; multiply-adds stay unfused (-fmad=false).
RSAFT_HD float adamw(float base, float grad, float &m, float &v, const Row &row) {
    grad *= row.factor;
    m = m + (grad - m) * row.beta1_c;
    v = v * row.beta2 + (grad * grad) * row.beta2_c;
    const float denominator = sqrtf(v) / row.bias2_sqrt + row.eps;
    return base * row.decay - row.step_size * (m / denominator);
}

// SOURCE: where the unperturbed weight is read. 0 the weight itself, 1 the backup, 2 the master.
template <class W, class G, int SOURCE> struct Step {
    static constexpr int SUMS = 0;
    static constexpr bool MASTER = SOURCE == 2;
    using S = std::conditional_t<MASTER, float, W>;
    using Undo = Restore<W, MASTER>;
    const float *skip, *first_inf;
    int restore;

    struct Here {
        W *weight;
        const G *grad; // null: this chunk is restored, not updated
        S *source;
        float *exp_avg, *exp_avg_sq;
        Row row;
        int count;
        bool aligned;
    };

    RSAFT_HD static int chunk_of(int block, int) { return block; }

    RSAFT_HD bool begin(const rsaft_table &t, const Span &s, Here &here) const {
        constexpr int list = MASTER ? RSAFT_MASTER : SOURCE == 1 ? RSAFT_BACKUP : RSAFT_WEIGHT;
        const int64_t weight = address_of(t, RSAFT_WEIGHT, s.tensor), grad = address_of(t, RSAFT_GRAD, s.tensor);
        const int64_t source = address_of(t, list, s.tensor);
        const int64_t m = address_of(t, RSAFT_EXP_AVG, s.tensor), v = address_of(t, RSAFT_EXP_AVG_SQ, s.tensor);
        const double *c = t.coefficients + COEFFICIENTS * s.tensor;
        const bool updates = *skip == 0.0f && grad != 0;
        here = {element<W>(weight, s.start),
                updates ? element<const G>(grad, s.start) : nullptr,
                element<S>(source, s.start),
                element<float>(m, s.start),
                element<float>(v, s.start),
                {float(c[0]), float(c[1]), float(c[2]), float(c[3]), float(c[4]), float(c[5]), float(c[6]), float(c[7])},
                s.count,
                ((updates ? weight | grad | source | m | v : weight | source) & 15) == 0};
        return updates || (restore && (first_inf == nullptr || *first_inf == 0.0f));
    }

    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<0> &none) const {
        if (here.grad == nullptr) {
            const typename Undo::Here undo{here.weight, here.source, here.count, here.aligned};
            Undo{first_inf}.template at<N>(undo, i, none);
        } else if constexpr (N == VECTOR) {
            Pack<S> source = load_pack(here.source + i);
            const Pack<G> grad = load_pack(here.grad + i);
            Pack<float> m = load_pack(here.exp_avg + i), v = load_pack(here.exp_avg_sq + i);
            Pack<W> weight;
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                const float w = adamw(to_float(source.v[k]), to_float(grad.v[k]), m.v[k], v.v[k], here.row);
                weight.v[k] = from_float<W>(w);
                if constexpr (MASTER) source.v[k] = w;
            }
            store_pack(here.exp_avg + i, m);
            store_pack(here.exp_avg_sq + i, v);
            if constexpr (MASTER) store_pack(here.source + i, source);
            store_pack(here.weight + i, weight);
        } else {
            const float w = adamw(to_float(here.source[i]), to_float(here.grad[i]), here.exp_avg[i], here.exp_avg_sq[i],
                                  here.row);
            if constexpr (MASTER) here.source[i] = w;
            here.weight[i] = from_float<W>(w);
        }
    }

    RSAFT_HD void finish(const rsaft_table &, const Span &, const Sums<0> &) const {}
};

#if defined(__CUDACC__)
__global__ void adamw_coefficients(const rsaft_table t, const CoefficientInputs in) {
    const bool skip = skips(in);
    const int tensor = blockIdx.x * blockDim.x + threadIdx.x;
    if (tensor == 0) {
        *in.skip = skip ? 1.0f : 0.0f;
        if (in.count && skip) *in.skipped += 1;
    }
    if (tensor < t.tensors) write_coefficients(t, in, skip, tensor);
}
#endif

} // namespace rsaft

using namespace rsaft;

extern "C" int rsaft_adamw_coefficients(const rsaft_table *table, const double *hyper, const double *norm,
                                        const float *second_inf, const float *first_inf, const float *scaler_inf,
                                        const float *grad_scale, float *skip, int64_t *skipped, int count,
                                        [[maybe_unused]] void *stream) {
    if (table == nullptr || hyper == nullptr || norm == nullptr || second_inf == nullptr || skip == nullptr) return 1;
    const CoefficientInputs in{hyper, norm, second_inf, first_inf, scaler_inf, grad_scale, skip, skipped, count};
#if defined(__CUDACC__)
    constexpr int threads = 128;
    const int blocks = (table->tensors + threads - 1) / threads;
    adamw_coefficients<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(*table, in);
    return cudaGetLastError();
#else
    const bool skipped_now = skips(in);
    *skip = skipped_now ? 1.0f : 0.0f;
    if (count && skipped_now) *skipped += 1;
    for (int tensor = 0; tensor < table->tensors; ++tensor) write_coefficients(*table, in, skipped_now, tensor);
    return 0;
#endif
}

extern "C" int rsaft_sam_adamw_step(const rsaft_table *table, const float *skip, const float *first_inf, int restore,
                                    void *stream) {
    if (table == nullptr || skip == nullptr || table->chunk_size % VECTOR != 0) return 1;
    const bool master = table->dtypes[RSAFT_MASTER] == RSAFT_F32;
    if (!master && restore && table->dtypes[RSAFT_BACKUP] != table->dtypes[RSAFT_WEIGHT]) return 1;
    if (table->dtypes[RSAFT_EXP_AVG] != RSAFT_F32 || table->dtypes[RSAFT_EXP_AVG_SQ] != RSAFT_F32) return 1;
    return with_type(table->dtypes[RSAFT_WEIGHT], [&](auto w) {
        return with_type(table->dtypes[RSAFT_GRAD], [&](auto g) {
            using W = decltype(w);
            using G = decltype(g);
            if (master) return launch(*table, Step<W, G, 2>{skip, first_inf, restore}, stream);
            if (restore) return launch(*table, Step<W, G, 1>{skip, first_inf, restore}, stream);
            return launch(*table, Step<W, G, 0>{skip, first_inf, restore}, stream);
        });
    });
}
