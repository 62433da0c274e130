/* Causal attention over a float32 cache: a running softmax over blocks of keys, float32 throughout. */
#pragma once
#include "products.h"

enum { KEYS = 64, MAX_HEAD = 256, QUERY_ROWS = 16 };

typedef struct {
  const float *q;           /* [rows, heads, head] */
  const float *k, *v;       /* one layer's [slots, length, kv heads, head] */
  const int32_t *slot, *position;
  int rows, heads, kv_heads, head;
  int64_t length;
  float *out; /* [rows, heads, head] */
  const int *run_first; /* rows of one slot with positions one after the other, in pieces of QUERY_ROWS */
} Attention;

/* Sixteen dot products of q with keys that are `stride` apart. */
INLINE vf sixteen_scores(const float *q, const float *keys, int64_t stride, const int head) {
  vf part[LANES];
  UNROLL(16) for (int n = 0; n < LANES; n++) {
    part[n] = splat(0.0f);
    for (int i = 0; i < head; i += LANES) part[n] += load(q + i) * load(keys + n * stride + i);
  }
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
  /* a tree of sums that ends with the sum of part[n] in lane n */
  vf a[8], b[4], c[2];
  UNROLL(8) for (int n = 0; n < 8; n++)
    a[n] = SHUFFLED(part[n], part[n + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLED(part[n], part[n + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  UNROLL(4) for (int n = 0; n < 4; n++)
    b[n] = SHUFFLED(a[n], a[n + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLED(a[n], a[n + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  UNROLL(2) for (int n = 0; n < 2; n++)
    c[n] = SHUFFLED(b[n], b[n + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLED(b[n], b[n + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return SHUFFLED(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         SHUFFLED(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#undef SHUFFLED
}

typedef struct {
  float peak, total;
} Softmax;

/* Takes KEYS keys from `first` on into one query's running softmax. */
INLINE void take_keys(const float *q, const float *k, const float *v, int64_t stride, int64_t first, int64_t last,
                      float scale, const int head, Softmax *state, float *RESTRICT out) {
  vf score[KEYS / LANES], peak = splat(-__builtin_inff());
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int count = (int)MIN(KEYS, last - first + 1), vectors = (count + LANES - 1) / LANES;
  for (int n = 0; n < vectors; n++) {
    float copied[LANES * MAX_HEAD];
    const float *keys = k + (first + n * LANES) * stride;
    int64_t apart = stride;
    if (count < (n + 1) * LANES) { /* fewer than sixteen are left: no key past the last is read */
      for (int i = 0; i < LANES; i++)
        memcpy(copied + i * head, keys + MIN(i, count - 1 - n * LANES) * stride, sizeof(float) * (size_t)head);
      keys = copied, apart = head;
    }
    score[n] = sixteen_scores(q, keys, apart, head) * scale;
    score[n] = choose(lane + n * LANES < count, score[n], splat(-__builtin_inff()));
    peak = vmax(score[n], peak);
  }
  float top = largest(peak), new_peak = top > state->peak ? top : state->peak;
  float shrink = vexp(splat(state->peak - new_peak))[0], weight[KEYS];
  vf total = splat(0.0f);
  for (int n = 0; n < vectors; n++) {
    vf w = vexp(score[n] - new_peak);
    total += w;
    store(weight + n * LANES, w);
  }
  state->total = state->total * shrink + sum(total);
  state->peak = new_peak;
  vf acc[MAX_HEAD / LANES];
  for (int i = 0; i < head / LANES; i++) acc[i] = load(out + i * LANES) * shrink;
  for (int n = 0; n < count; n++)
    for (int i = 0; i < head / LANES; i++) acc[i] += load(v + (first + n) * stride + i * LANES) * weight[n];
  for (int i = 0; i < head / LANES; i++) store(out + i * LANES, acc[i]);
}

static void take_keys_64(const float *q, const float *k, const float *v, int64_t stride, int64_t first, int64_t last,
                         float scale, Softmax *state, float *out) {
  take_keys(q, k, v, stride, first, last, scale, 64, state, out);
}
static void take_keys_128(const float *q, const float *k, const float *v, int64_t stride, int64_t first, int64_t last,
                          float scale, Softmax *state, float *out) {
  take_keys(q, k, v, stride, first, last, scale, 128, state, out);
}

/* Queries of rows run_first[i] ... run_first[i + 1] - 1 and of the heads that read one KV head. */
static void attention_piece(void *context, int piece) {
  const Attention *a = context;
  int run = piece / a->kv_heads, kv = piece % a->kv_heads, group = a->heads / a->kv_heads;
  int first_row = a->run_first[run], rows = a->run_first[run + 1] - first_row;
  int64_t stride = (int64_t)a->kv_heads * a->head;
  int64_t base = (int64_t)a->slot[first_row] * a->length * stride + (int64_t)kv * a->head;
  const float *k = a->k + base, *v = a->v + base;
  float scale = 1.0f / __builtin_sqrtf((float)a->head);
  Softmax state[QUERY_ROWS * 64];
  for (int i = 0; i < rows * group; i++) state[i] = (Softmax){-__builtin_inff(), 0.0f};
  for (int r = 0; r < rows; r++)
    memset(a->out + ((int64_t)(first_row + r) * a->heads + kv * group) * a->head, 0,
           sizeof(float) * (size_t)(group * a->head));
  int64_t last = a->position[first_row + rows - 1];
  for (int64_t first = 0; first <= last; first += KEYS) {
    for (int r = 0; r < rows; r++) {
      int64_t own_last = a->position[first_row + r];
      if (own_last < first) continue;
      for (int g = 0; g < group; g++) {
        int64_t place = ((int64_t)(first_row + r) * a->heads + kv * group + g) * a->head;
        (a->head == 64 ? take_keys_64 : take_keys_128)(a->q + place, k, v, stride, first, own_last, scale,
                                                       state + r * group + g, a->out + place);
      }
    }
  }
  for (int r = 0; r < rows; r++)
    for (int g = 0; g < group; g++) {
      float *out = a->out + ((int64_t)(first_row + r) * a->heads + kv * group + g) * a->head;
      float total = state[r * group + g].total;
      for (int i = 0; i < a->head; i++) out[i] = total > 0.0f ? out[i] / total : out[i] * (total == 0.0f ? 0.0f : total);
    }
}

/* Runs of rows; returns how many. `first` has room for rows + 1. */
static int find_runs(const int32_t *slot, const int32_t *position, int rows, int *first) {
  int runs = 0;
  for (int r = 0; r < rows; r++) {
    int is_next = r && slot[r] == slot[r - 1] && position[r] == position[r - 1] + 1;
    if (!is_next || r - first[runs - 1] == QUERY_ROWS) first[runs++] = r;
  }
  first[runs] = rows;
  return runs;
}
