/* libnvidia-ml.so.1 for machines without a GPU: what it answers stands in a file.
 *
 * $FAKE_NVML_STATE holds lines "key=value" and is read anew by every call, so that a test can change
 * it at any time. A key that is not there makes its function NVML_ERROR_NOT_SUPPORTED, as the real
 * library answers for what a device does not have.
 *
 *   init_error=9  driver=570.86.15  gpus=2
 *   0.uuid=GPU-…  0.name=NVIDIA A100  0.pci=00000000:01:00.0
 *   0.error=15                                    what every call about it answers
 *   0.handle_error=999  0.memory_error=999        what asking for its handle, its memory, … answers
 *   0.memory=85899345920 629145600 1073741824     bytes: total, reserved, used
 *   0.utilization=35  0.power=91000  0.power_limit=400000  0.energy=123456  0.temperature=41
 *   0.throttle=8  0.ecc=0  0.remapped=0 1 0 0     corrected, uncorrected, pending, failure
 *   0.processes=4711:1000 4712:-                  pid:bytes, "-" for not known
 *   0.own_process=1000                            bytes of the process that asks, from the time when
 *                                                 it has a context of the fake CUDA
 *   0.mig=1  0.mig.3.uuid=MIG-…  0.mig.3.…        slot 3; a slot without uuid is empty
 *   0.mig.3.instance=7 0                          GPU instance, compute instance
 *   xids=0:79 0:31:7:0                            every event so far: gpu:xid[:GPU:compute instance]
 *
 * Structures and numbers are those of nvml.h. With OLD_DRIVER it lacks what older libraries lack.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int nvmlReturn_t;
typedef struct device *nvmlDevice_t;

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    RESET_REQUIRED = 16,
};

enum { MIG_SLOTS = 7, XID_EVENT = 8, WAIT_STEP_MS = 2, STATE_BYTES = 1 << 16 };

static const unsigned NO_INSTANCE = 0xFFFFFFFFu;

/* A handle is 256 * (gpu + 1) + (slot + 1), or without the slot for the whole GPU. */
static nvmlDevice_t handle_of(unsigned gpu, unsigned slot_plus_1) {
    return (nvmlDevice_t)(size_t)(256 * (gpu + 1) + slot_plus_1);
}

static unsigned gpu_of(nvmlDevice_t device) { return (unsigned)((size_t)device / 256 - 1); }

static unsigned slot_plus_1_of(nvmlDevice_t device) { return (unsigned)((size_t)device % 256); }

/* The value of a key, valid until this thread's next call; NULL where it is absent. */
static const char *lookup(const char *key) {
    static __thread char text[STATE_BYTES];
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return NULL;
    size_t size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = '\0';
    size_t length = strlen(key);
    for (char *line = text; line && *line;) {
        char *end = strchr(line, '\n');
        if (end) *end = '\0';
        if (!strncmp(line, key, length) && line[length] == '=') return line + length + 1;
        line = end ? end + 1 : NULL;
    }
    return NULL;
}

static const char *fact(nvmlDevice_t device, const char *name) {
    char key[96];
    if (slot_plus_1_of(device))
        snprintf(key, sizeof key, "%u.mig.%u.%s", gpu_of(device), slot_plus_1_of(device) - 1, name);
    else
        snprintf(key, sizeof key, "%u.%s", gpu_of(device), name);
    return lookup(key);
}

/* The error that a GPU answers every call with, or with `name` the calls of that name. */
static nvmlReturn_t error_of(nvmlDevice_t device, const char *name) {
    char key[32];
    snprintf(key, sizeof key, "%s%serror", name, *name ? "_" : "");
    const char *error = fact(handle_of(gpu_of(device), 0), key);
    return error ? atoi(error) : SUCCESS;
}

/* Up to `most` whole numbers of a fact. */
static nvmlReturn_t numbers(nvmlDevice_t device, const char *name, unsigned long long *out, int most) {
    nvmlReturn_t error = error_of(device, "");
    if (!error) error = error_of(device, name);
    if (error) return error;
    const char *value = fact(device, name);
    if (!value) return NOT_SUPPORTED;
    char *end = (char *)value;
    for (int i = 0; i < most; i++) out[i] = strtoull(end, &end, 10);
    return SUCCESS;
}

static nvmlReturn_t one(nvmlDevice_t device, const char *name, unsigned *out) {
    unsigned long long value;
    nvmlReturn_t result = numbers(device, name, &value, 1);
    if (result == SUCCESS) *out = (unsigned)value;
    return result;
}

static nvmlReturn_t text_of(const char *value, char *out, unsigned size) {
    if (!value) return NOT_SUPPORTED;
    if (strlen(value) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return SUCCESS;
}

/* The library and the system. */

nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    const char *error = lookup("init_error");
    return error ? atoi(error) : lookup("gpus") ? SUCCESS : DRIVER_NOT_LOADED;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(nvmlReturn_t result) {
    switch (result) {
    case SUCCESS: return "Success";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case GPU_IS_LOST: return "GPU is lost";
    case RESET_REQUIRED: return "GPU requires reset";
    default: return "Unknown Error";
    }
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length) {
    return text_of(lookup("driver"), version, length);
}

/* Devices. */

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    const char *value = lookup("gpus");
    *count = value ? (unsigned)atoi(value) : 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    unsigned count;
    nvmlDeviceGetCount_v2(&count);
    if (index >= count) return INVALID_ARGUMENT;
    *device = handle_of(index, 0);
    nvmlReturn_t error = error_of(*device, "");
    return error ? error : error_of(*device, "handle");
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length) {
    nvmlReturn_t error = error_of(device, "");
    return error ? error : text_of(fact(device, "name"), name, length);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length) {
    nvmlReturn_t error = error_of(device, "");
    return error ? error : text_of(fact(device, "uuid"), uuid, length);
}

typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    const char *count = lookup("gpus");
    for (int gpu = 0, gpus = count ? atoi(count) : 0; gpu < gpus; gpu++)
        for (unsigned slot_plus_1 = 0; slot_plus_1 <= MIG_SLOTS; slot_plus_1++) {
            *device = handle_of((unsigned)gpu, slot_plus_1);
            const char *known = fact(*device, "uuid");
            if (known && !strcmp(known, uuid)) return SUCCESS;
        }
    return NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    memset(pci, 0, sizeof *pci);
    nvmlReturn_t error = error_of(device, "");
    return error ? error : text_of(fact(device, "pci"), pci->busId, sizeof pci->busId);
}

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    unsigned long long v[3];
    nvmlReturn_t result = numbers(device, "memory", v, 3);
    /* The first version counts what is reserved as used. */
    if (result == SUCCESS) *memory = (nvmlMemory_t){v[0], v[0] - v[1] - v[2], v[1] + v[2]};
    return result;
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, unsigned rates[2]) {
    rates[1] = 0;
    return one(device, "utilization", &rates[0]);
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) {
    return one(device, "power", milliwatts);
}

nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *milliwatts) {
    return one(device, "power_limit", milliwatts);
}

nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules) {
    return numbers(device, "energy", millijoules, 1);
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned *celsius) {
    (void)sensor;
    return one(device, "temperature", celsius);
}

nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long *mask) {
    return numbers(device, "throttle", mask, 1);
}

nvmlReturn_t nvmlDeviceGetTotalEccErrors(
    nvmlDevice_t device, unsigned type, unsigned counter, unsigned long long *count) {
    (void)type, (void)counter;
    return numbers(device, "ecc", count, 1);
}

typedef struct {
    unsigned pid;
    unsigned long long usedGpuMemory;
    unsigned gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(
    nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *infos) {
    nvmlReturn_t error = error_of(device, "");
    if (!error) error = error_of(device, "processes");
    if (error) return error;
    unsigned found = 0, room = infos ? *count : 0;
    const char *own = getenv("FAKE_CUDA_CONTEXT") ? fact(device, "own_process") : NULL;
    if (own) {
        nvmlProcessInfo_t info = {(unsigned)getpid(), 0, NO_INSTANCE, NO_INSTANCE};
        info.usedGpuMemory = strtoull(own, NULL, 10);
        if (found < room) infos[found] = info;
        found++;
    }
    const char *value = fact(device, "processes");
    if (!value) return NOT_SUPPORTED;
    char *end = (char *)value;
    while (*end) {
        nvmlProcessInfo_t info = {(unsigned)strtoul(end, &end, 10), ~0ull, NO_INSTANCE, NO_INSTANCE};
        if (*++end == '-')
            end++;
        else
            info.usedGpuMemory = strtoull(end, &end, 10);
        if (found < room) infos[found] = info;
        found++;
        while (*end == ' ') end++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#ifndef OLD_DRIVER

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} nvmlMemory_v2_t;

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    unsigned long long v[3];
    nvmlReturn_t result = numbers(device, "memory", v, 3);
    if (result == SUCCESS)
        *memory = (nvmlMemory_v2_t){memory->version, v[0], v[1], v[0] - v[1] - v[2], v[2]};
    return result;
}

typedef struct {
    unsigned version, sensorType;
    int temperature;
} nvmlTemperature_t;

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_t *temperature) {
    return one(device, "temperature", (unsigned *)&temperature->temperature);
}

nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long *mask) {
    return numbers(device, "throttle", mask, 1);
}

nvmlReturn_t nvmlDeviceGetRemappedRows(
    nvmlDevice_t device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failure) {
    unsigned long long v[4];
    nvmlReturn_t result = numbers(device, "remapped", v, 4);
    if (result == SUCCESS)
        *corrected = (unsigned)v[0], *uncorrected = (unsigned)v[1], *pending = (unsigned)v[2],
        *failure = (unsigned)v[3];
    return result;
}

/* MIG. */

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending) {
    nvmlReturn_t result = one(device, "mig", current);
    if (result == SUCCESS) *pending = *current;
    return result;
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *count) {
    unsigned mode;
    *count = one(device, "mig", &mode) == SUCCESS ? MIG_SLOTS : 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *mig) {
    nvmlReturn_t error = error_of(device, "");
    if (error) return error;
    *mig = handle_of(gpu_of(device), index + 1);
    return fact(*mig, "uuid") ? SUCCESS : NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetGpuInstanceId(nvmlDevice_t device, unsigned *id) {
    return one(device, "instance", id);
}

nvmlReturn_t nvmlDeviceGetComputeInstanceId(nvmlDevice_t device, unsigned *id) {
    unsigned long long v[2];
    nvmlReturn_t result = numbers(device, "instance", v, 2);
    if (result == SUCCESS) *id = (unsigned)v[1];
    return result;
}

#endif

/* Events. */

typedef struct {
    nvmlDevice_t device;
    unsigned long long eventType, eventData;
    unsigned gpuInstanceId, computeInstanceId;
} nvmlEventData_t;

typedef struct {
    unsigned delivered;
    unsigned long long registered; /* a bit a GPU */
} event_set;

/* How many events there have been so far; the `wanted`-th is put into `data`. */
static unsigned count_events(unsigned wanted, nvmlEventData_t *data) {
    const char *value = lookup("xids");
    unsigned count = 0;
    for (char *end = (char *)value; end && *end; count++) {
        unsigned v[4] = {0, 0, NO_INSTANCE, NO_INSTANCE};
        for (int i = 0; i < 4; i++) {
            v[i] = (unsigned)strtoul(end, &end, 10);
            if (*end != ':') break;
            end++;
        }
        if (count == wanted)
            *data = (nvmlEventData_t){handle_of(v[0], 0), XID_EVENT, v[1], v[2], v[3]};
        while (*end == ' ') end++;
    }
    return count;
}

nvmlReturn_t nvmlEventSetCreate(event_set **set) {
    nvmlEventData_t unused;
    *set = calloc(1, sizeof **set);
    /* What happened before is not told. */
    (*set)->delivered = count_events(~0u, &unused);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long *types) {
    const char *none = fact(device, "no_events");
    *types = none ? 0 : XID_EVENT;
    return error_of(device, "");
}

nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, event_set *set) {
    unsigned long long supported = 0;
    nvmlReturn_t result = nvmlDeviceGetSupportedEventTypes(device, &supported);
    if (result != SUCCESS) return result;
    if (types & ~supported) return NOT_SUPPORTED;
    set->registered |= 1ull << gpu_of(device);
    return SUCCESS;
}

nvmlReturn_t nvmlEventSetWait_v2(event_set *set, nvmlEventData_t *data, unsigned timeout_ms) {
    for (unsigned waited = 0;; waited += WAIT_STEP_MS) {
        while (count_events(set->delivered, data) > set->delivered) {
            set->delivered++;
            if (set->registered & 1ull << gpu_of(data->device)) return SUCCESS;
        }
        if (waited >= timeout_ms) return TIMEOUT;
        usleep(1000 * WAIT_STEP_MS);
    }
}

nvmlReturn_t nvmlEventSetFree(event_set *set) {
    free(set);
    return SUCCESS;
}
