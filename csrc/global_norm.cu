// Global gradient norm: a float32 sum a chunk in its own slot, then one block adds the slots in float64 and in order.
// The bits follow from the chunk list alone, not from the GPU's size. Floor: the bytes of the gradients.

#include <cmath>

#include "chunks.cuh"

namespace rsaft {

template <class W, class G, bool ADAPTIVE> struct SumOfSquares {
    static constexpr int SUMS = 1;
    struct Here {
        const W *weight;
        const G *grad;
        int count;
        bool aligned;
    };

    RSAFT_HD static int chunk_of(int block, int) { return block; }

    RSAFT_HD bool begin(const rsaft_table &t, const Span &s, Here &here) const {
        const int64_t grad = address_of(t, RSAFT_GRAD, s.tensor), weight = address_of(t, RSAFT_WEIGHT, s.tensor);
        here = {element<const W>(weight, s.start), element<const G>(grad, s.start), s.count,
                ((ADAPTIVE ? grad | weight : grad) & 15) == 0};
        return grad != 0;
    }

    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<1> &sums) const {
        if constexpr (N == VECTOR) {
            const Pack<G> g = load_pack(here.grad + i);
            Pack<W> w;
            if constexpr (ADAPTIVE) w = load_pack(here.weight + i);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) add(to_float(g.v[k]), ADAPTIVE ? to_float(w.v[k]) : 1.0f, sums);
        } else {
            add(to_float(here.grad[i]), ADAPTIVE ? to_float(here.weight[i]) : 1.0f, sums);
        }
    }

    RSAFT_HD static void add(float g, float w, Sums<1> &sums) {
        if constexpr (ADAPTIVE) g *= w;
        sums.v[0] += g * g;
    }

    RSAFT_HD void finish(const rsaft_table &t, const Span &s, const Sums<1> &sums) const {
        t.sum_sq[s.chunk] = static_cast<double>(sums.v[0]);
    }
};

struct Slots {
    const double *slots[RSAFT_MAX_TABLES];
    int32_t counts[RSAFT_MAX_TABLES];
    int tables;
};

constexpr int NORM_THREADS = 1024;

// One thread's share of all slots.
RSAFT_HD double partial_sum(const Slots &s, int thread) {
    double sum = 0.0;
    for (int table = 0; table < s.tables; ++table)
        for (int i = thread; i < s.counts[table]; i += NORM_THREADS) sum += s.slots[table][i];
    return sum;
}

RSAFT_HD void write_norm(double sum, const double *rho, int groups, double *values, float *found_inf) {
    const double norm = sqrt(sum);
    const bool finite = norm - norm == 0.0;
    values[0] = sum;
    values[1] = norm;
    *found_inf = finite ? 0.0f : 1.0f;
    for (int group = 0; group < groups; ++group)
        values[2 + group] = finite && norm > 0.0 ? rho[group] / (norm + 1e-12) : 0.0;
}

#if defined(__CUDACC__)
__global__ void __launch_bounds__(NORM_THREADS)
    finish_norm(const Slots s, const double *rho, int groups, double *values, float *found_inf) {
    __shared__ double tree[NORM_THREADS];
    tree[threadIdx.x] = partial_sum(s, threadIdx.x);
    for (int offset = NORM_THREADS / 2; offset > 0; offset /= 2) {
        __syncthreads();
        if (threadIdx.x < offset) tree[threadIdx.x] += tree[threadIdx.x + offset];
    }
    if (threadIdx.x == 0) write_norm(tree[0], rho, groups, values, found_inf);
}
#endif

} // namespace rsaft

using namespace rsaft;

extern "C" int rsaft_sum_of_squares(const rsaft_table *table, int adaptive, void *stream) {
    if (table == nullptr || table->chunk_size % VECTOR != 0) return 1;
    return with_type(table->dtypes[RSAFT_WEIGHT], [&](auto w) {
        return with_type(table->dtypes[RSAFT_GRAD], [&](auto g) {
            using W = decltype(w);
            using G = decltype(g);
            return adaptive ? launch(*table, SumOfSquares<W, G, true>{}, stream)
                            : launch(*table, SumOfSquares<W, G, false>{}, stream);
        });
    });
}

extern "C" int rsaft_finish_norm(const double *const *slots, const int32_t *counts, int tables, const double *rho,
                                 int groups, double *values, float *found_inf, [[maybe_unused]] void *stream) {
    if (slots == nullptr || counts == nullptr || tables < 1 || tables > RSAFT_MAX_TABLES || groups < 0) return 1;
    Slots s{};
    s.tables = tables;
    for (int i = 0; i < tables; ++i) s.slots[i] = slots[i], s.counts[i] = counts[i];
#if defined(__CUDACC__)
    finish_norm<<<1, NORM_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(s, rho, groups, values, found_inf);
    return cudaGetLastError();
#else
    double tree[NORM_THREADS];
    for (int thread = 0; thread < NORM_THREADS; ++thread) tree[thread] = partial_sum(s, thread);
    for (int offset = NORM_THREADS / 2; offset > 0; offset /= 2)
        for (int thread = 0; thread < offset; ++thread) tree[thread] += tree[thread + offset];
    write_norm(tree[0], rho, groups, values, found_inf);
    return 0;
#endif
}
