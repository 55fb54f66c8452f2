/* The activations, on a vector of float32 and on one of float64. Included by kernels.h. */

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

/* (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), so all of these need one exponential. */
SB_INLINE vf silu_f(vf x) { return x / (1.0f + exp_f(-x)); }

SB_INLINE vf quick_gelu_f(vf x) { return x / (1.0f + exp_f(-1.702f * x)); }

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
    case SB_QUICK_GELU:
        return quick_gelu_f(x);
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
    case SB_QUICK_GELU:
        return x / (1 + exp(-1.702 * x));
    default:
        return x;
    }
}

SB_INLINE vd activate_d(vd x, int activation) {
    if (activation != SB_NONE)
        for (int i = 0; i < SB_VECTOR_BYTES / 8; i++) x[i] = activate_one(x[i], activation);
    return x;
}
