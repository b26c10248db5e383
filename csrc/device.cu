// What the library is and whether this machine can run it.

#include "rsaft.h"

extern "C" int rsaft_abi_version(void) { return RSAFT_ABI_VERSION; }

#if defined(__CUDACC__)

#include <cuda_runtime_api.h>

extern "C" int rsaft_cuda_versions(int *runtime, int *driver) {
    if (runtime == nullptr || driver == nullptr) return cudaErrorInvalidValue;
    const cudaError_t error = cudaRuntimeGetVersion(runtime);
    return error != cudaSuccess ? error : cudaDriverGetVersion(driver);
}

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

extern "C" const char *rsaft_error_string(int error) { return error ? "invalid argument" : "no error"; }

#endif
