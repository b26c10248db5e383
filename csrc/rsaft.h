/* The C ABI of librsaft: what Python calls through ctypes.
 *
 * Every function returns 0 or a CUDA runtime error code and never prints, allocates or keeps state; workspace comes
 * from the caller, and the stream is the last argument. No torch headers: one library serves every torch and Python.
 */
#ifndef RSAFT_H
#define RSAFT_H

#if defined(__GNUC__)
#define RSAFT_API __attribute__((visibility("default")))
#else
#define RSAFT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature below changes; Python refuses a library of another number. */
#define RSAFT_ABI_VERSION 1

RSAFT_API int rsaft_abi_version(void);

/* CUDA versions as 1000 * major + 10 * minor: of the runtime linked in, and of the newest that the driver serves
 * (0 without a driver). A driver older than the runtime cannot run this library. */
RSAFT_API int rsaft_cuda_versions(int *runtime, int *driver);

/* Text of an error code; never NULL, not to be freed. */
RSAFT_API const char *rsaft_error_string(int error);

#ifdef __cplusplus
}
#endif

#endif
