/* SPDX-License-Identifier: GPL-2.0-only */
/* What the tests that run as init of a guest share */
#ifndef GUEST_H
#define GUEST_H

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

/* The protocol; see fs/fuse/fsnotify.h */
#define HAS_FSNOTIFY2		(1U << 28)	/* in flags2 */
#define INIT_EXT		(1U << 30)
#define OP_FSNOTIFY		2048
#define NOTIFY_FSNOTIFY		128
#define EV_OVERFLOW		1U
#define EV_PAIRED		2U
#define EV_ON_CHILD		0x08000000U

#define EVERYTHING (IN_ACCESS | IN_MODIFY | IN_ATTRIB | IN_CLOSE | IN_OPEN | \
		    IN_MOVE | IN_CREATE | IN_DELETE | IN_DELETE_SELF | \
		    IN_MOVE_SELF | 0x1000 /* FS_OPEN_EXEC */)
#define DIR_EVERYTHING (EVERYTHING | IN_ISDIR | EV_ON_CHILD)

#ifndef FAN_REPORT_DIR_FID
#define FAN_REPORT_DIR_FID	0x400
#define FAN_REPORT_NAME		0x800
#endif
#define REPORT_DFID_NAME	(FAN_REPORT_DIR_FID | FAN_REPORT_NAME)
#define REPORT_TARGET_FID	0x1000
#ifndef FAN_RENAME
#define FAN_RENAME		0x10000000
#endif
#define INFO_FID		1
#define INFO_DFID_NAME		2
#define INFO_DFID		3
#define INFO_OLD_DFID_NAME	10
#define INFO_NEW_DFID_NAME	12

struct watch_in {
	uint64_t mask;
	uint32_t generation, flags;
};

struct watch_out {
	uint64_t mask, supported;
};

struct event {
	uint32_t reclen, flags;
	uint64_t nodeid, child, mask;
	uint32_t generation, child_generation, cookie, namelen;
	char name[];
};

static int passed, failed;

static void check(bool ok, const char *fmt, ...)
{
	va_list ap;

	if (ok) {
		passed++;
		return;
	}
	failed++;
	va_start(ap, fmt);
	printf("FAILED: ");
	vprintf(fmt, ap);
	printf("\n");
	va_end(ap);
}

static void msleep(int ms)
{
	struct timespec ts = { ms / 1000, (ms % 1000) * 1000000L };

	nanosleep(&ts, NULL);
}

static long now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static const struct { uint32_t bit; const char *name; } bits[] = {
	{ IN_ACCESS, "ACCESS" }, { IN_MODIFY, "MODIFY" }, { IN_ATTRIB, "ATTRIB" },
	{ IN_CLOSE_WRITE, "CLOSE_WRITE" }, { IN_CLOSE_NOWRITE, "CLOSE_NOWRITE" },
	{ IN_OPEN, "OPEN" }, { IN_MOVED_FROM, "MOVED_FROM" }, { IN_MOVED_TO, "MOVED_TO" },
	{ IN_CREATE, "CREATE" }, { IN_DELETE, "DELETE" }, { IN_DELETE_SELF, "DELETE_SELF" },
	{ IN_MOVE_SELF, "MOVE_SELF" }, { IN_UNMOUNT, "UNMOUNT" },
	{ IN_Q_OVERFLOW, "Q_OVERFLOW" }, { IN_IGNORED, "IGNORED" },
	{ FAN_RENAME, "RENAME" }, { IN_ISDIR, "ISDIR" },
};

static void mask_name(uint32_t mask, char *out)
{
	*out = 0;
	for (size_t i = 0; i < sizeof(bits) / sizeof(bits[0]); i++) {
		if (mask & bits[i].bit) {
			if (*out)
				strcat(out, "|");
			strcat(out, bits[i].name);
		}
	}
}

/*
 * All that an inotify group has, as text: "wd:MASK:name:cookie" in order, with
 * cookies as letters in the order of appearance. Works for fanotify groups as
 * well: "MASK:info(name)...".
 */
static char text[1 << 16];

static __attribute__((unused)) const char *read_inotify(int fd)
{
	static char buf[1 << 16] __attribute__((aligned(8)));
	uint32_t cookies[26];
	int ncookies = 0;
	ssize_t n;

	*text = 0;
	while ((n = read(fd, buf, sizeof(buf))) > 0) {
		for (char *p = buf; p < buf + n;) {
			struct inotify_event *e = (void *)p;
			char mask[256], *t = text + strlen(text);
			int c = -1;

			if (e->cookie) {
				for (c = 0; c < ncookies && cookies[c] != e->cookie; c++)
					;
				if (c == ncookies && ncookies < 26)
					cookies[ncookies++] = e->cookie;
			}
			mask_name(e->mask, mask);
			if (t - text < (long)sizeof(text) - 1024)
				sprintf(t, "%s%d:%s:%s%s%c", *text ? " " : "", e->wd, mask,
					e->len ? e->name : "", c < 0 ? "" : ":", c < 0 ? 0 : 'a' + c);
			p += sizeof(*e) + e->len;
		}
	}
	return text;
}

static void expect(const char *what, const char *got, const char *want)
{
	check(!strcmp(got, want), "%s:\n  got  '%s'\n  want '%s'", what, got, want);
}

static __attribute__((unused)) int inotify(void)
{
	return inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
}

static void check_dmesg(void)
{
	static const char *const bad[] = { "WARNING:", "BUG:", "Call Trace", "Oops", "KASAN",
		"possible circular locking", "possible recursive locking", "inconsistent lock state",
		"suspicious RCU", "INFO: task", "lockdep", "Busy inodes", "bad unlock",
		"INFO: trying to register", "still held", "refcount_t", "general protection",
		"list_add corruption", "list_del corruption", "ODEBUG" };
	static char log[1 << 20], *lines[1 << 14];
	int n = klogctl(3, log, sizeof(log) - 1), hits = 0, count = 0;

	log[n > 0 ? n : 0] = 0;
	for (char *line = strtok(log, "\n"); line && count < (1 << 14); line = strtok(NULL, "\n"))
		lines[count++] = line;
	for (int k = 0; k < count; k++) {
		/* User Mode Linux 6.1 walks its maple tree without a lock at each first fork */
		if (strstr(lines[k], "suspicious RCU usage") && k + 3 < count &&
		    strstr(lines[k + 3], "lib/maple_tree.c")) {
			while (k < count && !strstr(lines[k], "force_flush_all"))
				k++;
			continue;
		}
		for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
			/* lockdep says at boot what it is */
			if (strstr(lines[k], bad[i]) && !strstr(lines[k], "Lock dependency validator") &&
			    !strstr(lines[k], "MAX_LOCKDEP") && !strstr(lines[k], "memory used by lock") &&
			    !strstr(lines[k], "KernelAddressSanitizer initialized")) {
				if (hits++ < 40)
					printf("DMESG: %s\n", lines[k]);
				break;
			}
		}
	}
	check(hits == 0, "%d lines of complaint in the kernel log", hits);
}

static void guest_begin(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (getpid() == 1) {
		mkdir("/proc", 0755);
		mkdir("/sys", 0755);
		mkdir("/dev", 0755);
		mkdir("/tmp", 01777);
		mount("proc", "/proc", "proc", 0, NULL);
		mount("sys", "/sys", "sysfs", 0, NULL);
		mount("dev", "/dev", "devtmpfs", 0, NULL);
		mount("tmp", "/tmp", "tmpfs", 0, NULL);
	}
}

static void section(const char *name, void (*fn)(void))
{
	int p = passed, f = failed;
	long begin = now_ms();

	fn();
	printf("%-16s %4d passed, %d failed, %ld ms\n", name, passed - p, failed - f,
	       now_ms() - begin);
}

/* A server on /dev/fuse: handles requests until the connection ends */
__attribute__((unused))
static void serve_fuse(const int *fd, void (*handle)(struct fuse_in_header *h, void *arg))
{
	static char buf[1 << 17];

	for (;;) {
		ssize_t n = read(*fd, buf, sizeof(buf));

		if (n < 0 && (errno == EINTR || errno == ENOENT || errno == EAGAIN))
			continue;
		if (n < (ssize_t)sizeof(struct fuse_in_header))
			return;
		handle((void *)buf, buf + sizeof(struct fuse_in_header));
	}
}

/* The last line is the result; as init, power off */
static int guest_end(void)
{
	check_dmesg();

	printf("%d passed, %d failed\n", passed, failed);
	fflush(stdout);
	if (getpid() == 1) {
		sync();
		reboot(RB_POWER_OFF);
	}
	return failed != 0;
}

#endif /* GUEST_H */
