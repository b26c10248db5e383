// Global gradient norm, second part: one block adds all slots in float64 and in order, and writes what follows from the
// sum: norm, perturbation scales, the non-finite flag, and for an AdamW step its coefficients. One launch of its own
// length (some microseconds) instead of two: LoRA-sized steps are made of little else.

#include <cmath>

#include "coefficients.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace rsaft {

constexpr int NORM_THREADS = 1024;

struct Slots {
    const double *slots[RSAFT_MAX_TABLES];
    int32_t counts[RSAFT_MAX_TABLES];
    int tables;
};

struct Norm {
    const double *rho;
    double *values;
    float *found_inf;
    int groups;
};

// One thread's share of all slots.
RSAFT_HD double partial_sum(const Slots &s, int thread) {
    double sum = 0.0;
    for (int table = 0; table < s.tables; ++table)
        for (int i = thread; i < s.counts[table]; i += NORM_THREADS) sum += s.slots[table][i];
    return sum;
}

// Returns the norm.
RSAFT_HD double write_norm(double sum, const Norm &to) {
    const double norm = sqrt(sum);
    const bool finite = norm - norm == 0.0;
    to.values[0] = sum;
    to.values[1] = norm;
    *to.found_inf = finite ? 0.0f : 1.0f;
    for (int group = 0; group < to.groups; ++group)
        to.values[2 + group] = finite && norm > 0.0 ? to.rho[group] / (norm + 1e-12) : 0.0;
    return norm;
}

// The skip flag and every row of coefficients, given the norm of the second pass.
RSAFT_HD void write_step(const Coefficients &c, double norm, float found_inf, int thread, int threads) {
    if (c.count == 0) return;
    const bool skip = skips(c.in, found_inf);
    if (thread == 0) write_skip(c.in, skip);
    write_rows(c, norm, skip, thread, threads);
}

#if defined(__CUDACC__)
__global__ void __launch_bounds__(NORM_THREADS) finish_norm(const Slots s, const Norm to, const Coefficients c) {
    __shared__ double tree[NORM_THREADS];
    tree[threadIdx.x] = partial_sum(s, threadIdx.x);
    for (int offset = NORM_THREADS / 2; offset > 0; offset /= 2) {
        __syncthreads();
        if (threadIdx.x < offset) tree[threadIdx.x] += tree[threadIdx.x + offset];
    }
    if (threadIdx.x == 0) tree[0] = write_norm(tree[0], to);
    __syncthreads();
    const double norm = tree[0];
    write_step(c, norm, norm - norm == 0.0 ? 0.0f : 1.0f, threadIdx.x, NORM_THREADS);
}

__global__ void __launch_bounds__(NORM_THREADS)
    adamw_coefficients(const double *norm, const float *found_inf, const Coefficients c) {
    write_step(c, *norm, *found_inf, threadIdx.x, NORM_THREADS);
}
#endif

} // namespace rsaft

using namespace rsaft;

extern "C" int rsaft_finish_norm(const double *const *slots, const int32_t *counts, int count, const double *rho,
                                 int groups, double *values, float *found_inf, const rsaft_table *const *tables,
                                 const rsaft_step_inputs *inputs, [[maybe_unused]] void *stream) {
    if (slots == nullptr || counts == nullptr || count < 1 || count > RSAFT_MAX_TABLES) return 1;
    if (groups < 0 || (groups > 0 && rho == nullptr) || values == nullptr || found_inf == nullptr) return 1;
    Slots s{};
    s.tables = count;
    for (int i = 0; i < count; ++i) {
        if (counts[i] < 0 || (counts[i] > 0 && slots[i] == nullptr)) return 1;
        s.slots[i] = slots[i], s.counts[i] = counts[i];
    }
    const Norm to{rho, values, found_inf, groups};
    Coefficients c{};
    if (!gather(tables, count, inputs, c)) return 1;
#if defined(__CUDACC__)
    finish_norm<<<1, NORM_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(s, to, c);
    return cudaGetLastError();
#else
    double tree[NORM_THREADS];
    for (int thread = 0; thread < NORM_THREADS; ++thread) tree[thread] = partial_sum(s, thread);
    for (int offset = NORM_THREADS / 2; offset > 0; offset /= 2)
        for (int thread = 0; thread < offset; ++thread) tree[thread] += tree[thread + offset];
    const double norm = write_norm(tree[0], to);
    write_step(c, norm, *found_inf, 0, 1);
    return 0;
#endif
}

extern "C" int rsaft_adamw_coefficients(const rsaft_table *const *tables, int count, const double *norm,
                                        const float *found_inf, const rsaft_step_inputs *inputs,
                                        [[maybe_unused]] void *stream) {
    Coefficients c{};
    if (norm == nullptr || found_inf == nullptr || inputs == nullptr || !gather(tables, count, inputs, c)) return 1;
#if defined(__CUDACC__)
    adamw_coefficients<<<1, NORM_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(norm, found_inf, c);
    return cudaGetLastError();
#else
    write_step(c, *norm, *found_inf, 0, 1);
    return 0;
#endif
}
