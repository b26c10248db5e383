// The arithmetic of csrc/ as functions on host arrays, for tests/csrc/test_arithmetic.py; no part of the library.

#include "adamw.cuh"
#include "blocks.cuh"
#include "coefficients.cuh"
#include "perturb_images.cu"
#include "philox.cuh"
#include "quantize.cuh"

using namespace rsaft;

extern "C" {

void hook_codebook(uint32_t *words) { memcpy(words, &CODEBOOK, sizeof CODEBOOK); }

int64_t hook_codebook_size() { return sizeof CODEBOOK; }

void hook_decode(int is_signed, float *values) {
    for (int code = 0; code < CODES; code += VECTOR) {
        Pack<uint8_t> codes;
        for (int k = 0; k < VECTOR; ++k) codes.v[k] = static_cast<uint8_t>(code + k);
        const Pack<float> x = decode(words_of(codes), 1.0f, is_signed ? CODEBOOK.exp_avg : CODEBOOK.exp_avg_sq);
        memcpy(values + code, x.v, sizeof x.v);
    }
}

void hook_encode(int is_signed, const float *x, int64_t count, uint8_t *codes) {
    for (int64_t i = 0; i < count; i += VECTOR) {
        const int64_t n = count - i < VECTOR ? count - i : VECTOR;
        Pack<float> values{};
        memcpy(values.v, x + i, n * sizeof *x);
        const CodeWords out = is_signed ? encode<true>(values, 1.0f, CODEBOOK.exp_avg)
                                        : encode<false>(values, 1.0f, CODEBOOK.exp_avg_sq);
        memcpy(codes + i, as_pack(out).v, n);
    }
}

void hook_philox(const uint32_t *counter, uint64_t seed, uint32_t *words) {
    const Words out = philox({{counter[0], counter[1], counter[2], counter[3]}}, round_keys(seed));
    for (int i = 0; i < 4; ++i) words[i] = out.v[i];
}

// The bits of element i, drawn from where its chunk starts, as the kernels do.
void hook_random16(int64_t start, int count, uint64_t seed, int parameter, double step, int purpose, uint32_t *bits) {
    rsaft_table t{};
    t.seed = seed;
    t.parameter = &parameter;
    const auto rounding = Rounding<true>::of(t, 0, start, step, purpose);
    for (int i = 0; i < count; ++i) bits[i] = random16(rounding.draw(i, Rounding<true>::keys_of(t)), i % VECTOR);
}

void hook_round(const float *x, const uint32_t *bits, int64_t count, uint16_t *stochastic, uint16_t *nearest) {
    for (int64_t i = 0; i < count; ++i) {
        stochastic[i] = round_stochastically(x[i], bits[i]).bits;
        nearest[i] = from_float<bf16>(x[i]).bits;
    }
}

int64_t hook_group_of(int64_t samples, int64_t sample_bytes) { return group_of(samples, sample_bytes); }

double hook_power(double base, uint64_t exponent) { return power(base, exponent); }

// One AdamW update of each element; row: factor, 1 - lr wd, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, step
// size.
void hook_adamw(float *w, const float *g, float *m, float *v, int64_t count, const float *row) {
    const Row r{row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], 1.0f / row[5]};
    for (int64_t i = 0; i < count; ++i) {
        update_moments(g[i], m[i], v[i], r);
        w[i] = adamw(w[i], m[i], v[i], r);
    }
}

}
