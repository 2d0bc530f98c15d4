// SPDX-License-Identifier: GPL-2.0-only
/*
 * The guest kernel's parser of FUSE_NOTIFY_FSNOTIFY messages under a fuzzer:
 * fs/fuse/fsnotify.c as our patches make it, included whole, on a small tree of
 * inodes.  For libFuzzer (-fsanitize=fuzzer); with -DALONE it has a main() that
 * takes files with messages, and then makes up some itself.
 *
 * An input is a message (first byte even), or a script for one (odd): eight
 * bytes for each record, so that most of what is made is well-formed.
 */
#include "kernel.h"
#include "fsnotify.c"

static struct super_block blocks[2];
static struct fuse_conn conn;
static struct fuse_mount mounts[2];
/* Directories 1 to 3, files 4 to 6, a directory 7 without a name in the dcache; on the second super block 3 and 4 */
static struct inode inodes[9];
static struct dentry aliases[9];
static struct fsnotify_group watcher;
static struct fsnotify_event overflowed;
static struct fsnotify_mark watching;
static struct fsnotify_mark_connector connectors[2];
static int blanks, dentries;
static u32 cookie;

static void add_inode(struct inode *inode, u64 nodeid, umode_t mode, struct super_block *sb, struct dentry *alias)
{
	inode->nodeid = nodeid;
	inode->i_mode = mode;
	inode->i_generation = nodeid == 6 ? 7 : 0;
	inode->i_sb = sb;
	inode->count = 1;
	inode->i_fsnotify_mask = nodeid & 1 ? ~0u : 0;
	inode->alias = alias;
	if (alias)
		*alias = (struct dentry){ .inode = inode, .count = 1 };
	list_add_tail(&inode->i_sb_list, &sb->s_inodes);
}

static void make_world(void)
{
	for (int i = 0; i < 2; i++) {
		INIT_LIST_HEAD(&blocks[i].s_inodes);
		mounts[i].fc = &conn;
		mounts[i].sb = &blocks[i];
	}
	blocks[0].s_fsnotify_mask = FS_DELETE | FS_RENAME | FS_MODIFY;
	INIT_LIST_HEAD(&conn.mounts);
	list_add_tail(&mounts[0].fc_entry, &conn.mounts);
	list_add_tail(&mounts[1].fc_entry, &conn.mounts);
	for (int i = 0; i < 7; i++)
		add_inode(&inodes[i], i + 1, i < 3 || i == 6 ? S_IFDIR : S_IFREG, &blocks[0], i == 6 ? NULL : &aliases[i]);
	add_inode(&inodes[7], 3, S_IFDIR, &blocks[1], &aliases[7]);
	add_inode(&inodes[8], 4, S_IFREG, &blocks[1], &aliases[8]);
	inodes[4].bad = true;
	watcher.overflow_event = &overflowed;
	INIT_LIST_HEAD(&overflowed.list);
	INIT_LIST_HEAD(&watcher.notification_list);
	watching.group = &watcher;
	for (int i = 0; i < 2; i++)
		connectors[i].list.first = &watching.obj_list;
	must(fuse_fsnotify_module_init() == 0);
	must(fuse_fsnotify_offer(&conn) == FUSE_HAS_FSNOTIFY);
	fuse_fsnotify_init_done(&conn, true);
	fuse_fsnotify_permission(&inodes[0], MAY_READ);
	fuse_fsnotify_permission(&inodes[3], MAY_READ);
}

struct fuse_conn *get_fuse_conn(struct inode *inode) { (void)inode; return &conn; }
struct fuse_mount *get_fuse_mount(struct inode *inode) { return &mounts[inode->i_sb - blocks]; }

struct inode *fuse_ilookup_sb(struct super_block *sb, u64 nodeid)
{
	must(conn.killsb.readers > 0);
	for (size_t i = 0; i < ARRAY_SIZE(inodes); i++)
		if (inodes[i].i_sb == sb && inodes[i].nodeid == nodeid)
			return igrab(&inodes[i]);
	return NULL;
}

struct inode *fuse_ilookup(struct fuse_conn *fc, u64 nodeid, struct fuse_mount **fm)
{
	(void)fm;
	must(fc == &conn);
	return fuse_ilookup_sb(&blocks[0], nodeid) ?: fuse_ilookup_sb(&blocks[1], nodeid);
}

struct inode *new_inode(struct super_block *sb)
{
	struct inode *inode = calloc(1, sizeof(*inode));

	inode->i_sb = sb;
	inode->count = 1;
	blanks++;
	return inode;
}

void iput(struct inode *inode)
{
	if (!inode)
		return;
	might_sleep();
	must(inode->count > 0);
	if (--inode->count == 0) {
		must(inode->nodeid == 0);
		free(inode);
		blanks--;
	}
}

struct dentry *d_find_alias(struct inode *inode)
{
	if (inode->alias)
		inode->alias->count++;
	return inode->alias;
}

struct dentry *d_alloc(struct dentry *parent, const struct qstr *name)
{
	struct dentry *dentry = calloc(1, sizeof(*dentry));
	unsigned char *copy = malloc(name->len);

	must(parent->count > 1 && name->len > 0 && name->len <= NAME_MAX);
	memcpy(copy, name->name, name->len);
	dentry->count = 1;
	dentry->d_name = (struct qstr){ name->len, copy };
	dentries++;
	return dentry;
}

void dput(struct dentry *dentry)
{
	if (!dentry)
		return;
	must(dentry->count > 0);
	if (--dentry->count == 0) {
		must(dentry->d_name.name);
		free((void *)dentry->d_name.name);
		free(dentry);
		dentries--;
	}
}

/* What fs/notify may rely upon */
int fsnotify(u32 mask, const void *data, int data_type, struct inode *dir, const struct qstr *name,
	     struct inode *inode, u32 move)
{
	u32 event = mask & ~(FS_ISDIR | FS_EVENT_ON_CHILD);

	must(event && !(event & (event - 1)));
	must(!(event & FS_DELETE_SELF));
	must(data && (data_type == FSNOTIFY_EVENT_INODE || data_type == FSNOTIFY_EVENT_DENTRY));
	must(!move || (event & FS_MOVE));
	must(!(event & FS_MOVE) || move);
	if (dir) {
		must(S_ISDIR(dir->i_mode) && dir->count > 1);
		must(name && name->len > 0 && name->len <= NAME_MAX);
		must(!memchr(name->name, '/', name->len) && !memchr(name->name, 0, name->len));
		must(name->name[name->len] == 0);
	} else {
		must(!name);
	}
	if (inode)
		must(inode->count > 0);
	if (data_type == FSNOTIFY_EVENT_DENTRY)
		must(((const struct dentry *)data)->count > 0);
	return 0;
}

u32 fsnotify_get_cookie(void) { return ++cookie ?: ++cookie; }

struct fsnotify_group *fsnotify_alloc_group(const struct fsnotify_ops *ops, int flags)
{
	(void)ops, (void)flags;
	return calloc(1, sizeof(struct fsnotify_group));
}

void fsnotify_init_mark(struct fsnotify_mark *mark, struct fsnotify_group *group)
{
	mark->group = group;
	mark->count = 1;
}

static int add_mark(struct fsnotify_mark *mark, struct fsnotify_mark_connector *connector)
{
	might_sleep();
	mark->connector = connector;
	mark->obj_list.next = connector->list.first;
	connector->list.first = &mark->obj_list;
	mark->count++;
	return 0;
}

int fsnotify_add_inode_mark(struct fsnotify_mark *mark, struct inode *inode, int flags)
{
	(void)flags;
	must(inode->count > 1);
	return add_mark(mark, &connectors[0]);
}

int add_sb_mark(struct fsnotify_mark *mark)
{
	return add_mark(mark, &connectors[1]);
}

void fsnotify_destroy_mark(struct fsnotify_mark *mark, struct fsnotify_group *group)
{
	(void)group;
	must(mark->connector->list.first == &mark->obj_list);
	mark->connector->list.first = mark->obj_list.next;
	fsnotify_put_mark(mark);
}

void fsnotify_put_mark(struct fsnotify_mark *mark)
{
	if (--mark->count == 0)
		fuse_fsnotify_free_mark(mark);
}

/* --- the fuzzer's side --- */

/* One record of a script; returns its bytes */
static size_t add_record(const uint8_t *script, char *to)
{
	static const u32 masks[] = { FS_MODIFY, FS_CREATE, FS_DELETE, FS_MOVED_FROM, FS_MOVED_TO, FS_ATTRIB, FS_MOVE_SELF,
				     FS_DELETE_SELF, FS_OPEN, FS_ISDIR | FS_CREATE, ~0u, 0 };
	struct fuse_fsnotify_event *ev = (struct fuse_fsnotify_event *)to;
	u32 length = script[4] < 250 ? script[4] % 9 : script[4] < 253 ? NAME_MAX : NAME_MAX + 1;
	u32 reclen = sizeof(*ev) + (length ? length + 1 : 0);

	reclen = (reclen + 7) & ~7u;
	memset(to, 0, reclen);
	ev->reclen = script[7] == 249 ? script[5] * 8 : script[7] == 248 ? script[5] : reclen;
	ev->flags = script[0] < 192 ? 0 : script[0] < 224 ? FUSE_FSNOTIFY_EVENT_PAIRED : script[0] < 240 ? FUSE_FSNOTIFY_EVENT_OVERFLOW : script[0];
	if (ev->flags == FUSE_FSNOTIFY_EVENT_OVERFLOW && script[1] < 200)
		return ev->reclen = sizeof(*ev);
	ev->nodeid = script[1] % 9;
	ev->child = script[2] % 9;
	ev->mask = masks[script[3] % ARRAY_SIZE(masks)] | masks[(script[3] >> 4) % ARRAY_SIZE(masks)];
	if (script[0] & 1)
		ev->mask |= (u64)script[6] << 32;
	ev->generation = script[6] == 255;
	ev->child_generation = ev->child == 6 ? 7 : 0;
	ev->cookie = script[6] & 7;
	ev->namelen = script[7] == 255 ? script[5] : script[7] == 254 ? reclen - sizeof(*ev) + (script[5] & 1) : length;
	memset(ev->name, 'a' + (script[5] & 15), length);
	if (length && script[5] >= 250)
		ev->name[script[5] & 4 ? 0 : length / 2] = script[5] & 1 ? '/' : 0;
	if (length && script[7] >= 252)
		memset(ev->name + length, 'z', reclen - sizeof(*ev) - length);
	return reclen;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static bool made;
	static char built[64 * 1024];
	char *message;
	int err;

	if (!made) {
		make_world();
		made = true;
	}
	if (!size)
		return 0;
	if (data[0] & 1) {
		size_t length = 0;

		for (size_t at = 1; at + 8 <= size && length < sizeof(built) - 512; at += 8)
			length += add_record(data + at, built + length);
		data = (const uint8_t *)built;
		size = length;
	} else {
		data++;
		size--;
	}
	/* Of exactly this size: what lies behind it is not to be read */
	message = malloc(size ?: 1);
	memcpy(message, data, size);
	jiffies += HZ;
	err = fuse_fsnotify_receive(&conn, message, size);
	must(err == 0 || err == -EINVAL || err == -ENOENT);
	/* As fuse_notify_delete() does */
	down_read(&conn.killsb);
	fuse_fsnotify_gone(&conn, size % 10);
	up_read(&conn.killsb);
	conn.fsnotify->drop_work.work.func(&conn.fsnotify->drop_work.work);
	must(memcmp(message, data, size) == 0);
	free(message);

	must(conn.killsb.readers == 0 && spinlocks == 0 && blanks == 0 && dentries == 0);
	for (size_t i = 0; i < ARRAY_SIZE(inodes); i++)
		must(inodes[i].count == 1 && (!inodes[i].alias || inodes[i].alias->count == 1));
	must(watcher.q_len <= 1);
	if (watcher.q_len) {
		list_del_init(&overflowed.list);
		watcher.q_len = 0;
	}
	return 0;
}

#ifdef ALONE
#include <time.h>

/* parser SECONDS SEED FILE... */
int main(int argc, char **argv)
{
	static uint8_t bytes[64 * 1024];
	unsigned long runs = 0;
	uint64_t state;
	time_t end;

	if (argc < 3)
		return 2;
	for (int i = 3; i < argc; i++) {
		FILE *file = fopen(argv[i], "r");
		size_t size = 0;
		unsigned int byte;

		if (!file)
			return 2;
		while (size < sizeof(bytes) && fscanf(file, "%2x", &byte) == 1)
			bytes[size++] = byte;
		fclose(file);
		LLVMFuzzerTestOneInput(bytes, size);
	}
	fprintf(stderr, "%d files, seed %s\n", argc - 3, argv[2]);
	state = strtoull(argv[2], NULL, 10) * 2 + 1;
	for (end = time(NULL) + atoi(argv[1]); time(NULL) < end;) {
		for (int i = 0; i < 1000; i++, runs++) {
			size_t size = 1 + 8 * (state >> 32 & 15);

			for (size_t at = 0; at < size; at++) {
				state ^= state << 13, state ^= state >> 7, state ^= state << 17;
				bytes[at] = state >> 24;
			}
			bytes[0] |= (runs & 7) != 0;
			LLVMFuzzerTestOneInput(bytes, size);
		}
	}
	printf("%lu messages, nothing found\n", runs);
	return 0;
}
#endif
