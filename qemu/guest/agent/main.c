// SPDX-License-Identifier: Apache-2.0
/*
 * The replay agent: file events of the host in a guest whose kernel is a stock one.
 *
 *   virtiofsd-ts-agent [-v] [-t TOKEN-FILE] MOUNT-POINT
 *
 * It connects to the daemon through a control file in the share, tells it what is watched in the guest, and repeats each
 * change of the host as a system call on the mount, which the daemon answers without doing anything. One thread, no other
 * way to the host than the mount itself. README.md says what works and what does not.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#ifndef SECBIT_NO_SETUID_FIXUP
#define SECBIT_NO_SETUID_FIXUP 4
#endif

#define TOKEN_FILE "/etc/virtiofsd-ts-agent.token"
#define FUSE_SUPER_MAGIC 0x65735546
/* exportfs.h: nodeid and generation */
#define FILEID_INO64_GEN 0x81

int control = -1, staging = -1, root = -1;
static int root_mount;
dev_t device;
bool verbose;

static volatile sig_atomic_t stop;

void say(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("virtiofsd-ts-agent: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
}

static void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("virtiofsd-ts-agent: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	exit(1);
}

double now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

union handle {
	struct file_handle head;
	struct {
		unsigned int bytes;
		int type;
		uint32_t words[32];
	} fuse;
};

int open_node(uint64_t nodeid, uint32_t generation)
{
	union handle handle = { .fuse = { 12, FILEID_INO64_GEN, { nodeid >> 32, (uint32_t)nodeid, generation } } };

	return open_by_handle_at(control, &handle.head, O_PATH | O_CLOEXEC);
}

bool is_directory(int fd)
{
	struct statx stx;

	return statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &stx) == 0 && S_ISDIR(stx.stx_mode);
}

uint64_t node_of(int fd)
{
	union handle handle = { .fuse = { .bytes = sizeof(handle.fuse.words) } };
	struct stat st;
	int mount;

	if (fstat(fd, &st) || st.st_dev != device)
		return 0;
	if (name_to_handle_at(fd, "", &handle.head, &mount, AT_EMPTY_PATH) || handle.fuse.bytes < 12 || mount != root_mount)
		return 0;
	return (uint64_t)handle.fuse.words[0] << 32 | handle.fuse.words[1];
}

static void disconnect(void)
{
	forget_watches();
	forget_replays();
	if (staging >= 0)
		close(staging);
	if (control >= 0)
		close(control);
	if (root >= 0)
		close(root);
	staging = control = root = -1;
	setfsuid(0);
}

static size_t read_token(const char *file, char *token)
{
	int fd = open(file, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, token, TOKEN_MAX + 1);

	if (n < 0)
		die("cannot read %s (%s): put the token there that the daemon has for --agent, or name a file with -t", file, strerror(errno));
	close(fd);
	while (n > 0 && strchr(" \t\r\n", token[n - 1]))
		n--;
	if (n == 0 || n > TOKEN_MAX)
		die("%s has no token of 1 to %d bytes", file, TOKEN_MAX);
	return n;
}

/* 0; or -1: nobody is there (yet). What will not get better by waiting ends the program. */
static int connect_to(const char *mount_point, const char *token, size_t length, bool again)
{
	union auth auth = { .in = { .version = CONTROL_VERSION, .length = length } };
	union handle handle = { .fuse = { .bytes = sizeof(handle.fuse.words) } };
	struct statvfs vfs;
	struct statfs fs;
	struct stat st;

	root = open(mount_point, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root < 0) {
		if (again)
			return -1;
		die("cannot open %s: %s", mount_point, strerror(errno));
	}
	if (fstatfs(root, &fs) || fs.f_type != FUSE_SUPER_MAGIC) {
		if (again)
			return -1;
		die("%s is no virtio-fs mount: name the mount point of the share", mount_point);
	}
	if (fstatvfs(root, &vfs) == 0 && (vfs.f_flag & ST_RDONLY))
		die("%s is mounted read-only: events cannot be replayed there, mount it read-write (the daemon's --readonly is no hindrance)",
		    mount_point);
	if (fstat(root, &st))
		return -1;
	device = st.st_dev;
	name_to_handle_at(root, "", &handle.head, &root_mount, AT_EMPTY_PATH);
	control = openat(root, CONTROL_NAME, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
	if (control < 0) {
		if (again || errno == EBUSY)
			return -1;
		if (errno == ENOENT)
			die("the daemon of %s takes no agent: start it with --agent=TOKEN-FILE; and %s must be the share's root", mount_point,
			    mount_point);
		die("cannot open the control file in %s (%s): the agent must be root", mount_point, strerror(errno));
	}
	memcpy(auth.in.token, token, length);
	if (ioctl(control, CONTROL_AUTH, &auth) < 0) {
		if (errno == EALREADY) {
			say("this guest's kernel is told of file events itself: no agent is needed");
			exit(0);
		}
		if (errno == EACCES)
			die("the daemon of %s has another token", mount_point);
		if (errno == EPROTO)
			die("the daemon of %s speaks another version: use the agent that came with it", mount_point);
		if (errno == EOPNOTSUPP)
			die("this mount does not notice changed files (no AUTO_INVAL_DATA) or has no file handles (no EXPORT_SUPPORT): events cannot be replayed");
		if (again)
			return -1;
		die("cannot connect to the daemon of %s: %s", mount_point, strerror(errno));
	}
	/* From here on each request says who makes it. The capabilities stay. */
	setfsuid(auth.out.uid);
	if ((uint32_t)setfsuid(-1) != auth.out.uid)
		die("cannot take the user id %u: the agent must be root of the guest", auth.out.uid);
	staging = openat(root, STAGING_NAME, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (staging < 0)
		die("cannot open the staging directory of %s: %s", mount_point, strerror(errno));
	return 0;
}

static void serve(void)
{
	static char message[MESSAGE_MAX] __attribute__((aligned(MESSAGE_MAX)));

	while (!stop) {
		int wait = something_held_back() ? 0 : discover();
		if (wait < 0)
			return;
		ssize_t n = pread(control, message, sizeof(message), wait > READ_WAIT_MS ? READ_WAIT_MS : wait);
		if (n < 0)
			return;
		if (n == 0)
			mounts_rest();
		if (n == 0 ? replay_rest() : replay(message, n))
			return;
	}
}

static void on_signal(int signal)
{
	(void)signal;
	stop = 1;
}

int main(int argc, char **argv)
{
	const char *token_file = TOKEN_FILE;
	static char token[TOKEN_MAX + 2];
	struct rlimit files = { 1 << 20, 1 << 20 };
	struct sigaction action = { .sa_handler = on_signal };
	bool again = false;
	int option, tries = 0, wait = 1000;

	while ((option = getopt(argc, argv, "vt:h")) != -1) {
		switch (option) {
		case 'v':
			verbose = true;
			break;
		case 't':
			token_file = optarg;
			break;
		default:
			fputs("usage: virtiofsd-ts-agent [-v] [-t TOKEN-FILE] MOUNT-POINT\n"
			      "Brings file events of the host to this guest. The token is in " TOKEN_FILE " by default.\n",
			      option == 'h' ? stdout : stderr);
			return option == 'h' ? 0 : 2;
		}
	}
	if (optind != argc - 1)
		die("give the mount point of the share, and nothing more");
	if (geteuid())
		die("the agent must be root");
	size_t length = read_token(token_file, token);
	/* A watched directory costs a descriptor. */
	if (setrlimit(RLIMIT_NOFILE, &files)) {
		getrlimit(RLIMIT_NOFILE, &files);
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	if (prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP))
		die("cannot keep capabilities (%s): the agent must be root of the guest", strerror(errno));
	umask(0);
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	while (!stop) {
		if (connect_to(argv[optind], token, length, again) == 0) {
			say("connected: file events of the host come to %s", argv[optind]);
			again = true;
			tries = 0;
			double since = now_ms();
			serve();
			/* Not at once again when it is lost each time. */
			if (now_ms() - since > 1000)
				wait = 50;
			if (!stop)
				say("the connection is lost (%s), trying again: what changes until then is not heard", strerror(errno));
		} else if (!again && errno == EBUSY && ++tries > 5)
			die("another agent serves %s already", argv[optind]);
		disconnect();
		if (!stop)
			usleep(wait * 1000);
		wait = wait < 500 ? 2 * wait : 1000;
	}
	say("%lu changes replayed, %lu could not be", replayed, failed);
	return 0;
}
