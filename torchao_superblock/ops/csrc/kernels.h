/* All kernels of one instruction set. Included once by each isa_*.c, which names the vector width.
 *
 * The code is plain C with GCC's vector extension, so one text serves SSE2, AVX2, AVX-512 and NEON.
 * formats.h, activations.h and shuffles.h hold what float32 and the 16-bit formats need; typed.h is then included for
 * the two types that sums are kept in, float and double.
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

#include "formats.h"
#include "activations.h"
#include "shuffles.h"

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
#include "typed.h"

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
#include "typed.h"

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
