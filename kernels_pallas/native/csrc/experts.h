/* The experts of each token: gate and up, SwiGLU, down, and the weighted sum in the order of the choice. */
#pragma once
#include "products.h"

/* Rows (token, choice) sorted by expert, in parts of rows of one expert. */
enum { ROWS_PER_PART = 64 };
typedef struct {
  int expert, first, count;
} Part;

typedef struct {
  const Matrix *gate, *up, *down; /* of all experts: `rows` are those of one */
  const int32_t *ids;             /* [tokens, choices] */
  const float *weights;
  int tokens, choices, experts;
  Activations x, hidden; /* one row per token; one per (token, choice) */
  float *swiglu, *parts_out, *out;
  int adds; /* to `out` */
  int *order;
  Part *parts;
  int num_parts, tiles_per_piece;
} Experts;

static size_t room_for_experts(int tokens, int choices, int experts, int inner, int outer) {
  size_t pairs = (size_t)tokens * (size_t)choices;
  return pairs * (sizeof(int) + sizeof(Part) + sizeof(float) * (size_t)outer) + (size_t)experts * sizeof(Part) +
         room_for_activations((int)pairs, inner) + 4096;
}

INLINE Matrix of_expert(const Matrix *m, int expert) {
  Matrix one = *m;
  one.first += (int64_t)expert * m->rows;
  return one;
}

INLINE int clipped(int id, int experts) { return MAX(0, MIN(experts - 1, id)); }

static void sort_by_expert(Experts *e) {
  int pairs = e->tokens * e->choices, done = 0;
  e->num_parts = 0;
  if (e->tokens == 1) { /* a part for each choice */
    for (int i = 0; i < pairs; i++) {
      e->order[i] = i;
      e->parts[e->num_parts++] = (Part){clipped(e->ids[i], e->experts), i, 1};
    }
    return;
  }
  int start[e->experts + 1];
  memset(start, 0, sizeof start);
  for (int i = 0; i < pairs; i++) start[clipped(e->ids[i], e->experts) + 1]++;
  for (int x = 0; x < e->experts; x++) start[x + 1] += start[x];
  for (int x = 0; x < e->experts; x++)
    for (done = start[x]; done < start[x + 1]; done += ROWS_PER_PART)
      e->parts[e->num_parts++] = (Part){x, done, MIN(ROWS_PER_PART, start[x + 1] - done)};
  for (int i = 0; i < pairs; i++) e->order[start[clipped(e->ids[i], e->experts)]++] = i;
}

static void gate_up_piece(void *context, int piece) {
  const Experts *e = context;
  int tiles = tiles_of(e->gate), pieces = (tiles + e->tiles_per_piece - 1) / e->tiles_per_piece;
  const Part *part = e->parts + piece / pieces;
  Matrix gate = of_expert(e->gate, part->expert), up = of_expert(e->up, part->expert);
  int first = piece % pieces * e->tiles_per_piece, row[ROWS_PER_PART];
  for (int r = 0; r < part->count; r++) row[r] = e->order[part->first + r] / e->choices;
  for (int tile = first; tile < MIN(tiles, first + e->tiles_per_piece); tile++) {
    vf g[ROWS_PER_PART], u[ROWS_PER_PART];
    tile_products(&gate, tile, &e->x, row, part->count, g);
    tile_products(&up, tile, &e->x, row, part->count, u);
    for (int r = 0; r < part->count; r++) {
      vf value = g[r] / (1.0f + vexp(-g[r])) * u[r];
      store(e->swiglu + (int64_t)e->order[part->first + r] * gate.rows + tile * LANES, value);
    }
  }
}

static void down_piece(void *context, int piece) {
  const Experts *e = context;
  int tiles = tiles_of(e->down), pieces = (tiles + e->tiles_per_piece - 1) / e->tiles_per_piece;
  const Part *part = e->parts + piece / pieces;
  Matrix down = of_expert(e->down, part->expert);
  int first = piece % pieces * e->tiles_per_piece, *row = e->order + part->first;
  for (int tile = first; tile < MIN(tiles, first + e->tiles_per_piece); tile++) {
    vf out[ROWS_PER_PART];
    tile_products(&down, tile, &e->hidden, row, part->count, out);
    for (int r = 0; r < part->count; r++)
      store(e->parts_out + (int64_t)row[r] * down.rows + tile * LANES, out[r]);
  }
}

static void combine_token(void *context, int token) {
  const Experts *e = context;
  int columns = e->down->rows;
  for (int i = 0; i < columns; i += LANES) {
    vf total = splat(0.0f);
    for (int c = 0; c < e->choices; c++) {
      int64_t pair = (int64_t)token * e->choices + c;
      total = total + load(e->parts_out + pair * columns + i) * e->weights[pair];
    }
    float *to = e->out + (int64_t)token * columns + i;
    store(to, e->adds ? load(to) + total : total);
  }
}

/* Experts' results for tokens whose activations are `e.x`; rows of gate and of down come in sixteens. */
static void run_experts(Arena *arena, Experts e) {
  int pairs = e.tokens * e.choices, inner = e.gate->rows;
  e.order = take(arena, sizeof(int) * (size_t)pairs);
  e.parts = take(arena, sizeof(Part) * (size_t)(pairs + e.experts));
  e.swiglu = take(arena, sizeof(float) * (size_t)pairs * (size_t)inner);
  e.parts_out = take(arena, sizeof(float) * (size_t)pairs * (size_t)e.down->rows);
  sort_by_expert(&e);
  e.tiles_per_piece = 4;
  pool_run(gate_up_piece, &e, e.num_parts * ((tiles_of(e.gate) + 3) / 4));
  e.hidden = (Activations){e.swiglu, NULL, inner};
  if (!is_float(e.down->type)) e.hidden = quantized(arena, e.swiglu, pairs, inner);
  e.tiles_per_piece = 8;
  pool_run(down_piece, &e, e.num_parts * ((tiles_of(e.down) + 7) / 8));
  each_row(combine_token, &e, e.tokens);
}
