/* All kernels of one instruction set. Included once by each isa_*.c, which names the vector width.
 *
 * The code is plain C with GCC's vector extension, so one text serves SSE2, AVX2, AVX-512 and NEON.
 * This half holds what float32 and the 16-bit formats need; kernels_typed.h is then included for the
 * two types that sums are kept in, float and double.
 */
#include <math.h>
#include <sched.h>
#include <string.h>

#include "internal.h"

#ifndef SB_SMALL_M
#define SB_SMALL_M 10
#endif
/* Steps of k that packed weights are asked for in advance. */
#ifndef SB_W_AHEAD
#define SB_W_AHEAD 16
#endif
/* Where fewer outputs read an element of x, it is not packed. On Sapphire Rapids 768 x 3072 at 0.9 (77 outputs) takes 3 to
 * 11 % less time; 3072 x 768 at 0.9 (307) up to 5 % less with AVX2, from 7 % less to 5 % more with AVX-512. */
#ifndef SB_DIRECT_USES
#define SB_DIRECT_USES (SB_TALL ? 200 : 400)
#endif
/* Strips that take turns on one panel of x: at most so many, fewer if they are large. */
#ifndef SB_CHUNK
#define SB_CHUNK 16
#endif
#ifndef SB_CHUNK_ELEMENTS
#define SB_CHUNK_ELEMENTS (1 << 14)
#endif

#define SB_PASTE3(a, b, c) a##_##b##_##c
#define SB_PASTE2(a, b, c) SB_PASTE3(a, b, c)
#define SB_NAME(name, type) SB_PASTE2(name, SB_ISA, type)
#define SB_INLINE static inline __attribute__((always_inline))

/* The types that end in _u are for memory: aligned(1), so any address will do. */
typedef float vf __attribute__((vector_size(SB_VECTOR_BYTES)));
typedef float vf_u __attribute__((vector_size(SB_VECTOR_BYTES), aligned(1), may_alias));
typedef int32_t vi __attribute__((vector_size(SB_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(SB_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(SB_VECTOR_BYTES / 2)));
typedef uint16_t vh_u __attribute__((vector_size(SB_VECTOR_BYTES / 2), aligned(1), may_alias));
typedef double vd __attribute__((vector_size(SB_VECTOR_BYTES)));
typedef double vd_u __attribute__((vector_size(SB_VECTOR_BYTES), aligned(1), may_alias));

/* ------------------------------------------------------------------------------------------------
 * 16-bit formats. bfloat16 is the upper half of a float32. float16 is converted with integer steps
 * where the instruction set has none for it. */

/* Zero-extend and truncate; compilers make long detours of __builtin_convertvector here. */
#if SB_VECTOR_BYTES == 64
SB_INLINE vu widen(vh h) { return (vu)_mm512_cvtepu16_epi32((__m256i)h); }
SB_INLINE vh narrow(vu u) { return (vh)_mm512_cvtepi32_epi16((__m512i)u); }
#elif SB_VECTOR_BYTES == 32
SB_INLINE vu widen(vh h) { return (vu)_mm256_cvtepu16_epi32((__m128i)h); }
SB_INLINE vh narrow(vu u) {
    return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)u), _mm256_extracti128_si256((__m256i)u, 1));
}
#else
SB_INLINE vu widen(vh h) { return __builtin_convertvector(h, vu); }
SB_INLINE vh narrow(vu u) { return __builtin_convertvector(u, vh); }
#endif

SB_INLINE vf bf16_to_float(vh h) { return (vf)(widen(h) << 16); }

SB_INLINE vh float_to_bf16(vf f) {
    const vu u = (vu)f;
    /* round to nearest, ties to even; a NaN must not round up to infinity */
    const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const vu quiet = (u >> 16) | 0x40;
    const vu nan = (vu)(f != f);
    return narrow((rounded & ~nan) | (quiet & nan));
}

/* The same for numbers: half the work. Infinities stay; the largest numbers round to them. */
SB_INLINE vh number_to_bf16(vf f) {
    const vu u = (vu)f;
    return narrow((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

SB_INLINE int any(vi condition) {
#if SB_VECTOR_BYTES == 64
    return _mm512_movepi32_mask((__m512i)condition) != 0;
#elif SB_VECTOR_BYTES == 32
    return _mm256_movemask_ps((__m256)condition) != 0;
#else
    return (condition[0] | condition[1] | condition[2] | condition[3]) != 0;
#endif
}

#if SB_VECTOR_BYTES == 64
SB_INLINE vf fp16_to_float(vh h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
SB_INLINE vh float_to_fp16(vf f) {
    return (vh)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif SB_VECTOR_BYTES == 32
SB_INLINE vf fp16_to_float(vh h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
SB_INLINE vh float_to_fp16(vf f) {
    return (vh)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
SB_INLINE vf fp16_to_float(vh h) {
    const vu u = widen(h);
    const vu magnitude = (u & 0x7fff) << 13;
    /* 2^112 moves the exponent from float16's bias to float32's, subnormals included */
    const vf scaled = (vf)magnitude * 0x1p112f;
    const vu special = (vu)(vi)((u & 0x7c00) == 0x7c00);
    const vu bits = ((vu)scaled & ~special) | ((magnitude | 0x7f800000) & special);
    return (vf)(bits | (u & 0x8000) << 16);
}
SB_INLINE vh float_to_fp16(vf f) {
    const vu u = (vu)f, magnitude = u & 0x7fffffff;
    /* normal: rebias the exponent, round the 13 lost bits to nearest, ties to even */
    const vu normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    /* subnormal: the last place of 0.5 is float16's smallest step, so this addition rounds to it */
    const vu tiny = (vu)((vf)magnitude + 0.5f) - 0x3f000000;
    const vu is_tiny = (vu)(vi)(magnitude < 0x38800000);
    const vu is_big = (vu)(vi)(magnitude >= 0x477ff000); /* rounds to infinity */
    const vu is_nan = (vu)(vi)(magnitude > 0x7f800000);
    vu bits = (tiny & is_tiny) | (normal & ~is_tiny);
    bits = (bits & ~is_big) | (0x7c00 & is_big);
    bits = bits | (0x200 & is_nan);
    return narrow(bits | (u >> 16 & 0x8000));
}
#endif

/* ------------------------------------------------------------------------------------------------
 * Activations on a vector of float32. */

SB_INLINE vf select_f(vi condition, vf a, vf b) {
    return (vf)(((vi)a & condition) | ((vi)b & ~condition));
}

SB_INLINE vf splat_f(float s) { return s - (vf){0}; }

/* exp(x) = 2^n exp(f), n = round(x / ln 2), |f| <= ln(2)/2; relative error 2e-7 at most. Where that is no normal number
 * of float32, 0 or infinity: the activations divide by it or multiply with it, and x may be as large as any. */
SB_INLINE vf exp_f(vf x) {
    const vf magic = splat_f(0x1.8p23f); /* adding it rounds to an integer */
    const vf shifted = x * 0x1.715476p+0f + magic;
    const vf n = shifted - magic;
    const vf f = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    vf e = 0.001383684342727065f + (vf){0};
    e = e * f + 0.008374817669391632f;
    e = e * f + 0.04166822507977486f;
    e = e * f + 0.16666419804096222f;
    e = e * f + 0.49999991059303284f;
    e = e * f + 1.0f;
    e = e * f + 1.0f;
    e = (vf)((vu)e + (((vu)shifted - (vu)magic) << 23));
    e = select_f(x < -87.33f, (vf){0}, e);
    return select_f(x > 88.72f, splat_f(INFINITY), e);
}

/* x * (probability that a normal variable is below x). The upper tail of |x| is
 * exp(-x*x/2) * P(t), t = 1 / (1 + 0.4 |x| / sqrt(2)), P a minimax polynomial (3e-8). */
SB_INLINE vf gelu_f(vf x) {
    const vf size = (vf)((vu)x & 0x7fffffff);
    const vf t = 1.0f / (1.0f + 0.28284271f * size);
    vf q = 0.013471195474267006f + (vf){0};
    q = q * t - 0.0326809287071228f;
    q = q * t - 0.04271381348371506f;
    q = q * t + 0.1521611362695694f;
    q = q * t - 0.04595297947525978f;
    q = q * t + 0.1404758095741272f;
    q = q * t + 0.08661650121212006f;
    q = q * t + 0.11611811071634293f;
    q = q * t + 0.11248914897441864f;
    q = q * t + 0.0000158433413162129f;
    q = q * exp_f(-0.5f * size * size);
    return x * select_f(x > 0.0f, 1.0f - q, q);
}

/* (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), so both of these need one exponential. */
SB_INLINE vf silu_f(vf x) { return x / (1.0f + exp_f(-x)); }

SB_INLINE vf gelu_tanh_f(vf x) {
    const vf u2 = x * (1.5957691216057308f + 0.07135481282553017f * x * x);
    return x / (1.0f + exp_f(-u2));
}

SB_INLINE vf activate_f(vf x, int activation) {
    switch (activation) {
    case SB_RELU:
        return select_f(x < 0.0f, (vf){0}, x); /* NaN stays */
    case SB_GELU:
        return gelu_f(x);
    case SB_GELU_TANH:
        return gelu_tanh_f(x);
    case SB_SILU:
        return silu_f(x);
    default:
        return x;
    }
}

static double activate_one(double x, int activation) {
    switch (activation) {
    case SB_RELU:
        return x < 0 ? 0 : x;
    case SB_GELU:
        return 0.5 * x * erfc(-x * 0.70710678118654752440);
    case SB_GELU_TANH:
        return x / (1 + exp(-x * (1.5957691216057307117 + 0.071354816272600248565 * x * x)));
    case SB_SILU:
        return x / (1 + exp(-x));
    default:
        return x;
    }
}

SB_INLINE vd activate_d(vd x, int activation) {
    if (activation != SB_NONE)
        for (int i = 0; i < SB_VECTOR_BYTES / 8; i++) x[i] = activate_one(x[i], activation);
    return x;
}

/* ------------------------------------------------------------------------------------------------
 * Loads and stores of one vector in the storage type; `p` needs no alignment beyond its element. */

SB_INLINE vf load_float(const void *p, int64_t i, int dtype) {
    switch (dtype) {
    case SB_BFLOAT16:
        return bf16_to_float((vh) * (const vh_u *)((const uint16_t *)p + i));
    case SB_FLOAT16:
        return fp16_to_float((vh) * (const vh_u *)((const uint16_t *)p + i));
    default:
        return (vf) * (const vf_u *)((const float *)p + i);
    }
}

/* A dtype for `store_float`: SB_BFLOAT16, and the vector holds no NaN. */
#define SB_BFLOAT16_NUMBERS 101

SB_INLINE void store_float(void *p, int64_t i, vf v, int dtype) {
    switch (dtype) {
    case SB_BFLOAT16_NUMBERS:
        *(vh_u *)((uint16_t *)p + i) = number_to_bf16(v);
        break;
    case SB_BFLOAT16:
        *(vh_u *)((uint16_t *)p + i) = float_to_bf16(v);
        break;
    case SB_FLOAT16:
        *(vh_u *)((uint16_t *)p + i) = float_to_fp16(v);
        break;
    default:
        *(vf_u *)((float *)p + i) = v;
    }
}

SB_INLINE vd load_double(const void *p, int64_t i, int dtype) {
    (void)dtype;
    return (vd) * (const vd_u *)((const double *)p + i);
}

SB_INLINE void store_double(void *p, int64_t i, vd v, int dtype) {
    (void)dtype;
    *(vd_u *)((double *)p + i) = v;
}

/* The same for n < W elements: through a buffer, so that nothing beyond them is touched. (That n is
 * small is asked again so that the compiler knows as well.) */
SB_INLINE vf load_float_part(const void *p, int64_t i, int n, int dtype) {
    const size_t size = dtype == SB_FLOAT32 ? 4 : 2;
    char buffer[SB_VECTOR_BYTES] = {0};
    if ((size_t)n <= SB_VECTOR_BYTES / 4) memcpy(buffer, (const char *)p + (size_t)i * size, (size_t)n * size);
    return load_float(buffer, 0, dtype);
}

SB_INLINE void store_float_part(void *p, int64_t i, int n, vf v, int dtype) {
    const size_t size = dtype == SB_FLOAT32 ? 4 : 2;
    char buffer[SB_VECTOR_BYTES];
    store_float(buffer, 0, v, dtype);
    if ((size_t)n <= SB_VECTOR_BYTES / 4) memcpy((char *)p + (size_t)i * size, buffer, (size_t)n * size);
}

SB_INLINE vd load_double_part(const void *p, int64_t i, int n, int dtype) {
    (void)dtype;
    char buffer[SB_VECTOR_BYTES] = {0};
    if ((size_t)n <= SB_VECTOR_BYTES / 8) memcpy(buffer, (const double *)p + i, (size_t)n * sizeof(double));
    return load_double(buffer, 0, dtype);
}

SB_INLINE void store_double_part(void *p, int64_t i, int n, vd v, int dtype) {
    (void)dtype;
    if ((size_t)n <= SB_VECTOR_BYTES / 8) memcpy((double *)p + i, &v, (size_t)n * sizeof(double));
}

SB_INLINE float one_float(const void *p, int64_t i, int dtype) {
    return load_float_part(p, i, 1, dtype)[0];
}

SB_INLINE double one_double(const void *p, int64_t i, int dtype) {
    double one;
    (void)dtype;
    memcpy(&one, (const char *)p + i * (int64_t)sizeof one, sizeof one);
    return one;
}

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

#define T float
#define V vf
#define W (SB_VECTOR_BYTES / 4)
#define KC 16
#define TYPED(name) SB_NAME(name, float)
#define LOAD load_float
#define STORE store_float
#define LOAD_PART load_float_part
#define STORE_PART store_float_part
#define ONE one_float
#define ACTIVATE activate_f
#include "kernels_typed.h"

#define SB_DOUBLE
#define T double
#define V vd
#define W (SB_VECTOR_BYTES / 8)
#define KC 8
#define TYPED(name) SB_NAME(name, double)
#define LOAD load_double
#define STORE store_double
#define LOAD_PART load_double_part
#define STORE_PART store_double_part
#define ONE one_double
#define ACTIVATE activate_d
#include "kernels_typed.h"

const sb_kernels SB_PASTE2(sb, kernels, SB_ISA) = {
    .lanes_f32 = SB_VECTOR_BYTES / 4,
    .lanes_f64 = SB_VECTOR_BYTES / 8,
    .small_m = SB_SMALL_M,
    .product_f32 = SB_NAME(product, float),
    .product_f64 = SB_NAME(product, double),
    .small_f32 = SB_NAME(small, float),
    .small_f64 = SB_NAME(small, double),
    .grad_f32 = SB_NAME(grad, float),
    .grad_f64 = SB_NAME(grad, double),
};
