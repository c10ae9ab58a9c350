/* One pass over memory where PyTorch takes several: the steps of SFW on float32 tensors of a CPU.
 *
 * Tensors are dense and given in the order of their memory; m is the momentum, g the gradient. Long sums are those in
 * double of short ones in float; the caller adds up one for each chunk, so that the number of threads changes nothing.
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define CHUNK 8192 /* entries that a thread takes at a time: m, g and a copy stay in the first caches */
#define SUM 1024   /* entries that are added up in float */
#define BLOCK 64   /* entries that are looked at together for one inside the bracket */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* As many threads as PyTorch uses, whose OpenMP may be another one. */
void use_threads(int count) { omp_set_num_threads(count); }

/* The number of chunks of n entries: the length of every array of partial sums. */
int64_t chunks(int64_t n) { return (n + CHUNK - 1) / CHUNK; }

/* m <- momentum*m + weight*g, with the sum of squares of each row of m, (rows). */
void accumulate_rows(float *restrict m, const float *restrict g, int64_t rows, int64_t columns, float momentum,
                     float weight, double *restrict squares) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        double sum = 0;
        for (int64_t start = r * columns; start < (r + 1) * columns; start += SUM) {
            int64_t stop = smaller(start + SUM, (r + 1) * columns);
            float part = 0;
#pragma omp simd reduction(+ : part)
            for (int64_t i = start; i < stop; i++) {
                float x = momentum * m[i] + weight * g[i];
                m[i] = x;
                part += x * x;
            }
            sum += part;
        }
        squares[r] = sum;
    }
}

/* m <- momentum*m + weight*g, and what is needed to find its k-th largest magnitude if that lies in [low, high].
 *
 * Of each chunk: the sum of squares; the sum of squares and the number of magnitudes above high; and how many lie in
 * the bracket. These are written to candidates, one after the other; returns how many there are.
 */
int64_t accumulate_entries(float *restrict m, const float *restrict g, int64_t n, float momentum, float weight,
                           float low, float high, double *restrict squares, double *restrict squares_above,
                           int64_t *restrict above, int64_t *restrict inside, float *restrict candidates) {
    int64_t count = chunks(n);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < count; c++) {
        int64_t start = c * CHUNK, stop = smaller(start + CHUNK, n), found = 0;
        float sum = 0, sum_above = 0;
        int number = 0;
        for (int64_t block = start; block < stop; block += BLOCK) {
            int size = (int)smaller(BLOCK, stop - block);
            float *restrict mb = m + block;
            const float *restrict gb = g + block;
            int any = 0;
#pragma omp simd reduction(+ : sum, sum_above, number, any)
            for (int i = 0; i < size; i++) {
                float x = momentum * mb[i] + weight * gb[i];
                float magnitude = fabsf(x), square = x * x;
                mb[i] = x;
                sum += square;
                sum_above += magnitude > high ? square : 0.0f;
                number += magnitude > high;
                any += (magnitude >= low) & (magnitude <= high);
            }
            if (any)
                for (int i = 0; i < size; i++) { /* no branch: most of them are not inside */
                    float magnitude = fabsf(mb[i]);
                    candidates[start + found] = magnitude;
                    found += (magnitude >= low) & (magnitude <= high);
                }
        }
        squares[c] = sum;
        squares_above[c] = sum_above;
        above[c] = number;
        inside[c] = found;
    }
    int64_t total = 0;
    for (int64_t c = 0; c < count; c++) {
        memmove(candidates + total, candidates + c * CHUNK, (size_t)inside[c] * sizeof(float));
        total += inside[c];
    }
    return total;
}

/* Of each chunk the sum of squares of what is at least as large as the threshold. */
void squares_from(const float *restrict m, int64_t n, float threshold, double *restrict squares) {
    int64_t count = chunks(n);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < count; c++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = c * CHUNK; i < smaller(c * CHUNK + CHUNK, n); i++)
            sum += fabsf(m[i]) >= threshold ? m[i] * m[i] : 0.0f;
        squares[c] = sum;
    }
}

/* m <- momentum*m + weight*g, and kept <- m with all but the 2 largest of every 4 entries set to zero.
 *
 * m is (outer, 4, inner). Magnitudes are compared as integers whose last bits are the place in the block, so that all
 * differ and the first among equals wins. Of each chunk of blocks the sums of squares of m and of kept.
 */
static inline int32_t key(float x, int32_t place) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7ffffffc) + 3 - place;
}
static inline int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }

/* Of `count` blocks that begin `step` entries apart, the entries of each `place` entries apart. */
static inline void keep_2_of_4(const float *restrict m, float *restrict kept, int64_t count, int64_t step,
                               int64_t place) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        int64_t i0 = i * step, i1 = i0 + place, i2 = i1 + place, i3 = i2 + place;
        int32_t a0 = key(m[i0], 0), a1 = key(m[i1], 1), a2 = key(m[i2], 2), a3 = key(m[i3], 3);
        int32_t second = most(least(most(a0, a1), most(a2, a3)), most(least(a0, a1), least(a2, a3)));
        kept[i0] = a0 >= second ? m[i0] : 0.0f;
        kept[i1] = a1 >= second ? m[i1] : 0.0f;
        kept[i2] = a2 >= second ? m[i2] : 0.0f;
        kept[i3] = a3 >= second ? m[i3] : 0.0f;
    }
}

/* Lanes of blocks, as many as one sum is made over: some outer indices with all of inner, or a part of one. */
static int64_t outer_at_once(int64_t inner) { return inner < SUM / 4 ? SUM / 4 / inner : 1; }
static int64_t parts_of(int64_t inner) { return inner < SUM / 4 ? 1 : (inner + SUM / 4 - 1) / (SUM / 4); }

/* The number of sums that accumulate_2_of_4 makes. */
int64_t chunks_of_blocks(int64_t outer, int64_t inner) {
    int64_t each = outer_at_once(inner);
    return (outer + each - 1) / each * parts_of(inner);
}

void accumulate_2_of_4(float *restrict m, const float *restrict g, int64_t outer, int64_t inner, float momentum,
                       float weight, float *restrict kept, double *restrict squares, double *restrict squares_kept) {
    int64_t count = chunks_of_blocks(outer, inner), each = outer_at_once(inner), parts = parts_of(inner);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < count; c++) {
        /* Runs of so many entries side by side: all of some blocks, or four from one block and lane to another. */
        int64_t first = c / parts * each, stop = smaller(first + each, outer), lane = c % parts * (SUM / 4);
        int64_t start = 4 * inner * first + lane;
        int64_t length = parts == 1 ? 4 * inner * (stop - first) : smaller(SUM / 4, inner - lane);
        int64_t runs = parts == 1 ? 1 : 4;
        float sum = 0, sum_kept = 0;
        for (int64_t r = 0; r < runs; r++) {
            float *restrict run = m + start + r * inner;
            const float *restrict slope = g + start + r * inner;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < length; i++) {
                float x = momentum * run[i] + weight * slope[i];
                run[i] = x;
                sum += x * x;
            }
        }
        if (parts > 1)
            keep_2_of_4(m + start, kept + start, length, 1, inner);
        else if (inner == 1) /* the entries of a block side by side */
            keep_2_of_4(m + start, kept + start, stop - first, 4, 1);
        else if (inner == 9) /* convolutions of 3x3: a number that the compiler knows */
            for (int64_t i = 0; i < length; i += 36) keep_2_of_4(m + start + i, kept + start + i, 9, 1, 9);
        else
            for (int64_t i = 0; i < length; i += 4 * inner) keep_2_of_4(m + start + i, kept + start + i, inner, 1, inner);
        for (int64_t r = 0; r < runs; r++) {
            const float *restrict run = kept + start + r * inner;
#pragma omp simd reduction(+ : sum_kept)
            for (int64_t i = 0; i < length; i++) sum_kept += run[i] * run[i];
        }
        squares[c] = sum;
        squares_kept[c] = sum_kept;
    }
}

/* Of each chunk the sum of squares of theta - v, where v = -factor[row]*x where |x| >= threshold, else 0. */
void distances(const float *restrict theta, const float *restrict x, int64_t n, int64_t columns,
               const float *restrict factors, float threshold, int signs, double *restrict squares) {
    int64_t count = chunks(n);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < count; c++) {
        double total = 0;
        for (int64_t i = c * CHUNK, stop = smaller(c * CHUNK + CHUNK, n); i < stop;) {
            int64_t end = smaller(smaller(stop, i + SUM), (i / columns + 1) * columns);
            float factor = factors[i / columns], sum = 0;
            if (factor == 0) { /* most rows: x need not be read */
#pragma omp simd reduction(+ : sum)
                for (int64_t j = i; j < end; j++) sum += theta[j] * theta[j];
            } else if (signs) {
#pragma omp simd reduction(+ : sum)
                for (int64_t j = i; j < end; j++) {
                    float v = fabsf(x[j]) >= threshold ? copysignf(factor, x[j]) : 0.0f, d = theta[j] + v;
                    sum += d * d;
                }
            } else {
#pragma omp simd reduction(+ : sum)
                for (int64_t j = i; j < end; j++) {
                    float v = fabsf(x[j]) >= threshold ? factor * x[j] : 0.0f, d = theta[j] + v;
                    sum += d * d;
                }
            }
            total += sum;
            i = end;
        }
        squares[c] = total;
    }
}

/* theta <- theta - eta*(theta - v), with v as above. */
void update(float *restrict theta, const float *restrict x, int64_t n, int64_t columns, const float *restrict factors,
            float threshold, int signs, float eta) {
    int64_t count = chunks(n);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < count; c++)
        for (int64_t i = c * CHUNK, stop = smaller(c * CHUNK + CHUNK, n); i < stop;) {
            int64_t end = smaller(stop, (i / columns + 1) * columns);
            float factor = factors[i / columns];
            if (factor == 0) {
#pragma omp simd
                for (int64_t j = i; j < end; j++) theta[j] -= eta * theta[j];
            } else if (signs) {
#pragma omp simd
                for (int64_t j = i; j < end; j++) {
                    float v = fabsf(x[j]) >= threshold ? copysignf(factor, x[j]) : 0.0f;
                    theta[j] -= eta * (theta[j] + v);
                }
            } else {
#pragma omp simd
                for (int64_t j = i; j < end; j++) {
                    float v = fabsf(x[j]) >= threshold ? factor * x[j] : 0.0f;
                    theta[j] -= eta * (theta[j] + v);
                }
            }
            i = end;
        }
}
