// A CUDA driver without a GPU, for launch_walk.py: the functions Triton's NVIDIA backend calls.
//
// Nothing runs.  But launches are checked against the limits NVIDIA documents for an H100.  What a
// driver would refuse is refused, and the text of the error, which Triton raises, says why.

#include "cuda.h"
#include <stdio.h>
#include <string.h>

#define REFUSE_IF(wrong, ...) \
    if (wrong) { \
        snprintf(reason, sizeof reason, "refused " __VA_ARGS__); \
        return CUDA_ERROR_INVALID_VALUE; \
    }

enum { SHARED = 232448 };  // bytes of shared memory a program may use, if it asks for them
static _Thread_local char reason[400];  // of the thread's last refusal
static _Thread_local int launches;  // granted to the thread so far
int stub_launches(void) { return launches; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments,
                          void **extra) {
    const char *name = (const char *)function;
    REFUSE_IF(c->gridDimX < 1 || c->gridDimX > 2147483647u || c->gridDimY < 1 ||
              c->gridDimY > 65535 || c->gridDimZ < 1 || c->gridDimZ > 65535,
              "%s on a grid of %u x %u x %u: not 1 to 2^31 - 1, 65535, 65535", name, c->gridDimX,
              c->gridDimY, c->gridDimZ)
    REFUSE_IF(c->blockDimX < 1 || c->blockDimX > 1024 || c->blockDimY != 1 || c->blockDimZ != 1,
              "%s with %u x %u x %u threads: not 1 to 1024 in a row", name, c->blockDimX,
              c->blockDimY, c->blockDimZ)
    REFUSE_IF(c->sharedMemBytes > SHARED, "%s with %u bytes of shared memory: not up to %d", name,
              c->sharedMemBytes, SHARED)
    launches++;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);  // a function is its name, for the messages
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9
        : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 0
        : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? SHARED
        : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? SHARED + 1024
        : attribute == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK ? 65536
        : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132
        : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 1;  // 1: clocks, widths of buses
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;  // the CPU's memory passes for a GPU's
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = reason;
    return CUDA_SUCCESS;
}

// The rest succeeds and finds this, where it is to find anything.
#define FINDS(name, type, value, ...) \
    CUresult name(type *found __VA_ARGS__) { *found = value; return CUDA_SUCCESS; }
#define DOES(name, ...) CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
FINDS(cuDriverGetVersion, int, CUDA_VERSION)
FINDS(cuDeviceGet, CUdevice, 0, , int ordinal)
FINDS(cuDevicePrimaryCtxRetain, CUcontext, (CUcontext)1, , CUdevice device)
FINDS(cuCtxGetCurrent, CUcontext, (CUcontext)1)
FINDS(cuCtxGetDevice, CUdevice, 0)
FINDS(cuCtxGetLimit, size_t, 0, , CUlimit limit)
FINDS(cuModuleLoadData, CUmodule, (CUmodule)1, , const void *image)
DOES(cuCtxSetCurrent, CUcontext context)
DOES(cuCtxSetLimit, CUlimit limit, size_t value)
DOES(cuModuleUnload, CUmodule module)
DOES(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *never_asked)
DOES(cuOccupancyMaxActiveClusters, int *never_asked, CUfunction function, const CUlaunchConfig *c)
DOES(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
DOES(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
