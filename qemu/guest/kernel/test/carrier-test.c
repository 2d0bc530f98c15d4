// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test of the guest kernel's two carriers of notifications, the notification
 * queue and lent buffers, against carrier-device.c. This program is the guest's
 * init and tells the device what to do by looking up names that begin with '!'.
 */
#include "guest.h"

#include <sys/sysmacros.h>

#define MNT "/mnt"
#define TAG "carrier"

static bool queue, lent;		/* which carrier there is */

static long command(const char *fmt, ...)
{
	char path[512] = MNT "/!";
	struct stat st;
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(path + strlen(path), sizeof(path) - strlen(path), fmt, ap);
	va_end(ap);
	return stat(path, &st) ? -errno : st.st_size;
}

static void mount_it(void)
{
	struct stat st;

	if (mount(TAG, MNT, "virtiofs", 0, NULL)) {
		check(false, "mount: %s", strerror(errno));
		return;
	}
	stat(MNT "/d/f", &st);
}

static long umount_it(void)
{
	long begin = now_ms();

	check(umount2(MNT, 0) == 0, "umount: %s", strerror(errno));
	return now_ms() - begin;
}

/* Wait for a command's result to become what it should be */
static long await(const char *cmd, long want)
{
	long begin = now_ms(), got;

	do {
		got = command("%s", cmd);
		if (got == want)
			break;
		msleep(10);
	} while (now_ms() - begin < 3000);
	return got;
}

static long buffers(void)
{
	return queue ? 16 : lent ? 4 : 0;
}

/* What comes within a second, until it is what is wanted */
static void await_events(const char *what, int fd, const char *want)
{
	static char all[1 << 16];
	long begin = now_ms();

	*all = 0;
	for (;;) {
		struct pollfd p = { .fd = fd, .events = POLLIN };

		if (poll(&p, 1, 20) > 0) {
			read_inotify(fd);
			if (strlen(all) + strlen(text) + 2 < sizeof(all)) {
				if (*all && *text)
					strcat(all, " ");
				strcat(all, text);
			}
		}
		if (!strcmp(all, want) && *want)
			return;
		if (now_ms() - begin > (*want ? 2000 : 200))
			break;
	}
	expect(what, all, want);
}

static int watch(void)
{
	int fd = inotify();

	check(inotify_add_watch(fd, MNT "/d", IN_ALL_EVENTS) == 1, "watch: %s", strerror(errno));
	read_inotify(fd);
	return fd;
}

static void works(const char *what)
{
	int fd = watch();

	check(command("ev,2,7,100,0,0,hello") == 0, "%s: command", what);
	await_events(what, fd, "1:CREATE:hello");
	close(fd);
}

static void test_events(void)
{
	int fd = watch();
	char want[64];

	check(await("lent", buffers()) == buffers(), "the device has %ld buffers of %ld",
	      command("lent"), buffers());
	check(command("mask,2") == DIR_EVERYTHING || command("mask,2") == (DIR_EVERYTHING & ~0x1000),
	      "watch request: %lx", command("mask,2"));
	command("ev,2,7,100,0,0,hello");
	await_events("event", fd, "1:CREATE:hello");
	command("ev,2,7,8000002,3,9,f");
	await_events("event of a child", fd, "1:MODIFY:f");
	command("over");
	await_events("overflow", fd, "-1:Q_OVERFLOW:");
	check(await("lent", buffers()) == buffers(), "buffers come back");

	/* More than there are buffers, in order */
	check(command("burst,1000") == 0, "burst");
	int count = 0, wrong = 0;
	for (long begin = now_ms(); count < 1000 && now_ms() - begin < 5000;) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		char *t;

		if (poll(&p, 1, 100) <= 0)
			continue;
		read_inotify(fd);
		for (t = strtok(text, " "); t; t = strtok(NULL, " ")) {
			sprintf(want, "1:CREATE:b%d", count++);
			wrong += strcmp(t, want) != 0;
		}
	}
	check(count == 1000 && !wrong, "burst: %d events, %d wrong", count, wrong);
	check(await("lent", buffers()) == buffers(), "buffers come back after a burst");
	close(fd);
}

static void test_invalidate(void)
{
	struct stat a, b;
	int fd = watch();

	stat(MNT "/d", &a);
	stat(MNT "/d", &b);
	check(a.st_mtime == b.st_mtime, "attributes are cached");
	command("inval,2");
	for (int i = 0; i < 100 && a.st_mtime == b.st_mtime; i++) {
		msleep(10);
		stat(MNT "/d", &b);
	}
	check(a.st_mtime != b.st_mtime, "INVAL_INODE");

	stat(MNT "/e", &a);
	command("entry,1,e");
	b = a;
	for (int i = 0; i < 100 && a.st_mtime == b.st_mtime; i++) {
		msleep(10);
		stat(MNT "/e", &b);
	}
	check(a.st_mtime != b.st_mtime, "INVAL_ENTRY");

	inotify_add_watch(fd, MNT "/d/sub", IN_ALL_EVENTS);
	command("ev,2,7,40000200,4,11,sub");
	command("delete,2,4,sub");
	await_events("DELETE", fd, "1:DELETE|ISDIR:sub 2:DELETE_SELF: 2:IGNORED:");
	close(fd);
}

static void test_malformed(void)
{
	for (int kind = 0; kind <= 23; kind++) {
		/* A reply that lies about itself ends the lending */
		bool ends = lent && (kind <= 5 || (kind >= 14 && kind <= 17)) && kind != 2 && kind != 3;
		int fd = watch();

		check(command("bad,%d", kind) == 0, "kind %d", kind);
		/* The queue knows no reply to lie about */
		char want[64] = "";
		if (queue && kind >= 15 && kind <= 17)
			strcpy(want, "1:CREATE:bad");
		await_events("malformed", fd, want);
		close(fd);
		if (ends) {
			check(await("lent", 3) == 3, "kind %d ends the lending", kind);
			umount_it();
			mount_it();
		}
		check(await("lent", buffers()) == buffers(), "kind %d: buffer came back: %ld", kind,
		      command("lent"));
		works("after a malformed one");
	}
}

static void test_unmount(void)
{
	long ms, stops;

	stops = command("stops");
	ms = umount_it();
	check(ms < 1000, "unmount took %ld ms", ms);
	mount_it();
	check(command("stops") == stops + lent, "STOP before unmount");
	check(await("lent", buffers()) == buffers(), "buffers after remount");
	works("after remount");

	/* Notifications without a session */
	command("late,30");
	umount_it();
	msleep(100);
	mount_it();
	check(await("pending", 0) == 0, "late notifications are taken");
	check(await("lent", buffers()) == buffers(), "buffers after late notifications");
	works("after late notifications");

	if (lent) {
		/* A server that does not give the buffers back */
		command("keep,1");
		ms = umount_it();
		check(ms > 3000 && ms < 8000, "unmount with kept buffers took %ld ms", ms);
		mount_it();
		command("keep,0");
		check(await("lent", 4) == 4, "kept buffers come back with INIT");
		works("after kept buffers");

		/* A server that never answers STOP */
		command("deaf,1");
		ms = umount_it();
		check(ms > 3000 && ms < 8000, "unmount with a deaf server took %ld ms", ms);
		mount_it();
		command("deaf,0");
		check(await("lent", 4) == 4, "buffers after a deaf server");
		works("after a deaf server");

		/* Taken back, one and all */
		command("fail,19");
		check(await("lent", 3) == 3, "ENODEV ends the lending");
		works("three are left");
		check(await("lent", 2) == 2, "and not lent again");
		umount_it();
		mount_it();
		check(await("lent", 4) == 4, "a new session lends again");
		command("giveback,38");
		check(await("lent", 0) == 0, "ENOSYS ends the lending");
		int fd = watch();
		command("ev,2,7,100,0,0,none");
		await_events("without buffers", fd, "");
		close(fd);
		umount_it();
		mount_it();
		works("after ENOSYS");
	}

	for (int i = 0; i < 30; i++) {
		int fd = watch();

		command("burst,50");
		msleep(i % 5);
		if (i & 1)
			close(fd);
		umount_it();
		mount_it();
		if (!(i & 1))
			close(fd);
	}
	check(await("pending", 0) == 0, "bursts are taken in the end");
	works("after many remounts");
}

static void *busy(void *arg)
{
	volatile bool *end = arg;

	while (!*end)
		command("pending");
	return NULL;
}

/* Requests and notifications do not hold up each other */
static void test_load(void)
{
	pthread_t t[8];
	bool end = false;
	int fd = watch(), count = 0;

	for (int i = 0; i < 8; i++)
		pthread_create(&t[i], NULL, busy, &end);
	for (int i = 0; i < 20; i++) {
		command("burst,50");
		for (long begin = now_ms(); count < (i + 1) * 50 && now_ms() - begin < 3000;) {
			struct pollfd p = { .fd = fd, .events = POLLIN };

			if (poll(&p, 1, 100) <= 0)
				continue;
			read_inotify(fd);
			for (char *s = text; (s = strstr(s, "CREATE")); s++)
				count++;
		}
	}
	end = true;
	for (int i = 0; i < 8; i++)
		pthread_join(t[i], NULL);
	check(count == 1000, "%d events of 1000 under load", count);
	close(fd);
}

static bool write_to(const char *path, const char *what)
{
	int fd = open(path, O_WRONLY);
	bool ok = fd >= 0 && write(fd, what, strlen(what)) == (ssize_t)strlen(what);

	if (fd >= 0)
		close(fd);
	return ok;
}

/* The driver leaves the device with buffers under way, mounted or not */
static void test_remove(void)
{
	umount_it();
	check(write_to("/sys/bus/virtio/drivers/virtiofs/unbind", "virtio0"), "unbind: %s",
	      strerror(errno));
	check(mount(TAG, MNT, "virtiofs", 0, NULL) && errno == EINVAL, "no device: %s",
	      strerror(errno));
	check(write_to("/sys/bus/virtio/drivers/virtiofs/bind", "virtio0"), "bind: %s",
	      strerror(errno));
	mount_it();
	check(await("lent", buffers()) == buffers(), "buffers after bind: %ld", command("lent"));
	works("after bind");

	command("burst,100");
	check(write_to("/sys/bus/virtio/drivers/virtiofs/unbind", "virtio0"), "unbind: %s",
	      strerror(errno));
	long ms = umount_it();
	check(ms < 2000, "unmount without a device took %ld ms", ms);
}

static void test_none(void)
{
	int fd = watch();

	check(command("reads") == 0, "no buffers are lent");
	check(command("mask,2") == 0, "no watch request");
	close(fd);
	check(umount_it() < 1000, "unmount");
}

int main(void)
{
	const char *mode = getenv("mode") ?: "none";
	struct utsname u;

	guest_begin();
	queue = !strcmp(mode, "queue");
	lent = !strcmp(mode, "lent");
	uname(&u);
	printf("kernel %s, carrier: %s\n", u.release, mode);
	mkdir(MNT, 0755);
	mount_it();
	if (queue || lent) {
		section("events", test_events);
		section("invalidate", test_invalidate);
		section("malformed", test_malformed);
		section("unmount", test_unmount);
		section("load", test_load);
		section("remove", test_remove);
	} else {
		section("none", test_none);
	}
	return guest_end();
}
