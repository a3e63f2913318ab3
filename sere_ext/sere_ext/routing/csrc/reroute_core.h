// Re-routing, once, for the CPU and for CUDA: phases that are pure per token or per expert.
//
// The specification is sere_ext/reference.py. A call goes
//     count_real -> choose_row -> look (per token) -> activate (per expert) -> stand_in (per expert) -> rewrite (per token)
// with a barrier between two phases. What tokens learn about the batch meets in `Batch`, in bit sets and integers alone,
// so that the order in which tokens are looked at cannot show in the result.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define SERE_INLINE __host__ __device__ __forceinline__
#else
#define SERE_INLINE inline
#endif

namespace sere {

// Codes and limits; sere_ext/kernel.py holds the same numbers and a test compares them.
enum Kind { EXACT, SERE, TOPK, OEA, BUDGET, HYBRID };
enum Scoring { SOFTMAX, SIGMOID };
enum Float { FLOAT32, BFLOAT16 };
enum Column { MIN_TOKENS, MAX_TOKENS, KIND, TOP_SLOTS, MAX_ACTIVE, RHO, MIN_SHARE, COLUMNS };
enum Counter { CALLS, TOKENS, ACTIVE_BEFORE, ACTIVE_AFTER, SLOTS, REROUTED, MERGED, COUNTERS };
constexpr int MAX_EXPERTS = 512;
constexpr int MAX_TOP_K = 32;  // slots of a token are bits of a word
constexpr int MAX_BUCKETS = 16;
constexpr int WORDS = MAX_EXPERTS / 32;
constexpr int NOBODY = -1;
constexpr float MASS_STEPS = 1073741824.0f;  // 2^30 for a weight of 1: weights are summed as integers
constexpr float MASS_MOST = 1024.0f;         // 2^23 slots of it fit in 64 bits

// What holds for one MoE layer; every pointer stays the same while the engine lives, what it points to may change.
struct Layer {
  const int32_t* table;         // [MAX_BUCKETS, COLUMNS]; an unused row has MAX_TOKENS 0; RHO and MIN_SHARE hold a float's bits
  const uint16_t* neighbours;   // [E, E - 1] the other experts, most similar first
  const float* similarities;    // [E, E - 1] in that order, NaN as -infinity
  int64_t* counters;            // [MAX_BUCKETS + 1, COUNTERS], added to; the last row is for calls outside every bucket
  int32_t experts, renormalise, scoring;
};

// One call of a router.
struct Call {
  const void* ids;         // [T, k] int32, or int64 where `wide_ids`
  const float* weights;    // [T, k]
  const uint8_t* padding;  // [T], not 0 for padding; null if every row is real
  const void* logits;      // [T, logits_columns >= E] of type `logits_type`; read by kinds that need scores
  void* out_ids;           // [T, k], type of `ids`
  float* out_weights;      // [T, k]
  int64_t tokens;          // T
  int32_t top_k, wide_ids, logits_type, logits_columns;
};

// What the phases learn about the batch; in shared memory on CUDA. Begins as zeros, `target` aside.
struct Batch {
  uint32_t before[WORDS], primary[WORDS], active[WORDS], after[WORDS];  // sets of experts
  int32_t row, kind, top_slots, max_active;
  float rho, min_share;
  int32_t tokens, slots, rerouted, merged;
  unsigned long long mass[MAX_EXPERTS];  // summed weight in steps, two's complement
  uint16_t target[MAX_EXPERTS];          // who answers for each expert
};

#ifdef __CUDA_ARCH__
SERE_INLINE void put(uint32_t* set, int expert) {
  const uint32_t bit = 1u << (expert % 32);
  if (!(set[expert / 32] & bit)) atomicOr(set + expert / 32, bit);  // most are set already, and reads do not queue
}
SERE_INLINE void add(int32_t* sum, int32_t value) { if (value) atomicAdd(sum, value); }
SERE_INLINE void add(unsigned long long* sum, unsigned long long value) { atomicAdd(sum, value); }
SERE_INLINE int bits(uint32_t word) { return __popc(word); }
SERE_INLINE int lowest(uint32_t word) { return __ffs(word) - 1; }
#else
SERE_INLINE void put(uint32_t* set, int expert) { set[expert / 32] |= 1u << (expert % 32); }
SERE_INLINE void add(int32_t* sum, int32_t value) { *sum += value; }
SERE_INLINE void add(unsigned long long* sum, unsigned long long value) { *sum += value; }
SERE_INLINE int bits(uint32_t word) { return __builtin_popcount(word); }
SERE_INLINE int lowest(uint32_t word) { return __builtin_ctz(word); }
#endif

SERE_INLINE bool has(const uint32_t* set, int expert) { return set[expert / 32] >> (expert % 32) & 1u; }

SERE_INLINE int size(const uint32_t* set) {
  int total = 0;
  for (int word = 0; word < WORDS; ++word) total += bits(set[word]);
  return total;
}

SERE_INLINE float as_float(uint32_t pattern) {
  union { uint32_t pattern; float value; } cast;
  cast.pattern = pattern;
  return cast.value;
}

SERE_INLINE bool needs_similarity(int kind) { return kind == SERE || kind == HYBRID; }
SERE_INLINE bool needs_scores(int kind) { return kind == OEA || kind == HYBRID; }

SERE_INLINE bool is_real(const Call& call, int64_t t) { return !call.padding || !call.padding[t]; }

SERE_INLINE float logit(const Call& call, int64_t t, int expert) {
  const int64_t at = t * call.logits_columns + expert;
  const float value = call.logits_type == BFLOAT16
                          ? as_float(uint32_t(static_cast<const uint16_t*>(call.logits)[at]) << 16)
                          : static_cast<const float*>(call.logits)[at];
  return value == value ? value : -INFINITY;
}

// The slots of a row that count: a real row, an id in [0, E), a weight that is neither 0 nor NaN.
template <class Id>
SERE_INLINE uint32_t counting(const Layer& layer, const Call& call, const Id* ids, const float* weights, int64_t t) {
  if (!is_real(call, t)) return 0;
  uint32_t mask = 0;
  for (int j = 0; j < call.top_k; ++j)
    if (ids[j] >= 0 && ids[j] < layer.experts && weights[j] != 0.0f && weights[j] == weights[j]) mask |= 1u << j;
  return mask;
}

// The S slots of largest weight, ties to the lower id, then to the left, less those under a share of the largest; `best` is
// the first of them.
template <class Id>
SERE_INLINE uint32_t top(uint32_t counts, const Id* ids, const float* weights, int S, float min_share,
                         int* best) {
  uint32_t kept = 0;
  *best = NOBODY;
  for (int rank = 0; rank < S && counts; ++rank) {
    int first = lowest(counts);
    for (uint32_t rest = counts & (counts - 1); rest; rest &= rest - 1) {
      const int j = lowest(rest);
      if (weights[j] > weights[first] || (weights[j] == weights[first] && ids[j] < ids[first])) first = j;
    }
    if (rank == 0) *best = first;
    else if (min_share != 0.0f && !(weights[first] >= min_share * weights[*best])) break;
    kept |= 1u << first;
    counts &= ~(1u << first);
  }
  return kept;
}

// Per token.
SERE_INLINE void count_real(const Call& call, Batch& batch, int64_t t) { add(&batch.tokens, is_real(call, t)); }

// Once: the row of the table that holds for so many real tokens. No row holds: exact.
SERE_INLINE void choose_row(const Layer& layer, Batch& batch) {
  batch.row = MAX_BUCKETS;
  batch.kind = EXACT;
  for (int row = MAX_BUCKETS - 1; row >= 0; --row) {
    const int32_t* found = layer.table + row * COLUMNS;
    if (!found[MAX_TOKENS] || batch.tokens < found[MIN_TOKENS] || batch.tokens > found[MAX_TOKENS]) continue;
    batch.row = row;
    batch.kind = found[KIND];
    batch.top_slots = found[TOP_SLOTS];
    batch.max_active = found[MAX_ACTIVE];
    batch.rho = as_float(uint32_t(found[RHO]));
    batch.min_share = as_float(uint32_t(found[MIN_SHARE]));
  }
}

// Per token: which experts are used, which are primary (some token's top S), how much weight each has.
template <class Id>
SERE_INLINE void look(const Layer& layer, const Call& call, Batch& batch, int64_t t) {
  const Id* ids = static_cast<const Id*>(call.ids) + t * call.top_k;
  const float* weights = call.weights + t * call.top_k;
  const uint32_t counts = counting(layer, call, ids, weights, t);
  add(&batch.slots, bits(counts));
  for (uint32_t rest = counts; rest; rest &= rest - 1) {
    const int j = lowest(rest);
    put(batch.before, int(ids[j]));
    if (batch.kind != EXACT && batch.max_active) {
      const float capped = weights[j] > MASS_MOST ? MASS_MOST : weights[j] < -MASS_MOST ? -MASS_MOST : weights[j];
      add(&batch.mass[ids[j]], (unsigned long long)(long long)(capped * MASS_STEPS));
    }
  }
  if (batch.kind == EXACT) return;
  int best;
  for (uint32_t rest = top(counts, ids, weights, batch.top_slots, batch.min_share, &best); rest; rest &= rest - 1)
    put(batch.primary, int(ids[lowest(rest)]));
}

// Per expert: primaries are active, and so are the others of most weight (ties: lower id) while there is room.
SERE_INLINE void activate(Batch& batch, int expert) {
  if (has(batch.primary, expert)) return put(batch.active, expert);
  const int room = batch.max_active - size(batch.primary);
  if (room <= 0 || !has(batch.before, expert)) return;
  int ahead = 0;
  const long long mine = (long long)batch.mass[expert];
  for (int word = 0; word < WORDS; ++word) {
    for (uint32_t rest = batch.before[word] & ~batch.primary[word]; rest; rest &= rest - 1) {
      const int other = word * 32 + lowest(rest);
      const long long theirs = (long long)batch.mass[other];
      ahead += theirs > mine || (theirs == mine && other < expert);
    }
  }
  if (ahead < room) put(batch.active, expert);
}

// Per expert: the active expert that is most similar, if it is similar enough; else itself.
SERE_INLINE void stand_in(const Layer& layer, Batch& batch, int expert) {
  batch.target[expert] = uint16_t(expert);
  if (!needs_similarity(batch.kind) || !has(batch.before, expert) || has(batch.active, expert)) return;
  const int others = layer.experts - 1;
  const uint16_t* neighbours = layer.neighbours + int64_t(expert) * others;
  for (int n = 0; n < others; ++n) {
    if (!has(batch.active, neighbours[n])) continue;
    if (layer.similarities[int64_t(expert) * others + n] >= batch.rho) batch.target[expert] = neighbours[n];
    return;
  }
}

// Fill freed slots, from the left, with the token's best-scored active experts that it does not hold yet.
// Returns the slots that nothing was left for.
template <class Id>
SERE_INLINE uint32_t refill(const Layer& layer, const Call& call, const Batch& batch, int64_t t, uint32_t held_slots,
                            uint32_t freed, int anchor, float anchor_weight, Id* ids, float* weights) {
  uint32_t held[WORDS] = {};
  for (uint32_t rest = held_slots; rest; rest &= rest - 1) {
    const int expert = int(ids[lowest(rest)]);
    held[expert / 32] |= 1u << (expert % 32);
  }
  // The best of the open experts by falling logit; experts come by rising id, so that ties go to the lower one.
  int pick[MAX_TOP_K];
  float score[MAX_TOP_K];
  const int wanted = bits(freed);
  int found = 0;
  for (int word = 0; word < WORDS; ++word) {
    for (uint32_t rest = batch.active[word] & ~held[word]; rest; rest &= rest - 1) {
      const int expert = word * 32 + lowest(rest);
      const float mine = logit(call, t, expert);
      int place = found;
      while (place > 0 && mine > score[place - 1]) --place;
      if (place == wanted) continue;
      if (found < wanted) ++found;
      for (int n = found - 1; n > place; --n) pick[n] = pick[n - 1], score[n] = score[n - 1];
      pick[place] = expert;
      score[place] = mine;
    }
  }
  const float reference = logit(call, t, anchor);
  int n = 0;
  for (; n < found; freed &= freed - 1, ++n) {
    const int j = lowest(freed);
    const float ratio = layer.scoring == SOFTMAX ? expf(score[n] - reference)
                                                 : (1.0f + expf(-reference)) / (1.0f + expf(-score[n]));
    ids[j] = Id(pick[n]);
    weights[j] = anchor_weight * ratio;
  }
  return freed;
}

// Per token: its new slots, merged, with weights packed left.
template <class Id>
SERE_INLINE void rewrite(const Layer& layer, const Call& call, Batch& batch, int64_t t) {
  const int k = call.top_k;
  const Id* ids = static_cast<const Id*>(call.ids) + t * k;
  const float* weights = call.weights + t * k;
  Id* out_ids = static_cast<Id*>(call.out_ids) + t * k;
  float* out_weights = call.out_weights + t * k;
  const uint32_t counts = batch.kind == EXACT ? 0 : counting(layer, call, ids, weights, t);
  if (!counts) {
    for (int j = 0; j < k; ++j) out_ids[j] = ids[j], out_weights[j] = weights[j];
    return;
  }
  int best;
  const uint32_t keep = top(counts, ids, weights, batch.top_slots, batch.min_share, &best);
  Id new_ids[MAX_TOP_K];
  float new_weights[MAX_TOP_K];
  for (int j = 0; j < k; ++j) new_ids[j] = ids[j], new_weights[j] = weights[j];

  uint32_t freed = 0;
  for (uint32_t rest = counts; rest; rest &= rest - 1) {
    const int j = lowest(rest);
    const int expert = batch.target[ids[j]];
    const bool stays = batch.kind == TOPK || batch.kind == OEA ? keep >> j & 1u
                       : batch.kind == SERE                    ? true  // an expert that nothing resembles stays
                                                               : has(batch.active, expert);
    if (!stays) {
      freed |= 1u << j;
      continue;
    }
    new_ids[j] = Id(expert);
    if (!needs_similarity(batch.kind)) continue;
    for (uint32_t left = counts & ~freed & ((1u << j) - 1); left; left &= left - 1) {
      const int i = lowest(left);
      if (new_ids[i] != new_ids[j]) continue;
      new_weights[i] += new_weights[j];
      new_weights[j] = 0.0f;
      break;
    }
  }
  uint32_t dropped = freed;
  for (uint32_t rest = freed; rest; rest &= rest - 1) {
    const int j = lowest(rest);
    new_ids[j] = ids[best];
    new_weights[j] = 0.0f;
  }
  if (freed && needs_scores(batch.kind))
    dropped = refill(layer, call, batch, t, counts & ~freed, freed, int(ids[best]), weights[best], new_ids, new_weights);
  if (freed && layer.renormalise) {
    float was = 0.0f, is = 0.0f;
    for (uint32_t rest = counts; rest; rest &= rest - 1) {
      const int j = lowest(rest);
      was += weights[j];
      is += new_weights[j];
    }
    if (is != 0.0f)
      for (uint32_t rest = counts; rest; rest &= rest - 1) new_weights[lowest(rest)] *= was / is;
  }

  int rerouted = 0, merged = 0, n = 0;
  for (int j = 0; j < k; ++j) {
    if (new_weights[j] == 0.0f) continue;
    out_ids[n] = new_ids[j];
    out_weights[n++] = new_weights[j];
  }
  for (int j = 0; j < k; ++j) {
    const bool counted = counts >> j & 1u;
    rerouted += counted && !(dropped >> j & 1u) && new_ids[j] != ids[j];
    if (new_weights[j] != 0.0f) {
      if (counted) put(batch.after, int(new_ids[j]));
      continue;
    }
    merged += counted;
    out_ids[n] = new_ids[j];
    out_weights[n++] = 0.0f;
  }
  add(&batch.rerouted, rerouted);
  add(&batch.merged, merged);
}

// Once.
SERE_INLINE void add_counters(const Layer& layer, const Batch& batch) {
  int64_t* row = layer.counters + batch.row * COUNTERS;
  row[CALLS] += 1;
  row[TOKENS] += batch.tokens;
  row[ACTIVE_BEFORE] += size(batch.before);
  row[ACTIVE_AFTER] += size(batch.kind == EXACT ? batch.before : batch.after);
  row[SLOTS] += batch.slots;
  row[REROUTED] += batch.rerouted;
  row[MERGED] += batch.merged;
}

}  // namespace sere
