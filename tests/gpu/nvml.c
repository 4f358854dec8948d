/* A twin of the library of NVIDIA's driver, for tests on machines without one. It says of GPUs and of who computes on them what the file says that
 * NVML_TWIN names, read anew at every question:
 *
 *   gpu UUID MIB LINKS MODEL...   a GPU, the next number
 *   compute GPU PID               a process that computes on one
 *   graphics GPU PID              a process that only draws
 *   hang                          no question is answered any more
 *
 * Only what batchai asks is here, and nothing says that a real driver answers like that: it is what the documentation of NVML says. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, UNKNOWN = 999 };
enum { GPUS_MAX = 16, PROCESSES_MAX = 64 };

struct gpu {
    char uuid[96], model[96];
    unsigned long long mib;
    unsigned links;
};
struct process {
    unsigned gpu, pid;
    int computes;
};
static struct {
    struct gpu gpus[GPUS_MAX];
    struct process processes[PROCESSES_MAX];
    unsigned gpu_count, process_count;
} twin;

static int look(void) {
    char line[512];
    const char *path = getenv("NVML_TWIN");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return UNKNOWN;
    memset(&twin, 0, sizeof twin);
    while (fgets(line, sizeof line, file)) {
        struct gpu *gpu = &twin.gpus[twin.gpu_count];
        struct process *process = &twin.processes[twin.process_count];
        if (!strncmp(line, "hang", 4)) {
            for (;;) pause();
        }
        if (twin.gpu_count < GPUS_MAX
            && sscanf(line, "gpu %95s %llu %u %95[^\n]", gpu->uuid, &gpu->mib, &gpu->links, gpu->model) == 4) {
            twin.gpu_count++;
        } else if (twin.process_count < PROCESSES_MAX
                   && sscanf(line, "compute %u %u", &process->gpu, &process->pid) == 2) {
            process->computes = 1;
            twin.process_count++;
        } else if (twin.process_count < PROCESSES_MAX
                   && sscanf(line, "graphics %u %u", &process->gpu, &process->pid) == 2) {
            process->computes = 0;
            twin.process_count++;
        }
    }
    fclose(file);
    return SUCCESS;
}

/* A handle is a number and one, so that none is nothing. */
static struct gpu *of(void *device) {
    unsigned long number = (unsigned long)device - 1;
    return look() == SUCCESS && number < twin.gpu_count ? &twin.gpus[number] : NULL;
}

int nvmlInit_v2(void) { return look(); }
int nvmlShutdown(void) { return SUCCESS; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "550.54.15");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    int looked = look();
    *count = twin.gpu_count;
    return looked;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned number, void **device) {
    if (look() != SUCCESS || number >= twin.gpu_count) return INVALID_ARGUMENT;
    *device = (void *)((unsigned long)number + 1);
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    struct gpu *gpu = of(device);
    if (!gpu) return NOT_FOUND;
    snprintf(uuid, length, "%s", gpu->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    struct gpu *gpu = of(device);
    if (!gpu) return NOT_FOUND;
    snprintf(name, length, "%s", gpu->model);
    return SUCCESS;
}

struct memory {
    unsigned version;
    unsigned long long total, reserved, available, used;
};

int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory *memory) {
    struct gpu *gpu = of(device);
    if (!gpu) return NOT_FOUND;
    memory->total = memory->available = gpu->mib << 20;
    memory->reserved = memory->used = 0;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *up) {
    struct gpu *gpu = of(device);
    if (!gpu) return NOT_FOUND;
    *up = link < gpu->links;
    return SUCCESS;
}

struct used {
    unsigned pid;
    unsigned long long bytes;
    unsigned instance, compute_instance;
};

static int processes(void *device, unsigned *count, struct used *all, int computes) {
    struct gpu *gpu = of(device);
    unsigned room = *count, at;
    if (!gpu) return NOT_FOUND;
    *count = 0;
    for (at = 0; at < twin.process_count; at++) {
        struct process *process = &twin.processes[at];
        if (process->gpu != (unsigned)(gpu - twin.gpus) || process->computes != computes) continue;
        if (all && *count < room) {
            memset(&all[*count], 0, sizeof *all);
            all[*count].pid = process->pid;
        }
        ++*count;
    }
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, struct used *all) {
    return processes(device, count, all, 1);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, struct used *all) {
    return processes(device, count, all, 0);
}
