/* The product: y tile = act(x panel @ packed strip + bias). Included by typed.h. */

/* Activation and store of `rows` rows of sums, for what store_tile does not do. Not inlined: it
 * would be repeated in every tile. */
static __attribute__((noinline)) void TYPED(finish)(const sb_product *p, const T *sums, int vectors, int64_t m,
                                                    int64_t rows, int64_t n, int64_t width) {
    for (int64_t i = 0; i < rows; i++)
        for (int v = 0; v < vectors && v * W < width; v++) {
            const V y = ACTIVATE(*(const V *)(sums + (i * 2 + v) * W), p->activation);
            const int64_t at = (m + i) * p->N + n + v * W;
            if (width >= (v + 1) * W)
                STORE(p->y, at, y, p->dtype);
            else
                STORE_PART(p->y, at, (int)(width - v * W), y, p->dtype);
        }
}

SB_INLINE void TYPED(store_tile)(const sb_product *p, V acc[SB_PANEL][2], const int tile_rows, const int vectors,
                                 int64_t m, int64_t rows, int64_t n0, const int dtype) {
    int64_t at = m * p->N + n0;
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; i++) {
        if (i >= rows) break;
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) STORE(p->y, at + v * W, acc[i][v], dtype);
        at += p->N;
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
            bias[v] = strip->stored >= (v + 1) * W
                          ? LOAD(p->bias, n0 + v * W, p->dtype)
                          : LOAD_PART(p->bias, n0 + v * W, (int)sb_max(0, strip->stored - v * W), p->dtype);
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

    int plain = p->activation == SB_NONE && strip->stored == vectors * W;
#ifndef SB_DOUBLE
    if (plain && p->dtype == SB_BFLOAT16) plain = !TYPED(may_hold_nan)(acc, tile_rows, vectors);
#endif
    if (plain) {
#define SB_CASE(dtype)                                              \
    TYPED(store_tile)(p, acc, tile_rows, vectors, m, rows, n0,      \
                      dtype == SB_BFLOAT16 ? SB_BFLOAT16_NUMBERS : dtype);
        SB_WITH_DTYPE(p->dtype, SB_CASE)
#undef SB_CASE
        return;
    }
    T sums[SB_PANEL * 2 * W] __attribute__((aligned(64)));
#pragma GCC unroll 12
    for (int i = 0; i < tile_rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) *(V *)(sums + (i * 2 + v) * W) = acc[i][v];
    TYPED(finish)(p, sums, vectors, m, rows, n0, strip->stored);
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
           p->c % KC == 0 && p->K == p->C * p->c && p->r % (2 * W) == 0 &&
           p->nnz * p->r < SB_DIRECT_USES * p->C &&
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
    const int64_t row = index / per_row, width = sb_min(2 * W, p->r - n0);
    return (sb_strip){.row = row, .n0 = n0, .width = width, .stored = sb_min(width, p->N - row * p->r - n0)};
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
    const int64_t size = (int64_t)sb_dtype_size(p->dtype), row = p->N * size;
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
                if (strips[i].stored <= 0) continue; /* all of it is padding */
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

#undef SB_TILE
#undef SB_TILE_AS
