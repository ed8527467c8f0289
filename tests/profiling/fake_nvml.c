/* A stand-in for libnvidia-ml.so.1 with NVML's ABI, for tests: fixed readings of two GPUs, and faults on request.
 * FAKE_NVML_FAULTS="function=code;..." makes a function fail with that NVML return code; gpu 1 only with "function@1=code".
 * It is no GPU: it tests that we load the library, call it rightly and keep its errors apart. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int index; } device;
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned long long total, free, used; } memory;

static device devices[2] = {{0}, {1}};

static int fault(const char *function, const device *d) {
    const char *faults = getenv("FAKE_NVML_FAULTS");
    char own[128];
    int code = 0;
    for (int pass = 0; faults && pass < 2; pass++) {
        if (pass == 1 && !d) break;
        if (pass == 0) snprintf(own, sizeof own, ";%s=", function);
        else snprintf(own, sizeof own, ";%s@%d=", function, d->index);
        const char *found = strstr(faults, own);
        if (found) code = atoi(found + strlen(own));
    }
    return code;
}
#define FAULT(d) do { int code = fault(__func__, d); if (code) return code; } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; FAULT(NULL); return 0; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "some NVML error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, device **d) { *d = &devices[i]; return 0; }
int nvmlDeviceGetName(device *d, char *text, unsigned n) { (void)d; snprintf(text, n, "Stand-in GPU"); return 0; }
int nvmlDeviceGetUUID(device *d, char *text, unsigned n) { snprintf(text, n, "GPU-0000-%d", d->index); return 0; }
int nvmlDeviceGetUtilizationRates(device *d, utilization *u) { FAULT(d); u->gpu = 40 + d->index; u->memory = 7; return 0; }
int nvmlDeviceGetMemoryInfo(device *d, memory *m) { FAULT(d); m->total = 100; m->free = 30; m->used = 70; return 0; }
int nvmlDeviceGetPowerUsage(device *d, unsigned *mw) { FAULT(d); *mw = 250500; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(device *d, unsigned long long *mj) { FAULT(d); *mj = 1234500; return 0; }
int nvmlDeviceGetClockInfo(device *d, unsigned kind, unsigned *mhz) { FAULT(d); *mhz = kind == 1 ? 1980 : 0; return 0; }
int nvmlDeviceGetTemperature(device *d, unsigned sensor, unsigned *c) { FAULT(d); (void)sensor; *c = 41; return 0; }
int nvmlDeviceGetCurrentClocksEventReasons(device *d, unsigned long long *r) { FAULT(d); *r = 4; return 0; }
