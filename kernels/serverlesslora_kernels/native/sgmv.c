// y[b:e, offset:offset+n] += scale · (x[b:e] Aᵀ) Bᵀ for every piece of every segment: two passes over one pool.
//
// Pass 1 (shrink) computes t = scale · x Aᵀ in float32 and keeps it as two bf16 numbers, high + low, whose sum carries 16
// bits: nothing visible is lost, and pass 2 (expand) can use pairwise bf16 products. Both passes cut the work into units of
// a few microseconds that the threads take from a shared counter, because segments and ranks differ wildly in size.
// A row's result is bitwise independent of the other rows, segments and the number of threads.
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "bf16.h"

// Outputs of B that are packed together: [n/32][pairs of ranks][32 outputs][2 ranks], zero padded.
#define BLOCK 32
#define EXPAND_ROWS 8
#define UNIT_ROWS 48
#define UNIT_BYTES 16384
#define UNIT_RANKS 8

// Python builds these three (segments.py); every field is 8 bytes wide.
typedef struct {
    const bf16 *b;
    int64_t n, pairs, first_rank, offset;
} Piece;

typedef struct {
    const bf16 *a;        // [ranks, k], the pieces' A stacked, each padded to an even number of rows
    const float *scales;  // [ranks rounded up to 4]
    int64_t ranks, num_pieces;
    Piece pieces[];
} Weights;

typedef struct {
    int64_t start, end;
    const Weights *weights;
} Segment;

typedef struct {
    bf16 *y;
    const bf16 *x;
    int64_t ldy, ldx, k;
    const Segment *segments;
    int64_t num_segments;
    bf16 **t;  // per segment: [rows][high: round4(ranks) | low: round4(ranks)]
    int64_t next_unit[2];  // of each pass
} Task;

// What a thread has taken: unit number `index` of segment s, whose weights begin at `data`.
typedef struct {
    int64_t s, index;
    const bf16 *data;
} Unit;

INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t padded(int64_t ranks) { return (ranks + 3) & ~(int64_t)3; }

// ---- shrink: units are (segment, up to UNIT_ROWS rows, UNIT_RANKS rows of A)

INLINE void shrink_tile(const int M, const int N, const Task *task, const Weights *w, const bf16 *x, bf16 *t, int64_t rank, int64_t ahead) {
    const bf16 *a_rows[TILE_OUTPUTS];
    __m128 sums[TILE_ROWS][TILE_OUTPUTS / 4];
    const int64_t width = padded(w->ranks);
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) a_rows[j] = w->a + min(rank + j, w->ranks - 1) * task->k;
    dot_tile(M, N, N, a_rows, x, task->ldx, task->k, ahead, sums);
#pragma GCC unroll 4
    for (int j = 0; j < N; j += 4) {
        if (rank + j >= w->ranks) break;
        const __m128 scale = _mm_loadu_ps(w->scales + rank + j);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const __m512 exact = _mm512_castps128_ps512(_mm_mul_ps(sums[i][j / 4], scale));
            const __m256i high = float_to_bf16(exact);
            const __m256i low = float_to_bf16(_mm512_sub_ps(exact, bf16_widen(high)));
            bf16 *row = t + i * 2 * width + rank + j;
            _mm_storel_epi64((__m128i *)row, _mm256_castsi256_si128(high));
            _mm_storel_epi64((__m128i *)(row + width), _mm256_castsi256_si128(low));
        }
    }
}

#define SHRINK_CASE(M, N)                                                                                    \
    case M:                                                                                                  \
        for (int64_t r = rank; r < rank_end; r += N) shrink_tile(M, N, task, w, x, t, r, ahead);              \
        break

static void shrink_rows(const Task *task, const Weights *w, const bf16 *x, bf16 *t, int64_t rows, int64_t rank, int64_t rank_end, int64_t ahead) {
    switch (rows) {
        SHRINK_CASE(1, 8);
        SHRINK_CASE(2, 8);
        SHRINK_CASE(3, 8);
        SHRINK_CASE(4, 4);
        SHRINK_CASE(5, 4);
        SHRINK_CASE(6, 4);
    }
}

static const bf16 *shrink_data(const Task *task, const Segment *segment, int64_t index) {
    return segment->weights->a + index % divide_up(segment->weights->ranks, UNIT_RANKS) * UNIT_RANKS * task->k;
}

static void shrink_unit(const Task *task, const Unit *unit, const bf16 *next) {
    const Segment *segment = task->segments + unit->s;
    const Weights *w = segment->weights;
    const int64_t rank_units = divide_up(w->ranks, UNIT_RANKS);
    const int64_t rank = unit->index % rank_units * UNIT_RANKS, rank_end = min(rank + UNIT_RANKS, w->ranks);
    const int64_t start = unit->index / rank_units * UNIT_ROWS, end = min(start + UNIT_ROWS, segment->end - segment->start);
    const int64_t tiles = divide_up(end - start, TILE_ROWS);
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = start + (end - start) * i / tiles, row_end = start + (end - start) * (i + 1) / tiles;
        const bf16 *x = task->x + (segment->start + row) * task->ldx;
        bf16 *t = task->t[unit->s] + row * 2 * padded(w->ranks);
        shrink_rows(task, w, x, t, row_end - row, rank, rank_end, next && i == 0 ? next - unit->data : 0);
    }
}

INLINE int64_t shrink_units(const Segment *segment) {
    return divide_up(segment->end - segment->start, UNIT_ROWS) * divide_up(segment->weights->ranks, UNIT_RANKS);
}

// ---- expand: units are (segment, piece, up to UNIT_ROWS rows, about UNIT_BYTES of B)

INLINE void expand_tile(const int M, const bf16 *b, int64_t ahead, int64_t pairs, const bf16 *t, int64_t ldt, int64_t low, bf16 *y, int64_t ldy, __mmask32 valid) {
    __m512 acc[EXPAND_ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++, b += 2 * BLOCK) {
        const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + BLOCK);
        _mm_prefetch((const char *)(b + ahead), _MM_HINT_T1);
        _mm_prefetch((const char *)(b + ahead + BLOCK), _MM_HINT_T1);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            int32_t bits[2];
            memcpy(bits, t + i * ldt + 2 * pair, 4);
            memcpy(bits + 1, t + i * ldt + low + 2 * pair, 4);
            const __m512i t_high = _mm512_set1_epi32(bits[0]), t_low = _mm512_set1_epi32(bits[1]);
            acc[i][0] = dot_pairs(dot_pairs(acc[i][0], t_low, b0), t_high, b0);
            acc[i][1] = dot_pairs(dot_pairs(acc[i][1], t_low, b1), t_high, b1);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
        const __m512i old = _mm512_maskz_loadu_epi16(valid, y + i * ldy);
        const __m512 first = bf16_widen(_mm512_castsi512_si256(old)), second = bf16_widen(_mm512_extracti64x4_epi64(old, 1));
        const __m256i new_first = float_to_bf16(_mm512_add_ps(first, acc[i][0])), new_second = float_to_bf16(_mm512_add_ps(second, acc[i][1]));
        _mm512_mask_storeu_epi16(y + i * ldy, valid, _mm512_inserti64x4(_mm512_castsi256_si512(new_first), new_second, 1));
    }
}

#define EXPAND_CASE(M)                                                                                                      \
    case M:                                                                                                                 \
        for (int64_t c = column; c < column_end; c += BLOCK) {                                                              \
            const __mmask32 valid = p->n - c >= BLOCK ? ~(__mmask32)0 : ((__mmask32)1 << (p->n - c)) - 1;                   \
            expand_tile(M, p->b + c * 2 * p->pairs, ahead, p->pairs, t, ldt, ldt / 2, y + p->offset + c, ldy, valid);              \
        }                                                                                                                   \
        break

static void expand_rows(const Piece *p, const bf16 *t, int64_t ldt, bf16 *y, int64_t ldy, int64_t rows, int64_t column, int64_t column_end, int64_t ahead) {
    switch (rows) {
        EXPAND_CASE(1);
        EXPAND_CASE(2);
        EXPAND_CASE(3);
        EXPAND_CASE(4);
        EXPAND_CASE(5);
        EXPAND_CASE(6);
        EXPAND_CASE(7);
        EXPAND_CASE(8);
    }
}

INLINE int64_t unit_columns(const Piece *p) {
    const int64_t blocks = UNIT_BYTES / (p->pairs * BLOCK * 2 * (int64_t)sizeof(bf16));
    return (blocks > 0 ? blocks : 1) * BLOCK;
}

// The piece that unit `*index` of a segment belongs to; *index becomes the unit's number within the piece.
INLINE const Piece *unit_piece(const Segment *segment, int64_t row_units, int64_t *index) {
    const Piece *p = segment->weights->pieces;
    int64_t units;
    while (*index >= (units = divide_up(p->n, unit_columns(p)) * row_units)) {
        *index -= units;
        p++;
    }
    return p;
}

static const bf16 *expand_data(const Task *task, const Segment *segment, int64_t index) {
    (void)task;
    const int64_t row_units = divide_up(segment->end - segment->start, UNIT_ROWS);
    const Piece *p = unit_piece(segment, row_units, &index);
    return p->b + index / row_units * unit_columns(p) * 2 * p->pairs;
}

static void expand_unit(const Task *task, const Unit *unit, const bf16 *next) {
    const Segment *segment = task->segments + unit->s;
    const int64_t row_units = divide_up(segment->end - segment->start, UNIT_ROWS), ldt = 2 * padded(segment->weights->ranks);
    int64_t index = unit->index;
    const Piece *p = unit_piece(segment, row_units, &index);
    const int64_t column = index / row_units * unit_columns(p), column_end = min(column + unit_columns(p), p->n);
    const int64_t start = index % row_units * UNIT_ROWS, end = min(start + UNIT_ROWS, segment->end - segment->start);
    const int64_t tiles = divide_up(end - start, EXPAND_ROWS);
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = start + (end - start) * i / tiles, row_end = start + (end - start) * (i + 1) / tiles;
        bf16 *y = task->y + (segment->start + row) * task->ldy;
        const bf16 *t = task->t[unit->s] + row * ldt + p->first_rank;
        expand_rows(p, t, ldt, y, task->ldy, row_end - row, column, column_end, next && i == 0 ? next - unit->data : 0);
    }
}

INLINE int64_t expand_units(const Segment *segment) {
    const Weights *w = segment->weights;
    int64_t units = 0;
    for (int64_t i = 0; i < w->num_pieces; i++) units += divide_up(w->pieces[i].n, unit_columns(w->pieces + i));
    return units * divide_up(segment->end - segment->start, UNIT_ROWS);
}

// ---- the two passes

typedef int64_t CountUnits(const Segment *);
typedef const bf16 *UnitData(const Task *, const Segment *, int64_t);

// Where a thread stands in a pass. It walks the segments once, because the shared counter only grows.
typedef struct {
    int64_t s, before;  // the current segment and the number of units before it
} Position;

// Takes the next unit of a pass; false when none is left.
INLINE int take(Task *task, int pass, Position *at, CountUnits *count, UnitData *data, Unit *unit) {
    const int64_t number = __atomic_fetch_add(&task->next_unit[pass], 1, __ATOMIC_RELAXED);
    for (; at->s < task->num_segments; at->s++) {
        const Segment *segment = task->segments + at->s;
        const int64_t here = count(segment);
        if (number - at->before < here) {
            *unit = (Unit){at->s, number - at->before, data(task, segment, number - at->before)};
            return 1;
        }
        at->before += here;
    }
    return 0;
}

static void work(Task *task) {
    Position shrinking = {0, 0}, expanding = {0, 0};
    Unit unit, next, first;
    int more = take(task, 0, &shrinking, shrink_units, shrink_data, &unit);
    const int expands = take(task, 1, &expanding, expand_units, expand_data, &first);
    for (int running = more; running; running = more, unit = next) {
        more = take(task, 0, &shrinking, shrink_units, shrink_data, &next);
        shrink_unit(task, &unit, more ? next.data : expands ? first.data : NULL);
    }
#pragma omp barrier
    unit = first;
    for (int running = expands; running; running = more, unit = next) {
        more = take(task, 1, &expanding, expand_units, expand_data, &next);
        expand_unit(task, &unit, more ? next.data : NULL);
    }
}

// x [*, k] and y [*, n] have unit inner strides and row strides ldx, ldy. Returns 0, or -1 when memory ran out.
int sgmv_bf16(bf16 *y, const bf16 *x, int64_t ldy, int64_t ldx, int64_t k, const Segment *segments, int64_t num_segments, int threads) {
    int64_t size = 0;
    for (int64_t s = 0; s < num_segments; s++) size += (segments[s].end - segments[s].start) * 2 * padded(segments[s].weights->ranks);
    bf16 **t = malloc((size_t)num_segments * sizeof(*t) + (size_t)size * sizeof(bf16));
    if (!t) return -1;
    bf16 *free_space = (bf16 *)(t + num_segments);
    for (int64_t s = 0; s < num_segments; s++) {
        t[s] = free_space;
        free_space += (segments[s].end - segments[s].start) * 2 * padded(segments[s].weights->ranks);
    }
    Task task = {y, x, ldy, ldx, k, segments, num_segments, t, {0, 0}};
#pragma omp parallel num_threads(threads) if (threads > 1)
    work(&task);
    free(t);
    return 0;
}

// Packs one piece: a [rank, k] -> a_out [rank rounded up to 2, k]; b [n, rank] -> b_out, the layout of BLOCK above.
void sgmv_pack(const bf16 *a, const bf16 *b, bf16 *a_out, bf16 *b_out, int64_t rank, int64_t k, int64_t n) {
    const int64_t pairs = divide_up(rank, 2);
    memcpy(a_out, a, (size_t)(rank * k) * sizeof(bf16));
    if (rank & 1) memset(a_out + rank * k, 0, (size_t)k * sizeof(bf16));
    const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)rank));
    for (int64_t column = 0; column < n; column += 16, b_out += (column / 16 & 1) ? 32 : pairs * 64 - 32) {
        const __mmask16 valid = n - column >= 16 ? 0xffff : (__mmask16)((1 << (n - column)) - 1);
        for (int64_t pair = 0; pair < pairs; pair++) {
            // an odd rank's last pair must not read the next row (or past the end of b): it takes single values below
            const bf16 *source = b + column * rank + 2 * pair;
            if (2 * pair + 1 < rank) {
                const __m512i zero = _mm512_setzero_si512();
                _mm512_storeu_si512(b_out + pair * 64, _mm512_mask_i32gather_epi32(zero, valid, lanes, source, 2));
            } else {
                for (int64_t i = 0; i < 16; i++) {
                    b_out[pair * 64 + 2 * i] = column + i < n ? source[i * rank] : 0;
                    b_out[pair * 64 + 2 * i + 1] = 0;
                }
            }
        }
    }
    if (divide_up(n, 16) & 1)  // the second half of the last block
        for (int64_t pair = 0; pair < pairs; pair++) memset(b_out + pair * 64, 0, 64);
}
