/* A stand-in for libnvidia-ml.so.1 with NVML's ABI, for tests. It is no GPU: two devices whose sensors behave as NVML
 * documents them, driven by a workload that is known, and faults on request. What it gives is `simulated sensor`.
 *
 * Workload: sim_add(gpu, start_s, end_s, busy, watts), or lines of that in the file FAKE_NVML_WORK; outside all of them
 * a GPU is idle at 70 W. Without any workload, readings are fixed numbers.
 * Time: seconds since the library was loaded, or what sim_set_time says.
 * Sensors: utilisation is the mean over the last whole window (FAKE_NVML_WINDOW, 1 s) and over sixths of a second in
 * the sample ring; energy is the integral of power up to the last tick (FAKE_NVML_TICK, 0.1 s).
 * Faults: FAKE_NVML_FAULTS="function=code;..." makes a function fail with that return code, on GPU 1 only with
 * "function@1=code"; code -1 never returns. FAKE_NVML_LOST="from,to": GPU 0 is lost between these seconds. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define GPUS 2
#define SEGMENTS 65536
#define IDLE_WATTS 70.0
#define RING_S (1.0 / 6)
#define RING_LENGTH 120

typedef struct { int index; } device;
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned long long total, free, used; } memory;
typedef union { double d; unsigned ui; unsigned long long ull; } value;
typedef struct { unsigned long long timestamp_us; value v; } sample;
typedef struct { int gpu; double start, end, busy, watts; } segment;

static device devices[GPUS] = {{0}, {1}};
static segment *segments;
static int count_of_segments, work_is_read;
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

static int fault(const char *function, const device *d) {
    const char *faults = getenv("FAKE_NVML_FAULTS"), *lost = getenv("FAKE_NVML_LOST");
    char own[128];
    int code = 0;
    double from, to;
    if (d && d->index == 0 && lost && sscanf(lost, "%lf,%lf", &from, &to) == 2 && now() >= from && now() < to) return 15;
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
int nvmlDeviceGetCount_v2(unsigned *count) { FAULT(NULL); *count = GPUS; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, device **d) { FAULT(&devices[i]); *d = &devices[i]; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, device **d) {
    int index = uuid[strlen(uuid) - 1] - '0';
    FAULT(&devices[index]);
    *d = &devices[index];
    return 0;
}
int nvmlDeviceGetName(device *d, char *text, unsigned n) { (void)d; snprintf(text, n, "Stand-in GPU"); return 0; }
int nvmlDeviceGetUUID(device *d, char *text, unsigned n) { snprintf(text, n, "GPU-0000-%d", d->index); return 0; }

int nvmlDeviceGetUtilizationRates(device *d, utilization *u) {
    FAULT(d);
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
    *kind = 1;
    for (long i = first; i <= last; i++) {
        unsigned long long stamp = (unsigned long long)((offset + i * RING_S) * 1e6);
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
    *mw = 250500;
    if (count_of_segments) *mw = (unsigned)(1e3 * sim_integral(d->index, 1, now() - 0.1, now()) / 0.1);
    return 0;
}

int nvmlDeviceGetTotalEnergyConsumption(device *d, unsigned long long *mj) {
    FAULT(d);
    *mj = 1234500;
    if (count_of_segments)
        *mj += (unsigned long long)(1e3 * sim_integral(d->index, 1, 0, last_multiple(now(), setting("FAKE_NVML_TICK", 0.1))));
    return 0;
}

int nvmlDeviceGetClockInfo(device *d, unsigned kind, unsigned *mhz) { FAULT(d); *mhz = kind == 1 ? 1980 : 0; return 0; }
int nvmlDeviceGetTemperature(device *d, unsigned sensor, unsigned *c) { FAULT(d); (void)sensor; *c = 41; return 0; }
int nvmlDeviceGetCurrentClocksEventReasons(device *d, unsigned long long *r) { FAULT(d); *r = 4; return 0; }
