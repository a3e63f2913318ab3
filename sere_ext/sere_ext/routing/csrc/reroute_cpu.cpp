// The phases of reroute_core.h as loops. A C interface without torch or Python headers: one library fits every release.
#include "reroute_core.h"

#include <stddef.h>
#include <string.h>

namespace {

template <class Id>
void run(const sere::Layer& layer, const sere::Call& call) {
  using namespace sere;
  Batch batch;
  memset(&batch, 0, offsetof(Batch, mass));
  if (call.padding)
    for (int64_t t = 0; t < call.tokens; ++t) count_real(call, batch, t);
  else
    batch.tokens = int32_t(call.tokens);
  choose_row(layer, batch);
  const bool exact = batch.kind == EXACT;
  if (!exact && batch.max_active) memset(batch.mass, 0, sizeof(batch.mass));
  for (int64_t t = 0; t < call.tokens; ++t) look<Id>(layer, call, batch, t);
  for (int e = 0; e < layer.experts && !exact; ++e) activate(batch, e);
  for (int e = 0; e < layer.experts && !exact; ++e) stand_in(layer, batch, e);
  for (int64_t t = 0; t < call.tokens; ++t) rewrite<Id>(layer, call, batch, t);
  add_counters(layer, batch);
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
