// Image perturbation: a norm a sample, then one pass that writes images + delta, or delta alone. The second launch
// adds a sample's slots again, in a fixed order, so no third is needed. Samples are taken in groups whose gradients
// stay in the L2 from one launch to the other. Floor: 12 bytes an element in float32, 6 in bf16; 16 and 8 for what does
// not fit.

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
            const Pack<float> g = to_floats(load_pack(here.grad + i));
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) sums.v[0] += g.v[k] * g.v[k];
        } else {
            sums.v[0] += to_float(here.grad[i]) * to_float(here.grad[i]);
        }
    }
};

// `images` may be null. Everything passes once: no access may push out of the L2 what the next blocks read again.
template <class O, class G> struct Move {
    O *out;
    const O *images;
    const G *grad;
    bool sign;

    struct Loaded {
        Pack<O> image;
        Pack<G> grad;
    };

    RSAFT_HD bool aligned() const { return is_aligned(out) && is_aligned(images) && is_aligned(grad); }

    RSAFT_HD Loaded load(int i) const {
        Loaded x{};
        x.grad = load_pack_once(grad + i);
        if (images) x.image = load_pack_once(images + i);
        return x;
    }

    RSAFT_HD void store(int i, const Loaded &from, float scale) const {
        const Pack<float> image = to_floats(from.image), g = to_floats(from.grad);
        Pack<float> x;
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) x.v[k] = moved(image.v[k], g.v[k], scale);
        store_pack_once(out + i, from_floats<O>(x));
    }

    // One thread's share of a chunk. The scale comes from a function: while that waits for a sum, loads are under way.
    template <class F> RSAFT_HD void share(int count, int thread, F scale_now) const {
        const int whole = aligned() ? count / (WARP * VECTOR) * (WARP * VECTOR) : 0;
        int i = thread * VECTOR;
        Loaded first{};
        if (i < whole) first = load(i);
        const float scale = scale_now();
        if (i < whole) store(i, first, scale);
        for (i += THREADS * VECTOR; i < whole; i += THREADS * VECTOR) store(i, load(i), scale);
        for (i = whole + thread; i < count; i += THREADS)
            out[i] = from_float<O>(moved(images ? to_float(images[i]) : 0.0f, to_float(grad[i]), scale));
    }

    RSAFT_HD float moved(float x, float g, float scale) const {
        if (sign) g = g > 0.0f ? 1.0f : g < 0.0f ? -1.0f : 0.0f;
        // A sample without a usable gradient has scale 0; a product would turn its infinities into NaN.
        const float delta = scale == 0.0f ? 0.0f : g * scale;
        return images ? x + delta : delta;
    }
};

// Bytes of gradients in a group. An H100's L2 holds 50 MB in two halves, and what the far half owns may lie in both, so
// 25 MB are sure to be still there. A group costs two launches more, each some 2 us of filling and draining the GPU;
// at 3 TB/s it saves the second read of 24 MiB, 8.4 us of 33.5. So larger groups gain while they fit, and below 12 MB
// splitting would lose: at 32 x 3 x 1024 x 1024 in float32 (12.6 MB a sample, 96 chunks) two samples share a launch of
// 192 blocks, all of them resident at once on 132 multiprocessors.
constexpr int64_t GROUP_BYTES = int64_t{24} << 20;
constexpr int64_t MOST_SAMPLES = 65535; // a grid's second side

// Samples a group: as many as fit, shared out evenly over the groups; at least one.
inline int64_t group_of(int64_t samples, int64_t sample_bytes) {
    int64_t most = GROUP_BYTES / sample_bytes;
    most = most < 1 ? 1 : most > MOST_SAMPLES ? MOST_SAMPLES : most;
    const int64_t groups = (samples + most - 1) / most;
    return (samples + groups - 1) / groups;
}

RSAFT_HD float scale_of(double sum, double radius, bool sign) {
    if (!(sum > 0.0 && sum - sum == 0.0)) return 0.0f;
    return static_cast<float>(sign ? radius : radius / sqrt(sum));
}

// A sample's slots are added by a warp: lane after lane every 32nd, then the lanes in a fixed tree.
RSAFT_HD double sum_of_lane(const double *slots, int count, int lane) {
    double sum = 0.0;
    for (int i = lane; i < count; i += WARP) sum += slots[i];
    return sum;
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

// Every warp adds them all: shorter than waiting for one that does.
__device__ __forceinline__ double sum_of_slots(const double *slots, int count) {
    double sum = sum_of_lane(slots, count, threadIdx.x % WARP);
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
}

template <class O, class G>
__global__ void __launch_bounds__(THREADS, 3)
    move_images(const Samples s, O *out, const O *images, const G *grad, double radius, bool sign) {
    // Last chunk first: of a sample too large for the L2, its end is what is left there.
    const Span span = sample_span(s, s.chunks - 1 - blockIdx.x, blockIdx.y);
    const Move<O, G> move{out + span.start, images ? images + span.start : nullptr, grad + span.start, sign};
    const double *slots = s.slots + static_cast<int64_t>(blockIdx.y) * s.chunks;
    move.share(span.count, threadIdx.x, [&] { return scale_of(sum_of_slots(slots, s.chunks), radius, sign); });
}

template <class O, class G>
int run(Samples s, O *out, const O *images, const G *grad, int64_t samples, double radius, bool sign, void *stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    const int64_t group = group_of(samples, s.elements * static_cast<int64_t>(sizeof(G)));
    for (int64_t first = 0; first < samples; first += group) {
        const int64_t left = samples - first, offset = first * s.elements;
        const dim3 grid(s.chunks, static_cast<unsigned>(left < group ? left : group));
        Samples part = s;
        part.slots += first * s.chunks;
        sample_norms<<<grid, THREADS, 0, on>>>(part, grad + offset);
        move_images<<<grid, THREADS, 0, on>>>(part, out + offset, images ? images + offset : nullptr, grad + offset,
                                              radius, sign);
    }
    return cudaGetLastError();
}
#elif defined(RSAFT_CPU)
template <class O, class G>
int run(Samples s, O *out, const O *images, const G *grad, int64_t samples, double radius, bool sign, void *stream);
#else
double sum_of_slots(const double *slots, int count) {
    double lanes[WARP];
    for (int lane = 0; lane < WARP; ++lane) lanes[lane] = sum_of_lane(slots, count, lane);
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        for (int lane = 0; lane < offset; ++lane) lanes[lane] += lanes[lane + offset];
    return lanes[0];
}

template <class O, class G> void move_sample(const Samples &s, O *out, const O *images, const G *grad, int64_t sample,
                                             double radius, bool sign) {
    const float scale = scale_of(sum_of_slots(s.slots + sample * s.chunks, s.chunks), radius, sign);
    for (int chunk = s.chunks - 1; chunk >= 0; --chunk) {
        const Span span = sample_span(s, chunk, sample);
        const Move<O, G> move{out + span.start, images ? images + span.start : nullptr, grad + span.start, sign};
        for (int thread = 0; thread < THREADS; ++thread) move.share(span.count, thread, [&] { return scale; });
    }
}

template <class G> void norm_of_chunk(const Samples &s, const G *grad, int chunk, int64_t sample) {
    const Span span = sample_span(s, chunk, sample);
    const typename SampleNorm<G>::Here here{grad + span.start};
    Sums<1> sums[THREADS] = {};
    for (int thread = 0; thread < THREADS; ++thread)
        walk(SampleNorm<G>{}, here, span.count, is_aligned(here.grad), thread, sums[thread]);
    block_sum<1>(sums);
    s.slots[sample * s.chunks + chunk] = sums[0].v[0];
}

template <class O, class G>
int run(Samples s, O *out, const O *images, const G *grad, int64_t samples, double radius, bool sign, void *) {
    const int64_t group = group_of(samples, s.elements * static_cast<int64_t>(sizeof(G)));
    for (int64_t first = 0; first < samples; first += group) {
        const int64_t end = first + group < samples ? first + group : samples;
        for (int64_t sample = first; sample < end; ++sample)
            for (int chunk = 0; chunk < s.chunks; ++chunk) norm_of_chunk(s, grad, chunk, sample);
        for (int64_t sample = first; sample < end; ++sample) move_sample(s, out, images, grad, sample, radius, sign);
    }
    return 0;
}
#endif

} // namespace rsaft

using namespace rsaft;

extern "C" int rsaft_perturb_images(void *out, const void *images, const void *grad, int out_dtype, int grad_dtype,
                                    int64_t samples, int64_t elements, double radius, int sign, double *workspace,
                                    void *stream) {
    if (samples < 0 || elements < 0) return INVALID;
    if (samples == 0 || elements == 0) return 0;
    if (out == nullptr || grad == nullptr || workspace == nullptr) return INVALID;
    const int64_t chunks = (elements + IMAGE_CHUNK - 1) / IMAGE_CHUNK;
    if (chunks > INT32_MAX) return INVALID; // a grid's first side
    const Samples s{elements, static_cast<int>(chunks), workspace};
    return with_type(out_dtype, [&](auto o) {
        return with_type(grad_dtype, [&](auto g) {
            using O = decltype(o);
            return run(s, static_cast<O *>(out), static_cast<const O *>(images),
                       static_cast<const decltype(g) *>(grad), samples, radius, sign != 0, stream);
        });
    });
}
