// SPDX-License-Identifier: GPL-2.0-only
/*
 * fuse and virtiofs as one module, for kernels that have them built in: boot
 * with initcall_blacklist=fuse_init,virtio_fs_init. Nothing here may be called
 * fuse_init, for the blacklist is asked by name for modules as well.
 */
#include <linux/fs.h>
#include <linux/module.h>

static int vfuse_module_init(void)
{
	int err = vfuse_fuse_init();

	if (err)
		return err;
	err = vfuse_virtio_fs_init();
	if (err)
		vfuse_fuse_exit();
	return err;
}

static void vfuse_module_exit(void)
{
	vfuse_virtio_fs_exit();
	vfuse_fuse_exit();
}

module_init(vfuse_module_init);
module_exit(vfuse_module_exit);

MODULE_ALIAS_FS("fuse");
MODULE_ALIAS_FS("fuseblk");
MODULE_ALIAS_FS("virtiofs");
MODULE_DESCRIPTION("FUSE and virtio-fs with remote fsnotify");
MODULE_LICENSE("GPL");
