/* limits.h: how much memory and how many cores the system leaves to this process: what it has, and control groups. */
#ifndef RAST_CPU_LIMITS_H
#define RAST_CPU_LIMITS_H

#include <stddef.h>
#include <stdint.h>

/* root: where proc and sys lie; "" on the machine itself. */
size_t cpu_memory_left(const char *root);   /* bytes that could be allocated now, an estimate; SIZE_MAX: unknown */
size_t cpu_memory_mapped(const char *root); /* bytes of the process's address space in use; SIZE_MAX: unknown */
int32_t cpu_quota(const char *root);        /* cores whose time the process may use, rounded up; INT32_MAX: all */

#endif
