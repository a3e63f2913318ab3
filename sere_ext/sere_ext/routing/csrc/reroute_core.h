// Re-routing, once, for the CPU and for CUDA. The specification is sere_ext/routing/reference.py.
//
// A call goes
//     choose -> look (per token) -> activate (per expert) -> stand in (per expert) -> rewrite (per token)
// with a barrier between two phases. What tokens learn about the batch meets in `Batch`, in sets and integer sums alone, so
// that the order in which tokens are read cannot show in the result.
//
// The code for a token is written over its slots and does not say who holds them: `Loop` (below) is one thread with arrays,
// `Lanes` (reroute_cuda.cu) is a group of lanes of a warp with one slot each. Either type has
//     Row<T>          a value per slot; row[j] is the value of slot j, for j from `each` or `which` alone
//     at(row, i)      the value of any slot i < k, whoever holds it
//     each(f)         f(j) for every slot j
//     which(f)        bit j of the result says whether f(j)
//     any(condition)  whether the condition holds for a token that is worked on at the same time: `at`, `each` and `which`
//                     need all lanes of a warp, so only a condition that went through `any` may guard them
//     settle()        what the slots of the token read is read before any of them writes
//     join(set, ...)  puts the experts of some slots into a set that the batch shares
//     sum(total, n)   adds a token's n to a total that the batch shares
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define SERE_INLINE __host__ __device__ __forceinline__
#define SERE_ROLLED _Pragma("unroll 1")  // for loops whose speed is worth less than their place in the instruction cache
#else
#define SERE_INLINE inline
#define SERE_ROLLED
#endif

namespace sere {

// Codes and limits; sere_ext/routing/kernel.py holds the same numbers and a test compares them.
enum Kind { EXACT, SERE, TOPK, OEA, BUDGET, HYBRID };
enum Scoring { SOFTMAX, SIGMOID };
enum Float { FLOAT32, BFLOAT16, FLOAT16 };
enum Freed { REPEAT, MINUS_ONE };
enum Column { MIN_TOKENS, MAX_TOKENS, KIND, TOP_SLOTS, MAX_ACTIVE, MIN_SHARE, COLUMNS };
enum Counter { CALLS, TOKENS, ACTIVE_BEFORE, ACTIVE_AFTER, SLOTS, REROUTED, MERGED, COUNTERS };
constexpr int MAX_EXPERTS = 512;
constexpr int MAX_TOP_K = 32;  // slots of a token are bits of a word
constexpr int MAX_BUCKETS = 16;
constexpr int WORDS = MAX_EXPERTS / 32;
constexpr float MASS_STEPS = 1073741824.0f;  // 2^30 for a weight of 1: weights are summed as integers
constexpr float MASS_MOST = 1024.0f;         // 2^23 slots of it fit in 64 bits

// What holds for one MoE layer; every pointer stays the same while the engine lives, what it points to may change.
struct Layer {
  const int32_t* table;        // [MAX_BUCKETS, COLUMNS]; an unused row has MAX_TOKENS 0; MIN_SHARE holds a float's bits
  const uint16_t* neighbours;  // [E, E - 1] the other experts, most similar first
  const uint16_t* limits;      // [MAX_BUCKETS, E] how many of an expert's neighbours are similar enough in that bucket
  int64_t* counters;           // [MAX_BUCKETS + 1, COUNTERS], added to; the last row is for calls outside every bucket
  const int32_t* real;         // [1] how many rows of a call are real, counted from the first: the rest is padding
  int32_t experts, renormalise, scoring;
  int32_t freed;               // what the id of a freed slot becomes: what its token's best slot or merged slot holds, or -1
  uint32_t constants[WORDS];   // set of experts that answer with a constant: they cost nothing, so their slots do not count
};

// One call of a router. Ids and weights are rewritten in place.
struct Call {
  void* ids;            // [T, k] int32, or int64 where `wide_ids`
  float* weights;       // [T, k]
  const void* logits;   // [T, logits_columns >= E] of type `logits_type`; read by kinds that need scores
  int64_t tokens;       // T
  int32_t top_k, wide_ids, logits_type, logits_columns;
};

// What the phases learn about the batch; in shared memory on CUDA. The sets and sums before `mass` begin as zeros.
struct Batch {
  uint32_t before[WORDS], primary[WORDS], active[WORDS], after[WORDS];  // sets of experts
  int32_t slots, rerouted, merged;
  unsigned long long mass[MAX_EXPERTS];  // summed weight in steps, two's complement
  uint16_t target[MAX_EXPERTS];          // who answers for each expert, for kinds that need similarity
};

// The row of the table that holds for a call: the same in every thread.
struct Choice {
  int32_t row, kind, top_slots, max_active;
  float min_share;
};

SERE_INLINE float as_float(uint32_t pattern) {
  union { uint32_t pattern; float value; } cast;
  cast.pattern = pattern;
  return cast.value;
}

#ifdef __CUDA_ARCH__
SERE_INLINE int bits(uint32_t word) { return __popc(word); }
SERE_INLINE int lowest(uint32_t word) { return __ffs(word) - 1; }
#else
SERE_INLINE int bits(uint32_t word) { return __builtin_popcount(word); }
SERE_INLINE int lowest(uint32_t word) { return __builtin_ctz(word); }
#endif

SERE_INLINE bool has(uint32_t slots, int slot) { return slots >> slot & 1u; }
SERE_INLINE bool has(const uint32_t* set, int expert) { return has(set[expert / 32], expert % 32); }

SERE_INLINE int size(const uint32_t* set, int words) {
  int total = 0;
  SERE_ROLLED
  for (int word = 0; word < words; ++word) total += bits(set[word]);
  return total;
}

SERE_INLINE int words(const Layer& layer) { return (layer.experts + 31) / 32; }
SERE_INLINE bool needs_similarity(int kind) { return kind == SERE || kind == HYBRID; }
SERE_INLINE bool needs_scores(int kind) { return kind == OEA || kind == HYBRID; }

SERE_INLINE int64_t real_tokens(const Layer& layer, const Call& call) {
  return *layer.real < call.tokens ? *layer.real : call.tokens;
}

// Whether a row of the table holds for so many tokens.
SERE_INLINE bool holds(const int32_t* row, int64_t tokens) {
  return row[MAX_TOKENS] && tokens >= row[MIN_TOKENS] && tokens <= row[MAX_TOKENS];
}

SERE_INLINE float from_half(uint16_t half) {
  const uint32_t rest = uint32_t(half & 0x7fffu) << 13;
  const float size = (half & 0x7c00u) == 0x7c00u ? as_float(rest | 0x7f800000u) : as_float(rest) * as_float(0x77800000u);  // 2^112
  return half & 0x8000u ? -size : size;
}

// A router's logit; NaN counts as -infinity.
SERE_INLINE float logit(const Call& call, int64_t t, int expert) {
  const int64_t at = t * call.logits_columns + expert;
  float value;
  if (call.logits_type == FLOAT32) value = static_cast<const float*>(call.logits)[at];
  else {
    const uint16_t narrow = static_cast<const uint16_t*>(call.logits)[at];
    value = call.logits_type == BFLOAT16 ? as_float(uint32_t(narrow) << 16) : from_half(narrow);
  }
  return value == value ? value : -INFINITY;
}

// The score of an expert over the score of the anchor, from their logits (softmax's denominator cancels).
SERE_INLINE float ratio(const Layer& layer, float mine, float anchor) {
  return layer.scoring == SOFTMAX ? expf(mine - anchor) : (1.0f + expf(-anchor)) / (1.0f + expf(-mine));
}

SERE_INLINE unsigned long long mass_of(float weight) {
  const float capped = weight > MASS_MOST ? MASS_MOST : weight < -MASS_MOST ? -MASS_MOST : weight;
  return (unsigned long long)(long long)(capped * MASS_STEPS);
}

// Whether an expert that is used and not primary is one of those of most weight (ties: lower id) that there is still room for.
SERE_INLINE bool has_room(const Batch& batch, int words, int room, int expert) {
  int ahead = 0;
  const long long mine = (long long)batch.mass[expert];
  SERE_ROLLED
  for (int word = 0; word < words; ++word)
    SERE_ROLLED
    for (uint32_t rest = batch.before[word] & ~batch.primary[word]; rest; rest &= rest - 1) {
      const int other = word * 32 + lowest(rest);
      const long long theirs = (long long)batch.mass[other];
      ahead += theirs > mine || (theirs == mine && other < expert);
    }
  return ahead < room;
}

// A token as the router returned it, and which of its slots are kept.
template <class Id, class Slots>
struct Token {
  typename Slots::template Row<Id> id;
  typename Slots::template Row<float> weight;
  uint32_t counted;  // slots that count: of a real row, an id in [0, E) that is no constant's, a weight that is neither 0 nor NaN
  uint32_t kept;     // the S of largest weight among them, less those under a share of the largest
  int best;          // the slot of largest weight
};

// Read a token's slots. The lanes beyond k, or beyond the last token, have slots that do not count.
template <class Id, class Slots>
SERE_INLINE Token<Id, Slots> read(const Slots& slots, const Layer& layer, const Call& call, int64_t t, int64_t real) {
  Token<Id, Slots> token;
  const Id* ids = static_cast<const Id*>(call.ids) + t * call.top_k;
  const float* weights = call.weights + t * call.top_k;
  slots.each([&](int j) {
    const bool there = slots.there(j) && t < call.tokens;
    token.id[j] = there ? ids[j] : Id(-1);
    token.weight[j] = there ? weights[j] : 0.0f;
  });
  token.counted = slots.which([&](int j) {
    const Id id = token.id[j];
    const float weight = token.weight[j];
    return t < real && id >= 0 && id < layer.experts && weight != 0.0f && weight == weight && !has(layer.constants, int(id));
  });
  token.kept = 0;
  token.best = 0;
  return token;
}

// Rank a token's slots by weight, ties to the lower id, then to the left, and keep the first S of them.
template <class Id, class Slots>
SERE_INLINE void keep(const Slots& slots, const Choice& choice, int k, Token<Id, Slots>& token) {
  typename Slots::template Row<int> place;
  slots.each([&](int j) { place[j] = 0; });
  for (int i = 0; i < k; ++i) {
    const float theirs = slots.at(token.weight, i);
    const Id who = slots.at(token.id, i);
    slots.each([&](int j) {
      const float mine = token.weight[j];
      const bool first = theirs > mine || (theirs == mine && (who < token.id[j] || (who == token.id[j] && i < j)));
      place[j] += has(token.counted, i) && first;
    });
  }
  const uint32_t first = slots.which([&](int j) { return has(token.counted, j) && place[j] == 0; });
  token.best = first ? lowest(first) : 0;
  const float least = choice.min_share * slots.at(token.weight, token.best);
  token.kept = slots.which([&](int j) {
    return has(token.counted, j) && place[j] < choice.top_slots &&
           (place[j] == 0 || choice.min_share == 0.0f || token.weight[j] >= least);
  });
}

// Per token: which experts are used, which are primary (some token's kept slots), how much weight each has.
template <class Id, class Slots>
SERE_INLINE void look(const Slots& slots, const Layer& layer, const Choice& choice, Batch& batch,
                      const Token<Id, Slots>& token) {
  slots.sum(&batch.slots, bits(token.counted));
  slots.join(batch.before, words(layer), token.id, token.counted);
  if (choice.kind == EXACT) return;
  slots.join(batch.primary, words(layer), token.id, token.kept);
  if (choice.max_active)
    slots.each([&](int j) {
      if (has(token.counted, j)) slots.add(&batch.mass[token.id[j]], mass_of(token.weight[j]));
    });
}

// Per token: its new slots, merged, with weights packed left, written over the old ones. `active` is the batch's set.
template <class Id, class Slots>
SERE_INLINE void rewrite(const Slots& slots, const Layer& layer, const Call& call, const Choice& choice, Batch& batch,
                         const uint32_t* active, const Token<Id, Slots>& token, int64_t t) {
  const int k = call.top_k;
  const bool alike = needs_similarity(choice.kind);
  typename Slots::template Row<Id> id;
  typename Slots::template Row<float> weight;
  slots.each([&](int j) {
    id[j] = alike && has(token.counted, j) ? Id(batch.target[token.id[j]]) : token.id[j];
    weight[j] = token.weight[j];
  });
  const uint32_t stays = slots.which([&](int j) {
    if (!has(token.counted, j)) return false;
    return choice.kind == SERE ? true  // an expert that nothing resembles stays
           : choice.kind == TOPK || choice.kind == OEA ? has(token.kept, j)
                                                       : has(active, int(id[j]));
  });
  if (alike) {  // slots on one expert are merged into the first of them, in slot order as the reference sums
    typename Slots::template Row<int> leader;
    slots.each([&](int j) { leader[j] = j; });
    for (int i = k - 1; i >= 0; --i) {
      const Id who = slots.at(id, i);
      slots.each([&](int j) {
        if (i < leader[j] && has(stays, j) && has(stays, i) && who == id[j]) leader[j] = i;
      });
    }
    for (int i = 1; i < k; ++i) {
      const float theirs = slots.at(token.weight, i);
      const int to = slots.at(leader, i);
      slots.each([&](int j) {
        if (to == j && i != j && has(stays, i)) weight[j] += theirs;
      });
    }
    slots.each([&](int j) {
      if (leader[j] != j) weight[j] = 0.0f;
    });
  }
  const uint32_t freed = token.counted & ~stays;
  const Id anchor = slots.at(token.id, token.best);
  slots.each([&](int j) {
    if (has(freed, j)) id[j] = anchor, weight[j] = 0.0f;
  });
  uint32_t dropped = freed;  // freed slots that nothing was found for
  if (needs_scores(choice.kind) && slots.any(freed != 0))
    dropped = refill(slots, layer, call, active, t, stays, freed, int(anchor), slots.at(token.weight, token.best), id, weight);
  if (layer.renormalise && slots.any(freed != 0)) {
    float was = 0.0f, is = 0.0f;
    SERE_ROLLED
    for (int i = 0; i < k; ++i) {
      const float before = slots.at(token.weight, i), after = slots.at(weight, i);
      if (has(token.counted, i)) was += before, is += after;
    }
    if (freed && is != 0.0f)
      slots.each([&](int j) {
        if (has(token.counted, j)) weight[j] *= was / is;
      });
  }

  const uint32_t whole = slots.which([&](int j) { return slots.there(j); });
  const uint32_t holding = slots.which([&](int j) { return slots.there(j) && weight[j] != 0.0f; });
  const uint32_t moved = slots.which([&](int j) { return has(token.counted & ~dropped, j) && id[j] != token.id[j]; });
  slots.join(batch.after, words(layer), id, token.counted & holding);
  slots.sum(&batch.rerouted, bits(moved));
  slots.sum(&batch.merged, bits(token.counted & ~holding));
  slots.settle();
  if (!token.counted) return;
  Id* ids = static_cast<Id*>(call.ids) + t * k;
  float* weights = call.weights + t * k;
  slots.each([&](int j) {
    if (!slots.there(j)) return;
    const uint32_t left = (1u << j) - 1;
    const bool held = has(holding, j);
    const int at = held ? bits(holding & left) : bits(holding) + bits(whole & ~holding & left);
    ids[at] = !held && has(token.counted, j) && layer.freed == MINUS_ONE ? Id(-1) : id[j];
    weights[at] = held ? weight[j] : 0.0f;
  });
}

// What one call adds to a counter of its row.
SERE_INLINE int64_t gained(int counter, const Choice& choice, const Batch& batch, int words, int64_t real) {
  switch (counter) {
    case CALLS: return 1;
    case TOKENS: return real;
    case ACTIVE_BEFORE: return size(batch.before, words);
    case ACTIVE_AFTER: return size(choice.kind == EXACT ? batch.before : batch.after, words);
    case SLOTS: return batch.slots;
    case REROUTED: return batch.rerouted;
    default: return batch.merged;
  }
}

#ifndef __CUDACC__
// One thread holds all slots of a token.
struct Loop {
  template <class T>
  struct Row {
    T slot[MAX_TOP_K];
    T& operator[](int j) { return slot[j]; }
    const T& operator[](int j) const { return slot[j]; }
  };
  int k;
  bool there(int) const { return true; }
  bool any(bool condition) const { return condition; }
  void settle() const {}
  template <class T>
  T at(const Row<T>& row, int i) const { return row[i]; }
  template <class F>
  void each(F&& f) const {
    for (int j = 0; j < k; ++j) f(j);
  }
  template <class F>
  uint32_t which(F&& f) const {
    uint32_t found = 0;
    for (int j = 0; j < k; ++j) found |= uint32_t(f(j)) << j;
    return found;
  }
  template <class Id>
  void join(uint32_t* set, int, const Row<Id>& id, uint32_t slots) const {
    for (; slots; slots &= slots - 1) set[id[lowest(slots)] / 32] |= 1u << (id[lowest(slots)] % 32);
  }
  void sum(int32_t* total, int n) const { *total += n; }
  void add(unsigned long long* total, unsigned long long n) const { *total += n; }
};

// Fill freed slots, from the left, with the token's best-scored active experts that it does not hold yet (ties: lower id).
// Returns the slots that nothing was left for.
template <class Id>
uint32_t refill(const Loop&, const Layer& layer, const Call& call, const uint32_t* active, int64_t t, uint32_t stays,
                uint32_t freed, int anchor, float anchor_weight, Loop::Row<Id>& id, Loop::Row<float>& weight) {
  uint32_t open[WORDS];
  for (int word = 0; word < words(layer); ++word) open[word] = active[word];
  for (uint32_t rest = stays; rest; rest &= rest - 1) open[id[lowest(rest)] / 32] &= ~(1u << (id[lowest(rest)] % 32));
  int pick[MAX_TOP_K];
  float score[MAX_TOP_K];  // of the best so far, by falling logit; experts come by rising id, so that ties go to the lower one
  const int wanted = bits(freed);
  int found = 0;
  for (int word = 0; word < words(layer); ++word)
    for (uint32_t rest = open[word]; rest; rest &= rest - 1) {
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
  const float reference = logit(call, t, anchor);
  for (int n = 0; n < found; freed &= freed - 1, ++n) {
    id[lowest(freed)] = Id(pick[n]);
    weight[lowest(freed)] = anchor_weight * ratio(layer, score[n], reference);
  }
  return freed;
}
#endif

}  // namespace sere
