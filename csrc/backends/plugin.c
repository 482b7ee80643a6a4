/* plugin.c: backends that are shared objects of their own, so that this library needs no device's libraries. */
#include <dlfcn.h>

#include "../error.h"
#include "backend.h"

int rast_plugin_open(const char *path, void **handle, const rast_ops **ops, rast_error *err) {
    *ops = NULL;
    /* what a device's runtime has registered at exit must not be unmapped */
    *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!*handle) return rast_fail(err, RAST_ERR_DEVICE, "the backend cannot be loaded: %s", dlerror());
    const rast_plugin *plugin = dlsym(*handle, "rast_backend_plugin");
    if (plugin && plugin->abi == RAST_PLUGIN_ABI && plugin->ops_bytes == sizeof(rast_ops)) {
        *ops = plugin->ops;
        return RAST_OK;
    }
    rast_plugin_close(*handle);
    *handle = NULL;
    if (!plugin) return rast_fail(err, RAST_ERR_DEVICE, "%s is not a backend of this library", path);
    return rast_fail(err, RAST_ERR_DEVICE, "%s was built for another version of this library (interface %u, not %d)",
                     path, (unsigned)plugin->abi, RAST_PLUGIN_ABI);
}

void rast_plugin_close(void *handle) {
    if (handle) dlclose(handle);
}
