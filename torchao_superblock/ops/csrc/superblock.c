/* Checks the indices, cuts a product into pieces of equal work and hands them to the kernels. */
#include "internal.h"

#include <string.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* The sanitizer test builds with tiny values, so that small problems take every path. */
#ifndef SB_GROUP_ELEMENTS
/* Elements of packed weights for each thread (4 MiB in float32). Weights that need more are done in
 * several rounds, so the scratch does not grow with the layer. */
#define SB_GROUP_ELEMENTS (1 << 20)
#endif
#ifndef SB_X_TILE_BYTES
/* Bytes of packed x a thread holds at a time: with the weights streaming past, it should stay in L2. */
#define SB_X_TILE_BYTES (160 << 10)
#endif
#ifndef SB_SERIAL_WORK
/* Multiply-adds below which a second thread costs more than it brings. */
#define SB_SERIAL_WORK (3 << 16)
#endif
/* What a strip costs apart from its blocks (the bias, the activation, the store), in rows of packed
 * weights. */
#define SB_STRIP_WORK 16
#ifndef SB_GRAD_ELEMENTS
/* Accumulators of one piece of grad_values. */
#define SB_GRAD_ELEMENTS (1 << 18)
#endif

static atomic_int current_isa = -1;

#if defined(__x86_64__)
/* Not every compiler knows this one by name in __builtin_cpu_supports. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

int sb_isa_supported(int isa) {
    switch (isa) {
    case SB_BASELINE:
        return 1;
#if defined(__x86_64__)
    case SB_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case SB_AVX512:
        return sb_isa_supported(SB_AVX2) && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
#endif
    default:
        return 0;
    }
}

int sb_isa_current(void) {
    int isa = atomic_load(&current_isa);
    if (isa < 0) {
        for (isa = SB_N_ISA - 1; !sb_isa_supported(isa);) isa--;
        atomic_store(&current_isa, isa);
    }
    return isa;
}

int sb_isa_select(int isa) {
    if (isa < 0 || isa >= SB_N_ISA || !sb_isa_supported(isa)) return -1;
    atomic_store(&current_isa, isa);
    return 0;
}

const char *sb_isa_name(int isa) {
    static const char *const names[SB_N_ISA] = {"baseline", "avx2", "avx512"};
    return isa >= 0 && isa < SB_N_ISA ? names[isa] : "unknown";
}

int sb_l1_ways(void) {
#ifdef _SC_LEVEL1_DCACHE_ASSOC
    static atomic_int ways;
    int known = atomic_load(&ways);
    if (!known) {
        known = (int)sysconf(_SC_LEVEL1_DCACHE_ASSOC);
        atomic_store(&ways, known = known > 0 ? known : 8);
    }
    return known;
#else
    return 8;
#endif
}

/* The index of the transposed matrix, C x R blocks: blocks stay in the order of their rows, so their positions in
 * `values` ascend in each column. */
static void transpose(const int32_t *crow, const int32_t *col, int64_t R, int64_t C, int64_t nnz, int32_t *crow_t,
                      int32_t *row_t, int32_t *perm_t) {
    memset(crow_t, 0, sizeof(int32_t) * (size_t)(C + 1));
    for (int64_t j = 0; j < nnz; j++) crow_t[col[j] + 1]++;
    for (int64_t i = 0; i < C; i++) crow_t[i + 1] += crow_t[i];
    /* Each start serves as the place of the column's next block, and has become the next column's start at the end. */
    for (int64_t i = 0; i < R; i++)
        for (int32_t j = crow[i]; j < crow[i + 1]; j++) {
            const int32_t place = crow_t[col[j]]++;
            row_t[place] = (int32_t)i;
            perm_t[place] = j;
        }
    memmove(crow_t + 1, crow_t, sizeof(int32_t) * (size_t)C);
    crow_t[0] = 0;
}

static const sb_kernels *kernels(void) {
    switch (sb_isa_current()) {
#if defined(__x86_64__)
    case SB_AVX2:
        return &sb_kernels_avx2;
    case SB_AVX512:
        return &sb_kernels_avx512;
#endif
    default:
        return &sb_kernels_baseline;
    }
}

static int outside(const int32_t *index, int64_t n, int64_t end) {
    /* No early exit: the loop vectorises, and a valid index is the common case. */
    int32_t low = 0, high = -1;
    for (int64_t i = 0; i < n; i++) {
        low = index[i] < low ? index[i] : low;
        high = index[i] > high ? index[i] : high;
    }
    return low < 0 || high >= end;
}

/* Copies an index of R x C blocks to scratch and checks the copy. Nothing else reads the original: another thread may
 * write to it (load_state_dict during a forward), and what was checked must be what is used. `more` elements of the
 * scratch are left to the caller, behind the copy. */
static int copy_index(const int32_t **crow_p, const int32_t **col_p, int64_t R, int64_t C, int64_t nnz, int64_t more,
                      int32_t **rest) {
    int32_t *crow = sb_scratch(SB_SCRATCH_INDEX, sizeof(int32_t) * (size_t)(R + 1 + nnz + more));
    if (!crow) return SB_NO_MEMORY;
    int32_t *col = crow + R + 1;
    memcpy(crow, *crow_p, sizeof(int32_t) * (size_t)(R + 1));
    if (nnz) memcpy(col, *col_p, sizeof(int32_t) * (size_t)nnz);
    /* The compiler must not look at the original instead. */
    atomic_signal_fence(memory_order_seq_cst);
    *crow_p = crow;
    *col_p = col;
    *rest = col + nnz;
    int falls = 0;
    for (int64_t i = 0; i < R; i++) falls |= crow[i + 1] < crow[i];
    if (falls || crow[0] != 0 || crow[R] != nnz) return SB_BAD_CROW;
    return outside(col, nnz, C) ? SB_BAD_COL : SB_OK;
}

/* Consecutive strips, `per_row` of them in each block row, in groups of about equal work. */
static void split(const sb_product *p, int64_t per_row, int64_t n_groups, int64_t *group) {
    const int64_t total = (p->nnz * p->c + SB_STRIP_WORK * p->R) * per_row;
    int64_t strip = 0, done = 0;
    for (int64_t g = 0; g < n_groups; g++) {
        group[g] = strip;
        const int64_t until = total / n_groups * (g + 1);
        for (; strip < p->R * per_row; strip++) {
            const int64_t row = strip / per_row;
            const int64_t work = (p->crow[row + 1] - p->crow[row]) * p->c + SB_STRIP_WORK;
            if (done + work / 2 > until) break; /* more than half of it lies beyond */
            done += work;
        }
    }
    group[n_groups] = p->R * per_row;
}

static int run_small(const sb_product *p, const sb_kernels *k, int threads) {
    sb_small_job job = {.p = p};
    /* Few, equal pieces of block rows: a piece takes consecutive rows, so memory is read in order. */
    job.n_groups = threads > 1 ? sb_min(p->R, 4 * (int64_t)threads) : 1;
    int64_t *group = sb_scratch(SB_SCRATCH_JOB, sizeof(int64_t) * (size_t)(job.n_groups + 1));
    if (!group) return SB_NO_MEMORY;
    split(p, 1, job.n_groups, group);
    job.group = group;
    atomic_init(&job.next_group, 0);
    atomic_init(&job.failed, 0);
    sb_parallel(p->dtype == SB_FLOAT64 ? k->small_f64 : k->small_f32, &job, threads);
    return atomic_load(&job.failed) ? SB_NO_MEMORY : SB_OK;
}

int sb_run_product(const sb_product *product) {
    sb_product checked = *product;
    const sb_product *p = &checked;
    const int64_t stored_R = p->transposed ? p->C : p->R, stored_C = p->transposed ? p->R : p->C;
    int32_t *rest, *perm = NULL;
    const int status = copy_index(&checked.crow, &checked.col, stored_R, stored_C, p->nnz,
                                  p->transposed ? p->R + 1 + 2 * p->nnz : 0, &rest);
    if (status) return status;
    if (p->M < 1 || p->R < 1) return SB_OK;
    if (p->transposed) {
        int32_t *row = rest + p->R + 1;
        perm = row + p->nnz;
        transpose(p->crow, p->col, stored_R, stored_C, p->nnz, rest, row, perm);
        checked.crow = rest;
        checked.col = row;
    }

    const sb_kernels *k = kernels();
    const int64_t lanes = p->dtype == SB_FLOAT64 ? k->lanes_f64 : k->lanes_f32;
    const int64_t size = p->dtype == SB_FLOAT64 ? 8 : 4;
    const int64_t work = (p->nnz * p->c + SB_STRIP_WORK * p->R) * p->r * p->M;
    const int threads = work < SB_SERIAL_WORK ? 1 : p->threads < 1 ? 1 : p->threads;
    if (p->M <= k->small_m && !perm && p->c % lanes == 0) return run_small(p, k, threads);

    /* Rounds of one group for each thread. */
    const int64_t per_row = sb_ceil_div(p->r, 2 * lanes);
    int64_t n_groups = threads * sb_max(1, sb_ceil_div(p->nnz * p->c * p->r, (int64_t)SB_GROUP_ELEMENTS * threads));
    n_groups = sb_min(n_groups, p->R * per_row);
    const int64_t round = sb_min(threads, n_groups);
    const int64_t line = 64 / size, n_lines = sb_ceil_div(p->C * p->c, line);

    const int64_t max_rows = sb_max(1, SB_X_TILE_BYTES / (size * line * sb_max(1, n_lines)) / SB_PANEL);
    const int64_t own_rows = sb_max(1, p->M / threads / SB_PANEL); /* of each thread, in panels */
    sb_product_job job = {.p = p, .perm = perm, .tile_rows = sb_min(20, sb_min(max_rows, own_rows)) * SB_PANEL};
    job.n_tiles = sb_ceil_div(p->M, job.tile_rows);
    job.n_whole = p->M / job.tile_rows / threads * threads;

    int64_t *group = sb_scratch(SB_SCRATCH_JOB, sizeof(int64_t) * (size_t)(n_groups + 1 + round) +
                                                    sizeof(atomic_int) * (size_t)round + (size_t)n_lines);
    if (!group) return SB_NO_MEMORY;
    int64_t *offset = group + n_groups + 1;
    job.offset = offset;
    job.state = (atomic_int *)(offset + round);
    unsigned char *needed = (unsigned char *)(job.state + round);
    job.needed = needed;
    split(p, per_row, n_groups, group);
    memset(needed, 0, (size_t)n_lines);
    for (int64_t j = 0; j < p->nnz; j++)
        for (int64_t l = p->col[j] * p->c / line; l <= ((p->col[j] + 1) * p->c - 1) / line; l++) needed[l] = 1;
    atomic_init(&job.failed, 0);

    for (int64_t g = 0; g < n_groups && !atomic_load(&job.failed); g += job.n_groups) {
        job.n_groups = sb_min(round, n_groups - g);
        job.group = group + g;
        int64_t elements = 0;
        for (int64_t a = 0; a < job.n_groups; a++) {
            offset[a] = elements;
            atomic_init(&job.state[a], SB_UNPACKED);
            for (int64_t strip = group[g + a]; strip < group[g + a + 1]; strip++) {
                const int64_t row = strip / per_row, width = p->r - strip % per_row * 2 * lanes;
                elements += (p->crow[row + 1] - p->crow[row]) * p->c * (width > lanes ? 2 * lanes : lanes);
            }
        }
        job.packed = sb_scratch(SB_SCRATCH_W, (size_t)(size * elements) + 64);
        if (!job.packed) return SB_NO_MEMORY;
        atomic_init(&job.next_piece, 0);
        sb_parallel(p->dtype == SB_FLOAT64 ? k->product_f64 : k->product_f32, &job, threads);
    }
    return atomic_load(&job.failed) ? SB_NO_MEMORY : SB_OK;
}

int sb_run_grad_values(const sb_grad_values *product) {
    sb_grad_values checked = *product;
    const sb_grad_values *p = &checked;
    int32_t *rest;
    const int status = copy_index(&checked.crow, &checked.col, p->R, p->C, p->nnz, 0, &rest);
    if (status) return status;
    if (p->nnz < 1) return SB_OK;
    const sb_kernels *k = kernels();
    const int64_t block = p->r * p->c;
    const int threads = p->nnz * block * p->M < SB_SERIAL_WORK ? 1 : p->threads < 1 ? 1 : p->threads;
    sb_grad_job job = {.p = p};
    job.chunk = sb_max(1, sb_min(SB_GRAD_ELEMENTS / block, sb_ceil_div(p->nnz, threads > 1 ? 2 * threads : 1)));
    job.n_chunks = sb_ceil_div(p->nnz, job.chunk);
    atomic_init(&job.next_chunk, 0);
    atomic_init(&job.failed, 0);
    sb_parallel(p->dtype == SB_FLOAT64 ? k->grad_f64 : k->grad_f32, &job, threads);
    return atomic_load(&job.failed) ? SB_NO_MEMORY : SB_OK;
}
