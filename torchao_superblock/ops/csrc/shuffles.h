/* Squares of floats turned in registers, for packing and for sums over lanes. Included by kernels.h. */

#if defined(__clang__)
#define SB_SHUFFLE(a, b, mask_type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SB_SHUFFLE(a, b, mask_type, ...) __builtin_shuffle(a, b, (mask_type){__VA_ARGS__})
#endif

/* A square of floats, turned by interleaving pairs, then pairs of pairs: out[k*stride + n] =
 * in[n*c + k]. Returns its side. */
#if SB_VECTOR_BYTES >= 32
#define SB_SQUARE 8
typedef float sq __attribute__((vector_size(32)));
typedef float sq_u __attribute__((vector_size(32), aligned(1), may_alias));
typedef int32_t sqi __attribute__((vector_size(32)));
typedef uint32_t squ __attribute__((vector_size(32)));
typedef uint16_t sqh __attribute__((vector_size(16)));
typedef uint16_t sqh_u __attribute__((vector_size(16), aligned(1), may_alias));
#else
#define SB_SQUARE 4
typedef float sq __attribute__((vector_size(16)));
typedef float sq_u __attribute__((vector_size(16), aligned(1), may_alias));
typedef int32_t sqi __attribute__((vector_size(16)));
#endif

SB_INLINE sq load_square_row(const void *p, int64_t i, int dtype) {
#if SB_VECTOR_BYTES == 64
    if (dtype == SB_BFLOAT16) {
        const sqh h = (sqh) * (const sqh_u *)((const uint16_t *)p + i);
        return (sq)((squ)_mm256_cvtepu16_epi32((__m128i)h) << 16);
    }
    if (dtype == SB_FLOAT16)
        return (sq)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)p + i)));
    return (sq) * (const sq_u *)((const float *)p + i);
#else
    return (sq)load_float(p, i, dtype);
#endif
}

SB_INLINE void turn_square(const void *in, int64_t first, int64_t c, float *out, int64_t stride, int dtype) {
#if SB_SQUARE == 8
    sq a[8], b[8];
#pragma GCC unroll 8
    for (int n = 0; n < 8; n++) a[n] = load_square_row(in, first + n * c, dtype);
#pragma GCC unroll 4
    for (int n = 0; n < 8; n += 2) {
        b[n] = SB_SHUFFLE(a[n], a[n + 1], sqi, 0, 8, 1, 9, 4, 12, 5, 13);
        b[n + 1] = SB_SHUFFLE(a[n], a[n + 1], sqi, 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 2
    for (int n = 0; n < 8; n += 4) {
        a[n] = SB_SHUFFLE(b[n], b[n + 2], sqi, 0, 1, 8, 9, 4, 5, 12, 13);
        a[n + 1] = SB_SHUFFLE(b[n], b[n + 2], sqi, 2, 3, 10, 11, 6, 7, 14, 15);
        a[n + 2] = SB_SHUFFLE(b[n + 1], b[n + 3], sqi, 0, 1, 8, 9, 4, 5, 12, 13);
        a[n + 3] = SB_SHUFFLE(b[n + 1], b[n + 3], sqi, 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        *(sq_u *)(out + k * stride) = SB_SHUFFLE(a[k], a[k + 4], sqi, 0, 1, 2, 3, 8, 9, 10, 11);
        *(sq_u *)(out + (k + 4) * stride) = SB_SHUFFLE(a[k], a[k + 4], sqi, 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
    sq a[4];
    for (int n = 0; n < 4; n++) a[n] = load_square_row(in, first + n * c, dtype);
    const sq b0 = SB_SHUFFLE(a[0], a[1], sqi, 0, 4, 1, 5), b1 = SB_SHUFFLE(a[0], a[1], sqi, 2, 6, 3, 7);
    const sq b2 = SB_SHUFFLE(a[2], a[3], sqi, 0, 4, 1, 5), b3 = SB_SHUFFLE(a[2], a[3], sqi, 2, 6, 3, 7);
    *(sq_u *)out = SB_SHUFFLE(b0, b2, sqi, 0, 1, 4, 5);
    *(sq_u *)(out + stride) = SB_SHUFFLE(b0, b2, sqi, 2, 3, 6, 7);
    *(sq_u *)(out + 2 * stride) = SB_SHUFFLE(b1, b3, sqi, 0, 1, 4, 5);
    *(sq_u *)(out + 3 * stride) = SB_SHUFFLE(b1, b3, sqi, 2, 3, 6, 7);
#endif
}

typedef float quad __attribute__((vector_size(16)));
typedef int32_t quadi __attribute__((vector_size(16)));
