// Restore: the weight's old bits from the backup, or the float32 master rounded again. Nothing after a no-op.

#include "restore.cuh"

using namespace rsaft;

extern "C" int rsaft_sam_restore(const rsaft_table *table, const float *found_inf, void *stream) {
    if (table == nullptr || found_inf == nullptr || table->chunk_size % VECTOR != 0) return 1;
    const bool master = table->dtypes[RSAFT_MASTER] == RSAFT_F32;
    if (!master && table->dtypes[RSAFT_BACKUP] != table->dtypes[RSAFT_WEIGHT]) return 1;
    return with_type(table->dtypes[RSAFT_WEIGHT], [&](auto w) {
        using W = decltype(w);
        return master ? launch(*table, Restore<W, true>{found_inf}, stream)
                      : launch(*table, Restore<W, false>{found_inf}, stream);
    });
}
