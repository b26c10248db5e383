// AdamW's hyper-parameters, step counts and norms to nine numbers a tensor, in float64 and by one block.
#pragma once

#include <cmath>

#include "numeric.cuh"
#include "rsaft.h"

namespace rsaft {

constexpr int HYPER = 6, COEFFICIENTS = 9;

struct Counted {
    const int64_t *gradients;
    const int32_t *group;
    float *steps;
    double *coefficients;
    int tensors;
};

struct Coefficients {
    rsaft_step_inputs in;
    Counted tables[RSAFT_MAX_TABLES];
    int count;
};

// Repeated squaring: the same bits on device and host, and a fifth of pow()'s work, which one block has to do alone.
RSAFT_HD double power(double base, uint64_t exponent) {
    double result = 1.0;
    for (; exponent; exponent >>= 1, base *= base)
        if (exponent & 1) result *= base;
    return result;
}

RSAFT_HD bool skips(const rsaft_step_inputs &in, float found_inf) {
    return found_inf != 0.0f || (in.first_inf && *in.first_inf != 0.0f) || (in.scaler_inf && *in.scaler_inf != 0.0f);
}

RSAFT_HD void write_skip(const rsaft_step_inputs &in, bool skip) {
    *in.skip = skip ? 1.0f : 0.0f;
    if (skip) *in.skipped += 1;
}

RSAFT_HD void write_row(const Counted &t, const rsaft_step_inputs &in, double norm, bool skip, int tensor) {
    const double *hyper = in.hyper + HYPER * t.group[tensor];
    const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4];
    const bool present = in.released || t.gradients[tensor] != 0;
    const float step = t.steps[tensor] + (present && !skip ? 1.0f : 0.0f);
    if (!in.released) t.steps[tensor] = step;
    const double factor = in.grad_scale ? 1.0 / static_cast<double>(*in.grad_scale) : 1.0;
    const double clip = hyper[5] / (norm * factor + 1e-6);
    double *out = t.coefficients + static_cast<int64_t>(COEFFICIENTS) * tensor;
    out[0] = (clip < 1.0 ? clip : 1.0) * factor;
    out[1] = 1.0 - lr * weight_decay;
    out[2] = 1.0 - beta1;
    out[3] = beta2;
    out[4] = 1.0 - beta2;
    out[5] = sqrt(1.0 - power(beta2, static_cast<uint64_t>(step)));
    out[6] = eps;
    out[7] = lr / (1.0 - power(beta1, static_cast<uint64_t>(step)));
    out[8] = step;
}

// One thread's share of all tables.
RSAFT_HD void write_rows(const Coefficients &c, double norm, bool skip, int thread, int threads) {
    for (int table = 0; table < c.count; ++table)
        for (int tensor = thread; tensor < c.tables[table].tensors; tensor += threads)
            write_row(c.tables[table], c.in, norm, skip, tensor);
}

// Fills `out`, or returns false where an argument is missing. No inputs: no coefficients.
inline bool gather(const rsaft_table *const *tables, int count, const rsaft_step_inputs *inputs, Coefficients &out) {
    out.count = 0;
    if (inputs == nullptr) return true;
    if (tables == nullptr || count < 1 || count > RSAFT_MAX_TABLES) return false;
    if (!inputs->hyper || !inputs->skip || !inputs->skipped) return false;
    out.in = *inputs;
    for (int i = 0; i < count; ++i) {
        const rsaft_table *t = tables[i];
        if (t == nullptr || !t->addresses || !t->group || !t->steps || !t->coefficients || t->tensors < 0) return false;
        const int64_t *gradients = t->addresses + static_cast<int64_t>(RSAFT_GRAD) * t->tensors;
        out.tables[i] = {gradients, t->group, t->steps, t->coefficients, t->tensors};
    }
    out.count = count;
    return true;
}

} // namespace rsaft
