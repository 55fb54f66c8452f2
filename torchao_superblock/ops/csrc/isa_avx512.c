/* The kernels for processors with AVX-512 (F, BW, DQ, VL). Nothing here runs before the processor was asked. */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
#endif
#define SB_ISA avx512
#define SB_VECTOR_BYTES 64
#define SB_TALL 1
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int sb_no_avx512_here;
#endif
