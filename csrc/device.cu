// What the library is and whether this machine can run it.

#include "rsaft.h"

#include <cuda_runtime_api.h>

extern "C" int rsaft_abi_version(void) { return RSAFT_ABI_VERSION; }

extern "C" int rsaft_cuda_versions(int *runtime, int *driver) {
    if (runtime == nullptr || driver == nullptr) return cudaErrorInvalidValue;
    const cudaError_t error = cudaRuntimeGetVersion(runtime);
    return error != cudaSuccess ? error : cudaDriverGetVersion(driver);
}

extern "C" const char *rsaft_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
