// y = x Wᵀ + b for few rows of x: the weights stream from memory exactly once, in place, split over the threads by rows.
#include <stdbool.h>
#include <omp.h>

#include "bf16.h"

typedef struct {
    const bf16 *x, *w, *bias;
    bf16 *y;
    int64_t m, n, k, ldw;
} Linear;

// The N outputs from column `column` on, for the M rows from `row` on.
INLINE void outputs(const int M, const int N, const int LINES, const Linear *t, int64_t row, int64_t column, int64_t ahead) {
    const bf16 *w_rows[TILE_OUTPUTS];
    __m128 sums[TILE_ROWS][TILE_OUTPUTS / 4];
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
        // past the last row the same row is read again and its result dropped
        const int64_t source = column + j < t->n ? column + j : t->n - 1;
        w_rows[j] = t->w + source * t->ldw;
    }
    dot_tile(M, N, LINES, w_rows, t->x + row * t->k, t->k, t->k, ahead, sums);
#pragma GCC unroll 4
    for (int j = 0; j < N; j += 4) {
        const int64_t left = t->n - column - j;
        if (left <= 0) break;
        const __mmask8 valid = left >= 4 ? 15 : (__mmask8)((1 << left) - 1);
        __m128 bias = _mm_setzero_ps();
        if (t->bias) bias = _mm512_castps512_ps128(bf16_widen(_mm256_castsi128_si256(_mm_maskz_loadu_epi16(valid, t->bias + column + j))));
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const __m256i rounded = float_to_bf16(_mm512_castps128_ps512(_mm_add_ps(sums[i][j / 4], bias)));
            _mm_mask_storeu_epi16(t->y + (row + i) * t->n + column + j, valid, _mm256_castsi256_si128(rounded));
        }
    }
}

// How far the prefetch runs ahead, in elements: far enough for the memory's latency, near enough to stay in the L2 cache.
#define AHEAD 32768

#define CASE(M, N, LINES) \
    case M: outputs(M, N, LINES, t, row, column, ahead); break

static void few_rows(const Linear *t, int64_t begin, int64_t end) {
    const int64_t row = 0, ahead = AHEAD;
    for (int64_t column = begin; column < end; column += 8) {
        switch (t->m) {
            CASE(1, 8, 8);
            CASE(2, 8, 8);
            CASE(3, 8, 8);
        }
    }
}

// Rows are cut into tiles of 3 to 6; every tile asks for its share of the next weights, LINES of 4.
INLINE void tiled_rows(const int LINES, const Linear *t, int64_t begin, int64_t end, int64_t tiles) {
    for (int64_t column = begin; column < end; column += 4) {
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t row = t->m * tile / tiles, rows = t->m * (tile + 1) / tiles - row;
            const int64_t ahead = AHEAD + LINES * tile * t->k;
            switch (rows) {
                CASE(3, 4, LINES);
                CASE(4, 4, LINES);
                CASE(5, 4, LINES);
                CASE(6, 4, LINES);
            }
        }
    }
}

static void more_rows(const Linear *t, int64_t begin, int64_t end) {
    const int64_t tiles = (t->m + 5) / 6;
    if (tiles == 1) tiled_rows(4, t, begin, end, tiles);
    else if (tiles < 4) tiled_rows(2, t, begin, end, tiles);
    else tiled_rows(1, t, begin, end, tiles);
}

// x [m, k] and y [m, n] contiguous, w [n, k] with row stride ldw (elements), bias [n] or NULL; m >= 1.
void linear_bf16(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, int64_t m, int64_t n, int64_t k, int64_t ldw, int threads) {
    const Linear task = {x, w, bias, y, m, n, k, ldw};
    const int64_t blocks = (n + 7) / 8;
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t begin = blocks * me / all * 8, end = blocks * (me + 1) / all * 8;
        (m <= 3 ? few_rows : more_rows)(&task, begin, end < n ? end : n);
    }
}
