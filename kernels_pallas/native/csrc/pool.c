/* One counter deals out the pieces. A thread without work spins for some microseconds, for the next call comes
   soon while a token is written, and then sleeps (a futex; elsewhere than on Linux a condition). A thread that the system has put aside while it
   holds no piece is not waited for, so other programs on the machine cost their share and no more. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#define MAX_PIECES ((1 << 20) - 4096) /* more could be asked for by threads that come too late */
#define SPINS 20000                  /* about 50 us */

/* Bits 0-19: the next piece. 20-39: how many there are. 40-63: the number of the call. A thread that has got a
   piece below the number knows from this word alone that its call is not over. */
static _Atomic uint64_t ticket __attribute__((aligned(64)));
static _Atomic int finished __attribute__((aligned(64)));
static _Atomic int sleepers __attribute__((aligned(64)));
static _Atomic uint32_t calls __attribute__((aligned(64))); /* what sleepers wait on */
static piece_function the_function;
static void *the_context;
static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;
static int workers;
static pid_t owner;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  __asm__ volatile("yield");
#endif
}

#ifdef __linux__
static void sleep_since(uint32_t seen) { syscall(SYS_futex, &calls, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0); }
static void wake_all(void) { syscall(SYS_futex, &calls, FUTEX_WAKE_PRIVATE, workers, NULL, NULL, 0); }
#else
static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t alarm_clock = PTHREAD_COND_INITIALIZER;
static void sleep_since(uint32_t seen) {
  pthread_mutex_lock(&bed);
  while (atomic_load(&calls) == seen) pthread_cond_wait(&alarm_clock, &bed);
  pthread_mutex_unlock(&bed);
}
static void wake_all(void) {
  pthread_mutex_lock(&bed);
  pthread_cond_broadcast(&alarm_clock);
  pthread_mutex_unlock(&bed);
}
#endif

/* Works until no piece is left. */
static void work(void) {
  for (;;) {
    uint64_t taken = atomic_fetch_add_explicit(&ticket, 1, memory_order_acq_rel);
    uint32_t piece = taken & 0xfffff, pieces = (taken >> 20) & 0xfffff;
    if (piece >= pieces) return;
    the_function(the_context, (int)piece);
    atomic_fetch_add_explicit(&finished, 1, memory_order_release);
  }
}

static int has_work(void) {
  uint64_t now = atomic_load_explicit(&ticket, memory_order_relaxed);
  return (now & 0xfffff) < ((now >> 20) & 0xfffff);
}

static void *worker(void *unused) {
  (void)unused;
  for (;;) {
    int spins = 0;
    while (!has_work() && spins < SPINS) {
      pause_briefly();
      spins++;
    }
    if (has_work()) {
      work();
      continue;
    }
    uint32_t seen = atomic_load(&calls);
    atomic_fetch_add(&sleepers, 1);
    if (!has_work()) sleep_since(seen);
    atomic_fetch_sub(&sleepers, 1);
  }
  return NULL;
}

int pool_start(int threads) {
  pthread_mutex_lock(&in_use);
  if (owner != getpid()) workers = 0; /* a fork has none of its parent's threads */
  owner = getpid();
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
  while (workers < threads - 1) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, NULL)) break;
    pthread_detach(thread);
    workers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  int count = workers + 1;
  pthread_mutex_unlock(&in_use);
  return count;
}

void pool_run(piece_function function, void *context, int pieces) {
  if (pieces <= 1 || workers == 0 || pieces > MAX_PIECES || pthread_mutex_trylock(&in_use)) {
    for (int piece = 0; piece < pieces; piece++) function(context, piece); /* another call has the threads */
    return;
  }
  static uint64_t number;
  the_function = function;
  the_context = context;
  atomic_store_explicit(&finished, 0, memory_order_relaxed);
  number = (number + 1) & 0xffffff;
  atomic_store_explicit(&ticket, number << 40 | (uint64_t)pieces << 20, memory_order_release);
  atomic_fetch_add(&calls, 1);
  if (atomic_load(&sleepers)) wake_all();
  work();
  int spins = 0;
  while (atomic_load_explicit(&finished, memory_order_acquire) < pieces) {
    pause_briefly();
    if (++spins % 4096 == 0) sched_yield(); /* the thread that holds the last piece may need this core */
  }
  pthread_mutex_unlock(&in_use);
}
