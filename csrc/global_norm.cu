// Global gradient norm, first part: a float32 sum a chunk in its own slot (finish_norm.cu adds them). The bits follow
// from the chunk list alone, not from the GPU's size. Floor: the bytes of the gradients.

#include "chunks.cuh"

namespace rsaft {

template <class W, class G, bool ADAPTIVE> struct SumOfSquares {
    static constexpr int SUMS = 1;
    static constexpr int BLOCKS = 3;
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
            const Pack<float> g = to_floats(load_pack(here.grad + i));
            Pack<float> w{};
            if constexpr (ADAPTIVE) w = to_floats(load_pack(here.weight + i));
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) add(g.v[k], w.v[k], sums);
        } else {
            add(to_float(load_one(here.grad + i)), ADAPTIVE ? to_float(load_one(here.weight + i)) : 1.0f, sums);
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

} // namespace rsaft

using namespace rsaft;

extern "C" int rsaft_sum_of_squares(const rsaft_table *table, int adaptive, void *stream) {
    if (!is_valid(table) || (table->chunks > 0 && table->sum_sq == nullptr)) return INVALID;
    return with_type(table->dtypes[RSAFT_GRAD], [&](auto g) {
        using G = decltype(g);
        if (!adaptive) return launch(*table, SumOfSquares<float, G, false>{}, stream);
        return with_type(table->dtypes[RSAFT_WEIGHT],
                         [&](auto w) { return launch(*table, SumOfSquares<decltype(w), G, true>{}, stream); });
    });
}
