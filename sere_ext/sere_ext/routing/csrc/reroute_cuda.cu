// The phases of reroute_core.h in one block, one launch per layer: strided loops with a barrier between two phases.
//
// Everything that a policy change touches is read from device memory at run time, so a captured CUDA graph follows it.
// Nothing depends on the order of threads: they meet in sets and integer sums alone.
#include "reroute_core.h"

#include <cuda_runtime.h>

namespace {

constexpr int THREADS = 512;

template <class Id>
__global__ void __launch_bounds__(THREADS) run(const sere::Layer layer, const sere::Call call) {
  using namespace sere;
  __shared__ Batch batch;
  for (int n = threadIdx.x; n < int(sizeof(Batch) / sizeof(uint32_t)); n += THREADS) reinterpret_cast<uint32_t*>(&batch)[n] = 0;
  __syncthreads();
  for (int64_t t = threadIdx.x; t < call.tokens; t += THREADS) count_real(call, batch, t);
  __syncthreads();
  if (threadIdx.x == 0) choose_row(layer, batch);
  __syncthreads();
  for (int64_t t = threadIdx.x; t < call.tokens; t += THREADS) look<Id>(layer, call, batch, t);
  __syncthreads();
  if (batch.kind != EXACT) {  // the same in every thread
    for (int e = threadIdx.x; e < layer.experts; e += THREADS) activate(batch, e);
    __syncthreads();
    for (int e = threadIdx.x; e < layer.experts; e += THREADS) stand_in(layer, batch, e);
    __syncthreads();
  }
  for (int64_t t = threadIdx.x; t < call.tokens; t += THREADS) rewrite<Id>(layer, call, batch, t);
  __syncthreads();
  if (threadIdx.x == 0) add_counters(layer, batch);
}

}  // namespace

// Pointers in `layer` and `call` are the device's; both are copied into the launch. Returns a cudaError_t.
extern "C" int sere_reroute_cuda(const sere::Layer* layer, const sere::Call* call, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (call->wide_ids)
    run<int64_t><<<1, THREADS, 0, on>>>(*layer, *call);
  else
    run<int32_t><<<1, THREADS, 0, on>>>(*layer, *call);
  return cudaGetLastError();
}

extern "C" const char* sere_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
