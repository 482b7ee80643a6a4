/* error.c: see error.h. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

int rast_fail(rast_error *err, int code, const char *format, ...) {
    if (err) {
        va_list args;
        va_start(args, format);
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
        err->code = code;
    }
    return code;
}
