/* Causal attention over a float32 cache: a running softmax over blocks of keys, float32 throughout.

   Keys come in sections of SECTION, each with a softmax of its own; the sections of a row are added up in their
   order. So few rows with long contexts are shared by many threads, and a row's bits are the same whether its
   sections were dealt out or came one after the other beside other rows. */
#pragma once
#include "products.h"

enum { KEYS = 128, SECTION = 1024, MAX_HEAD = 128, QUERY_ROWS = 16, MAX_GROUP = 64, MORE = 2 * MAX_GROUP * MAX_HEAD };

/* Heads that share what is read of a key, keys that share what is read of a head, and vectors of values that are
   summed at once: as many sums as registers hold, 32 of them with AVX-512, 16 halves of a vector with AVX2, 32
   quarters with NEON. */
#if defined(FORM_AVX512)
enum { HEADS = 4, NEAR = 4, WIDE = 4 };
#else
enum { HEADS = 2, NEAR = 2, WIDE = 2 };
#endif

typedef struct {
  const float *q;           /* [rows, heads, head] */
  const float *k, *v;       /* one layer's [slots, length, kv heads, head] */
  const int32_t *slot, *position;
  int rows, heads, kv_heads, head;
  int64_t length;
  float *out; /* [rows, heads, head] */
  const int *run_first; /* rows of one slot with positions one after the other, in pieces of QUERY_ROWS */
  int runs;
  /* where sections are dealt out: of each run, KV head and section */
  int sections;
  struct Softmax *states; /* [runs, kv heads, sections, rows * group] */
  float *partial;         /* the same, then head */
} Attention;

/* Weights are relative to `peak`; `total` is their sum. */
typedef struct Softmax {
  float peak, total;
} Softmax;

INLINE vf sum_of_sixteen(const vf *part) {
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

/* Dot products of H heads with sixteen keys: score[h], a lane a key. */
INLINE void sixteen_scores(const float *q, const float *const *key, const int head, const int H, vf *score) {
  vf part[HEADS][LANES];
  for (int first = 0; first < LANES; first += NEAR) {
    vf near[HEADS][NEAR];
    UNROLL(4) for (int h = 0; h < H; h++)
      UNROLL(4) for (int n = 0; n < NEAR; n++) near[h][n] = splat(0.0f);
    for (int i = 0; i < head; i += LANES) {
      vf keys[NEAR];
      UNROLL(4) for (int n = 0; n < NEAR; n++) keys[n] = load(key[first + n] + i);
      UNROLL(4) for (int h = 0; h < H; h++) {
        vf query = load(q + h * head + i);
        UNROLL(4) for (int n = 0; n < NEAR; n++) near[h][n] += query * keys[n];
      }
    }
    UNROLL(4) for (int h = 0; h < H; h++)
      UNROLL(4) for (int n = 0; n < NEAR; n++) part[h][first + n] = near[h][n];
  }
  UNROLL(4) for (int h = 0; h < H; h++) score[h] = sum_of_sixteen(part[h]);
}

/* Takes `count` keys, KEYS at most, into the running softmax of H heads of one query. */
INLINE void take_keys(const float *q, const float *k, const float *v, int64_t stride, int count, float scale,
                      const int head, const int H, Softmax *state, float *RESTRICT out) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int vectors = (count + LANES - 1) / LANES;
  float weight[HEADS][KEYS], shrink[HEADS];
  vf peak[HEADS];
  for (int h = 0; h < H; h++) peak[h] = splat(-__builtin_inff());
  for (int n = 0; n < vectors; n++) {
    const float *key[LANES]; /* no key past the last is read */
    for (int i = 0; i < LANES; i++) key[i] = k + MIN(n * LANES + i, count - 1) * stride;
    vf score[HEADS];
    sixteen_scores(q, key, head, H, score);
    for (int h = 0; h < H; h++) {
      vf scaled = choose(lane + n * LANES < count, score[h] * scale, splat(-__builtin_inff()));
      store(weight[h] + n * LANES, scaled);
      peak[h] = vmax(scaled, peak[h]);
    }
  }
  for (int h = 0; h < H; h++) {
    float top = largest(peak[h]), new_peak = top > state[h].peak ? top : state[h].peak;
    shrink[h] = vexp(splat(state[h].peak - new_peak))[0];
    vf total = splat(0.0f);
    for (int n = 0; n < vectors; n++) {
      vf w = vexp(load(weight[h] + n * LANES) - new_peak);
      total += w;
      store(weight[h] + n * LANES, w);
    }
    state[h].total = state[h].total * shrink[h] + sum(total);
    state[h].peak = new_peak;
  }
  for (int first = 0; first < head; first += WIDE * LANES) {
    vf acc[HEADS][WIDE];
    UNROLL(4) for (int h = 0; h < H; h++)
      UNROLL(4) for (int i = 0; i < WIDE; i++) acc[h][i] = load(out + h * head + first + i * LANES) * shrink[h];
    for (int n = 0; n < count; n++) {
      vf value[WIDE];
      UNROLL(4) for (int i = 0; i < WIDE; i++) value[i] = load(v + n * stride + first + i * LANES);
      UNROLL(4) for (int h = 0; h < H; h++)
        UNROLL(4) for (int i = 0; i < WIDE; i++) acc[h][i] += value[i] * weight[h][n];
    }
    UNROLL(4) for (int h = 0; h < H; h++)
      UNROLL(4) for (int i = 0; i < WIDE; i++) store(out + h * head + first + i * LANES, acc[h][i]);
  }
}

/* The last key that a row attends to; none past the cache's end is read, wherever a row of padding is. */
INLINE int64_t last_key(const Attention *a, int row) { return MIN(a->position[row], a->length - 1); }

typedef void (*keys_function)(const float *, const float *, const float *, int64_t, int, float, Softmax *, float *);
#define OF_HEADS(head, H)                                                                                        \
  static __attribute__((noinline)) void take_keys_##head##_##H(const float *q, const float *k, const float *v,   \
                                                               int64_t stride, int count, float scale,           \
                                                               Softmax *state, float *out) {                     \
    take_keys(q, k, v, stride, count, scale, head, H, state, out);                                               \
  }
OF_HEADS(64, 1)
OF_HEADS(128, 1)
#if defined(FORM_AVX512)
OF_HEADS(64, 4)
OF_HEADS(128, 4)
static const keys_function several_heads[2] = {take_keys_64_4, take_keys_128_4};
#else
OF_HEADS(64, 2)
OF_HEADS(128, 2)
static const keys_function several_heads[2] = {take_keys_64_2, take_keys_128_2};
#endif
static const keys_function one_head[2] = {take_keys_64_1, take_keys_128_1};

/* One section of keys for rows first_row ... + rows - 1 and the heads of one KV head: states [rows, group] and
   out [rows, group, head], where a row's begins `apart` floats after that before it. */
static void take_section(const Attention *a, int first_row, int rows, int kv, int section, Softmax *states,
                         float *out, int64_t apart) {
  int group = a->heads / a->kv_heads, head = a->head;
  int64_t stride = (int64_t)a->kv_heads * head;
  int64_t base = (int64_t)a->slot[first_row] * a->length * stride + (int64_t)kv * head;
  float scale = 1.0f / __builtin_sqrtf((float)head);
  for (int r = 0; r < rows; r++) {
    for (int g = 0; g < group; g++) states[r * group + g] = (Softmax){-__builtin_inff(), 0.0f};
    memset(out + r * apart, 0, sizeof(float) * (size_t)(group * head));
  }
  int64_t last = MIN(last_key(a, first_row + rows - 1), (int64_t)(section + 1) * SECTION - 1);
  for (int64_t first = (int64_t)section * SECTION; first <= last; first += KEYS)
    for (int r = 0; r < rows; r++) {
      int count = (int)MIN(KEYS, last_key(a, first_row + r) - first + 1);
      if (count <= 0) continue;
      const float *q = a->q + ((int64_t)(first_row + r) * a->heads + kv * group) * head;
      for (int g = 0; g < group;) {
        int H = group - g >= HEADS ? HEADS : 1;
        (H == 1 ? one_head : several_heads)[head == 128](
            q + g * head, a->k + base + first * stride, a->v + base + first * stride, stride, count, scale,
            states + r * group + g, out + r * apart + g * head);
        g += H;
      }
    }
}

/* Adds a section's softmax to that of the sections before it. */
INLINE void add_section(Softmax *state, float *out, const Softmax *next, const float *more, int head) {
  if (next->peak == -__builtin_inff() && next->total == 0.0f) return; /* it has no key for this row */
  float peak = next->peak > state->peak ? next->peak : state->peak;
  float before = vexp(splat(state->peak - peak))[0], after = vexp(splat(next->peak - peak))[0];
  for (int i = 0; i < head; i += LANES) store(out + i, load(out + i) * before + load(more + i) * after);
  *state = (Softmax){peak, state->total * before + next->total * after};
}

INLINE int sections_of(const Attention *a, int run) {
  return (int)(last_key(a, a->run_first[run + 1] - 1) / SECTION + 1);
}

INLINE void divide(const Softmax *state, float *out, int head) {
  float total = state->total;
  for (int i = 0; i < head; i++) out[i] = total > 0.0f ? out[i] / total : out[i] * (total == 0.0f ? 0.0f : total);
}

/* Queries of a run of rows and of the heads that read one KV head, section after section. */
static void attention_piece(void *context, int piece) {
  const Attention *a = context;
  int run = piece / a->kv_heads, kv = piece % a->kv_heads, group = a->heads / a->kv_heads, head = a->head;
  int first_row = a->run_first[run], rows = a->run_first[run + 1] - first_row;
  Softmax states[QUERY_ROWS * MAX_GROUP], next[QUERY_ROWS * MAX_GROUP];
  float *out = a->out + ((int64_t)first_row * a->heads + kv * group) * head;
  int64_t apart = (int64_t)a->heads * head;
  take_section(a, first_row, rows, kv, 0, states, out, apart);
  float more[MORE];
  int at_once = MIN(rows, MORE / (group * head));
  for (int section = 1; section < sections_of(a, run); section++)
    for (int begin = 0; begin < rows; begin += at_once) {
      int some = MIN(at_once, rows - begin);
      take_section(a, first_row + begin, some, kv, section, next, more, group * head);
      for (int r = 0; r < some; r++)
        for (int g = 0; g < group; g++)
          add_section(states + (begin + r) * group + g, out + (begin + r) * apart + g * head, next + r * group + g,
                      more + (r * group + g) * head, head);
    }
  for (int r = 0; r < rows; r++)
    for (int g = 0; g < group; g++) divide(states + r * group + g, out + r * apart + g * head, head);
}

/* One section of it: for a run of one row. */
static void section_piece(void *context, int piece) {
  const Attention *a = context;
  int section = piece % a->sections, kv = piece / a->sections % a->kv_heads, run = piece / a->sections / a->kv_heads;
  int group = a->heads / a->kv_heads;
  if (section < sections_of(a, run))
    take_section(a, a->run_first[run], 1, kv, section, a->states + (int64_t)piece * group,
                 a->partial + (int64_t)piece * group * a->head, 0);
}

static void join_sections(void *context, int row) {
  const Attention *a = context;
  int group = a->heads / a->kv_heads, head = a->head;
  for (int n = 0; n < a->heads; n++) {
    int64_t place = ((int64_t)row * a->kv_heads + n / group) * a->sections * group + n % group;
    float *out = a->out + ((int64_t)row * a->heads + n) * head;
    Softmax state = a->states[place];
    memcpy(out, a->partial + place * head, sizeof(float) * (size_t)head);
    for (int section = 1; section < sections_of(a, row); section++) {
      int64_t next = place + (int64_t)section * group;
      add_section(&state, out, a->states + next, a->partial + next * head, head);
    }
    divide(&state, out, head);
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

enum { FEW_ROWS = 16 };

/* Room for what is dealt out: FEW_ROWS rows at most. */
static size_t room_for_sections(int rows, int heads, int head, int64_t length) {
  size_t sections = (size_t)((length + SECTION - 1) / SECTION);
  return rows > FEW_ROWS || sections < 2
             ? 128
             : (size_t)rows * (size_t)heads * sections * (sizeof(Softmax) + sizeof(float) * (size_t)head) + 256;
}

/* Attention of all rows; a.run_first has room for rows + 1. */
static void attend(Arena *arena, Attention a, int *first) {
  a.runs = find_runs(a.slot, a.position, a.rows, first);
  a.run_first = first;
  a.sections = 1;
  for (int run = 0; run < a.runs; run++) a.sections = MAX(a.sections, sections_of(&a, run));
  if (a.sections < 2 || a.runs < a.rows || a.rows > FEW_ROWS) { /* a run of several rows is work enough */
    pool_run(attention_piece, &a, a.runs * a.kv_heads);
    return;
  }
  size_t states = (size_t)a.rows * (size_t)a.heads * (size_t)a.sections;
  a.states = take(arena, sizeof(Softmax) * states);
  a.partial = take(arena, sizeof(float) * states * (size_t)a.head);
  pool_run(section_piece, &a, a.runs * a.kv_heads * a.sections);
  each_row(join_sections, &a, a.rows);
}
