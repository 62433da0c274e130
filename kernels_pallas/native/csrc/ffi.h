/* XLA's foreign functions on the CPU: the one place that knows the layout of a call.

   Declared after xla/ffi/api/c_api.h, which jaxlib brings (jax.ffi.include_dir()), of the minor versions
   3 (JAX 0.10.2) and 4 (JAX 0.11.2). library.py reads the version there, refuses any other, and hands it to
   `qwen3_moe_set_version`. XLA asks a handler for the version that it was made for before it calls it (the
   metadata query), refuses one that is not its own, and names its own again in each call. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { FFI_MAJOR = 0, FFI_OLDEST_MINOR = 3, FFI_NEWEST_MINOR = 4 };
enum { FFI_METADATA = 1, FFI_EXECUTE = 3, FFI_INTERNAL = 13, FFI_UNIMPLEMENTED = 12 };

typedef struct Extension {
  size_t size;
  int type;
  struct Extension *next;
} Extension;

typedef struct {
  size_t size;
  Extension *extensions;
  int major, minor;
} ApiVersion;

typedef struct {
  size_t size;
  ApiVersion version;
  uint32_t traits;
  int64_t state_type;
} Metadata;

typedef struct {
  Extension base;
  Metadata *metadata;
} MetadataExtension;

typedef struct {
  size_t size;
  Extension *extensions;
  const char *message;
  int code;
} ErrorArguments;

typedef struct {
  size_t size;
  Extension *extensions;
  ApiVersion version;
  const void *internal;
  void *(*create_error)(ErrorArguments *);
} Api;

typedef struct {
  size_t size;
  Extension *extensions;
  int dtype;
  void *data;
  int64_t rank;
  int64_t *dims;
} Buffer;

typedef struct {
  size_t size;
  Extension *extensions;
  int64_t count;
  int *types;
  Buffer **buffer;
} Buffers;

typedef struct {
  size_t size;
  Extension *extensions;
  const Api *api;
  void *context;
  int stage;
  Buffers arguments, results;
} Call;

static inline void *ffi_error(const Call *call, const char *message, int code) {
  ErrorArguments arguments = {sizeof arguments, NULL, message, code};
  return call->api->create_error(&arguments);
}

static int ffi_minor = -1; /* what the header of the installed jaxlib says; none that there is until then */

static inline int ffi_is_known(const ApiVersion *v) { return v->major == FFI_MAJOR && v->minor == ffi_minor; }

/* Whether the call was a question, and is answered. */
static inline int ffi_answer(Call *call) {
  for (Extension *e = call->extensions; e; e = e->next) {
    if (e->type != FFI_METADATA) continue;
    Metadata *metadata = ((MetadataExtension *)e)->metadata;
    metadata->version.major = FFI_MAJOR;
    metadata->version.minor = ffi_minor;
    metadata->traits = 0;
    metadata->state_type = 0;
    return 1;
  }
  return 0;
}

static inline void *argument(const Call *call, int64_t i) { return call->arguments.buffer[i]->data; }
static inline int64_t argument_dim(const Call *call, int64_t i, int axis) { return call->arguments.buffer[i]->dims[axis]; }
static inline void *result(const Call *call, int64_t i) { return call->results.buffer[i]->data; }
