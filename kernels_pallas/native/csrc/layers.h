/* All decoder layers for some rows (tokens of any sequences), one call. */
#pragma once
#include "attention.h"
#include "experts.h"

enum { Q, K, V, O, ROUTER, GATE, UP, DOWN, MATRICES };
#define MIN_WEIGHT_SUM 6.103515625e-5f /* convert.config.MIN_WEIGHT_SUM */

typedef struct {
  int layers, width, heads, kv_heads, head, experts, choices, inner, length, slots, rows;
  float eps;
  const float *input_norm, *post_norm, *q_norm, *k_norm; /* [layers, ...] */
  const float *cos, *sin;                                /* [rows, head / 2] */
  const int32_t *slot, *position, *forced;               /* forced: [layers, rows, choices] or NULL */
  float *x, *k_cache, *v_cache;                          /* k_cache: [layers, slots, length, kv heads, head] */
  int32_t *ids;                                          /* [layers, rows, choices] */
} Network;

/* What one layer works on. */
typedef struct {
  const Network *n;
  int layer;
  Matrix matrix[MATRICES];
  float *h, *q, *k, *v, *attended, *logits, *weights;
  Block *blocks;
  const float *norm;
} Layer;

INLINE void rms_norm(const float *x, const float *w, int n, float eps, float *out) {
  vf squares = splat(0.0f);
  for (int i = 0; i < n; i += LANES) squares += load(x + i) * load(x + i);
  float factor = 1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps);
  for (int i = 0; i < n; i += LANES) store(out + i, load(x + i) * factor * load(w + i));
}

static void norm_and_quantize(void *context, int row) {
  const Layer *l = context;
  int width = l->n->width;
  float *h = l->h + (int64_t)row * width;
  rms_norm(l->n->x + (int64_t)row * width, l->norm, width, l->n->eps, h);
  quantize_row(h, width, l->blocks + (int64_t)row * blocks_of(width));
}

INLINE void rotate(float *x, const float *cos, const float *sin, int head) {
  for (int i = 0; i < head / 2; i += LANES) {
    vf a = load(x + i), b = load(x + head / 2 + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + head / 2 + i, b * c + a * s);
  }
}

static void norm_and_rotate(void *context, int row) {
  const Layer *l = context;
  const Network *n = l->n;
  const float *cos = n->cos + (int64_t)row * (n->head / 2), *sin = n->sin + (int64_t)row * (n->head / 2);
  for (int i = 0; i < n->heads; i++) {
    float *q = l->q + ((int64_t)row * n->heads + i) * n->head;
    rms_norm(q, n->q_norm + (int64_t)l->layer * n->head, n->head, n->eps, q);
    rotate(q, cos, sin, n->head);
  }
  for (int i = 0; i < n->kv_heads; i++) {
    float *k = l->k + ((int64_t)row * n->kv_heads + i) * n->head;
    rms_norm(k, n->k_norm + (int64_t)l->layer * n->head, n->head, n->eps, k);
    rotate(k, cos, sin, n->head);
  }
}

/* In the order of rows: of two that name one position the later one stays. */
static void write_cache(const Layer *l) {
  const Network *n = l->n;
  size_t row_size = (size_t)n->kv_heads * (size_t)n->head;
  for (int r = 0; r < n->rows; r++) {
    int64_t position = MAX(0, MIN(n->position[r], n->length - 1));
    int64_t offset = ((int64_t)l->layer * n->slots + n->slot[r]) * n->length + position;
    memcpy(n->k_cache + offset * (int64_t)row_size, l->k + (int64_t)r * (int64_t)row_size, row_size * sizeof(float));
    memcpy(n->v_cache + offset * (int64_t)row_size, l->v + (int64_t)r * (int64_t)row_size, row_size * sizeof(float));
  }
}

/* Softmax over all experts, the most probable ones (the lower number first among equals), their weights. */
static void choose_experts(void *context, int row) {
  const Layer *l = context;
  const Network *n = l->n;
  int experts = n->experts, choices = n->choices;
  float *probs = l->logits + (int64_t)row * experts, *weights = l->weights + (int64_t)row * choices;
  int32_t *ids = n->ids + ((int64_t)l->layer * n->rows + row) * choices;
  float peak = probs[0], total = 0.0f, chosen = 0.0f;
  for (int e = 1; e < experts; e++) peak = probs[e] > peak ? probs[e] : peak;
  for (int e = 0; e < experts; e += LANES) {
    float part[LANES] = {0};
    int count = MIN(LANES, experts - e);
    memcpy(part, probs + e, sizeof(float) * (size_t)count);
    store(part, vexp(load(part) - peak));
    for (int i = 0; i < count; i++) total += part[i];
    memcpy(probs + e, part, sizeof(float) * (size_t)count);
  }
  if (n->forced) memcpy(ids, n->forced + ((int64_t)l->layer * n->rows + row) * choices, sizeof(int32_t) * (size_t)choices);
  for (int c = 0; c < choices; c++) {
    if (!n->forced) {
      int best = -1;
      for (int e = 0; e < experts; e++) {
        int is_taken = 0;
        for (int i = 0; i < c; i++) is_taken |= ids[i] == e;
        if (!is_taken && (best < 0 || probs[e] > probs[best])) best = e;
      }
      ids[c] = best;
    }
    weights[c] = probs[clipped(ids[c], experts)] / total;
    chosen += weights[c];
  }
  for (int c = 0; c < choices; c++) weights[c] /= chosen > MIN_WEIGHT_SUM ? chosen : (chosen == chosen ? MIN_WEIGHT_SUM : chosen);
}

static Activations normed(Layer *l, const float *norm) {
  l->norm = norm + (int64_t)l->layer * l->n->width;
  each_row(norm_and_quantize, l, l->n->rows);
  return (Activations){l->h, l->blocks, l->n->width};
}

static void attention_part(Arena arena, Layer *l) {
  const Network *n = l->n;
  int rows = n->rows;
  Activations x = normed(l, n->input_norm);
  multiply((Products){.matrix = {&l->matrix[Q], &l->matrix[K], &l->matrix[V]},
                      .out = {l->q, l->k, l->v}, .count = 3, .x = x, .rows = rows});
  each_row(norm_and_rotate, l, rows);
  write_cache(l);
  int *first = take(&arena, sizeof(int) * (size_t)(rows + 1));
  int64_t of_layer = (int64_t)n->slots * n->length * n->kv_heads * n->head * l->layer;
  attend(&arena, (Attention){.q = l->q, .k = n->k_cache + of_layer, .v = n->v_cache + of_layer, .slot = n->slot,
                             .position = n->position, .rows = rows, .heads = n->heads, .kv_heads = n->kv_heads,
                             .head = n->head, .length = n->length, .out = l->attended},
         first);
  Activations out = {l->attended, NULL, n->heads * n->head};
  if (!is_float(l->matrix[O].type)) out = quantized(&arena, l->attended, rows, n->heads * n->head);
  multiply((Products){.matrix = {&l->matrix[O]}, .out = {n->x}, .count = 1, .adds = 1, .x = out, .rows = rows});
}

static void experts_part(Arena arena, Layer *l) {
  const Network *n = l->n;
  Activations x = normed(l, n->post_norm);
  multiply((Products){.matrix = {&l->matrix[ROUTER]}, .out = {l->logits}, .count = 1, .x = x, .rows = n->rows});
  each_row(choose_experts, l, n->rows);
  run_experts(&arena, (Experts){.gate = &l->matrix[GATE], .up = &l->matrix[UP], .down = &l->matrix[DOWN],
                                .ids = n->ids + (int64_t)l->layer * n->rows * n->choices, .weights = l->weights,
                                .tokens = n->rows, .choices = n->choices, .experts = n->experts, .x = x,
                                .out = n->x, .adds = 1});
}

static size_t room_for_layers(const Network *n) {
  size_t rows = (size_t)n->rows, heads = (size_t)(n->heads * 2 + n->kv_heads * 2) * (size_t)n->head;
  return rows * sizeof(float) * (heads + (size_t)n->experts + (size_t)n->choices) + sizeof(int) * (rows + 1) +
         room_for_activations(n->rows, n->width) + room_for_activations(n->rows, n->heads * n->head) +
         room_for_experts(n->rows, n->choices, n->experts, n->inner, n->width) +
         room_for_sections(n->rows, n->heads, n->head, n->length) + 16384;
}

/* Room for what `keep_real` copies. */
static size_t room_for_real(const Network *n) {
  size_t rows = (size_t)n->rows, chosen = rows * (size_t)n->layers * (size_t)n->choices;
  return rows * (sizeof(float) * (size_t)n->head + 3 * sizeof(int32_t)) + 2 * chosen * sizeof(int32_t) + 1024;
}

/* `rows` of a call without padding, whose positions are below 0: what belongs to real[i] comes to place i. */
static Network keep_real(Arena *arena, const Network *all, int *real) {
  Network n = *all;
  n.rows = 0;
  for (int r = 0; r < all->rows; r++)
    if (all->position[r] >= 0) real[n.rows++] = r;
  if (n.rows == all->rows) return n;
  size_t rows = (size_t)n.rows, half = (size_t)(n.head / 2), width = (size_t)n.width, choices = (size_t)n.choices;
  float *cos = take(arena, rows * half * sizeof(float)), *sin = take(arena, rows * half * sizeof(float));
  int32_t *slot = take(arena, rows * sizeof *slot), *position = take(arena, rows * sizeof *position);
  int32_t *forced = take(arena, rows * (size_t)n.layers * choices * sizeof *forced);
  for (size_t i = 0; i < rows; i++) {
    size_t from = (size_t)real[i];
    memcpy(cos + i * half, all->cos + from * half, half * sizeof(float));
    memcpy(sin + i * half, all->sin + from * half, half * sizeof(float));
    slot[i] = all->slot[from];
    position[i] = all->position[from];
    memmove(n.x + i * width, n.x + from * width, width * sizeof(float));
    for (size_t l = 0; l < (size_t)n.layers && all->forced; l++)
      memcpy(forced + (l * rows + i) * choices, all->forced + (l * (size_t)all->rows + from) * choices,
             choices * sizeof *forced);
  }
  n.cos = cos, n.sin = sin, n.slot = slot, n.position = position, n.forced = all->forced ? forced : NULL;
  n.ids = take(arena, rows * (size_t)n.layers * choices * sizeof *n.ids);
  return n;
}

/* The way back: rows of padding are 0. */
static void put_back(const Network *all, const Network *n, const int *real) {
  if (n->rows == all->rows) return;
  size_t width = (size_t)n->width * sizeof(float), chosen = (size_t)n->choices * sizeof(int32_t);
  memset(all->ids, 0, chosen * (size_t)all->rows * (size_t)n->layers);
  for (int i = n->rows, r = all->rows - 1; r >= 0; r--) {
    float *to = all->x + (int64_t)r * n->width;
    if (!i || real[i - 1] != r) {
      memset(to, 0, width);
      continue;
    }
    i--;
    memmove(to, all->x + (int64_t)i * n->width, width);
    for (int64_t l = 0; l < n->layers; l++)
      memcpy(all->ids + (l * all->rows + r) * n->choices, n->ids + (l * n->rows + i) * n->choices, chosen);
  }
}

/* `stacks` and `table` (layers x MATRICES of stack and first row) say where the matrices lie. */
static int run_layers(const Network *all, const Matrix *stacks, const int32_t *table) {
  Arena arena = arena_of(room_for_layers(all) + room_for_real(all));
  if (!arena.base) return 0;
  int *real = take(&arena, sizeof(int) * (size_t)all->rows);
  const Network network = keep_real(&arena, all, real), *n = &network;
  size_t rows = (size_t)n->rows, head = (size_t)n->head * sizeof(float);
  Layer l = {.n = n};
  l.h = take(&arena, rows * (size_t)n->width * sizeof(float));
  l.q = take(&arena, rows * (size_t)n->heads * head);
  l.k = take(&arena, rows * (size_t)n->kv_heads * head);
  l.v = take(&arena, rows * (size_t)n->kv_heads * head);
  l.attended = take(&arena, rows * (size_t)n->heads * head);
  l.logits = take(&arena, rows * (size_t)n->experts * sizeof(float));
  l.weights = take(&arena, rows * (size_t)n->choices * sizeof(float));
  l.blocks = take(&arena, rows * (size_t)blocks_of(n->width) * sizeof(Block));
  const int sizes[MATRICES][2] = {{n->heads * n->head, n->width}, {n->kv_heads * n->head, n->width},
                                  {n->kv_heads * n->head, n->width}, {n->width, n->heads * n->head},
                                  {n->experts, n->width}, {n->inner, n->width}, {n->inner, n->width},
                                  {n->width, n->inner}};
  for (l.layer = 0; l.layer < n->layers; l.layer++) {
    for (int m = 0; m < MATRICES; m++) {
      const int32_t *place = table + ((int64_t)l.layer * MATRICES + m) * 2;
      l.matrix[m] = stacks[place[0]];
      l.matrix[m].rows = sizes[m][0];
      l.matrix[m].columns = sizes[m][1];
      l.matrix[m].first = place[1];
    }
    attention_part(arena, &l);
    experts_part(arena, &l);
  }
  put_back(all, n, real);
  return 1;
}
