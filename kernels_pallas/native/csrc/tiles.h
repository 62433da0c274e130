/* Products of sixteen rows of packed weights with a few rows of activations.

   Quantized weights lie in layout "lanes16" (convert/layouts/lanes16.py): a word has four neighbouring bytes of a
   row, and sixteen rows lie side by side. Floats lie in rows. Each result is computed in one order, whatever
   the number of activation rows beside it. */
#pragma once
#include "activations.h"

/* ggml's numbers of the types. */
enum {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13,
  Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, BF16 = 30, MXFP4 = 39
};
enum { MAX_ARRAYS = 6 };

/* One matrix: rows from `first` on of a stack of K columns. The arrays are in the order of operands.py. */
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

#define OF_FLOATS(type, R)                                                                                  \
  static __attribute__((noinline)) void floats_##type##_##R(const Matrix *m, int64_t start, const float *const *x, \
                                                            float *out) {                                   \
    row_of_floats(m, start, type, x, R, out);                                                               \
  }
#define EACH_COUNT(define, type) define(type, 1) define(type, 2) define(type, 4) define(type, 8)
EACH_COUNT(OF_FLOATS, F32)
EACH_COUNT(OF_FLOATS, F16)
EACH_COUNT(OF_FLOATS, BF16)

typedef void (*floats_function)(const Matrix *, int64_t, const float *const *, float *);
#define COUNTS(kind, type) {kind##_##type##_1, kind##_##type##_2, kind##_##type##_4, kind##_##type##_8}
static const floats_function floats_functions[3][4] = {COUNTS(floats, F32), COUNTS(floats, F16),
                                                       COUNTS(floats, BF16)};

INLINE int floats_index(int type) { return type == BF16 ? 2 : type; }

/* How many rows the next call takes of `left`, as a power of two's exponent. */
INLINE int step_of(int left) { return left >= 8 ? 3 : left >= 4 ? 2 : left >= 2 ? 1 : 0; }

static void tile_of_floats(const Matrix *m, int tile, const Activations *x, const int *row, int count, vf *out) {
  for (int done = 0, n; done < count; done += n) {
    int step = step_of(count - done);
    n = 1 << step;
    const float *values[8];
    float result[8], lanes[8][LANES] = {{0}};
    for (int r = 0; r < n; r++) values[r] = x->values + (int64_t)row[done + r] * x->columns;
    for (int lane = 0; lane < MIN(LANES, m->rows - LANES * tile); lane++) {
      int64_t start = (m->first + LANES * tile + lane) * m->columns;
      floats_functions[floats_index(m->type)][step](m, start, values, result);
      for (int r = 0; r < n; r++) lanes[r][lane] = result[r];
    }
    memcpy(out + done, lanes, sizeof(vf) * (size_t)n);
  }
}
