// bf16 building blocks shared by the kernels: dot products over the last axis with float32 accumulation.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

// acc[i] += a[2i]·b[2i] + a[2i+1]·b[2i+1] for 16 pairs. NaN and infinity propagate in both variants.
INLINE __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), acc);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), acc);
#endif
}

INLINE float bf16_to_float(bf16 value) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)((uint32_t)value << 16))));
}

// 16 floats -> 16 bf16, to nearest even; NaN stays NaN.
INLINE __m256i float_to_bf16(__m512 value) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(value);
#else
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(result);
#endif
}

INLINE __m512 bf16_widen(__m256i value) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16));
}

// Four accumulators -> their four sums.
INLINE __m128 sum_4(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d ab_d = _mm512_castps_pd(ab), cd_d = _mm512_castps_pd(cd);
    const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_d, cd_d)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab_d, cd_d)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Most rows and most outputs of a tile (arrays of fixed size stay in registers, variable ones do not), and
// TILE_ROWS · 4 or 3 · TILE_OUTPUTS accumulators leave room for the operands.
#define TILE_ROWS 6
#define TILE_OUTPUTS 8

// sums[i][j/4] lane j%4 = <x row i, w row j> for i < M, j < N. Every sum is accumulated over k in the same order whatever
// M and N are, so a row's result does not depend on its neighbours. `w_rows` are N row pointers. While it runs it prefetches
// the LINES · k weights that lie `ahead` elements after w_rows[0]; running out of the buffer is harmless.
INLINE void dot_tile(const int M, const int N, const int LINES, const bf16 *const *w_rows, const bf16 *x, int64_t ldx, int64_t k, int64_t ahead, __m128 sums[TILE_ROWS][TILE_OUTPUTS / 4]) {
    __m512 acc[TILE_ROWS][TILE_OUTPUTS];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) acc[i][j] = _mm512_setzero_ps();
    const int64_t whole = k & ~(int64_t)31;
    for (int64_t p = 0; p < whole; p += 32) {
        __m512i w[TILE_OUTPUTS];
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) w[j] = _mm512_loadu_si512(w_rows[j] + p);
        // in the order of the addresses: reading N rows side by side reaches half of the memory's speed without this
#pragma GCC unroll 16
        for (int j = 0; j < LINES; j++) _mm_prefetch((const char *)(w_rows[0] + ahead + LINES * p + 32 * j), _MM_HINT_T1);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const __m512i row = _mm512_loadu_si512(x + i * ldx + p);
#pragma GCC unroll 16
            for (int j = 0; j < N; j++) acc[i][j] = dot_pairs(acc[i][j], row, w[j]);
        }
    }
    if (whole < k) {
        const __mmask32 tail = (__mmask32)((1u << (k - whole)) - 1);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const __m512i row = _mm512_maskz_loadu_epi16(tail, x + i * ldx + whole);
#pragma GCC unroll 16
            for (int j = 0; j < N; j++) acc[i][j] = dot_pairs(acc[i][j], row, _mm512_maskz_loadu_epi16(tail, w_rows[j] + whole));
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j += 4) sums[i][j / 4] = sum_4(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]);
}
