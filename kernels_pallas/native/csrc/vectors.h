/* Sixteen 32-bit lanes as one value, whatever the processor's registers hold, and what differs from one
   instruction set to another: dot products of bytes, and float16. One library is compiled per form. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(FORM_AVX512) || defined(FORM_AVXVNNI) || defined(FORM_AVX2)
#include <immintrin.h>
#elif defined(FORM_NEON)
#include <arm_neon.h>
#else
#error "name a form: FORM_AVX512, FORM_AVXVNNI, FORM_AVX2 or FORM_NEON"
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT __restrict__
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define UNROLL(n) PRAGMA(clang loop unroll_count(n))
#else
#define UNROLL(n) PRAGMA(GCC unroll n)
#endif

typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float vf __attribute__((vector_size(64)));
typedef vi vi_unaligned __attribute__((aligned(4)));
typedef vu vu_unaligned __attribute__((aligned(4)));
typedef vf vf_unaligned __attribute__((aligned(4)));
typedef int8_t v16b __attribute__((vector_size(16)));
typedef uint16_t v16h __attribute__((vector_size(32)));
typedef v16h v16h_unaligned __attribute__((aligned(2)));

INLINE vu load_words(const void *p) { return *(const vu_unaligned *)p; }
INLINE vf load(const float *p) { return *(const vf_unaligned *)p; }
INLINE void store(float *p, vf v) { *(vf_unaligned *)p = v; }
INLINE vf splat(float x) { return (vf){} + x; }
INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
INLINE vi to_int(vf v) { return __builtin_convertvector(v, vi); }
INLINE vi as_int(vf v) { return (vi)v; }
INLINE vf as_float(vi v) { return (vf)v; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf vmax(vf a, vf b) { return choose(a > b, a, b); }
INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

/* The lanes' sum, in one order for every form. */
INLINE float sum(vf v) {
  float lane[LANES];
  memcpy(lane, &v, sizeof v);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) lane[i] += lane[i + n];
  return lane[0];
}
INLINE float largest(vf v) {
  float lane[LANES];
  memcpy(lane, &v, sizeof v);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
  return lane[0];
}

INLINE int32_t word_at(const int8_t *p) {
  int32_t w;
  memcpy(&w, p, 4);
  return w;
}

#if defined(FORM_AVX512)
/* acc + sums of four products in each lane: bytes of w unsigned, the four of x (the same in all lanes) signed. */
INLINE vi dot4(vi acc, vu w, int32_t x) {
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
}
#define SIGNED_OFFSET 128 /* added to each signed byte of w by dot4_signed */
INLINE vi dot4_signed(vi acc, vu w, int32_t x) { return dot4(acc, w ^ 0x80808080u, x); }
INLINE vf half_to_float(v16h h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
/* Of each byte below 16 the value in its place. */
INLINE vu look_up(const int8_t *values, vu bytes) {
  return (vu)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)values)), (__m512i)bytes);
}
#elif defined(FORM_AVXVNNI) || defined(FORM_AVX2)
typedef struct { __m256i part[2]; } pair;
INLINE pair halves(vi v) { pair p; memcpy(&p, &v, sizeof p); return p; }
INLINE vi joined(pair p) { vi v; memcpy(&v, &p, sizeof v); return v; }
#ifdef FORM_AVXVNNI
INLINE __m256i dot4_256(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
#else
/* Sums of two products fit 16 bits: w is below 64 here, and at most 128 in dot4_signed. */
INLINE __m256i dot4_256(__m256i acc, __m256i w, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
#endif
INLINE vi dot4(vi acc, vu w, int32_t x) {
  pair a = halves(acc), b = halves((vi)w);
  for (int i = 0; i < 2; i++) a.part[i] = dot4_256(a.part[i], b.part[i], _mm256_set1_epi32(x));
  return joined(a);
}
#ifdef FORM_AVXVNNI
#define SIGNED_OFFSET 128
INLINE vi dot4_signed(vi acc, vu w, int32_t x) { return dot4(acc, w ^ 0x80808080u, x); }
#else
#define SIGNED_OFFSET 0
INLINE vi dot4_signed(vi acc, vu w, int32_t x) {
  pair a = halves(acc), b = halves((vi)w);
  for (int i = 0; i < 2; i++) {
    __m256i signed_x = _mm256_sign_epi8(_mm256_set1_epi32(x), b.part[i]);
    a.part[i] = dot4_256(a.part[i], _mm256_abs_epi8(b.part[i]), signed_x);
  }
  return joined(a);
}
#endif
INLINE vf half_to_float(v16h h) {
  __m128i part[2];
  __m256 wide[2];
  vf v;
  memcpy(part, &h, sizeof part);
  for (int i = 0; i < 2; i++) wide[i] = _mm256_cvtph_ps(part[i]);
  memcpy(&v, wide, sizeof v);
  return v;
}
INLINE vu look_up(const int8_t *values, vu bytes) {
  __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)values));
  pair p = halves((vi)bytes);
  for (int i = 0; i < 2; i++) p.part[i] = _mm256_shuffle_epi8(table, p.part[i]);
  return (vu)joined(p);
}
#else
INLINE vi dot4(vi acc, vu w, int32_t x) {
  int32x4_t a[4];
  int8x16_t b[4];
  memcpy(a, &acc, sizeof a);
  memcpy(b, &w, sizeof b);
  for (int i = 0; i < 4; i++) a[i] = vdotq_s32(a[i], b[i], vreinterpretq_s8_s32(vdupq_n_s32(x)));
  memcpy(&acc, a, sizeof a);
  return acc;
}
#define SIGNED_OFFSET 0
INLINE vi dot4_signed(vi acc, vu w, int32_t x) { return dot4(acc, w, x); }
INLINE vf half_to_float(v16h h) {
  float16x4_t part[4];
  float32x4_t wide[4];
  vf v;
  memcpy(part, &h, sizeof part);
  for (int i = 0; i < 4; i++) wide[i] = vcvt_f32_f16(part[i]);
  memcpy(&v, wide, sizeof v);
  return v;
}
INLINE vu look_up(const int8_t *values, vu bytes) {
  int8x16_t table = vld1q_s8(values);
  uint8x16_t part[4];
  memcpy(part, &bytes, sizeof part);
  for (int i = 0; i < 4; i++) part[i] = vreinterpretq_u8_s8(vqtbl1q_s8(table, part[i]));
  memcpy(&bytes, part, sizeof part);
  return bytes;
}
#endif

INLINE vf load_half(const uint16_t *p) { return half_to_float(*(const v16h_unaligned *)p); }
INLINE vf load_bfloat(const uint16_t *p) {
  return (vf)(__builtin_convertvector(*(const v16h_unaligned *)p, vu) << 16);
}

/* e to the power of each lane, within 2 units in the last place; below -87.3 it is 0. (Cephes' expf.) */
INLINE vf vexp(vf x) {
  vi tiny = x < -87.3f;
  x = choose(x > 88.7f, splat(88.7f), x);
  x = choose(tiny, splat(0.0f), x);
  const float magic = 12582912.0f; /* adding it rounds to the nearest whole number */
  vf n = (x * 1.44269504f + magic) - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vf scaled = p * as_float((to_int(n) + 127) << 23);
  return choose(tiny, splat(0.0f), scaled);
}
