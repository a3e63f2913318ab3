// The phases of reroute_core.h as loops. A C interface without torch or Python headers: one library fits every release.
#include "reroute_core.h"

#include <string.h>

namespace {

using namespace sere;

// Nothing holds for so many tokens: exact.
Choice choose(const Layer& layer, int64_t tokens) {
  for (int row = 0; row < MAX_BUCKETS; ++row) {
    const int32_t* found = layer.table + row * COLUMNS;
    if (holds(found, tokens))
      return {row, found[KIND], found[TOP_SLOTS], found[MAX_ACTIVE], as_float(uint32_t(found[MIN_SHARE]))};
  }
  return {MAX_BUCKETS, EXACT, 0, 0, 0.0f};
}

// The active expert that is most similar, if it is similar enough; else the expert itself.
int stand_in(const Layer& layer, const Choice& choice, const uint32_t* active, int expert) {
  const uint16_t* neighbours = layer.neighbours + int64_t(expert) * (layer.experts - 1);
  const int limit = layer.limits[choice.row * layer.experts + expert];
  for (int n = 0; n < limit; ++n)
    if (has(active, neighbours[n])) return neighbours[n];
  return expert;
}

template <class Id>
void run(const Layer& layer, const Call& call) {
  Batch batch;
  memset(&batch, 0, offsetof(Batch, mass));
  const int64_t real = real_tokens(layer, call);
  const Choice choice = choose(layer, real);
  const Loop slots{call.top_k};
  const int used = words(layer);
  if (choice.max_active) memset(batch.mass, 0, sizeof(batch.mass));
  for (int64_t t = 0; t < real; ++t) {
    Token<Id, Loop> token = read<Id>(slots, layer, call, t, real);
    if (choice.kind != EXACT) keep(slots, choice, call.top_k, token);
    look(slots, layer, choice, batch, token);
  }
  if (choice.kind != EXACT) {
    const int room = choice.max_active - size(batch.primary, used);
    memcpy(batch.active, batch.primary, sizeof(batch.active));
    for (int e = 0; e < layer.experts; ++e) {
      if (!has(batch.before, e) || has(batch.primary, e)) continue;
      if (room > 0 && has_room(batch, used, room, e)) batch.active[e / 32] |= 1u << (e % 32);
    }
    if (needs_similarity(choice.kind))
      for (int e = 0; e < layer.experts; ++e)
        if (has(batch.before, e)) batch.target[e] = uint16_t(has(batch.active, e) ? e : stand_in(layer, choice, batch.active, e));
    for (int64_t t = 0; t < real; ++t) {
      Token<Id, Loop> token = read<Id>(slots, layer, call, t, real);
      keep(slots, choice, call.top_k, token);
      rewrite(slots, layer, call, choice, batch, batch.active, token, t);
    }
  }
  int64_t* counters = layer.counters + choice.row * COUNTERS;
  for (int n = 0; n < COUNTERS; ++n) counters[n] += gained(n, choice, batch, used, real);
}

}  // namespace

extern "C" {

int sere_reroute_cpu(const sere::Layer* layer, const sere::Call* call) {
  call->wide_ids ? run<int64_t>(*layer, *call) : run<int32_t>(*layer, *call);
  return 0;
}

// 1 + the last column of `weights` [T, k] that holds anything but 0; at least 1.
int64_t sere_columns_in_use(const float* weights, int64_t tokens, int64_t top_k) {
  int64_t used = 1;
  for (int64_t t = 0; t < tokens && used < top_k; ++t)
    for (int64_t j = top_k - 1; j >= used; --j)
      if (weights[t * top_k + j] != 0.0f) {
        used = j + 1;
        break;
      }
  return used;
}

}
