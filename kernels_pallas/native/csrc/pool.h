/* Threads that take small pieces of work in turn. */
#pragma once

typedef void (*piece_function)(void *context, int piece);

/* Starts threads so that, with the one that asks, `threads` work; returns how many do. Once per process. */
int pool_start(int threads);

/* Calls function(context, 0) ... (context, pieces - 1), on whichever threads are free, and returns after
   all of them. What a piece computes must not depend on the thread or the order. */
void pool_run(piece_function function, void *context, int pieces);
