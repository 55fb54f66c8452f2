/* The kernels for sums of type T (float or double), W lanes a vector V. Included by kernels.h.
 *
 * What limits them is the number of multiply-adds a core can start in a cycle, so everything serves one
 * loop, `rank_updates`: a tile of sums stays in registers while, for each k of each stored block, two
 * vectors of packed weights meet one broadcast element from each row of x. That needs
 *   - weights k-major ([k][lane]). `values` is n-major, so it is packed strip by strip into the scratch of
 *     the thread that called, once for all threads and rows of x; few rows take `small` instead,
 *     which reads the canonical order;
 *   - x in panels of 12 rows, [k / KC][row][k % KC]: KC elements are one cache line, so packing is a copy
 *     of whole lines (any dtype, any strides), rows lie at constant offsets, and rows that are 4096
 *     bytes apart no longer fight for the same lines of the cache. Where few outputs read an element of x,
 *     and it is of type T, copying it costs more than it brings: `direct` tiles read x where it lies.
 */

/* acc[i][v] += a[i * a_row + k * a_step] * w[k * w_step + v * W] for k < n. Unrolled by four, a product
 * takes 2 to 5 % less on Zen 3, more where somebody else keeps the core's other thread busy; by sixteen no less,
 * by eight as much as not at all. The lines of w that are due `ahead` steps later are asked for: where w comes
 * from beyond L1, a product takes 2 to 20 % less with AVX-512 and up to 8 % less with AVX2 (Sapphire Rapids; 16, 24
 * and 40 steps are alike, 8 are too few). */
SB_INLINE void TYPED(rank_updates)(V acc[SB_PANEL][2], const int rows, const int vectors, const T *a,
                                   const int64_t a_row, const int64_t a_step, const T *w,
                                   const int64_t w_step, int64_t n, const int ahead) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < n; k++) {
        V b[2];
        if (ahead)
#pragma GCC unroll 2
            for (int byte = 0; byte < vectors * SB_VECTOR_BYTES; byte += 64)
                __builtin_prefetch((const char *)(w + ahead * w_step) + byte);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) b[v] = LOAD(w, v * W, -1);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const T s = a[i * a_row];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) acc[i][v] += b[v] * s;
        }
        a += a_step;
        w += w_step;
    }
}

/* Runs a macro with the number of rows as a constant, for the smallest register tile that holds
 * `rows` of them. */
#define SB_ROWS_TALL(rows, CASE) \
    if ((rows) > 8) { CASE(12) } \
    else if ((rows) > 6) { CASE(8) } \
    else if ((rows) > 4) { CASE(6) } \
    else if ((rows) > 2) { CASE(4) } \
    else if ((rows) > 1) { CASE(2) } \
    else { CASE(1) }
#define SB_ROWS_SHORT(rows, CASE) \
    if ((rows) > 4) { CASE(6) } \
    else if ((rows) > 2) { CASE(4) } \
    else if ((rows) > 1) { CASE(2) } \
    else { CASE(1) }

/* Runs a macro with the storage type as a constant, of those whose sums are of type T. */
#ifdef SB_DOUBLE
#define SB_WITH_DTYPE(dtype, CASE) { CASE(SB_FLOAT64) }
#else
#define SB_WITH_DTYPE(dtype, CASE) \
    switch (dtype) { \
    case SB_BFLOAT16: { CASE(SB_BFLOAT16) } break; \
    case SB_FLOAT16: { CASE(SB_FLOAT16) } break; \
    default: { CASE(SB_FLOAT32) } \
    }
#endif

#include "pack.h"
#include "product.h"
#include "few_rows.h"
#include "gradient.h"

#undef SB_WITH_DTYPE
#undef SB_ROWS_TALL
#undef SB_ROWS_SHORT
#undef T
#undef V
#undef W
#undef KC
#undef TYPED
#undef LOAD
#undef STORE
#undef LOAD_PART
#undef STORE_PART
#undef ONE
#undef ACTIVATE
