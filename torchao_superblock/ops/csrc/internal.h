/* Shared by the driver (superblock.c), the threads (threads.c) and the kernels of each instruction set. */
#ifndef SUPERBLOCK_INTERNAL_H
#define SUPERBLOCK_INTERNAL_H

#include <stdatomic.h>

#include "superblock.h"

/* Rows of x that one packed panel holds. 12 is the tallest register tile (AVX-512, NEON); the others
 * walk a panel in two halves. */
#define SB_PANEL 12

/* One narrow column strip of the output: lanes [n0, n0 + width) of block row `row`, of which `stored` are there. */
typedef struct {
    int64_t row, n0, width, stored;
} sb_strip;

/* Whether a group of strips is packed. */
enum { SB_UNPACKED, SB_PACKING, SB_PACKED };

/* A product, or one round of it, cut in pieces. The weights are packed once for all threads: a group of
 * strips by the thread that first comes to it, while it uses them. */
typedef struct {
    const sb_product *p;
    const int32_t *perm;  /* where each block is stored, as (c, r), if W is the transpose of what is stored; else NULL */
    const int64_t *group; /* (n_groups + 1): first strip of each group, in order of the columns of y */
    int64_t n_groups;
    void *packed;                /* the strips of all groups */
    const int64_t *offset;       /* (n_groups): where each group starts in `packed`, in elements */
    atomic_int *state;           /* (n_groups) */
    const unsigned char *needed; /* lines of x that the product reads */
    /* The first n_whole tiles of rows are a piece of work each, with all groups; each (tile, group) of
     * the others is one, so that the threads end together. */
    int64_t tile_rows, n_tiles, n_whole;
    atomic_llong next_piece;
    atomic_int failed;
} sb_product_job;

/* Few rows: pieces are groups of consecutive block rows. */
typedef struct {
    const sb_product *p;
    const int64_t *group; /* (n_groups + 1): first block row of each group */
    int64_t n_groups;
    atomic_llong next_group;
    atomic_int failed;
} sb_small_job;

typedef struct {
    const sb_grad_values *p;
    int64_t chunk, n_chunks; /* stored blocks a piece of work, pieces */
    atomic_llong next_chunk;
    atomic_int failed;
} sb_grad_job;

typedef struct {
    int lanes_f32, lanes_f64;
    int64_t small_m; /* up to this many rows the canonical order is read directly */
    void (*product_f32)(void *job);
    void (*product_f64)(void *job);
    void (*small_f32)(void *job);
    void (*small_f64)(void *job);
    void (*grad_f32)(void *job);
    void (*grad_f64)(void *job);
} sb_kernels;

extern const sb_kernels sb_kernels_baseline;
extern const sb_kernels sb_kernels_avx2;
extern const sb_kernels sb_kernels_avx512;

/* Scratch of the calling thread: kept between calls, freed when the thread ends. NULL: no memory. */
enum { SB_SCRATCH_X, SB_SCRATCH_W, SB_SCRATCH_JOB, SB_SCRATCH_FLAGS, SB_SCRATCH_INDEX, SB_N_SCRATCH };
void *sb_scratch(int which, size_t bytes);

/* Lines of one set of the L1 cache; 8 where the system does not say. */
int sb_l1_ways(void);

/* Run body(job) on up to `threads` threads, the calling one among them. */
void sb_parallel(void (*body)(void *), void *job, int threads);

static inline int64_t sb_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t sb_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t sb_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline size_t sb_dtype_size(int dtype) {
    return dtype == SB_FLOAT64 ? 8 : dtype == SB_FLOAT32 ? 4 : 2;
}

#endif
