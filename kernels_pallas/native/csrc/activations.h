/* Activations in 15 bits: two signed bytes per element, and a float32 scale for each 256 columns of a row. */
#pragma once
#include "vectors.h"

#define BLOCK 256
#define TOP 16256.0f /* the largest magnitude: 127 * 128 */

/* 256 columns of one row: x = scale * (128 * high + low), to within half a scale. The sums are those of the
   whole numbers 128 * high + low; weights with a minimum or an offset need them. */
typedef struct {
  int8_t high[BLOCK];
  int8_t low[BLOCK];
  float sum32[BLOCK / 32];
  int32_t sum16[BLOCK / 16];
  float scale;
  float unused[7];
} Block;

INLINE int blocks_of(int columns) { return (columns + BLOCK - 1) / BLOCK; }

/* One row of `columns` values. Columns past the end are 0. A row with NaN or infinity has a NaN as scale there. */
static void quantize_row(const float *x, int columns, Block *blocks) {
  for (int b = 0; b < blocks_of(columns); b++) {
    float padded[BLOCK];
    const float *values = x + b * BLOCK;
    Block *block = blocks + b;
    if (columns - b * BLOCK < BLOCK) {
      memset(padded, 0, sizeof padded);
      memcpy(padded, values, sizeof(float) * (size_t)(columns - b * BLOCK));
      values = padded;
    }
    vf peak = splat(0.0f);
    vi finite = (vi){} - 1;
    for (int i = 0; i < BLOCK; i += LANES) {
      vf magnitude = vabs(load(values + i));
      finite &= magnitude <= 3.4028234e38f;
      peak = vmax(magnitude, peak);
    }
    float top = largest(peak);
    int is_zero = top < 1e-30f, is_finite = sum(choose(finite, splat(0.0f), splat(1.0f))) == 0.0f;
    block->scale = is_finite ? (is_zero ? 0.0f : top / TOP) : __builtin_nanf("");
    float to_whole = is_zero || !is_finite ? 0.0f : TOP / top;
    const float magic = 12582912.0f;
    for (int i = 0; i < BLOCK; i += LANES) {
      vf value = is_finite ? load(values + i) : splat(0.0f);
      vi whole = to_int((value * to_whole + magic) - magic);
      vi high = (whole + 64) >> 7;
      v16b h = __builtin_convertvector(high, v16b), l = __builtin_convertvector(whole - (high << 7), v16b);
      memcpy(block->high + i, &h, LANES);
      memcpy(block->low + i, &l, LANES);
      int32_t lanes[LANES], total = 0;
      memcpy(lanes, &whole, sizeof lanes);
      for (int n = 0; n < LANES; n++) total += lanes[n];
      block->sum16[i / 16] = total;
    }
    for (int i = 0; i < BLOCK / 32; i++) block->sum32[i] = (float)(block->sum16[2 * i] + block->sum16[2 * i + 1]);
  }
}
