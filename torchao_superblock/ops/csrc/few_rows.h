/* Few rows: the time goes into reading the weights, so they are read once, where and as they lie.
 * Vectors run along k, and each (row of x, output) pair keeps one vector of partial sums until its
 * block row is done. Needs c to be a multiple of W. Included by typed.h. */

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
            for (n = 0; n < sb_min(p->r, p->N - i * p->r); n += W) {
                const int width = (int)sb_min(W, sb_min(p->r, p->N - i * p->r) - n);
                const int64_t at = i * p->r + n;
                V y = LOAD(out, m * p->r + n, -1);
                if (p->bias) y += width == W ? LOAD(p->bias, at, storage) : LOAD_PART(p->bias, at, width, storage);
                y = ACTIVATE(y, p->activation);
                if (width == W)
                    STORE(p->y, m * p->N + at, y, storage);
                else
                    STORE_PART(p->y, m * p->N + at, width, y, storage);
            }
    }
}

static void TYPED(small)(void *pointer) {
    sb_small_job *job = pointer;
    const sb_product *p = job->p;
    const int64_t K = p->K, copy_row = p->C * p->c; /* a copy of x goes on with zeros, to whole blocks */
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
            const int as_it_is = sizeof(T) == sb_dtype_size(p->dtype) && p->x_col == 1 && K == copy_row;
            if (!as_it_is) copy = sb_scratch(SB_SCRATCH_X, sizeof(T) * (size_t)(p->M * copy_row) + 64);
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
                            STORE(copy, m * copy_row + k, (V)(pair << 16), -1);
                            STORE(copy, m * copy_row + k + W, (V)(pair & 0xffff0000u), -1);
                        }
#endif
                    if (!pairs && p->x_col == 1)
                        for (; k + W <= K; k += W)
                            STORE(copy, m * copy_row + k, LOAD(p->x, m * x_row + k, p->dtype), -1);
                    for (; k < copy_row; k++)
                        copy[m * copy_row + (pairs ? TYPED(sorted)(k) : k)] =
                            k < K ? ONE(p->x, m * x_row + k * p->x_col, p->dtype) : 0;
                }
                x = copy;
                x_row = copy_row;
            }
        }
#define SB_CASE(dtype)                                         \
    if (dtype == SB_BFLOAT16 && pairs)                         \
        TYPED(small_as)(job, x, x_row, g, out, SB_PAIRS);      \
    else                                                       \
        TYPED(small_as)(job, x, x_row, g, out, dtype);
        SB_WITH_DTYPE(p->dtype, SB_CASE)
#undef SB_CASE
    }
}

#undef SB_PAIRS
