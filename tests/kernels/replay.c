/* One call of a handler, as XLA would make it: for processors that an emulator has and this machine lacks.

   replay HANDLER MINOR THREADS < arguments > results. Standard input, int64 each: the number of arguments, and of
   each its rank, its sizes, its bytes, then these; the number of results, and of each rank, sizes, bytes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ffi.h"
#include "pool.h"

enum { MAX_BUFFERS = 96, MAX_RANK = 8 };
static Buffer buffers[2][MAX_BUFFERS];
static Buffer *pointers[2][MAX_BUFFERS];
static int64_t dims[2][MAX_BUFFERS][MAX_RANK], nbytes[2][MAX_BUFFERS];

void *qwen3_moe_matmul(Call *), *qwen3_moe_experts(Call *), *qwen3_moe_layers(Call *);
int qwen3_moe_set_version(int major, int minor);

static void take(void *to, size_t size) {
  if (size && fread(to, size, 1, stdin) != 1) exit(3);
}

static int64_t number(void) {
  int64_t value;
  take(&value, sizeof value);
  return value;
}

static Buffers list(int which) {
  int64_t count = number();
  if (count > MAX_BUFFERS) exit(4);
  for (int i = 0; i < count; i++) {
    int64_t rank = number();
    take(dims[which][i], sizeof(int64_t) * (size_t)rank);
    nbytes[which][i] = number();
    void *data = aligned_alloc(64, ((size_t)nbytes[which][i] + 63) & ~(size_t)63);
    if (which == 0) take(data, (size_t)nbytes[which][i]);
    buffers[which][i] = (Buffer){sizeof(Buffer), NULL, 0, data, rank, dims[which][i]};
    pointers[which][i] = &buffers[which][i];
  }
  return (Buffers){sizeof(Buffers), NULL, count, NULL, pointers[which]};
}

static void *failed(ErrorArguments *error) {
  fprintf(stderr, "%s\n", error->message);
  exit(5);
}

int main(int count, char **words) {
  if (count != 4) return 2;
  int minor = atoi(words[2]), threads = atoi(words[3]);
  Api api = {sizeof api, NULL, {sizeof(ApiVersion), NULL, FFI_MAJOR, minor}, NULL, failed};
  Call call = {.size = sizeof call, .api = &api, .stage = FFI_EXECUTE};
  call.arguments = list(0);
  call.results = list(1);
  if (!qwen3_moe_set_version(FFI_MAJOR, minor) || pool_start(threads) != threads) return 6;
  if (!strcmp(words[1], "qwen3_moe_matmul")) qwen3_moe_matmul(&call);
  else if (!strcmp(words[1], "qwen3_moe_experts")) qwen3_moe_experts(&call);
  else if (!strcmp(words[1], "qwen3_moe_layers")) qwen3_moe_layers(&call);
  else return 2;
  for (int i = 0; i < call.results.count; i++) fwrite(buffers[1][i].data, (size_t)nbytes[1][i], 1, stdout);
  return fflush(stdout) ? 7 : 0;
}
