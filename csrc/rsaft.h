/* The C ABI of librsaft: what Python calls through ctypes.
 *
 * Every function returns 0 or a CUDA runtime error code (1, cudaErrorInvalidValue, for an argument that it refuses;
 * nothing has been launched then) and never prints, allocates or keeps state; workspace comes from the caller, and the
 * stream (a cudaStream_t) is the last argument. Pointers are device memory unless said otherwise. No torch headers: one
 * library serves every torch and Python. Where cpu.cpp made the library, all memory is the host's, and the last
 * argument says how many threads to use.
 */
#ifndef RSAFT_H
#define RSAFT_H

#include <stdint.h>

#if defined(__GNUC__)
#define RSAFT_API __attribute__((visibility("default")))
#else
#define RSAFT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature or a struct below changes; Python refuses a library of another number. */
#define RSAFT_ABI_VERSION 4

RSAFT_API int rsaft_abi_version(void);

/* CUDA versions as 1000 * major + 10 * minor: of the runtime linked in, and of the newest that the driver serves
 * (0 without a driver), to host memory. A driver of an older major version cannot run this library. */
RSAFT_API int rsaft_cuda_versions(int *runtime, int *driver);

/* Whether there is code in the library for the calling thread's current device: 0, or the error that a launch would end
 * in. Makes the device's context where there is none. */
RSAFT_API int rsaft_cuda_serves_device(void);

/* Compute capabilities that the library was built for, as "800,900,1000"; empty where it was not built by nvcc. */
RSAFT_API const char *rsaft_cuda_architectures(void);

/* Text of an error code; never NULL, not to be freed. */
RSAFT_API const char *rsaft_error_string(int error);

/* Lists of a table, in the order of its rows of addresses. */
enum {
    RSAFT_WEIGHT,
    RSAFT_GRAD,
    RSAFT_BACKUP,
    RSAFT_MASTER,
    RSAFT_EXP_AVG,
    RSAFT_EXP_AVG_SQ,
    RSAFT_EXP_AVG_ABSMAX,
    RSAFT_EXP_AVG_SQ_ABSMAX,
    RSAFT_LISTS
};

/* Element types. U8: codes of 8-bit moments, with a float32 absmax for each 256 elements of a tensor as they lie in
 * memory. */
enum { RSAFT_ABSENT = -1, RSAFT_F32 = 0, RSAFT_BF16 = 1, RSAFT_F16 = 2, RSAFT_U8 = 3 };

/* Many tensors as one launch. The struct itself lives in host memory. An address of 0 is an absent entry. A launch
 * walks the chunks that it is given: chunk_tensor and chunk_index moved on to one tensor's chunks make it that
 * tensor's. */
typedef struct rsaft_table {
    const int64_t *addresses;    /* [RSAFT_LISTS][tensors] */
    const int64_t *numel;        /* [tensors] */
    const int32_t *group;        /* [tensors]: row of the hyper-parameters and of the scales */
    const int32_t *parameter;    /* [tensors]: what stochastic rounding knows a tensor by */
    const int32_t *chunk_tensor; /* [chunks] */
    const int32_t *chunk_index;  /* [chunks]: which chunk of its tensor */
    double *sum_sq;              /* [chunks] */
    double *perturbation_sums;   /* [chunks][3]: applied^2, applied*wanted, wanted^2 */
    float *steps;                /* [tensors] */
    double *coefficients;        /* [tensors][9] */
    int64_t gradient;            /* address used instead of those in the table; 0: none */
    uint64_t seed;               /* of stochastic rounding */
    int32_t tensors;
    int32_t chunks;
    int32_t chunk_size;          /* elements, a multiple of 256 */
    int32_t adaptive;            /* ASAM: perturb along w^2 g */
    int32_t stochastic;          /* round bf16 weights without master stochastically */
    int32_t dtypes[RSAFT_LISTS]; /* RSAFT_ABSENT where the list is not bound */
} rsaft_table;

/* What AdamW's coefficients are made of besides a norm. In host memory; first_inf, scaler_inf and grad_scale may be
 * NULL. */
typedef struct rsaft_step_inputs {
    const double *hyper; /* [groups][6]: lr, beta1, beta2, eps, weight decay, clip norm */
    const float *first_inf, *scaler_inf, *grad_scale;
    float *skip;         /* written: 1 where the step must not be made */
    int64_t *skipped;    /* grows by one then */
    int32_t released;    /* coefficients of every tensor's next step; table->steps stay */
} rsaft_step_inputs;

/* sum_sq[chunk] = sum of g^2 ((w g)^2 when adaptive) over the chunk, in float32; absent gradients give 0. */
RSAFT_API int rsaft_sum_of_squares(const rsaft_table *table, int adaptive, void *stream);

/* The slots of up to RSAFT_MAX_TABLES tables added in float64 and in order: values = {sum of squares, norm,
 * scale[groups]} with scale = rho / (norm + 1e-12), 0 for a zero or non-finite norm; found_inf = 1 where the norm is
 * not finite. `slots` and `counts` are host arrays. With `inputs`, the coefficients of the same number of `tables` (a
 * host array) too, as rsaft_adamw_coefficients writes them; both may be NULL. */
#define RSAFT_MAX_TABLES 16
RSAFT_API int rsaft_finish_norm(const double *const *slots, const int32_t *counts, int count, const double *rho,
                                int groups, double *values, float *found_inf, const rsaft_table *const *tables,
                                const rsaft_step_inputs *inputs, void *stream);

/* w += scale[group] * g (w^2 g when adaptive): from the master where one is bound, else with the old bits to the
 * backup, which may be the gradient's own memory. Nothing is written where found_inf is not 0, nor where there is a
 * gradient and neither master nor backup. */
RSAFT_API int rsaft_sam_perturb(const rsaft_table *table, const double *scales, const float *found_inf, void *stream);

/* The old bits from the backup, or the master rounded again, where found_inf is 0 and there is one. */
RSAFT_API int rsaft_sam_restore(const rsaft_table *table, const float *found_inf, void *stream);

/* Step counts, skip flag and counter, and the coefficients of up to RSAFT_MAX_TABLES tables (a host array): clip factor
 * / gradient scale, 1 - lr * weight decay, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^step), eps,
 * lr / (1 - beta1^step), step. */
RSAFT_API int rsaft_adamw_coefficients(const rsaft_table *const *tables, int count, const double *norm,
                                       const float *found_inf, const rsaft_step_inputs *inputs, void *stream);

/* Restore, unscale, clip and AdamW in one pass; where `skip` is set, restore alone. first_inf may be NULL. */
RSAFT_API int rsaft_sam_adamw_step(const rsaft_table *table, const float *skip, const float *first_inf, int restore,
                                   void *stream);

/* out = images + radius * g / ||g|| for each of `samples` rows of `elements`; images, of out's type, may be NULL: the
 * delta alone. `radius` carries the sign and, for RMS, the square root of the elements; sign = 1 takes
 * radius * sign(g) (L-infinity). workspace: samples * ceil(elements / 32768) doubles. */
RSAFT_API int rsaft_perturb_images(void *out, const void *images, const void *grad, int out_dtype, int grad_dtype,
                                   int64_t samples, int64_t elements, double radius, int sign, double *workspace,
                                   void *stream);

#ifdef __cplusplus
}
#endif

#endif
