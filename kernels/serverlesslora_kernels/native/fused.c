// What a decoder layer does between its matrix products, one pass each, with the rounding points of the torch modules
// they stand for: in bfloat16 every intermediate that those keep in a bfloat16 tensor is rounded here too.

#include "float_vector.h"

enum { ROUND_THEN_WEIGH = 0, WEIGH_PLUS_ONE = 1 };

static void norm_row(char *out, const char *x, const char *weight, long columns, float eps, int mode, int bf16) {
  __m512 squares[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (long c = 0, i = 0; c < columns; c += LANES, i = (i + 1) & 3) {
    const __m512 value = load_lanes(x, c, first_lanes(columns - c), bf16);
    squares[i] = _mm512_fmadd_ps(value, value, squares[i]);
  }
  const __m512 total = _mm512_add_ps(_mm512_add_ps(squares[0], squares[1]), _mm512_add_ps(squares[2], squares[3]));
  const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(total) / (float)columns + eps));
  for (long c = 0; c < columns; c += LANES) {
    const __mmask16 mask = first_lanes(columns - c);
    __m512 value = _mm512_mul_ps(load_lanes(x, c, mask, bf16), factor), w = load_lanes(weight, c, mask, bf16);
    if (mode == WEIGH_PLUS_ONE)
      w = _mm512_add_ps(w, _mm512_set1_ps(1.0f));
    else if (bf16)
      value = round_to_bf16(value);
    store_lanes(out, c, mask, _mm512_mul_ps(value, w), bf16);
  }
}

void rms_norm(char *out, const char *x, const char *weight, long rows, long columns, long x_stride, float eps, int mode,
              int bf16, int threads) {
  const long element = bf16 ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long r = 0; r < rows; r++) {
    const char *from = x + r * x_stride * element;
    char *to = out + r * columns * element;
    if (bf16)
      norm_row(to, from, weight, columns, eps, mode, 1);
    else
      norm_row(to, from, weight, columns, eps, mode, 0);
  }
}

ALWAYS_INLINE __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, vector_exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

ALWAYS_INLINE __m512 gelu_tanh(__m512 x) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 inner = _mm512_mul_ps(_mm512_set1_ps(0.7978845608028654f),
                                     _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x));
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5f), x),
                       _mm512_add_ps(_mm512_set1_ps(1.0f), vector_tanh(inner)));
}

ALWAYS_INLINE void gate_row(char *out, const char *gate, const char *up, long columns, const int gelu, const int bf16) {
  for (long c = 0; c < columns; c += LANES) {
    const __mmask16 mask = first_lanes(columns - c);
    const __m512 g = load_lanes(gate, c, mask, bf16), u = load_lanes(up, c, mask, bf16);
    __m512 active = gelu ? gelu_tanh(g) : silu(g);
    if (bf16) active = round_to_bf16(active);
    store_lanes(out, c, mask, _mm512_mul_ps(active, u), bf16);
  }
}

// out[r] = activation(x[r, :columns]) * x[r, columns:]
void gated_mul(char *out, const char *x, long rows, long columns, long x_stride, int gelu, int bf16, int threads) {
  const long element = bf16 ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long r = 0; r < rows; r++) {
    const char *gate = x + r * x_stride * element, *up = gate + columns * element;
    char *to = out + r * columns * element;
    if (gelu)
      bf16 ? gate_row(to, gate, up, columns, 1, 1) : gate_row(to, gate, up, columns, 1, 0);
    else
      bf16 ? gate_row(to, gate, up, columns, 0, 1) : gate_row(to, gate, up, columns, 0, 0);
  }
}

// out = x cos + rotate_half(x) sin over the first `rotary` columns; the rest passes through.
ALWAYS_INLINE void rotate_head(char *out, const char *x, const char *cos, const char *sin, long dim, long rotary,
                               const int bf16) {
  const long element = bf16 ? 2 : 4, half = rotary / 2;
  for (long c = 0; c < half; c += LANES) {
    const __mmask16 mask = first_lanes(half - c);
    const __m512 low = load_lanes(x, c, mask, bf16), high = load_lanes(x, half + c, mask, bf16);
    __m512 a = _mm512_mul_ps(low, load_lanes(cos, c, mask, bf16));
    __m512 b = _mm512_mul_ps(high, load_lanes(sin, c, mask, bf16));
    __m512 d = _mm512_mul_ps(high, load_lanes(cos, half + c, mask, bf16));
    __m512 e = _mm512_mul_ps(low, load_lanes(sin, half + c, mask, bf16));
    if (bf16) a = round_to_bf16(a), b = round_to_bf16(b), d = round_to_bf16(d), e = round_to_bf16(e);
    store_lanes(out, c, mask, _mm512_sub_ps(a, b), bf16);
    store_lanes(out, half + c, mask, _mm512_add_ps(d, e), bf16);
  }
  memcpy(out + rotary * element, x + rotary * element, (size_t)((dim - rotary) * element));
}

void rope(char *q_out, char *k_out, const char *q, const char *k, const char *cos, const char *sin, long tokens,
          long q_heads, long k_heads, long dim, long rotary, long q_token_stride, long q_head_stride,
          long k_token_stride, long k_head_stride, int bf16, int threads) {
  const long element = bf16 ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long t = 0; t < tokens; t++) {
    const char *c = cos + t * rotary * element, *s = sin + t * rotary * element;
    for (long h = 0; h < q_heads + k_heads; h++) {
      const int is_q = h < q_heads;
      const long head = is_q ? h : h - q_heads;
      const char *from = is_q ? q + (t * q_token_stride + head * q_head_stride) * element
                              : k + (t * k_token_stride + head * k_head_stride) * element;
      char *to = is_q ? q_out + (t * q_heads + head) * dim * element : k_out + (t * k_heads + head) * dim * element;
      if (bf16)
        rotate_head(to, from, c, s, dim, rotary, 1);
      else
        rotate_head(to, from, c, s, dim, rotary, 0);
    }
  }
}
