/* limits.c: see limits.h. Control groups of both versions: a group and all above it have limits of their own, and any may be
 * out of sight in a container. */
#include "limits.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "../../error.h"

static size_t less(size_t a, size_t b) { return a < b ? a : b; }

/* A line "name number" of a file, in units of `unit` bytes; SIZE_MAX if it is not there. */
static size_t read_number(const char *folder, const char *file, const char *name, size_t unit) {
    char path[PATH_MAX], line[256];
    size_t value = SIZE_MAX;
    if (snprintf(path, sizeof path, "%s/%s", folder, file) >= (int)sizeof path) return value;
    FILE *f = fopen(path, "r");
    if (!f) return value;
    while (value == SIZE_MAX && fgets(line, sizeof line, f)) {
        unsigned long long number;
        const size_t len = strlen(name);
        if (strncmp(line, name, len) == 0 && line[len] != '-' && sscanf(line + len, "%llu", &number) == 1)
            value = (size_t)number;
    }
    fclose(f);
    return value == SIZE_MAX || !rast_mul(value, unit, &value) ? SIZE_MAX : value;
}

/* ---- the files of one group ---------------------------------------------------------------------------------------- */

typedef struct {
    size_t memory; /* bytes left */
    int32_t cores; /* that the quota pays for */
} limits;

/* What is left of `most` bytes; pages of files, mapped weights among them, give way. */
static size_t memory_left(const char *folder, size_t most, const char *usage, const char *idle, const char *busy) {
    const size_t used = read_number(folder, usage, "", 1);
    if (most == SIZE_MAX || used == SIZE_MAX) return SIZE_MAX;
    const size_t files[] = {read_number(folder, "memory.stat", idle, 1), read_number(folder, "memory.stat", busy, 1)};
    size_t left = most > used ? most - used : 0;
    for (size_t i = 0; i < 2; i++)
        if (files[i] != SIZE_MAX && !rast_add(left, less(files[i], used), &left)) left = SIZE_MAX;
    return less(left, most);
}

static int32_t cores_of(size_t quota, size_t period) {
    if (quota == SIZE_MAX || period == SIZE_MAX || !period) return INT32_MAX;
    const size_t cores = quota / period + (quota % period > 0);
    return cores < 1 ? 1 : cores < INT32_MAX ? (int32_t)cores : INT32_MAX;
}

/* cpu.max: "quota period", or "max period". */
static int32_t cores_of_v2(const char *folder) {
    char path[PATH_MAX];
    unsigned long long quota, period;
    if (snprintf(path, sizeof path, "%s/cpu.max", folder) >= (int)sizeof path) return INT32_MAX;
    FILE *f = fopen(path, "r");
    if (!f) return INT32_MAX;
    const int n = fscanf(f, "%llu %llu", &quota, &period);
    fclose(f);
    return n == 2 ? cores_of((size_t)quota, (size_t)period) : INT32_MAX;
}

static void visit(const char *folder, limits *l) {
    const size_t v2 = memory_left(folder, read_number(folder, "memory.max", "", 1), "memory.current", "inactive_file ",
                                  "active_file ");
    const size_t v1 = memory_left(folder, read_number(folder, "memory.limit_in_bytes", "", 1), "memory.usage_in_bytes",
                                  "total_inactive_file ", "total_active_file ");
    const int32_t cores[] = {cores_of_v2(folder), cores_of(read_number(folder, "cpu.cfs_quota_us", "", 1),
                                                           read_number(folder, "cpu.cfs_period_us", "", 1))};
    l->memory = less(l->memory, less(v1, v2));
    for (size_t i = 0; i < 2; i++)
        if (cores[i] < l->cores) l->cores = cores[i];
}

/* ---- all groups of the process --------------------------------------------------------------------------------------- */

/* The group at `path` below a mounted hierarchy, and all above it. */
static void visit_path(const char *mount, char *path, limits *l) {
    char folder[PATH_MAX];
    for (;;) {
        if (snprintf(folder, sizeof folder, "%s%s", mount, path) < (int)sizeof folder) visit(folder, l);
        char *last = strrchr(path, '/');
        if (!last) return;
        *last = 0;
    }
}

static limits find_limits(const char *root) {
    limits l = {SIZE_MAX, INT32_MAX};
    char name[PATH_MAX], line[PATH_MAX];
    if (snprintf(name, sizeof name, "%s/proc/self/cgroup", root) >= (int)sizeof name) return l;
    FILE *f = fopen(name, "r");
    if (!f) return l;
    while (fgets(line, sizeof line, f)) { /* "number:controllers:/path"; of version 2 "0::/path" */
        char mount[PATH_MAX], *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        const int n =
            snprintf(mount, sizeof mount, "%s/sys/fs/cgroup%s%s", root, controllers[1] ? "/" : "", controllers + 1);
        if (n < (int)sizeof mount) visit_path(mount, path, &l);
    }
    fclose(f);
    return l;
}

size_t cpu_memory_left(const char *root) {
    char folder[PATH_MAX];
    if (snprintf(folder, sizeof folder, "%s/proc", root) >= (int)sizeof folder) return SIZE_MAX;
    return less(read_number(folder, "meminfo", "MemAvailable:", 1024), find_limits(root).memory);
}

size_t cpu_memory_mapped(const char *root) {
    char folder[PATH_MAX];
    if (snprintf(folder, sizeof folder, "%s/proc/self", root) >= (int)sizeof folder) return SIZE_MAX;
    return read_number(folder, "status", "VmSize:", 1024);
}

int32_t cpu_quota(const char *root) { return find_limits(root).cores; }
