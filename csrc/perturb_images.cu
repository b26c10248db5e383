// Image perturbation: a norm a sample, then one pass that writes images + delta, or delta alone. The second launch adds a
// sample's slots again, in order, so no third is needed. Floor: 16 bytes an element in float32, 8 in bf16.

#include <cmath>
#include <cstddef>

#include "chunks.cuh"

namespace rsaft {

constexpr int IMAGE_CHUNK = 32768;

struct Samples {
    int64_t elements;
    int chunks; // of a sample
    double *slots;
};

RSAFT_HD Span sample_span(const Samples &s, int chunk, int64_t sample) {
    const int64_t start = static_cast<int64_t>(chunk) * IMAGE_CHUNK, left = s.elements - start;
    return {chunk, 0, sample * s.elements + start, static_cast<int>(left < IMAGE_CHUNK ? left : IMAGE_CHUNK)};
}

template <class T> RSAFT_HD bool is_aligned(const T *p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

template <class G> struct SampleNorm {
    static constexpr int SUMS = 1;
    struct Here {
        const G *grad;
    };

    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<1> &sums) const {
        if constexpr (N == VECTOR) {
            const Pack<G> g = load_pack(here.grad + i);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) sums.v[0] += to_float(g.v[k]) * to_float(g.v[k]);
        } else {
            sums.v[0] += to_float(here.grad[i]) * to_float(here.grad[i]);
        }
    }
};

// `images` may be null.
template <class O, class I, class G> struct Move {
    static constexpr int SUMS = 0;
    struct Here {
        O *out;
        const I *images;
        const G *grad;
        float scale;
        bool sign;
    };

    template <int N> RSAFT_HD void at(const Here &here, int i, Sums<0> &) const {
        if constexpr (N == VECTOR) {
            const Pack<G> g = load_pack(here.grad + i);
            Pack<I> x{};
            if (here.images) x = load_pack(here.images + i);
            Pack<O> out;
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) out.v[k] = moved(here, to_float(x.v[k]), to_float(g.v[k]));
            store_pack(here.out + i, out);
        } else {
            here.out[i] = moved(here, here.images ? to_float(here.images[i]) : 0.0f, to_float(here.grad[i]));
        }
    }

    RSAFT_HD static O moved(const Here &here, float x, float g) {
        if (here.sign) g = g > 0.0f ? 1.0f : g < 0.0f ? -1.0f : 0.0f;
        // A sample without a usable gradient has scale 0; a product would turn its infinities into NaN.
        const float delta = here.scale == 0.0f ? 0.0f : g * here.scale;
        return from_float<O>(here.images ? x + delta : delta);
    }
};

RSAFT_HD float scale_of(const Samples &s, int64_t sample, double radius, bool sign) {
    double sum = 0.0;
    for (int i = 0; i < s.chunks; ++i) sum += s.slots[sample * s.chunks + i];
    if (!(sum > 0.0 && sum - sum == 0.0)) return 0.0f;
    return static_cast<float>(sign ? radius : radius / sqrt(sum));
}

#if defined(__CUDACC__)
template <class G> __global__ void __launch_bounds__(THREADS) sample_norms(const Samples s, const G *grad) {
    const Span span = sample_span(s, blockIdx.x, blockIdx.y);
    const typename SampleNorm<G>::Here here{grad + span.start};
    Sums<1> sums{};
    walk(SampleNorm<G>{}, here, span.count, is_aligned(here.grad), threadIdx.x, sums);
    block_sum<1>(sums);
    if (threadIdx.x == 0) s.slots[static_cast<int64_t>(blockIdx.y) * s.chunks + blockIdx.x] = sums.v[0];
}

template <class O, class I, class G>
__global__ void __launch_bounds__(THREADS)
    move_images(const Samples s, O *out, const I *images, const G *grad, double radius, bool sign) {
    __shared__ float scale;
    if (threadIdx.x == 0) scale = scale_of(s, blockIdx.y, radius, sign);
    __syncthreads();
    const Span span = sample_span(s, blockIdx.x, blockIdx.y);
    const typename Move<O, I, G>::Here here{out + span.start, images ? images + span.start : nullptr, grad + span.start,
                                            scale, sign};
    const bool aligned = is_aligned(here.out) && is_aligned(here.grad) && is_aligned(here.images);
    Sums<0> none;
    walk(Move<O, I, G>{}, here, span.count, aligned, threadIdx.x, none);
}

// A grid's second side ends at 65535 blocks: more samples take more launches.
constexpr int64_t MOST_SAMPLES = 65535;

template <class O, class I, class G>
int run(Samples s, O *out, const I *images, const G *grad, int64_t samples, double radius, bool sign, void *stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    for (int64_t first = 0; first < samples; first += MOST_SAMPLES) {
        const int64_t left = samples - first, offset = first * s.elements;
        const dim3 grid(s.chunks, static_cast<unsigned>(left < MOST_SAMPLES ? left : MOST_SAMPLES));
        Samples part = s;
        part.slots += first * s.chunks;
        sample_norms<<<grid, THREADS, 0, on>>>(part, grad + offset);
        move_images<<<grid, THREADS, 0, on>>>(part, out + offset, images ? images + offset : nullptr, grad + offset,
                                              radius, sign);
    }
    return cudaGetLastError();
}
#else
template <class O, class I, class G>
int run(Samples s, O *out, const I *images, const G *grad, int64_t samples, double radius, bool sign, void *) {
    for (int64_t sample = 0; sample < samples; ++sample) {
        for (int chunk = 0; chunk < s.chunks; ++chunk) {
            const Span span = sample_span(s, chunk, sample);
            const typename SampleNorm<G>::Here here{grad + span.start};
            static Sums<1> sums[THREADS];
            for (int thread = 0; thread < THREADS; ++thread) {
                sums[thread] = {};
                walk(SampleNorm<G>{}, here, span.count, is_aligned(here.grad), thread, sums[thread]);
            }
            block_sum<1>(sums);
            s.slots[sample * s.chunks + chunk] = sums[0].v[0];
        }
        const float scale = scale_of(s, sample, radius, sign);
        for (int chunk = 0; chunk < s.chunks; ++chunk) {
            const Span span = sample_span(s, chunk, sample);
            const typename Move<O, I, G>::Here here{out + span.start, images ? images + span.start : nullptr,
                                                    grad + span.start, scale, sign};
            const bool aligned = is_aligned(here.out) && is_aligned(here.grad) && is_aligned(here.images);
            Sums<0> none;
            for (int thread = 0; thread < THREADS; ++thread)
                walk(Move<O, I, G>{}, here, span.count, aligned, thread, none);
        }
    }
    return 0;
}
#endif

} // namespace rsaft

using namespace rsaft;

extern "C" int rsaft_perturb_images(void *out, const void *images, const void *grad, int out_dtype, int images_dtype,
                                    int grad_dtype, int64_t samples, int64_t elements, double radius, int sign,
                                    double *workspace, void *stream) {
    if (samples < 0 || elements < 0) return 1;
    if (samples == 0 || elements == 0) return 0;
    if (out == nullptr || grad == nullptr || workspace == nullptr) return 1;
    const Samples s{elements, static_cast<int>((elements + IMAGE_CHUNK - 1) / IMAGE_CHUNK), workspace};
    return with_type(out_dtype, [&](auto o) {
        return with_type(images == nullptr ? grad_dtype : images_dtype, [&](auto x) {
            return with_type(grad_dtype, [&](auto g) {
                return run(s, static_cast<decltype(o) *>(out), static_cast<const decltype(x) *>(images),
                           static_cast<const decltype(g) *>(grad), samples, radius, sign != 0, stream);
            });
        });
    });
}
