/* Drives the CPU kernels over many small problems, each in buffers of exactly the size it may touch.
 *
 * Built with AddressSanitizer and UndefinedBehaviorSanitizer by test_cpu_sanitizer.py, so that a read or a write
 * out of bounds ends the program. Every result is also compared with sums in double. The sequence of problems is
 * fixed; `cpu_sanitizer ISA` exits with 0 and prints how many it solved.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "superblock.h"

static uint64_t state = 88172645463325252u;

static uint32_t draw(uint32_t n) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 33) % n;
}

static const size_t sizes[] = {4, 8, 2, 2};
static const double tolerances[] = {2e-5, 1e-12, 6e-3, 4e-2};

/* Multiples of 1/8 below 2 are exact in every format. */
static double small_number(void) { return (double)(int)(draw(31)) / 8.0 - 15.0 / 8.0; }

static void put(void *p, int64_t i, double v, int dtype) {
    char *at = (char *)p + (size_t)i * sizes[dtype];
    const float f = (float)v;
    uint32_t u;
    uint16_t h;
    memcpy(&u, &f, 4);
    switch (dtype) {
    case SB_FLOAT64:
        memcpy(at, &v, 8);
        return;
    case SB_FLOAT32:
        memcpy(at, &f, 4);
        return;
    case SB_BFLOAT16:
        h = (uint16_t)(u >> 16);
        break;
    default:
        h = (uint16_t)((u >> 16 & 0x8000) | (v == 0 ? 0 : (((u & 0x7fffffff) - 0x38000000) >> 13)));
    }
    memcpy(at, &h, 2);
}

static double get(const void *p, int64_t i, int dtype) {
    const char *at = (const char *)p + (size_t)i * sizes[dtype];
    double v;
    float f;
    uint16_t h;
    uint32_t u;
    switch (dtype) {
    case SB_FLOAT64:
        memcpy(&v, at, 8);
        return v;
    case SB_FLOAT32:
        memcpy(&f, at, 4);
        return f;
    case SB_BFLOAT16:
        memcpy(&h, at, 2);
        u = (uint32_t)h << 16;
        memcpy(&f, &u, 4);
        return f;
    default:
        memcpy(&h, at, 2);
        v = ldexp(h & 0x3ff, -24);
        if (h & 0x7c00) v = ldexp(1024 + (h & 0x3ff), (h >> 10 & 31) - 25);
        return h & 0x8000 ? -v : v;
    }
}

static double activate(double z, int activation) {
    switch (activation) {
    case SB_RELU:
        return z > 0 ? z : 0;
    case SB_GELU:
        return z * 0.5 * erfc(-z / sqrt(2.0));
    case SB_GELU_TANH:
        return 0.5 * z * (1 + tanh(sqrt(2 / acos(-1.0)) * (z + 0.044715 * z * z * z)));
    case SB_SILU:
        return z / (1 + exp(-z));
    case SB_QUICK_GELU:
        return z / (1 + exp(-1.702 * z));
    default:
        return z;
    }
}

static void *buffer(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) exit(3);
    return p;
}

/* A matrix whose last element is the last of its buffer, which may start off any alignment. */
typedef struct {
    char *memory, *data;
    int64_t row, col;
} matrix;

static matrix make(int64_t rows, int64_t cols, int dtype) {
    matrix m;
    switch (draw(6)) {
    case 0: /* ragged rows */
        m.row = cols + 1 + draw(5), m.col = 1;
        break;
    case 1: /* column-major */
        m.row = 1, m.col = rows;
        break;
    case 2: /* every other element */
        m.row = 2 * cols + 1, m.col = 2;
        break;
    case 3: /* one row for all */
        m.row = 0, m.col = 1;
        break;
    case 4: /* one number for all */
        m.row = 0, m.col = 0;
        break;
    default:
        m.row = cols, m.col = 1;
    }
    const int64_t n = (rows - 1) * m.row + (cols > 0 ? (cols - 1) * m.col : 0) + (cols > 0);
    const size_t offset = draw(2) * sizes[dtype];
    m.memory = buffer((size_t)n * sizes[dtype] + offset);
    m.data = m.memory + offset;
    for (int64_t i = 0; i < n; i++) put(m.data, i, small_number(), dtype);
    return m;
}

static void fail(const char *what, double got, double expected) {
    printf("%s: got %g, expected %g\n", what, got, expected);
    exit(1);
}

static void compare(const char *what, double got, double expected, double scale, int dtype) {
    if (!(fabs(got - expected) <= tolerances[dtype] * (scale + 1))) fail(what, got, expected);
}

static void problem(int64_t M, int64_t R, int64_t C, int64_t r, int64_t c, int dtype, int density) {
    const int threads = 1 + (int)draw(3), activation = (int)draw(6), with_bias = (int)draw(2);
    /* In every second problem the last blocks are not whole; what they hold beyond N and K must not count. */
    const int ragged = (int)draw(2);
    const int64_t N = R * r - (ragged ? draw((uint32_t)r) : 0), K = C * c - (ragged ? draw((uint32_t)c) : 0);
    int32_t *crow = buffer(sizeof(int32_t) * (size_t)(R + 1)), *all = buffer(sizeof(int32_t) * (size_t)(R * C));
    int64_t nnz = 0;
    crow[0] = 0;
    for (int64_t i = 0; i < R; i++) {
        const int empty = draw(4) == 0;
        for (int64_t j = 0; j < C; j++)
            if (!empty && (int)draw(100) < density) all[nnz++] = (int32_t)j;
        crow[i + 1] = (int32_t)nnz;
    }
    int32_t *col = buffer(sizeof(int32_t) * (size_t)nnz);
    memcpy(col, all, sizeof(int32_t) * (size_t)nnz);

    char *values = buffer((size_t)(nnz * r * c) * sizes[dtype]), *bias = buffer((size_t)N * sizes[dtype]);
    for (int64_t i = 0; i < nnz * r * c; i++) put(values, i, small_number(), dtype);
    for (int64_t i = 0; i < N; i++) put(bias, i, small_number(), dtype);
    double *dense = calloc((size_t)(N * K) + 1, sizeof(double));
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = crow[i]; j < crow[i + 1]; j++)
            for (int64_t a = 0; a < r; a++)
                for (int64_t b = 0; b < c; b++)
                    if (i * r + a < N && col[j] * c + b < K)
                        dense[(i * r + a) * K + col[j] * c + b] = get(values, (j * r + a) * c + b, dtype);

    matrix x = make(M, K, dtype), grad = make(M, N, dtype);
    char *y = buffer((size_t)(M * N) * sizes[dtype]);
    sb_product p = {.x = x.data, .x_row = x.row, .x_col = x.col, .crow = crow, .col = col, .values = values,
                    .bias = with_bias ? bias : NULL, .y = y, .M = M, .N = N, .K = K, .R = R, .C = C, .r = r, .c = c,
                    .nnz = nnz, .dtype = dtype, .activation = activation, .threads = threads};
    int status = sb_run_product(&p);
    if (status) fail("forward status", status, 0);
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            double z = with_bias ? get(bias, n, dtype) : 0, scale = fabs(z);
            for (int64_t k = 0; k < K; k++) {
                const double v = get(x.data, m * x.row + k * x.col, dtype) * dense[n * K + k];
                z += v, scale += fabs(v);
            }
            compare("forward", get(y, m * N + n, dtype), activate(z, activation), scale, dtype);
        }
    free(y);

    /* grad_x: the transposed product, over the same index */
    y = buffer((size_t)(M * K) * sizes[dtype]);
    sb_product t = {.x = grad.data, .x_row = grad.row, .x_col = grad.col, .crow = crow, .col = col,
                    .transposed = 1, .values = values, .y = y, .M = M, .N = K, .K = N, .R = C, .C = R, .r = c, .c = r,
                    .nnz = nnz, .dtype = dtype, .threads = threads};
    status = sb_run_product(&t);
    if (status) fail("grad_x status", status, 0);
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++) {
            double z = 0, scale = 0;
            for (int64_t n = 0; n < N; n++) {
                const double v = get(grad.data, m * grad.row + n * grad.col, dtype) * dense[n * K + k];
                z += v, scale += fabs(v);
            }
            compare("grad_x", get(y, m * K + k, dtype), z, scale, dtype);
        }
    free(y);

    char *out = buffer((size_t)(nnz * r * c) * sizes[dtype]);
    sb_grad_values g = {.grad = grad.data, .grad_row = grad.row, .grad_col = grad.col, .x = x.data, .x_row = x.row,
                        .x_col = x.col, .crow = crow, .col = col, .out = out, .M = M, .N = N, .K = K, .R = R, .C = C,
                        .r = r, .c = c, .nnz = nnz, .dtype = dtype, .threads = threads};
    status = sb_run_grad_values(&g);
    if (status) fail("grad_values status", status, 0);
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = crow[i]; j < crow[i + 1]; j++)
            for (int64_t a = 0; a < r; a++)
                for (int64_t b = 0; b < c; b++) {
                    double z = 0, scale = 0;
                    if (i * r + a >= N || col[j] * c + b >= K) {
                        z = get(out, (j * r + a) * c + b, dtype);
                        if (z != 0) fail("grad_values of padding", z, 0);
                        continue;
                    }
                    for (int64_t m = 0; m < M; m++) {
                        const double v = get(grad.data, m * grad.row + (i * r + a) * grad.col, dtype) *
                                         get(x.data, m * x.row + (col[j] * c + b) * x.col, dtype);
                        z += v, scale += fabs(v);
                    }
                    compare("grad_values", get(out, (j * r + a) * c + b, dtype), z, scale, dtype);
                }
    free(out);

    /* Broken indices are found before anything is read through them. */
    if (nnz > 0) {
        const int32_t kept = col[nnz - 1];
        col[nnz - 1] = (int32_t)C;
        if (sb_run_product(&p) != SB_BAD_COL || sb_run_grad_values(&g) != SB_BAD_COL) fail("column = C", 0, 1);
        if (sb_run_product(&t) != SB_BAD_COL) fail("column = C, transposed", 0, 1);
        col[nnz - 1] = -1;
        if (sb_run_product(&p) != SB_BAD_COL || sb_run_grad_values(&g) != SB_BAD_COL) fail("column = -1", 0, 1);
        col[nnz - 1] = kept;
        crow[R]++;
        if (sb_run_product(&t) != SB_BAD_CROW) fail("last pointer, transposed", 0, 1);
        if (sb_run_product(&p) != SB_BAD_CROW || sb_run_grad_values(&g) != SB_BAD_CROW) fail("last pointer", 0, 1);
        crow[R]--;
        crow[0] = -1;
        if (sb_run_product(&p) != SB_BAD_CROW || sb_run_grad_values(&g) != SB_BAD_CROW) fail("first pointer", 0, 1);
    }
    free(crow), free(all), free(col), free(values), free(bias), free(dense), free(x.memory), free(grad.memory);
}

/* An index that another thread writes to. Whatever it has written of the row pointers is valid, so that most calls are
 * served, but no two looks at it need agree; columns are outside for a moment now and then. */
enum { RACE_R = 32, RACE_C = 32, RACE_NNZ = 256, RACE_BLOCK = 16, RACE_M = 40 };
static volatile int32_t *live_crow, *live_col;
static atomic_int race_ends;

static void *write_index(void *unused) {
    (void)unused;
    for (uint32_t n = 1; !atomic_load(&race_ends); n = n * 1664525u + 1013904223u) {
        const int32_t i = 1 + (int32_t)(n >> 8) % (RACE_R - 1), j = (int32_t)(n >> 8) % RACE_NNZ;
        live_crow[i] = i * (RACE_NNZ / RACE_R) - (int32_t)(n >> 28) % (RACE_NNZ / RACE_R);
        live_col[j] = n >> 24 ? (int32_t)(n >> 16) % RACE_C : 1 << 30;
        live_col[j] = (int32_t)(n >> 16) % RACE_C;
    }
    return NULL;
}

static void race(void) {
    int32_t *crow = buffer(sizeof(int32_t) * (RACE_R + 1)), *col = buffer(sizeof(int32_t) * RACE_NNZ);
    for (int i = 0; i <= RACE_R; i++) crow[i] = i * (RACE_NNZ / RACE_R);
    memset(col, 0, sizeof(int32_t) * RACE_NNZ);
    live_crow = crow, live_col = col;
    const size_t elements = RACE_M * RACE_R * RACE_BLOCK, stored = RACE_NNZ * RACE_BLOCK * RACE_BLOCK;
    float *x = calloc(elements, 4), *values = calloc(stored, 4), *y = calloc(elements, 4), *out = calloc(stored, 4);
    pthread_t writer;
    if (!x || !values || !y || !out || pthread_create(&writer, NULL, write_index, NULL)) exit(3);
    int served = 0;
    for (int n = 0; n < 1000; n++) {
        const int64_t width = RACE_C * RACE_BLOCK;
        sb_product p = {.x = x, .x_row = width, .x_col = 1, .crow = crow, .col = col, .values = values, .y = y,
                        .M = n % 4 ? RACE_M : 1, .N = width, .K = width, .R = RACE_R, .C = RACE_C, .r = RACE_BLOCK,
                        .c = RACE_BLOCK,
                        .nnz = RACE_NNZ, .dtype = SB_FLOAT32, .threads = 1 + n % 2, .transposed = n % 3 == 1};
        sb_grad_values g = {.grad = x, .grad_row = width, .grad_col = 1, .x = x, .x_row = width, .x_col = 1,
                            .crow = crow, .col = col, .out = out, .M = 3, .N = width, .K = width, .R = RACE_R,
                            .C = RACE_C, .r = RACE_BLOCK, .c = RACE_BLOCK, .nnz = RACE_NNZ, .dtype = SB_FLOAT32,
                            .threads = 1 + n % 2};
        const int status = n % 3 == 2 ? sb_run_grad_values(&g) : sb_run_product(&p);
        if (status != SB_OK && status != SB_BAD_CROW && status != SB_BAD_COL) fail("status in a race", status, 0);
        served += status == SB_OK;
    }
    atomic_store(&race_ends, 1);
    pthread_join(writer, NULL);
    if (!served) fail("calls served in a race", 0, 1);
    free(crow), free(col), free(x), free(values), free(y), free(out);
}

int main(int argc, char **argv) {
    int isa = 0;
    while (isa < SB_N_ISA && argc > 1 && strcmp(argv[1], sb_isa_name(isa))) isa++;
    if (argc < 2 || isa == SB_N_ISA || sb_isa_select(isa)) {
        printf("usage: cpu_sanitizer ISA, one that this processor has\n");
        return 2;
    }
    static const int64_t blocks[][2] = {{1, 1},   {2, 2},   {3, 5},   {4, 4},    {7, 16},   {8, 8},   {16, 16},
                                        {16, 48}, {17, 33}, {20, 12}, {32, 32},  {64, 16},  {16, 64}, {64, 64},
                                        {1, 64},  {64, 1},  {40, 80}, {128, 32}, {256, 16}, {256, 256}};
    static const int64_t rows[] = {1, 2, 3, 5, 7, 11, 12, 13, 24, 25, 37, 48, 67, 131};
    int solved = 0;
    for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++)
        for (int dtype = 0; dtype < 4; dtype++) {
            const int64_t r = blocks[b][0], c = blocks[b][1], large = r * c > 4096;
            for (size_t m = b % 2; m < sizeof rows / sizeof *rows; m += large ? 3 : 2) {
                const int64_t R = large ? 2 : 1 + draw(5), C = large ? 2 : 1 + draw(5);
                problem(rows[m], R, C, r, c, dtype, (int)draw(4) * 30); /* density 0 is nnz = 0 */
                solved++;
            }
        }
    sb_product empty = {.crow = (const int32_t[]){0}, .M = 1};
    if (sb_run_product(&empty)) fail("no block rows", 1, 0);
    race();
    printf("solved %d problems with %s\n", solved, sb_isa_name(sb_isa_current()));
    return 0;
}
