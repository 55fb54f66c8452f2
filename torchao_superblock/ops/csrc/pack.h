/* Packing: x into panels, blocks of weights into strips, in the order in which the product reads them. Included by
 * typed.h. */

#ifndef SB_PACK_LINES
#define SB_PACK_LINES 4
#endif

/* Rows [m0, m0 + rows) of x (m, k), with zeros from column K on -> panels; only the lines of KC columns that `needed`
 * marks. */
SB_INLINE void TYPED(pack_x_as)(const void *x, int64_t x_row, int64_t x_col, int64_t m0, int64_t rows, int64_t K,
                                int64_t n_lines, const unsigned char *needed, T *out, const int dtype) {
    for (int64_t top = 0; top < rows; top += SB_PANEL, out += n_lines * SB_PANEL * KC)
        /* A few lines of each row in turn: reads stay long enough for the prefetcher, and the part of
         * the panel being written stays in L1. */
        for (int64_t left = 0; left < n_lines; left += SB_PACK_LINES)
            for (int64_t i = 0; i < SB_PANEL; i++) {
                const int64_t from = (m0 + top + i) * x_row;
                for (int64_t line = left; line < sb_min(left + SB_PACK_LINES, n_lines); line++) {
                    if (!needed[line]) continue;
                    const int64_t k = line * KC;
                    T *to = out + (line * SB_PANEL + i) * KC;
                    if (top + i < rows && x_col == 1 && k + KC <= K) {
                        /* the lines of the turn after next */
                        if (k + 2 * SB_PACK_LINES * KC < K)
                            __builtin_prefetch((const char *)x + (from + k + 2 * SB_PACK_LINES * KC) * (int64_t)sb_dtype_size(dtype));
#pragma GCC unroll 4
                        for (int e = 0; e < KC; e += W) *(V *)(to + e) = LOAD(x, from + k + e, dtype);
                    } else {
                        const int64_t n = top + i < rows ? sb_min(KC, K - k) : 0;
                        int64_t e = 0;
                        if (x_col == 1)
                            for (; e + W <= n; e += W) *(V *)(to + e) = LOAD(x, from + k + e, dtype);
                        for (; e < KC; e++) to[e] = e < n ? ONE(x, from + (k + e) * x_col, dtype) : 0;
                    }
                }
            }
}

/* Lanes [n0, n0 + width) of stored block `values[j]`, k-major and zero-padded to `lanes`. */
SB_INLINE void TYPED(pack_block_as)(const sb_product_job *job, int64_t j, int64_t n0, int64_t width, int64_t lanes,
                                    T *out, const int dtype) {
    const sb_product *p = job->p;
    const int64_t r = p->r, c = p->c;
    const int64_t block = (job->perm ? job->perm[j] : j) * r * c;
    if (job->perm) { /* stored as (c, r): already k-major */
        for (int64_t k = 0; k < c; k++) {
            const int64_t from = block + k * r + n0;
            int64_t n = 0;
            for (; n + W <= width; n += W) *(V *)(out + k * lanes + n) = LOAD(p->values, from + n, dtype);
            for (; n < lanes; n++) out[k * lanes + n] = n < width ? ONE(p->values, from + n, dtype) : 0;
        }
        return;
    }
    const int64_t first = block + n0 * c;
    int64_t n = 0;
#ifndef SB_DOUBLE
    for (; n + SB_SQUARE <= width; n += SB_SQUARE) {
        int64_t k = 0;
        for (; k + SB_SQUARE <= c; k += SB_SQUARE) {
            /* the same place of the next block (which may lie beyond the end: a prefetch cannot fault) */
            const char *next = (const char *)p->values + (first + n * c + k + r * c) * (int64_t)sb_dtype_size(dtype);
            if (k % 16 == 0)
                for (int i = 0; i < SB_SQUARE; i++)
                    __builtin_prefetch(next + i * c * (int64_t)sb_dtype_size(dtype));
            turn_square(p->values, first + n * c + k, c, out + k * lanes + n, lanes, dtype);
        }
        for (; k < c; k++)
            for (int64_t i = n; i < n + SB_SQUARE; i++)
                out[k * lanes + i] = ONE(p->values, first + i * c + k, dtype);
    }
#endif
    for (; n < lanes; n++)
        for (int64_t k = 0; k < c; k++)
            out[k * lanes + n] = n < width ? ONE(p->values, first + n * c + k, dtype) : 0;
}

static void TYPED(pack_x)(const sb_product *p, int64_t m0, int64_t rows, const unsigned char *needed, T *out) {
    const int64_t n_lines = sb_ceil_div(p->C * p->c, KC);
#define SB_CASE(dtype) TYPED(pack_x_as)(p->x, p->x_row, p->x_col, m0, rows, p->K, n_lines, needed, out, dtype);
    SB_WITH_DTYPE(p->dtype, SB_CASE)
#undef SB_CASE
}

static void TYPED(pack_block)(const sb_product_job *job, int64_t j, int64_t n0, int64_t width, int64_t lanes, T *out) {
#define SB_CASE(dtype) TYPED(pack_block_as)(job, j, n0, width, lanes, out, dtype);
    SB_WITH_DTYPE(job->p->dtype, SB_CASE)
#undef SB_CASE
}

SB_INLINE int64_t TYPED(padded)(int64_t width) { return width > W ? 2 * W : W; }
