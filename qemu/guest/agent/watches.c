// SPDX-License-Identifier: Apache-2.0
/*
 * What is watched in the guest. Nobody tells: /proc/PID/fdinfo of each inotify and fanotify descriptor has a line per mark, with the
 * inode's file handle, which on FUSE is its number and generation.
 *
 * Looking everywhere costs some 35 ms for 270 processes, so that is done seldom, and in between only processes are looked at that just
 * asked the daemon for something: who wants to watch a file has to look it up.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { PROCESSES = 256, REPORT = 1024 };

/* A full look takes at most this part of the time, and comes not more often than each 2 s. */
#define FULL_SHARE 200
#define FULL_MS 2000
/* So many milliseconds after a process was heard of it is looked at, each counted from the one before. */
static const double LOOK_MS[] = { 2, 20, 150, 600 };
#define LOOKS ((int)(sizeof(LOOK_MS) / sizeof(LOOK_MS[0])))

struct watch {
	uint64_t nodeid;
	uint32_t generation;
	uint32_t reported;	/* mask that the daemon has */
	uint32_t found;		/* mask of the look under way */
	int fd;			/* of a directory, else -1 */
	uint64_t parent;	/* of what is known by name; 0: not known */
	char *name;
	struct watch *next;
};

static struct watch **table;
static size_t buckets, count;

static struct process {
	uint32_t pid;
	int looks;
	double due, cost;
} processes[PROCESSES];
static double full_due;

static size_t bucket(uint64_t nodeid)
{
	return (nodeid * 0x9e3779b97f4a7c15ull >> 20) & (buckets - 1);
}

static struct watch *find(uint64_t nodeid)
{
	for (struct watch *w = buckets ? table[bucket(nodeid)] : NULL; w; w = w->next)
		if (w->nodeid == nodeid)
			return w;
	return NULL;
}

static void grow(void)
{
	size_t old = buckets;
	struct watch **from = table;

	buckets = old ? old * 2 : 256;
	table = calloc(buckets, sizeof(*table));
	if (!table)
		abort();
	for (size_t i = 0; i < old; i++) {
		for (struct watch *w = from[i], *next; w; w = next) {
			next = w->next;
			w->next = table[bucket(w->nodeid)];
			table[bucket(w->nodeid)] = w;
		}
	}
	free(from);
}

/* Learns under which name the kernel has an object. */
static void learn_name(struct watch *w, int fd)
{
	char link[64], path[4096], *slash;
	ssize_t n;
	int parent;

	free(w->name);
	w->name = NULL;
	w->parent = 0;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, path, sizeof(path) - 1);
	if (n <= 0)
		return;
	path[n] = 0;
	slash = strrchr(path, '/');
	if (!slash || slash == path)
		return;
	*slash = 0;
	parent = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (parent < 0)
		return;
	w->parent = node_of(parent);
	close(parent);
	if (w->parent)
		w->name = strdup(slash + 1);
}

static struct watch *add(uint64_t nodeid, uint32_t generation)
{
	struct watch *w = calloc(1, sizeof(*w));
	int fd;

	if (!w)
		abort();
	if (count >= buckets)
		grow();
	count++;
	w->nodeid = nodeid;
	w->generation = generation;
	w->fd = -1;
	w->next = table[bucket(nodeid)];
	table[bucket(nodeid)] = w;
	fd = open_node(nodeid, generation);
	if (fd < 0)
		return w;
	learn_name(w, fd);
	/* A directory that is renamed away and forgotten could not be opened later. */
	if (is_directory(fd))
		w->fd = fd;
	else
		close(fd);
	return w;
}

static void drop(struct watch *w)
{
	struct watch **at = &table[bucket(w->nodeid)];

	while (*at != w)
		at = &(*at)->next;
	*at = w->next;
	count--;
	if (w->fd >= 0)
		close(w->fd);
	free(w->name);
	free(w);
}

int directory_fd(uint64_t nodeid, uint32_t generation)
{
	struct watch *w = find(nodeid);

	/*
	 * One that is not known to be watched stays, too, until the next look at everything: opening it by its number makes the kernel
	 * forget its name when it is closed (fuse_get_dentry(), fuse_dentry_delete()), and then it might not be opened again.
	 */
	if (!w)
		w = add(nodeid, generation);
	return w->fd;
}

void release_fd(uint64_t nodeid)
{
	struct watch *w = find(nodeid);

	if (!w || w->fd < 0)
		return;
	close(w->fd);
	w->fd = -1;
}

uint64_t watched_at(uint64_t parent, const char *name, size_t length)
{
	for (size_t i = 0; i < buckets; i++)
		for (struct watch *w = table[i]; w; w = w->next)
			if (w->parent == parent && w->name && strlen(w->name) == length && !memcmp(w->name, name, length))
				return w->nodeid;
	return 0;
}

bool watched_within(uint64_t nodeid, uint32_t bit)
{
	struct watch *w = find(nodeid), *parent = w && w->parent ? find(w->parent) : NULL;

	return parent && (parent->reported & bit) && (bit == FS_DELETE || (parent->reported & FS_EVENT_ON_CHILD));
}

const char *watched_name(uint64_t nodeid, uint64_t *parent)
{
	struct watch *w = find(nodeid);

	if (!w || !w->parent)
		return NULL;
	*parent = w->parent;
	return w->name;
}

void watched_moved(uint64_t nodeid, uint64_t parent, const char *name, size_t length)
{
	struct watch *w = find(nodeid);

	if (!w)
		return;
	free(w->name);
	w->name = strndup(name, length);
	w->parent = parent;
}

void watched_gone(uint64_t nodeid)
{
	struct watch *w = find(nodeid);

	if (!w)
		return;
	free(w->name);
	w->name = NULL;
	w->parent = 0;
}

void forget_watches(void)
{
	for (size_t i = 0; i < buckets; i++)
		while (table[i])
			drop(table[i]);
	memset(processes, 0, sizeof(processes));
	full_due = 0;
}

/* One line of fdinfo: "inotify wd:1 ino:2 sdev:3 mask:4 ... f_handle:HEX", "fanotify ino:1 sdev:2 mflags:0 mask:3 ... f_handle:HEX". */
static void mark_line(const char *line)
{
	const char *at;
	unsigned int words[3] = { 0 }, sdev, mask, type;
	bool is_inotify = !strncmp(line, "inotify ", 8);
	struct watch *w;

	if (!is_inotify && strncmp(line, "fanotify ino:", 13))
		return;
	if (!(at = strstr(line, " sdev:")) || sscanf(at, " sdev:%x", &sdev) != 1 || sdev != ((major(device) << 20) | minor(device)))
		return;
	if (!(at = strstr(line, " mask:")) || sscanf(at, " mask:%x", &mask) != 1)
		return;
	if (!(at = strstr(line, "fhandle-type:")) || sscanf(at, "fhandle-type:%x", &type) != 1 || (type & 0x7f) < 1)
		return;
	if (!(at = strstr(line, "f_handle:")))
		return;
	at += 9;
	for (int i = 0; i < 12; i++) {
		unsigned int byte;
		if (sscanf(at + 2 * i, "%2x", &byte) != 1)
			return;
		words[i / 4] |= byte << (i % 4 * 8);
	}
	uint64_t nodeid = (uint64_t)words[0] << 32 | words[1];
	w = find(nodeid);
	if (w && w->generation != words[2]) {
		drop(w);
		w = NULL;
	}
	if (!w)
		w = add(nodeid, words[2]);
	if (is_inotify && w->fd >= 0)
		mask |= FS_EVENT_ON_CHILD;
	w->found |= mask;
}

static void fdinfo(const char *path)
{
	static char *line;
	static size_t size;
	FILE *file = fopen(path, "re");

	if (!file)
		return;
	while (getline(&line, &size, file) > 0)
		mark_line(line);
	fclose(file);
}

/* Returns whether the process is there. */
static bool look_process(const char *pid)
{
	char path[64], link[32];
	struct dirent *entry;
	DIR *directory;

	snprintf(path, sizeof(path), "/proc/%.20s/fd", pid);
	directory = opendir(path);
	if (!directory)
		return false;
	while ((entry = readdir(directory))) {
		if (!isdigit((unsigned char)entry->d_name[0]))
			continue;
		ssize_t n = readlinkat(dirfd(directory), entry->d_name, link, sizeof(link) - 1);
		if (n < 0)
			continue;
		link[n] = 0;
		if (strcmp(link, "anon_inode:inotify") && strcmp(link, "inotify") && strcmp(link, "anon_inode:[fanotify]"))
			continue;
		snprintf(path, sizeof(path), "/proc/%.20s/fdinfo/%.20s", pid, entry->d_name);
		fdinfo(path);
	}
	closedir(directory);
	return true;
}

/* Tells the daemon what is new, and with `all` what is over. -1: the connection is lost. */
static int report(bool all)
{
	static struct watch_in records[REPORT];
	size_t n = 0;

	for (size_t i = 0; i < buckets; i++) {
		for (struct watch *w = table[i], *next; w; w = next) {
			next = w->next;
			uint32_t mask = all ? w->found : w->reported | w->found;
			w->found = 0;
			if (mask != w->reported) {
				records[n++] = (struct watch_in){ w->nodeid, w->generation, mask };
				w->reported = mask;
			}
			if (!mask && all)
				drop(w);
			if (n == REPORT) {
				if (write(control, records, n * sizeof(records[0])) != (ssize_t)(n * sizeof(records[0])))
					return -1;
				n = 0;
			}
		}
	}
	if (n && write(control, records, n * sizeof(records[0])) != (ssize_t)(n * sizeof(records[0])))
		return -1;
	return 0;
}

void look_at(const uint32_t *pids, size_t n)
{
	double now = now_ms();

	for (size_t i = 0; i < n; i++) {
		struct process *place = NULL;
		for (struct process *p = processes; p < processes + PROCESSES; p++) {
			if (p->pid == pids[i]) {
				place = p;
				break;
			}
			if (!p->pid && !place)
				place = p;
		}
		if (!place)
			continue; /* the next full look finds it */
		if (place->pid != pids[i])
			*place = (struct process){ .pid = pids[i] };
		/* What takes long is not done again at once. */
		double due = now + LOOK_MS[0] + 10 * place->cost;
		if (!place->looks || place->due > due || place->looks > 1)
			place->due = place->looks == 1 && place->due < due ? place->due : due;
		place->looks = 1;
	}
}

int discover(void)
{
	double now = now_ms(), due = full_due;
	bool looked = false;
	char pid[16];

	if (now >= full_due) {
		struct dirent *entry;
		DIR *directory = opendir("/proc");
		if (!directory)
			return READ_WAIT_MS;
		while ((entry = readdir(directory)))
			if (isdigit((unsigned char)entry->d_name[0]))
				look_process(entry->d_name);
		closedir(directory);
		double cost = now_ms() - now;
		if (verbose)
			say("all processes looked at in %.1f ms, %zu objects watched", cost, count);
		full_due = due = now + cost + (cost * FULL_SHARE > FULL_MS ? cost * FULL_SHARE : FULL_MS);
		if (report(true))
			return -1;
	}
	for (struct process *p = processes; p < processes + PROCESSES; p++) {
		if (!p->pid)
			continue;
		if (now >= p->due) {
			double start = now_ms();
			snprintf(pid, sizeof(pid), "%u", p->pid);
			bool there = look_process(pid);
			looked = true;
			p->cost = now_ms() - start;
			if (!there || p->looks == LOOKS) {
				p->pid = 0;
				continue;
			}
			p->due = start + LOOK_MS[p->looks++] + 10 * p->cost;
		}
		if (p->due < due)
			due = p->due;
	}
	if (looked && report(false))
		return -1;
	now = now_ms();
	return due <= now ? 1 : (int)(due - now) + 1;
}
