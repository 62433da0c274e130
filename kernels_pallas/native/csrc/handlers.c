/* What XLA calls. Each handler's first argument, int32, says what the others are (operands.py writes it). */
#include <stdatomic.h>

#include "ffi.h"
#include "layers.h"

#define BEGIN(call)                                                                             \
  if (ffi_answer(call)) return NULL;                                                            \
  if ((call)->stage != FFI_EXECUTE) return NULL;                                                \
  if (!ffi_is_known(&(call)->api->version))                                                     \
    return ffi_error(call, "qwen3_moe_jax: this XLA calls in a form that is not known", FFI_UNIMPLEMENTED);

static void *no_memory(const Call *call) { return ffi_error(call, "qwen3_moe_jax: out of memory", FFI_INTERNAL); }

enum { MAX_STACKS = 64 };

static Matrix stack_at(const Call *call, const int32_t *at) { /* type, first argument, number of arguments */
  Matrix m = {.type = at[0]};
  for (int i = 0; i < at[2]; i++) m.array[i] = argument(call, at[1] + i);
  return m;
}

/* The option `which` of a choice; *meta has the number of options, then each, and is moved on. */
static Matrix option_of(const Call *call, const int32_t **meta, const int32_t *which_and_first, int rows, int columns) {
  Matrix m = stack_at(call, *meta + 1 + 3 * which_and_first[0]);
  *meta += 1 + 3 * (*meta)[0];
  m.first = which_and_first[1];
  m.rows = rows;
  m.columns = columns;
  return m;
}

/* meta: N, K, options. Then int32 (which, first), x [T, K], arrays. Gives [T, N]. */
void *qwen3_moe_matmul(Call *call) {
  BEGIN(call)
  const int32_t *meta = argument(call, 0), *options = meta + 2;
  int rows = (int)argument_dim(call, 2, 0);
  Matrix m = option_of(call, &options, argument(call, 1), meta[0], meta[1]);
  Arena arena = arena_of(room_for_activations(rows, m.columns));
  if (!arena.base) return no_memory(call);
  matmul(&arena, argument(call, 2), rows, &m, result(call, 0));
  return NULL;
}

/* meta: E, F, D, options of gate, up, down. Then int32 [3, 2] (which, first), x [T, D], ids and weights [T, X],
   arrays. Gives [T, D]. */
void *qwen3_moe_experts(Call *call) {
  BEGIN(call)
  const int32_t *meta = argument(call, 0), *options = meta + 3, *places = argument(call, 1);
  int experts = meta[0], inner = meta[1], width = meta[2];
  int tokens = (int)argument_dim(call, 3, 0), choices = (int)argument_dim(call, 3, 1);
  Matrix gate = option_of(call, &options, places, inner, width);
  Matrix up = option_of(call, &options, places + 2, inner, width);
  Matrix down = option_of(call, &options, places + 4, width, inner);
  Arena arena = arena_of(room_for_activations(tokens, width) + room_for_experts(tokens, choices, experts, inner, width));
  if (!arena.base) return no_memory(call);
  Activations x = quantized(&arena, argument(call, 2), tokens, width);
  run_experts(&arena, (Experts){.gate = &gate, .up = &up, .down = &down, .ids = argument(call, 3),
                                .weights = argument(call, 4), .tokens = tokens, .choices = choices,
                                .experts = experts, .x = x, .out = result(call, 0)});
  return NULL;
}

/* meta: L, D, heads, kv heads, head, E, X, F, forced or not, eps (its bits), stacks, each stack, the table. Then
   x [R, D], cos, sin, slot, position, four stacks of norms, forced ids, k, v (also results), arrays.
   Gives x, k, v, ids [L, R, X]. */
void *qwen3_moe_layers(Call *call) {
  BEGIN(call)
  const int32_t *meta = argument(call, 0);
  Network n = {.layers = meta[0], .width = meta[1], .heads = meta[2], .kv_heads = meta[3], .head = meta[4],
               .experts = meta[5], .choices = meta[6], .inner = meta[7]};
  memcpy(&n.eps, meta + 9, sizeof n.eps);
  n.rows = (int)argument_dim(call, 1, 0);
  n.cos = argument(call, 2), n.sin = argument(call, 3);
  n.slot = argument(call, 4), n.position = argument(call, 5);
  n.input_norm = argument(call, 6), n.post_norm = argument(call, 7);
  n.q_norm = argument(call, 8), n.k_norm = argument(call, 9);
  n.forced = meta[8] ? argument(call, 10) : NULL;
  n.slots = (int)argument_dim(call, 11, 1), n.length = (int)argument_dim(call, 11, 2);
  n.x = result(call, 0), n.k_cache = result(call, 1), n.v_cache = result(call, 2), n.ids = result(call, 3);
  for (int i = 0; i < 2; i++) { /* XLA keeps the caches in place where it can */
    size_t nbytes = sizeof(float) * (size_t)n.kv_heads * (size_t)n.head * (size_t)n.length * (size_t)n.slots * (size_t)n.layers;
    if (result(call, 1 + i) != argument(call, 11 + i)) memcpy(result(call, 1 + i), argument(call, 11 + i), nbytes);
  }
  if (n.x != argument(call, 1)) memcpy(n.x, argument(call, 1), sizeof(float) * (size_t)n.rows * (size_t)n.width);
  Matrix stacks[MAX_STACKS];
  for (int i = 0; i < meta[10]; i++) stacks[i] = stack_at(call, meta + 11 + 3 * i);
  return run_layers(&n, stacks, meta + 11 + 3 * meta[10]) ? NULL : no_memory(call);
}

/* Takes the version of XLA's interface; returns 0 where calls of that version are not known here. */
int qwen3_moe_set_version(int major, int minor) {
  int is_known = major == FFI_MAJOR && minor >= FFI_OLDEST_MINOR && minor <= FFI_NEWEST_MINOR;
  if (is_known) ffi_minor = minor;
  return is_known;
}

/* A product without XLA: x [T, K] times a whole matrix [N, K]; for the tests of forms that are not the best one. */
void qwen3_moe_products(int type, int rows, int columns, const void *const *arrays, int count, const float *x,
                        int tokens, float *out) {
  Matrix m = {.type = type, .rows = rows, .columns = columns};
  for (int i = 0; i < count; i++) m.array[i] = arrays[i];
  Arena arena = arena_of(room_for_activations(tokens, columns));
  if (arena.base) matmul(&arena, x, tokens, &m, out);
}

/* Attention without XLA, for the same tests; sizes: rows, heads, kv heads, head, length. */
void qwen3_moe_attention(const int *sizes, const float *q, const float *k, const float *v, const int32_t *slot,
                         const int32_t *position, float *out) {
  Attention a = {.q = q, .k = k, .v = v, .slot = slot, .position = position, .rows = sizes[0], .heads = sizes[1],
                 .kv_heads = sizes[2], .head = sizes[3], .length = sizes[4], .out = out};
  Arena arena = arena_of(room_for_sections(a.rows, a.heads, a.head, a.length) + sizeof(int) * (size_t)(a.rows + 1));
  if (arena.base) attend(&arena, a, take(&arena, sizeof(int) * (size_t)(a.rows + 1)));
}

/* The sum of words of memory, read by all threads: for the speed of a read. */
typedef struct {
  const uint64_t *words;
  size_t count;
  _Atomic uint64_t sum;
} Read;
enum { WORDS_PER_PIECE = 1 << 17, WORDS_AT_ONCE = 32 };
typedef uint64_t eight_words __attribute__((vector_size(64), aligned(8)));

static void read_piece(void *context, int piece) {
  Read *r = context;
  size_t i = (size_t)piece * WORDS_PER_PIECE, end = MIN(r->count, i + WORDS_PER_PIECE);
  eight_words part[4] = {{0}};
  for (; i + WORDS_AT_ONCE <= end; i += WORDS_AT_ONCE)
    UNROLL(4) for (int n = 0; n < 4; n++) part[n] += *(const eight_words *)(r->words + i + 8 * n);
  eight_words all = (part[0] + part[1]) + (part[2] + part[3]);
  uint64_t sum = 0;
  for (int n = 0; n < 8; n++) sum += all[n];
  for (; i < end; i++) sum += r->words[i];
  atomic_fetch_add_explicit(&r->sum, sum, memory_order_relaxed);
}

uint64_t qwen3_moe_read(const uint64_t *words, size_t count) {
  Read r = {.words = words, .count = count};
  pool_run(read_piece, &r, (int)((count + WORDS_PER_PIECE - 1) / WORDS_PER_PIECE));
  return atomic_load(&r.sum);
}
