// SPDX-License-Identifier: Apache-2.0
/*
 * Names in the share that are mount points in the guest, in any mount namespace. When such a name goes the kernel detaches the mount, in
 * all namespaces: what happened to the name on the host is then not replayed.
 *
 * /proc/PID/mountinfo says what is mounted where, and poll() when that has changed. Who has that file open keeps the namespace and all its
 * mounts, so that those of others are open only while there is something to replay.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* New namespaces are looked for that often, and in at most this part of the time. */
enum { SPACES_MS = 20, SPACES_SHARE = 20 };

struct space {
	char link[32];	/* mnt:[NUMBER] */
	char pid[16];
	bool seen;	/* by the look under way */
	char **paths;	/* from the root of the share: /directory/name */
	size_t count;
};

/* The first is the agent's own. */
static struct space *spaces;
static struct pollfd *polls; /* of each, fd -1: not open */
static size_t count;

/* What of `path` comes after `above`, NULL when it is not below it. */
static const char *rest(const char *path, const char *above)
{
	size_t length = strcmp(above, "/") ? strlen(above) : 0;

	return !strncmp(path, above, length) && (path[length] == '/' || !path[length]) ? path + length : NULL;
}

/* The next field of a line; the kernel writes white space and \ as \040. */
static char *field(char **at)
{
	char *start = strsep(at, " "), *to = start;

	if (!start)
		return NULL;
	for (char *from = start; *from; from++) {
		if (from[0] == '\\' && from[1] && from[2] && from[3]) {
			*to++ = (from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0');
			from += 3;
		} else
			*to++ = *from;
	}
	*to = 0;
	return start;
}

struct mount {
	int id, parent;
	bool shared; /* it is the share, or a part of it */
	char *root, *point;
};

static void forget_paths(struct space *s)
{
	while (s->count)
		free(s->paths[--s->count]);
	free(s->paths);
	s->paths = NULL;
}

static void parse(struct space *s, char *text)
{
	struct mount *mounts = NULL;
	size_t n = 0, room = 0;
	char *line;

	forget_paths(s);
	while ((line = strsep(&text, "\n"))) {
		unsigned int major, minor;
		struct mount m;
		int used;
		if (sscanf(line, "%d %d %u:%u %n", &m.id, &m.parent, &major, &minor, &used) != 4)
			continue;
		line += used;
		m.root = field(&line);
		m.point = field(&line);
		m.shared = makedev(major, minor) == device;
		if (!m.point)
			continue;
		if (n == room && !(mounts = realloc(mounts, (room = room ? 2 * room : 64) * sizeof(*mounts))))
			abort();
		mounts[n++] = m;
	}
	for (struct mount *p = mounts; p < mounts + n; p++) {
		if (!p->shared)
			continue;
		for (struct mount *m = mounts; m < mounts + n; m++) {
			const char *below = m->parent == p->id && m != p ? rest(m->point, p->point) : NULL;
			if (!below || !*below)
				continue;
			s->paths = realloc(s->paths, (s->count + 1) * sizeof(*s->paths));
			if (!s->paths || asprintf(&s->paths[s->count++], "%s%s", strcmp(p->root, "/") ? p->root : "", below) < 0)
				abort();
		}
	}
	free(mounts);
}

/* Reads what is open from its start. */
static void read_mounts(size_t i)
{
	static char *text;
	static size_t room;
	size_t length = 0;
	ssize_t n;

	if (lseek(polls[i].fd, 0, SEEK_SET))
		return;
	do {
		if (room - length < 4096 && !(text = realloc(text, room = 2 * room + 8192)))
			abort();
		n = read(polls[i].fd, text + length, room - length - 1);
		length += n > 0 ? n : 0;
	} while (n > 0);
	if (n < 0)
		return; /* what was known stays */
	text[length] = 0;
	parse(&spaces[i], text);
}

/* The namespace of a process. Returns false when there is none, or it may not be known. */
static bool space_of(const char *pid, char *link, size_t size)
{
	char path[64];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/%.15s/ns/mnt", pid);
	n = readlink(path, link, size - 1);
	link[n < 0 ? 0 : n] = 0;
	return n > 0;
}

static void found(const char *pid)
{
	char link[32];

	if (!space_of(pid, link, sizeof(link)))
		return;
	for (struct space *s = spaces; s < spaces + count; s++) {
		if (!strcmp(s->link, link)) {
			/* The first process of a look likely lives longest. */
			if (!s->seen)
				snprintf(s->pid, sizeof(s->pid), "%s", pid);
			s->seen = true;
			return;
		}
	}
	spaces = realloc(spaces, (count + 1) * sizeof(*spaces));
	polls = realloc(polls, (count + 1) * sizeof(*polls));
	if (!spaces || !polls)
		abort();
	struct space *s = &spaces[count];
	*s = (struct space){ .seen = true };
	memcpy(s->link, link, sizeof(link));
	snprintf(s->pid, sizeof(s->pid), "%s", pid);
	polls[count++] = (struct pollfd){ .fd = -1, .events = POLLPRI };
}

/* Looks which namespaces there are. */
static void find_spaces(void)
{
	static double due;
	double now = now_ms(), cost;
	struct dirent *entry;
	DIR *directory;

	if (now < due || !(directory = opendir("/proc")))
		return;
	for (size_t i = 0; i < count; i++)
		spaces[i].seen = false;
	found("self");
	while ((entry = readdir(directory)))
		if (isdigit((unsigned char)entry->d_name[0]))
			found(entry->d_name);
	closedir(directory);
	for (size_t i = count; i-- > 1;) {
		if (spaces[i].seen)
			continue;
		if (polls[i].fd >= 0)
			close(polls[i].fd);
		forget_paths(&spaces[i]);
		count--;
		spaces[i] = spaces[count];
		polls[i] = polls[count];
	}
	cost = now_ms() - now;
	due = now + cost + (cost * SPACES_SHARE > SPACES_MS ? cost * SPACES_SHARE : SPACES_MS);
}

void mounts_rest(void)
{
	for (size_t i = 1; i < count; i++) {
		if (polls[i].fd >= 0)
			close(polls[i].fd);
		polls[i].fd = -1;
	}
}

static void refresh(void)
{
	char path[64], link[32];

	find_spaces();
	for (size_t i = 0; i < count; i++) {
		if (polls[i].fd >= 0)
			continue;
		snprintf(path, sizeof(path), "/proc/%s/mountinfo", spaces[i].pid);
		polls[i].fd = open(path, O_RDONLY | O_CLOEXEC);
		if (polls[i].fd < 0)
			continue;
		if (space_of(spaces[i].pid, link, sizeof(link)) && !strcmp(link, spaces[i].link)) {
			read_mounts(i);
			continue;
		}
		/* The number is another process's by now. */
		close(polls[i].fd);
		polls[i].fd = -1;
	}
	if (poll(polls, count, 0) <= 0)
		return;
	for (size_t i = 0; i < count; i++)
		if (polls[i].fd >= 0 && polls[i].revents)
			read_mounts(i);
}

/* The path of what is open from the root of the share; false when it has none. */
static bool path_of(int fd, char *path)
{
	char link[64], top[PATH_MAX], full[PATH_MAX];
	const char *below;
	ssize_t n;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", root);
	n = readlink(link, top, sizeof(top) - 1);
	if (n <= 0)
		return false;
	top[n] = 0;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, full, sizeof(full) - 1);
	if (n <= 0)
		return false;
	full[n] = 0;
	below = rest(full, top);
	if (!below)
		return false;
	strcpy(path, strcmp(below, "/") ? below : "");
	return true;
}

bool is_mount_point(int fd, const char *name, size_t length, bool or_above)
{
	char path[PATH_MAX + 257];
	size_t end;
	bool any = false;

	refresh();
	for (size_t i = 0; i < count; i++)
		any |= spaces[i].count;
	if (!any || !path_of(fd, path))
		return false;
	end = strlen(path);
	if (name) {
		path[end++] = '/';
		memcpy(path + end, name, length);
		path[end += length] = 0;
	}
	for (struct space *s = spaces; s < spaces + count; s++)
		for (size_t i = 0; i < s->count; i++)
			if (!strncmp(s->paths[i], path, end) && (!s->paths[i][end] || (or_above && s->paths[i][end] == '/')))
				return true;
	return false;
}
