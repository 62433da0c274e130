/* Products of sixteen rows of packed weights with a few rows of activations.

   Quantized weights lie in layout "lanes16" (convert/layouts/lanes16.py): a word has four neighbouring bytes of a
   row, and sixteen rows lie side by side. Floats lie in rows. Each result is computed in one order, whatever
   the number of activation rows beside it. */
#pragma once
#include "activations.h"

/* ggml's numbers of the types. */
enum { F32 = 0, F16 = 1, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };
enum { MAX_ARRAYS = 6 };

/* One matrix: rows from `first` on of a stack of K columns. The arrays are in the order of operands.py:
   Q4_K q scales mins d dmin; Q5_K the same and qh; Q6_K ql qh scales d; Q8_0 q d; floats w. */
typedef struct {
  int type;
  int rows, columns;
  int64_t first;
  const void *array[MAX_ARRAYS];
} Matrix;

INLINE int is_float(int type) { return type == F32 || type == F16 || type == BF16; }

/* Rows of activations in both forms: floats for float weights, blocks for quantized ones. */
typedef struct {
  const float *values; /* [rows, columns] */
  const Block *blocks; /* [rows, blocks_of(columns)] */
  int columns;
} Activations;

typedef struct {
  const uint32_t *q, *qh, *scales, *mins;
  const uint16_t *d, *dmin;
} Tile;

INLINE Tile tile_of(const Matrix *m, int64_t tile, const int type) {
  int64_t k = m->columns;
  const uint32_t *const *words = (const uint32_t *const *)m->array;
  const uint16_t *const *halfs = (const uint16_t *const *)m->array;
#define WORDS(i, weights_per_word) (words[i] + tile * (k / (weights_per_word)) * LANES)
#define HALFS(i, weights_per_half) (halfs[i] + tile * (k / (weights_per_half)) * LANES)
  switch (type) {
    case Q4_K:
      return (Tile){.q = WORDS(0, 8), .scales = WORDS(1, 128), .mins = WORDS(2, 128), .d = HALFS(3, 256),
                    .dmin = HALFS(4, 256)};
    case Q5_K:
      return (Tile){.q = WORDS(0, 8), .scales = WORDS(1, 128), .mins = WORDS(2, 128), .d = HALFS(3, 256),
                    .dmin = HALFS(4, 256), .qh = WORDS(5, 32)};
    case Q6_K:
      return (Tile){.q = WORDS(0, 8), .qh = WORDS(1, 16), .scales = WORDS(2, 64), .d = HALFS(3, 256)};
    default:
      return (Tile){.q = WORDS(0, 4), .d = HALFS(1, 32)};
  }
#undef WORDS
#undef HALFS
}

/* Word `w` of the 32 columns of group `g` in superblock `b`: four unsigned quants of each row. */
INLINE vu quants(const Tile *t, const int type, int b, int g, int w) {
#define AT(words, index) load_words((words) + (size_t)(index) * LANES)
  switch (type) {
    case Q4_K: return (AT(t->q, b * 32 + (g >> 1) * 8 + w) >> (4 * (g & 1))) & 0x0f0f0f0fu;
    case Q5_K:
      return ((AT(t->q, b * 32 + (g >> 1) * 8 + w) >> (4 * (g & 1))) & 0x0f0f0f0fu) |
             (((AT(t->qh, b * 8 + w) >> g) & 0x01010101u) << 4);
    case Q6_K: {
      int half = g >> 2, set = g & 3; /* 128 columns: four sets of 32 */
      return ((AT(t->q, b * 32 + half * 16 + (set & 1) * 8 + w) >> (4 * (set >> 1))) & 0x0f0f0f0fu) |
             (((AT(t->qh, b * 16 + half * 8 + w) >> (2 * set)) & 0x03030303u) << 4);
    }
    default: return AT(t->q, b * 64 + g * 8 + w);
  }
}

INLINE vf unsigned_byte(vu words, int index) { return to_float((vi)((words >> (8 * index)) & 255u)); }
INLINE vf signed_byte(vu words, int index) { return to_float((vi)(words << (24 - 8 * index)) >> 24); }

/* Adds to s1 what the columns of group `g` give, words `from` to `to` of its eight, times their scale. */
INLINE void add_group(const Tile *t, const int type, int b, int g, const int from, const int to,
                      const Block *const *x, const int R, vf scale, vf *RESTRICT s1) {
  vi high[8], low[8];
  for (int r = 0; r < R; r++) high[r] = low[r] = (vi){};
  UNROLL(8) for (int w = from; w < to; w++) {
    vu word = quants(t, type, b, g, w);
    UNROLL(8) for (int r = 0; r < R; r++) {
      int32_t h = word_at(x[r][b].high + 32 * g + 4 * w), l = word_at(x[r][b].low + 32 * g + 4 * w);
      high[r] = type == Q8_0 ? dot4_signed(high[r], word, h) : dot4(high[r], word, h);
      low[r] = type == Q8_0 ? dot4_signed(low[r], word, l) : dot4(low[r], word, l);
    }
  }
  UNROLL(8) for (int r = 0; r < R; r++) {
    vi whole = (high[r] << 7) + low[r];
    const int32_t *sums = x[r][b].sum16 + 2 * g;
    if (type == Q6_K) whole -= 32 * (to <= 4 ? sums[0] : sums[1]);
    if (type == Q8_0) whole -= SIGNED_OFFSET * (sums[0] + sums[1]);
    s1[r] += to_float(whole) * scale;
  }
}

INLINE void tile_of_quants(const Matrix *m, int64_t tile, const int type, const Block *const *x, const int R,
                           vf *RESTRICT out) {
  Tile t = tile_of(m, tile, type);
  for (int r = 0; r < R; r++) out[r] = splat(0.0f);
  for (int b = 0; b < blocks_of(m->columns); b++) {
    int groups = MIN(8, (m->columns - b * BLOCK) / 32);
    vf s1[8];
    for (int r = 0; r < R; r++) s1[r] = splat(0.0f);
    if (type == Q8_0) {
      for (int g = 0; g < groups; g++)
        add_group(&t, type, b, g, 0, 8, x, R, load_half(t.d + (b * 8 + g) * LANES), s1);
      for (int r = 0; r < R; r++) out[r] += s1[r] * x[r][b].scale;
      continue;
    }
    UNROLL(1) for (int g = 0; g < 8; g++) {
      if (type == Q6_K) {
        vu scales = AT(t.scales, b * 4 + (g >> 1));
        add_group(&t, type, b, g, 0, 4, x, R, signed_byte(scales, 2 * (g & 1)), s1);
        add_group(&t, type, b, g, 4, 8, x, R, signed_byte(scales, 2 * (g & 1) + 1), s1);
      } else {
        add_group(&t, type, b, g, 0, 8, x, R, unsigned_byte(AT(t.scales, b * 2 + (g >> 2)), g & 3), s1);
      }
    }
    vf d = load_half(t.d + b * LANES);
    if (type == Q6_K) {
      for (int r = 0; r < R; r++) out[r] += d * s1[r] * x[r][b].scale;
      continue;
    }
    vf s2[8];
    for (int r = 0; r < R; r++) s2[r] = splat(0.0f);
    UNROLL(8) for (int g = 0; g < 8; g++) {
      vf minimum = unsigned_byte(AT(t.mins, b * 2 + (g >> 2)), g & 3);
      UNROLL(8) for (int r = 0; r < R; r++) s2[r] += minimum * x[r][b].sum32[g];
    }
    vf dmin = load_half(t.dmin + b * LANES);
    for (int r = 0; r < R; r++) out[r] += (d * s1[r] - dmin * s2[r]) * x[r][b].scale;
  }
}
#undef AT

INLINE vf load_weights(const Matrix *m, const int type, int64_t index) {
  if (type == F32) return load((const float *)m->array[0] + index);
  const uint16_t *halfs = (const uint16_t *)m->array[0] + index;
  return type == F16 ? load_half(halfs) : load_bfloat(halfs);
}

INLINE float weight_at(const Matrix *m, const int type, int64_t index) {
  uint32_t bits;
  float value;
  if (type == F32) return ((const float *)m->array[0])[index];
  if (type == F16) {
    v16h one = {((const uint16_t *)m->array[0])[index]};
    return half_to_float(one)[0];
  }
  bits = (uint32_t)((const uint16_t *)m->array[0])[index] << 16;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* One row of float weights, from element `start` of the stack, times R rows of floats. */
INLINE void row_of_floats(const Matrix *m, int64_t start, const int type, const float *const *x, const int R,
                          float *RESTRICT out) {
  vf total[8];
  int k = m->columns, whole = k - k % LANES;
  for (int r = 0; r < R; r++) total[r] = splat(0.0f);
  for (int i = 0; i < whole; i += LANES) {
    vf w = load_weights(m, type, start + i);
    UNROLL(8) for (int r = 0; r < R; r++) total[r] += w * load(x[r] + i);
  }
  for (int r = 0; r < R; r++) {
    out[r] = sum(total[r]);
    for (int i = whole; i < k; i++) out[r] += weight_at(m, type, start + i) * x[r][i];
  }
}

#define OF_QUANTS(type, R)                                                                                  \
  static __attribute__((noinline)) void quants_##type##_##R(const Matrix *m, int64_t tile, const Block *const *x, \
                                                            vf *out) {                                      \
    tile_of_quants(m, tile, type, x, R, out);                                                               \
  }
#define OF_FLOATS(type, R)                                                                                  \
  static __attribute__((noinline)) void floats_##type##_##R(const Matrix *m, int64_t start, const float *const *x, \
                                                            float *out) {                                   \
    row_of_floats(m, start, type, x, R, out);                                                               \
  }
#define EACH_COUNT(define, type) define(type, 1) define(type, 2) define(type, 4) define(type, 8)
EACH_COUNT(OF_QUANTS, Q4_K)
EACH_COUNT(OF_QUANTS, Q5_K)
EACH_COUNT(OF_QUANTS, Q6_K)
EACH_COUNT(OF_QUANTS, Q8_0)
EACH_COUNT(OF_FLOATS, F32)
EACH_COUNT(OF_FLOATS, F16)
EACH_COUNT(OF_FLOATS, BF16)

typedef void (*quants_function)(const Matrix *, int64_t, const Block *const *, vf *);
typedef void (*floats_function)(const Matrix *, int64_t, const float *const *, float *);
#define COUNTS(kind, type) {kind##_##type##_1, kind##_##type##_2, kind##_##type##_4, kind##_##type##_8}
static const quants_function quants_functions[4][4] = {COUNTS(quants, Q4_K), COUNTS(quants, Q5_K),
                                                       COUNTS(quants, Q6_K), COUNTS(quants, Q8_0)};
static const floats_function floats_functions[3][4] = {COUNTS(floats, F32), COUNTS(floats, F16),
                                                       COUNTS(floats, BF16)};

INLINE int quants_index(int type) { return type == Q8_0 ? 3 : type - Q4_K; }
INLINE int floats_index(int type) { return type == BF16 ? 2 : type; }

/* How many rows the next call takes of `left`, as a power of two's exponent. */
INLINE int step_of(int left) { return left >= 8 ? 3 : left >= 4 ? 2 : left >= 2 ? 1 : 0; }

/* Sixteen rows of a matrix, from row 16 * tile on, times activation rows `row[0]` ... `row[count - 1]`: out
   [count] of sixteen lanes. Rows past the end of a float matrix give 0. */
static void tile_products(const Matrix *m, int tile, const Activations *x, const int *row, int count, vf *out) {
  for (int done = 0; done < count;) {
    int step = step_of(count - done), n = 1 << step;
    if (is_float(m->type)) {
      const float *values[8];
      float result[8], lanes[8][LANES] = {{0}};
      for (int r = 0; r < n; r++) values[r] = x->values + (int64_t)row[done + r] * x->columns;
      for (int lane = 0; lane < MIN(LANES, m->rows - LANES * tile); lane++) {
        int64_t start = (m->first + LANES * tile + lane) * m->columns;
        floats_functions[floats_index(m->type)][step](m, start, values, result);
        for (int r = 0; r < n; r++) lanes[r][lane] = result[r];
      }
      memcpy(out + done, lanes, sizeof(vf) * (size_t)n);
    } else {
      const Block *blocks[8];
      for (int r = 0; r < n; r++) blocks[r] = x->blocks + (int64_t)row[done + r] * blocks_of(x->columns);
      quants_functions[quants_index(m->type)][step](m, m->first / LANES + tile, blocks, out + done);
    }
    done += n;
  }
}
