// Numbers in memory, and the threads that share a range of work.
#pragma once
#include <atomic>
#include <stdlib.h>

#include "lanes.h"

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

static INLINE float element(const void* from, int64_t i, int dtype) {
  if (dtype == FLOAT32) return static_cast<const float*>(from)[i];
  uint16_t bits = static_cast<const uint16_t*>(from)[i];
  return dtype == BFLOAT16 ? from_bfloat16(bits) : from_half(bits);
}

static INLINE void set_element(void* to, int64_t i, float value, int dtype) {
  if (dtype == FLOAT32)
    static_cast<float*>(to)[i] = value;
  else
    static_cast<uint16_t*>(to)[i] = dtype == BFLOAT16 ? to_bfloat16(value) : to_half(value);
}

// The pool of threads of the OpenMP runtime that torch has loaded, if there is one: a pool of our own would compete with it.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Calls `use` with ranges that cover [start, stop) on several threads, which take the next range when they are done.
template <class Use>
static void in_parallel(int64_t start, int64_t stop, int64_t chunk, int threads, Use use) {
  struct Work {
    int64_t stop, chunk;
    std::atomic<int64_t> next;
    Use& use;
  } shared = {stop, chunk, {start}, use};
  auto work = [](void* data) {
    Work& shared = *static_cast<Work*>(data);
    for (int64_t from; (from = shared.next.fetch_add(shared.chunk)) < shared.stop;)
      shared.use(from, from + shared.chunk < shared.stop ? from + shared.chunk : shared.stop);
  };
  if (threads < 2 || stop - start <= chunk || !GOMP_parallel)
    work(&shared);  // by chunks too, which a core's cache keeps for the next rows of x
  else
    GOMP_parallel(work, &shared, threads, 0);
}

// Whether `in_parallel` has more than one thread.
extern "C" int partita_has_threads() { return GOMP_parallel != nullptr; }
