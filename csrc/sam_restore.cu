// Restore: the weight's old bits from the backup, or the float32 master rounded again. Nothing after a no-op.

#include "restore.cuh"

using namespace rsaft;

extern "C" int rsaft_sam_restore(const rsaft_table *table, const float *found_inf, void *stream) {
    if (!is_valid(table) || found_inf == nullptr || !can_restore(*table)) return INVALID;
    return with_type(table->dtypes[RSAFT_WEIGHT], [&](auto w) {
        using W = decltype(w);
        if constexpr (sizeof(W) == 2)
            if (has_master(*table)) return launch(*table, Restore<W, true>{found_inf}, stream);
        return launch(*table, Restore<W, false>{found_inf}, stream);
    });
}
