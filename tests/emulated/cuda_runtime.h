// A stand-in for CUDA's header that runs one block of device code on the host (runtime.cpp). What reroute_cuda.cu uses is here and
// nothing else; `__shared__` is rewritten by emulator.py.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr int cudaSuccess = 0;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

enum Warp { BALLOT, SHUFFLE, OR, ADD, SYNC };
unsigned thread();                                              // index of the running thread in its block
void barrier(const void* site);
uint64_t warp(Warp what, uint64_t value, int lane, const void* site);  // all 32 lanes; `lane` is the one to read from
void* shared(size_t bytes, size_t alignment);
void launch(unsigned threads, const std::function<void()>& body);
int last_error();
const char* error_string(int code);

struct Together {  // loads of this thread that are in flight at once
  Together();
  ~Together();
};

template <class T>
T shuffle(T value, int lane, const void* site) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp(SHUFFLE, bits, lane, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T& shared() { return *static_cast<T*>(shared(sizeof(T), alignof(T))); }

struct Index {
  struct { operator unsigned() const { return thread(); } } x;
};

}  // namespace emulated

#define threadIdx (emulated::Index{})
#define SERE_TOGETHER if (emulated::Together together; true)

// A label's address names the place of the call: threads of a block that wait at different ones are an error.
#define EMULATED_HERE ({ __label__ here; here: &&here; })
#define __syncthreads() emulated::barrier(EMULATED_HERE)
#define __ballot_sync(mask, value) unsigned(emulated::warp(emulated::BALLOT, (value) ? 1 : 0, 0, EMULATED_HERE))
#define __reduce_or_sync(mask, value) unsigned(emulated::warp(emulated::OR, value, 0, EMULATED_HERE))
#define __reduce_add_sync(mask, value) int(emulated::warp(emulated::ADD, uint64_t(int64_t(int(value))), 0, EMULATED_HERE))
#define __shfl_sync(mask, value, lane) emulated::shuffle(value, lane, EMULATED_HERE)
#define __shfl_xor_sync(mask, value, with) emulated::shuffle(value, int((emulated::thread() & 31) ^ unsigned(with)), EMULATED_HERE)
#define __syncwarp() (void)emulated::warp(emulated::SYNC, 0, 0, EMULATED_HERE)
inline void cudaGridDependencySynchronize() {}

template <class T>
inline T atomicOr(T* at, T value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }
template <class T>
inline T atomicAdd(T* at, T value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }

enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaDevAttrComputeCapabilityMajor };
struct cudaLaunchAttribute {
  int id;
  struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  if (config->gridDim.x != 1) return 1;
  emulated::launch(config->blockDim.x, [&] { kernel(arguments...); });
  return emulated::last_error();
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 9, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t code) { return emulated::error_string(code); }
