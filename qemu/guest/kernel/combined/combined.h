/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Included first by every file of fs/fuse when it becomes the one module
 * vfuse.ko. A kernel that has fuse built in exports the same symbols, and a
 * module has one init function.
 */
#include <linux/export.h>
#include <linux/module.h>

int vfuse_fuse_init(void);
void vfuse_fuse_exit(void);
int vfuse_virtio_fs_init(void);
void vfuse_virtio_fs_exit(void);

#ifndef VFUSE_MAIN

#undef EXPORT_SYMBOL
#undef EXPORT_SYMBOL_GPL
#define EXPORT_SYMBOL(sym)
#define EXPORT_SYMBOL_GPL(sym)

#undef module_init
#undef module_exit
#define module_init(fn)	int vfuse_##fn(void) { return fn(); }
#define module_exit(fn)	void vfuse_##fn(void) { fn(); }

/* These functions are called from the module's own init and exit functions */
#undef __init
#undef __exit
#define __init
#define __exit

#endif /* VFUSE_MAIN */
