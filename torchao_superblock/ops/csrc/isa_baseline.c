/* The kernels with what every processor of the platform has: SSE2 on x86-64, NEON on aarch64. */
#define SB_ISA baseline
#define SB_VECTOR_BYTES 16
#if defined(__aarch64__)
#define SB_TALL 1 /* 32 vector registers */
#else
#define SB_TALL 0
#endif
#include "kernels.h"
