/* grad_values: block (i, j) of grad.T @ x, sums over the rows of both. Rows come in tiles that fit the
 * cache; a tile is packed once for all blocks of a piece, a strip of columns for each block row and
 * block column, so that both operands are read in order. The sums of a block are added up tile after
 * tile, in the output itself or, for 16-bit outputs, in scratch. Included by typed.h. */

enum { TYPED(GRAD_ROWS) = 64 };

/* Columns [first, first + n) of rows [m0, m0 + rows) -> out[m * stride + column], zero-padded. */
static void TYPED(pack_columns)(const void *x, int64_t x_row, int64_t x_col, int64_t m0, int64_t rows, int64_t first,
                              int64_t n, T *out, int64_t stride, int dtype) {
    for (int64_t m = 0; m < rows; m++) {
        const int64_t from = (m0 + m) * x_row + first * x_col;
        int64_t i = 0;
        if (x_col == 1)
            for (; i + W <= n; i += W) STORE(out, m * stride + i, LOAD(x, from + i, dtype), -1);
        for (; i < stride; i++) out[m * stride + i] = i < n ? ONE(x, from + i * x_col, dtype) : 0;
    }
}

SB_INLINE void TYPED(outer_as)(const T *grad, int64_t grad_row, const T *x, int64_t x_row, int64_t m, T *out,
                               int64_t c, const int tile_rows, const int vectors, int64_t rows, int64_t width,
                               int first) {
    V acc[SB_PANEL][2];
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) acc[i][v] = (V){0};
    TYPED(rank_updates)(acc, tile_rows, vectors, grad, 1, grad_row, x, x_row, m, 0);
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; i++) {
        if (i >= rows) break;
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const int64_t lanes = width - v * W;
            T *at = out + i * c + v * W;
            if (lanes >= W) {
                STORE(at, 0, first ? acc[i][v] : acc[i][v] + LOAD(at, 0, -1), -1);
            } else {
                const V before = first ? (V){0} : LOAD_PART(at, 0, (int)lanes, sizeof(T) == 4 ? SB_FLOAT32 : SB_FLOAT64);
                STORE_PART(at, 0, (int)lanes, acc[i][v] + before, sizeof(T) == 4 ? SB_FLOAT32 : SB_FLOAT64);
            }
        }
    }
}

#define SB_OUTER(rows_, vectors_)                                                                             \
    static __attribute__((noinline)) void TYPED(outer##rows_##x##vectors_)(                                   \
        const T *grad, int64_t grad_row, const T *x, int64_t x_row, int64_t m, T *out, int64_t c, int64_t rows, \
        int64_t width, int first) {                                                                           \
        TYPED(outer_as)(grad, grad_row, x, x_row, m, out, c, rows_, vectors_, rows, width, first);            \
    }
SB_OUTER(1, 1) SB_OUTER(2, 1) SB_OUTER(4, 1) SB_OUTER(6, 1) SB_OUTER(8, 1) SB_OUTER(12, 1)
SB_OUTER(1, 2) SB_OUTER(2, 2) SB_OUTER(4, 2) SB_OUTER(6, 2)
#if SB_TALL
SB_OUTER(8, 2) SB_OUTER(12, 2)
#endif

/* out (r, c) += grad (m, r).T @ x (m, c), from packed strips */
static void TYPED(outer)(const T *grad, int64_t r, const T *x, int64_t stride, int64_t m, T *out, int64_t c,
                         int first) {
    for (int64_t k = 0; k < c; k += 2 * W) {
        const int64_t width = sb_min(2 * W, c - k);
        for (int64_t n = 0; n < r;) {
            int64_t rows;
            if (width <= W) {
                rows = sb_min(SB_PANEL, r - n);
#define SB_CASE(a) TYPED(outer##a##x1)(grad + n, r, x + k, stride, m, out + n * c + k, c, rows, width, first);
                SB_ROWS_TALL(rows, SB_CASE)
#undef SB_CASE
            } else {
#define SB_CASE(a) TYPED(outer##a##x2)(grad + n, r, x + k, stride, m, out + n * c + k, c, rows, width, first);
#if SB_TALL
                rows = sb_min(SB_PANEL, r - n);
                SB_ROWS_TALL(rows, SB_CASE)
#else
                rows = sb_min(6, r - n);
                SB_ROWS_SHORT(rows, SB_CASE)
#endif
#undef SB_CASE
            }
            n += rows;
        }
    }
}

static void TYPED(grad)(void *pointer) {
    sb_grad_job *job = pointer;
    const sb_grad_values *p = job->p;
    const int64_t r = p->r, c = p->c, stride = sb_ceil_div(c, W) * W, tile = sb_min(TYPED(GRAD_ROWS), p->M);
    const int direct = sizeof(T) == sb_dtype_size(p->dtype);
    for (;;) {
        const int64_t chunk = atomic_fetch_add(&job->next_chunk, 1);
        if (chunk >= job->n_chunks) return;
        const int64_t begin = chunk * job->chunk, end = sb_min(begin + job->chunk, p->nnz);

        /* A register tile may read SB_PANEL columns past the last strip of grad. */
        T *x = sb_scratch(SB_SCRATCH_X, sizeof(T) * (size_t)(tile * p->C * stride) + 64);
        T *grad = sb_scratch(SB_SCRATCH_W, sizeof(T) * (size_t)(tile * p->R * r + SB_PANEL) +
                                               (direct ? 64 : sizeof(T) * (size_t)(job->chunk * r * c) + 128));
        unsigned char *needed = sb_scratch(SB_SCRATCH_FLAGS, (size_t)p->C);
        if (!x || !grad || !needed) {
            atomic_store(&job->failed, 1);
            return;
        }
        memset(needed, 0, (size_t)p->C);
        memset(grad + tile * p->R * r, 0, sizeof(T) * SB_PANEL);
        for (int64_t j = begin; j < end; j++) needed[p->col[j]] = 1;
        T *sums = direct ? (T *)p->out + begin * r * c : grad + sb_ceil_div(tile * p->R * r + SB_PANEL, W) * W;

        int64_t first_row = 0;
        while (p->crow[first_row + 1] <= begin) first_row++;
        for (int64_t m0 = 0; m0 < p->M; m0 += tile) {
            const int64_t rows = sb_min(tile, p->M - m0);
            for (int64_t i = 0; i < p->C; i++)
                if (needed[i])
                    TYPED(pack_columns)(p->x, p->x_row, p->x_col, m0, rows, i * c, sb_min(c, p->K - i * c),
                                        x + i * tile * stride, stride, p->dtype);
            int64_t i = first_row - 1, row_end = begin;
            for (int64_t j = begin; j < end; j++) {
                if (j == row_end) {
                    do i++;
                    while (p->crow[i + 1] <= j);
                    row_end = p->crow[i + 1];
                    TYPED(pack_columns)(p->grad, p->grad_row, p->grad_col, m0, rows, i * r, sb_min(r, p->N - i * r),
                                        grad + i * tile * r, r, p->dtype);
                }
                TYPED(outer)(grad + i * tile * r, r, x + p->col[j] * tile * stride, stride, rows,
                             sums + (j - begin) * r * c, c, m0 == 0);
            }
        }
        if (!direct) {
            const int64_t n = (end - begin) * r * c, at = begin * r * c;
            int64_t i = 0;
            for (; i + W <= n; i += W) STORE(p->out, at + i, LOAD(sums, i, -1), p->dtype);
            if (i < n) STORE_PART(p->out, at + i, (int)(n - i), LOAD(sums, i, -1), p->dtype);
        }
    }
}

#undef SB_OUTER
