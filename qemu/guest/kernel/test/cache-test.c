// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test of what an invalidation does to a reply that is on its way. This program
 * is the guest's init and serves a small file system on /dev/fuse with timeouts
 * for ever. It changes an object and sends the notification after it has filled
 * in the reply, and before it sends it: the kernel gets them in the order in
 * which they must not be lost.
 */
#include "guest.h"

#include <sys/syscall.h>

#define MNT "/mnt"
#define LONG 1000000		/* seconds */
#ifndef FUSE_PARALLEL_DIROPS
#define FUSE_PARALLEL_DIROPS (1 << 18)
#endif
#define OP_TMPFILE 51

/* ------------------------------------------------------------- the server */

/* The objects: the index is the nodeid. Only mtime and nlink ever change. */
static struct object {
	mode_t mode;
	uint64_t mtime;
	uint32_t nlink;
	uint64_t forgotten;	/* look-ups that FORGET gave back */
} objects[128] = { [1] = { S_IFDIR | 0755, 1, 2, 0 } };

static struct name {
	uint64_t parent;
	uint64_t id;		/* 0: does not exist, and the kernel may remember that */
	char name[24];
	bool short_lived;	/* its entry times out at once */
} names[128];
static uint64_t nobjects = 2;
static size_t nnames;

static struct {
	int fd;
	pthread_t thread;
	int counts[64];		/* requests by opcode */
	uint32_t race_op;	/* before the next reply to this ... */
	void (*race)(void);	/* ... do that */
	uint64_t id;		/* what it does that to */
	uint64_t made;		/* the last object that was made */
} srv;

static uint64_t object(mode_t mode)
{
	objects[nobjects] = (struct object){ mode, 1, S_ISDIR(mode) ? 2 : 1, 0 };
	return nobjects++;
}

static struct name *name(uint64_t parent, const char *text, uint64_t id)
{
	struct name *n = &names[nnames++];

	n->parent = parent;
	n->id = id;
	snprintf(n->name, sizeof(n->name), "%.23s", text);
	return n;
}

static struct name *find(uint64_t parent, const char *text)
{
	for (size_t i = 0; i < nnames; i++)
		if (names[i].parent == parent && !strcmp(names[i].name, text))
			return &names[i];
	return NULL;
}

static void fill_attr(struct fuse_attr *attr, uint64_t id)
{
	attr->ino = id;
	attr->mode = objects[id].mode;
	attr->mtime = objects[id].mtime;
	attr->nlink = objects[id].nlink;
	attr->blksize = 4096;
}

static void fill_entry(struct fuse_entry_out *entry, uint64_t id)
{
	memset(entry, 0, sizeof(*entry));
	entry->entry_valid = LONG;
	entry->nodeid = id;
	if (!id)
		return;
	entry->generation = id == 1 ? 0 : 1;
	entry->attr_valid = LONG;
	fill_attr(&entry->attr, id);
}

/* All of a directory fits into one reply; the second is empty */
static size_t list(uint64_t dir, uint64_t offset, bool plus, char *out)
{
	size_t size = 0, k = 0;

	for (size_t i = 0; i < nnames; i++) {
		struct fuse_direntplus *p = (void *)(out + size);
		struct fuse_dirent *d = plus ? &p->dirent : (void *)p;
		size_t len = strlen(names[i].name);

		if (names[i].parent != dir || !names[i].id || k++ < offset)
			continue;
		if (plus)
			fill_entry(&p->entry_out, names[i].id);
		d->ino = names[i].id;
		d->off = k;
		d->namelen = len;
		d->type = objects[names[i].id].mode >> 12;
		memcpy(d->name, names[i].name, len);
		size += plus ? FUSE_DIRENTPLUS_SIZE(p) : FUSE_DIRENT_SIZE(d);
	}
	return size;
}

static void reply(uint64_t unique, int error, const void *data, size_t len)
{
	struct fuse_out_header oh = { sizeof(oh) + len, error, unique };
	struct iovec iov[2] = { { &oh, sizeof(oh) }, { (void *)data, len } };

	if (writev(srv.fd, iov, len ? 2 : 1) < 0 && errno != ENOENT)
		perror("reply");
}

static int notify(int code, const void *data, size_t len)
{
	struct fuse_out_header oh = { sizeof(oh) + len, code, 0 };
	struct iovec iov[2] = { { &oh, sizeof(oh) }, { (void *)data, len } };

	return writev(srv.fd, iov, 2) < 0 ? -errno : 0;
}

static int inval_inode(uint64_t id, int64_t offset)
{
	struct fuse_notify_inval_inode_out out = { .ino = id, .off = offset };

	return notify(FUSE_NOTIFY_INVAL_INODE, &out, sizeof(out));
}

/*
 * Two readers of one directory: the first one's reply is kept until the second
 * one has asked, and the second one's until the first has taken its own.
 */
static struct {
	uint64_t dir;
	int step;
	char old[512];
	size_t oldlen;
	uint64_t first, second;
	bool plus;
} readers;

static bool two_readers(struct fuse_in_header *h)
{
	char now[512] = {};

	if (h->nodeid != readers.dir)
		return false;
	switch (readers.step++) {
	case 0:
		readers.first = h->unique;
		readers.plus = h->opcode == FUSE_READDIRPLUS;
		readers.oldlen = list(h->nodeid, 0, readers.plus, readers.old);
		strcpy(find(readers.dir, "old")->name, "new");
		check(inval_inode(readers.dir, 0) == 0, "two readers: INVAL_INODE");
		return true;
	case 1:
		readers.second = h->unique;
		reply(readers.first, 0, readers.old, readers.oldlen);
		return true;
	case 2:
		reply(h->unique, 0, NULL, 0);
		reply(readers.second, 0, now, list(h->nodeid, 0, readers.plus, now));
		return true;
	default:
		return false;
	}
}

static void handle(struct fuse_in_header *h, void *arg)
{
	union {
		struct fuse_init_out init;
		struct fuse_attr_out attr;
		struct fuse_entry_out entry;
		struct { struct fuse_entry_out entry; struct fuse_open_out open; } create;
		struct fuse_open_out open;
		struct fuse_statfs_out statfs;
		char list[4096];
	} out;
	struct name *n;
	size_t len = 0;
	int error = 0;

	memset(&out, 0, sizeof(out));
	if (h->opcode < 64)
		__atomic_add_fetch(&srv.counts[h->opcode], 1, __ATOMIC_SEQ_CST);
	switch (h->opcode) {
	case FUSE_INIT:
		out.init.major = 7;
		out.init.minor = 36;
		out.init.max_write = 4096;
		out.init.max_background = 8;
		out.init.congestion_threshold = 6;
		out.init.flags = FUSE_EXPORT_SUPPORT | FUSE_DO_READDIRPLUS | FUSE_PARALLEL_DIROPS;
		len = sizeof(out.init);
		break;
	case FUSE_LOOKUP:
		len = sizeof(out.entry);
		if (!strcmp(arg, ".")) {
			fill_entry(&out.entry, h->nodeid);
			break;
		}
		n = find(h->nodeid, arg);
		fill_entry(&out.entry, n ? n->id : 0);
		if (n && n->short_lived)
			out.entry.entry_valid = 0;
		break;
	case FUSE_GETATTR:
	case FUSE_SETATTR:
		out.attr.attr_valid = LONG;
		fill_attr(&out.attr.attr, h->nodeid);
		len = sizeof(out.attr);
		break;
	case FUSE_CREATE:
	case OP_TMPFILE:
		srv.made = object(S_IFREG | 0644);
		if (h->opcode == FUSE_CREATE)
			name(h->nodeid, (char *)arg + sizeof(struct fuse_create_in), srv.made);
		fill_entry(&out.create.entry, srv.made);
		len = sizeof(out.create);
		break;
	case FUSE_MKNOD:
		srv.made = object(S_IFIFO | 0644);
		name(h->nodeid, (char *)arg + sizeof(struct fuse_mknod_in), srv.made);
		fill_entry(&out.entry, srv.made);
		len = sizeof(out.entry);
		break;
	case FUSE_MKDIR:
		srv.made = object(S_IFDIR | 0755);
		name(h->nodeid, (char *)arg + sizeof(struct fuse_mkdir_in), srv.made);
		fill_entry(&out.entry, srv.made);
		len = sizeof(out.entry);
		break;
	case FUSE_SYMLINK:
		srv.made = object(S_IFLNK | 0777);
		name(h->nodeid, arg, srv.made);
		fill_entry(&out.entry, srv.made);
		len = sizeof(out.entry);
		break;
	case FUSE_LINK:
		srv.made = ((struct fuse_link_in *)arg)->oldnodeid;
		name(h->nodeid, (char *)arg + sizeof(struct fuse_link_in), srv.made);
		objects[srv.made].nlink++;
		fill_entry(&out.entry, srv.made);
		len = sizeof(out.entry);
		break;
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
		if (two_readers(h))
			return;
		len = list(h->nodeid, ((struct fuse_read_in *)arg)->offset,
			   h->opcode == FUSE_READDIRPLUS, out.list);
		break;
	case FUSE_OPENDIR:
		out.open.open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR;
		/* fall through */
	case FUSE_OPEN:
		len = sizeof(out.open);
		break;
	case FUSE_STATFS:
		out.statfs.st.namelen = 255;
		out.statfs.st.bsize = 4096;
		len = sizeof(out.statfs);
		break;
	case FUSE_FLUSH:
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		break;
	case FUSE_FORGET:
		__atomic_add_fetch(&objects[h->nodeid].forgotten,
				   ((struct fuse_forget_in *)arg)->nlookup, __ATOMIC_SEQ_CST);
		return;
	case FUSE_BATCH_FORGET:
		for (uint32_t i = 0; i < ((struct fuse_batch_forget_in *)arg)->count; i++) {
			struct fuse_forget_one *one =
				(struct fuse_forget_one *)((struct fuse_batch_forget_in *)arg + 1) + i;

			__atomic_add_fetch(&objects[one->nodeid].forgotten, one->nlookup,
					   __ATOMIC_SEQ_CST);
		}
		return;
	case FUSE_INTERRUPT:
		return;
	default:
		error = -ENOSYS;
	}
	if (srv.race && h->opcode == srv.race_op) {
		void (*race)(void) = srv.race;

		srv.race = NULL;
		race();
	}
	reply(h->unique, error, &out, len);
}

static void *serve(void *unused)
{
	(void)unused;
	serve_fuse(&srv.fd, handle);
	return NULL;
}

static int count(int opcode)
{
	return __atomic_load_n(&srv.counts[opcode], __ATOMIC_SEQ_CST);
}

/* Before the next reply to a request do this; to an object that may not exist yet */
static void race_with(uint32_t opcode, uint64_t id, void (*fn)(void))
{
	srv.race_op = opcode;
	srv.id = id;
	srv.race = fn;
}

/* ----------------------------------------------------------- the races */

/* The object's mtime changes, and the kernel is told */
static void change(void)
{
	uint64_t id = srv.id ?: srv.made;

	objects[id].mtime++;
	/* ENOENT: not known yet */
	int ret = inval_inode(id, -1);
	check(ret == 0 || ret == -ENOENT, "INVAL_INODE: %d", ret);
}

static void drop_caches(void)
{
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);

	/* What was used since the last time survives once */
	for (int i = 0; i < 4; i++)
		check(fd >= 0 && write(fd, "2", 1) == 1, "drop_caches: %s", strerror(errno));
	close(fd);
}

static void change_and_evict(void)
{
	change();
	drop_caches();
}

static void *send_entry(void *text)
{
	struct { struct fuse_notify_inval_entry_out out; char name[24]; } msg = {
		.out = { .parent = srv.id, .namelen = strlen(text) },
	};

	strcpy(msg.name, text);
	notify(FUSE_NOTIFY_INVAL_ENTRY, &msg, sizeof(msg.out) + msg.out.namelen + 1);
	return NULL;
}

static struct {
	pthread_t thread;
	pid_t tid;
	bool done, waited;
} entry;

static void *send_entry_thread(void *text)
{
	__atomic_store_n(&entry.tid, syscall(SYS_gettid), __ATOMIC_SEQ_CST);
	send_entry(text);
	__atomic_store_n(&entry.done, true, __ATOMIC_SEQ_CST);
	return NULL;
}

/*
 * Send FUSE_NOTIFY_INVAL_ENTRY from another thread, for it may wait for the lock
 * of the directory. Go on when it is done or waits.
 */
static void change_entry(void)
{
	struct name *n = find(srv.id, "entry");

	memset(&entry, 0, sizeof(entry));
	pthread_create(&entry.thread, NULL, send_entry_thread, n->name);
	for (long begin = now_ms(); now_ms() - begin < 60000; msleep(1)) {
		char path[64], line[256], state = 0;
		FILE *f;

		if (__atomic_load_n(&entry.done, __ATOMIC_SEQ_CST))
			return;
		if (!__atomic_load_n(&entry.tid, __ATOMIC_SEQ_CST))
			continue;
		snprintf(path, sizeof(path), "/proc/self/task/%d/stat", entry.tid);
		f = fopen(path, "r");
		if (!f)
			continue;
		if (fgets(line, sizeof(line), f) && strrchr(line, ')'))
			state = strrchr(line, ')')[2];
		fclose(f);
		if (state == 'D') {
			entry.waited = true;
			return;
		}
	}
	check(false, "the notification neither waits nor is done");
}

/* ------------------------------------------------------------------- tests */

static struct stat st;

static uint64_t mtime_of(const char *path)
{
	memset(&st, 0, sizeof(st));
	if (lstat(path, &st))
		check(false, "stat %s: %s", path, strerror(errno));
	return st.st_mtime;
}

/*
 * What the kernel says of a path after a race is what it would say without
 * cache; it may ask once for that, and not again.
 */
static void expect_fresh(const char *what, const char *path, uint64_t id)
{
	uint64_t mtime = mtime_of(path);
	int asked = count(FUSE_GETATTR) + count(FUSE_LOOKUP);

	check(!srv.race, "%s: no such request", what);
	check(mtime == objects[id].mtime && mtime == 2, "%s: mtime %lu, is %lu", what,
	      (unsigned long)mtime, (unsigned long)objects[id].mtime);
	check(st.st_nlink == objects[id].nlink, "%s: %lu links, are %u", what,
	      (unsigned long)st.st_nlink, objects[id].nlink);
	mtime_of(path);
	check(count(FUSE_GETATTR) + count(FUSE_LOOKUP) == asked, "%s: attributes are not cached", what);
}

static void test_cached(void)
{
	name(1, "cached", object(S_IFREG | 0644));
	int asked = count(FUSE_GETATTR);
	mtime_of(MNT "/cached");
	mtime_of(MNT "/cached");
	check(count(FUSE_GETATTR) == asked, "LOOKUP alone: attributes are not cached");

	close(open(MNT "/created", O_CREAT | O_RDWR, 0644));
	mtime_of(MNT "/created");
	check(count(FUSE_GETATTR) == asked, "CREATE alone: attributes are not cached");

	/* What is missed is nothing to requests that come later */
	check(inval_inode(99, 0) == -ENOENT, "INVAL_INODE of an unknown nodeid");
	name(1, "later", object(S_IFREG | 0644));
	mtime_of(MNT "/later");
	mtime_of(MNT "/later");
	check(count(FUSE_GETATTR) == asked, "LOOKUP after a missed INVAL_INODE: attributes are not cached");
}

static void test_lookup(void)
{
	uint64_t id = object(S_IFREG | 0644);

	name(1, "lookup", id);
	race_with(FUSE_LOOKUP, id, change);
	mtime_of(MNT "/lookup");
	expect_fresh("LOOKUP", MNT "/lookup", id);
}

static void test_readdirplus(void)
{
	uint64_t dir = object(S_IFDIR | 0755), id = object(S_IFREG | 0644);
	DIR *d;

	name(1, "plus", dir);
	name(dir, "file", id);
	d = opendir(MNT "/plus");
	race_with(FUSE_READDIRPLUS, id, change);
	while (readdir(d))
		;
	closedir(d);
	int lookups = count(FUSE_LOOKUP);
	expect_fresh("READDIRPLUS", MNT "/plus/file", id);
	check(count(FUSE_LOOKUP) == lookups, "READDIRPLUS: entry is not cached");
}

static void test_create(void)
{
	race_with(FUSE_CREATE, 0, change);
	close(open(MNT "/create", O_CREAT | O_RDWR, 0644));
	expect_fresh("CREATE", MNT "/create", srv.made);

	race_with(FUSE_MKNOD, 0, change);
	mknod(MNT "/mknod", S_IFIFO | 0644, 0);
	expect_fresh("MKNOD", MNT "/mknod", srv.made);

	race_with(FUSE_MKDIR, 0, change);
	mkdir(MNT "/mkdir", 0755);
	expect_fresh("MKDIR", MNT "/mkdir", srv.made);

	race_with(FUSE_SYMLINK, 0, change);
	check(!symlink("x", MNT "/symlink"), "symlink");
	expect_fresh("SYMLINK", MNT "/symlink", srv.made);

	race_with(OP_TMPFILE, 0, change);
	int fd = open(MNT, O_TMPFILE | O_RDWR, 0644);
	char path[64];
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	check(fd >= 0 && !srv.race, "O_TMPFILE: %s", strerror(errno));
	check(!fstat(fd, &st), "O_TMPFILE: fstat");
	check(st.st_mtime == 2, "TMPFILE: mtime %ld", st.st_mtime);
	close(fd);
}

static void test_link(void)
{
	uint64_t id = object(S_IFREG | 0644);

	name(1, "source", id);
	mtime_of(MNT "/source");
	race_with(FUSE_LINK, id, change);
	check(!link(MNT "/source", MNT "/target"), "link");
	expect_fresh("LINK", MNT "/target", id);
	expect_fresh("LINK (old name)", MNT "/source", id);
}

static void test_setattr(void)
{
	uint64_t id = object(S_IFREG | 0644);

	name(1, "setattr", id);
	mtime_of(MNT "/setattr");
	race_with(FUSE_SETATTR, id, change);
	check(!chmod(MNT "/setattr", 0644), "chmod");
	expect_fresh("SETATTR", MNT "/setattr", id);
}

static void test_handle(void)
{
	union { struct file_handle h; char space[sizeof(struct file_handle) + 128]; } u;
	uint64_t id = object(S_IFREG | 0644);
	int root = open(MNT, O_RDONLY | O_DIRECTORY), mnt, fd;

	name(1, "handle", id);
	u.h.handle_bytes = 128;
	check(!name_to_handle_at(AT_FDCWD, MNT "/handle", &u.h, &mnt, 0), "name_to_handle_at");
	drop_caches();
	int lookups = count(FUSE_LOOKUP);
	race_with(FUSE_LOOKUP, id, change);
	fd = open_by_handle_at(root, &u.h, O_RDONLY);
	check(fd >= 0 && count(FUSE_LOOKUP) == lookups + 1, "open_by_handle_at: %s", strerror(errno));
	check(!fstat(fd, &st), "open_by_handle_at: fstat");
	check(st.st_mtime == 2, "LOOKUP by handle: mtime %ld", st.st_mtime);
	close(fd);
	close(root);
}

/* The inode was known to the invalidation, and is gone before the reply comes */
static void test_evict(void)
{
	uint64_t id = object(S_IFREG | 0644);

	name(1, "evict1", id);
	name(1, "evict2", id);
	objects[id].nlink = 2;
	mtime_of(MNT "/evict1");
	race_with(FUSE_LOOKUP, id, change_and_evict);
	mtime_of(MNT "/evict2");
	expect_fresh("LOOKUP and eviction", MNT "/evict2", id);
	for (int i = 0; i < 1000 && !__atomic_load_n(&objects[id].forgotten, __ATOMIC_SEQ_CST); i++)
		msleep(10);
	check(objects[id].forgotten == 1, "eviction: not evicted");
}

static const char *names_in(const char *path)
{
	static char names[256];
	DIR *d = opendir(path);
	struct dirent *e;

	*names = 0;
	while (d && (e = readdir(d)))
		if (strlen(names) < sizeof(names) - 25)
			sprintf(names + strlen(names), "%.23s ", e->d_name);
	if (d)
		closedir(d);
	return names;
}

static void change_list(void)
{
	struct name *n = find(srv.id, "old");

	if (n)
		strcpy(n->name, "new");
	else
		name(srv.id, "new", object(S_IFREG | 0644));
	check(inval_inode(srv.id, 0) == 0, "INVAL_INODE of a directory");
}

static void *read_dir(void *path)
{
	names_in(path);
	return NULL;
}

static void test_list(void)
{
	uint64_t dir = object(S_IFDIR | 0755);
	pthread_t thread;
	int reads;

	name(1, "list", dir);
	name(dir, "old", object(S_IFREG | 0644));
	race_with(FUSE_READDIRPLUS, dir, change_list);
	expect("READDIR, under way", names_in(MNT "/list"), "old ");
	expect("READDIR, after", names_in(MNT "/list"), "new ");
	reads = count(FUSE_READDIRPLUS);
	expect("READDIR, cached", names_in(MNT "/list"), "new ");
	check(count(FUSE_READDIRPLUS) == reads, "READDIR: the list is not cached");

	/* An empty list */
	dir = object(S_IFDIR | 0755);
	name(1, "empty", dir);
	race_with(FUSE_READDIRPLUS, dir, change_list);
	expect("READDIR of nothing, under way", names_in(MNT "/empty"), "");
	expect("READDIR of nothing, after", names_in(MNT "/empty"), "new ");

	/* The reply to somebody who asked before is not cached with those who ask later */
	dir = object(S_IFDIR | 0755);
	name(1, "two", dir);
	name(dir, "old", object(S_IFREG | 0644));
	mtime_of(MNT "/two");
	readers.dir = dir;
	pthread_create(&thread, NULL, read_dir, MNT "/two");
	while (__atomic_load_n(&readers.step, __ATOMIC_SEQ_CST) < 1)
		msleep(1);
	names_in(MNT "/two");
	pthread_join(thread, NULL);
	expect("READDIR by two", names_in(MNT "/two"), "new ");
}

/*
 * A name that is looked up or listed: its directory is locked, so that the
 * invalidation waits for it, and drops it.
 */
static void test_entry(void)
{
	uint64_t dir = object(S_IFDIR | 0755), id = object(S_IFREG | 0644);
	struct name *n;
	int lookups;

	name(1, "entries", dir);
	n = name(dir, "entry", id);
	mtime_of(MNT "/entries");

	race_with(FUSE_LOOKUP, dir, change_entry);
	lookups = count(FUSE_LOOKUP);
	mtime_of(MNT "/entries/entry");
	pthread_join(entry.thread, NULL);
	check(entry.waited, "INVAL_ENTRY during LOOKUP did not wait");
	mtime_of(MNT "/entries/entry");
	check(count(FUSE_LOOKUP) == lookups + 2, "INVAL_ENTRY during LOOKUP was lost");

	/* The same for a name that does not exist */
	send_entry("entry");
	n->id = 0;
	race_with(FUSE_LOOKUP, dir, change_entry);
	lookups = count(FUSE_LOOKUP);
	check(access(MNT "/entries/entry", F_OK) && errno == ENOENT, "no such name");
	pthread_join(entry.thread, NULL);
	check(entry.waited, "INVAL_ENTRY during LOOKUP (ENOENT) did not wait");
	n->id = id;
	mtime_of(MNT "/entries/entry");
	check(count(FUSE_LOOKUP) == lookups + 2, "INVAL_ENTRY during LOOKUP (ENOENT) was lost");

	/* In a list */
	send_entry("entry");
	race_with(FUSE_READDIRPLUS, dir, change_entry);
	lookups = count(FUSE_LOOKUP);
	names_in(MNT "/entries");
	pthread_join(entry.thread, NULL);
	check(entry.waited, "INVAL_ENTRY during READDIRPLUS did not wait");
	mtime_of(MNT "/entries/entry");
	check(count(FUSE_LOOKUP) == lookups + 1, "INVAL_ENTRY during READDIRPLUS was lost");

	/* One that has timed out and is asked for again, without that lock */
	n->short_lived = true;
	send_entry("entry");
	mtime_of(MNT "/entries/entry");
	n->short_lived = false;
	race_with(FUSE_LOOKUP, dir, change_entry);
	lookups = count(FUSE_LOOKUP);
	mtime_of(MNT "/entries/entry");
	pthread_join(entry.thread, NULL);
	mtime_of(MNT "/entries/entry");
	check(count(FUSE_LOOKUP) == lookups + 2, "INVAL_ENTRY during revalidation was lost");
}

/* ------------------------------------------------------------------- main */

int main(void)
{
	struct utsname u;
	char opt[128];

	guest_begin();
	mkdir(MNT, 0755);
	uname(&u);
	printf("kernel %s\n", u.release);

	srv.fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	snprintf(opt, sizeof(opt), "fd=%d,rootmode=40000,user_id=0,group_id=0", srv.fd);
	if (srv.fd < 0 || mount("cache-test", MNT, "fuse", 0, opt)) {
		perror("mount");
		return 1;
	}
	pthread_create(&srv.thread, NULL, serve, NULL);
	mtime_of(MNT);		/* INIT is done after that */

	section("cached", test_cached);
	section("lookup", test_lookup);
	section("readdirplus", test_readdirplus);
	section("create", test_create);
	section("link", test_link);
	section("setattr", test_setattr);
	section("handle", test_handle);
	section("evict", test_evict);
	section("list", test_list);
	section("entry", test_entry);

	umount2(MNT, 0);
	pthread_join(srv.thread, NULL);
	return guest_end();
}
