// SPDX-License-Identifier: Apache-2.0
/*
 * Programs that watch files, for guests and, to compare, for the host; static. Output is a line per event, NAME is the
 * watched path's name from the command line. Bytes of names below 0x20 and backslashes are written as \xHH.
 *
 *   inotify NAME=PATH...            NAME MASK [#COOKIE] [name]      cookies are numbered in the order of their first appearance
 *   fanotify fid|name|target NAME=PATH...   NAME MASK [name] [child NAME|other], or NAME RENAME name > NAME name [child ...]
 *   fanotify exec|pid NAME=PATH...          as fid, with OPEN_EXEC; with the process at the end of the line
 *   fanotify mount|filesystem NAME=PATH...  marks on what is mounted there: - MASK PATH
 *       both take commands on stdin and answer "= RESULT" (0 or an errno):  stat PATH;  add NAME PATH;  del NAME
 *   churn PATH...                   adds and removes watches of all paths until its input ends
 *   race COUNT DIR                  see race()
 *   storm FILES DIR                 see storm()
 *   follow DIR                      see follow()
 *   mmap PATH                       writes through a mapping
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 16] __attribute__((aligned(8)));

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static const char *mask_text(uint32_t mask)
{
	static const struct {
		uint32_t bit;
		const char *name;
	} names[] = {
		{ IN_CREATE, "CREATE" },	   { IN_OPEN, "OPEN" },
		{ FAN_OPEN_EXEC, "OPEN_EXEC" },	   { IN_ACCESS, "ACCESS" },
		{ IN_MODIFY, "MODIFY" },	   { IN_ATTRIB, "ATTRIB" },
		{ IN_CLOSE_WRITE, "CLOSE_WRITE" }, { IN_CLOSE_NOWRITE, "CLOSE_NOWRITE" },
		{ IN_MOVED_FROM, "MOVED_FROM" },   { IN_MOVED_TO, "MOVED_TO" },
		{ FAN_RENAME, "RENAME" },	   { IN_MOVE_SELF, "MOVE_SELF" },
		{ IN_DELETE_SELF, "DELETE_SELF" }, { IN_DELETE, "DELETE" },
		{ IN_UNMOUNT, "UNMOUNT" },	   { IN_Q_OVERFLOW, "Q_OVERFLOW" },
		{ IN_IGNORED, "IGNORED" },	   { IN_ISDIR, "ISDIR" },
	};
	static char text[256];

	text[0] = 0;
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		if (!(mask & names[i].bit))
			continue;
		if (text[0])
			strcat(text, ",");
		strcat(text, names[i].name);
	}
	return text;
}

static void print_name(const char *name)
{
	for (; *name; name++) {
		if ((unsigned char)*name < 0x20 || *name == '\\')
			printf("\\x%02x", (unsigned char)*name);
		else
			putchar(*name);
	}
}

/* ------------------------------------------------------------- what is watched */

struct handle {
	struct file_handle head;
	unsigned char bytes[128];
};

static struct {
	char *name;
	char *path;
	int wd;
	struct handle handle;
} watched[64];
static int nwatched;

static int is_fanotify;
static int notify_fd;
static uint64_t fan_mask;
static unsigned int fan_where;
static int fan_pid;

static int add(const char *name, const char *path)
{
	int i = nwatched, mount;

	if (i == 64)
		return ENOSPC;
	watched[i].name = strdup(name);
	watched[i].path = strdup(path);
	if (is_fanotify) {
		struct stat st;
		uint64_t mask = fan_mask;

		watched[i].handle.head.handle_bytes = sizeof(watched[i].handle.bytes);
		if (name_to_handle_at(AT_FDCWD, path, &watched[i].handle.head, &mount, 0x200 /* AT_HANDLE_FID */) &&
		    name_to_handle_at(AT_FDCWD, path, &watched[i].handle.head, &mount, 0))
			return errno;
		if (stat(path, &st))
			return errno;
		/* Refused for what is no directory */
		if (!S_ISDIR(st.st_mode))
			mask &= ~(FAN_CREATE | FAN_DELETE | FAN_MOVED_FROM | FAN_MOVED_TO | FAN_RENAME | FAN_ONDIR | FAN_EVENT_ON_CHILD);
		if (fanotify_mark(notify_fd, FAN_MARK_ADD | fan_where, mask, AT_FDCWD, path))
			return errno;
	} else {
		watched[i].wd = inotify_add_watch(notify_fd, path, IN_ALL_EVENTS);
		if (watched[i].wd < 0)
			return errno;
	}
	nwatched++;
	return 0;
}

static int del(const char *name)
{
	for (int i = 0; i < nwatched; i++) {
		if (strcmp(watched[i].name, name))
			continue;
		if (is_fanotify ? fanotify_mark(notify_fd, FAN_MARK_REMOVE, fan_mask, AT_FDCWD, watched[i].path) :
				  inotify_rm_watch(notify_fd, watched[i].wd))
			return errno;
		return 0;
	}
	return ENOENT;
}

static const char *name_of_wd(int wd)
{
	for (int i = nwatched - 1; i >= 0; i--)
		if (watched[i].wd == wd)
			return watched[i].name;
	return "-";
}

static const char *name_of_handle(const struct file_handle *handle)
{
	for (int i = nwatched - 1; i >= 0; i--) {
		const struct file_handle *own = &watched[i].handle.head;

		if (own->handle_bytes == handle->handle_bytes && own->handle_type == handle->handle_type &&
		    !memcmp(own->f_handle, handle->f_handle, own->handle_bytes))
			return watched[i].name;
	}
	return "other";
}

static void inotify_events(ssize_t size)
{
	static uint32_t cookies[4096];
	static int ncookies;

	for (char *at = buffer; at < buffer + size;) {
		struct inotify_event *event = (void *)at;

		printf("%s %s", name_of_wd(event->wd), mask_text(event->mask));
		if (event->cookie) {
			int i = 0;

			while (i < ncookies && cookies[i] != event->cookie)
				i++;
			if (i == ncookies && ncookies < 4096)
				cookies[ncookies++] = event->cookie;
			printf(" #%d", i + 1);
		}
		if (event->len) {
			putchar(' ');
			print_name(event->name);
		}
		putchar('\n');
		at += sizeof(*event) + event->len;
	}
}

static void fanotify_events(ssize_t size)
{
	for (struct fanotify_event_metadata *event = (void *)buffer; FAN_EVENT_OK(event, size); event = FAN_EVENT_NEXT(event, size)) {
		const char *names[3] = { NULL, NULL, NULL }, *in[3] = { NULL, NULL, NULL }, *child = NULL;

		for (char *at = (char *)event + event->metadata_len; at < (char *)event + event->event_len;) {
			struct fanotify_event_info_fid *info = (void *)at;
			struct file_handle *handle = (void *)info->handle;
			int k = 0;

			switch (info->hdr.info_type) {
			case FAN_EVENT_INFO_TYPE_FID:
				child = name_of_handle(handle);
				break;
			case 12: /* NEW_DFID_NAME */
				k++; /* fall through */
			case 10: /* OLD_DFID_NAME */
				k++; /* fall through */
			case FAN_EVENT_INFO_TYPE_DFID_NAME:
				names[k] = (char *)handle->f_handle + handle->handle_bytes; /* fall through */
			case FAN_EVENT_INFO_TYPE_DFID:
				in[k] = name_of_handle(handle);
				break;
			}
			at += info->hdr.len;
		}
		if (in[1] || in[2]) {
			printf("%s %s ", in[1] ? in[1] : "-", mask_text(event->mask));
			print_name(names[1] ? names[1] : "-");
			printf(" > %s ", in[2] ? in[2] : "-");
			print_name(names[2] ? names[2] : "-");
		} else if (in[0]) {
			printf("%s %s", in[0], mask_text(event->mask));
			if (names[0]) {
				putchar(' ');
				print_name(names[0]);
			}
		} else {
			/* Only an overflow names nothing, and what comes with a descriptor */
			printf("%s %s", child ? child : "-", mask_text(event->mask));
			child = NULL;
			if (event->fd >= 0) {
				char link[64], path[512];
				ssize_t length;

				snprintf(link, sizeof(link), "/proc/self/fd/%d", event->fd);
				length = readlink(link, path, sizeof(path) - 1);
				printf(" %.*s", length < 0 ? 0 : (int)length, path);
			}
		}
		if (child)
			printf(" child %s", child);
		if (fan_pid)
			printf(" by %d", event->pid);
		putchar('\n');
		if (event->fd >= 0)
			close(event->fd);
	}
}

static void command(char *line)
{
	char *verb = strtok(line, " "), *first = strtok(NULL, " "), *second = strtok(NULL, "");
	struct stat st;
	int result = EINVAL;

	if (!verb || !first)
		;
	else if (!strcmp(verb, "stat")) {
		if (second)
			first[strlen(first)] = ' '; /* a name with spaces */
		result = lstat(first, &st) ? errno : 0;
	} else if (!strcmp(verb, "add") && second)
		result = add(first, second);
	else if (!strcmp(verb, "del"))
		result = del(first);
	printf("= %d\n", result);
}

static int watch(int argc, char **argv)
{
	static char input[8192];
	size_t have = 0;
	struct pollfd fds[2];

	for (int i = 0; i < argc; i++) {
		char *path = strchr(argv[i], '=');
		int error;

		if (!path)
			return 2;
		*path++ = 0;
		error = add(argv[i], path);
		if (error) {
			printf("cannot watch %s: %s\n", path, strerror(error));
			return 1;
		}
	}
	printf("= watching\n");
	fflush(stdout);
	fds[0] = (struct pollfd){ notify_fd, POLLIN, 0 };
	fds[1] = (struct pollfd){ 0, POLLIN, 0 };
	for (;;) {
		if (poll(fds, 2, -1) < 0)
			die("poll");
		if (fds[0].revents) {
			ssize_t size = read(notify_fd, buffer, sizeof(buffer));

			if (size < 0)
				die("read");
			if (is_fanotify)
				fanotify_events(size);
			else
				inotify_events(size);
		}
		if (fds[1].revents) {
			ssize_t size = read(0, input + have, sizeof(input) - 1 - have);
			char *end;

			if (size <= 0)
				return 0;
			have += size;
			input[have] = 0;
			while ((end = strchr(input, '\n'))) {
				*end++ = 0;
				command(input);
				have -= end - input;
				memmove(input, end, have + 1);
			}
		}
		fflush(stdout);
	}
}

static int watch_inotify(int argc, char **argv)
{
	notify_fd = inotify_init1(IN_CLOEXEC);
	if (notify_fd < 0)
		die("inotify_init1");
	return watch(argc, argv);
}

static int watch_fanotify(int argc, char **argv)
{
	unsigned int report;

	if (argc < 1)
		return 2;
	is_fanotify = 1;
	fan_mask = FAN_ACCESS | FAN_MODIFY | FAN_ATTRIB | FAN_CLOSE_WRITE | FAN_CLOSE_NOWRITE | FAN_OPEN | FAN_CREATE | FAN_DELETE |
		   FAN_MOVED_FROM | FAN_MOVED_TO | FAN_MOVE_SELF | FAN_ONDIR | FAN_EVENT_ON_CHILD;
	if (!strcmp(argv[0], "fid")) {
		report = FAN_REPORT_FID;
	} else if (!strcmp(argv[0], "exec")) {
		report = FAN_REPORT_FID;
		fan_mask |= FAN_OPEN_EXEC;
	} else if (!strcmp(argv[0], "pid")) {
		report = FAN_REPORT_FID;
		fan_pid = 1;
	} else if (!strcmp(argv[0], "mount") || !strcmp(argv[0], "filesystem")) {
		report = 0;
		fan_where = argv[0][0] == 'm' ? FAN_MARK_MOUNT : FAN_MARK_FILESYSTEM;
		fan_mask = FAN_ACCESS | FAN_MODIFY | FAN_CLOSE_WRITE | FAN_CLOSE_NOWRITE | FAN_OPEN;
	} else if (!strcmp(argv[0], "name")) {
		report = FAN_REPORT_DFID_NAME;
	} else {
		report = FAN_REPORT_DFID_NAME | FAN_REPORT_FID | 0x1000 /* FAN_REPORT_TARGET_FID */;
		fan_mask |= 0x10000000; /* FAN_RENAME */
	}
	notify_fd = fanotify_init(FAN_CLASS_NOTIF | FAN_CLOEXEC | report, O_RDONLY);
	if (notify_fd < 0)
		die("fanotify_init");
	return watch(argc - 1, argv + 1);
}

/* ------------------------------------------------------------- churn */

static int churn(int argc, char **argv)
{
	struct pollfd input = { 0, POLLIN, 0 };
	long rounds = 0;

	printf("= churning\n");
	fflush(stdout);
	do {
		int fd = inotify_init1(IN_NONBLOCK), wds[argc];

		for (int i = 0; i < argc; i++) {
			wds[i] = inotify_add_watch(fd, argv[i], IN_ALL_EVENTS);
			if (wds[i] < 0)
				die(argv[i]);
		}
		while (read(fd, buffer, sizeof(buffer)) > 0)
			;
		/* Some by hand, the others with the group */
		for (int i = rounds % 2; i < argc; i += 2)
			inotify_rm_watch(fd, wds[i]);
		close(fd);
		rounds++;
	} while (poll(&input, 1, 0) == 0);
	printf("= %ld rounds\n", rounds);
	return 0;
}

/* ------------------------------------------------------------- race */

/*
 * COUNT times: watches one of the directories 0 to 99 below DIR, says so by a line with the turn's number, and expects the creation
 * of a file of that name, which is made on the host as soon as it reads the line; then ends the watch.
 */
static int race(int argc, char **argv)
{
	int count = atoi(argv[0]), seen = 0, missed = 0, extra = 0;
	int fd = inotify_init1(IN_NONBLOCK);

	if (argc != 2 || fd < 0)
		return 2;
	for (int i = 0; i < count; i++) {
		char path[256], name[16];
		struct pollfd wait = { fd, POLLIN, 0 };
		int wd, got = 0;
		ssize_t size;

		snprintf(path, sizeof(path), "%s/%d", argv[1], i % 100);
		snprintf(name, sizeof(name), "f%d", i);
		wd = inotify_add_watch(fd, path, IN_CREATE);
		if (wd < 0)
			die(path);
		printf("%d\n", i);
		fflush(stdout);
		while (!got && poll(&wait, 1, 10000) > 0) {
			size = read(fd, buffer, sizeof(buffer));
			for (char *at = buffer; at < buffer + size;) {
				struct inotify_event *event = (void *)at;

				if (event->mask & IN_CREATE) {
					if (event->wd == wd && !strcmp(event->name, name))
						got++;
					else
						extra++;
				}
				at += sizeof(*event) + event->len;
			}
		}
		seen += got > 0;
		extra += got > 1 ? got - 1 : 0;
		missed += got == 0;
		inotify_rm_watch(fd, wd);
	}
	printf("= seen %d missed %d extra %d\n", seen, missed, extra);
	return 0;
}

/* ------------------------------------------------------------- storm */

static int add_directory(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st, (void)ftw;
	if (type == FTW_D || type == FTW_DP) {
		if (inotify_add_watch(notify_fd, path, IN_CREATE | IN_DELETE | IN_MOVE) < 0)
			die(path);
		nwatched++;
	}
	return 0;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

/* Requests go on: how long does it take to open, read and close a file? */
static void probe(const char *dir, int out)
{
	static double times[1 << 16];
	char path[256], byte;
	int n = 0;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	snprintf(path, sizeof(path), "%s/probe", dir);
	signal(SIGTERM, SIG_IGN);
	for (;;) {
		struct pollfd wait = { out, POLLIN, 0 };
		double start = now();
		int fd = open(path, O_RDONLY);

		if (fd < 0 || read(fd, &byte, 1) != 1)
			die(path);
		close(fd);
		if (n < 1 << 16)
			times[n++] = now() - start;
		if (poll(&wait, 1, 2) > 0)
			break;
	}
	qsort(times, n, sizeof(times[0]), by_value);
	printf("= requests %d median %.2f p99 %.2f max %.2f ms\n", n, times[n / 2], times[n * 99 / 100], times[n - 1]);
	fflush(stdout);
	_exit(0);
}

/* Watches all directories below DIR and counts the creations of f0 to f(FILES - 1), until END... is created in DIR. */
static int storm(int argc, char **argv)
{
	int files, stop[2], distinct = 0, twice = 0, overflows = 0, end = 0, events = 0;
	unsigned char *seen;
	double start = 0, last = 0;

	if (argc != 2)
		return 2;
	files = atoi(argv[0]);
	seen = calloc(files, 1);
	notify_fd = inotify_init1(IN_CLOEXEC);
	if (notify_fd < 0 || !seen)
		die("inotify_init1");
	start = now();
	if (nftw(argv[1], add_directory, 64, FTW_PHYS))
		die(argv[1]);
	printf("= watching %d after %.0f ms\n", nwatched, now() - start);
	fflush(stdout);
	start = 0;
	if (pipe(stop))
		die("pipe");
	if (fork() == 0) {
		close(stop[1]);
		probe(argv[1], stop[0]);
	}
	while (!end) {
		ssize_t size = read(notify_fd, buffer, sizeof(buffer));

		if (size <= 0)
			die("read");
		last = now();
		if (!start)
			start = last;
		for (char *at = buffer; at < buffer + size;) {
			struct inotify_event *event = (void *)at;
			int i;

			if (event->mask & IN_Q_OVERFLOW) {
				overflows++;
			} else if (event->mask & IN_CREATE) {
				if (event->len && !strncmp(event->name, "END", 3))
					end = 1;
				else if (event->len && sscanf(event->name, "f%d", &i) == 1 && i < files) {
					events++;
					if (seen[i])
						twice++;
					else
						distinct++;
					seen[i] = 1;
				}
			}
			at += sizeof(*event) + event->len;
		}
	}
	printf("= delivered %d twice %d overflows %d in %.0f ms\n", distinct, twice, overflows, last - start);
	fflush(stdout);
	close(stop[1]);
	wait(NULL);
	return 0;
}

/* ------------------------------------------------------------- follow */

static uint32_t hash_file(const char *path, off_t *size)
{
	uint32_t hash = 0x811c9dc5;
	int fd = open(path, O_RDONLY);
	ssize_t n;

	*size = 0;
	if (fd < 0)
		return 0;
	while ((n = read(fd, buffer, sizeof(buffer))) > 0) {
		for (ssize_t i = 0; i < n; i++)
			hash = (hash ^ (unsigned char)buffer[i]) * 0x01000193;
		*size += n;
	}
	close(fd);
	return hash;
}

static int listed(const char *dir, const char *name)
{
	DIR *open = opendir(dir);
	struct dirent *entry;
	int found = 0;

	if (!open)
		return -errno;
	while ((entry = readdir(open)))
		found += !strcmp(entry->d_name, name);
	closedir(open);
	return found;
}

/* Looks at everything all the time, so that answers are under way while changes are told. */
static void look(const char *dir, int dirs)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (unsigned int i = 0;; i++) {
		char path[512];
		struct dirent *entry;
		DIR *open;

		snprintf(path, sizeof(path), "%s/%d", dir, i % dirs);
		open = opendir(path);
		if (!open)
			continue;
		while ((entry = readdir(open))) {
			struct stat st;
			off_t size;

			fstatat(dirfd(open), entry->d_name, &st, AT_SYMLINK_NOFOLLOW);
			if (entry->d_type == DT_DIR)
				continue;
			snprintf(path, sizeof(path), "%s/%d/%s", dir, i % dirs, entry->d_name);
			hash_file(path, &size);
		}
		closedir(open);
		usleep(4000);
	}
}

/*
 * Watches the directories 0, 1... below DIR, and at each event looks at once at what it names:
 *   N MASK name errno size mtime mode nlink bytes hash listed
 * where N is the directory, errno that of lstat(2), mtime in nanoseconds, bytes and hash of what can be read (FNV-1a, 32 bits), and listed how
 * often the directory's list has the name.
 */
static int follow(int argc, char **argv)
{
	int dirs = 0, wds[64];
	char path[512];

	if (argc != 1)
		return 2;
	notify_fd = inotify_init1(IN_CLOEXEC);
	for (; dirs < 64; dirs++) {
		snprintf(path, sizeof(path), "%s/%d", argv[0], dirs);
		wds[dirs] = inotify_add_watch(notify_fd, path, IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | IN_CREATE | IN_DELETE | IN_MOVE);
		if (wds[dirs] < 0)
			break;
	}
	if (fork() == 0)
		look(argv[0], dirs);
	printf("= watching %d\n", dirs);
	fflush(stdout);
	for (;;) {
		static char events[1 << 16] __attribute__((aligned(8)));
		ssize_t size = read(notify_fd, events, sizeof(events));

		if (size <= 0)
			die("read");
		for (char *at = events; at < events + size;) {
			struct inotify_event *event = (void *)at;
			struct stat st = { 0 };
			int dir = 0, error = 0;
			uint32_t hash;
			off_t bytes;

			at += sizeof(*event) + event->len;
			if (event->mask & IN_Q_OVERFLOW)
				printf("0 Q_OVERFLOW\n");
			if (!event->len)
				continue;
			while (dir < dirs && wds[dir] != event->wd)
				dir++;
			snprintf(path, sizeof(path), "%s/%d/%s", argv[0], dir, event->name);
			if (lstat(path, &st)) {
				memset(&st, 0, sizeof(st));
				error = errno;
			}
			hash = hash_file(path, &bytes);
			snprintf(path, sizeof(path), "%s/%d", argv[0], dir);
			printf("%d %s %s %d %lld %lld%09ld %o %d %lld %08x %d\n", dir, mask_text(event->mask), event->name, error,
			       (long long)st.st_size, (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec, st.st_mode & 07777,
			       (int)st.st_nlink, (long long)bytes, hash, listed(path, event->name));
		}
		fflush(stdout);
	}
}

static int write_mapped(int argc, char **argv)
{
	int fd;
	char *map;

	if (argc != 1)
		return 2;
	fd = open(argv[0], O_RDWR);
	if (fd < 0)
		die(argv[0]);
	map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		die("mmap");
	map[0]++;
	msync(map, 4096, MS_SYNC);
	munmap(map, 4096);
	close(fd);
	return 0;
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*run)(int argc, char **argv);
	} programs[] = {
		{ "inotify", watch_inotify }, { "fanotify", watch_fanotify }, { "churn", churn }, { "race", race },
		{ "storm", storm },	      { "follow", follow },	      { "mmap", write_mapped },
	};

	for (size_t i = 0; argc > 1 && i < sizeof(programs) / sizeof(programs[0]); i++) {
		if (!strcmp(argv[1], programs[i].name)) {
			int status = programs[i].run(argc - 2, argv + 2);

			if (status == 2)
				break;
			return status;
		}
	}
	fprintf(stderr, "usage: see the source\n");
	return 2;
}
