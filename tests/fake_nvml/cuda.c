/* libcuda.so.1 for machines without a GPU: one device, whose context answers every call with the
 * number that the file $FAKE_CUDA_STATE holds, as a broken one does. $FAKE_CUDA_DRIVER is the version
 * of CUDA that the driver supports, 13000 by default. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, ILLEGAL_ADDRESS = 700 };

static int device_context;
static __thread void *current;

static int state(void) {
    const char *path = getenv("FAKE_CUDA_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    int code = SUCCESS;
    if (file) {
        if (fscanf(file, "%d", &code) != 1) code = SUCCESS;
        fclose(file);
    }
    return code;
}

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }

int cuDriverGetVersion(int *version) {
    const char *driver = getenv("FAKE_CUDA_DRIVER");
    *version = driver ? atoi(driver) : 13000;
    return SUCCESS;
}

int cuDeviceGetCount(int *count) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = !visible || *visible;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = 0;
    return ordinal ? INVALID_VALUE : SUCCESS;
}

/* GPU-00010203-0405-0607-0809-0a0b0c0d0e0f */
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)i;
    return device;
}

int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, (size_t)length, "Fake GPU");
    return device;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    setenv("FAKE_CUDA_CONTEXT", "1", 1); /* the fake NVML sees it */
    *context = &device_context;
    return device;
}

int cuDevicePrimaryCtxRelease_v2(int device) { return device; }

int cuCtxPushCurrent_v2(void *context) {
    current = context;
    return context == &device_context ? SUCCESS : INVALID_CONTEXT;
}

int cuCtxPopCurrent_v2(void **context) {
    *context = current;
    current = NULL;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    if (current != &device_context) return INVALID_CONTEXT;
    *free_bytes = *total = 1u << 30;
    return state();
}

int cuGetErrorString(int code, const char **text) {
    *text = code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "an error";
    return SUCCESS;
}
