/* Block-sparse (BSR) linear algebra for CPUs: what the rest of the program may call.
 *
 * Letters used in all files: M tokens, N out features, K in features, R x C the block grid, r x c the
 * block size, nnz stored blocks, W lanes of a vector. All offsets are int64_t: a matrix may hold more
 * than 2^31 elements although its block indices are int32_t.
 */
#ifndef SUPERBLOCK_H
#define SUPERBLOCK_H

#include <stddef.h>
#include <stdint.h>

enum sb_dtype { SB_FLOAT32, SB_FLOAT64, SB_FLOAT16, SB_BFLOAT16 };
enum sb_activation { SB_NONE, SB_RELU, SB_GELU, SB_GELU_TANH, SB_SILU, SB_QUICK_GELU };
enum sb_isa { SB_BASELINE, SB_AVX2, SB_AVX512, SB_N_ISA };
enum sb_status { SB_OK, SB_BAD_CROW, SB_BAD_COL, SB_NO_MEMORY };

/* y (M, N) = act(x (M, K) @ W.T + bias), W a BSR matrix of R x C blocks of r x c; R = ceil(N / r), C = ceil(K / c).
 * What a block holds beyond row N or column K is there, does not count, and must be finite.
 * If transposed, W is the transpose of what is stored: crow (C + 1) and col are the index of a matrix of
 * C x R blocks of c x r, as the backward needs it.
 * Another thread may write to crow and col meanwhile: they are read once. */
typedef struct {
    const void *x;
    int64_t x_row, x_col; /* strides, in elements; any, 0 included */
    const int32_t *crow, *col;
    const void *values, *bias;
    void *y;
    int64_t M, N, K, R, C, r, c, nnz;
    int dtype, activation, threads, transposed;
} sb_product;

/* out (nnz, r, c): the stored blocks of grad (M, N).T @ x (M, K), with zeros beyond row N and column K. */
typedef struct {
    const void *grad, *x;
    int64_t grad_row, grad_col, x_row, x_col;
    const int32_t *crow, *col;
    void *out;
    int64_t M, N, K, R, C, r, c, nnz;
    int dtype, threads;
} sb_grad_values;

int sb_run_product(const sb_product *product);
int sb_run_grad_values(const sb_grad_values *product);

/* Instruction sets: what this processor can run, and which one serves (0 on success). */
int sb_isa_supported(int isa);
int sb_isa_current(void);
int sb_isa_select(int isa);
const char *sb_isa_name(int isa);

/* "openmp (shared with torch)" or "pthread". */
const char *sb_threading(void);
/* From now on a forked child runs on one thread: its parent's others do not exist there. */
void sb_watch_forks(void);
/* The same for this process, which was forked before anybody watched. */
void sb_run_on_one_thread(void);

#endif
