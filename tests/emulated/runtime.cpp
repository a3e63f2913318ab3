// Runs the threads of one block as fibers: each runs until its next warp operation or barrier, in an order that a seed draws anew
// for each interval. Shared memory begins poisoned. Errors: threads that wait at different places, or that end while others wait.
//
// With -DRACES the device code is compiled with -fsanitize=thread, and this file answers the calls that the compiler puts around
// each access. Two threads that touch one byte in the same interval between two barriers, one of them writing and not both by
// atomics, are a race; lanes of one warp are also ordered by __syncwarp, and by no other warp operation. The same calls count the chain of dependent loads from watched memory: a load follows all loads
// that its thread, or one that it has met since, waited for; those inside one `Together` wait for each other's results no more
// than once.
#include "cuda_runtime.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr size_t STACK = 64 << 10, SHARED = 64 << 10;
alignas(64) unsigned char arena[SHARED];
std::string message;  // the first error of a launch
std::mt19937 dice(1);

struct Fiber {
  ucontext_t context;
  unsigned index = 0;
  bool done = false, at_warp = false, at_barrier = false;
  const void* site = nullptr;
  emulated::Warp what{};
  uint64_t value = 0, result = 0;
  int lane = 0;
  size_t shared = 0;             // bytes handed out so far: the same sequence in every thread
  int chain = 0, together = 0;   // longest chain of loads behind this thread; what it was before the current `Together`, or -1
};
std::vector<Fiber> fibers;
unsigned char* stacks = nullptr;
size_t stacks_for = 0;
ucontext_t scheduler;
Fiber* now = nullptr;
const std::function<void()>* body_ = nullptr;
uint64_t interval = 1;
unsigned syncs[32];  // __syncwarp of each warp so far
int longest_chain = 0;

void fail(const std::string& what) {
  if (message.empty()) message = what;
}

void entry() {
  (*body_)();
  now->done = true;
  swapcontext(&now->context, &scheduler);
}

void wait(const void* site) {
  now->site = site;
  swapcontext(&now->context, &scheduler);
}

// All lanes of a warp wait at one operation: give each its answer. False if that is not so.
bool answer(unsigned first) {
  uint64_t ored = 0, sum = 0, votes = 0;
  int chain = 0;
  for (unsigned n = 0; n < 32; ++n) {
    const Fiber& one = fibers[first + n];
    if (!one.at_warp) return fail("lanes of a warp are not all at its operation"), false;
    if (one.site != fibers[first].site) return fail("lanes of a warp wait at different operations"), false;
    sum += one.value, ored |= one.value, votes |= (one.value & 1) << n, chain = std::max(chain, one.chain);
  }
  syncs[first / 32] += fibers[first].what == emulated::SYNC;
  for (unsigned n = 0; n < 32; ++n) {
    Fiber& one = fibers[first + n];
    one.result = one.what == emulated::BALLOT ? votes : one.what == emulated::OR ? ored : one.what == emulated::ADD ? sum
                 : fibers[first + (one.lane & 31)].value;
    one.at_warp = false;
    one.chain = chain;
  }
  return true;
}

void run_warp(unsigned first) {
  std::vector<unsigned> lanes(32);
  std::iota(lanes.begin(), lanes.end(), first);
  for (;;) {
    std::shuffle(lanes.begin(), lanes.end(), dice);
    bool at_warp = false;
    for (unsigned n : lanes) {
      if (fibers[n].done || fibers[n].at_barrier) continue;
      now = &fibers[n];
      swapcontext(&scheduler, &now->context);
      at_warp |= now->at_warp;
    }
    if (!at_warp || !answer(first)) return;
  }
}

}  // namespace

namespace emulated {

unsigned thread() { return now->index; }
int last_error() { return message.empty() ? 0 : 700; }
const char* error_string(int code) { return code ? message.c_str() : "no error"; }

void* shared(size_t bytes, size_t alignment) {
  const size_t at = (now->shared + alignment - 1) / alignment * alignment;
  now->shared = at + bytes;
  if (now->shared > SHARED) abort();
  return arena + at;
}

void barrier(const void* site) {
  now->at_barrier = true;
  wait(site);
}

uint64_t warp(Warp what, uint64_t value, int lane, const void* site) {
  now->what = what, now->value = value, now->lane = lane, now->at_warp = true;
  wait(site);
  return now->result;
}

Together::Together() { now->together = now->chain; }
Together::~Together() { now->together = -1; }

void launch(unsigned threads, const std::function<void()>& body) {
  message.clear();
  longest_chain = 0;
  if (stacks_for < threads) {
    if (stacks) munmap(stacks, stacks_for * STACK);
    stacks = static_cast<unsigned char*>(
        mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    stacks_for = threads;
  }
  memset(arena, 0xA5, SHARED);
  body_ = &body;
  fibers.assign(threads, Fiber{});
  for (unsigned n = 0; n < threads; ++n) {
    Fiber& one = fibers[n];
    one.index = n;
    one.together = -1;
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = stacks + n * STACK;
    one.context.uc_stack.ss_size = STACK;
    one.context.uc_link = &scheduler;
    makecontext(&one.context, entry, 0);
  }
  std::vector<unsigned> warps(threads / 32);
  std::iota(warps.begin(), warps.end(), 0u);
  for (size_t waiting = threads; waiting && message.empty();) {
    ++interval;
    std::shuffle(warps.begin(), warps.end(), dice);
    for (unsigned warp : warps) run_warp(warp * 32);
    waiting = 0;
    const void* site = nullptr;
    int chain = 0;
    for (Fiber& one : fibers) chain = std::max(chain, one.chain);
    for (Fiber& one : fibers) {
      if (one.done) continue;
      if (site && one.site != site) fail("threads wait at different barriers");
      site = one.site;
      one.at_barrier = false;
      one.chain = chain;
      ++waiting;
    }
    if (waiting && waiting < threads) fail("threads ended while others wait at a barrier");
    longest_chain = std::max(longest_chain, chain);
  }
  now = nullptr;
}

}  // namespace emulated

namespace {
std::vector<std::pair<uintptr_t, uintptr_t>> watched;
}

extern "C" {
void emulated_seed(unsigned seed) { dice.seed(seed); }
void emulated_watch(const void* at, size_t bytes) {  // device memory whose loads are counted; no bytes: forget what was watched
  if (!bytes) watched.clear();
  else watched.emplace_back(reinterpret_cast<uintptr_t>(at), reinterpret_cast<uintptr_t>(at) + bytes);
}
int emulated_chain() { return longest_chain; }
}

#ifdef RACES
namespace {

constexpr int NOBODY = -1, SEVERAL = -2;

// Who touched one byte in the current interval. What a warp did before its last __syncwarp is in order with all that it does now,
// so of one warp only the accesses since then are kept; `readers` and `writers` are the warps.
struct Seen {
  int writer = NOBODY, reader = NOBODY, writers = NOBODY, readers = NOBODY;
  unsigned written = 0, read = 0;  // syncs of that warp before it
  bool atomic_write = false;
};
std::unordered_map<uintptr_t, Seen> seen;
uint64_t seen_in = 0;

void count(uintptr_t at) {
  for (const auto& [low, high] : watched)
    if (at >= low && at < high) {
      now->chain = now->together >= 0 ? now->together + 1 : now->chain + 1;
      return;
    }
}

void touch(const void* memory, size_t bytes, bool write, bool atomic) {
  if (!now) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory), own = reinterpret_cast<uintptr_t>(stacks);
  if (at >= own && at < own + stacks_for * STACK) return;  // a thread's own
  if (!write && !watched.empty()) count(at);
  if (interval != seen_in) seen.clear(), seen_in = interval;
  const int me = int(now->index), warp = me / 32;
  for (size_t n = 0; n < bytes; ++n) {
    Seen& one = seen[at + n];
    if (one.writers == warp && one.written != syncs[warp]) one.writer = one.writers = NOBODY;
    if (one.readers == warp && one.read != syncs[warp]) one.reader = one.readers = NOBODY;
    const bool others_wrote = one.writer != NOBODY && one.writer != me, others_read = one.reader != NOBODY && one.reader != me;
    const char* race = nullptr;
    if (write) {
      if (others_wrote && !(atomic && one.atomic_write)) race = "a write after a write";
      if (others_read) race = "a write after a read";
      one.atomic_write = atomic && (one.writer == NOBODY || one.atomic_write);
      one.writer = others_wrote ? SEVERAL : me;
      one.writers = one.writers == NOBODY || one.writers == warp ? warp : SEVERAL;
      one.written = syncs[warp];
    } else {
      if (others_wrote) race = "a read after a write";
      one.reader = others_read ? SEVERAL : me;
      one.readers = one.readers == NOBODY || one.readers == warp ? warp : SEVERAL;
      one.read = syncs[warp];
    }
    if (!race) continue;
    const uintptr_t base = reinterpret_cast<uintptr_t>(arena);
    const bool shared = at >= base && at < base + SHARED;
    char text[160];
    snprintf(text, sizeof text, "race: %s by thread %d, %s memory, byte %zu", race, me, shared ? "shared" : "global",
             size_t(at + n - (shared ? base : 0)));
    fail(text);
  }
}

}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(n)                                                           \
  void __tsan_read##n(void* at) { touch(at, n, false, false); }            \
  void __tsan_write##n(void* at) { touch(at, n, true, false); }            \
  void __tsan_unaligned_read##n(void* at) { touch(at, n, false, false); }  \
  void __tsan_unaligned_write##n(void* at) { touch(at, n, true, false); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(void* at, size_t n) { touch(at, n, false, false); }
void __tsan_write_range(void* at, size_t n) { touch(at, n, true, false); }
#define ATOMICS(bits, T)                                              \
  T __tsan_atomic##bits##_fetch_or(T* at, T value, int) {             \
    touch(at, sizeof(T), true, true);                                 \
    return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);            \
  }                                                                   \
  T __tsan_atomic##bits##_fetch_add(T* at, T value, int) {            \
    touch(at, sizeof(T), true, true);                                 \
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);           \
  }
ATOMICS(32, uint32_t) ATOMICS(64, uint64_t)
uint8_t __tsan_atomic8_load(const uint8_t* at, int) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }  // guards of host statics
}
#endif
