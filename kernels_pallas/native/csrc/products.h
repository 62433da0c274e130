/* Products over all rows of matrices, dealt out to the pool, and the small operations between them. */
#pragma once
#include <stdlib.h>

#include "pool.h"
#include "quants.h"

/* Memory for one call, kept by each thread that calls. */
typedef struct {
  char *base;
  size_t used, size;
} Arena;

static void *take(Arena *arena, size_t nbytes) {
  void *place = arena->base + arena->used;
  arena->used += (nbytes + 63) & ~(size_t)63;
  return place;
}

/* An arena of this thread with room for `nbytes`; its base is NULL where memory is short. */
static Arena arena_of(size_t nbytes) {
  static __thread char *kept;
  static __thread size_t size;
  nbytes += 1 << 16;
  if (nbytes > size) {
    free(kept);
    size = (nbytes + 4095) & ~(size_t)4095;
    kept = aligned_alloc(4096, size);
    if (!kept) size = 0;
  }
  return (Arena){kept, 0, size};
}

static size_t room_for_activations(int rows, int columns) {
  return (size_t)rows * ((size_t)blocks_of(columns) * sizeof(Block) + (size_t)columns * sizeof(float)) + 128;
}

/* Matrices that multiply the same activations, as one list of tiles. */
enum { MAX_TOGETHER = 3, TILES_PER_PIECE = 4, ROWS_PER_PIECE = 64 };
typedef struct {
  const Matrix *matrix[MAX_TOGETHER];
  float *out[MAX_TOGETHER]; /* [rows, the matrix's rows] */
  int count, adds;          /* adds: to what is there */
  Activations x;
  int rows, tiles, tiles_per_piece;
} Products;

INLINE int tiles_of(const Matrix *m) { return (m->rows + LANES - 1) / LANES; }

static void write_tile(const Products *p, int which, int tile, const int *row, int count) {
  const Matrix *m = p->matrix[which];
  vf out[ROWS_PER_PIECE];
  tile_products(m, tile, &p->x, row, count, out);
  int lanes = MIN(LANES, m->rows - LANES * tile);
  for (int r = 0; r < count; r++) {
    float *to = p->out[which] + (int64_t)row[r] * m->rows + LANES * tile;
    if (lanes == LANES) {
      store(to, p->adds ? load(to) + out[r] : out[r]);
    } else {
      for (int i = 0; i < lanes; i++) to[i] = p->adds ? to[i] + out[r][i] : out[r][i];
    }
  }
}

static void products_piece(void *context, int piece) {
  const Products *p = context;
  int per_row_part = (p->tiles + p->tiles_per_piece - 1) / p->tiles_per_piece;
  int first_row = piece / per_row_part * ROWS_PER_PIECE, first = piece % per_row_part * p->tiles_per_piece;
  int row[ROWS_PER_PIECE], count = MIN(ROWS_PER_PIECE, p->rows - first_row);
  for (int r = 0; r < count; r++) row[r] = first_row + r;
  for (int tile = first; tile < MIN(first + p->tiles_per_piece, p->tiles); tile++) {
    int which = 0, inside = tile;
    while (inside >= tiles_of(p->matrix[which])) inside -= tiles_of(p->matrix[which++]);
    write_tile(p, which, inside, row, count);
  }
}

static void multiply(Products p) {
  p.tiles = 0;
  for (int i = 0; i < p.count; i++) p.tiles += tiles_of(p.matrix[i]);
  p.tiles_per_piece = MIN(32, MAX(TILES_PER_PIECE, p.tiles / 256));
  int parts = (p.tiles + p.tiles_per_piece - 1) / p.tiles_per_piece;
  pool_run(products_piece, &p, parts * ((p.rows + ROWS_PER_PIECE - 1) / ROWS_PER_PIECE));
}

/* Work on each row by itself, some rows per piece; few rows stay with the thread that asks. */
typedef void (*row_function)(void *context, int row);
typedef struct {
  row_function function;
  void *context;
  int rows, per_piece;
} EachRow;

static void row_piece(void *context, int piece) {
  const EachRow *e = context;
  for (int row = piece * e->per_piece; row < MIN(e->rows, (piece + 1) * e->per_piece); row++)
    e->function(e->context, row);
}

static void each_row(row_function function, void *context, int rows) {
  EachRow e = {function, context, rows, rows <= 2 ? rows : 4};
  pool_run(row_piece, &e, (rows + e.per_piece - 1) / MAX(1, e.per_piece));
}

typedef struct {
  const float *x;
  int columns;
  Block *blocks;
} Quantize;

static void quantize_one(void *context, int row) {
  const Quantize *q = context;
  quantize_row(q->x + (int64_t)row * q->columns, q->columns, q->blocks + (int64_t)row * blocks_of(q->columns));
}

static Activations quantized(Arena *arena, const float *x, int rows, int columns) {
  Block *blocks = take(arena, (size_t)rows * (size_t)blocks_of(columns) * sizeof(Block));
  Quantize q = {x, columns, blocks};
  each_row(quantize_one, &q, rows);
  return (Activations){x, blocks, columns};
}

static void matmul(Arena *arena, const float *x, int rows, const Matrix *m, float *out) {
  Activations a = {x, NULL, m->columns};
  if (!is_float(m->type)) a = quantized(arena, x, rows, m->columns);
  multiply((Products){.matrix = {m}, .out = {out}, .count = 1, .x = a, .rows = rows});
}
