/* The kernels for processors with AVX2, FMA and F16C. Nothing here runs before the processor was asked. */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,prfchw")
#endif
#define SB_ISA avx2
#define SB_VECTOR_BYTES 32
#define SB_TALL 0
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int sb_no_avx2_here;
#endif
