// What the one-launch kernel is compared with: re-routing as three launches on int64 ids, the form that a first port takes.
//
//     zero     the set of primary experts is emptied
//     scatter  each token's first S slots (they come by falling weight) mark their experts
//     scan     one thread per further slot looks through all experts for the most similar primary one
//
// No buckets, padding, merging or counters. `graph_nodes` counts what a captured graph launches.
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int THREADS = 256;

int blocks(int64_t items) { return int((items + THREADS - 1) / THREADS); }

__global__ void zero(int64_t* primary, int experts) {
  const int e = blockIdx.x * THREADS + threadIdx.x;
  if (e < experts) primary[e] = 0;
}

__global__ void scatter(const int64_t* ids, int64_t* primary, int64_t tokens, int k, int S) {
  const int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (n < tokens * S) primary[ids[n / S * k + n % S]] = 1;
}

__global__ void scan(const int64_t* ids, const int64_t* primary, const float* similarity, int64_t* out, int64_t tokens, int k,
                     int S, int experts, float rho) {
  const int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= tokens * k) return;
  const int64_t mine = ids[n];
  int64_t found = mine;
  if (n % k >= S && !primary[mine]) {
    float best = -1.0f;
    int64_t at = mine;
    for (int e = 0; e < experts; ++e) {
      const float alike = similarity[mine * experts + e];
      if (primary[e] && alike > best) best = alike, at = e;
    }
    if (best >= rho) found = at;
  }
  out[n] = found;
}

__global__ void nothing() {}

}  // namespace

// All pointers are the device's; `primary` is int64 [experts]. Returns a cudaError_t.
extern "C" int three_launch(const void* ids, void* primary, const void* similarity, void* out, int64_t tokens, int k, int S,
                            int experts, float rho, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  zero<<<blocks(experts), THREADS, 0, on>>>(static_cast<int64_t*>(primary), experts);
  scatter<<<blocks(tokens * S), THREADS, 0, on>>>(static_cast<const int64_t*>(ids), static_cast<int64_t*>(primary), tokens, k, S);
  scan<<<blocks(tokens * k), THREADS, 0, on>>>(static_cast<const int64_t*>(ids), static_cast<const int64_t*>(primary),
                                              static_cast<const float*>(similarity), static_cast<int64_t*>(out), tokens, k, S,
                                              experts, rho);
  return cudaGetLastError();
}

extern "C" int empty_launch(void* stream) {
  nothing<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
  return cudaGetLastError();
}

// Nodes of a captured graph, or -1.
extern "C" int64_t graph_nodes(void* graph) {
  size_t count = 0;
  return cudaGraphGetNodes(static_cast<cudaGraph_t>(graph), nullptr, &count) == cudaSuccess ? int64_t(count) : -1;
}
