// The library for tensors in host memory: the operations of the .cu files beside it, which decide what is read, written
// and refused, walked here by threads over chunks and in tiles over a chunk. setup.py compiles this one file with the
// C++ compiler, once for each instruction set; `stream` is how many threads a call may use, as an integer.
//
// A tile is 256 elements in arrays of float32, each step of the arithmetic a function with a loop over it that
// compilers turn into vector instructions: compiled once for each type, not for each combination of types. The formulas
// are those of the headers, multiply-adds unfused: every backend rounds alike. Sums are float64 from tile to tile, lane
// by lane, and a slot a chunk: their bits depend on no thread and on no instruction set.

#define RSAFT_CPU

#include "blocks.cuh"
#include "chunks.cuh"

namespace rsaft {

// Seen before the sources that call them, these take the place of the walk that copies a GPU's.
template <class W, class G, bool ADAPTIVE> struct SumOfSquares;
template <class W, class G, bool MASTER, bool STOCHASTIC> struct Perturb;
template <class W, bool MASTER> struct Restore;
template <class Target> struct Step;
template <class Target> struct Step8;

template <class W, class G, bool ADAPTIVE>
int launch(const rsaft_table &, const SumOfSquares<W, G, ADAPTIVE> &, void *stream);
template <class W, class G, bool MASTER, bool STOCHASTIC>
int launch(const rsaft_table &, const Perturb<W, G, MASTER, STOCHASTIC> &, void *stream);
template <class W, bool MASTER> int launch(const rsaft_table &, const Restore<W, MASTER> &, void *stream);
template <class Target> int launch(const rsaft_table &, const Step<Target> &, void *stream);
template <class Target> int launch_blocks(const rsaft_table &, const Step8<Target> &, void *stream);

} // namespace rsaft

#include "device.cu"
#include "finish_norm.cu"
#include "global_norm.cu"
#include "perturb_images.cu"
#include "sam_adamw_step.cu"
#include "sam_adamw_step_8bit.cu"
#include "sam_perturb.cu"
#include "sam_restore.cu"

#include <algorithm>
#include <atomic>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

namespace rsaft {

// -- threads over chunks ----------------------------------------------------------------------------------------------

constexpr int64_t ELEMENTS_A_THREAD = 1 << 16; // fewer are done before another thread has started, some 20 us

inline int64_t offered(void *stream) {
    return std::max<int64_t>(static_cast<int64_t>(reinterpret_cast<intptr_t>(stream)), 1);
}

// work(item) for every item, by as many of the threads as the elements are worth. Threads take some items at a time, so
// that none waits long for the last.
inline int share(int64_t items, int64_t elements, void *stream, const std::function<void(int64_t)> &work) {
    const int64_t threads = std::clamp<int64_t>(elements / ELEMENTS_A_THREAD, 1, offered(stream));
    const int64_t some = std::clamp<int64_t>(items / (8 * threads), 1, 64);
    std::atomic<int64_t> next{0};
    const auto run = [&] {
        for (int64_t first; (first = next.fetch_add(some)) < items;)
            for (int64_t item = first; item < std::min(first + some, items); ++item) work(item);
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < threads; ++i) others.emplace_back(run);
    } catch (const std::system_error &) {
        // No more threads to be had: those that there are do all of it.
    }
    run();
    for (std::thread &other : others) other.join();
    return 0;
}

inline int over_chunks(const rsaft_table &t, void *stream, const std::function<void(int)> &work) {
    int64_t elements = 0;
    for (int chunk = 0; chunk < t.chunks && elements < offered(stream) * ELEMENTS_A_THREAD; ++chunk)
        elements += span_of(t, chunk).count;
    return share(t.chunks, elements, stream, [&](int64_t chunk) { work(static_cast<int>(chunk)); });
}

// -- tiles ------------------------------------------------------------------------------------------------------------

constexpr int TILE = BLOCK;
using Tile = float[TILE];

#if defined(__GNUC__)
#define RSAFT_ONCE __attribute__((noinline))
#else
#define RSAFT_ONCE
#endif

// Elements from p on as float32; zeros beyond the n that there are.
template <class T> RSAFT_ONCE void load(const T *p, int n, Tile &x) {
    if (n == TILE) {
        for (int k = 0; k < TILE; ++k) x[k] = to_float(p[k]);
    } else {
        for (int k = 0; k < n; ++k) x[k] = to_float(p[k]);
        for (int k = n; k < TILE; ++k) x[k] = 0.0f;
    }
}

template <class T> inline void store(T *p, int n, const T (&x)[TILE]) {
    memcpy(p, x, n == TILE ? sizeof x : n * sizeof(T));
}

// To the weight's type. Element i is the tile's first, counted from where `rounding` counts.
template <class W>
RSAFT_ONCE void round(const Rounding<false> &, const Rounding<false>::Keys &, int, const Tile &x, W (&out)[TILE]) {
    for (int k = 0; k < TILE; ++k) out[k] = from_float<W>(x[k]);
}

RSAFT_ONCE inline void round(const Rounding<true> &rounding, const RoundKeys &keys, int i, const Tile &x,
                             bf16 (&out)[TILE]) {
    constexpr int PACKS = TILE / VECTOR;
    uint32_t words[4][PACKS], drawn[TILE];
    for (int p = 0; p < PACKS; ++p) {
        const Words of_pack = rounding.draw(i + p * VECTOR, keys);
        for (int w = 0; w < 4; ++w) words[w][p] = of_pack.v[w];
    }
    for (int p = 0; p < PACKS; ++p)
        for (int k = 0; k < VECTOR; ++k) drawn[p * VECTOR + k] = words[k / 2][p] >> (16 * (k & 1)) & 0xffffu;
    for (int k = 0; k < TILE; ++k) out[k] = round_stochastically(x[k], drawn[k]);
}

// A sum over a chunk: float32 products, eight a lane in float32, then float64.
struct Sum {
    static constexpr int LANES = 32;
    double lanes[LANES] = {};

    RSAFT_ONCE void add(const Tile &a, const Tile &b) {
        float tile[LANES] = {};
        for (int k = 0; k < TILE; k += LANES)
            for (int lane = 0; lane < LANES; ++lane) tile[lane] += a[k + lane] * b[k + lane];
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] += static_cast<double>(tile[lane]);
    }
    // In float64 throughout: squares of float32 neither overflow nor vanish.
    RSAFT_ONCE void add_squares(const Tile &x) {
        for (int k = 0; k < TILE; k += LANES)
            for (int lane = 0; lane < LANES; ++lane) {
                const double wide = x[k + lane];
                lanes[lane] += wide * wide;
            }
    }
    double total() const {
        double sum = 0.0;
        for (const double lane : lanes) sum += lane;
        return sum;
    }
};

// work(first element, elements) for every tile.
template <class F> inline void over_tiles(int count, const F &work) {
    for (int i = 0; i < count; i += TILE) work(i, std::min(count - i, TILE));
}

// -- the operations ---------------------------------------------------------------------------------------------------

template <class W, class G, bool ADAPTIVE>
int launch(const rsaft_table &t, const SumOfSquares<W, G, ADAPTIVE> &op, void *stream) {
    return over_chunks(t, stream, [&](int chunk) {
        typename SumOfSquares<W, G, ADAPTIVE>::Here here{};
        Sum sum;
        if (op.begin(t, span_of(t, chunk), here))
            over_tiles(here.count, [&](int i, int n) {
                Tile grad, weight;
                load(here.grad + i, n, grad);
                if constexpr (ADAPTIVE) {
                    load(here.weight + i, n, weight);
                    for (int k = 0; k < TILE; ++k) grad[k] *= weight[k];
                }
                sum.add_squares(grad);
            });
        t.sum_sq[chunk] = sum.total();
    });
}

RSAFT_ONCE inline void move_tile(const Tile &base, const Tile &grad, float scale, bool adaptive, Tile &wanted,
                                 Tile &moved) {
    for (int k = 0; k < TILE; ++k) wanted[k] = scale * grad[k];
    if (adaptive)
        for (int k = 0; k < TILE; ++k) wanted[k] *= base[k] * base[k];
    for (int k = 0; k < TILE; ++k) moved[k] = base[k] + wanted[k];
}

template <class W> RSAFT_ONCE void subtract(const W (&a)[TILE], const W (&b)[TILE], Tile &difference) {
    for (int k = 0; k < TILE; ++k) difference[k] = to_float(a[k]) - to_float(b[k]);
}

template <class W, class G, bool MASTER, bool STOCHASTIC>
int launch(const rsaft_table &t, const Perturb<W, G, MASTER, STOCHASTIC> &op, void *stream) {
    using Op = Perturb<W, G, MASTER, STOCHASTIC>;
    return over_chunks(t, stream, [&](int chunk) {
        typename Op::Here here{};
        Sum sums[3]; // applied^2, applied * wanted, wanted^2
        if (op.begin(t, span_of(t, chunk), here))
            over_tiles(here.count, [&](int i, int n) {
                Tile base, grad, wanted, moved;
                W old[TILE] = {}, out[TILE];
                if (here.grad != nullptr) load(here.grad + i, n, grad);
                if constexpr (MASTER) {
                    load(here.source + i, n, base);
                    round(Rounding<false>{}, {}, i, base, old);
                } else {
                    memcpy(old, here.weight + i, n * sizeof(W));
                    load(old, TILE, base);
                    store(here.source + i, n, old); // after the gradient has been read: it may be the same memory
                }
                if (here.grad == nullptr) return;
                move_tile(base, grad, here.scale, here.adaptive, wanted, moved);
                round(here.rounding, op.keys, i, moved, out);
                store(here.weight + i, n, out);
                Tile applied;
                subtract(out, old, applied);
                sums[0].add(applied, applied);
                sums[1].add(applied, wanted);
                sums[2].add(wanted, wanted);
            });
        for (int n = 0; n < 3; ++n) t.perturbation_sums[3 * static_cast<int64_t>(chunk) + n] = sums[n].total();
    });
}

// A chunk's weights from where they are restored from.
template <class W, bool MASTER, class S> RSAFT_ONCE void put_back(W *weight, const S *source, int count) {
    for (int i = 0; i < count; ++i) weight[i] = Restore<W, MASTER>::back(source[i]);
}

template <class W, bool MASTER> int launch(const rsaft_table &t, const Restore<W, MASTER> &op, void *stream) {
    return over_chunks(t, stream, [&](int chunk) {
        typename Restore<W, MASTER>::Here here{};
        if (op.begin(t, span_of(t, chunk), here)) put_back<W, MASTER>(here.weight, here.source, here.count);
    });
}

RSAFT_ONCE inline void adamw_tile(Tile &base, const Tile &grad, Tile &m, Tile &v, const Row &by) {
    const Row row = by;
    for (int k = 0; k < TILE; ++k) update_moments(grad[k], m[k], v[k], row);
    for (int k = 0; k < TILE; ++k) base[k] = adamw(base[k], m[k], v[k], row);
}

// New moments and weights of a tile, from moments in float32.
template <class Target>
inline void update_tile(const Target &here, const typename Target::Keys &keys, int i, int n, Tile &m, Tile &v) {
    Tile base, grad;
    load(here.source + i, n, base);
    load(here.grad + i, n, grad);
    adamw_tile(base, grad, m, v, here.row);
    typename Target::Weight out[TILE];
    round(here.rounding, keys, i, base, out);
    store(here.weight + i, n, out);
    if constexpr (Target::HAS_MASTER) store(here.source + i, n, base);
}

template <class Target> int launch(const rsaft_table &t, const Step<Target> &op, void *stream) {
    return over_chunks(t, stream, [&](int chunk) {
        typename Step<Target>::Here here{};
        if (!op.begin(t, span_of(t, chunk), here)) return;
        if (here.grad == nullptr) {
            put_back<typename Target::Weight, Target::HAS_MASTER>(here.weight, here.source, here.count);
            return;
        }
        over_tiles(here.count, [&](int i, int n) {
            Tile m, v;
            load(here.exp_avg + i, n, m);
            load(here.exp_avg_sq + i, n, v);
            update_tile(here, op.keys, i, n, m, v);
            store(here.exp_avg + i, n, m);
            store(here.exp_avg_sq + i, n, v);
        });
    });
}

RSAFT_ONCE inline void decode_tile(const uint8_t *codes, int n, const uint32_t (&book)[CELLS], float scale, Tile &x) {
    for (int k = 0; k < n; ++k) x[k] = bits_float(book[codes[k]]) * scale;
    for (int k = n; k < TILE; ++k) x[k] = 0.0f;
}

// encode() of quantize.cuh, an element at a time: a processor has no instruction that picks bytes of four at once.
template <bool SIGNED> inline uint8_t encode_one(float fraction, const uint32_t (&book)[CELLS]) {
    if (SIGNED) fraction = fraction > -0.996f ? fraction : -0.996f;
    const float magnitude = fabsf(fraction), a = magnitude > LEAST_FRACTION ? magnitude : LEAST_FRACTION;
    const uint32_t code = (book[float_bits(a) >> CELL_BITS & (CELLS - 1)] + float_bits(a)) >> CELL_BITS & 0xffu;
    return static_cast<uint8_t>(SIGNED && float_bits(fraction) >> 31 ? 254 - code : code);
}

template <bool SIGNED>
RSAFT_ONCE void encode_tile(uint8_t *codes, int n, const uint32_t (&book)[CELLS], float &absmax, const Tile &x) {
    uint32_t most = 0; // as bits, magnitudes keep their order, and a NaN comes out on top
    for (int k = 0; k < TILE; ++k) most = std::max(most, float_bits(x[k]) & 0x7fffffffu);
    absmax = bits_float(most);
    const float inverse = inverse_of(absmax);
    uint8_t out[TILE];
    for (int k = 0; k < TILE; ++k) out[k] = encode_one<SIGNED>(x[k] * inverse, book);
    store(codes, n, out);
}

template <class Target> int launch_blocks(const rsaft_table &t, const Step8<Target> &op, void *stream) {
    return over_chunks(t, stream, [&](int chunk) {
        typename Step8<Target>::Here here{};
        if (!op.begin(t, span_of(t, chunk), here)) return;
        if (here.grad == nullptr) {
            put_back<typename Target::Weight, Target::HAS_MASTER>(here.weight, here.source, here.count);
            return;
        }
        over_tiles(here.count, [&](int i, int n) {
            Tile m, v;
            const int block = i / BLOCK;
            decode_tile(here.exp_avg + i, n, CODEBOOK.exp_avg, here.absmax[block], m);
            decode_tile(here.exp_avg_sq + i, n, CODEBOOK.exp_avg_sq, here.absmax_sq[block], v);
            update_tile(here, op.keys, i, n, m, v);
            for (int k = n; k < TILE; ++k) m[k] = v[k] = 0.0f; // what is not there decides no absmax
            encode_tile<true>(here.exp_avg + i, n, CODEBOOK.exp_avg, here.absmax[block], m);
            encode_tile<false>(here.exp_avg_sq + i, n, CODEBOOK.exp_avg_sq, here.absmax_sq[block], v);
        });
    });
}

template <class O, class G>
int run(Samples s, O *out, const O *images, const G *grad, int64_t samples, double radius, bool sign, void *stream) {
    const int64_t elements = samples * s.elements;
    share(samples * s.chunks, elements, stream, [&](int64_t item) {
        const Span span = sample_span(s, static_cast<int>(item % s.chunks), item / s.chunks);
        Sum sum;
        over_tiles(span.count, [&](int i, int n) {
            Tile g;
            load(grad + span.start + i, n, g);
            sum.add_squares(g);
        });
        s.slots[item] = sum.total();
    });
    return share(samples * s.chunks, elements, stream, [&](int64_t item) {
        const int64_t sample = item / s.chunks;
        double sum = 0.0;
        for (int i = 0; i < s.chunks; ++i) sum += s.slots[sample * s.chunks + i];
        const Span span = sample_span(s, static_cast<int>(item % s.chunks), sample);
        const float scale = scale_of(sum, radius, sign);
        const Move<O, G> move{out + span.start, images ? images + span.start : nullptr, grad + span.start, sign};
        for (int i = 0; i < span.count; ++i) {
            const float image = images ? to_float(move.images[i]) : 0.0f;
            move.out[i] = from_float<O>(move.moved(image, to_float(move.grad[i]), scale));
        }
    });
}

} // namespace rsaft
