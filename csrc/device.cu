// What the library is and whether this machine can run it.

#include "rsaft.h"

extern "C" int rsaft_abi_version(void) { return RSAFT_ABI_VERSION; }

#if defined(__CUDACC__)

#include <cuda_runtime.h>

extern "C" int rsaft_cuda_versions(int *runtime, int *driver) {
    if (runtime == nullptr || driver == nullptr) return cudaErrorInvalidValue;
    const cudaError_t error = cudaRuntimeGetVersion(runtime);
    return error != cudaSuccess ? error : cudaDriverGetVersion(driver);
}

// Any kernel tells: all of them are built for the same architectures.
__global__ void rsaft_probe() {}

extern "C" int rsaft_cuda_serves_device(void) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, rsaft_probe);
    cudaGetLastError(); // nobody else shall find it
    return error;
}

#define RSAFT_TEXT(...) #__VA_ARGS__
#define RSAFT_TEXT_OF(...) RSAFT_TEXT(__VA_ARGS__)
extern "C" const char *rsaft_cuda_architectures(void) { return RSAFT_TEXT_OF(__CUDA_ARCH_LIST__); }

extern "C" const char *rsaft_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

#else

// Built by a C++ compiler, the kernels walk host memory: a runtime of 0 says so.
extern "C" int rsaft_cuda_versions(int *runtime, int *driver) {
    if (runtime == nullptr || driver == nullptr) return 1;
    *runtime = *driver = 0;
    return 0;
}

extern "C" int rsaft_cuda_serves_device(void) { return 0; }

extern "C" const char *rsaft_cuda_architectures(void) { return ""; }

extern "C" const char *rsaft_error_string(int error) { return error ? "invalid argument" : "no error"; }

#endif
