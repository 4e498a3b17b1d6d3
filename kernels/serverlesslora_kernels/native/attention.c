// Paged attention for packed batches, decode rows and prefill chunks alike.
//
//   out[r] = sum_j softmax_j(cap(scale q[r] . k[j])) v[j],   j in (p - window, p],  p the position of row r
//
// The cache is stored the way the inner loops read it, in units of four bytes: one float, or two bfloat16 as
// vdpbf16ps takes them ("pair" = values per unit).
//
//   K block [kv_heads, dim / pair, block_size, pair]   one load = one unit of depth for 16 keys: scores of 16 keys
//                                                      grow in one register and need no horizontal sum
//   V block [kv_heads, block_size / pair, dim, pair]   one load = 16 output columns for one unit of keys
//
// A work item is up to MAX_ROWS query rows that share a KV head (tokens x the heads of its group), so one load of K or
// V serves all of them. Items that read long contexts are cut into parts whose unnormalised results are merged.

#include <stdlib.h>

#include "float_vector.h"

#define MAX_ROWS 14
#define MAX_DIM 512
#define TILE_KEYS 128
#define TILE_GROUPS (TILE_KEYS / 8)  // blocks of 8 keys are groups of 8, all others groups of 16
// Few rows leave registers free: several key groups or columns at once hide the latency of the multiply-add.
#define MAX_AT_ONCE 4
#define GROUPS_AT_ONCE(M) ((M) <= 3 ? MAX_AT_ONCE : (M) <= 7 ? 2 : 1)
#define UNROLL _Pragma("GCC unroll 16")

static const float NO_SCORE = -1e30f;  // finite, so that differences of two of them are no NaN

struct layer {
  char *out;
  const char *q, *k_cache, *v_cache;
  const int32_t *q_start, *context, *table;
  const float *sinks;
  long num_seqs, table_stride, q_heads, kv_heads, group, k_dim, v_dim, block_size, q_token_stride, q_head_stride;
  float scale, softcap;
  long window, lanes;  // lanes: keys in one score vector
  int bf16;
};

struct item {
  int32_t seq, head, row, rows;  // rows count (token, head of the group), heads fastest
  int32_t first_key, last_key;   // [first, last)
  int32_t parts, part;           // this item is part `part` of `parts`
  int32_t slot;                  // where its partial result goes when parts > 1
};

// Unnormalised result of some rows over some keys: the highest score, sum of 2^(s - high), sum of 2^(s - high) v.
struct partial {
  float high[LANES], sum[LANES];
  float value[MAX_ROWS * MAX_DIM];  // row stride: v_dim rounded up to whole registers
};

ALWAYS_INLINE long whole_registers(long columns) { return (columns + LANES - 1) / LANES * LANES; }

ALWAYS_INLINE __m512 broadcast_unit(const char *unit) {
  int32_t bits;
  memcpy(&bits, unit, 4);
  return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
}

ALWAYS_INLINE __m512 multiply_add(__m512 sum, __m512 a, __m512 b, int bf16) {
  if (!bf16) return _mm512_fmadd_ps(a, b, sum);
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const __m512 high = _mm512_castsi512_ps(_mm512_set1_epi32((int)0xffff0000));
  const __m512i even_a = _mm512_slli_epi32(_mm512_castps_si512(a), 16);
  const __m512i even_b = _mm512_slli_epi32(_mm512_castps_si512(b), 16);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(even_a), _mm512_castsi512_ps(even_b), sum);
  return _mm512_fmadd_ps(_mm512_and_ps(a, high), _mm512_and_ps(b, high), sum);
#endif
}

// scores[m][group of keys] = q[m] . k for M rows and N groups. Registers: M * N sums, N of K. Blocks lie anywhere,
// which the hardware cannot foresee: scoring fetches this tile's values ahead, weighing the next tile's keys, so that
// memory is busy in both.
ALWAYS_INLINE void score_groups(const char *const *q, const char *const *k, const char *const *v, long k_stride,
                                long units, float *scores, long lanes, const int M, const int N, const int bf16) {
  __m512 sum[MAX_ROWS];
  UNROLL for (int i = 0; i < M * N; i++) sum[i] = _mm512_setzero_ps();
  for (long u = 0; u < units; u++) {
    __m512 keys[MAX_AT_ONCE];
    UNROLL for (int n = 0; n < N; n++) {
      keys[n] = _mm512_loadu_ps(k[n] + u * k_stride);
      _mm_prefetch(v[n] + u * 64, _MM_HINT_T0);
    }
    UNROLL for (int m = 0; m < M; m++) {
      const __m512 query = broadcast_unit(q[m] + u * 4);
      UNROLL for (int n = 0; n < N; n++) sum[m * N + n] = multiply_add(sum[m * N + n], query, keys[n], bf16);
    }
  }
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int n = 0; n < N; n++) _mm512_storeu_ps(scores + m * (TILE_KEYS + LANES) + n * lanes, sum[m * N + n]);
  }
}

// value[m][16 N columns] = decay[m] value[m] + sum over the tile's units of p[m] v
ALWAYS_INLINE void weigh_columns(const char *p, const char *const *v, const char *const *next_k, long k_stride,
                                 long first_unit, long last_unit, long units_per_group, long v_stride, long column,
                                 const float *decay, float *value, long value_stride, const int M, const int N,
                                 const int bf16) {
  __m512 sum[MAX_ROWS];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int n = 0; n < N; n++) {
      sum[m * N + n] = _mm512_mul_ps(_mm512_loadu_ps(value + m * value_stride + n * LANES), _mm512_set1_ps(decay[m]));
    }
  }
  const long p_stride = TILE_KEYS * (bf16 ? 2 : 4);
  for (long unit = first_unit; unit < last_unit;) {
    const long group = unit / units_per_group;
    const long end = (group + 1) * units_per_group < last_unit ? (group + 1) * units_per_group : last_unit;
    const char *values = v[group] + (unit - group * units_per_group) * v_stride + column * 4;
    long line = (unit - group * units_per_group) * (v_stride / 64) + column / LANES;
    for (; unit < end; unit++, values += v_stride, line += v_stride / 64) {
      __m512 row[MAX_AT_ONCE];
      UNROLL for (int n = 0; n < N; n++) {
        row[n] = _mm512_loadu_ps(values + n * 64);
        _mm_prefetch(next_k[group] + (line + n) * k_stride, _MM_HINT_T0);
      }
      UNROLL for (int m = 0; m < M; m++) {
        const __m512 weight = broadcast_unit(p + m * p_stride + unit * 4);
        UNROLL for (int n = 0; n < N; n++) sum[m * N + n] = multiply_add(sum[m * N + n], weight, row[n], bf16);
      }
    }
  }
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int n = 0; n < N; n++) _mm512_storeu_ps(value + m * value_stride + n * LANES, sum[m * N + n]);
  }
}

ALWAYS_INLINE void score_tile(const char *const *q, const char *const *k, const char *const *v, long groups,
                              long k_stride, long units, float *scores, long lanes, const int M, const int bf16) {
  const int N = GROUPS_AT_ONCE(M);
  for (long g = 0; g < groups; g += N)
    score_groups(q, k + g, v + g, k_stride, units, scores + g * lanes, lanes, M, N, bf16);
}

ALWAYS_INLINE void weigh_tile(const char *p, const char *const *v, const char *const *next_k, long k_stride,
                              long first_unit, long last_unit, long units_per_group, long v_stride, long v_dim,
                              const float *decay, float *value, const int M, const int bf16) {
  const int N = GROUPS_AT_ONCE(M);
  const long stride = whole_registers(v_dim);
  long column = 0;
  for (; column + N * LANES <= v_dim; column += N * LANES)
    weigh_columns(p, v, next_k, k_stride, first_unit, last_unit, units_per_group, v_stride, column, decay,
                  value + column, stride, M, N, bf16);
  for (; column < v_dim; column += LANES)
    weigh_columns(p, v, next_k, k_stride, first_unit, last_unit, units_per_group, v_stride, column, decay,
                  value + column, stride, M, 1, bf16);
}

#define FOR_EACH_ROW_COUNT(DO) \
  DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14)

#define DEFINE(NAME, BF16)                                                                                            \
  static void score_##NAME(const char *const *q, const char *const *k, const char *const *v, long groups,             \
                           long k_stride, long units, float *scores, long lanes, long rows) {                         \
    switch (rows) { FOR_EACH_ROW_COUNT(SCORE_CASE_##BF16) }                                                           \
  }                                                                                                                   \
  static void weigh_##NAME(const char *p, const char *const *v, const char *const *next_k, long k_stride,             \
                           long first_unit, long last_unit, long per_group,                                           \
                           long v_stride, long v_dim, const float *decay, float *value, long rows) {                  \
    switch (rows) { FOR_EACH_ROW_COUNT(WEIGH_CASE_##BF16) }                                                           \
  }
#define SCORE_CASE(M, BF16) \
  case M: score_tile(q, k, v, groups, k_stride, units, scores, lanes, M, BF16); break;
#define WEIGH_CASE(M, BF16) \
  case M: \
    weigh_tile(p, v, next_k, k_stride, first_unit, last_unit, per_group, v_stride, v_dim, decay, value, M, BF16); \
    break;
#define SCORE_CASE_0(M) SCORE_CASE(M, 0)
#define SCORE_CASE_1(M) SCORE_CASE(M, 1)
#define WEIGH_CASE_0(M) WEIGH_CASE(M, 0)
#define WEIGH_CASE_1(M) WEIGH_CASE(M, 1)
DEFINE(float, 0)
DEFINE(bf16, 1)

// Scales and caps one row of raw scores in place, hides keys outside [first, last), returns the highest.
ALWAYS_INLINE float mask_row(const struct layer *at, float *scores, long keys, long first, long last) {
  const __m512 scale = _mm512_set1_ps(at->softcap > 0 ? at->scale / at->softcap : at->scale * LOG2E);
  const __m512 cap = _mm512_set1_ps(at->softcap * LOG2E), none = _mm512_set1_ps(NO_SCORE);
  __m512 highest = none;
  for (long j = 0; j < keys; j += LANES) {
    const __mmask16 valid = first_lanes(last - j) & (__mmask16)~first_lanes(first - j);
    __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + j), scale);
    if (at->softcap > 0) s = _mm512_mul_ps(vector_tanh(s), cap);
    s = _mm512_mask_mov_ps(none, valid, s);
    _mm512_storeu_ps(scores + j, s);
    highest = _mm512_max_ps(highest, s);
  }
  return _mm512_reduce_max_ps(highest);
}

// Writes the weights 2^(s - high) of one row and returns their sum.
ALWAYS_INLINE float weigh_row(const float *scores, char *weights, long keys, long first, long last, float high,
                              int bf16) {
  __m512 total = _mm512_setzero_ps();
  for (long j = 0; j < keys; j += LANES) {
    const __mmask16 valid = first_lanes(last - j) & (__mmask16)~first_lanes(first - j);
    const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(high));
    const __m512 weight = _mm512_maskz_mov_ps(valid, vector_exp2(shifted));
    total = _mm512_add_ps(total, weight);
    if (!bf16)
      _mm512_storeu_ps((float *)weights + j, weight);
    else
#ifdef __AVX512BF16__
      _mm256_storeu_si256((__m256i *)((uint16_t *)weights + j), (__m256i)_mm512_cvtneps_pbh(weight));
#else
      _mm256_storeu_si256((__m256i *)((uint16_t *)weights + j), float_to_bf16(weight));
#endif
  }
  return _mm512_reduce_add_ps(total);
}

// Turns the tile's raw scores into weights, updates highs and sums, and says how much each earlier result shrinks.
static void soften_tile(const struct layer *at, const struct item *item, const long *position, float *scores,
                        char *weights, long base, long keys, struct partial *result, float *decay) {
  float high[LANES] = {0}, sum[LANES] = {0};
  for (long m = 0; m < item->rows; m++) {
    long first = at->window ? position[m] + 1 - at->window : 0, last = position[m] + 1;
    if (first < item->first_key) first = item->first_key;
    if (last > item->last_key) last = item->last_key;
    float *row = scores + m * (TILE_KEYS + LANES);
    const float tile_high = mask_row(at, row, keys, first - base, last - base);
    high[m] = tile_high > result->high[m] ? tile_high : result->high[m];
    sum[m] = weigh_row(row, weights + m * TILE_KEYS * (at->bf16 ? 2 : 4), keys, first - base, last - base, high[m],
                       at->bf16);
  }
  const __m512 new_high = _mm512_loadu_ps(high);
  const __m512 shrink = vector_exp2(_mm512_sub_ps(_mm512_loadu_ps(result->high), new_high));
  _mm512_storeu_ps(decay, shrink);
  _mm512_storeu_ps(result->sum, _mm512_fmadd_ps(_mm512_loadu_ps(result->sum), shrink, _mm512_loadu_ps(sum)));
  _mm512_storeu_ps(result->high, new_high);
}

static void attend(const struct layer *at, const struct item *item, struct partial *result) {
  const long element = at->bf16 ? 2 : 4, pair = at->bf16 ? 2 : 1;
  const long first_row = at->q_start[item->seq], tokens = at->q_start[item->seq + 1] - first_row;
  const long start_position = at->context[item->seq] - tokens;
  const long lanes = at->lanes, units_per_group = lanes / pair;
  const long k_stride = at->block_size * 4, v_stride = at->v_dim * 4;
  const long k_head = at->k_dim * at->block_size * element, v_head = at->v_dim * at->block_size * element;
  const int32_t *blocks = at->table + item->seq * at->table_stride;
  const char *q[MAX_ROWS], *k[2 * TILE_GROUPS + MAX_AT_ONCE], *v[2 * TILE_GROUPS + MAX_AT_ONCE];
  float scores[MAX_ROWS * (TILE_KEYS + LANES)], decay[LANES];
  char weights[MAX_ROWS * TILE_KEYS * 4] __attribute__((aligned(64)));
  long position[MAX_ROWS];

  for (long m = 0; m < item->rows; m++) {
    const long row = item->row + m, token = row / at->group, head = item->head * at->group + row % at->group;
    q[m] = at->q + ((first_row + token) * at->q_token_stride + head * at->q_head_stride) * element;
    position[m] = start_position + token;
  }
  _mm512_storeu_ps(result->high, _mm512_set1_ps(NO_SCORE));
  _mm512_storeu_ps(result->sum, _mm512_setzero_ps());
  memset(result->value, 0, (size_t)(item->rows * whole_registers(at->v_dim) * 4));
  for (long base = item->first_key / lanes * lanes; base < item->last_key; base += TILE_KEYS) {
    const long keys = item->last_key - base < TILE_KEYS ? item->last_key - base : TILE_KEYS;
    const long groups = (keys + lanes - 1) / lanes, groups_left = (item->last_key - base + lanes - 1) / lanes;
    for (long g = 0; g < 2 * groups + MAX_AT_ONCE; g++) {  // those past the tile are fetched ahead or scored in vain
      const long key = base + (g < groups_left ? g : groups_left - 1) * lanes, offset = key % at->block_size;
      const long block = blocks[key / at->block_size] * at->kv_heads + item->head;
      k[g] = at->k_cache + block * k_head + offset * 4;
      v[g] = at->v_cache + block * v_head + offset * at->v_dim * element;
    }
    if (at->bf16)
      score_bf16(q, k, v, groups, k_stride, at->k_dim / pair, scores, lanes, item->rows);
    else
      score_float(q, k, v, groups, k_stride, at->k_dim / pair, scores, lanes, item->rows);
    soften_tile(at, item, position, scores, weights, base, keys, result, decay);
    const long first_unit = item->first_key > base ? (item->first_key - base) / pair : 0;
    const long last_unit = (keys + pair - 1) / pair;
    if (at->bf16)
      weigh_bf16(weights, v, k + groups, k_stride, first_unit, last_unit, units_per_group, v_stride, at->v_dim, decay,
                 result->value, item->rows);
    else
      weigh_float(weights, v, k + groups, k_stride, first_unit, last_unit, units_per_group, v_stride, at->v_dim, decay,
                  result->value, item->rows);
  }
}

// Merges the parts (one of them, usually), adds the sink to the denominator, divides and writes the output rows.
static void finish(const struct layer *at, const struct item *item, const struct partial *parts) {
  const long element = at->bf16 ? 2 : 4;
  for (long m = 0; m < item->rows; m++) {
    const long row = item->row + m, head = item->head * at->group + row % at->group;
    const float sink = at->sinks ? at->sinks[head] * LOG2E : NO_SCORE;
    float high = sink, factors[item->parts];
    for (long i = 0; i < item->parts; i++) high = parts[i].high[m] > high ? parts[i].high[m] : high;
    float sum = at->sinks ? __builtin_exp2f(sink - high) : 0;
    for (long i = 0; i < item->parts; i++) {
      factors[i] = __builtin_exp2f(parts[i].high[m] - high);
      sum += parts[i].sum[m] * factors[i];
    }
    for (long i = 0; i < item->parts; i++) factors[i] /= sum;
    char *out = at->out + ((at->q_start[item->seq] + row / at->group) * at->q_heads + head) * at->v_dim * element;
    for (long column = 0; column < at->v_dim; column += LANES) {
      __m512 total = _mm512_setzero_ps();
      const long from = m * whole_registers(at->v_dim) + column;
      for (long i = 0; i < item->parts; i++)
        total = _mm512_fmadd_ps(_mm512_loadu_ps(parts[i].value + from), _mm512_set1_ps(factors[i]), total);
      store_lanes(out, column, first_lanes(at->v_dim - column), total, at->bf16);
    }
  }
}

// Keys that some row of the item sees, before it is cut into parts.
static void set_key_range(const struct layer *at, struct item *item) {
  const long tokens = at->q_start[item->seq + 1] - at->q_start[item->seq];
  const long start = at->context[item->seq] - tokens;
  const long first_seen = start + item->row / at->group + 1 - at->window;
  item->first_key = at->window && first_seen > 0 ? (int32_t)first_seen : 0;
  item->last_key = (int32_t)(start + (item->row + item->rows - 1) / at->group + 1);
}

static long row_tiles(const struct layer *at, long seq) {
  return ((at->q_start[seq + 1] - at->q_start[seq]) * at->group + MAX_ROWS - 1) / MAX_ROWS;
}

// Cuts the batch into items of at most `part_keys` keys, long ones first within a sequence. Returns how many there are.
static long cut(const struct layer *at, long part_keys, struct item *items, long *num_slots) {
  long count = 0;
  *num_slots = 0;
  for (long seq = 0; seq < at->num_seqs; seq++) {
    const long rows = (at->q_start[seq + 1] - at->q_start[seq]) * at->group, tiles = row_tiles(at, seq);
    for (long tile = tiles - 1; tile >= 0; tile--) {
      for (long head = 0; head < at->kv_heads; head++) {
        struct item item = {.seq = (int32_t)seq, .head = (int32_t)head, .row = (int32_t)(rows * tile / tiles)};
        item.rows = (int32_t)(rows * (tile + 1) / tiles) - item.row;
        set_key_range(at, &item);
        const int32_t first = item.first_key, last = item.last_key;
        item.parts = (int32_t)((last - first + part_keys - 1) / part_keys);
        // Parts begin on a tile boundary, so that no two of them share a group of keys.
        const long step = ((last - first) / item.parts + TILE_KEYS) / TILE_KEYS * TILE_KEYS;
        item.parts = (int32_t)((last - first / TILE_KEYS * TILE_KEYS + step - 1) / step);
        for (item.part = 0; item.part < item.parts; item.part++) {
          const long from = first / TILE_KEYS * TILE_KEYS + item.part * step;
          item.first_key = from > first ? (int32_t)from : first;
          item.last_key = from + step < last ? (int32_t)(from + step) : last;
          item.slot = (int32_t)*num_slots;
          *num_slots += item.parts > 1;
          if (items) items[count] = item;
          count++;
        }
      }
    }
  }
  return count;
}

static void run_item(const struct layer *at, const struct item *item, struct partial *partials) {
  if (item->parts > 1) {
    attend(at, item, &partials[item->slot]);
  } else {
    struct partial result;
    attend(at, item, &result);
    finish(at, item, &result);
  }
}

// Returns 0, or -1 when there was no memory for the work list.
int paged_attention(void *out, const void *q, const void *k_cache, const void *v_cache, const int32_t *q_start,
                    const int32_t *context, const int32_t *table, const float *sinks, long num_seqs, long table_stride,
                    long q_heads, long kv_heads, long k_dim, long v_dim, long block_size, long q_token_stride,
                    long q_head_stride, long window, float scale, float softcap, int bf16, int threads) {
  const struct layer at = {out, q, k_cache, v_cache, q_start, context, table, sinks, num_seqs, table_stride, q_heads,
                           kv_heads, q_heads / kv_heads, k_dim, v_dim, block_size, q_token_stride, q_head_stride, scale,
                           softcap, window, block_size < LANES ? block_size : LANES, bf16};
  // Work in row-keys; a long item is cut when it alone is more than a fair share of what one thread should do.
  double work = 0;
  long tiles = 0;
  for (long seq = 0; seq < num_seqs; seq++) {
    const long seen = window && window < context[seq] ? window : context[seq];
    work += (double)seen * (double)(row_tiles(&at, seq) * kv_heads);
    tiles += row_tiles(&at, seq) * kv_heads;
  }
  // About five microseconds of one core: below that, waking the others costs more than it saves.
  if (work * (double)(k_dim + v_dim) < 60000) threads = 1;
  long part_keys = 1 << 30;
  if (threads > 1) {
    const double share = work / (2 * threads);
    part_keys = share < 2 * TILE_KEYS ? 2 * TILE_KEYS : share > part_keys ? part_keys : (long)share;
  }
  long num_slots;
  const long count = cut(&at, part_keys, NULL, &num_slots);
  struct item *items = malloc((size_t)count * sizeof *items + 1);
  struct partial *partials = num_slots ? malloc((size_t)num_slots * sizeof *partials) : NULL;
  if (!items || (num_slots && !partials)) {
    free(items);
    free(partials);
    return -1;
  }
  cut(&at, part_keys, items, &num_slots);
  if (threads > count) threads = (int)count;
  if (threads <= 1) {
    for (long i = 0; i < count; i++) run_item(&at, &items[i], partials);
  } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long i = 0; i < count; i++) run_item(&at, &items[i], partials);
  }
  for (long i = 0; i < count; i++)
    if (items[i].parts > 1 && items[i].part == 0) finish(&at, &items[i], &partials[items[i].slot]);
  free(partials);
  free(items);
  return 0;
}

// Puts new rows where `slots` says. Writing the first key of a unit clears its partner: weights of keys that do not
// exist are zero, and zero times what a freed block still holds must not be NaN.
static void write_head(void *k_cache, void *v_cache, const void *k, const void *v, const int64_t *slots, long tokens,
                       long head, long heads, long k_dim, long v_dim, long block_size, const long *strides, int bf16) {
  for (long t = 0; t < tokens; t++) {
    const long block = slots[t] / block_size * heads + head, offset = slots[t] % block_size;
    const long k_from = t * strides[0] + head * strides[1], v_from = t * strides[2] + head * strides[3];
    if (bf16) {
      uint32_t *keys = (uint32_t *)k_cache + block * (k_dim / 2) * block_size + offset;
      const char *key = (const char *)k + k_from * 2;
      for (long u = 0; u < k_dim / 2; u++) memcpy(keys + u * block_size, key + u * 4, 4);
      uint16_t *values = (uint16_t *)v_cache + block * block_size * v_dim + offset / 2 * v_dim * 2 + offset % 2;
      const uint16_t *value = (const uint16_t *)v + v_from;
      if (offset % 2)
        for (long d = 0; d < v_dim; d++) values[2 * d] = value[d];
      else
        for (long d = 0; d < v_dim; d++) {
          const uint32_t unit = value[d];
          memcpy(values + 2 * d, &unit, 4);
        }
    } else {
      float *keys = (float *)k_cache + block * k_dim * block_size + offset;
      const float *key = (const float *)k + k_from;
      for (long d = 0; d < k_dim; d++) keys[d * block_size] = key[d];
      memcpy((float *)v_cache + (block * block_size + offset) * v_dim, (const float *)v + v_from, (size_t)v_dim * 4);
    }
  }
}

void write_kv(void *k_cache, void *v_cache, const void *k, const void *v, const int64_t *slots, long tokens, long heads,
              long k_dim, long v_dim, long block_size, long k_token_stride, long k_head_stride, long v_token_stride,
              long v_head_stride, int bf16, int threads) {
  const long strides[4] = {k_token_stride, k_head_stride, v_token_stride, v_head_stride};
  if (tokens * heads * (k_dim + v_dim) < 20000) threads = 1;
  if (threads > heads) threads = (int)heads;  // a unit holds two tokens, so tokens are never divided among threads
  if (threads <= 1) {
    for (long head = 0; head < heads; head++)
      write_head(k_cache, v_cache, k, v, slots, tokens, head, heads, k_dim, v_dim, block_size, strides, bf16);
  } else {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long head = 0; head < heads; head++)
      write_head(k_cache, v_cache, k, v, slots, tokens, head, heads, k_dim, v_dim, block_size, strides, bf16);
  }
}
