/* 16-bit formats, and loads and stores of one vector in any of the storage types. Included by kernels.h.
 *
 * bfloat16 is the upper half of a float32. float16 is converted with integer steps where the instruction set has none
 * for it. */

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

/* Loads and stores of one vector in the storage type; `p` needs no alignment beyond its element. */

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

/* Up to a vector of bytes, an even number, in a few moves: a call of memcpy takes longer than the rest of a short row. */
SB_INLINE void move_bytes(char *to, const char *from, size_t n) {
#define SB_MOVE(size)              \
    if (n & (size)) {              \
        memcpy(to, from, (size));  \
        to += (size), from += (size); \
    }
    SB_MOVE(64) SB_MOVE(32) SB_MOVE(16) SB_MOVE(8) SB_MOVE(4) SB_MOVE(2)
#undef SB_MOVE
}

/* The same for n < W elements: through a buffer, so that nothing beyond them is touched. (That n is
 * small is asked again so that the compiler knows as well.) */
SB_INLINE vf load_float_part(const void *p, int64_t i, int n, int dtype) {
    const size_t size = dtype == SB_FLOAT32 ? 4 : 2;
    char buffer[SB_VECTOR_BYTES] = {0};
    if ((size_t)n <= SB_VECTOR_BYTES / 4) move_bytes(buffer, (const char *)p + (size_t)i * size, (size_t)n * size);
    return load_float(buffer, 0, dtype);
}

SB_INLINE void store_float_part(void *p, int64_t i, int n, vf v, int dtype) {
    const size_t size = dtype == SB_FLOAT32 ? 4 : 2;
    char buffer[SB_VECTOR_BYTES];
    store_float(buffer, 0, v, dtype);
    if ((size_t)n <= SB_VECTOR_BYTES / 4) move_bytes((char *)p + (size_t)i * size, buffer, (size_t)n * size);
}

SB_INLINE vd load_double_part(const void *p, int64_t i, int n, int dtype) {
    (void)dtype;
    char buffer[SB_VECTOR_BYTES] = {0};
    if ((size_t)n <= SB_VECTOR_BYTES / 8)
        move_bytes(buffer, (const char *)((const double *)p + i), (size_t)n * sizeof(double));
    return load_double(buffer, 0, dtype);
}

SB_INLINE void store_double_part(void *p, int64_t i, int n, vd v, int dtype) {
    (void)dtype;
    if ((size_t)n <= SB_VECTOR_BYTES / 8)
        move_bytes((char *)((double *)p + i), (const char *)&v, (size_t)n * sizeof(double));
}

SB_INLINE float one_float(const void *p, int64_t i, int dtype) {
    uint16_t half;
    uint32_t bits;
    float one;
    switch (dtype) {
    case SB_BFLOAT16:
        memcpy(&half, (const char *)p + i * 2, sizeof half);
        bits = (uint32_t)half << 16;
        memcpy(&one, &bits, sizeof one);
        return one;
    case SB_FLOAT16:
        return load_float_part(p, i, 1, dtype)[0];
    default:
        memcpy(&one, (const char *)p + i * 4, sizeof one);
        return one;
    }
}

SB_INLINE double one_double(const void *p, int64_t i, int dtype) {
    double one;
    (void)dtype;
    memcpy(&one, (const char *)p + i * (int64_t)sizeof one, sizeof one);
    return one;
}
