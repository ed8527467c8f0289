/* A stand-in for libnvidia-ml.so.1 with NVML's ABI, for tests. It is no GPU: two devices whose sensors behave as NVML
 * documents them, driven by a workload that is known, and faults on request. What it gives is `simulated sensor`.
 *
 * Workload: sim_add(gpu, start_s, end_s, busy, watts), or lines of that in the file FAKE_NVML_WORK; outside all of them
 * a GPU is idle at 70 W. Without any workload, readings are fixed numbers.
 * Time: seconds since the library was loaded, or what sim_set_time says.
 * Sensors: utilisation is the mean over the last whole window (FAKE_NVML_WINDOW, 1 s) and over sixths of a second in
 * the sample ring; energy is the integral of power up to the last tick (FAKE_NVML_TICK, 0.1 s).
 * GPM: SMs are as active as the GPU is busy, warps half, tensor cores 0.6 and DRAM 0.3 of that; links carry 100 MiB/s.
 * FAKE_NVML_GPUS (2, at most 8) devices; GPU 0 is cut into FAKE_NVML_MIG (0) instances; GPU FAKE_NVML_OTHER is another
 * model; every call on one waits FAKE_NVML_CALL_US microseconds, as for a driver.
 * FAKE_NVML_CLOCK="at,by": stamps move by so many seconds at that time, as when the host's clock is set.
 * Faults: FAKE_NVML_FAULTS="function=code;..." makes a function fail with that return code, on GPU 1 only with
 * "function@1=code"; code -1 never returns. FAKE_NVML_LOST="from,to": GPU 0 and its instances are lost between these
 * seconds, and for handles from before them they stay so. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define GPUS 8
#define SEGMENTS 65536
#define IDLE_WATTS 70.0
#define RING_S (1.0 / 6)
#define RING_LENGTH 120

typedef struct { int index, reopened; } device;
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned long long total, free, used; } memory;
typedef union { double d; unsigned ui; unsigned long long ull; } value;
typedef struct { unsigned long long timestamp_us; value v; } sample;
typedef struct { int gpu; double start, end, busy, watts; } segment;
typedef struct { unsigned field, scope; long long stamp_us, latency_us; unsigned kind; int code; value v; } field_value;
typedef struct { unsigned pid; unsigned long long bytes; unsigned instance, compute; } process;
typedef struct { unsigned version, supported; } gpm_support;
typedef struct { double t; int gpu; } snapshot;
typedef struct { unsigned id; int code; double value; char *texts[3]; } gpm_metric;
typedef struct { unsigned version, count; snapshot *first, *second; gpm_metric metrics[]; } gpm_request;

static device devices[2][2 * GPUS];  /* as opened before a loss and after it; GPUs, then GPU 0's instances from 100 on */
static segment *segments;
static int count_of_segments, work_is_read, within_a_call;
static double loaded_at = -1, time_is = -1;

/* ---- the truth ---- */

static double wall(int clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static double now(void) {
    if (loaded_at < 0) loaded_at = wall(CLOCK_MONOTONIC);
    return time_is >= 0 ? time_is : wall(CLOCK_MONOTONIC) - loaded_at;
}

void sim_clear(void) { count_of_segments = 0; work_is_read = 1; }
void sim_set_time(double t) { time_is = t; }
void sim_add(int gpu, double start, double end, double busy, double watts) {
    if (!segments) segments = malloc(SEGMENTS * sizeof *segments);
    work_is_read = 1;
    if (count_of_segments < SEGMENTS) segments[count_of_segments++] = (segment){gpu, start, end, busy, watts};
}

static void read_work(void) {
    if (work_is_read) return;
    work_is_read = 1;
    const char *path = getenv("FAKE_NVML_WORK");
    FILE *file = path ? fopen(path, "r") : NULL;
    segment s;
    while (file && fscanf(file, "%d %lf %lf %lf %lf", &s.gpu, &s.start, &s.end, &s.busy, &s.watts) == 5)
        sim_add(s.gpu, s.start, s.end, s.busy, s.watts);
    if (file) fclose(file);
}

/* Seconds busy (what = 0) or joules (what = 1) of a GPU between two times. */
double sim_integral(int gpu, int what, double from, double to) {
    double total = 0, covered = 0;
    if (from < 0) from = 0;
    for (int i = 0; i < count_of_segments; i++) {
        segment *s = &segments[i];
        double a = s->start > from ? s->start : from, b = s->end < to ? s->end : to;
        if (s->gpu != gpu || b <= a) continue;
        total += (b - a) * (what ? s->watts : s->busy);
        covered += b - a;
    }
    return what && to > from ? total + IDLE_WATTS * (to - from - covered) : total;
}

static double setting(const char *name, double fallback) {
    const char *text = getenv(name);
    return text && *text ? atof(text) : fallback;
}

static double last_multiple(double t, double of) { return (double)(long long)(t / of + 1e-9) * of; }

/* ---- faults ---- */

static int loss(double *from, double *to) {
    const char *lost = getenv("FAKE_NVML_LOST");
    return lost && sscanf(lost, "%lf,%lf", from, to) == 2;
}

static device *opened(int index) {
    double from, to;
    int reopened = loss(&from, &to) && now() >= to;
    device *d = &devices[reopened][index < 100 ? index : GPUS + index - 100];
    *d = (device){index, reopened};
    return d;
}

static int fault(const char *function, const device *d) {
    const char *faults = getenv("FAKE_NVML_FAULTS");
    char own[128];
    int code = 0;
    double from, to;
    if (d && !within_a_call) {
        int wait_us = (int)setting("FAKE_NVML_CALL_US", 0);
        if (wait_us > 0) usleep(wait_us);
    }
    if (d && (d->index == 0 || d->index >= 100) && loss(&from, &to) && now() >= from && (now() < to || !d->reopened))
        return 15;
    for (int pass = 0; faults && pass < 2; pass++) {
        if (pass == 1 && !d) break;
        if (pass == 0) snprintf(own, sizeof own, ";%s=", function);
        else snprintf(own, sizeof own, ";%s@%d=", function, d->index);
        const char *found = strstr(faults, own);
        if (found) code = atoi(found + strlen(own));
    }
    while (code == -1) pause();
    return code;
}
#define FAULT(d) do { int code = fault(__func__, d); if (code) return code; } while (0)

/* ---- the library ---- */

int nvmlInitWithFlags(unsigned flags) { (void)flags; FAULT(NULL); now(); read_work(); return 0; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "some NVML error"; }
int nvmlDeviceGetCount_v2(unsigned *count) {
    FAULT(NULL);
    int n = (int)setting("FAKE_NVML_GPUS", 2);
    *count = n < 1 ? 1 : n > GPUS ? GPUS : n;
    return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned i, device **d) { *d = opened(i); FAULT(*d); return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, device **d) {
    *d = opened(uuid[strlen(uuid) - 1] - '0' + (strncmp(uuid, "MIG", 3) ? 0 : 100));
    FAULT(*d);
    return 0;
}
int nvmlDeviceGetName(device *d, char *text, unsigned n) {
    snprintf(text, n, d->index == setting("FAKE_NVML_OTHER", -1) ? "simulated sensor, another" : "simulated sensor");
    return 0;
}
int nvmlDeviceGetUUID(device *d, char *text, unsigned n) {
    FAULT(d);
    snprintf(text, n, d->index >= 100 ? "MIG-0000-%d" : "GPU-0000-%d", d->index % 100);
    return 0;
}

int nvmlDeviceGetMaxMigDeviceCount(device *d, unsigned *count) { (void)d; *count = 7; return 0; }
int nvmlDeviceGetMigMode(device *d, unsigned *now_, unsigned *later) {
    FAULT(d);
    *now_ = *later = d->index == 0 && setting("FAKE_NVML_MIG", 0) > 0;
    return 0;
}
int nvmlDeviceGetMigDeviceHandleByIndex(device *d, unsigned i, device **own) {
    (void)d;
    if (i >= setting("FAKE_NVML_MIG", 0)) return 6;
    *own = opened(100 + i);
    return 0;
}
int nvmlDeviceGetGpuInstanceId(device *d, unsigned *id) { *id = d->index - 100; return 0; }

int nvmlDeviceGetUtilizationRates(device *d, utilization *u) {
    FAULT(d);
    if (d->index >= 100) return 3;
    u->gpu = 40 + d->index;
    u->memory = 7;
    if (count_of_segments) {
        double window = setting("FAKE_NVML_WINDOW", 1), end = last_multiple(now(), window);
        double busy = end > 0 ? sim_integral(d->index, 0, end - window, end) / window : 0;
        u->gpu = (unsigned)(100 * busy + 0.5);
    }
    return 0;
}

int nvmlDeviceGetSamples(device *d, int type, unsigned long long after, int *kind, unsigned *count, sample *out) {
    FAULT(d);
    if (type != 1 || !count_of_segments) return 3;  /* utilisation only */
    double offset = time_is >= 0 ? 0 : wall(CLOCK_REALTIME) - now();
    long last = (long)(now() / RING_S + 1e-9), first = last > RING_LENGTH ? last - RING_LENGTH + 1 : 1;
    unsigned n = 0;
    double set_at = 1e18, set_by = 0;
    const char *clock = getenv("FAKE_NVML_CLOCK");
    if (clock) sscanf(clock, "%lf,%lf", &set_at, &set_by);
    *kind = 1;
    for (long i = first; i <= last; i++) {
        unsigned long long stamp = (unsigned long long)((offset + i * RING_S + (i * RING_S >= set_at ? set_by : 0)) * 1e6);
        if (stamp <= after) continue;
        if (out) {
            if (n >= *count) break;
            double busy = sim_integral(d->index, 0, (i - 1) * RING_S, i * RING_S) / RING_S;
            out[n].timestamp_us = stamp;
            out[n].v.ull = 0;
            out[n].v.ui = (unsigned)(100 * busy + 0.5);
        }
        n++;
    }
    *count = n;
    return n ? 0 : 6;
}

int nvmlDeviceGetMemoryInfo(device *d, memory *m) { FAULT(d); m->total = 100; m->free = 30; m->used = 70; return 0; }

int nvmlDeviceGetPowerUsage(device *d, unsigned *mw) {
    FAULT(d);
    if (d->index >= 100) return 3;
    *mw = 250500;
    double t = now(), over = t < 0.1 ? t : 0.1; /* there is nothing before time 0, which is not idle either */
    if (count_of_segments && over > 0) *mw = (unsigned)(1e3 * sim_integral(d->index, 1, t - over, t) / over);
    return 0;
}

int nvmlDeviceGetTotalEnergyConsumption(device *d, unsigned long long *mj) {
    FAULT(d);
    if (d->index >= 100) return 3;
    *mj = 1234500;
    if (count_of_segments)
        *mj += (unsigned long long)(1e3 * sim_integral(d->index, 1, 0, last_multiple(now(), setting("FAKE_NVML_TICK", 0.1))));
    return 0;
}

int nvmlDeviceGetClockInfo(device *d, unsigned kind, unsigned *mhz) { FAULT(d); *mhz = kind == 1 ? 1980 : 0; return 0; }
int nvmlDeviceGetTemperature(device *d, unsigned sensor, unsigned *c) { FAULT(d); (void)sensor; *c = 41; return 0; }
int nvmlDeviceGetCurrentClocksEventReasons(device *d, unsigned long long *r) { FAULT(d); *r = 4; return 0; }

/* Fields: energy, and power over 0.1 s as average and as instant. Each obeys its own function's faults too. */
int nvmlDeviceGetFieldValues(device *d, int n, field_value *fields) {
    FAULT(d);
    within_a_call = 1;
    for (int i = 0; i < n; i++) {
        unsigned mw = 0;
        unsigned long long mj = 0;
        field_value *f = &fields[i];
        f->kind = 3;
        f->v.ull = 0;
        if (f->field == 83) { f->code = nvmlDeviceGetTotalEnergyConsumption(d, &mj); f->v.ull = mj; }
        else if (f->field == 185 || f->field == 186) {
            f->code = nvmlDeviceGetPowerUsage(d, &mw);
            f->kind = 1;
            f->v.ui = mw;
        } else f->code = 2;
    }
    within_a_call = 0;
    return 0;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device *d, unsigned *count, process *out) {
    FAULT(d);
    int shared = d->index == 1 && getenv("FAKE_NVML_SHARED") != NULL, fits = out && *count > 0;
    *count = shared;
    if (!shared) return 0;
    if (!fits) return 7;
    out[0] = (process){(unsigned)getpid(), 1 << 30, ~0u, ~0u};
    return 0;
}

int nvmlDeviceGetPcieThroughput(device *d, unsigned counter, unsigned *kib) { FAULT(d); *kib = 1000 + counter; return 0; }

/* ---- GPM: a snapshot is a time and a GPU ---- */

int nvmlGpmQueryDeviceSupport(device *d, gpm_support *s) { FAULT(d); s->supported = 1; return 0; }
int nvmlGpmSampleAlloc(snapshot **s) { *s = calloc(1, sizeof **s); return 0; }
int nvmlGpmSampleFree(snapshot *s) { free(s); return 0; }
int nvmlGpmSampleGet(device *d, snapshot *s) { FAULT(d); *s = (snapshot){now(), d->index}; return 0; }
int nvmlGpmMigSampleGet(device *d, unsigned instance, snapshot *s) { (void)instance; return nvmlGpmSampleGet(d, s); }
int nvmlGpmMetricsGet(gpm_request *r) {
    static const double shares[] = {[2] = 1.0, [3] = 0.5, [5] = 0.6, [10] = 0.3};
    double seconds = r->second->t - r->first->t;
    if (seconds < 0.1) return 2;
    double busy = count_of_segments ? sim_integral(r->first->gpu, 0, r->first->t, r->second->t) / seconds : 0.4;
    for (unsigned i = 0; i < r->count; i++) {
        unsigned id = r->metrics[i].id;
        r->metrics[i].code = 0;
        r->metrics[i].value = id == 20 || id == 21 || id == 60 || id == 61 ? 100.0 : id <= 10 ? 100 * busy * shares[id] : 0;
    }
    return 0;
}
