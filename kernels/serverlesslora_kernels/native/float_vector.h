// Sixteen floats at a time: loads and stores of float32 and bfloat16, exp2 and tanh accurate to about one unit in the
// last place. Everything propagates NaN, because the engine detects a broken request by its non-finite logits.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define ALWAYS_INLINE static inline __attribute__((always_inline))

static const float LOG2E = 1.44269504088896340736f;

ALWAYS_INLINE __m512 vector_round(__m512 x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

ALWAYS_INLINE __m512 bf16_to_float(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Round to nearest even as torch does; vcvtneps2bf16 would flush denormals.
ALWAYS_INLINE __m256i float_to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

ALWAYS_INLINE __m512 round_to_bf16(__m512 value) { return bf16_to_float(float_to_bf16(value)); }

ALWAYS_INLINE __mmask16 first_lanes(long count) {
  return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

ALWAYS_INLINE __m512 load_lanes(const void *data, long index, __mmask16 mask, int bf16) {
  if (bf16) return bf16_to_float(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)data + index));
  return _mm512_maskz_loadu_ps(mask, (const float *)data + index);
}

ALWAYS_INLINE void store_lanes(void *data, long index, __mmask16 mask, __m512 value, int bf16) {
  if (bf16)
    _mm256_mask_storeu_epi16((uint16_t *)data + index, mask, float_to_bf16(value));
  else
    _mm512_mask_storeu_ps((float *)data + index, mask, value);
}

// 2^f on [-1/2, 1/2] by the Taylor series of e^(f ln 2), up to the first term below float resolution.
ALWAYS_INLINE __m512 vector_exp2(__m512 x) {
  const __m512 whole = vector_round(x);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.52527338040598e-5f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.54035303933816e-4f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33335581464284e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812910762848e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041086648216e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226506959101e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147180559945e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// e^x; ln 2 comes in two parts because whole * ln 2 rounded once would cost six bits for x near 80.
ALWAYS_INLINE __m512 vector_exp(__m512 x) {
  const __m512 whole = vector_round(_mm512_mul_ps(x, _mm512_set1_ps(LOG2E)));
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.98412698e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.38888889e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.33333333e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16666667e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.66666667e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// Near zero 1 - 2 / (1 + e^2x) cancels, so small arguments take an odd minimax polynomial.
ALWAYS_INLINE __m512 vector_tanh(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 magnitude = _mm512_abs_ps(x);
  const __m512 e = vector_exp(_mm512_min_ps(_mm512_set1_ps(40.0f), _mm512_add_ps(magnitude, magnitude)));
  const __m512 far = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, e)));
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  const __m512 z = _mm512_mul_ps(x, x);
  __m512 p = _mm512_set1_ps(-5.70498872745e-3f);
  p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(2.06390887954e-2f));
  p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-5.37397155531e-2f));
  p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(1.33314422036e-1f));
  p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-3.33332819422e-1f));
  const __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(p, z), x, x);
  const __mmask16 is_near = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(_mm512_or_ps(far, sign), is_near, near);
}
