// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test of the guest kernel's remote fsnotify without a back end: this program
 * is the guest's init, serves a small file system on /dev/fuse, sends the
 * notifications itself and looks at what inotify and fanotify make of them.
 */
#include "guest.h"

#define MNT "/mnt"

/* ------------------------------------------------------------- the server */

/* The objects: nodeid, generation, parent, name */
static const struct node {
	uint64_t id;
	uint32_t gen;
	uint64_t parent;
	const char *name;
	mode_t mode;
} nodes[] = {
	{ 1, 0, 0, "", S_IFDIR | 0755 },
	{ 2, 7, 1, "d", S_IFDIR | 0755 },
	{ 3, 9, 2, "f", S_IFREG | 0755 },
	{ 4, 11, 2, "sub", S_IFDIR | 0755 },
	{ 5, 13, 1, "e", S_IFDIR | 0755 },
	{ 6, 15, 1, "file", S_IFREG | 0644 },
};
#define NODES (sizeof(nodes) / sizeof(nodes[0]))
#define MANY_BASE 1000		/* directories "m0", "m1", ... in the root */

static struct {
	int fd;
	pthread_t thread;
	bool agree;		/* to FUSE_HAS_FSNOTIFY */
	bool offered;		/* by the kernel */
	bool mute;		/* do not answer watch requests */
	int error;		/* answer to watch requests */
	uint64_t supported;
	pthread_mutex_t lock;
	int requests;
	struct { uint64_t nodeid; struct watch_in in; } log[8192];
	bool forgotten[2000];	/* of the "m..." */
} srv = { .lock = PTHREAD_MUTEX_INITIALIZER };

static void reply(uint64_t unique, int error, const void *data, size_t len)
{
	struct fuse_out_header oh = { sizeof(oh) + len, error, unique };
	struct iovec iov[2] = { { &oh, sizeof(oh) }, { (void *)data, len } };

	if (writev(srv.fd, iov, len ? 2 : 1) < 0 && errno != ENOENT && errno != ENODEV &&
	    errno != EPERM && errno != EINVAL)
		perror("reply");
}

static void fill_attr(struct fuse_attr *attr, uint64_t id, mode_t mode)
{
	attr->ino = id;
	attr->mode = mode;
	attr->nlink = S_ISDIR(mode) ? 2 : 1;
	attr->blksize = 4096;
}

static bool find_node(uint64_t id, uint64_t parent, const char *name, struct node *out)
{
	for (size_t i = 0; i < NODES; i++) {
		if (name ? nodes[i].parent == parent && !strcmp(nodes[i].name, name) :
			   nodes[i].id == id) {
			*out = nodes[i];
			return true;
		}
	}
	*out = (struct node){ id, id, 1, NULL, S_IFDIR | 0755 };
	if (name && parent == 1 && name[0] == 'm' && name[1]) {
		out->id = out->gen = MANY_BASE + atoi(name + 1);
		return true;
	}
	return !name && id >= MANY_BASE;
}

static void forgotten(uint64_t id)
{
	if (id >= MANY_BASE && id - MANY_BASE < sizeof(srv.forgotten) / sizeof(srv.forgotten[0]))
		srv.forgotten[id - MANY_BASE] = true;
}

static void handle(struct fuse_in_header *h, void *arg)
{
	union {
		struct fuse_init_out init;
		struct fuse_attr_out attr;
		struct fuse_entry_out entry;
		struct fuse_open_out open;
		struct fuse_statfs_out statfs;
		struct fuse_getxattr_out xattr;
		struct watch_out watch;
	} out = {};
	struct node node;

	switch (h->opcode) {
	case FUSE_INIT:
		srv.offered = (((struct fuse_init_in *)arg)->flags & INIT_EXT) &&
			      (((struct fuse_init_in *)arg)->flags2 & HAS_FSNOTIFY2);
		out.init.major = 7;
		out.init.minor = 36;
		out.init.max_write = 4096;
		out.init.max_background = 8;
		out.init.congestion_threshold = 6;
		if (srv.agree) {
			out.init.flags = INIT_EXT;
			out.init.flags2 = HAS_FSNOTIFY2;
		}
		out.init.flags |= FUSE_EXPORT_SUPPORT;
		reply(h->unique, 0, &out, sizeof(out.init));
		break;
	case FUSE_LOOKUP:
		if (!find_node(0, h->nodeid, arg, &node)) {
			reply(h->unique, -ENOENT, NULL, 0);
			break;
		}
		out.entry.nodeid = node.id;
		out.entry.generation = node.gen;
		out.entry.entry_valid = out.entry.attr_valid = 1000;
		fill_attr(&out.entry.attr, node.id, node.mode);
		reply(h->unique, 0, &out, sizeof(out.entry));
		break;
	case FUSE_GETATTR:
		if (!find_node(h->nodeid, 0, NULL, &node)) {
			reply(h->unique, -ENOENT, NULL, 0);
			break;
		}
		out.attr.attr_valid = 1000;
		fill_attr(&out.attr.attr, node.id, node.mode);
		reply(h->unique, 0, &out, sizeof(out.attr));
		break;
	case OP_FSNOTIFY:
		pthread_mutex_lock(&srv.lock);
		if (srv.requests < (int)(sizeof(srv.log) / sizeof(srv.log[0]))) {
			srv.log[srv.requests].nodeid = h->nodeid;
			srv.log[srv.requests].in = *(struct watch_in *)arg;
			if (h->len != sizeof(*h) + sizeof(struct watch_in))
				srv.log[srv.requests].nodeid = -1;
			srv.requests++;
		}
		pthread_mutex_unlock(&srv.lock);
		if (srv.mute)
			break;
		out.watch.mask = ((struct watch_in *)arg)->mask;
		out.watch.supported = srv.supported;
		if (srv.error == -EOPNOTSUPP &&
		    !(out.watch.mask & ~(srv.supported | IN_ISDIR | EV_ON_CHILD)))
			reply(h->unique, 0, &out, sizeof(out.watch));
		else
			reply(h->unique, srv.error, &out, srv.error ? 0 : sizeof(out.watch));
		break;
	case FUSE_OPEN:
	case FUSE_OPENDIR:
		reply(h->unique, 0, &out, sizeof(out.open));
		break;
	case FUSE_STATFS:
		out.statfs.st.namelen = 255;
		out.statfs.st.bsize = 4096;
		reply(h->unique, 0, &out, sizeof(out.statfs));
		break;
	case FUSE_GETXATTR:
		out.xattr.size = 4;
		reply(h->unique, 0, &out, sizeof(out.xattr));
		break;
	case FUSE_READ:
	case FUSE_READDIR:
	case FUSE_FLUSH:
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
	case FUSE_SETATTR:
		if (h->opcode == FUSE_SETATTR) {
			find_node(h->nodeid, 0, NULL, &node);
			out.attr.attr_valid = 1000;
			fill_attr(&out.attr.attr, node.id, node.mode);
			reply(h->unique, 0, &out, sizeof(out.attr));
		} else {
			reply(h->unique, 0, NULL, 0);
		}
		break;
	case FUSE_FORGET:
		forgotten(h->nodeid);
		break;
	case FUSE_BATCH_FORGET:
		for (uint32_t i = 0; i < ((struct fuse_batch_forget_in *)arg)->count; i++)
			forgotten(((struct fuse_forget_one *)((struct fuse_batch_forget_in *)arg + 1))[i].nodeid);
		break;
	case FUSE_INTERRUPT:
		break;
	default:
		reply(h->unique, -ENOSYS, NULL, 0);
	}
}

static void *serve(void *unused)
{
	(void)unused;
	serve_fuse(&srv.fd, handle);
	return NULL;
}

static void start(bool agree)
{
	char opt[128];

	srv.agree = agree;
	srv.mute = false;
	srv.error = 0;
	srv.supported = EVERYTHING & ~(IN_DELETE_SELF | 0x1000);
	srv.requests = 0;
	srv.fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	snprintf(opt, sizeof(opt), "fd=%d,rootmode=40000,user_id=0,group_id=0", srv.fd);
	if (srv.fd < 0 || mount("fsnotify-test", MNT, "fuse", 0, opt)) {
		perror("mount");
		exit(1);
	}
	pthread_create(&srv.thread, NULL, serve, NULL);
	struct stat st;
	stat(MNT "/d", &st);		/* INIT is done after that */
}

static void stop(void)
{
	if (umount2(MNT, 0) && umount2(MNT, MNT_FORCE | MNT_DETACH))
		perror("umount");
	pthread_join(srv.thread, NULL);
	close(srv.fd);
}

/* The requests for a nodeid since the first; masks in order */
static int requests_for(uint64_t nodeid, int first, uint64_t *masks, int max)
{
	int n = 0;

	pthread_mutex_lock(&srv.lock);
	for (int i = first; i < srv.requests; i++) {
		if (srv.log[i].nodeid == nodeid) {
			if (n < max)
				masks[n] = srv.log[i].in.mask;
			n++;
		}
	}
	pthread_mutex_unlock(&srv.lock);
	return n;
}

static int requests(void)
{
	pthread_mutex_lock(&srv.lock);
	int n = srv.requests;
	pthread_mutex_unlock(&srv.lock);
	return n;
}

/* Wait until the server was last asked for this mask; ms or -1 */
static long await_request(uint64_t nodeid, uint32_t flags, uint64_t mask, int first, int timeout)
{
	long begin = now_ms();

	for (;;) {
		uint64_t last = ~0ULL;

		pthread_mutex_lock(&srv.lock);
		for (int i = first; i < srv.requests; i++)
			if (srv.log[i].nodeid == nodeid && srv.log[i].in.flags == flags)
				last = srv.log[i].in.mask;
		pthread_mutex_unlock(&srv.lock);
		if (last == mask)
			return now_ms() - begin;
		if (now_ms() - begin > timeout)
			return -1;
		msleep(20);
	}
}

static long await_mask(uint64_t nodeid, uint64_t mask, int first, int timeout)
{
	return await_request(nodeid, 0, mask, first, timeout);
}

/* FUSE_FSNOTIFY_ALL on the root */
static long await_all(uint64_t mask, int timeout)
{
	return await_request(1, 1, mask, 0, timeout);
}

/* ------------------------------------------------------------ notifications */

static struct {
	char buf[1 << 17];
	size_t len;
} msg;

static struct event *add(uint64_t nodeid, uint32_t gen, uint64_t mask, const char *name)
{
	struct event *ev = (void *)(msg.buf + msg.len);
	size_t namelen = name ? strlen(name) : 0;
	size_t len = sizeof(*ev) + (namelen ? namelen + 1 : 0);

	len = (len + 7) & ~7UL;
	memset(ev, 0, len);
	ev->reclen = len;
	ev->nodeid = nodeid;
	ev->generation = gen;
	ev->mask = mask;
	ev->namelen = namelen;
	memcpy(ev->name, name ?: "", namelen);
	msg.len += len;
	return ev;
}

/* Send what was added; 0 or -errno */
static int send_raw(int code, const void *data, size_t len, int lie)
{
	struct fuse_out_header oh = { sizeof(oh) + len + lie, code, 0 };
	struct iovec iov[2] = { { &oh, sizeof(oh) }, { (void *)data, len } };
	ssize_t n = writev(srv.fd, iov, len ? 2 : 1);

	return n < 0 ? -errno : 0;
}

static int notify(void)
{
	int ret = send_raw(NOTIFY_FSNOTIFY, msg.buf, msg.len, 0);

	msg.len = 0;
	return ret;
}

static int notify_one(uint64_t nodeid, uint32_t gen, uint64_t mask, const char *name)
{
	add(nodeid, gen, mask, name);
	return notify();
}

/* --------------------------------------------------------------- watchers */

/* Handle and fsid of the last information record of each type, for comparison */
static struct { bool have; int fsid[2]; int type; unsigned len; char data[128]; } fids[16];

static const char *read_fanotify(int fd)
{
	static char buf[1 << 16] __attribute__((aligned(8)));
	ssize_t n;

	memset(fids, 0, sizeof(fids));
	*text = 0;
	while ((n = read(fd, buf, sizeof(buf))) > 0) {
		struct fanotify_event_metadata *m = (void *)buf;

		for (; FAN_EVENT_OK(m, n); m = FAN_EVENT_NEXT(m, n)) {
			char mask[256], *t = text + strlen(text);
			char *info = (char *)m + m->metadata_len, *end = (char *)m + m->event_len;

			mask_name(m->mask, mask);
			t += sprintf(t, "%s%s", *text ? " " : "", mask);
			while (info < end) {
				struct fanotify_event_info_fid *f = (void *)info;
				struct file_handle *h = (void *)f->handle;
				int type = f->hdr.info_type;

				t += sprintf(t, ":%d", type);
				if (type == INFO_DFID_NAME || type == INFO_OLD_DFID_NAME ||
				    type == INFO_NEW_DFID_NAME)
					t += sprintf(t, "(%s)", h->f_handle + h->handle_bytes);
				if (type < 16 && h->handle_bytes <= 128) {
					fids[type].have = true;
					memcpy(fids[type].fsid, &f->fsid, sizeof(f->fsid));
					fids[type].type = h->handle_type;
					fids[type].len = h->handle_bytes;
					memcpy(fids[type].data, h->f_handle, h->handle_bytes);
				}
				info += f->hdr.len;
			}
			if (m->fd >= 0)
				close(m->fd);
		}
	}
	return text;
}

static bool fid_is(int type, const char *path)
{
	union { struct file_handle h; char space[sizeof(struct file_handle) + 128]; } u;
	struct statfs sfs;
	int mnt;

	u.h.handle_bytes = 128;
	if (name_to_handle_at(AT_FDCWD, path, &u.h, &mnt, 0) || statfs(path, &sfs))
		return false;
	return fids[type].have && fids[type].type == u.h.handle_type &&
	       fids[type].len == u.h.handle_bytes &&
	       !memcmp(fids[type].data, u.h.f_handle, u.h.handle_bytes) &&
	       !memcmp(fids[type].fsid, &sfs.f_fsid, sizeof(sfs.f_fsid));
}

/* ------------------------------------------------------------------- tests */

static void test_negotiation(void)
{
	start(false);
	check(srv.offered, "FUSE_HAS_FSNOTIFY is offered");
	int fd = inotify();
	inotify_add_watch(fd, MNT "/d", IN_CREATE);
	check(notify_one(2, 7, IN_CREATE, "x") == -EINVAL, "not agreed: message refused");
	expect("not agreed: no event", read_inotify(fd), "");
	check(requests() == 0, "not agreed: no watch request");
	close(fd);
	stop();
}

static void test_watch_requests(void)
{
	uint64_t masks[16];
	int fd = inotify(), first, n;
	struct stat st;

	first = requests();
	int wd = inotify_add_watch(fd, MNT "/d", IN_CREATE);
	n = requests_for(2, first, masks, 16);
	/* First everything, refused for DELETE_SELF? The server says what it can do. */
	check(n == 1 && masks[0] == DIR_EVERYTHING,
	      "add_watch asks for everything before it returns: %d requests, mask %llx",
	      n, n ? (unsigned long long)masks[0] : 0);
	pthread_mutex_lock(&srv.lock);
	check(srv.requests > first && srv.log[first].in.generation == 7 && !srv.log[first].in.flags,
	      "generation and flags of the request");
	pthread_mutex_unlock(&srv.lock);
	long ms = await_mask(2, IN_CREATE | IN_ISDIR | EV_ON_CHILD, first, 4000);
	check(ms >= 500, "narrowed to the mark's mask, after a grace period: %ld ms", ms);

	/* A second mark: widened at once, narrowed to the union */
	int fd2 = inotify();
	first = requests();
	inotify_add_watch(fd2, MNT "/d", IN_MODIFY);
	n = requests_for(2, first, masks, 16);
	check(n == 1 && masks[0] == (srv.supported | IN_ISDIR | EV_ON_CHILD),
	      "second mark: what the server supports, at once: %d %llx", n,
	      n ? (unsigned long long)masks[0] : 0);
	ms = await_mask(2, IN_CREATE | IN_MODIFY | IN_ISDIR | EV_ON_CHILD, first, 4000);
	check(ms >= 0, "union of both marks");

	first = requests();
	close(fd2);
	ms = await_mask(2, IN_CREATE | IN_ISDIR | EV_ON_CHILD, first, 3000);
	check(ms >= 0, "closing one group narrows");
	inotify_rm_watch(fd, wd);
	ms = await_mask(2, 0, first, 3000);
	check(ms >= 0, "removing the last mark ends the watch");
	read_inotify(fd);

	/* Things that look alike and are no watch */
	first = requests();
	check(access(MNT "/d", R_OK) == 0, "access");
	close(open(MNT "/d", O_RDONLY | O_DIRECTORY));
	close(open(MNT "/d/f", O_RDONLY));
	stat(MNT "/d/f", &st);
	getxattr(MNT "/d/f", "user.x", NULL, 0);
	lgetxattr(MNT "/d/f", "user.x", NULL, 0);
	if (!fork()) {
		execl(MNT "/d/f", "f", (char *)NULL);
		_exit(0);
	}
	wait(NULL);
	chdir(MNT "/d");
	chdir("/");
	check(requests() == first, "access, open, getxattr, exec, chdir are no watch: %d requests",
	      requests() - first);

	/* A permission without a mark is withdrawn */
	int fan = fanotify_init(FAN_CLASS_NOTIF | FAN_REPORT_FID | FAN_NONBLOCK, O_RDONLY);
	fanotify_mark(fan, FAN_MARK_REMOVE, FAN_CREATE, AT_FDCWD, MNT "/e");
	n = requests_for(5, first, masks, 16);
	check(n == 1 && masks[0], "no mark: asked");
	ms = await_mask(5, 0, first, 4000);
	check(ms >= 0, "no mark: withdrawn");
	close(fan);

	/* A file: no directory events */
	first = requests();
	wd = inotify_add_watch(fd, MNT "/file", IN_MODIFY | IN_ATTRIB);
	n = requests_for(6, first, masks, 16);
	check(n == 1 && !(masks[0] & (IN_CREATE | IN_DELETE | IN_MOVE | IN_ISDIR | EV_ON_CHILD)) &&
	      (masks[0] & IN_MODIFY), "file: %llx", n ? (unsigned long long)masks[0] : 0);
	check(await_mask(6, IN_MODIFY | IN_ATTRIB, first, 4000) >= 0, "file narrowed");
	inotify_rm_watch(fd, wd);

	/* The root: generation 0 */
	first = requests();
	inotify_add_watch(fd, MNT, IN_CREATE);
	n = requests_for(1, first, masks, 16);
	check(n == 1, "root watched");
	close(fd);
}

static void test_refusals(void)
{
	static const int errors[] = { -ENOSPC, -ESTALE, -ENOENT, -ENOSYS, -EIO, -EACCES };
	uint64_t masks[16];
	char path[64];
	int n, first;

	for (size_t i = 0; i < sizeof(errors) / sizeof(errors[0]); i++) {
		int fd = inotify();

		sprintf(path, MNT "/m%zu", 100 + i);
		srv.error = errors[i];
		first = requests();
		check(inotify_add_watch(fd, path, IN_ALL_EVENTS) > 0, "%s: add_watch succeeds",
		      strerror(-errors[i]));
		check(requests_for(MANY_BASE + 100 + i, first, masks, 16) == 1,
		      "%s: asked", strerror(-errors[i]));
		close(open(path, O_RDONLY | O_DIRECTORY));
		expect("local events go on", read_inotify(fd),
		       "1:OPEN|ISDIR: 1:CLOSE_NOWRITE|ISDIR:");
		close(fd);
	}
	srv.error = 0;
	/* No request is repeated for ever */
	msleep(1500);
	first = requests();
	msleep(2500);
	n = requests() - first;
	check(n == 0, "refused watches are not asked for again: %d", n);
}

/* A server that refuses unknown bits and tells the known ones by a mask of 0 */
static void test_learn_supported(void)
{
	uint64_t masks[16];
	int fd = inotify(), n;

	srv.error = -EOPNOTSUPP;
	srv.supported = IN_CREATE | IN_DELETE | IN_MODIFY;
	inotify_add_watch(fd, MNT "/d", IN_ALL_EVENTS);
	n = requests_for(2, 0, masks, 16);
	check(n == 3 && masks[0] == DIR_EVERYTHING && masks[1] == 0 &&
	      masks[2] == (srv.supported | IN_ISDIR | EV_ON_CHILD),
	      "EOPNOTSUPP: learns what is supported: %d requests, last %llx", n,
	      n > 2 ? (unsigned long long)masks[2] : 0);
	int first = requests();
	inotify_add_watch(fd, MNT "/e", IN_ALL_EVENTS);
	n = requests_for(5, first, masks, 16);
	check(n == 1 && masks[0] == (srv.supported | IN_ISDIR | EV_ON_CHILD),
	      "and remembers it");
	check(notify_one(2, 7, IN_CREATE, "x") == 0, "event");
	expect("event", read_inotify(fd), "1:CREATE:x");
	close(fd);
	srv.error = 0;
}

static void test_events(void)
{
	int fd = inotify();
	struct event *ev;
	struct stat st;
	char name[300];

	inotify_add_watch(fd, MNT "/d", IN_ALL_EVENTS);		/* wd 1 */
	inotify_add_watch(fd, MNT "/d/f", IN_ALL_EVENTS);	/* wd 2 */
	stat(MNT "/d/sub", &st);
	read_inotify(fd);

	static const struct { uint32_t mask; const char *want; } simple[] = {
		{ IN_CREATE, "1:CREATE:n" },
		{ IN_CREATE | IN_ISDIR, "1:CREATE|ISDIR:n" },
		{ IN_DELETE, "1:DELETE:n" },
		{ IN_DELETE | IN_ISDIR, "1:DELETE|ISDIR:n" },
		{ IN_MOVED_FROM, "1:MOVED_FROM:n:a" },
		{ IN_MOVED_TO, "1:MOVED_TO:n:a" },
		{ IN_MODIFY, "1:MODIFY:n" },
		{ IN_ATTRIB, "1:ATTRIB:n" },
		{ IN_ATTRIB | IN_ISDIR, "1:ATTRIB|ISDIR:n" },
		{ IN_OPEN, "1:OPEN:n" },
		{ IN_ACCESS, "1:ACCESS:n" },
		{ IN_CLOSE_WRITE, "1:CLOSE_WRITE:n" },
		{ IN_CLOSE_NOWRITE, "1:CLOSE_NOWRITE:n" },
		{ IN_MODIFY | EV_ON_CHILD, "1:MODIFY:n" },
		/* Merged bits come one by one, in the order of their happening */
		{ IN_CREATE | IN_OPEN | IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | EV_ON_CHILD,
		  "1:CREATE:n 1:OPEN:n 1:MODIFY:n 1:ATTRIB:n 1:CLOSE_WRITE:n" },
		/* What the guest decides itself, and unknown bits, are nothing */
		{ IN_DELETE_SELF, "" }, { IN_IGNORED, "" }, { IN_UNMOUNT, "" },
		{ IN_Q_OVERFLOW, "" }, { IN_MOVE_SELF, "" }, { 0x00010000, "" }, { 0, "" },
	};
	for (size_t i = 0; i < sizeof(simple) / sizeof(simple[0]); i++) {
		int ret = notify_one(2, 7, simple[i].mask, "n");

		check(ret == 0, "mask %x: %d", simple[i].mask, ret);
		expect("child never looked up", read_inotify(fd), simple[i].want);
	}

	/* A known child sees its own events as well, once */
	ev = add(2, 7, IN_MODIFY | EV_ON_CHILD, "f");
	ev->child = 3;
	ev->child_generation = 9;
	check(notify() == 0, "known child");
	expect("known child", read_inotify(fd), "1:MODIFY:f 2:MODIFY:");
	ev = add(2, 7, IN_ATTRIB, "f");
	ev->child = 3;
	ev->child_generation = 8;
	check(notify() == 0, "child of another generation");
	expect("child of another generation", read_inotify(fd), "1:ATTRIB:f");
	ev = add(2, 7, IN_ATTRIB, "gone");
	ev->child = 777;
	check(notify() == 0, "unknown child");
	expect("unknown child", read_inotify(fd), "1:ATTRIB:gone");
	/* A directory says itself that it is one */
	ev = add(2, 7, IN_ATTRIB, "sub");
	ev->child = 4;
	ev->child_generation = 11;
	check(notify() == 0, "sub-directory");
	expect("sub-directory", read_inotify(fd), "1:ATTRIB|ISDIR:sub");
	ev = add(2, 7, IN_CREATE, "f");
	ev->child = 3;
	ev->child_generation = 9;
	check(notify() == 0, "create of a known child");
	expect("create of a known child", read_inotify(fd), "1:CREATE:f");
	/* Unknown directory, known child */
	ev = add(555, 1, IN_MODIFY, "f");
	ev->child = 3;
	ev->child_generation = 9;
	check(notify() == 0, "unknown directory");
	expect("unknown directory", read_inotify(fd), "2:MODIFY:");

	/* On the object itself */
	check(notify_one(2, 7, IN_ATTRIB, NULL) == 0, "directory itself");
	expect("directory itself", read_inotify(fd), "1:ATTRIB|ISDIR:");
	check(notify_one(3, 9, IN_MODIFY, NULL) == 0, "file itself");
	expect("file itself", read_inotify(fd), "2:MODIFY:");
	check(notify_one(3, 9, IN_MOVE_SELF, NULL) == 0, "move self");
	expect("move self", read_inotify(fd), "2:MOVE_SELF:");
	check(notify_one(2, 7, IN_CREATE | IN_MOVED_TO | IN_DELETE, NULL) == 0, "entry without name");
	expect("entry without name", read_inotify(fd), "");
	check(notify_one(2, 7, IN_DELETE_SELF | IN_IGNORED | IN_UNMOUNT, NULL) == 0, "local ones");
	expect("local ones", read_inotify(fd), "");

	/* Unknown and unwatched objects */
	check(notify_one(555, 1, IN_CREATE, "x") == -ENOENT, "unknown nodeid");
	check(notify_one(2, 8, IN_CREATE, "x") == -ENOENT, "wrong generation");
	check(notify_one(2, 0, IN_CREATE, "x") == -ENOENT, "no generation");
	check(notify_one(3, 9, IN_CREATE, "x") == -ENOENT, "a file has no entries");
	check(notify_one(5, 13, IN_CREATE, "x") == -ENOENT, "never looked up");
	stat(MNT "/e", &st);
	check(notify_one(5, 13, IN_CREATE, "x") == 0, "unwatched");
	check(notify_one(1, 0, IN_CREATE, "x") == 0, "unwatched root");
	expect("none of these", read_inotify(fd), "");

	/* Names */
	memset(name, 'n', 255);
	name[255] = 0;
	check(notify_one(2, 7, IN_CREATE, name) == 0, "255 bytes");
	char want[320];
	snprintf(want, sizeof(want), "1:CREATE:%s", name);
	expect("255 bytes", read_inotify(fd), want);
	check(notify_one(2, 7, IN_CREATE, "\xc3\xa4\xff\x01 \n") == 0, "any byte");
	expect("any byte", read_inotify(fd), "1:CREATE:\xc3\xa4\xff\x01 \n");
	check(notify_one(2, 7, IN_CREATE, "...") == 0, "three dots");
	check(notify_one(2, 7, IN_CREATE, ".x") == 0, "dot file");
	check(notify_one(2, 7, IN_CREATE, "..x") == 0, "two dots and more");
	expect("dots", read_inotify(fd), "1:CREATE:... 1:CREATE:.x 1:CREATE:..x");

	/* Many records in one message; one that is unknown does not spoil it */
	for (int i = 0; i < 40; i++) {
		sprintf(name, "r%d", i);
		add(i % 10 == 5 ? 555 : 2, 7, IN_CREATE, name);
	}
	check(notify() == 0, "40 records");
	read_inotify(fd);
	int count = 0;
	for (char *p = text; (p = strstr(p, "CREATE")); p++)
		count++;
	check(count == 36, "40 records: %d", count);

	/* From a later protocol: unknown flags are skipped, longer records read */
	add(2, 7, IN_CREATE, "a");
	add(2, 7, IN_CREATE, "b")->flags = 0x80;
	ev = add(2, 7, IN_CREATE, "c");
	ev->reclen += 16;
	memset(msg.buf + msg.len, 0xff, 16);
	msg.len += 16;
	ev = add(2, 7, IN_MOVED_FROM, "s");
	ev->flags = EV_PAIRED | 0x100;
	add(2, 7, IN_MOVED_TO, "t");
	add(2, 7, IN_CREATE, "d");
	check(notify() == 0, "later protocol");
	expect("later protocol", read_inotify(fd), "1:CREATE:a 1:CREATE:c 1:CREATE:d");

	/* The largest message */
	for (int i = 0; msg.len + 56 <= 65536; i++)
		add(5, 13, IN_CREATE, "x");
	check(notify() == 0, "64 KiB");
	expect("64 KiB", read_inotify(fd), "");
	close(fd);
}

static void test_rename(void)
{
	int fd = inotify(), fd2;
	struct event *ev;
	struct stat st;

	stat(MNT "/e", &st);
	inotify_add_watch(fd, MNT "/d", IN_ALL_EVENTS);
	inotify_add_watch(fd, MNT "/e", IN_ALL_EVENTS);
	read_inotify(fd);

	add(2, 7, IN_MOVED_FROM, "old")->flags = EV_PAIRED;
	add(5, 13, IN_MOVED_TO, "new");
	check(notify() == 0, "pair");
	expect("pair", read_inotify(fd), "1:MOVED_FROM:old:a 2:MOVED_TO:new:a");

	add(2, 7, IN_MOVED_FROM, "old")->flags = EV_PAIRED;
	add(2, 7, IN_MOVED_TO, "new");
	check(notify() == 0, "within one directory");
	expect("within one directory", read_inotify(fd), "1:MOVED_FROM:old:a 1:MOVED_TO:new:a");

	ev = add(2, 7, IN_MOVED_FROM | IN_ISDIR, "old");
	ev->flags = EV_PAIRED;
	add(5, 13, IN_MOVED_TO | IN_ISDIR, "new");
	ev = add(2, 7, IN_MOVED_FROM, "f");
	ev->flags = EV_PAIRED;
	ev = add(5, 13, IN_MOVED_TO, "g");
	ev->child = 3;
	ev->child_generation = 9;
	check(notify() == 0, "two pairs");
	expect("two pairs", read_inotify(fd),
	       "1:MOVED_FROM|ISDIR:old:a 2:MOVED_TO|ISDIR:new:a 1:MOVED_FROM:f:b 2:MOVED_TO:g:b");

	add(2, 7, IN_MOVED_FROM, "old")->flags = EV_PAIRED;
	add(555, 1, IN_MOVED_TO, "new");
	check(notify() == 0, "target unknown");
	expect("target unknown", read_inotify(fd), "1:MOVED_FROM:old:a");
	add(555, 1, IN_MOVED_FROM, "old")->flags = EV_PAIRED;
	add(5, 13, IN_MOVED_TO, "new");
	check(notify() == 0, "source unknown");
	expect("source unknown", read_inotify(fd), "2:MOVED_TO:new:a");
	add(555, 1, IN_MOVED_FROM, "old")->flags = EV_PAIRED;
	add(556, 1, IN_MOVED_TO, "new");
	check(notify() == -ENOENT, "both unknown");

	/* Halves that were sent apart, with something between them */
	add(2, 7, IN_MOVED_FROM, "old")->cookie = 4711;
	check(notify() == 0, "first half");
	add(2, 7, IN_MOVED_FROM, "other")->cookie = 4712;
	check(notify() == 0, "another half");
	add(5, 13, IN_MOVED_TO, "new")->cookie = 4711;
	check(notify() == 0, "second half");
	expect("halves", read_inotify(fd),
	       "1:MOVED_FROM:old:a 1:MOVED_FROM:other:b 2:MOVED_TO:new:a");

	/* FAN_RENAME has both names in one event */
	fd2 = fanotify_init(FAN_CLASS_NOTIF | REPORT_DFID_NAME | FAN_NONBLOCK, O_RDONLY);
	check(fd2 >= 0, "fanotify_init: %s", strerror(errno));
	check(!fanotify_mark(fd2, FAN_MARK_ADD, FAN_RENAME | FAN_ONDIR, AT_FDCWD, MNT "/d"),
	      "mark FAN_RENAME: %s", strerror(errno));
	check(!fanotify_mark(fd2, FAN_MARK_ADD, FAN_RENAME | FAN_ONDIR, AT_FDCWD, MNT "/e"),
	      "mark FAN_RENAME: %s", strerror(errno));
	check(await_mask(5, srv.supported | IN_ISDIR | EV_ON_CHILD, 0, 0) >= 0 ||
	      await_mask(5, DIR_EVERYTHING, 0, 0) >= 0, "FAN_RENAME asks for moves");
	add(2, 7, IN_MOVED_FROM, "old")->flags = EV_PAIRED;
	add(5, 13, IN_MOVED_TO, "new");
	check(notify() == 0, "FAN_RENAME");
	expect("FAN_RENAME", read_fanotify(fd2), "RENAME:10(old):12(new)");
	check(fid_is(INFO_OLD_DFID_NAME, MNT "/d") && fid_is(INFO_NEW_DFID_NAME, MNT "/e"),
	      "FAN_RENAME handles");
	expect("and inotify", read_inotify(fd), "1:MOVED_FROM:old:a 2:MOVED_TO:new:a");
	add(2, 7, IN_MOVED_FROM | IN_ISDIR, "old")->flags = EV_PAIRED;
	add(555, 1, IN_MOVED_TO | IN_ISDIR, "new");
	check(notify() == 0, "FAN_RENAME, target unknown");
	expect("FAN_RENAME, target unknown", read_fanotify(fd2), "");
	close(fd2);
	close(fd);
}

static void test_fanotify(void)
{
	int fid, dfid, target, fdmode, sbmark;
	struct statfs sfs;
	struct event *ev;
	struct stat st;

	stat(MNT "/d/f", &st);
	check(!statfs(MNT, &sfs) && (((int *)&sfs.f_fsid)[0] || ((int *)&sfs.f_fsid)[1]),
	      "f_fsid is set");

	fid = fanotify_init(FAN_CLASS_NOTIF | FAN_REPORT_FID | FAN_NONBLOCK, O_RDONLY);
	dfid = fanotify_init(FAN_CLASS_NOTIF | REPORT_DFID_NAME | FAN_NONBLOCK, O_RDONLY);
	target = fanotify_init(FAN_CLASS_NOTIF | REPORT_DFID_NAME | FAN_REPORT_FID |
			       REPORT_TARGET_FID | FAN_NONBLOCK, O_RDONLY);
	fdmode = fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK, O_RDONLY);
	sbmark = fanotify_init(FAN_CLASS_NOTIF | REPORT_DFID_NAME | FAN_NONBLOCK, O_RDONLY);
	check(fid >= 0 && dfid >= 0 && target >= 0 && fdmode >= 0 && sbmark >= 0,
	      "fanotify_init: %s", strerror(errno));
	uint64_t mask = FAN_CREATE | FAN_DELETE | FAN_MODIFY | FAN_ATTRIB | FAN_CLOSE_WRITE |
			FAN_MOVE | FAN_ONDIR | FAN_EVENT_ON_CHILD;

	check(!fanotify_mark(fid, FAN_MARK_ADD, mask, AT_FDCWD, MNT "/d"),
	      "mark FID: %s", strerror(errno));
	check(!fanotify_mark(dfid, FAN_MARK_ADD, mask, AT_FDCWD, MNT "/d"),
	      "mark DFID_NAME: %s", strerror(errno));
	check(!fanotify_mark(target, FAN_MARK_ADD, mask, AT_FDCWD, MNT "/d"),
	      "mark DFID_NAME_TARGET: %s", strerror(errno));
	check(!fanotify_mark(fdmode, FAN_MARK_ADD, FAN_MODIFY | FAN_CLOSE_WRITE | FAN_EVENT_ON_CHILD,
			     AT_FDCWD, MNT "/d"), "mark fd mode: %s", strerror(errno));
	check(!fanotify_mark(sbmark, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_CREATE | FAN_MODIFY,
			     AT_FDCWD, MNT "/d"), "mark file system: %s", strerror(errno));

	/* A mark on the super block is a watch of everything, as long as it is there */
	uint64_t all = IN_CREATE | IN_MODIFY | IN_ISDIR | EV_ON_CHILD;
	check(await_all(all, 4000) >= 0, "FUSE_FSNOTIFY_ALL for a file system mark");

	check(notify_one(2, 7, IN_CREATE, "n") == 0, "create");
	expect("FID create", read_fanotify(fid), "CREATE:1");
	check(fid_is(INFO_FID, MNT "/d"), "FID create handle");
	expect("DFID_NAME create", read_fanotify(dfid), "CREATE:2(n)");
	check(fid_is(INFO_DFID_NAME, MNT "/d"), "DFID_NAME handle");
	expect("TARGET create of an unknown child", read_fanotify(target), "CREATE:2(n)");
	expect("fd mode create", read_fanotify(fdmode), "");
	expect("file system create", read_fanotify(sbmark), "CREATE:2(n)");

	check(notify_one(2, 7, IN_CREATE | IN_ISDIR, "n") == 0, "mkdir");
	expect("DFID_NAME mkdir", read_fanotify(dfid), "CREATE|ISDIR:2(n)");
	expect("FID mkdir", read_fanotify(fid), "CREATE|ISDIR:1");
	read_fanotify(target);

	check(notify_one(2, 7, IN_MODIFY | EV_ON_CHILD, "n") == 0, "modify");
	expect("DFID_NAME modify, unknown child", read_fanotify(dfid), "MODIFY:2(n)");
	check(fid_is(INFO_DFID_NAME, MNT "/d"), "DFID_NAME modify handle");
	expect("fd mode modify", read_fanotify(fdmode), "");
	expect("file system modify", read_fanotify(sbmark), "MODIFY:2(n)");
	read_fanotify(fid);
	read_fanotify(target);

	ev = add(2, 7, IN_MODIFY | EV_ON_CHILD, "f");
	ev->child = 3;
	ev->child_generation = 9;
	check(notify() == 0, "modify of a known child");
	expect("FID modify", read_fanotify(fid), "MODIFY:1");
	check(fid_is(INFO_FID, MNT "/d/f"), "FID modify handle");
	expect("DFID_NAME modify", read_fanotify(dfid), "MODIFY:2(f)");
	expect("TARGET modify", read_fanotify(target), "MODIFY:2(f):1");
	check(fid_is(INFO_FID, MNT "/d/f") && fid_is(INFO_DFID_NAME, MNT "/d"), "TARGET handles");

	ev = add(2, 7, IN_CREATE, "f");
	ev->child = 3;
	ev->child_generation = 9;
	check(notify() == 0, "create of a known child");
	expect("TARGET create", read_fanotify(target), "CREATE:2(f):1");
	check(fid_is(INFO_FID, MNT "/d/f"), "TARGET create handle");
	expect("DFID_NAME create", read_fanotify(dfid), "CREATE:2(f)");

	check(notify_one(2, 7, IN_ATTRIB, NULL) == 0, "attrib of the directory");
	expect("DFID_NAME attrib of the directory", read_fanotify(dfid), "ATTRIB|ISDIR:2(.)");
	read_fanotify(fid);
	read_fanotify(target);
	read_fanotify(sbmark);

	add(0, 0, 0, NULL)->flags = EV_OVERFLOW;
	check(notify() == 0, "overflow");
	expect("FID overflow", read_fanotify(fid), "Q_OVERFLOW");
	expect("DFID_NAME overflow", read_fanotify(dfid), "Q_OVERFLOW");
	expect("TARGET overflow", read_fanotify(target), "Q_OVERFLOW");
	expect("fd mode overflow", read_fanotify(fdmode), "Q_OVERFLOW");
	expect("file system overflow", read_fanotify(sbmark), "Q_OVERFLOW");

	close(sbmark);
	check(await_all(0, 4000) >= 0, "FUSE_FSNOTIFY_ALL ends");
	close(fdmode);
	close(target);
	close(dfid);
	close(fid);
}

static void test_overflow(void)
{
	int a = inotify(), b = inotify(), none = inotify(), other = inotify();

	inotify_add_watch(a, MNT "/d", IN_CREATE);
	inotify_add_watch(a, MNT "/e", IN_CREATE);
	inotify_add_watch(b, MNT "/d/f", IN_MODIFY);
	inotify_add_watch(other, "/tmp", IN_CREATE);

	add(0, 0, 0, NULL)->flags = EV_OVERFLOW;
	check(notify() == 0, "overflow");
	add(0, 0, 0, NULL)->flags = EV_OVERFLOW;
	check(notify() == 0, "overflow again");
	expect("one overflow for a group with two marks", read_inotify(a), "-1:Q_OVERFLOW:");
	expect("every group", read_inotify(b), "-1:Q_OVERFLOW:");
	expect("a group without marks", read_inotify(none), "");
	expect("a group of another file system", read_inotify(other), "");

	add(2, 7, IN_CREATE, "x");
	add(0, 0, 0, NULL)->flags = EV_OVERFLOW;
	add(2, 7, IN_CREATE, "y");
	check(notify() == 0, "overflow between events");
	expect("overflow between events", read_inotify(a), "1:CREATE:x -1:Q_OVERFLOW: 1:CREATE:y");
	expect("overflow between events", read_inotify(b), "-1:Q_OVERFLOW:");
	struct pollfd p = { .fd = a, .events = POLLIN };
	check(poll(&p, 1, 0) == 0, "nothing left");

	/* A marked inode whose watch was never learned of does no harm */
	close(a);
	close(b);
	close(none);
	close(other);
	add(0, 0, 0, NULL)->flags = EV_OVERFLOW;
	check(notify() == 0, "overflow with nobody watching");
}

/* Everything here must be refused, and nothing of it delivered */
static void test_malformed(void)
{
	int fd = inotify(), n = 0, bad = 0;
	struct event *ev;

	inotify_add_watch(fd, MNT "/d", IN_ALL_EVENTS);
	read_inotify(fd);

#define REFUSED(what) do { \
	int ret_ = notify(); \
	n++; \
	if (ret_ != -EINVAL) { bad++; check(false, "malformed %s: %d", what, ret_); } \
} while (0)
	/* A good record first: it must not be delivered either */
#define GOOD add(2, 7, IN_CREATE, "good")

	check(send_raw(NOTIFY_FSNOTIFY, NULL, 0, 0) == -EINVAL, "empty");
	/* Every length that is no sum of records */
	for (size_t len = 1; len <= 400; len++) {
		GOOD;
		size_t good = msg.len;
		memset(msg.buf + good, 0, 512);
		memcpy(msg.buf + good, msg.buf, good);
		msg.len = len;
		if (len == good || len == 2 * good) {
			msg.len = 0;
			continue;
		}
		REFUSED("length");
	}
	/* reclen */
	static const uint32_t reclens[] = { 0, 1, 7, 8, 40, 47, 49, 52, 55, 64, 72, 4096, 65536,
		0x7fffffff, 0x80000000, 0xfffffff8, 0xffffffff };
	for (size_t i = 0; i < sizeof(reclens) / sizeof(reclens[0]); i++) {
		for (int first = 0; first < 2; first++) {
			if (first)
				GOOD;
			ev = add(2, 7, IN_CREATE, "x");
			if (ev->reclen == reclens[i]) {
				msg.len = 0;
				continue;
			}
			ev->reclen = reclens[i];
			REFUSED("reclen");
		}
	}
	/* namelen */
	static const uint32_t lens[] = { 8, 9, 255, 256, 257, 4096, 65535, 0x7fffffff, 0x80000000,
		0xfffffff0, 0xffffffd0, 0xffffffff };
	for (size_t i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
		GOOD;
		ev = add(2, 7, IN_CREATE, "1234567");
		ev->namelen = lens[i];
		REFUSED("namelen");
	}
	/* 256 bytes of name that are there */
	char name[300];
	memset(name, 'x', 256);
	name[256] = 0;
	add(2, 7, IN_CREATE, name);
	REFUSED("256 bytes");
	/* Names */
	static const char *const names[] = { ".", "..", "a/b", "/", "/a", "a/" };
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		GOOD;
		add(2, 7, IN_CREATE, names[i]);
		REFUSED(names[i]);
	}
	for (int i = 0; i < 7; i++) {
		ev = add(2, 7, IN_CREATE, "1234567");
		ev->name[i] = 0;
		REFUSED("NUL in the name");
		ev = add(2, 7, IN_CREATE, "1234567");
		ev->name[i] = '/';
		REFUSED("/ in the name");
		ev = add(2, 7, IN_CREATE, "1234567");
		ev->namelen = i + 1 < 7 ? i + 1 : 3;
		REFUSED("no NUL after the name");
	}
	ev = add(2, 7, IN_CREATE, "1234567");
	ev->name[7] = 'x';
	REFUSED("NUL overwritten");
	/* nodeid */
	GOOD;
	add(0, 7, IN_CREATE, "x");
	REFUSED("nodeid 0");
	/* OVERFLOW with anything else */
	for (int i = 0; i < 8; i++) {
		GOOD;
		ev = add(0, 0, 0, i == 7 ? "x" : NULL);
		ev->flags = EV_OVERFLOW | (i == 0 ? EV_PAIRED : 0);
		ev->nodeid = i == 1;
		ev->child = i == 2;
		ev->mask = i == 3;
		ev->generation = i == 4;
		ev->child_generation = i == 5;
		ev->cookie = i == 6;
		REFUSED("overflow with more");
	}
	ev = add(0, 0, 0, NULL);
	ev->flags = EV_OVERFLOW | 0x80;
	REFUSED("overflow with a flag");
	/* PAIRED */
	GOOD;
	add(2, 7, IN_MOVED_FROM, "s")->flags = EV_PAIRED;
	REFUSED("pair without target");
	add(2, 7, IN_MOVED_FROM, "s")->flags = EV_PAIRED;
	add(2, 7, IN_MOVED_TO, "t")->flags = EV_PAIRED;
	REFUSED("pair of pairs");
	add(2, 7, IN_MOVED_FROM, "s")->flags = EV_PAIRED;
	add(2, 7, IN_MOVED_FROM, "s")->flags = EV_PAIRED;
	add(2, 7, IN_MOVED_TO, "t");
	REFUSED("two sources");
	add(2, 7, IN_MOVED_FROM, "s")->flags = EV_PAIRED;
	add(0, 0, 0, NULL)->flags = EV_OVERFLOW;
	REFUSED("pair with overflow");
	add(2, 7, IN_MOVED_FROM, NULL)->flags = EV_PAIRED;
	add(2, 7, IN_MOVED_TO, "t");
	REFUSED("source without name");
	add(2, 7, IN_MOVED_FROM, "s")->flags = EV_PAIRED;
	add(2, 7, IN_MOVED_TO, NULL);
	REFUSED("target without name");
	add(2, 7, IN_CREATE, "s")->flags = EV_PAIRED;
	add(2, 7, IN_MOVED_TO, "t");
	REFUSED("source is no source");
	add(2, 7, IN_MOVED_FROM, "s")->flags = EV_PAIRED;
	add(2, 7, IN_CREATE, "t");
	REFUSED("target is no target");
	add(2, 7, IN_MOVED_TO, "s")->flags = EV_PAIRED;
	add(2, 7, IN_MOVED_FROM, "t");
	REFUSED("the wrong way round");
	/* Too large */
	while (msg.len <= 65536)
		GOOD;
	REFUSED("more than 64 KiB");
	/* The header lies about the length; /dev/fuse itself refuses that */
	GOOD;
	check(send_raw(NOTIFY_FSNOTIFY, msg.buf, msg.len, 8) == -EINVAL, "header says more");
	check(send_raw(NOTIFY_FSNOTIFY, msg.buf, msg.len, -8) == -EINVAL, "header says less");
	msg.len = 0;

	check(bad == 0, "%d of %d malformed messages accepted", bad, n);
	check(n >= 450, "%d malformed messages", n);
	expect("nothing of them was delivered", read_inotify(fd), "");

	/* Noise: whatever the answer, the kernel survives it */
	unsigned seed = 1;
	for (int i = 0; i < 20000; i++) {
		add(2, 7, IN_CREATE, "first");
		add(2, 7, IN_MOVED_FROM, "second")->flags = EV_PAIRED;
		add(5, 13, IN_MOVED_TO, "third")->child = 3;
		add(0, 0, 0, NULL)->flags = EV_OVERFLOW;
		add(3, 9, IN_MODIFY, NULL);
		for (int k = 1 + rand_r(&seed) % 3; k; k--) {
			size_t at = rand_r(&seed) % msg.len;
			switch (rand_r(&seed) % 3) {
			case 0: msg.buf[at] ^= 1 << rand_r(&seed) % 8; break;
			case 1: msg.buf[at] = rand_r(&seed); break;
			default: memset(msg.buf + (at & ~3UL), rand_r(&seed), 4);
			}
		}
		if (rand_r(&seed) % 4 == 0)
			msg.len = rand_r(&seed) % msg.len;
		notify();
		if (i % 512 == 0)
			read_inotify(fd);
	}
	read_inotify(fd);
	check(notify_one(2, 7, IN_CREATE, "alive") == 0, "after the noise");
	expect("after the noise", read_inotify(fd), "1:CREATE:alive");

	/* Unknown codes next to ours */
	static const int codes[] = { 0, 127, 129, 256, -1, 0x7fffffff };
	for (size_t i = 0; i < sizeof(codes) / sizeof(codes[0]); i++) {
		GOOD;
		check(send_raw(codes[i], msg.buf, msg.len, 0) == -EINVAL, "code %d", codes[i]);
		msg.len = 0;
	}
	close(fd);
}

static long inodes(void)
{
	long nr = 0;
	FILE *f = fopen("/proc/sys/fs/inode-nr", "r");

	if (f) {
		if (fscanf(f, "%ld", &nr) != 1)
			nr = -1;
		fclose(f);
	}
	return nr;
}

static void test_leaks(void)
{
	int fd = inotify();
	struct stat st;

	stat(MNT "/d/f", &st);
	inotify_add_watch(fd, MNT "/d", IN_ALL_EVENTS);
	long before = inodes();
	for (int i = 0; i < 5000; i++) {
		struct event *ev;

		add(2, 7, IN_CREATE | IN_MODIFY | EV_ON_CHILD, "stand-in");
		ev = add(2, 7, IN_MODIFY | EV_ON_CHILD, "f");
		ev->child = 3;
		ev->child_generation = 9;
		notify();
		if (i % 1000 == 0)
			read_inotify(fd);
	}
	read_inotify(fd);
	long after = inodes();
	check(after - before < 50, "inodes leak: %ld before, %ld after 5000 events", before, after);
	check(!stat(MNT "/d", &st) && st.st_nlink == 2, "link count");
	close(fd);
}

/* FUSE_NOTIFY_DELETE is what makes IN_DELETE_SELF: the kernel's own event */
static void test_notify_delete(void)
{
	struct { struct fuse_notify_delete_out out; char name[8]; } del = {
		.out = { .parent = 2, .child = 4, .namelen = 3 }, .name = "sub",
	};
	int fd = inotify();

	inotify_add_watch(fd, MNT "/d", IN_ALL_EVENTS);
	inotify_add_watch(fd, MNT "/d/sub", IN_ALL_EVENTS);
	read_inotify(fd);
	add(2, 7, IN_DELETE | IN_ISDIR, "sub");
	check(notify() == 0, "delete event");
	check(send_raw(FUSE_NOTIFY_DELETE, &del, sizeof(del.out) + 4, 0) == 0, "FUSE_NOTIFY_DELETE");
	expect("delete of a watched directory", read_inotify(fd),
	       "1:DELETE|ISDIR:sub 2:DELETE_SELF: 2:IGNORED:");
	close(fd);
}

static void test_many(void)
{
	int fd = inotify(), n = 500, first = requests();
	char path[64];
	uint64_t masks[4];

	for (int i = 0; i < n; i++) {
		sprintf(path, MNT "/m%d", i + 1000);
		check(inotify_add_watch(fd, path, IN_CREATE) == i + 1, "watch %d", i);
	}
	int asked = 0;
	for (int i = 0; i < n; i++)
		asked += requests_for(MANY_BASE + i + 1000, first, masks, 4) >= 1;
	check(asked == n, "%d of %d watches asked for", asked, n);
	check(await_mask(MANY_BASE + 1000 + n - 1, IN_CREATE | IN_ISDIR | EV_ON_CHILD, first, 6000) >= 0,
	      "the last one is narrowed");
	for (int i = 0; i < n; i++) {
		sprintf(path, "x%d", i);
		notify_one(MANY_BASE + 1000 + i, MANY_BASE + 1000 + i, IN_CREATE, path);
	}
	read_inotify(fd);
	int count = 0;
	for (char *p = text; (p = strstr(p, "CREATE")); p++)
		count++;
	check(count == n, "%d events of %d", count, n);
	add(0, 0, 0, NULL)->flags = EV_OVERFLOW;
	notify();
	expect("overflow with many watches", read_inotify(fd), "-1:Q_OVERFLOW:");
	close(fd);
	/* Their names were dropped, so the end of the watch is the end of the inode */
	int ended = 0;
	for (int tries = 0; ended < n && tries < 60; tries++) {
		msleep(100);
		ended = 0;
		for (int i = 0; i < n; i++)
			ended += srv.forgotten[i + 1000] || await_mask(MANY_BASE + i + 1000, 0, first, 0) >= 0;
	}
	check(ended == n, "%d of %d watches ended", ended, n);
}

static void *storm(void *arg)
{
	volatile bool *end = arg;

	while (!*end) {
		char buf[512];
		struct event *ev = (void *)buf;
		struct fuse_out_header oh = { .error = NOTIFY_FSNOTIFY };
		struct iovec iov[2] = { { &oh, sizeof(oh) }, { buf, 0 } };
		static unsigned n;

		memset(buf, 0, sizeof(buf));
		ev->reclen = 56;
		ev->nodeid = 2;
		ev->generation = 7;
		ev->mask = IN_CREATE | IN_MODIFY;
		ev->namelen = 1;
		ev->name[0] = 'a' + n % 26;
		iov[1].iov_len = 56;
		if (n++ % 64 == 0) {
			memset(ev, 0, 56);
			ev->reclen = 48;
			ev->flags = EV_OVERFLOW;
			iov[1].iov_len = 48;
		}
		oh.len = sizeof(oh) + iov[1].iov_len;
		if (writev(srv.fd, iov, 2) < 0 && errno != ENOENT)
			msleep(1);
	}
	return NULL;
}

/* Marks come and go while events and overflows arrive */
static void test_churn(void)
{
	bool end = false;
	pthread_t t[2];
	long until = now_ms() + 3000;
	int rounds = 0;

	for (int i = 0; i < 2; i++)
		pthread_create(&t[i], NULL, storm, &end);
	while (now_ms() < until) {
		int fd = inotify(), fan;
		int wd = inotify_add_watch(fd, MNT "/d", IN_ALL_EVENTS);

		inotify_add_watch(fd, MNT "/d/f", IN_ALL_EVENTS);
		fan = fanotify_init(FAN_CLASS_NOTIF | REPORT_DFID_NAME | FAN_NONBLOCK, O_RDONLY);
		fanotify_mark(fan, FAN_MARK_ADD, FAN_CREATE | FAN_MODIFY | FAN_EVENT_ON_CHILD,
			      AT_FDCWD, MNT "/d");
		msleep(rounds % 4);
		read_inotify(fd);
		inotify_rm_watch(fd, wd);
		if (rounds % 8 == 0) {
			int c = open("/proc/sys/vm/drop_caches", O_WRONLY);
			if (write(c, "2", 1) < 0)
				perror("drop_caches");
			close(c);
		}
		close(rounds & 1 ? fan : fd);
		close(rounds & 1 ? fd : fan);
		rounds++;
	}
	end = true;
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	check(rounds > 20, "%d rounds of marks under load", rounds);
}

/* Unmount in every state; notifications outside of a session */
static void test_lifecycle(void)
{
	int fd = inotify();

	inotify_add_watch(fd, MNT "/d", IN_ALL_EVENTS);
	inotify_add_watch(fd, MNT, IN_ALL_EVENTS);
	read_inotify(fd);
	long begin = now_ms();
	check(umount2(MNT, 0) == 0, "umount with watches: %s", strerror(errno));
	check(now_ms() - begin < 2000, "umount took %ld ms", now_ms() - begin);
	read_inotify(fd);
	for (int wd = 1; wd <= 2; wd++) {
		char want[64];

		sprintf(want, "%d:UNMOUNT|ISDIR: %d:IGNORED:", wd, wd);
		check(strstr(text, want), "umount: '%s' not in '%s'", want, text);
	}
	pthread_join(srv.thread, NULL);
	add(2, 7, IN_CREATE, "late");
	int ret = notify();
	check(ret == -ENODEV || ret == -EPERM || ret == -ENOENT || ret == -EINVAL,
	      "notification after unmount: %d", ret);
	close(srv.fd);
	close(fd);

	/* Before the reply to INIT */
	char opt[128];
	srv.fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	add(2, 7, IN_CREATE, "early");
	ret = notify();
	check(ret < 0, "notification before mount: %d", ret);
	snprintf(opt, sizeof(opt), "fd=%d,rootmode=40000,user_id=0,group_id=0", srv.fd);
	check(!mount("fsnotify-test", MNT, "fuse", 0, opt), "mount");
	add(1, 0, IN_CREATE, "early");
	ret = notify();
	check(ret == -EINVAL, "notification before INIT: %d", ret);

	/* A watch before INIT waits for it, and can be killed while it waits */
	pid_t pid = fork();
	if (!pid) {
		inotify_add_watch(inotify(), MNT, IN_CREATE);
		_exit(0);
	}
	msleep(200);
	check(waitpid(pid, NULL, WNOHANG) == 0, "add_watch waits for INIT");
	kill(pid, SIGKILL);
	begin = now_ms();
	waitpid(pid, NULL, 0);
	check(now_ms() - begin < 1000, "and dies when killed");
	pid = fork();
	if (!pid) {
		inotify_add_watch(inotify(), MNT, IN_CREATE);
		_exit(0);
	}
	msleep(100);
	srv.agree = true;
	srv.requests = 0;
	pthread_create(&srv.thread, NULL, serve, NULL);
	waitpid(pid, NULL, 0);
	uint64_t masks[4];
	check(requests_for(1, 0, masks, 4) >= 1, "and asks after INIT");
	stop();

	/* A server that does not answer: only killing helps, and umount -f */
	start(true);
	srv.mute = true;
	pid = fork();
	if (!pid) {
		inotify_add_watch(inotify(), MNT "/d", IN_CREATE);
		_exit(0);
	}
	msleep(200);
	check(waitpid(pid, NULL, WNOHANG) == 0, "add_watch waits for the server");
	pid_t second = fork();
	if (!second) {
		inotify_add_watch(inotify(), MNT "/e", IN_CREATE);
		_exit(0);
	}
	msleep(100);
	kill(second, SIGKILL);
	begin = now_ms();
	waitpid(second, NULL, 0);
	check(now_ms() - begin < 1000, "another one waits killably");
	begin = now_ms();
	check(umount2(MNT, MNT_FORCE | MNT_DETACH) == 0, "umount -f");
	waitpid(pid, NULL, 0);
	check(now_ms() - begin < 3000, "umount -f frees the waiter: %ld ms", now_ms() - begin);
	pthread_join(srv.thread, NULL);
	close(srv.fd);

	/* The server dies while the work item waits for it */
	start(true);
	fd = inotify();
	inotify_add_watch(fd, MNT "/d", IN_CREATE);
	srv.mute = true;
	msleep(2500);		/* now it narrows, and gets no answer */
	begin = now_ms();
	check(umount2(MNT, 0) == 0, "umount while narrowing: %s", strerror(errno));
	check(now_ms() - begin < 3000, "umount while narrowing took %ld ms", now_ms() - begin);
	pthread_join(srv.thread, NULL);
	close(srv.fd);
	close(fd);

	/* Unmount at once after adding watches, again and again */
	for (int i = 0; i < 20; i++) {
		start(true);
		fd = inotify();
		inotify_add_watch(fd, MNT "/d", IN_CREATE);
		inotify_add_watch(fd, MNT "/d/f", IN_MODIFY);
		notify_one(2, 7, IN_CREATE, "x");
		msleep(i * 7 % 40);
		if (i & 1)
			close(fd);
		stop();
		if (!(i & 1))
			close(fd);
	}
	check(true, "remounts");
}

/* With the core patches masks are followed at once, and dnotify is noticed */
static void test_core(void)
{
	int fd = inotify(), first;

	int wd = inotify_add_watch(fd, MNT "/d", IN_CREATE);
	check(await_mask(2, IN_CREATE | IN_ISDIR | EV_ON_CHILD, 0, 4000) >= 0, "narrowed");
	msleep(500);
	first = requests();
	inotify_rm_watch(fd, wd);
	long ms = await_mask(2, 0, first, 3000);
	check(ms >= 0 && ms < 300, "the end of a watch took %ld ms", ms);
	close(fd);

	int dir = open(MNT "/e", O_RDONLY | O_DIRECTORY);
	signal(SIGIO, SIG_IGN);
	check(!fcntl(dir, F_NOTIFY, DN_CREATE | DN_MULTISHOT), "dnotify: %s", strerror(errno));
	/* A file that is moved here is a new one, too */
	ms = await_mask(5, IN_CREATE | IN_MOVED_TO | IN_ISDIR | EV_ON_CHILD, 0, 3000);
	check(ms >= 0 && ms < 300, "dnotify's watch took %ld ms", ms);
	first = requests();
	close(dir);
	ms = await_mask(5, 0, first, 4000);
	check(ms >= 0, "dnotify's watch ends");
}

/* Nothing is done once a second when nothing is watched any more */
static void test_idle(void)
{
	int fd = inotify();

	inotify_add_watch(fd, MNT "/d", IN_CREATE);
	close(fd);
	msleep(13000);
	int first = requests();
	msleep(2000);
	check(requests() == first, "idle: %d requests", requests() - first);
}

/* The module parameter */
static void test_parameter(void)
{
	int fd = open("/sys/module/fuse/parameters/fsnotify", O_WRONLY);

	check(fd >= 0 && write(fd, "0", 1) == 1, "parameter: %s", strerror(errno));
	start(true);
	check(!srv.offered, "turned off: not offered");
	int in = inotify();
	inotify_add_watch(in, MNT "/d", IN_CREATE);
	check(requests() == 0, "turned off: no request");
	check(notify_one(2, 7, IN_CREATE, "x") == -EINVAL, "turned off: refused");
	close(in);
	stop();
	check(write(fd, "1", 1) == 1, "parameter");
	close(fd);
}

/* ------------------------------------------------------------------- main */

static void (*body)(void);

static void between_mount_and_unmount(void)
{
	start(true);
	body();
	stop();
}

static void mounted(const char *name, void (*fn)(void))
{
	body = fn;
	section(name, between_mount_and_unmount);
}

int main(void)
{
	struct utsname u;

	guest_begin();
	mkdir(MNT, 0755);
	signal(SIGPIPE, SIG_IGN);
	uname(&u);
	printf("kernel %s\n", u.release);

	section("negotiation", test_negotiation);
	mounted("watches", test_watch_requests);
	mounted("refusals", test_refusals);
	mounted("supported", test_learn_supported);
	mounted("events", test_events);
	mounted("rename", test_rename);
	mounted("fanotify", test_fanotify);
	mounted("overflow", test_overflow);
	mounted("malformed", test_malformed);
	mounted("leaks", test_leaks);
	mounted("delete", test_notify_delete);
	mounted("many", test_many);
	mounted("churn", test_churn);
	start(true);
	section("lifecycle", test_lifecycle);
	mounted("idle", test_idle);
	if (!strcmp(getenv("variant") ?: "", "core"))
		mounted("core", test_core);
	section("parameter", test_parameter);
	return guest_end();
}
