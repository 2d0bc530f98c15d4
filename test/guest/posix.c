/*
 * What a POSIX file system does, as a transcript: run in a directory, it prints one line per observation ("section.step:
 * result"). The same program runs on the host's own file system and in a guest's mount; the two transcripts must be equal.
 * Nothing printed depends on time, inode numbers or where it runs. Needs root (it becomes other users in child processes).
 *
 *   posix DIRECTORY [SMALL]     SMALL: a directory on a small file system that may be filled (ENOSPC)
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/stat.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static const char *section = "";

static void say(const char *step, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void say(const char *step, const char *format, ...)
{
	va_list args;

	printf("%s.%s: ", section, step);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	putchar('\n');
	fflush(stdout);
}

/* "ok", a count, or the error's name */
static const char *outcome(long result)
{
	static char text[8][64];
	static int next;
	char *to = text[next++ % 8];

	if (result < 0)
		snprintf(to, sizeof(text[0]), "%s", strerrorname_np(errno));
	else if (result == 0)
		strcpy(to, "ok");
	else
		snprintf(to, sizeof(text[0]), "%ld", result);
	return to;
}

#define R(step, call) say(step, "%s", outcome(call))
/* for calls that give a descriptor: the number says nothing */
#define FD(step, call) ({ int fd_ = (call); say(step, "%s", fd_ < 0 ? outcome(-1) : "ok"); fd_; })

static void put(const char *name, const char *text)
{
	int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);

	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		say("put", "%s %s", name, outcome(-1));
	if (fd >= 0)
		close(fd);
}

static void show(const char *step, const char *name)
{
	char text[256];
	int fd = open(name, O_RDONLY);
	ssize_t n;

	if (fd < 0) {
		say(step, "%s", outcome(-1));
		return;
	}
	n = read(fd, text, sizeof(text) - 1);
	text[n < 0 ? 0 : n] = 0;
	say(step, "%zd '%s'", n, text);
	close(fd);
}

static void stat_line(const char *step, const char *name)
{
	struct stat st;

	if (lstat(name, &st) < 0) {
		say(step, "%s", outcome(-1));
		return;
	}
	if (S_ISDIR(st.st_mode))
		say(step, "mode %o nlink %lu uid %u gid %u", st.st_mode, (unsigned long)st.st_nlink, st.st_uid, st.st_gid);
	else
		say(step, "mode %o nlink %lu uid %u gid %u size %lld rdev %llx", st.st_mode, (unsigned long)st.st_nlink, st.st_uid, st.st_gid,
		    (long long)st.st_size, (unsigned long long)st.st_rdev);
}

static int by_name(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

static void list(const char *step, const char *dir)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	char *names[512];
	int n = 0;

	if (!d) {
		say(step, "%s", outcome(-1));
		return;
	}
	while (n < 512 && (e = readdir(d))) {
		char line[300];

		snprintf(line, sizeof(line), "%s/%d", e->d_name, e->d_type);
		names[n++] = strdup(line);
	}
	closedir(d);
	qsort(names, n, sizeof(names[0]), by_name);
	printf("%s.%s:", section, step);
	for (int i = 0; i < n; i++) {
		printf(" %s", names[i]);
		free(names[i]);
	}
	putchar('\n');
	fflush(stdout);
}

/* Runs `body` as another user in a child process; its lines go into the same transcript. */
static void as_user(uid_t uid, gid_t gid, gid_t extra, void (*body)(void))
{
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		if (setgroups(extra ? 1 : 0, &extra) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid))
			say("setuid", "%s", outcome(-1));
		body();
		fflush(stdout);
		_exit(0);
	}
	waitpid(pid, NULL, 0);
}

static void test_create(void)
{
	int fd;

	section = "create";
	umask(022);
	fd = FD("excl", open("a", O_RDWR | O_CREAT | O_EXCL, 0666));
	close(fd);
	stat_line("umask", "a");
	FD("excl-again", open("a", O_RDWR | O_CREAT | O_EXCL, 0666));
	umask(0);
	fd = FD("mode", open("b", O_RDWR | O_CREAT, 04751));
	close(fd);
	stat_line("mode-stat", "b");
	FD("in-file", open("a/x", O_RDWR | O_CREAT, 0644));
	FD("no-parent", open("none/x", O_RDWR | O_CREAT, 0644));
	FD("is-dir", open(".", O_RDWR | O_CREAT, 0644));
	R("mkdir", mkdir("d", 0751));
	R("mkdir-again", mkdir("d", 0751));
	R("mkdir-on-file", mkdir("a", 0751));
	R("mkdir-sticky", mkdir("t", 01777));
	stat_line("mkdir-stat", "d");
	stat_line("sticky-stat", "t");
	FD("open-dir-write", open("d", O_WRONLY));
	FD("o-directory", open("a", O_RDONLY | O_DIRECTORY));
	R("mkfifo", mkfifo("p", 0640));
	stat_line("fifo-stat", "p");
	R("mknod-reg", mknod("n", S_IFREG | 0604, 0));
	stat_line("mknod-stat", "n");
	R("mknod-chr", mknod("c", S_IFCHR | 0600, 0x1234));
	stat_line("chr-stat", "c");
	R("mknod-blk", mknod("k", S_IFBLK | 0600, 0xabcd12));
	stat_line("blk-stat", "k");
	fd = socket(AF_UNIX, SOCK_STREAM, 0);
	{
		struct sockaddr_un sa = { AF_UNIX, "s" };

		R("bind", bind(fd, (struct sockaddr *)&sa, sizeof(sa)));
	}
	close(fd);
	stat_line("sock-stat", "s");
	umask(022);
	list("list", ".");
	R("rmdir-not-empty", ({ put("d/x", "1"); rmdir("d"); }));
	R("unlink-dir", unlink("d"));
	R("rmdir-file", rmdir("a"));
	R("unlink-none", unlink("none"));
	R("rmdir-none", rmdir("none"));
	R("rmdir-dot", rmdir("d/."));
	unlink("d/x");
	R("rmdir", rmdir("d"));
	R("trailing-slash", mkdir("e/", 0755));
	FD("file-slash", open("f/", O_RDWR | O_CREAT, 0644));
	list("list-end", ".");
}

static void test_names(void)
{
	char name[300];
	int fd;

	section = "names";
	memset(name, 'n', 299);
	name[255] = 0;
	fd = FD("255", open(name, O_CREAT | O_RDWR, 0644));
	close(fd);
	R("255-unlink", unlink(name));
	name[255] = 'n';
	name[256] = 0;
	FD("256", open(name, O_CREAT | O_RDWR, 0644));
	R("256-mkdir", mkdir(name, 0755));
	fd = FD("utf8", open("gr\xc3\xbc\xc3\x9f", O_CREAT | O_RDWR, 0644));
	close(fd);
	fd = FD("not-utf8", open("\xff\xfe\x01", O_CREAT | O_RDWR, 0644));
	close(fd);
	fd = FD("space", open(" a\tb\n", O_CREAT | O_RDWR, 0644));
	close(fd);
	fd = FD("dots", open("...", O_CREAT | O_RDWR, 0644));
	close(fd);
	FD("empty", open("", O_RDONLY));
	list("list", ".");
}

static void test_deep(void)
{
	char path[4096] = "";
	int depth, up;

	section = "deep";
	for (depth = 0; depth < 200; depth++) {
		if (mkdir("dddddddddd", 0755) || chdir("dddddddddd"))
			break;
	}
	say("made", "%d %s", depth, outcome(depth == 200 ? 0 : -1));
	put("leaf", "deep");
	show("leaf", "leaf");
	for (up = 0; up < depth; up++)
		if (chdir(".."))
			break;
	say("up", "%d", up);
	for (int i = 0; i < 200; i++)
		strcat(path, "dddddddddd/");
	strcat(path, "leaf");
	show("by-path", path);
	R("unlink", unlink(path));
	for (int i = 200; i > 0; i--) {
		path[i * 11 - 1] = 0;
		if (rmdir(path)) {
			say("rmdir", "%d %s", i, outcome(-1));
			return;
		}
	}
	say("rmdir", "all");
}

static int rename2(const char *from, const char *to, unsigned int flags)
{
	return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, flags);
}

static void test_rename(void)
{
	int fd;

	section = "rename";
	put("a", "A");
	put("b", "B");
	R("over", rename("a", "b"));
	show("over-content", "b");
	stat_line("over-gone", "a");
	put("a", "A2");
	R("noreplace", rename2("a", "b", RENAME_NOREPLACE));
	R("noreplace-free", rename2("a", "c", RENAME_NOREPLACE));
	R("exchange", rename2("b", "c", RENAME_EXCHANGE));
	show("exchange-b", "b");
	show("exchange-c", "c");
	R("exchange-none", rename2("b", "none", RENAME_EXCHANGE));
	R("both-flags", rename2("b", "c", RENAME_EXCHANGE | RENAME_NOREPLACE));
	mkdir("d", 0755);
	mkdir("e", 0755);
	R("exchange-dir-file", rename2("b", "d", RENAME_EXCHANGE));
	stat_line("exchange-now-file", "d");
	rename2("b", "d", RENAME_EXCHANGE);
	R("whiteout", rename2("b", "w", RENAME_WHITEOUT));
	stat_line("whiteout-left", "b");
	unlink("b");
	R("into-itself", rename("d", "d/x"));
	R("file-over-dir", rename("c", "d"));
	R("dir-over-file", rename("d", "c"));
	R("dir-over-empty", rename("d", "e"));
	put("e/x", "x");
	mkdir("d", 0755);
	R("dir-over-full", rename("d", "e"));
	R("same", rename("c", "c"));
	link("c", "c2");
	R("hard-link-pair", rename("c", "c2"));
	stat_line("hard-link-stay", "c");
	R("into-dir", rename("c", "e/c"));
	R("out-of-dir", rename("e/c", "./c"));
	R("dir-across", rename("d", "e/d"));
	stat_line("dir-across-parent", "e");
	R("none", rename("none", "x"));
	R("to-no-parent", rename("c", "none/x"));
	fd = open("c", O_RDWR);
	R("open-file", rename("c", "moved"));
	R("open-write", write(fd, "ZZ", 2));
	close(fd);
	show("open-content", "moved");
	fd = open("moved", O_RDONLY);
	put("new", "new");
	R("over-open", rename("new", "moved"));
	{
		char text[16] = "";

		R("over-open-read", read(fd, text, 15));
		say("over-open-old", "'%s'", text);
		struct stat st;
		fstat(fd, &st);
		say("over-open-nlink", "%lu", (unsigned long)st.st_nlink);
	}
	close(fd);
	list("list", ".");
}

static void test_link(void)
{
	char target[5000];
	ssize_t n;
	int fd;

	section = "link";
	put("a", "text");
	R("link", link("a", "b"));
	stat_line("nlink", "a");
	R("link-again", link("a", "b"));
	mkdir("d", 0755);
	R("link-dir", link("d", "e"));
	R("link-none", link("none", "x"));
	unlink("a");
	show("other-name", "b");
	stat_line("nlink-one", "b");
	R("symlink", symlink("b", "s"));
	stat_line("symlink-stat", "s");
	show("follow", "s");
	n = readlink("s", target, sizeof(target));
	say("readlink", "%zd %.*s", n, (int)n, target);
	n = readlink("b", target, sizeof(target));
	say("readlink-file", "%s", outcome(n));
	R("symlink-again", symlink("x", "s"));
	R("link-of-symlink", link("s", "s2"));
	stat_line("link-of-symlink-stat", "s2");
	R("link-follow", linkat(AT_FDCWD, "s", AT_FDCWD, "b2", AT_SYMLINK_FOLLOW));
	stat_line("link-follow-stat", "b2");
	FD("o-nofollow", open("s", O_RDONLY | O_NOFOLLOW));
	R("dangling", symlink("nowhere", "x"));
	FD("dangling-open", open("x", O_RDONLY));
	fd = FD("dangling-create", open("x", O_RDWR | O_CREAT, 0644));
	close(fd);
	stat_line("dangling-made", "nowhere");
	symlink("l1", "l2");
	symlink("l2", "l1");
	FD("loop", open("l1", O_RDONLY));
	R("loop-stat", ({ struct stat st; stat("l1", &st); }));
	memset(target, 't', 4095);
	target[4095] = 0;
	R("symlink-4095", symlink(target, "long"));
	n = readlink("long", target, sizeof(target));
	say("readlink-4095", "%zd", n);
	memset(target, 't', 4096);
	target[4096] = 0;
	R("symlink-4096", symlink(target, "longer"));
	R("symlink-empty", symlink("", "empty"));
	R("symlink-up", symlink("../../../../../../../etc", "up"));
	R("lchown", lchown("s", 11, 12));
	stat_line("lchown-stat", "s");
	stat_line("lchown-target", "b");
}

static void test_unlinked(void)
{
	struct stat st;
	char text[32] = "";
	int fd, dir;

	section = "unlinked";
	fd = open("a", O_RDWR | O_CREAT, 0644);
	write(fd, "hello", 5);
	R("unlink", unlink("a"));
	R("fstat", fstat(fd, &st));
	say("nlink", "%lu size %lld", (unsigned long)st.st_nlink, (long long)st.st_size);
	R("write", pwrite(fd, "HELLO", 5, 5));
	R("read", pread(fd, text, 31, 0));
	say("content", "'%s'", text);
	R("ftruncate", ftruncate(fd, 3));
	R("fchmod", fchmod(fd, 0600));
	R("fchown", fchown(fd, 5, 6));
	R("futimens", futimens(fd, (struct timespec[2]){ { 1, 2 }, { 3, 4 } }));
	fstat(fd, &st);
	say("changed", "mode %o uid %u gid %u size %lld mtime %lld.%09ld", st.st_mode, st.st_uid, st.st_gid, (long long)st.st_size,
	    (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
	put("a", "another");
	R("same-name", pread(fd, text, 31, 0));
	close(fd);
	show("another", "a");
	mkdir("d", 0755);
	dir = open("d", O_RDONLY | O_DIRECTORY);
	R("rmdir-open", rmdir("d"));
	FD("create-in-removed", openat(dir, "x", O_CREAT | O_RDWR, 0644));
	fstat(dir, &st);
	say("removed-nlink", "%lu", (unsigned long)st.st_nlink);
	close(dir);
	/* many unlinked open files at once, each with its own contents */
	int many[50], good = 0;
	for (int i = 0; i < 50; i++) {
		many[i] = open("m", O_RDWR | O_CREAT | O_EXCL, 0644);
		dprintf(many[i], "file %d", i);
		unlink("m");
	}
	for (int i = 0; i < 50; i++) {
		char want[16];

		memset(text, 0, sizeof(text));
		snprintf(want, sizeof(want), "file %d", i);
		pread(many[i], text, 31, 0);
		good += strcmp(text, want) == 0;
		close(many[i]);
	}
	say("many", "%d", good);
}

static void test_truncate(void)
{
	struct stat st;
	char text[64];
	int fd;

	section = "truncate";
	put("a", "0123456789");
	R("shorter", truncate("a", 4));
	show("shorter-content", "a");
	R("longer", truncate("a", 8));
	fd = open("a", O_RDWR);
	memset(text, 'x', sizeof(text));
	R("longer-read", pread(fd, text, 64, 0));
	say("longer-zero", "%d%d%d%d", text[4], text[5], text[6], text[7]);
	R("negative", ftruncate(fd, -1));
	R("big", ftruncate(fd, 1ll << 40));
	fstat(fd, &st);
	say("big-size", "%lld", (long long)st.st_size);
	R("big-read", pread(fd, text, 8, (1ll << 40) - 4));
	R("zero", ftruncate(fd, 0));
	close(fd);
	put("a", "abc");
	fd = open("a", O_WRONLY | O_TRUNC);
	fstat(fd, &st);
	say("o-trunc", "%lld", (long long)st.st_size);
	close(fd);
	mkdir("d", 0755);
	R("dir", truncate("d", 0));
	R("none", truncate("none", 0));
	fd = open("a", O_RDONLY);
	R("read-only-fd", ftruncate(fd, 0));
	close(fd);
	/* set-user-id bits go with a change of the contents by an ordinary user, and stay with root */
	put("suid", "x");
	chmod("suid", 06777);
	truncate("suid", 0);
	stat_line("suid-root", "suid");
}

static void test_io(void)
{
	char text[128], *big = malloc(3 << 20), *back = malloc(3 << 20);
	struct iovec iov[3] = { { "one", 3 }, { "two", 3 }, { "three", 5 } };
	int fd, fd2;

	section = "io";
	fd = open("a", O_RDWR | O_CREAT | O_APPEND, 0644);
	fd2 = open("a", O_RDWR);
	R("append", write(fd, "abc", 3));
	R("other", pwrite(fd2, "X", 1, 10));
	R("append-end", write(fd, "def", 3));
	R("pwrite-append", pwrite(fd, "!!", 2, 0));
	memset(text, 0, sizeof(text));
	R("read", pread(fd2, text, sizeof(text), 0));
	for (int i = 0; i < 16; i++)
		if (!text[i])
			text[i] = '.';
	say("content", "%.16s", text);
	R("lseek-end", lseek(fd2, 0, SEEK_END));
	R("lseek-neg", lseek(fd2, -100, SEEK_SET));
	R("writev", writev(fd2, iov, 3));
	R("past-end", pread(fd2, text, 10, 1000));
	R("offset-neg", pread(fd2, text, 10, -5));
	close(fd);
	close(fd2);
	fd = open("big", O_RDWR | O_CREAT, 0644);
	for (int i = 0; i < 3 << 20; i++)
		big[i] = (char)(i * 31 + (i >> 12));
	R("write-3m", write(fd, big, 3 << 20));
	R("read-3m", pread(fd, back, 3 << 20, 0));
	say("same-3m", "%d", memcmp(big, back, 3 << 20) == 0);
	R("unaligned", pread(fd, back, 1234567, 4321));
	say("unaligned-same", "%d", memcmp(big + 4321, back, 1234567) == 0);
	R("overwrite", pwrite(fd, big, 100000, 777));
	R("overwrite-read", pread(fd, back, 200000, 0));
	say("overwrite-same", "%d", !memcmp(back, big, 777) && !memcmp(back + 777, big, 100000) &&
	    !memcmp(back + 100777, big + 100777, 99223));
	R("fsync", fsync(fd));
	R("fdatasync", fdatasync(fd));
	R("syncfs", syncfs(fd));
	close(fd);
	fd = open("big", O_RDONLY);
	R("write-read-only", write(fd, "x", 1));
	close(fd);
	fd = open("big", O_WRONLY);
	R("read-write-only", read(fd, text, 1));
	close(fd);
	fd = open(".", O_RDONLY);
	R("read-dir", read(fd, text, 1));
	R("fsync-dir", fsync(fd));
	close(fd);
	fd = open("big", O_RDWR);
	R("copy-range", ({
		loff_t in = 5, out = 0;
		int to = open("copy", O_RDWR | O_CREAT, 0644);
		long n = copy_file_range(fd, &in, to, &out, 500000, 0);
		pread(to, back, 500000, 0);
		say("copy-same", "%d", memcmp(back, big + 5, 772) == 0 && memcmp(back + 772, big, 100000) == 0);
		close(to);
		n;
	}));
	close(fd);
	free(big);
	free(back);
}

static void test_holes(void)
{
	char zero[4096] = { 0 }, text[4096];
	int fd;

	section = "holes";
	fd = open("a", O_RDWR | O_CREAT, 0644);
	pwrite(fd, "data", 4, 1 << 20);
	R("hole-read", pread(fd, text, 4096, 4096));
	say("hole-zero", "%d", memcmp(text, zero, 4096) == 0);
	fsync(fd);
	R("seek-data", lseek(fd, 0, SEEK_DATA));
	R("seek-hole", lseek(fd, 0, SEEK_HOLE));
	R("seek-hole-end", lseek(fd, 1 << 20, SEEK_HOLE));
	R("seek-data-past", lseek(fd, 2 << 20, SEEK_DATA));
	R("fallocate", fallocate(fd, 0, 0, 8192));
	R("fallocate-grow", fallocate(fd, 0, 1 << 20, 1 << 20));
	stat_line("grow-size", "a");
	R("keep-size", fallocate(fd, FALLOC_FL_KEEP_SIZE, 4 << 20, 4096));
	stat_line("keep-stat", "a");
	pwrite(fd, "0123456789", 10, 0);
	R("punch", fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 2, 5));
	memset(text, 'x', 10);
	pread(fd, text, 10, 0);
	say("punched", "%c%c%d%d%c%c", text[0], text[1], text[2], text[6], text[7], text[9]);
	R("zero-range", fallocate(fd, FALLOC_FL_ZERO_RANGE, 0, 4096));
	pread(fd, text, 10, 0);
	say("zeroed", "%d", text[0]);
	R("bad-mode", fallocate(fd, FALLOC_FL_PUNCH_HOLE, 0, 10));
	R("zero-length", fallocate(fd, 0, 0, 0));
	close(fd);
	fd = open("a", O_RDONLY);
	R("read-only", fallocate(fd, 0, 0, 10));
	close(fd);
}

static void test_mmap(void)
{
	char *p, text[16] = "";
	int fd;

	section = "mmap";
	fd = open("a", O_RDWR | O_CREAT, 0644);
	ftruncate(fd, 3 * 4096);
	p = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	say("shared", "%s", p == MAP_FAILED ? outcome(-1) : "ok");
	if (p == MAP_FAILED)
		return;
	memcpy(p + 4090, "across pages", 12);
	R("msync", msync(p, 3 * 4096, MS_SYNC));
	R("pread", pread(fd, text, 12, 4090));
	say("pread-content", "'%.12s'", text);
	pwrite(fd, "written", 7, 8192);
	say("write-seen", "'%.7s'", p + 8192);
	munmap(p, 3 * 4096);
	p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 8192);
	memcpy(p, "private", 7);
	pread(fd, text, 7, 8192);
	say("private", "'%.7s'", text);
	munmap(p, 4096);
	close(fd);
	fd = open("a", O_RDONLY);
	p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	say("read-only", "%s", p == MAP_FAILED ? outcome(-1) : "ok");
	close(fd);
}

static void test_tmpfile(void)
{
	char path[64];
	struct stat st;
	int fd;

	section = "tmpfile";
	fd = FD("open", open(".", O_TMPFILE | O_RDWR, 0640));
	if (fd < 0)
		return;
	R("write", write(fd, "tmp", 3));
	fstat(fd, &st);
	say("stat", "mode %o nlink %lu size %lld", st.st_mode, (unsigned long)st.st_nlink, (long long)st.st_size);
	list("unseen", ".");
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	R("link", linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
	close(fd);
	show("named", "named");
	stat_line("named-stat", "named");
	fd = FD("excl", open(".", O_TMPFILE | O_RDWR | O_EXCL, 0640));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	R("excl-link", linkat(AT_FDCWD, path, AT_FDCWD, "named2", AT_SYMLINK_FOLLOW));
	close(fd);
	FD("read-only", open(".", O_TMPFILE | O_RDONLY, 0640));
	FD("on-file", open("named", O_TMPFILE | O_RDWR, 0640));
}

static void test_xattr(void)
{
	char value[70000], names[1024];
	ssize_t n;

	section = "xattr";
	put("a", "x");
	R("get-none", getxattr("a", "user.none", value, 10));
	R("set", setxattr("a", "user.one", "value", 5, 0));
	R("get-size", getxattr("a", "user.one", NULL, 0));
	R("get", getxattr("a", "user.one", value, 100));
	say("value", "%.5s", value);
	R("erange", getxattr("a", "user.one", value, 2));
	R("create-again", setxattr("a", "user.one", "v", 1, XATTR_CREATE));
	R("replace-none", setxattr("a", "user.two", "v", 1, XATTR_REPLACE));
	R("replace", setxattr("a", "user.one", "other", 5, XATTR_REPLACE));
	R("empty", setxattr("a", "user.empty", "", 0, 0));
	R("empty-get", getxattr("a", "user.empty", value, 10));
	memset(value, 'v', sizeof(value));
	R("2000", setxattr("a", "user.2000", value, 2000, 0));
	R("2000-get", getxattr("a", "user.2000", value, sizeof(value)));
	R("too-big", setxattr("a", "user.big", value, 66000, 0));
	n = listxattr("a", names, sizeof(names));
	say("list", "%zd", n);
	for (char *p = names; n > 0 && p < names + n; p += strlen(p) + 1)
		if (!strncmp(p, "user.", 5))
			say("listed", "%s", p);
	R("list-size", listxattr("a", NULL, 0));
	R("list-erange", listxattr("a", names, 3));
	R("remove", removexattr("a", "user.one"));
	R("remove-again", removexattr("a", "user.one"));
	memset(names, 'n', 300);
	memcpy(names, "user.", 5);
	names[255] = 0;
	R("name-255", setxattr("a", names, "v", 1, 0));
	names[255] = 'n';
	names[256] = 0;
	R("name-256", setxattr("a", names, "v", 1, 0));
	R("no-prefix", setxattr("a", "nothing", "v", 1, 0));
	R("trusted", setxattr("a", "trusted.t", "v", 1, 0));
	R("trusted-get", getxattr("a", "trusted.t", value, 10));
	mkdir("d", 0755);
	R("dir", setxattr("d", "user.dir", "v", 1, 0));
	symlink("a", "s");
	R("symlink-user", lsetxattr("s", "user.x", "v", 1, 0));
	R("symlink-trusted", lsetxattr("s", "trusted.x", "v", 1, 0));
	R("symlink-get", lgetxattr("s", "trusted.x", value, 10));
	R("symlink-not-target", getxattr("a", "trusted.x", value, 10));
	mkfifo("p", 0644);
	R("fifo-user", setxattr("p", "user.x", "v", 1, 0));
}

static void try_access(void)
{
	FD("read", open("secret", O_RDONLY));
	FD("write", open("secret", O_WRONLY));
	FD("group-read", open("group", O_RDONLY));
	FD("group-write", open("group", O_WRONLY));
	R("access-r", access("secret", R_OK));
	R("access-w", access("group", W_OK));
	R("access-f", access("secret", F_OK));
	R("chmod-other", chmod("secret", 0777));
	R("chown-other", chown("secret", getuid(), getgid()));
	R("utimes-other", utimensat(AT_FDCWD, "secret", NULL, 0));
	R("unlink-in-root-dir", unlink("secret"));
	R("sticky-unlink", unlink("sticky/rootfile"));
	R("sticky-rename", rename("sticky/rootfile", "sticky/mine"));
	FD("sticky-create", open("sticky/own", O_CREAT | O_RDWR, 0644));
	stat_line("own-stat", "sticky/own");
	R("own-chmod", chmod("sticky/own", 0600));
	R("own-chown-away", chown("sticky/own", 0, -1));
	R("own-chgrp-bad", chown("sticky/own", -1, 0));
	R("own-unlink", unlink("sticky/own"));
	FD("no-search", open("closed/inside", O_RDONLY));
	FD("no-read-dir", open("noread", O_RDONLY | O_DIRECTORY));
	FD("search-only", open("noread/inside", O_RDONLY));
	R("mkdir-sgid", mkdir("sgid/sub", 0755));
	stat_line("sgid-dir", "sgid/sub");
	close(open("sgid/file", O_CREAT | O_RDWR, 0644));
	stat_line("sgid-file", "sgid/file");
	close(open("sgid/x", O_CREAT | O_RDWR, 02775));
	stat_line("sgid-x", "sgid/x");
	R("symlink-owner", symlink("t", "sticky/link"));
	stat_line("symlink-stat", "sticky/link");
	R("mknod-owner", mknod("sticky/fifo", S_IFIFO | 0644, 0));
	stat_line("mknod-stat", "sticky/fifo");
	R("mknod-dev", mknod("sticky/dev", S_IFCHR | 0644, 0x103));
	R("link-protected", link("group", "sticky/hard"));
	int fd = open("suid", O_WRONLY);
	R("suid-write", write(fd, "y", 1));
	close(fd);
	stat_line("suid-after", "suid");
	R("suid-own-chmod", chmod("sticky/fifo", 06755));
	stat_line("chmod-sgid", "sticky/fifo");
	unlink("sticky/link");
	unlink("sticky/fifo");
}

static void test_permissions(void)
{
	section = "perm";
	umask(0);
	put("secret", "s");
	chmod("secret", 0600);
	put("group", "g");
	chmod("group", 0660);
	chown("group", 0, 2000);
	mkdir("sticky", 01777);
	put("sticky/rootfile", "r");
	mkdir("closed", 0700);
	put("closed/inside", "x");
	mkdir("noread", 0711);
	put("noread/inside", "x");
	mkdir("sgid", 02777);
	chown("sgid", 0, 3000);
	chmod("sgid", 02777);
	put("suid", "x");
	chown("suid", 1000, 1000);
	chmod("suid", 06777);
	umask(022);
	section = "perm-1000";
	as_user(1000, 1000, 0, try_access);
	section = "perm-group";
	unlink("sgid/file");
	rmdir("sgid/sub");
	unlink("sgid/x");
	as_user(1001, 1001, 2000, try_access);
	section = "perm-sgidgroup";
	unlink("sgid/file");
	rmdir("sgid/sub");
	unlink("sgid/x");
	as_user(1002, 1002, 3000, try_access);
	section = "perm-root";
	R("chmod", chmod("secret", 04711));
	stat_line("chmod-stat", "secret");
	R("chown", chown("secret", 1234, 5678));
	stat_line("chown-clears-suid", "secret");
	R("chown-big", chown("secret", 4000000000u, 4000000001u));
	stat_line("chown-big-stat", "secret");
	R("chown-none", chown("secret", -1, -1));
}

static void test_times(void)
{
	struct stat st, before;
	struct statx sx;
	int fd;

	section = "times";
	put("a", "x");
	R("utimens", utimensat(AT_FDCWD, "a", (struct timespec[2]){ { 1000000000, 123456789 }, { 1100000000, 987654321 } }, 0));
	stat("a", &st);
	say("utimens-stat", "%lld.%09ld %lld.%09ld", (long long)st.st_atim.tv_sec, st.st_atim.tv_nsec, (long long)st.st_mtim.tv_sec,
	    st.st_mtim.tv_nsec);
	R("omit", utimensat(AT_FDCWD, "a", (struct timespec[2]){ { 0, UTIME_OMIT }, { 5, 6 } }, 0));
	stat("a", &st);
	say("omit-stat", "%lld %lld.%09ld", (long long)st.st_atim.tv_sec, (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
	R("before-1970", utimensat(AT_FDCWD, "a", (struct timespec[2]){ { -100, 5 }, { -1, 6 } }, 0));
	stat("a", &st);
	say("before-1970-stat", "%lld.%09ld %lld.%09ld", (long long)st.st_atim.tv_sec, st.st_atim.tv_nsec, (long long)st.st_mtim.tv_sec,
	    st.st_mtim.tv_nsec);
	R("year-2100", utimensat(AT_FDCWD, "a", (struct timespec[2]){ { 4102444800, 0 }, { 4102444800, 0 } }, 0));
	stat("a", &st);
	say("year-2100-stat", "%lld", (long long)st.st_mtim.tv_sec);
	symlink("a", "s");
	R("symlink", utimensat(AT_FDCWD, "s", (struct timespec[2]){ { 7, 0 }, { 8, 0 } }, AT_SYMLINK_NOFOLLOW));
	lstat("s", &st);
	say("symlink-stat", "%lld", (long long)st.st_mtim.tv_sec);
	utimensat(AT_FDCWD, "a", (struct timespec[2]){ { 1, 0 }, { 1, 0 } }, 0);
	stat("a", &before);
	fd = open("a", O_WRONLY);
	write(fd, "y", 1);
	fsync(fd);
	close(fd);
	stat("a", &st);
	say("write-mtime", "%d ctime %d", st.st_mtim.tv_sec > before.st_mtim.tv_sec, st.st_ctim.tv_sec >= before.st_ctim.tv_sec);
	utimensat(AT_FDCWD, ".", (struct timespec[2]){ { 1, 0 }, { 1, 0 } }, 0);
	put("new", "");
	stat(".", &st);
	say("dir-mtime-create", "%d", st.st_mtim.tv_sec > 1);
	utimensat(AT_FDCWD, ".", (struct timespec[2]){ { 1, 0 }, { 1, 0 } }, 0);
	unlink("new");
	stat(".", &st);
	say("dir-mtime-unlink", "%d", st.st_mtim.tv_sec > 1);
	utimensat(AT_FDCWD, ".", (struct timespec[2]){ { 1, 0 }, { 1, 0 } }, 0);
	rename("s", "s2");
	stat(".", &st);
	say("dir-mtime-rename", "%d", st.st_mtim.tv_sec > 1);
	R("statx", statx(AT_FDCWD, "a", AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &sx));
	say("statx-size", "%llu mode %o", (unsigned long long)sx.stx_size, sx.stx_mode);
}

static int lock(int fd, int type, off_t start, off_t length, int command)
{
	struct flock l = { .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length };

	return fcntl(fd, command, &l);
}

static void test_locks(void)
{
	int fd = open("a", O_RDWR | O_CREAT, 0644), fd2, status;
	pid_t pid;

	section = "locks";
	R("posix", lock(fd, F_WRLCK, 0, 10, F_SETLK));
	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		struct flock l = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 5, .l_len = 1 };
		int other = open("a", O_RDWR);

		R("posix-other", lock(other, F_WRLCK, 5, 1, F_SETLK));
		R("posix-beside", lock(other, F_WRLCK, 10, 5, F_SETLK));
		fcntl(other, F_GETLK, &l);
		say("getlk", "type %d start %lld len %lld", l.l_type, (long long)l.l_start, (long long)l.l_len);
		fflush(stdout);
		_exit(0);
	}
	waitpid(pid, &status, 0);
	R("posix-unlock", lock(fd, F_UNLCK, 0, 0, F_SETLK));
	R("ofd", lock(fd, F_WRLCK, 0, 0, F_OFD_SETLK));
	fd2 = open("a", O_RDWR);
	R("ofd-other", lock(fd2, F_WRLCK, 0, 0, F_OFD_SETLK));
	lock(fd, F_UNLCK, 0, 0, F_OFD_SETLK);
	R("flock", flock(fd, LOCK_EX | LOCK_NB));
	R("flock-other", flock(fd2, LOCK_SH | LOCK_NB));
	R("flock-un", flock(fd, LOCK_UN));
	R("flock-now", flock(fd2, LOCK_SH | LOCK_NB));
	/* a blocking lock gets through when the other side lets go */
	fflush(stdout);
	lock(fd, F_WRLCK, 0, 10, F_OFD_SETLK);
	pid = fork();
	if (pid == 0) {
		int other = open("a", O_RDWR);

		R("blocking", lock(other, F_WRLCK, 0, 10, F_OFD_SETLKW));
		fflush(stdout);
		_exit(0);
	}
	usleep(100000);
	lock(fd, F_UNLCK, 0, 10, F_OFD_SETLK);
	waitpid(pid, &status, 0);
	say("blocking-end", "%d", WEXITSTATUS(status));
	close(fd);
	close(fd2);
}

/* struct posix_acl_xattr_header and entries: version 2; tag, perm, id */
struct acl { uint32_t version; struct { uint16_t tag, perm; uint32_t id; } e[5]; } __attribute__((packed));

static void acl_user(void)
{
	FD("read", open("acl", O_RDONLY));
	FD("write", open("acl", O_WRONLY));
}

/* Only where the mount has ACLs: the transcripts are compared between a host and a guest mount that both do. */
static void test_acl(void)
{
	struct acl a = { 2, { { 1, 6, -1u }, { 2, 4, 1000 }, { 4, 0, -1u }, { 16, 6, -1u }, { 32, 0, -1u } } };
	char back[100];

	section = "acl";
	umask(022);
	put("acl", "x");
	R("set", setxattr("acl", "system.posix_acl_access", &a, sizeof(a), 0));
	stat_line("mode", "acl");
	R("get", getxattr("acl", "system.posix_acl_access", back, sizeof(back)));
	section = "acl-1000";
	as_user(1000, 1000, 0, acl_user);
	section = "acl-1001";
	as_user(1001, 1001, 0, acl_user);
	section = "acl";
	R("chmod", chmod("acl", 0640));
	R("get-mask", getxattr("acl", "system.posix_acl_access", back, sizeof(back)));
	mkdir("d", 0755);
	R("default", setxattr("d", "system.posix_acl_default", &a, sizeof(a), 0));
	close(open("d/f", O_CREAT | O_RDWR, 0666));
	stat_line("inherit-mode", "d/f");
	R("inherit-acl", getxattr("d/f", "system.posix_acl_access", back, sizeof(back)));
	mkdir("d/sub", 0777);
	R("inherit-default", getxattr("d/sub", "system.posix_acl_default", back, sizeof(back)));
	stat_line("inherit-dir-mode", "d/sub");
	R("default-on-file", setxattr("acl", "system.posix_acl_default", &a, sizeof(a), 0));
	R("remove", removexattr("acl", "system.posix_acl_access"));
	stat_line("removed", "acl");
	a.e[0].tag = 99;
	R("bad", setxattr("acl", "system.posix_acl_access", &a, sizeof(a), 0));
}

static void test_directories(void)
{
	char name[32];
	int n = 0, seen[1000] = { 0 }, good = 0;
	struct dirent *e;
	long position = 0;
	DIR *d;

	section = "dir";
	mkdir("many", 0755);
	for (int i = 0; i < 1000; i++) {
		snprintf(name, sizeof(name), "many/entry-%03d", i);
		close(open(name, O_CREAT | O_WRONLY, 0644));
	}
	d = opendir("many");
	while ((e = readdir(d))) {
		int i;

		n++;
		if (sscanf(e->d_name, "entry-%d", &i) == 1 && i < 1000)
			seen[i]++;
		if (n == 500)
			position = telldir(d);
	}
	for (int i = 0; i < 1000; i++)
		good += seen[i] == 1;
	say("all", "%d once %d", n, good);
	seekdir(d, position);
	for (n = 0; readdir(d); n++)
		;
	say("seekdir", "%d", n);
	rewinddir(d);
	for (n = 0; readdir(d); n++)
		;
	say("rewind", "%d", n);
	/* everything can be removed while it is read */
	rewinddir(d);
	for (n = 0; (e = readdir(d));)
		if (e->d_name[0] != '.' && unlinkat(dirfd(d), e->d_name, 0) == 0)
			n++;
	say("removed", "%d", n);
	closedir(d);
	R("rmdir", rmdir("many"));
	stat_line("parent", ".");
	mkdir("x", 0755);
	mkdir("x/y", 0755);
	stat_line("nlink-sub", "x");
	rmdir("x/y");
	stat_line("nlink-none", "x");
}

static void test_statfs(void)
{
	struct statvfs v;

	section = "statfs";
	R("statvfs", statvfs(".", &v));
	say("namemax", "%lu", v.f_namemax);
	say("sane", "%d", v.f_blocks > 0 && v.f_bfree <= v.f_blocks && v.f_bsize >= 512);
}

static void test_nospace(const char *small)
{
	char *block = malloc(1 << 20);
	long total = 0, n = 0, free_again;
	int fd, cwd = open(".", O_RDONLY);

	section = "nospace";
	if (chdir(small)) {
		say("chdir", "%s", outcome(-1));
		return;
	}
	memset(block, 'f', 1 << 20);
	fd = open("fill", O_CREAT | O_RDWR | O_TRUNC, 0644);
	for (int i = 0; i < 1000 && (n = write(fd, block, 1 << 20)) > 0; i++)
		total += n;
	if (n >= 0)
		n = fsync(fd);
	say("write", "%s", outcome(n));
	say("some", "%d", total > 1 << 20);
	R("fallocate", fallocate(fd, 0, 0, 1ll << 40));
	R("truncate", ftruncate(fd, 0));
	free_again = write(fd, block, 1 << 20);
	say("again", "%s", outcome(free_again));
	close(fd);
	R("unlink", unlink("fill"));
	fchdir(cwd);
	close(cwd);
	free(block);
}

static void in_directory(const char *name, void (*test)(void))
{
	if (mkdir(name, 0755) || chdir(name)) {
		section = name;
		say("start", "%s", outcome(-1));
		return;
	}
	test();
	if (chdir(".."))
		exit(3);
}

int main(int argc, char **argv)
{
	if (argc < 2 || chdir(argv[1])) {
		fprintf(stderr, "usage: posix DIRECTORY [SMALL]\n");
		return 2;
	}
	umask(022);
	in_directory("create", test_create);
	in_directory("names", test_names);
	in_directory("deep", test_deep);
	in_directory("rename", test_rename);
	in_directory("link", test_link);
	in_directory("unlinked", test_unlinked);
	in_directory("truncate", test_truncate);
	in_directory("io", test_io);
	in_directory("holes", test_holes);
	in_directory("mmap", test_mmap);
	in_directory("tmpfile", test_tmpfile);
	in_directory("xattr", test_xattr);
	in_directory("perm", test_permissions);
	in_directory("times", test_times);
	in_directory("locks", test_locks);
	in_directory("acl", test_acl);
	in_directory("dir", test_directories);
	in_directory("statfs", test_statfs);
	if (argc > 2)
		test_nospace(argv[2]);
	section = "end";
	say("end", "end");
	return 0;
}
