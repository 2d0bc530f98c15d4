// SPDX-License-Identifier: Apache-2.0
/*
 * Repeats what happened on the host as system calls on the mount, one record at a time: BEGIN tells the daemon what comes, then the call
 * makes the guest's VFS emit the event. Directories are reached by their number in FUSE, never by a path.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

unsigned long replayed, failed;

/* A directory that is open for one replay. */
struct place {
	int fd;
	bool ours; /* to be closed */
	uint64_t nodeid;
};

/* What has come; a name is not NUL-terminated. */
struct event {
	uint64_t nodeid, child;
	uint32_t generation, child_generation, mask, flags;
	const char *name;
	size_t length;
};

/*
 * ATTRIB of an object alone is held back: if a name of it comes or goes next, that call makes the same event. So is its end, of which the
 * name may be said next.
 */
static struct event held;
static bool holding, held_end;

/* Events that a rename has made already: the daemon says them, too. */
static uint64_t moved_self, replaced_self;
/* A removal that was replayed already: the daemon says it as the end of the child, and as a name that went. */
static struct {
	uint64_t parent, child;
	size_t length;
	char name[256];
} removed;

/*
 * Files that are open on the host, until their CLOSE comes. How one was opened is said only by what comes next: a read, a write or the CLOSE.
 * It is opened then, so that OPEN has its place before that.
 */
enum { KEPT = 64 };
static struct kept {
	bool used;
	int fd; /* -1: not opened yet */
	unsigned int since;
	uint64_t nodeid;
	size_t length;
	char name[256];
} kept[KEPT];

static unsigned int serial;
static uint64_t staging_node;

bool something_held_back(void)
{
	return holding;
}

/* 1: go on; 0: leave it out; -1: the connection is lost. */
static int begin(enum operation operation, bool isdir, const struct place *parent, const char *name, size_t length,
		 const struct place *target, const char *new_name, size_t new_length, uint64_t child, uint64_t replaced, uint32_t *mode)
{
	union begin b = { .in = { .operation = operation, .flags = isdir ? BEGIN_ISDIR : 0, .child = child, .replaced = replaced } };

	if (parent) {
		b.in.parent = parent->nodeid;
		b.in.name_len = length;
		memcpy(b.in.name, name, length);
	}
	if (target) {
		b.in.target = target->nodeid;
		b.in.new_name_len = new_length;
		memcpy(b.in.new_name, new_name, new_length);
	}
	if (ioctl(control, CONTROL_BEGIN, &b) < 0)
		return -1;
	if (mode)
		*mode = b.out.mode;
	return b.out.go;
}

static const char *text(const char *name, size_t length)
{
	static char texts[2][256];
	static int turn;
	char *to = texts[turn ^= 1];

	memcpy(to, name, length);
	to[length] = 0;
	return to;
}

static int done(const char *what, const char *name, size_t length, int result)
{
	if (result >= 0) {
		replayed++;
		return 0;
	}
	failed++;
	if (verbose)
		say("%s %.*s: %s", what, (int)length, name, strerror(errno));
	return 0;
}

/* Whether it is better not replayed: something is mounted there, and would be detached or changed instead. */
static bool in_use(const struct place *place, const char *name, size_t length, bool or_above)
{
	if (!is_mount_point(place->fd, name, length, or_above))
		return false;
	if (verbose)
		say("%.*s is a mount point here: what happened to it on the host is left out", (int)length, name);
	return true;
}

static bool take(struct place *place, uint64_t nodeid, uint32_t generation)
{
	place->nodeid = nodeid;
	place->ours = false;
	place->fd = directory_fd(nodeid, generation);
	return place->fd >= 0;
}

static void leave(struct place *place)
{
	if (place->ours && place->fd >= 0)
		close(place->fd);
	place->fd = -1;
}

static struct place staged(char *name)
{
	if (!staging_node)
		staging_node = node_of(staging);
	sprintf(name, "%u", serial++);
	return (struct place){ .fd = staging, .nodeid = staging_node };
}

/* Makes the kernel ask for a name though it has a valid entry: looking up what is to be made does. */
static void ask_anew(int fd, const char *name)
{
	mkdirat(fd, name, 0);
}

/* Another name of a file. The kernel says ATTRIB of the file, too, as it has one link more. */
static int another_name(uint64_t child, uint32_t generation, const struct place *parent, const char *name, size_t length)
{
	int fd = open_node(child, generation);
	int result = fd < 0 ? 0 : begin(OP_CREATE, false, parent, name, length, NULL, NULL, 0, child, 0, NULL);

	if (result > 0)
		done("link", name, length, linkat(fd, "", parent->fd, text(name, length), AT_EMPTY_PATH));
	if (fd >= 0)
		close(fd);
	return result;
}

static int create(const struct event *e, bool linked)
{
	struct place parent;
	char stage[16];
	uint32_t mode = 0;
	int result;
	bool isdir = e->mask & FS_ISDIR;

	if (!take(&parent, e->nodeid, e->generation) || in_use(&parent, e->name, e->length, true))
		return 0;
	removed.child = 0;
	if (linked) {
		result = another_name(e->child, e->child_generation, &parent, e->name, e->length);
		leave(&parent);
		return result < 0 ? -1 : 0;
	}
	if (isdir && e->child) {
		/* Somebody has found it before: aside with it, and what is below, so that nothing is detached when its name is hidden. */
		struct place aside = staged(stage);
		struct stat st;
		result = begin(OP_CHANGE, true, &aside, stage, strlen(stage), NULL, NULL, 0, e->child, 0, NULL);
		if (result > 0)
			fstatat(staging, stage, &st, AT_SYMLINK_NOFOLLOW);
	}
	result = begin(OP_CREATE, isdir, &parent, e->name, e->length, NULL, NULL, 0, e->child, 0, &mode);
	if (result > 0) {
		const char *name = text(e->name, e->length);
		int made = S_ISDIR(mode)   ? mkdirat(parent.fd, name, mode & 07777) :
			   S_ISLNK(mode)   ? symlinkat(".", parent.fd, name) :
					     mknodat(parent.fd, name, mode & (S_IFMT | 07777), 0);
		done("create", e->name, e->length, made);
	}
	leave(&parent);
	return result < 0 ? -1 : 0;
}

static bool was_removed(const struct event *e)
{
	return removed.child == e->child && removed.parent == e->nodeid && removed.length == e->length &&
	       !memcmp(removed.name, e->name, e->length);
}

/* A name goes. `last`: the daemon says no more of it. */
static int remove_name(const struct event *e, bool last)
{
	struct place parent;
	int result;
	bool isdir = e->mask & FS_ISDIR;

	if (e->child && was_removed(e)) {
		if (last)
			removed.child = 0;
		return 0;
	}
	if (!take(&parent, e->nodeid, e->generation) || in_use(&parent, e->name, e->length, true))
		return 0;
	if (e->child)
		release_fd(e->child);
	result = begin(OP_REMOVE, isdir, &parent, e->name, e->length, NULL, NULL, 0, e->child, 0, NULL);
	if (result > 0) {
		const char *name = text(e->name, e->length);
		ask_anew(parent.fd, name);
		int gone = unlinkat(parent.fd, name, isdir ? AT_REMOVEDIR : 0);
		done("remove", e->name, e->length, gone);
		if (!last) {
			removed.parent = e->nodeid;
			removed.child = e->child;
			removed.length = e->length;
			memcpy(removed.name, e->name, e->length);
		}
	}
	leave(&parent);
	if (e->child)
		watched_gone(e->child);
	return result < 0 ? -1 : 0;
}

/*
 * The end of a file whose name is not said. It goes under the name that it was found by; where the watchers of the directory would hear of
 * that, or it is not known, under a name in the staging directory.
 */
static int ended(uint64_t child, uint32_t generation)
{
	char stage[16];
	int result, fd = open_node(child, generation);
	struct event e = { .child = child, .mask = FS_DELETE };

	if (fd < 0)
		return 0; /* it has ended */
	close(fd);
	if (!watched_within(child, FS_DELETE) && (e.name = watched_name(child, &e.nodeid))) {
		e.name = text(e.name, e.length = strlen(e.name));
		return remove_name(&e, true);
	}
	struct place aside = staged(stage);
	result = begin(OP_REMOVE, false, &aside, stage, strlen(stage), NULL, NULL, 0, child, 0, NULL);
	if (result > 0)
		done("end", stage, strlen(stage), unlinkat(staging, stage, 0));
	watched_gone(child);
	return result < 0 ? -1 : 0;
}

/* Either end may be missing: then it is a name in the staging directory. */
static int move(const struct event *from, const struct event *to)
{
	const struct event *e = from ? from : to;
	struct place source, target;
	char stage[16];
	uint64_t replaced = 0;
	int result, moved = -1;

	if (from ? !take(&source, from->nodeid, from->generation) : (source = staged(stage), false))
		return 0;
	if (to ? !take(&target, to->nodeid, to->generation) : (target = staged(stage), false)) {
		leave(&source);
		return 0;
	}
	const char *name = from ? from->name : stage, *new_name = to ? to->name : stage;
	size_t length = from ? from->length : strlen(stage), new_length = to ? to->length : strlen(stage);
	if (to)
		replaced = watched_at(to->nodeid, to->name, to->length);
	if (replaced == e->child)
		replaced = 0;
	/* A directory that stays in the share takes what is mounted below along. */
	if ((from && in_use(&source, name, length, !to)) || (to && in_use(&target, new_name, new_length, true))) {
		leave(&source);
		leave(&target);
		return 0;
	}
	if (replaced)
		release_fd(replaced);
	removed.child = 0;
	result = begin(OP_RENAME, e->mask & FS_ISDIR, &source, name, length, &target, new_name, new_length, e->child, replaced, NULL);
	if (result > 0) {
		const char *old = text(name, length), *new = text(new_name, new_length);
		/* Moving a directory in the kernel's cache can meet a lock: it says ESTALE then. */
		for (int tries = 0; tries < 5; tries++) {
			ask_anew(source.fd, old);
			moved = renameat(source.fd, old, target.fd, new);
			if (moved == 0 || errno != ESTALE)
				break;
			usleep(1000);
		}
		done("move", name, length, moved);
	}
	leave(&source);
	leave(&target);
	if (moved == 0) {
		moved_self = e->child;
		replaced_self = replaced;
		if (replaced)
			watched_gone(replaced);
		if (e->child)
			watched_moved(e->child, to ? to->nodeid : 0, new_name, to ? new_length : 0);
	}
	return result < 0 ? -1 : 0;
}

/* MOVE_SELF of what nobody watches the directories of: moved in the staging directory. */
static int move_self(const struct event *e)
{
	char stage[16], other[16];
	struct place from = staged(stage), to = staged(other);
	int fd, result;

	if (moved_self == e->nodeid) {
		moved_self = 0;
		return 0;
	}
	fd = open_node(e->nodeid, e->generation);
	if (fd < 0)
		return 0;
	bool isdir = is_directory(fd), busy = is_mount_point(fd, NULL, 0, false);
	close(fd);
	if (busy)
		return 0;
	result = begin(OP_RENAME, isdir, &from, stage, strlen(stage), &to, other, strlen(other), e->nodeid, 0, NULL);
	if (result > 0)
		done("move", stage, strlen(stage), renameat(staging, stage, staging, other));
	return result < 0 ? -1 : 0;
}

/* What an event is about, for one replay: the directory and a name in it, or the object alone. */
struct subject {
	struct place parent;
	const char *name;
	size_t length;
	uint64_t child;
	bool isdir;
};

static bool subject_of(const struct event *e, struct subject *s)
{
	*s = (struct subject){ .name = e->name, .length = e->length, .child = e->length ? e->child : e->nodeid, .isdir = e->mask & FS_ISDIR };
	if (e->length)
		return take(&s->parent, e->nodeid, e->generation) && !in_use(&s->parent, e->name, e->length, false);
	s->parent = (struct place){ .fd = open_node(e->nodeid, e->generation), .ours = true };
	if (s->parent.fd < 0)
		return false;
	s->isdir = is_directory(s->parent.fd);
	return true;
}

/* Opens it (O_PATH), once the replay has begun. */
static int reach(const struct subject *s)
{
	return s->length ? openat(s->parent.fd, text(s->name, s->length), O_PATH | O_NOFOLLOW | O_CLOEXEC) : dup(s->parent.fd);
}

static int change(const struct event *e, uint32_t bit)
{
	struct subject s;
	struct statx stx;
	int fd, result;

	if (!subject_of(e, &s))
		return 0;
	result = begin(OP_CHANGE, s.isdir, &s.parent, s.name, s.length, NULL, NULL, 0, s.child, 0, NULL);
	fd = result > 0 ? reach(&s) : -1;
	if (result > 0 && fd < 0)
		done("reach", s.name, s.length, -1);
	if (fd >= 0) {
		/* The kernel learns of other data, and forgets what it has; then the event, with the times that the file has. */
		int known = statx(fd, "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &stx);
		if (known)
			done("look at", s.name, s.length, -1);
		else {
			struct timespec times[2] = {
				{ stx.stx_atime.tv_sec, stx.stx_atime.tv_nsec },
				{ stx.stx_mtime.tv_sec, stx.stx_mtime.tv_nsec },
			};
			/* fsnotify_change(): one of the times is MODIFY or ACCESS, both are ATTRIB. */
			if (bit == FS_MODIFY)
				times[0].tv_nsec = UTIME_OMIT;
			if (bit == FS_ACCESS)
				times[1].tv_nsec = UTIME_OMIT;
			done("change", s.name, s.length, utimensat(fd, "", times, AT_EMPTY_PATH));
		}
		close(fd);
	}
	leave(&s.parent);
	return result < 0 ? -1 : 0;
}

/* The kernel says OPEN, and CLOSE_* when the descriptor is closed. Returns it, or -1. */
static int open_file(const struct event *e, bool writes, int *lost)
{
	struct subject s;
	struct stat st;
	char path[64];
	int result, at, fd = -1;

	if (!subject_of(e, &s))
		return -1;
	result = begin(OP_OPEN, s.isdir, &s.parent, s.name, s.length, NULL, NULL, 0, s.child, 0, NULL);
	if (result < 0)
		*lost = -1;
	if (result > 0 && (at = reach(&s)) >= 0) {
		/* Who has a program open for writing keeps others from running it; what is no file has no open of ours. */
		if (fstat(at, &st) == 0 && (S_ISREG(st.st_mode) || S_ISDIR(st.st_mode)) && !(writes && (st.st_mode & 0111))) {
			snprintf(path, sizeof(path), "/proc/self/fd/%d", at);
			fd = open(path, (writes ? O_WRONLY : O_RDONLY) | O_NONBLOCK | O_CLOEXEC);
			done("open", s.name, s.length, fd);
		}
		close(at);
	}
	leave(&s.parent);
	return fd;
}

static struct kept *kept_of(const struct event *e)
{
	for (struct kept *k = kept; k < kept + KEPT; k++)
		if (k->used && k->nodeid == e->nodeid && k->length == e->length && !memcmp(k->name, e->name, e->length))
			return k;
	return NULL;
}

static void let_go(struct kept *k)
{
	if (k->used && k->fd >= 0)
		close(k->fd);
	k->used = false;
}

static void keep(const struct event *e)
{
	static unsigned int clock;
	struct kept *place = kept;

	for (struct kept *k = kept; k < kept + KEPT; k++) {
		if (!k->used) {
			place = k;
			break;
		}
		if (k->since < place->since)
			place = k;
	}
	let_go(place);
	*place = (struct kept){ .used = true, .fd = -1, .since = clock++, .nodeid = e->nodeid, .length = e->length };
	memcpy(place->name, e->name, e->length);
}

void forget_replays(void)
{
	for (struct kept *k = kept; k < kept + KEPT; k++)
		let_go(k);
	holding = held_end = false;
	moved_self = replaced_self = removed.child = staging_node = 0;
}

int replay_rest(void)
{
	struct event e = held;

	if (!holding)
		return 0;
	holding = false;
	if (held_end) {
		held_end = false;
		return ended(e.nodeid, e.generation);
	}
	if (!watched_within(e.nodeid, FS_ATTRIB))
		return change(&e, FS_ATTRIB);
	/*
	 * Who watches the directory would have been told with it, so what has changed is the number of links: the directory's watchers
	 * do not hear of that. A name in the staging directory makes the same event.
	 */
	char stage[16];
	struct stat st;
	struct place aside = staged(stage);
	int result = another_name(e.nodeid, e.generation, &aside, stage, strlen(stage));
	fstatat(staging, stage, &st, AT_SYMLINK_NOFOLLOW); /* there is no such name: the kernel forgets it */
	return result < 0 ? -1 : 0;
}

static int overflow(void)
{
	say("events were lost (the host or the daemon had too many at once): what is watched may have changed unseen");
	return 0;
}

/* The bits in the order in which one process causes them; there is one in a record as a rule. */
static int one(const struct event *e)
{
	struct kept *k;
	int lost = 0, fd;

	bool linked = false;

	if (holding) {
		if ((e->mask & (FS_DELETE | FS_CREATE)) && e->length && e->child == held.nodeid) {
			holding = held_end = false;
			linked = e->mask & FS_CREATE;
		} else if (replay_rest())
			return -1;
	}
	if ((e->mask & FS_CREATE) && e->length && create(e, linked))
		return -1;
	if ((e->mask & FS_OPEN) && !kept_of(e))
		keep(e);
	if ((e->mask & (FS_ACCESS | FS_MODIFY)) && (k = kept_of(e)) && k->fd < 0)
		k->fd = open_file(e, e->mask & (FS_MODIFY | FS_CLOSE_WRITE), &lost);
	if ((e->mask & FS_ACCESS) && change(e, FS_ACCESS))
		return -1;
	if ((e->mask & FS_MODIFY) && change(e, FS_MODIFY))
		return -1;
	if (e->mask & FS_ATTRIB) {
		if (!e->length && replaced_self == e->nodeid)
			replaced_self = 0;
		else if (!e->length) {
			held = *e;
			holding = true;
		} else if (change(e, FS_ATTRIB))
			return -1;
	}
	if (e->mask & (FS_CLOSE_WRITE | FS_CLOSE_NOWRITE)) {
		k = kept_of(e);
		if ((!k || k->fd < 0) && (fd = open_file(e, e->mask & FS_CLOSE_WRITE, &lost)) >= 0)
			close(fd);
		if (k)
			let_go(k);
	}
	if ((e->mask & FS_MOVED_FROM) && e->length && move(e, NULL))
		return -1;
	if ((e->mask & FS_MOVED_TO) && e->length && move(NULL, e))
		return -1;
	if ((e->mask & FS_MOVE_SELF) && !e->length && move_self(e))
		return -1;
	if ((e->mask & FS_DELETE) && e->length && remove_name(e, true))
		return -1;
	return lost;
}

static int records(const char *at, const char *end)
{
	static struct event events[MESSAGE_MAX / sizeof(struct record)];
	size_t n = 0;

	while (end - at >= (ptrdiff_t)sizeof(struct record) && n < sizeof(events) / sizeof(events[0])) {
		const struct record *r = (const struct record *)at;
		if (r->reclen < sizeof(*r) || r->reclen % 8 || r->reclen > (size_t)(end - at) || r->namelen > 255 ||
		    (r->namelen && sizeof(*r) + r->namelen + 1 > r->reclen))
			return 0;
		events[n++] = (struct event){ r->nodeid, r->child, r->generation, r->child_generation, r->mask, r->flags, r->name, r->namelen };
		at += r->reclen;
	}
	for (size_t i = 0; i < n; i++) {
		const struct event *e = &events[i];
		if (e->flags & RECORD_OVERFLOW) {
			overflow();
			continue;
		}
		if ((e->flags & RECORD_PAIRED) && i + 1 < n) {
			if (replay_rest() || move(e, e + 1))
				return -1;
			i++;
			continue;
		}
		if (one(e))
			return -1;
	}
	return 0;
}

int replay(const char *message, size_t length)
{
	const struct message *m = (const struct message *)message;
	const char *body = message + sizeof(*m);

	if (length < sizeof(*m) || m->len != length)
		return 0;
	if (m->code == NOTIFY_LOOK) {
		look_at((const uint32_t *)body, (length - sizeof(*m)) / 4);
		return replay_rest();
	}
	if (m->code == NOTIFY_FSNOTIFY)
		return records(body, message + length);
	if (m->code == NOTIFY_DELETE) {
		const struct delete_out *d = (const struct delete_out *)body;
		if (length < sizeof(*m) + sizeof(*d) || d->namelen > 255 || length < sizeof(*m) + sizeof(*d) + d->namelen)
			return 0;
		if (holding && held.nodeid != d->child && replay_rest())
			return -1;
		if (d->parent == 1 && d->namelen == 1 && d->name[0] == '.') {
			held = (struct event){ .nodeid = d->child, .mask = FS_ATTRIB };
			holding = held_end = true;
			return 0;
		}
		holding = held_end = false;
		int fd = open_node(d->child, 0);
		if (fd < 0)
			return 0; /* it has ended */
		bool isdir = is_directory(fd);
		close(fd);
		struct event e = { .nodeid = d->parent, .child = d->child, .mask = FS_DELETE | (isdir ? FS_ISDIR : 0),
				   .name = d->name, .length = d->namelen };
		return remove_name(&e, false);
	}
	return replay_rest(); /* the kernel forgets by itself what is replayed */
}
