/* Small dense matrices in a core's cache: products, triangular solves, transposes, activations.

   Rows are tokens or weights, stored one after the other with a leading dimension; widths are padded with zeros to whole
   vectors (VL numbers). Compiled once with REAL float and once with REAL double, for the machine it runs on. */

#ifndef NESTED_LM_DENSE_H
#define NESTED_LM_DENSE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define TILE_ROWS 4
#else
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#endif

#define VL ((long)(VECTOR_BYTES / sizeof(REAL)))
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) for (long i = 0; i < (n); i++)

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

INLINE vec load(const REAL *x) { return *(const vec *)x; }
INLINE void store(REAL *x, vec v) { *(vec *)x = v; }
INLINE long padded(long n) { return (n + VL - 1) / VL * VL; }

/* Which entries of the left factor, or of the result, are not zero. */
enum { FULL = 0, LOWER = 1, UPPER = 2, LOWER_RESULT = 3 };

/* rows x (2 or 1) vectors of c: a b, added to c or not. rows and columns are constants after inlining. */
INLINE void tile(const int rows, const int columns, long from, long to, const REAL *a, long row, long column,
                 const REAL *b, long ldb, REAL *c, long ldc, int add)
{
    vec sum[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < columns; j++) sum[i][j] = (vec){0};
    for (long p = from; p < to; p++) {
        vec right[2];
#pragma GCC unroll 2
        for (int j = 0; j < columns; j++) right[j] = load(b + p * ldb + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const REAL left = a[i * row + p * column];
#pragma GCC unroll 2
            for (int j = 0; j < columns; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < columns; j++) {
            REAL *at = c + i * ldc + j * VL;
            if (add) store(at, load(at) + sum[i][j]);
            else store(at, sum[i][j]);
        }
}

#define TILE_CASE(n) \
    case n: \
        if (columns == 2) tile(n, 2, from, to, a, row, column, b, ldb, c, ldc, add); \
        else tile(n, 1, from, to, a, row, column, b, ldb, c, ldc, add); \
        break;

static void any_tile(int rows, int columns, long from, long to, const REAL *a, long row, long column, const REAL *b,
                     long ldb, REAL *c, long ldc, int add)
{
    switch (rows) {
        TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4)
#if TILE_ROWS == 8
        TILE_CASE(5) TILE_CASE(6) TILE_CASE(7) TILE_CASE(8)
#endif
    }
}

/* c (m x n) = or += a (m x k) b (k x n). a has its own strides, so that a transposed factor costs nothing; n is padded. */
static void product(long m, long n, long k, const REAL *a, long row, long column, const REAL *b, long ldb, REAL *c,
                    long ldc, int add, int shape)
{
    for (long j = 0; j < n; j += 2 * VL) {
        const int columns = n - j > VL ? 2 : 1;
        for (long i = 0; i < m; i += TILE_ROWS) {
            const int rows = m - i < TILE_ROWS ? (int)(m - i) : TILE_ROWS;
            if (shape == LOWER_RESULT && j >= i + rows) continue;
            const long from = shape == UPPER ? i : 0;
            const long to = shape == LOWER && i + rows < k ? i + rows : k;
            any_tile(rows, columns, from, to, a + i * row, row, column, b + j, ldb, c + i * ldc + j, ldc, add);
        }
    }
}

/* Solve (I + L) X = R in place (R m x n), given minus = -L, strictly lower. */
static void solve_lower(long m, long n, const REAL *minus, long ldm, REAL *x, long ldx)
{
    for (long i = 0; i < m; i += TILE_ROWS) {
        const long rows = m - i < TILE_ROWS ? m - i : TILE_ROWS;
        if (i) product(rows, n, i, minus + i * ldm, ldm, 1, x, ldx, x + i * ldx, ldx, 1, FULL);
        for (long t = i + 1; t < i + rows; t++)
            for (long s = i; s < t; s++) {
                const REAL factor = minus[t * ldm + s];
                for (long j = 0; j < n; j += VL)
                    store(x + t * ldx + j, load(x + t * ldx + j) + factor * load(x + s * ldx + j));
            }
    }
}

/* The same with the transpose of I + L. */
static void solve_upper(long m, long n, const REAL *minus, long ldm, REAL *x, long ldx)
{
    for (long end = m; end > 0;) {
        const long begin = (end - 1) / TILE_ROWS * TILE_ROWS, rows = end - begin;
        if (end < m)
            product(rows, n, m - end, minus + end * ldm + begin, 1, ldm, x + end * ldx, ldx, x + begin * ldx, ldx, 1,
                    FULL);
        for (long t = end - 2; t >= begin; t--)
            for (long s = t + 1; s < end; s++) {
                const REAL factor = minus[s * ldm + t];
                for (long j = 0; j < n; j += VL)
                    store(x + t * ldx + j, load(x + t * ldx + j) + factor * load(x + s * ldx + j));
            }
        end = begin;
    }
}

#if defined(__GNUC__) && !defined(__clang__)
/* A square of VL x VL numbers: interleaving row i with row i + VL / 2, log2(VL) times, transposes. */
INLINE void turn_square(const REAL *from, long ldf, REAL *to, long ldt)
{
#if defined(__AVX512F__)
    enum { LANES = 64 / sizeof(REAL) };
#elif defined(__AVX__)
    enum { LANES = 32 / sizeof(REAL) };
#else
    enum { LANES = 16 / sizeof(REAL) };
#endif
    typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 4, (int32_t)0, (int64_t)0)) whole;
    typedef whole index __attribute__((vector_size(VECTOR_BYTES)));
    index low, high;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        low[i] = i / 2 + (i % 2) * LANES;
        high[i] = low[i] + LANES / 2;
    }
    vec rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = load(from + i * ldf);
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        vec next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + LANES / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * ldt, rows[i]);
}
#else
INLINE void turn_square(const REAL *from, long ldf, REAL *to, long ldt)
{
    EACH(j, VL) EACH(i, VL) to[j * ldt + i] = from[i * ldf + j];
}
#endif

/* to (n x m, leading dimension ldt) = from (m x n) transposed; columns of `to` up to `width` become 0. */
static void transpose(long m, long n, const REAL *from, long ldf, REAL *to, long ldt, long width)
{
    for (long i = 0; i < m; i += VL)
        for (long j = 0; j < n; j += VL) {
            if (i + VL <= m && j + VL <= n) {
                turn_square(from + i * ldf + j, ldf, to + j * ldt + i, ldt);
                continue;
            }
            const long rows = m - i < VL ? m - i : VL, columns = n - j < VL ? n - j : VL;
            EACH(q, columns) EACH(p, rows) to[(j + q) * ldt + i + p] = from[(i + p) * ldf + j + q];
        }
    if (width > m) EACH(j, n) memset(to + j * ldt + m, 0, (size_t)(width - m) * sizeof(REAL));
}

INLINE REAL total(vec v)
{
    REAL sum = 0;
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) sum += v[i];
    return sum;
}

INLINE REAL dot(long n, const REAL *x, const REAL *y)
{
    vec sum = {0};
    for (long j = 0; j < n; j += VL) sum += load(x + j) * load(y + j);
    return total(sum);
}

/* Whether n numbers, which need not fill whole vectors, are 0; NaN is not. */
static int all_zero(long n, const REAL *x)
{
    int any = 0;
    for (long begin = 0; begin < n && !any; begin += 512)
        for (long j = begin; j < n && j < begin + 512; j++) any |= x[j] != 0; /* without a way out, so in vectors */
    return !any;
}

/* to (n numbers) += factor * x. */
INLINE void add_scaled(long n, REAL *to, REAL factor, const REAL *x)
{
    for (long j = 0; j < n; j += VL) store(to + j, load(to + j) + factor * load(x + j));
}

INLINE void scaled(long n, REAL *to, REAL factor, const REAL *x)
{
    for (long j = 0; j < n; j += VL) store(to + j, factor * load(x + j));
}

/* exp of a vector. In single precision by a polynomial of degree 6 on half a binary order, 2 ulp; NaN stays NaN. */
INLINE vec exponential(vec x)
{
    if (sizeof(REAL) == 8) {
        for (int i = 0; i < VL; i++) x[i] = (REAL)exp((double)x[i]);
        return x;
    }
    typedef int32_t ivec __attribute__((vector_size(VECTOR_BYTES)));
    typedef float fvec __attribute__((vector_size(VECTOR_BYTES)));
    fvec y = (fvec)x;
    const fvec lowest = (fvec){0} - 87.0f, highest = (fvec){0} + 88.0f;
    const ivec below = y < lowest, above = y > highest;
    y = (fvec)(((ivec)y & ~(below | above)) | ((ivec)lowest & below) | ((ivec)highest & above));
    const fvec shifter = (fvec){0} + 12582912.0f; /* 1.5 x 2^23: adding it rounds to the nearest whole number */
    const fvec shifted = y * 1.44269504f + shifter;
    const fvec whole = shifted - shifter;
    fvec r = y - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    fvec sum = (fvec){0} + 1.9875691500e-4f;
    sum = sum * r + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.0f;
    const ivec power = ((ivec)shifted - (ivec)shifter + 127) << 23;
    return (vec)(sum * (fvec)power);
}

INLINE vec sigmoid(vec x) { return 1 / (1 + exponential(-x)); }

INLINE REAL one_sigmoid(REAL x) { return (REAL)(1 / (1 + exp(-(double)x))); }

INLINE REAL log_sigmoid(REAL x) { return (REAL)((x < 0 ? (double)x : 0.0) - log1p(exp(-fabs((double)x)))); }

/* Derivative of silu at p, where gate is sigmoid(p). */
INLINE vec silu_slope(vec p, vec gate) { return gate + p * gate * (1 - gate); }

/* gate = sigmoid(p), hidden = silu(p), n numbers. */
static void activate(long n, const REAL *p, REAL *gate, REAL *hidden)
{
    for (long j = 0; j < n; j += VL) {
        const vec x = load(p + j), g = sigmoid(x);
        store(gate + j, g);
        store(hidden + j, x * g);
    }
}

/* Rows of x of n numbers, one every `stride`, into rows padded to `width`. */
static void gather(long rows, long n, long width, const REAL *x, long stride, REAL *to)
{
    EACH(t, rows) {
        memcpy(to + t * width, x + t * stride, (size_t)n * sizeof(REAL));
        if (width > n) memset(to + t * width + n, 0, (size_t)(width - n) * sizeof(REAL));
    }
}

static void scatter(long rows, long n, long width, const REAL *x, REAL *to, long stride)
{
    EACH(t, rows) memcpy(to + t * stride, x + t * width, (size_t)n * sizeof(REAL));
}

#endif
