/* The kernels for sums of type T (float or double), W lanes a vector V. Included by kernels.h.
 *
 * What limits them is the number of multiply-adds a core can start in a cycle, so everything serves one
 * loop, `rank_updates`: a tile of sums stays in registers while, for each k of each stored block, two
 * vectors of packed weights meet one broadcast element from each row of x. That needs
 *   - weights k-major ([k][lane]). `values` is n-major, so it is packed strip by strip into the scratch of
 *     the thread that called, once for all threads and rows of x; few rows take `small` below instead,
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

/* ------------------------------------------------------------------------------------------------
 * Packing. */

#ifndef SB_PACK_LINES
#define SB_PACK_LINES 4
#endif

/* Rows [m0, m0 + rows) of x (m, k) -> panels; only the lines of KC columns that `needed` marks. */
SB_INLINE void TYPED(pack_x_as)(const void *x, int64_t x_row, int64_t x_col, int64_t m0, int64_t rows,
                                int64_t K, const unsigned char *needed, T *out, const int dtype) {
    const int64_t n_lines = sb_ceil_div(K, KC);
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
                        for (int64_t e = 0; e < KC; e++)
                            to[e] = e < n ? ONE(x, from + (k + e) * x_col, dtype) : 0;
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
    const int64_t K = p->C * p->c;
    switch (p->dtype) {
#ifdef SB_DOUBLE
    default:
        TYPED(pack_x_as)(p->x, p->x_row, p->x_col, m0, rows, K, needed, out, SB_FLOAT64);
#else
    case SB_BFLOAT16:
        TYPED(pack_x_as)(p->x, p->x_row, p->x_col, m0, rows, K, needed, out, SB_BFLOAT16);
        break;
    case SB_FLOAT16:
        TYPED(pack_x_as)(p->x, p->x_row, p->x_col, m0, rows, K, needed, out, SB_FLOAT16);
        break;
    default:
        TYPED(pack_x_as)(p->x, p->x_row, p->x_col, m0, rows, K, needed, out, SB_FLOAT32);
#endif
    }
}

static void TYPED(pack_block)(const sb_product_job *job, int64_t j, int64_t n0, int64_t width, int64_t lanes, T *out) {
    const sb_product *p = job->p;
    switch (p->dtype) {
#ifdef SB_DOUBLE
    default:
        TYPED(pack_block_as)(job, j, n0, width, lanes, out, SB_FLOAT64);
#else
    case SB_BFLOAT16:
        TYPED(pack_block_as)(job, j, n0, width, lanes, out, SB_BFLOAT16);
        break;
    case SB_FLOAT16:
        TYPED(pack_block_as)(job, j, n0, width, lanes, out, SB_FLOAT16);
        break;
    default:
        TYPED(pack_block_as)(job, j, n0, width, lanes, out, SB_FLOAT32);
#endif
    }
}

SB_INLINE int64_t TYPED(padded)(int64_t width) { return width > W ? 2 * W : W; }

/* ------------------------------------------------------------------------------------------------
 * The product: y tile = act(x panel @ packed strip + bias). */

/* Activation and store of `rows` rows of sums, for what store_tile does not do. Not inlined: it
 * would be repeated in every tile. */
static __attribute__((noinline)) void TYPED(finish)(const sb_product *p, const T *sums, int vectors, int64_t m,
                                                    int64_t rows, int64_t n, int64_t width) {
    const int64_t N = p->R * p->r;
    for (int64_t i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) {
            const V y = ACTIVATE(*(const V *)(sums + (i * 2 + v) * W), p->activation);
            const int64_t at = (m + i) * N + n + v * W;
            if (width >= (v + 1) * W)
                STORE(p->y, at, y, p->dtype);
            else
                STORE_PART(p->y, at, (int)(width - v * W), y, p->dtype);
        }
}

SB_INLINE void TYPED(store_tile)(const sb_product *p, V acc[SB_PANEL][2], const int tile_rows, const int vectors,
                                 int64_t m, int64_t rows, int64_t n0, const int dtype) {
    int64_t at = m * p->R * p->r + n0;
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; i++) {
        if (i >= rows) break;
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) STORE(p->y, at + v * W, acc[i][v], dtype);
        at += p->R * p->r;
    }
}

#ifndef SB_DOUBLE
/* Whether a tile may hold a NaN: its sum is one then (as it is if infinities of both signs meet). */
SB_INLINE int TYPED(may_hold_nan)(V acc[SB_PANEL][2], const int tile_rows, const int vectors) {
    V sums[2] = {{0}, {0}};
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sums[v] += acc[i][v];
    sums[0] += sums[1];
    return any(sums[0] != sums[0]);
}
#endif

SB_INLINE void TYPED(tile_as)(const sb_product *p, const sb_strip *strip, const T *panel, const T *w,
                              const int tile_rows, const int vectors, int64_t m, int64_t rows, const int direct) {
    const int64_t a_row = direct ? p->x_row : KC, a_line = direct ? KC : SB_PANEL * KC;
    const int64_t n0 = strip->row * p->r + strip->n0;
    V bias[2] = {{0}, {0}};
    if (p->bias)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            bias[v] = strip->width >= (v + 1) * W
                          ? LOAD(p->bias, n0 + v * W, p->dtype)
                          : LOAD_PART(p->bias, n0 + v * W, (int)(strip->width - v * W), p->dtype);
    V acc[SB_PANEL][2];
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) acc[i][v] = bias[v];

    /* One line of a panel at a time, while the one after it, of this block or the next, is on its way. */
    const int32_t *col = p->col + p->crow[strip->row], *const last = p->col + p->crow[strip->row + 1];
    if (p->c % KC == 0) {
        const int64_t lines = p->c / KC, block = lines * a_line;
        const T *line = col < last ? panel + *col * block : panel;
        for (; col < last; col++)
            for (int64_t left = lines; left > 0; left--) {
                const T *next = left == 1 && col + 1 < last ? panel + col[1] * block : line + a_line;
#pragma GCC unroll 12
                for (int i = 0; i < tile_rows; i++) __builtin_prefetch(next + i * a_row);
                TYPED(rank_updates)(acc, tile_rows, vectors, line, a_row, 1, w, vectors * W, KC, SB_W_AHEAD);
                w += KC * vectors * W;
                line = next;
            }
    }
    for (; col < last; col++) { /* the same where blocks begin and end within a line */
        int64_t k = *col * p->c;
        const int64_t stop = k + p->c;
        while (k < stop) {
            const int64_t offset = k % KC, n = sb_min(KC - offset, stop - k);
            const int64_t ahead = k + n < stop || col + 1 == last ? k + n : col[1] * p->c;
            const T *next = panel + ahead / KC * (SB_PANEL * KC);
#pragma GCC unroll 12
            for (int i = 0; i < tile_rows; i++) __builtin_prefetch(next + i * KC);
            TYPED(rank_updates)(acc, tile_rows, vectors, panel + (k - offset) * SB_PANEL + offset, KC, 1,
                                w, vectors * W, n, SB_W_AHEAD);
            w += n * vectors * W;
            k += n;
        }
    }

    int plain = p->activation == SB_NONE && strip->width == vectors * W;
#ifndef SB_DOUBLE
    if (plain && p->dtype == SB_BFLOAT16) plain = !TYPED(may_hold_nan)(acc, tile_rows, vectors);
#endif
    if (plain) {
        switch (p->dtype) {
#ifdef SB_DOUBLE
        default:
            TYPED(store_tile)(p, acc, tile_rows, vectors, m, rows, n0, SB_FLOAT64);
#else
        case SB_BFLOAT16:
            TYPED(store_tile)(p, acc, tile_rows, vectors, m, rows, n0, SB_BFLOAT16_NUMBERS);
            break;
        case SB_FLOAT16:
            TYPED(store_tile)(p, acc, tile_rows, vectors, m, rows, n0, SB_FLOAT16);
            break;
        default:
            TYPED(store_tile)(p, acc, tile_rows, vectors, m, rows, n0, SB_FLOAT32);
#endif
        }
        return;
    }
    T sums[SB_PANEL * 2 * W] __attribute__((aligned(64)));
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) *(V *)(sums + (i * 2 + v) * W) = acc[i][v];
    TYPED(finish)(p, sums, vectors, m, rows, n0, strip->width);
}

/* One function for each register tile. */
#define SB_TILE_AS(name, rows_, vectors_, direct)                                                          \
    static __attribute__((noinline)) void TYPED(name##rows_##x##vectors_)(                              \
        const sb_product *p, const sb_strip *strip, const T *x, const T *w, int64_t m, int64_t rows) {    \
        TYPED(tile_as)(p, strip, x, w, rows_, vectors_, m, rows, direct);                              \
    }
#define SB_TILE(rows_, vectors_) SB_TILE_AS(tile, rows_, vectors_, 0)
SB_TILE(1, 1) SB_TILE(2, 1) SB_TILE(4, 1) SB_TILE(6, 1) SB_TILE(8, 1) SB_TILE(12, 1)
SB_TILE(1, 2) SB_TILE(2, 2) SB_TILE(4, 2) SB_TILE(6, 2)
#if SB_TALL
SB_TILE(8, 2) SB_TILE(12, 2)
SB_TILE_AS(direct, 12, 2, 1)
#else
SB_TILE_AS(direct, 6, 2, 1)
#endif

/* Whether direct tiles can serve a product, and are likely to be faster. */
static int TYPED(reads_directly)(const sb_product *p) {
    const int64_t row_bytes = p->x_row * (int64_t)sizeof(T);
    return sizeof(T) == sb_dtype_size(p->dtype) && p->x_col == 1 && (uintptr_t)p->x % sizeof(T) == 0 &&
           p->c % KC == 0 && p->r % (2 * W) == 0 && p->nnz * p->r < SB_DIRECT_USES * p->C &&
           /* the rows of a tile must not fight for one set of the cache */
           (row_bytes % 4096 != 0 || sb_l1_ways() >= (SB_TALL ? 12 : 6));
}

/* SB_PANEL rows of x as it lies. */
static void TYPED(direct_rows)(const sb_product *p, const sb_strip *strip, const T *x, const T *w, int64_t m) {
#if SB_TALL
    TYPED(direct12x2)(p, strip, x, w, m, SB_PANEL);
#else
    TYPED(direct6x2)(p, strip, x, w, m, 6);
    TYPED(direct6x2)(p, strip, x + 6 * p->x_row, w, m + 6, 6);
#endif
}

/* `rows` rows of one panel, at most SB_PANEL. */
static void TYPED(panel_rows)(const sb_product *p, const sb_strip *strip, const T *panel, const T *w, int64_t m,
                              int64_t rows) {
    if (strip->width <= W) {
#define SB_CASE(n) TYPED(tile##n##x1)(p, strip, panel, w, m, rows);
        SB_ROWS_TALL(rows, SB_CASE)
#undef SB_CASE
        return;
    }
#define SB_CASE(n) TYPED(tile##n##x2)(p, strip, panel, w, m, rows);
#if SB_TALL
    SB_ROWS_TALL(rows, SB_CASE)
#else
    if (rows > 6) {
        TYPED(tile6x2)(p, strip, panel, w, m, 6);
        panel += 6 * KC, m += 6, rows -= 6;
    }
    SB_ROWS_SHORT(rows, SB_CASE)
#endif
#undef SB_CASE
}

SB_INLINE sb_strip TYPED(strip)(const sb_product *p, int64_t index) {
    const int64_t per_row = sb_ceil_div(p->r, 2 * W), n0 = index % per_row * 2 * W;
    return (sb_strip){.row = index / per_row, .n0 = n0, .width = sb_min(2 * W, p->r - n0)};
}

/* Elements of a packed strip. */
SB_INLINE int64_t TYPED(strip_size)(const sb_product *p, const sb_strip *strip) {
    return (p->crow[strip->row + 1] - p->crow[strip->row]) * p->c * TYPED(padded)(strip->width);
}

static void TYPED(pack_strip)(const sb_product_job *job, const sb_strip *strip, T *out) {
    const sb_product *p = job->p;
    const int64_t lanes = TYPED(padded)(strip->width);
    for (int64_t j = p->crow[strip->row]; j < p->crow[strip->row + 1]; j++, out += p->c * lanes)
        TYPED(pack_block)(job, j, strip->n0, strip->width, lanes, out);
}

/* Asks for the lines of y that `rows` rows of a strip will write: they lie a row of y apart, too far for
 * the processor to foresee, and a line that is not in the cache is read before it is written. (Always
 * inlined: compilers drop calls of a function that does nothing but prefetch.) */
SB_INLINE void TYPED(prefetch_y)(const sb_product *p, const sb_strip *strip, int64_t m, int64_t rows) {
    const int64_t size = (int64_t)sb_dtype_size(p->dtype), row = p->R * p->r * size;
    const char *line = (const char *)p->y + m * row + (strip->row * p->r + strip->n0) * size;
    for (int64_t i = 0; i < rows; i++, line += row) __builtin_prefetch(line, 1);
}

/* Rows [m0, m0 + rows) of y, the strips of group g, a few neighbours at a time: their lines of y are
 * neighbours too, and they may read the same lines of x. The first thread to come packs each strip just
 * before it uses it, while it is near. */
static void TYPED(product_piece)(const sb_product_job *job, const T *x, int direct, int64_t m0, int64_t rows,
                                 int64_t g) {
    const sb_product *p = job->p;
    const int64_t x_row = direct ? p->x_row : sb_ceil_div(p->C * p->c, KC) * KC; /* elements of a row, also in a panel */
    const int64_t end = job->group[g + 1];
    T *w = (T *)job->packed + job->offset[g];
    int state = SB_UNPACKED;
    const int pack = atomic_compare_exchange_strong(&job->state[g], &state, SB_PACKING);
    while (!pack && atomic_load_explicit(&job->state[g], memory_order_acquire) != SB_PACKED) sched_yield();

    for (int64_t first = job->group[g], n; first < end; first += n) {
        sb_strip strips[SB_CHUNK];
        int64_t size[SB_CHUNK], chunk = 0;
        for (n = 0; n < SB_CHUNK && first + n < end && chunk < SB_CHUNK_ELEMENTS; chunk += size[n++]) {
            strips[n] = TYPED(strip)(p, first + n);
            size[n] = TYPED(strip_size)(p, &strips[n]);
            if (pack) TYPED(pack_strip)(job, &strips[n], w + chunk);
        }
        for (int64_t m = 0; m < rows; m += SB_PANEL) {
            const int64_t height = sb_min(SB_PANEL, rows - m);
            const T *strip = w;
            for (int64_t i = 0; i < n; strip += size[i++]) {
                if (i + 1 < n) TYPED(prefetch_y)(p, &strips[i + 1], m0 + m, height);
                if (direct)
                    TYPED(direct_rows)(p, &strips[i], x + m * x_row, strip, m0 + m);
                else
                    TYPED(panel_rows)(p, &strips[i], x + m * x_row, strip, m0 + m, height);
            }
        }
        w += chunk;
    }
    if (pack) atomic_store_explicit(&job->state[g], SB_PACKED, memory_order_release);
}

static void TYPED(product)(void *pointer) {
    sb_product_job *job = pointer;
    const sb_product *p = job->p;
    T *x_pack = sb_scratch(SB_SCRATCH_X, sizeof(T) * (size_t)(job->tile_rows * sb_ceil_div(p->C * p->c, KC) * KC) + 64);
    if (!x_pack) {
        atomic_store(&job->failed, 1);
        return;
    }
    const int may_read_directly = TYPED(reads_directly)(p);
    int64_t piece, tile_of_x = -1;
    while ((piece = atomic_fetch_add(&job->next_piece, 1)) < job->n_whole + (job->n_tiles - job->n_whole) * job->n_groups) {
        const int whole = piece < job->n_whole;
        const int64_t rest = piece - job->n_whole;
        const int64_t tile = whole ? piece : job->n_whole + rest / job->n_groups;
        const int64_t m0 = tile * job->tile_rows, rows = sb_min(job->tile_rows, p->M - m0);
        const int direct = may_read_directly && rows % SB_PANEL == 0;
        const T *x = direct ? (const T *)p->x + m0 * p->x_row : x_pack;
        if (tile != tile_of_x && !direct) TYPED(pack_x)(p, m0, rows, job->needed, x_pack);
        tile_of_x = tile;
        if (!whole) {
            TYPED(product_piece)(job, x, direct, m0, rows, rest % job->n_groups);
            continue;
        }
        for (int64_t visit = 0; visit < job->n_groups; visit++) /* each thread begins with another group */
            TYPED(product_piece)(job, x, direct, m0, rows, (tile + visit) % job->n_groups);
    }
}

/* ------------------------------------------------------------------------------------------------
 * Few rows: the time goes into reading the weights, so they are read once, where and as they lie.
 * Vectors run along k, and each (row of x, output) pair keeps one vector of partial sums until its
 * block row is done. Needs c to be a multiple of W. */

#ifdef SB_DOUBLE
SB_INLINE void TYPED(add_lanes)(const V *acc, const int n, T *sums) {
    for (int a = 0; a < n; a++) {
        T s = 0;
        for (int lane = 0; lane < W; lane++) s += acc[a][lane];
        sums[a] = s;
    }
}
#else
SB_INLINE quad quarter_sum(V v) {
    union {
        V whole;
        quad part[W / 4];
    } u = {.whole = v};
    quad s = u.part[0];
    for (int i = 1; i < W / 4; i++) s += u.part[i];
    return s;
}

/* Four vectors at a time: turn the 4 x 4 square of partial sums and add its rows. */
SB_INLINE void TYPED(add_lanes)(const V *acc, const int n, T *sums) {
#pragma GCC unroll 4
    for (int a = 0; a < n; a += 4) {
        const quad q0 = quarter_sum(acc[a]), q1 = quarter_sum(acc[a + 1]);
        const quad q2 = quarter_sum(acc[a + 2]), q3 = quarter_sum(acc[a + 3]);
        const quad s01 = SB_SHUFFLE(q0, q1, quadi, 0, 4, 1, 5) + SB_SHUFFLE(q0, q1, quadi, 2, 6, 3, 7);
        const quad s23 = SB_SHUFFLE(q2, q3, quadi, 0, 4, 1, 5) + SB_SHUFFLE(q2, q3, quadi, 2, 6, 3, 7);
        const quad s = SB_SHUFFLE(s01, s23, quadi, 0, 1, 4, 5) + SB_SHUFFLE(s01, s23, quadi, 2, 3, 6, 7);
        memcpy(sums + a, &s, sizeof s);
    }
}
#endif

/* bfloat16, two vectors at a time: seen as 32-bit words, a shift gives the even elements and a mask the
 * odd ones. x has been sorted the same way (even W, odd W) when it was copied. */
#define SB_PAIRS 100 /* a dtype for `dots`: SB_BFLOAT16 in pairs */

/* out[m * r + n + a] for `outputs` outputs and `rows` rows of x, outputs * rows a multiple of 4. */
SB_INLINE void TYPED(dots)(const sb_product *p, const T *x, int64_t x_row, int64_t i, int64_t n, const int outputs,
                           const int rows, T *out, const int dtype) {
    V acc[16];
#pragma GCC unroll 16
    for (int a = 0; a < 16; a++) acc[a] = (V){0};
    const int64_t c = p->c;
    for (int64_t j = p->crow[i]; j < p->crow[i + 1]; j++) {
        const T *xk = x + p->col[j] * c;
        const int64_t w = (j * p->r + n) * c;
#ifndef SB_DOUBLE
        if (dtype == SB_PAIRS) {
            for (int64_t k = 0; k < c; k += 2 * W) {
                V even[4], odd[4];
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++) {
                    even[m] = LOAD(xk, m * x_row + k, -1);
                    odd[m] = LOAD(xk, m * x_row + k + W, -1);
                }
#pragma GCC unroll 8
                for (int a = 0; a < outputs; a++) {
                    const vu pair = (vu)load_float((const uint16_t *)p->values + w + a * c + k, 0, SB_FLOAT32);
#pragma GCC unroll 4
                    for (int m = 0; m < rows; m++) {
                        acc[m * outputs + a] += (V)(pair << 16) * even[m];
                        acc[m * outputs + a] += (V)(pair & 0xffff0000u) * odd[m];
                    }
                }
            }
            continue;
        }
#endif
        for (int64_t k = 0; k < c; k += W) {
            V xs[4];
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) xs[m] = LOAD(xk, m * x_row + k, -1);
#pragma GCC unroll 8
            for (int a = 0; a < outputs; a++) {
                const V b = LOAD(p->values, w + a * c + k, dtype);
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++) acc[m * outputs + a] += b * xs[m];
            }
        }
    }
    T sums[16];
    TYPED(add_lanes)(acc, outputs * rows, sums);
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) memcpy(out + m * p->r + n, sums + m * outputs, sizeof(T) * (size_t)outputs);
}

/* Outputs [n, n + outputs) of block row i, for all rows of x. */
SB_INLINE void TYPED(dots_all_rows)(const sb_product *p, const T *x, int64_t x_row, int64_t i, int64_t n,
                                    const int outputs, T *out, const int dtype) {
    int64_t m = 0;
#if SB_TALL
    for (; m + 4 <= p->M; m += 4) TYPED(dots)(p, x + m * x_row, x_row, i, n, outputs, 4, out + m * p->r, dtype);
#endif
    for (; m + 3 <= p->M; m += 3) TYPED(dots)(p, x + m * x_row, x_row, i, n, outputs, 3, out + m * p->r, dtype);
    for (; m + 2 <= p->M; m += 2) TYPED(dots)(p, x + m * x_row, x_row, i, n, outputs, 2, out + m * p->r, dtype);
    for (; m < p->M; m++) TYPED(dots)(p, x + m * x_row, x_row, i, n, outputs, 1, out + m * p->r, dtype);
}

/* Where element k of x lies after the sorting for SB_PAIRS. */
SB_INLINE int64_t TYPED(sorted)(int64_t k) { return k / (2 * W) * (2 * W) + k % 2 * W + k % (2 * W) / 2; }

SB_INLINE void TYPED(small_as)(const sb_small_job *job, const T *x, int64_t x_row, int64_t g, T *out,
                               const int dtype) {
    const sb_product *p = job->p;
    const int64_t N = p->R * p->r;
    const int storage = dtype == SB_PAIRS ? SB_BFLOAT16 : dtype;
    for (int64_t i = job->group[g]; i < job->group[g + 1]; i++) {
        int64_t n = 0;
        if (p->M == 1)
            for (; n + 8 <= p->r; n += 8) TYPED(dots)(p, x, x_row, i, n, 8, 1, out, dtype);
        for (; n + 4 <= p->r; n += 4) TYPED(dots_all_rows)(p, x, x_row, i, n, 4, out, dtype);
        for (; n < p->r; n++) /* a last few outputs, one by one */
            for (int64_t m = 0; m < p->M; m++) {
                T s = 0;
                for (int64_t j = p->crow[i]; j < p->crow[i + 1]; j++)
                    for (int64_t k = 0; k < p->c; k++)
                        s += ONE(p->values, (j * p->r + n) * p->c + k, storage) *
                             x[m * x_row + p->col[j] * p->c + (dtype == SB_PAIRS ? TYPED(sorted)(k) : k)];
                out[m * p->r + n] = s;
            }
        for (int64_t m = 0; m < p->M; m++)
            for (n = 0; n < p->r; n += W) {
                const int width = (int)sb_min(W, p->r - n);
                const int64_t at = i * p->r + n;
                V y = LOAD(out, m * p->r + n, -1);
                if (p->bias) y += width == W ? LOAD(p->bias, at, storage) : LOAD_PART(p->bias, at, width, storage);
                y = ACTIVATE(y, p->activation);
                if (width == W)
                    STORE(p->y, m * N + at, y, storage);
                else
                    STORE_PART(p->y, m * N + at, width, y, storage);
            }
    }
}

static void TYPED(small)(void *pointer) {
    sb_small_job *job = pointer;
    const sb_product *p = job->p;
    const int64_t K = p->C * p->c;
    const T *x = NULL;
    int64_t x_row = p->x_row;
    T *out = NULL;
    const int pairs = p->dtype == SB_BFLOAT16 && p->c % (2 * W) == 0;
    for (;;) {
        const int64_t g = atomic_fetch_add(&job->next_group, 1);
        if (g >= job->n_groups) break;
        if (!out) {
            out = sb_scratch(SB_SCRATCH_W, sizeof(T) * (size_t)(p->M * p->r + W));
            T *copy = NULL;
            const int as_it_is = sizeof(T) == sb_dtype_size(p->dtype) && p->x_col == 1;
            if (!as_it_is) copy = sb_scratch(SB_SCRATCH_X, sizeof(T) * (size_t)(p->M * K) + 64);
            if (!out || (!as_it_is && !copy)) {
                atomic_store(&job->failed, 1);
                return;
            }
            if (as_it_is) {
                x = p->x;
            } else {
                for (int64_t m = 0; m < p->M; m++) {
                    int64_t k = 0;
#ifndef SB_DOUBLE
                    if (pairs && p->x_col == 1)
                        for (; k + 2 * W <= K; k += 2 * W) {
                            const vu pair = (vu)load_float((const uint16_t *)p->x + m * x_row + k, 0, SB_FLOAT32);
                            STORE(copy, m * K + k, (V)(pair << 16), -1);
                            STORE(copy, m * K + k + W, (V)(pair & 0xffff0000u), -1);
                        }
#endif
                    if (!pairs && p->x_col == 1)
                        for (; k + W <= K; k += W) STORE(copy, m * K + k, LOAD(p->x, m * x_row + k, p->dtype), -1);
                    for (; k < K; k++)
                        copy[m * K + (pairs ? TYPED(sorted)(k) : k)] = ONE(p->x, m * x_row + k * p->x_col, p->dtype);
                }
                x = copy;
                x_row = K;
            }
        }
        switch (p->dtype) {
#ifdef SB_DOUBLE
        default:
            TYPED(small_as)(job, x, x_row, g, out, SB_FLOAT64);
#else
        case SB_BFLOAT16:
            if (pairs)
                TYPED(small_as)(job, x, x_row, g, out, SB_PAIRS);
            else
                TYPED(small_as)(job, x, x_row, g, out, SB_BFLOAT16);
            break;
        case SB_FLOAT16:
            TYPED(small_as)(job, x, x_row, g, out, SB_FLOAT16);
            break;
        default:
            TYPED(small_as)(job, x, x_row, g, out, SB_FLOAT32);
#endif
        }
    }
}

/* ------------------------------------------------------------------------------------------------
 * grad_values: block (i, j) of grad.T @ x, sums over the rows of both. Rows come in tiles that fit the
 * cache; a tile is packed once for all blocks of a piece, a strip of columns for each block row and
 * block column, so that both operands are read in order. The sums of a block are added up tile after
 * tile, in the output itself or, for 16-bit outputs, in scratch. */

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
                    TYPED(pack_columns)(p->x, p->x_row, p->x_col, m0, rows, i * c, c, x + i * tile * stride, stride,
                                      p->dtype);
            int64_t i = first_row - 1, row_end = begin;
            for (int64_t j = begin; j < end; j++) {
                if (j == row_end) {
                    do i++;
                    while (p->crow[i + 1] <= j);
                    row_end = p->crow[i + 1];
                    TYPED(pack_columns)(p->grad, p->grad_row, p->grad_col, m0, rows, i * r, r, grad + i * tile * r, r,
                                      p->dtype);
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

#undef SB_PAIRS
#undef SB_TILE
#undef SB_TILE_AS
#undef SB_OUTER
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
