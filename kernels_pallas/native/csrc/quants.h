/* Tiles of quantized weights: sixteen rows of layout "lanes16" (convert/layouts/lanes16.py), where a word has four
   neighbouring bytes of a row and sixteen rows lie side by side.

   A type is what `tile_of`, `quants`, `scale_of` and `minimum_of` say of it. Few rows of activations take
   words as they are read; for more, 256 columns are unpacked to bytes once, and one of three loops that all
   types share takes these. Both do the same operations in the same order. */
#pragma once
#include "tiles.h"

typedef struct {
  const uint32_t *q, *qh, *scales, *mins;
  const uint16_t *d, *dmin;
  const char *place[MAX_ARRAYS]; /* the same, in the matrix's order, and bytes of 256 columns of each */
  int per_block[MAX_ARRAYS];
} Tile;

INLINE const void *part_of(const Matrix *m, Tile *t, int i, int64_t tile, int nbytes, int weights) {
  t->per_block[i] = BLOCK / weights * LANES * nbytes;
  return t->place[i] = (const char *)m->array[i] + tile * (m->columns / weights) * LANES * nbytes;
}

INLINE Tile tile_of(const Matrix *m, int64_t tile, const int type) {
  Tile t = {0};
#define WORDS(i, weights_per_word) part_of(m, &t, i, tile, 4, weights_per_word)
#define HALFS(i, weights_per_half) part_of(m, &t, i, tile, 2, weights_per_half)
  switch (type) {
    case Q4_K:
    case Q5_K:
      t.q = WORDS(0, 8), t.scales = WORDS(1, 128), t.mins = WORDS(2, 128), t.d = HALFS(3, 256), t.dmin = HALFS(4, 256);
      if (type == Q5_K) t.qh = WORDS(5, 32);
      break;
    case Q6_K: t.q = WORDS(0, 8), t.qh = WORDS(1, 16), t.scales = WORDS(2, 64), t.d = HALFS(3, 256); break;
    case Q2_K: t.q = WORDS(0, 16), t.scales = WORDS(1, 64), t.d = HALFS(2, 256), t.dmin = HALFS(3, 256); break;
    case Q3_K: t.q = WORDS(0, 16), t.qh = WORDS(1, 32), t.scales = WORDS(2, 64), t.d = HALFS(3, 256); break;
    case IQ4_XS: t.q = WORDS(0, 8), t.scales = WORDS(1, 128), t.d = HALFS(2, 256); break;
    case MXFP4: t.q = WORDS(0, 8), t.scales = WORDS(1, 128); break;
    case Q4_1: t.q = WORDS(0, 8), t.d = HALFS(1, 32), t.dmin = HALFS(2, 32); break;
    case Q5_0: t.q = WORDS(0, 8), t.qh = WORDS(1, 32), t.d = HALFS(2, 32); break;
    case Q5_1: t.q = WORDS(0, 8), t.qh = WORDS(1, 32), t.d = HALFS(2, 32), t.dmin = HALFS(3, 32); break;
    default: t.q = WORDS(0, type == Q8_0 ? 4 : 8), t.d = HALFS(1, 32); break; /* Q8_0, Q4_0, IQ4_NL */
  }
#undef WORDS
#undef HALFS
  return t;
}

/* Blocks of 256 columns between what is computed and what memory is asked for. The processor's own look ahead
   ends with each page of 4 KB, two blocks of most types; without this, memory and arithmetic take turns. */
enum { AHEAD = 4, LINE = 64 };
INLINE void ask_ahead(const Tile *t, int b) {
  UNROLL(6) for (int i = 0; i < MAX_ARRAYS; i++)
    UNROLL(64) for (int at = 0; at < t->per_block[i]; at += LINE)
      __builtin_prefetch(t->place[i] + (int64_t)(b + AHEAD) * t->per_block[i] + at, 0, 2);
}

/* Whether bytes are signed; else they are below 64, and `zero_of` is what each weight is taken from. */
INLINE int is_signed(const int type) { return type == Q8_0 || type == IQ4_NL || type == IQ4_XS || type == MXFP4; }
INLINE int zero_of(const int type) {
  return is_signed(type) ? SIGNED_OFFSET : type == Q6_K ? 32 : type == Q5_0 ? 16 : type == Q4_0 ? 8 : type == Q3_K ? 4 : 0;
}
/* Columns that share a scale. */
INLINE int columns_per_scale(const int type) { return type == Q6_K || type == Q2_K || type == Q3_K ? 16 : 32; }
INLINE int has_minimum(const int type) {
  return type == Q4_K || type == Q5_K || type == Q2_K || type == Q4_1 || type == Q5_1;
}

static const int8_t iq4_values[16] __attribute__((aligned(16))) = /* convert/formats/iq4.py */
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t fp4_values[16] __attribute__((aligned(16))) = /* convert/formats/mxfp4.py */
    {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

#define AT(words, index) load_words((words) + (size_t)(index) * LANES)

/* Bits 0 to 3 of each word to bit 4 of its four bytes. */
INLINE vu fifth_bits(vu words) { return (((words & 15u) * 0x00204081u) & 0x01010101u) << 4; }

/* Word `w` of the 32 columns of group `g` in superblock `b`: four quants of each row. */
INLINE vu quants(const Tile *t, const int type, int b, int g, int w) {
  const vu none = {0};
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
    case Q2_K:
    case Q3_K: {
      vu high = type == Q3_K ? ((AT(t->qh, b * 8 + w) >> g) & 0x01010101u) << 2 : none;
      return ((AT(t->q, b * 16 + (g >> 2) * 8 + w) >> (2 * (g & 3))) & 0x03030303u) | high;
    }
    case Q8_0: return AT(t->q, b * 64 + g * 8 + w);
  }
  vu nibbles = (AT(t->q, (b * 8 + g) * 4 + (w & 3)) >> (w & 4)) & 0x0f0f0f0fu;
  if (type == IQ4_NL || type == IQ4_XS) return look_up(iq4_values, nibbles);
  if (type == MXFP4) return look_up(fp4_values, nibbles);
  return type == Q5_0 || type == Q5_1 ? nibbles | fifth_bits(AT(t->qh, b * 8 + g) >> (4 * w)) : nibbles;
}

INLINE vf unsigned_byte(vu words, int index) { return to_float((vi)((words >> (8 * index)) & 255u)); }
INLINE vf signed_byte(vu words, int index) { return to_float((vi)(words << (24 - 8 * index)) >> 24); }

/* 2 to the power of e - 128 (convert/formats/mxfp4.py). */
INLINE vf half_power(vu e) {
  vi small = (vi)(e < 2u), bits = (vi)((e - 1u) << 23);
  return as_float((small & (vi)(0x00200000u << (e & 1u))) | (~small & bits));
}

/* Whether `factors_of` has something to say. */
INLINE int is_superblock(const int type) { return (type >= Q2_K && type <= Q6_K) || type == IQ4_XS; }

/* What scales and minimums of 256 columns are multiplied by. */
typedef struct {
  vf of_scales, of_minimums;
} Factors;

INLINE Factors factors_of(const Tile *t, const int type, int b) {
  if (!is_superblock(type)) return (Factors){splat(1.0f), splat(1.0f)};
  return (Factors){load_half(t->d + b * LANES), has_minimum(type) ? load_half(t->dmin + b * LANES) : splat(0.0f)};
}

/* The scale of the columns of `part` of group `g`; a part is sixteen of 32 columns where these have their own. */
INLINE vf scale_of(const Tile *t, const int type, int b, int g, int part) {
  switch (type) {
    case Q4_K:
    case Q5_K: return unsigned_byte(AT(t->scales, b * 2 + (g >> 2)), g & 3);
    case IQ4_XS: return signed_byte(AT(t->scales, b * 2 + (g >> 2)), g & 3);
    case Q6_K:
    case Q3_K: return signed_byte(AT(t->scales, b * 4 + (g >> 1)), 2 * (g & 1) + part);
    case Q2_K: return unsigned_byte(AT(t->scales, b * 4 + (g >> 1)) & 0x0f0f0f0fu, 2 * (g & 1) + part);
    case MXFP4: return half_power((AT(t->scales, b * 2 + (g >> 2)) >> (8 * (g & 3))) & 255u);
    default: return load_half(t->d + (b * 8 + g) * LANES);
  }
}

/* What is taken from each of these weights. */
INLINE vf minimum_of(const Tile *t, const int type, int b, int g, int part) {
  if (type == Q4_1 || type == Q5_1) return -load_half(t->dmin + (b * 8 + g) * LANES);
  if (type == Q2_K) return unsigned_byte((AT(t->scales, b * 4 + (g >> 1)) >> 4) & 0x0f0f0f0fu, 2 * (g & 1) + part);
  return unsigned_byte(AT(t->mins, b * 2 + (g >> 2)), g & 3);
}
#undef AT

/* Sixteen rows of 256 columns as bytes. */
typedef struct {
  vu word[BLOCK / 4];
  vf scale[BLOCK / 16], minimum[BLOCK / 16];
  Factors factors;
} Unpacked;

INLINE void unpack(const Tile *t, const int type, int b, int groups, Unpacked *u) {
  const int parts = 32 / columns_per_scale(type);
  u->factors = factors_of(t, type, b);
  for (int g = 0; g < groups; g++) {
    UNROLL(8) for (int w = 0; w < 8; w++) u->word[8 * g + w] = quants(t, type, b, g, w);
    UNROLL(2) for (int p = 0; p < parts; p++) {
      u->scale[parts * g + p] = scale_of(t, type, b, g, p);
      if (has_minimum(type)) u->minimum[parts * g + p] = minimum_of(t, type, b, g, p);
    }
  }
}

/* Sums over the columns of one scale: of weights times activations, and of the minimum times activations. */
typedef struct {
  vf products, minimums;
} Sums;

INLINE vi dot(const int of_signed, vi acc, vu word, int32_t x) {
  return of_signed ? dot4_signed(acc, word, x) : dot4(acc, word, x);
}

/* `x`: of one row; its columns of `part` of group `g` gave `high` and `low`. */
INLINE void add_part(vi high, vi low, const Block *x, int g, int part, const int parts, int zero, vf scale,
                     const vf *minimum, Sums *s) {
  int sum = parts == 2 ? x->sum16[2 * g + part] : x->sum16[2 * g] + x->sum16[2 * g + 1];
  s->products += to_float((high << 7) + low - zero * sum) * scale;
  if (minimum) s->minimums += *minimum * (parts == 2 ? (float)sum : x->sum32[g]);
}

INLINE void add_block(const Sums *s, Factors f, float scale, vf *out) {
  *out += (f.of_scales * s->products - f.of_minimums * s->minimums) * scale;
}

/* R rows of activations, 256 columns. */
INLINE void take_unpacked(const Unpacked *u, int groups, int zero, int with_minimum, const int of_signed,
                          const int parts, const Block *const *x, const int R, vf *RESTRICT out) {
  Sums sums[8];
  for (int r = 0; r < R; r++) sums[r] = (Sums){{0}, {0}};
  UNROLL(1) for (int g = 0; g < groups; g++)
    UNROLL(1) for (int p = 0; p < parts; p++) {
      vi high[8], low[8];
      int first = 8 * g + p * 4, words = 8 / parts;
      for (int r = 0; r < R; r++) high[r] = low[r] = (vi){};
      UNROLL(8) for (int w = 0; w < words; w++) {
        vu word = u->word[first + w];
        UNROLL(8) for (int r = 0; r < R; r++) {
          high[r] = dot(of_signed, high[r], word, word_at(x[r]->high + 4 * (first + w)));
          low[r] = dot(of_signed, low[r], word, word_at(x[r]->low + 4 * (first + w)));
        }
      }
      const vf *minimum = with_minimum ? u->minimum + parts * g + p : NULL;
      UNROLL(8) for (int r = 0; r < R; r++)
        add_part(high[r], low[r], x[r], g, p, parts, zero, u->scale[parts * g + p], minimum, sums + r);
    }
  for (int r = 0; r < R; r++) add_block(sums + r, u->factors, x[r]->scale, out + r);
}

/* The same of words as they are read: 32 columns. */
INLINE void take_group(const Tile *t, const int type, int b, int g, const Block *const *x, const int R, Sums *sums) {
  const int parts = 32 / columns_per_scale(type), words = 8 / parts;
  UNROLL(2) for (int p = 0; p < parts; p++) {
    vi high[4], low[4];
    for (int r = 0; r < R; r++) high[r] = low[r] = (vi){};
    UNROLL(8) for (int w = p * 4; w < p * 4 + words; w++) {
      vu word = quants(t, type, b, g, w);
      UNROLL(4) for (int r = 0; r < R; r++) {
        high[r] = dot(is_signed(type), high[r], word, word_at(x[r][b].high + 4 * (8 * g + w)));
        low[r] = dot(is_signed(type), low[r], word, word_at(x[r][b].low + 4 * (8 * g + w)));
      }
    }
    vf scale = scale_of(t, type, b, g, p), minimum = splat(0.0f);
    if (has_minimum(type)) minimum = minimum_of(t, type, b, g, p);
    UNROLL(4) for (int r = 0; r < R; r++)
      add_part(high[r], low[r], x[r] + b, g, p, parts, zero_of(type), scale, has_minimum(type) ? &minimum : NULL,
               sums + r);
  }
}

/* 256 columns. Four groups in a row take their shifts from the code and a word once; with more rows that is a
   smaller part of the work, and the compiler takes as long again. */
INLINE void take_packed(const Tile *t, const int type, int b, int groups, const Block *const *x, const int R,
                        vf *RESTRICT out) {
  Sums sums[4];
  for (int r = 0; r < R; r++) sums[r] = (Sums){{0}, {0}};
  if (R == 1) {
    UNROLL(4) for (int g = 0; g < groups; g++) take_group(t, type, b, g, x, R, sums);
  } else {
    UNROLL(1) for (int g = 0; g < groups; g++) take_group(t, type, b, g, x, R, sums);
  }
  Factors factors = factors_of(t, type, b);
  for (int r = 0; r < R; r++) add_block(sums + r, factors, x[r][b].scale, out + r);
}

/* The three loops: bytes below 64 or signed, and a scale for 32 or for 16 columns. */
typedef void (*unpacked_function)(const Unpacked *, int, int, int, const Block *const *, vf *);
#define OF_UNPACKED(name, of_signed, parts, R)                                                                    \
  static __attribute__((noinline)) void name##_##R(const Unpacked *u, int groups, int zero, int with_minimum,    \
                                                   const Block *const *x, vf *out) {                             \
    take_unpacked(u, groups, zero, with_minimum, of_signed, parts, x, R, out);                                   \
  }
#if defined(FORM_AVX512)
enum { MAX_STEP = 3 }; /* as many rows as registers hold sums of, a power of two */
#define LOOPS(name, of_signed, parts)                                                                            \
  OF_UNPACKED(name, of_signed, parts, 1)                                                                         \
  OF_UNPACKED(name, of_signed, parts, 2)                                                                         \
  OF_UNPACKED(name, of_signed, parts, 4)                                                                         \
  OF_UNPACKED(name, of_signed, parts, 8)                                                                         \
  static const unpacked_function name[] = {name##_1, name##_2, name##_4, name##_8};
#else
enum { MAX_STEP = 2 };
#define LOOPS(name, of_signed, parts)                                                                            \
  OF_UNPACKED(name, of_signed, parts, 1)                                                                         \
  OF_UNPACKED(name, of_signed, parts, 2)                                                                         \
  OF_UNPACKED(name, of_signed, parts, 4)                                                                         \
  static const unpacked_function name[] = {name##_1, name##_2, name##_4};
#endif
LOOPS(of_32, 0, 1)
LOOPS(of_32_signed, 1, 1)
LOOPS(of_16, 0, 2)

typedef void (*packed_function)(const Matrix *, int64_t, const Block *const *, vf *);
typedef struct {
  void (*unpack)(const Matrix *, int64_t, int, int, Unpacked *);
  packed_function packed[3];
  const unpacked_function *loops;
  int zero, with_minimum;
} Quants;

INLINE int groups_of(int columns, int b) { return MIN(8, (columns - b * BLOCK) / 32); }

#define OF_PACKED(type, R)                                                                                       \
  static __attribute__((noinline)) void packed_##type##_##R(const Matrix *m, int64_t tile, const Block *const *x, \
                                                            vf *out) {                                           \
    Tile t = tile_of(m, tile, type);                                                                             \
    for (int b = 0; b < blocks_of(m->columns); b++) {                                                            \
      ask_ahead(&t, b);                                                                                          \
      take_packed(&t, type, b, groups_of(m->columns, b), x, R, out);                                             \
    }                                                                                                            \
  }
#define OF_TYPE(type)                                                                                            \
  static __attribute__((noinline)) void unpack_##type(const Matrix *m, int64_t tile, int b, int groups,          \
                                                      Unpacked *u) {                                             \
    Tile t = tile_of(m, tile, type);                                                                             \
    unpack(&t, type, b, groups, u);                                                                              \
  }                                                                                                              \
  OF_PACKED(type, 1) OF_PACKED(type, 2) OF_PACKED(type, 4)
#define EACH_TYPE(define)                                                                                        \
  define(Q4_0) define(Q4_1) define(Q5_0) define(Q5_1) define(Q8_0) define(Q2_K) define(Q3_K) define(Q4_K)        \
  define(Q5_K) define(Q6_K) define(IQ4_NL) define(IQ4_XS) define(MXFP4)
EACH_TYPE(OF_TYPE)

INLINE Quants quants_of(int type) {
#define CASE(type)                                                                                               \
  case type:                                                                                                     \
    return (Quants){unpack_##type, {packed_##type##_1, packed_##type##_2, packed_##type##_4},                    \
                    columns_per_scale(type) == 16 ? of_16 : is_signed(type) ? of_32_signed : of_32, zero_of(type), \
                    has_minimum(type)};
  switch (type) { EACH_TYPE(CASE) }
  return (Quants){0};
#undef CASE
}

/* Rows of activations for which 256 columns are unpacked first. */
enum { UNPACKED_ROWS = 8 };

/* Sixteen rows of a matrix, from row 16 * tile on, times activation rows `row[0]` ... `row[count - 1]`: out
   [count] of sixteen lanes. Rows past the end of a float matrix give 0. */
static void tile_products(const Matrix *m, int tile, const Activations *x, const int *row, int count, vf *out) {
  if (is_float(m->type)) return tile_of_floats(m, tile, x, row, count, out);
  Quants q = quants_of(m->type);
  int64_t place = m->first / LANES + tile, per_row = blocks_of(x->columns);
  for (int r = 0; r < count; r++) out[r] = splat(0.0f);
  if (count < UNPACKED_ROWS) {
    for (int done = 0, n; done < count; done += n) {
      int step = MIN(2, step_of(count - done));
      const Block *blocks[4];
      n = 1 << step;
      for (int r = 0; r < n; r++) blocks[r] = x->blocks + row[done + r] * per_row;
      q.packed[step](m, place, blocks, out + done);
    }
    return;
  }
  Unpacked u;
  for (int b = 0; b < per_row; b++) {
    q.unpack(m, place, b, groups_of(m->columns, b), &u);
    for (int done = 0, n; done < count; done += n) {
      int step = MIN(MAX_STEP, step_of(count - done));
      const Block *blocks[8];
      n = 1 << step;
      for (int r = 0; r < n; r++) blocks[r] = x->blocks + row[done + r] * per_row + b;
      q.loops[step](&u, groups_of(m->columns, b), q.zero, q.with_minimum, blocks, out + done);
    }
  }
}
