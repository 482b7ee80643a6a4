/* test_limits.c: memory and cores that control groups of either version leave, from files as the system shows them. */
#include "backends/cpu/limits.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHECK_IS(got, want)                                                                                            \
    do {                                                                                                               \
        const unsigned long long g = (unsigned long long)(got), w = (unsigned long long)(want);                        \
        if (g != w) {                                                                                                  \
            fprintf(stderr, "%s:%d: %s is %llu, not %llu\n", __FILE__, __LINE__, #got, g, w);                          \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static char root[] = "/tmp/rast-limits-XXXXXX", kept[64][256];
static size_t n_kept; /* what was made, to be removed in the end */

static void keep(const char *path) {
    CHECK_IS(n_kept < 64, 1);
    snprintf(kept[n_kept++], sizeof *kept, "%s", path);
}

/* Writes root/path, and the folders on the way. */
static void put(const char *path, const char *text) {
    char name[256];
    snprintf(name, sizeof name, "%s/%s", root, path);
    for (char *at = name + strlen(root) + 1; (at = strchr(at, '/')); at++) {
        *at = 0;
        if (mkdir(name, 0700) == 0) keep(name);
        *at = '/';
    }
    if (access(name, F_OK)) keep(name);
    FILE *f = fopen(name, "w");
    CHECK_IS(f != NULL, 1);
    fputs(text, f);
    fclose(f);
}

static void clear(void) {
    while (n_kept) remove(kept[--n_kept]);
}

int main(void) {
    CHECK_IS(mkdtemp(root) != NULL, 1);
    CHECK_IS(cpu_memory_left(root), SIZE_MAX);
    CHECK_IS(cpu_quota(root), INT32_MAX);

    put("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    8000 kB\n");
    CHECK_IS(cpu_memory_left(root), 8000 * 1024);
    CHECK_IS(cpu_memory_mapped(root), SIZE_MAX);
    put("proc/self/status", "Name:\tx\nVmPeak:\t  70 kB\nVmSize:\t  64 kB\n");
    CHECK_IS(cpu_memory_mapped(root), 64 * 1024);

    /* version 2: the group and the one above it */
    put("proc/self/cgroup", "0::/above/own\n");
    put("sys/fs/cgroup/above/own/memory.max", "max\n");
    put("sys/fs/cgroup/above/own/memory.current", "100\n");
    put("sys/fs/cgroup/above/own/cpu.max", "max 100000\n");
    CHECK_IS(cpu_memory_left(root), 8000 * 1024);
    CHECK_IS(cpu_quota(root), INT32_MAX);
    put("sys/fs/cgroup/above/memory.max", "5000000\n");
    put("sys/fs/cgroup/above/memory.current", "3000000\n");
    put("sys/fs/cgroup/above/cpu.max", "250000 100000\n");
    CHECK_IS(cpu_memory_left(root), 2000000);
    CHECK_IS(cpu_quota(root), 3);
    put("sys/fs/cgroup/above/memory.stat", "anon 7\ninactive_file 500\nactive_file 40\n");
    put("sys/fs/cgroup/above/own/cpu.max", "50000 100000\n");
    CHECK_IS(cpu_memory_left(root), 2000540);
    CHECK_IS(cpu_quota(root), 1);
    put("sys/fs/cgroup/above/own/memory.max", "50\n"); /* less than is used */
    CHECK_IS(cpu_memory_left(root), 0);
    clear();

    /* version 2 in a container: the path is that of the host, and the files lie at the root */
    put("proc/self/cgroup", "0::/not/here\n");
    put("sys/fs/cgroup/memory.max", "700\n");
    put("sys/fs/cgroup/memory.current", "200\n");
    put("sys/fs/cgroup/cpu.max", "400000 100000\n");
    CHECK_IS(cpu_memory_left(root), 500);
    CHECK_IS(cpu_quota(root), 4);
    clear();

    /* version 1: a hierarchy a controller */
    put("proc/meminfo", "MemAvailable:    8000 kB\n");
    put("proc/self/cgroup", "4:memory:/a\n2:cpu,cpuacct:/\n1:name=systemd:/x\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n");
    put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
    put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
    CHECK_IS(cpu_memory_left(root), 8000 * 1024);
    CHECK_IS(cpu_quota(root), INT32_MAX);
    put("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "6000\n");
    put("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "5000\n");
    put("sys/fs/cgroup/memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 20\n");
    put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "200000\n");
    CHECK_IS(cpu_memory_left(root), 1320);
    CHECK_IS(cpu_quota(root), 2);
    clear();
    CHECK_IS(rmdir(root), 0);
    return 0;
}
