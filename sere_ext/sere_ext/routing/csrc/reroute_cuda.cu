// The phases of reroute_core.h in one block, one launch per layer: a lane per slot, a warp per expert that needs a stand-in.
//
// Everything that a policy change touches is read from device memory at run time, so a captured CUDA graph follows it.
// Nothing depends on the order of threads: they meet in sets and integer sums alone.
//
// At one token the time of a launch is its chain of loads, each of which waits for the one before. Loads that do not depend on
// each other stand in one block marked SERE_TOGETHER; the emulator (tests/emulated) counts such a block as one link, and every
// other load from global memory as a link of its own.
#include "reroute_core.h"

#include <cuda_runtime.h>

#ifndef SERE_TOGETHER
#define SERE_TOGETHER
#endif

namespace sere {

constexpr int THREADS = 512;
constexpr unsigned ALL = 0xffffffffu;
constexpr int CHUNKS = 8;  // neighbours that a lane loads at once

// A value per slot of a token: each lane holds that of its own slot.
template <class T>
struct LaneRow {
  T mine;
  __device__ __forceinline__ T& operator[](int) { return mine; }
  __device__ __forceinline__ const T& operator[](int) const { return mine; }
};

// G lanes of a warp hold the slots of a token, one each. Every method needs all lanes of the warp.
template <int G>
struct Lanes {
  template <class T>
  using Row = LaneRow<T>;
  int slot, first, k;
  __device__ __forceinline__ explicit Lanes(int k) : slot(threadIdx.x % G), first(threadIdx.x % 32 / G * G), k(k) {}
  __device__ __forceinline__ bool there(int j) const { return j < k; }
  __device__ __forceinline__ bool any(bool condition) const { return __ballot_sync(ALL, condition) != 0; }
  __device__ __forceinline__ void settle() const { __syncwarp(); }
  template <class T>
  __device__ __forceinline__ T at(const Row<T>& row, int i) const { return __shfl_sync(ALL, row.mine, first + i); }
  template <class F>
  __device__ __forceinline__ void each(F&& f) const { f(slot); }
  template <class F>
  __device__ __forceinline__ uint32_t which(F&& f) const {
    const uint32_t found = __ballot_sync(ALL, f(slot)) >> first;
    return G == 32 ? found : found & ((1u << (G % 32)) - 1);
  }
  template <class Id>  // one atomic per word and warp
  __device__ __forceinline__ void join(uint32_t* set, int words, const Row<Id>& id, uint32_t slots) const {
    const bool mine = has(slots, slot);
    const int expert = mine ? int(id.mine) : 0;
    SERE_ROLLED
    for (int word = 0; word < words; ++word) {
      const uint32_t found = __reduce_or_sync(ALL, mine && expert >> 5 == word ? 1u << (expert & 31) : 0u);
      if (threadIdx.x % 32 == 0 && found) atomicOr(set + word, found);
    }
  }
  __device__ __forceinline__ void sum(int32_t* total, int n) const {
    const int found = __reduce_add_sync(ALL, slot == 0 ? n : 0);
    if (threadIdx.x % 32 == 0 && found) atomicAdd(total, found);
  }
  __device__ __forceinline__ void add(unsigned long long* total, unsigned long long n) const { atomicAdd(total, n); }
};

// Fill freed slots, from the left, with the token's best-scored active experts that it does not hold yet (ties: lower id): each
// lane keeps the best of every G-th expert, and the group takes the best of those. Returns the slots that nothing was left for.
template <class Id, int G>
__device__ __noinline__ uint32_t refill(const Lanes<G>& slots, const Layer& layer, const Call& call, const uint32_t* active,
                                        int64_t t, uint32_t stays, uint32_t freed, int anchor, float anchor_weight,
                                        LaneRow<Id>& id, LaneRow<float>& weight) {
  constexpr int OPEN = (MAX_EXPERTS / G + 31) / 32;
  uint32_t open[OPEN];  // bit n of them: this lane's n-th expert, slot + n * G, is active and the token does not hold it
#pragma unroll
  for (int part = 0; part < OPEN; ++part) {
    open[part] = 0;
    SERE_ROLLED
    for (int n = part * 32; n < part * 32 + 32 && slots.slot + n * G < layer.experts; ++n)
      open[part] |= uint32_t(has(active, slots.slot + n * G)) << (n % 32);
  }
  for (int i = 0; i < call.top_k; ++i) {
    const int expert = int(slots.at(id, i));
    const int n = expert / G;
#pragma unroll
    for (int part = 0; part < OPEN; ++part)
      if (has(stays, i) && expert % G == slots.slot && n / 32 == part) open[part] &= ~(1u << (n % 32));
  }
  const float reference = freed ? logit(call, t, anchor) : 0.0f;
  float score = 0.0f;
  int best = -1;
  bool stale = freed != 0;
  uint32_t dropped = 0;
  while (slots.any(freed != 0)) {
    if (stale) {
      best = -1;
#pragma unroll
      for (int part = 0; part < OPEN; ++part)
        for (uint32_t rest = open[part]; rest; rest &= rest - 1) {
          const int expert = slots.slot + (part * 32 + lowest(rest)) * G;
          const float value = logit(call, t, expert);
          if (best < 0 || value > score) score = value, best = expert;
        }
      stale = false;
    }
    float most = score;
    int choice = best;
    for (int step = 1; step < G; step *= 2) {
      const float other = __shfl_xor_sync(ALL, most, step);
      const int who = __shfl_xor_sync(ALL, choice, step);
      if (who >= 0 && (choice < 0 || other > most || (other == most && who < choice))) most = other, choice = who;
    }
    if (choice < 0) {  // the same in the group
      dropped |= freed;
      freed = 0;
    } else if (freed) {
      if (slots.slot == lowest(freed)) {
        id.mine = Id(choice);
        weight.mine = anchor_weight * ratio(layer, most, reference);
      }
      if (choice % G == slots.slot) {
        const int n = choice / G;
#pragma unroll
        for (int part = 0; part < OPEN; ++part)
          if (n / 32 == part) open[part] &= ~(1u << (n % 32));
        stale = true;
      }
      freed &= freed - 1;
    }
  }
  return dropped;
}

// The first of an expert's neighbours that is active and similar enough; else the expert itself. The whole warp looks at
// 32 * CHUNKS neighbours at a time.
__device__ __forceinline__ int stand_in(const Layer& layer, const uint32_t* active, int row, int expert) {
  const int lane = threadIdx.x % 32, others = layer.experts - 1;
  const uint16_t* neighbours = layer.neighbours + int64_t(expert) * others;
  int limit = others;
  for (int base = 0; base < limit; base += 32 * CHUNKS) {
    int near[CHUNKS], similar = limit;
    SERE_TOGETHER {
      if (base == 0) similar = layer.limits[row * layer.experts + expert];
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int n = base + c * 32 + lane;
        near[c] = n < others ? neighbours[n] : expert;
      }
    }
    limit = similar;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int from = base + c * 32;
      const unsigned hit = __ballot_sync(ALL, from + lane < limit && has(active, near[c]));
      if (hit) return __shfl_sync(ALL, near[c], __ffs(hit) - 1);
    }
  }
  return expert;
}

template <class Id, int G>
__global__ void __launch_bounds__(THREADS, 1) run(const __grid_constant__ Layer layer, const __grid_constant__ Call call) {
  __shared__ Batch batch;
  const Lanes<G> slots(call.top_k);
  const int me = threadIdx.x, lane = me % 32, warp = me / 32, used = words(layer);
  constexpr int TILE = THREADS / G, WARP_TILE = 32 / G;  // tokens that the block, and a warp, work on at once
  const int64_t mine = me / G;                           // this lane's token in a tile
  const bool one_tile = call.tokens <= TILE;
  SERE_ROLLED
  for (int n = me; n < int(offsetof(Batch, mass) / sizeof(uint32_t)); n += THREADS) reinterpret_cast<uint32_t*>(&batch)[n] = 0;
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // until here nothing was read that a launch before this one writes
#endif

  int32_t row[COLUMNS] = {};
  Token<Id, Lanes<G>> token;
  int64_t real;
  SERE_TOGETHER {
    real = real_tokens(layer, call);
    if (lane < MAX_BUCKETS)
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) row[n] = layer.table[lane * COLUMNS + n];
    token = read<Id>(slots, layer, call, mine, call.tokens);
  }
  Choice choice{MAX_BUCKETS, EXACT, 0, 0, 0.0f};
  if (const unsigned found = __ballot_sync(ALL, lane < MAX_BUCKETS && holds(row, real))) {
    choice.row = __ffs(found) - 1;
    choice.kind = __shfl_sync(ALL, row[KIND], choice.row);
    choice.top_slots = __shfl_sync(ALL, row[TOP_SLOTS], choice.row);
    choice.max_active = __shfl_sync(ALL, row[MAX_ACTIVE], choice.row);
    choice.min_share = as_float(uint32_t(__shfl_sync(ALL, row[MIN_SHARE], choice.row)));
  }
  const bool exact = choice.kind == EXACT;
  if (choice.max_active)
    SERE_ROLLED
    for (int e = me; e < layer.experts; e += THREADS) batch.mass[e] = 0;
  __syncthreads();

  SERE_ROLLED
  for (int64_t tile = 0; tile + warp * WARP_TILE < real; tile += TILE) {  // the same in the warp
    if (tile) token = read<Id>(slots, layer, call, tile + mine, real);
    if (tile + mine >= real) token.counted = 0;
    if (!exact) keep(slots, choice, call.top_k, token);
    look(slots, layer, choice, batch, token);
  }
  __syncthreads();

  if (!exact) {
    const uint32_t* active = batch.primary;
    if (choice.max_active) {
      const int room = choice.max_active - size(batch.primary, used);
      SERE_ROLLED
      for (int e = me; e - lane < layer.experts; e += THREADS) {
        const bool primary = e < layer.experts && has(batch.primary, e);
        const bool joins = e < layer.experts && !primary && room > 0 && has(batch.before, e) && has_room(batch, used, room, e);
        const unsigned found = __ballot_sync(ALL, primary || joins);
        if (lane == 0) batch.active[e / 32] = found;
      }
      __syncthreads();
      active = batch.active;
    }
    if (needs_similarity(choice.kind)) {
      SERE_ROLLED
      for (int e = me; e < layer.experts; e += THREADS)
        if (has(active, e)) batch.target[e] = uint16_t(e);
      int skip = warp;  // each warp takes every sixteenth of the experts that need a stand-in
      SERE_ROLLED
      for (int word = 0; word < used; ++word) {
        uint32_t rest = batch.before[word] & ~active[word];
        SERE_ROLLED
        for (; rest; rest &= rest - 1) {
          if (skip-- > 0) continue;
          skip = THREADS / 32 - 1;
          const int expert = word * 32 + lowest(rest);
          const int found = stand_in(layer, active, choice.row, expert);
          if (lane == 0) batch.target[expert] = uint16_t(found);
        }
      }
      __syncthreads();
    }
    SERE_ROLLED
    for (int64_t tile = 0; tile + warp * WARP_TILE < real; tile += TILE) {
      if (!one_tile) {
        token = read<Id>(slots, layer, call, tile + mine, real);
        keep(slots, choice, call.top_k, token);
      }
      rewrite(slots, layer, call, choice, batch, active, token, tile + mine);
    }
    __syncthreads();
  }
  if (me < COUNTERS)
    atomicAdd(reinterpret_cast<unsigned long long*>(layer.counters + choice.row * COUNTERS + me),
              (unsigned long long)gained(me, choice, batch, used, real));
}

// Whether a launch may begin while the one before it ends: it then waits where the kernel says so.
bool dependent_launch() {
  static const bool can = [] {
    int driver = 0, device = 0, major = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && driver >= 12030 && major >= 9;
  }();
  return can;
}

template <class Id, int G>
cudaError_t launch(const Layer& layer, const Call& call, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(THREADS);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent_launch();
  return cudaLaunchKernelEx(&config, run<Id, G>, layer, call);
}

template <class Id>
cudaError_t launch(const Layer& layer, const Call& call, cudaStream_t stream) {
  return call.top_k <= 8    ? launch<Id, 8>(layer, call, stream)
         : call.top_k <= 16 ? launch<Id, 16>(layer, call, stream)
                            : launch<Id, 32>(layer, call, stream);
}

}  // namespace sere

// Pointers in `layer` and `call` are the device's; both are copied into the launch. Returns a cudaError_t.
extern "C" int sere_reroute_cuda(const sere::Layer* layer, const sere::Call* call, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return call->wide_ids ? sere::launch<int64_t>(*layer, *call, on) : sere::launch<int32_t>(*layer, *call, on);
}

extern "C" const char* sere_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
