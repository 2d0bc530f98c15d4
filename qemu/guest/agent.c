// SPDX-License-Identifier: Apache-2.0
/*
 * The guest's first process once it is up: runs the commands that the host sends over one byte channel (a virtio-serial
 * port in QEMU, a terminal line in User Mode Linux), any number at a time, and carries their input and output.
 *
 *   agent CHANNEL NONCE
 *
 * The channel starts with the hello: the bytes of NONCE, each with its top bit set. The host chose NONCE for this guest,
 * so it finds the beginning again after a reset in the middle of a frame. Then come frames both ways, little-endian:
 *
 *   u32 length of the payload, at most FRAME_MAX   u16 command id   u8 type   u8 zero   payload
 *
 * The host has at most CHANNEL_WINDOW bytes on their way, a little less than a terminal line's input queue holds: when User
 * Mode Linux has to throttle a line, its input may stop for good.
 *
 * agent.ts is the other end; keep the two alike.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { FRAME_MAX = 32768, COMMANDS_MAX = 256, CREDIT_STEP = 1024 };

enum from_host {
	EXEC = 1,   /* u32 flags, uid, gid, rows, columns; then NUL-terminated: directory, command, NAME=value... */
	STDIN = 2,  /* bytes, or nothing for end of file; the next one only after STDIN_TAKEN */
	KILL = 3,   /* u32 signal, sent to the command's process group */
	RESIZE = 4, /* u32 rows, columns */
	POWER = 5,  /* u32: 0 power off, 1 restart */
};
enum from_guest {
	STDOUT = 65,
	STDERR = 66,
	EXIT = 67, /* u32 wait status; all that the command itself has written came before */
	STDIN_TAKEN = 68,
	CREDIT = 69, /* u32: so many more bytes of the channel have been read */
};
enum exec_flags { PTY = 1 };

struct command {
	int id, pid; /* pid 0: slot is free */
	int in, out, err;
	char *input; /* what STDIN brought and the command has not read yet */
	size_t input_len, input_done;
	int input_end;
};

static struct command commands[COMMANDS_MAX];
static int channel;
static sigset_t old_mask;

static void fatal(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	fprintf(stderr, "init: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, ": %s\n", strerror(errno));
	va_end(args);
	reboot(RB_POWER_OFF);
	_exit(1);
}

static void write_all(const void *data, size_t length)
{
	for (const char *p = data; length > 0;) {
		ssize_t n = write(channel, p, length);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n < 0)
			fatal("cannot write to the host");
		p += n;
		length -= n;
	}
}

static void send_frame(int id, enum from_guest type, const void *payload, uint32_t length)
{
	unsigned char header[8];
	memcpy(header, &length, 4);
	header[4] = id;
	header[5] = id >> 8;
	header[6] = type;
	header[7] = 0;
	write_all(header, sizeof(header));
	write_all(payload, length);
}

/* 0 at the end of the channel. */
static int read_all(void *data, size_t length)
{
	static uint32_t taken;
	for (char *p = data; length > 0;) {
		ssize_t n = read(channel, p, length);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n <= 0)
			return 0;
		p += n;
		length -= n;
		taken += n;
		if (taken >= CREDIT_STEP) {
			send_frame(0, CREDIT, &taken, 4);
			taken = 0;
		}
	}
	return 1;
}

static struct command *find(int id)
{
	for (struct command *c = commands; c < commands + COMMANDS_MAX; c++)
		if (c->pid && c->id == id)
			return c;
	return NULL;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Passes on one piece of output; 0 when there is none now. */
static int forward(struct command *c, int *fd, enum from_guest type)
{
	static char buffer[FRAME_MAX];
	ssize_t n = read(*fd, buffer, sizeof(buffer));
	if (n > 0) {
		send_frame(c->id, type, buffer, n);
		return 1;
	}
	/* EIO: the last holder of a pty's other side is gone. */
	if (n == 0 || (errno != EAGAIN && errno != EINTR))
		close_fd(fd);
	return 0;
}

static void feed(struct command *c)
{
	if (c->in >= 0 && c->input_done < c->input_len) {
		ssize_t n = write(c->in, c->input + c->input_done, c->input_len - c->input_done);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n < 0) { /* EPIPE: the command does not read any more; take the rest and drop it */
			close_fd(&c->in);
			n = c->input_len - c->input_done;
		}
		c->input_done += n;
	}
	if (c->input && (c->in < 0 || c->input_done == c->input_len)) {
		free(c->input);
		c->input = NULL;
		c->input_len = c->input_done = 0;
		send_frame(c->id, STDIN_TAKEN, NULL, 0);
	}
	if (c->input_end && !c->input)
		close_fd(&c->in);
}

static void finish(struct command *c, uint32_t status)
{
	/*
	 * All the command wrote is in its pipes now. Descendants that still hold them may go on for ever, so take what
	 * can be the command's own (a pipe holds 1 MiB at most) and leave.
	 */
	for (int i = 0; i < 128 && c->out >= 0 && forward(c, &c->out, STDOUT); i++)
		;
	for (int i = 0; i < 128 && c->err >= 0 && forward(c, &c->err, STDERR); i++)
		;
	send_frame(c->id, EXIT, &status, 4);
	close_fd(&c->in);
	close_fd(&c->out);
	close_fd(&c->err);
	free(c->input);
	memset(c, 0, sizeof(*c));
}

static void reap(void)
{
	int pid, status;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		for (struct command *c = commands; c < commands + COMMANDS_MAX; c++)
			if (c->pid == pid)
				finish(c, status);
}

/* Says on the command's stderr why it could not be run; 126 as in a shell. */
static void child_fail(const char *what)
{
	dprintf(2, "%s: %s\n", what, strerror(errno));
	_exit(126);
}

static void start(int id, char *payload, uint32_t length)
{
	uint32_t option[5]; /* flags, uid, gid, rows, columns */
	struct command *c = commands;
	int in[2], out[2], err[2] = {-1, -1}, slave = -1;
	char *env[64], *end = payload + length;
	size_t env_count = 0;

	if (length < sizeof(option) + 2 || end[-1] != 0)
		return;
	while (c < commands + COMMANDS_MAX && c->pid)
		c++;
	if (c == commands + COMMANDS_MAX) {
		static const char message[] = "too many commands at a time\n";
		uint32_t status = 125 << 8;
		send_frame(id, STDERR, message, sizeof(message) - 1);
		send_frame(id, EXIT, &status, 4);
		return;
	}
	memcpy(option, payload, sizeof(option));
	char *directory = payload + sizeof(option), *command = directory + strlen(directory) + 1;
	for (char *p = command + strlen(command) + 1; p < end && env_count < 63; p += strlen(p) + 1)
		env[env_count++] = p;
	env[env_count] = NULL;

	if (option[0] & PTY) {
		struct winsize size = {.ws_row = option[3], .ws_col = option[4]};
		out[0] = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
		if (out[0] < 0 || grantpt(out[0]) || unlockpt(out[0]) ||
		    (slave = open(ptsname(out[0]), O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
			fatal("cannot make a pty");
		ioctl(slave, TIOCSWINSZ, &size);
		in[1] = fcntl(out[0], F_DUPFD_CLOEXEC, 3);
		in[0] = out[1] = slave;
	} else if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC)) {
		fatal("cannot make pipes");
	}

	int pid = fork();
	if (pid < 0)
		fatal("cannot fork");
	if (pid == 0) {
		sigprocmask(SIG_SETMASK, &old_mask, NULL);
		signal(SIGPIPE, SIG_DFL);
		setsid();
		dup2(in[0], 0);
		dup2(out[1], 1);
		dup2(slave >= 0 ? slave : err[1], 2);
		if (slave >= 0)
			ioctl(0, TIOCSCTTY, 0);
		gid_t gid = option[2];
		if (option[1] || option[2]) {
			if (setgroups(0, NULL) || setresgid(gid, gid, gid) || setresuid(option[1], option[1], option[1]))
				child_fail("cannot change the user");
		}
		if (chdir(directory))
			child_fail(directory);
		execle("/bin/sh", "sh", "-c", command, (char *)NULL, env);
		child_fail("/bin/sh");
	}
	if (slave >= 0) {
		close(slave);
	} else {
		close(in[0]);
		close(out[1]);
		close(err[1]);
		fcntl(err[0], F_SETFL, O_NONBLOCK);
	}
	fcntl(in[1], F_SETFL, O_NONBLOCK);
	fcntl(out[0], F_SETFL, O_NONBLOCK);
	*c = (struct command){.id = id, .pid = pid, .in = in[1], .out = out[0], .err = err[0]};
}

static void from_host(void)
{
	static char payload[FRAME_MAX];
	unsigned char header[8];
	uint32_t length, value[2] = {0, 0};

	if (!read_all(header, sizeof(header)))
		fatal("the host closed the channel");
	memcpy(&length, header, 4);
	if (length > sizeof(payload) || !read_all(payload, length))
		fatal("bad frame from the host");
	memcpy(value, payload, length < sizeof(value) ? length : sizeof(value));

	int id = header[4] | header[5] << 8;
	struct command *c = find(id);
	switch (header[6]) {
	case EXEC:
		start(id, payload, length);
		break;
	case STDIN:
		if (!c)
			break; /* it ended while the input was on its way; EXIT tells the host */
		if (length == 0) {
			c->input_end = 1;
		} else if (!c->input && (c->input = malloc(length))) {
			memcpy(c->input, payload, length);
			c->input_len = length;
		}
		feed(c);
		break;
	case KILL:
		if (c)
			kill(-c->pid, value[0]);
		break;
	case RESIZE:
		if (c) {
			struct winsize size = {.ws_row = value[0], .ws_col = value[1]};
			ioctl(c->in, TIOCSWINSZ, &size);
		}
		break;
	case POWER:
		reboot(value[0] ? RB_AUTOBOOT : RB_POWER_OFF);
		break;
	}
}

int main(int argc, char **argv)
{
	static struct pollfd polls[2 + 3 * COMMANDS_MAX];
	sigset_t mask;

	if (argc != 3 || (channel = open(argv[1], O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
		fatal("cannot open the channel to the host");
	struct termios tty;
	if (tcgetattr(channel, &tty) == 0) {
		cfmakeraw(&tty);
		tcsetattr(channel, TCSANOW, &tty);
	}

	/* Busybox' poweroff, halt and reboot signal the first process. */
	sigemptyset(&mask);
	sigaddset(&mask, SIGCHLD);
	sigaddset(&mask, SIGUSR1);
	sigaddset(&mask, SIGUSR2);
	sigaddset(&mask, SIGTERM);
	sigprocmask(SIG_BLOCK, &mask, &old_mask);
	signal(SIGPIPE, SIG_IGN);
	int signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0)
		fatal("signalfd");

	for (char *p = argv[2]; *p; p++)
		*p |= 0x80;
	write_all(argv[2], strlen(argv[2]));

	for (;;) {
		int count = 0;
		polls[count++] = (struct pollfd){.fd = channel, .events = POLLIN};
		polls[count++] = (struct pollfd){.fd = signals, .events = POLLIN};
		for (struct command *c = commands; c < commands + COMMANDS_MAX; c++) {
			if (!c->pid)
				continue;
			polls[count++] = (struct pollfd){.fd = c->out, .events = POLLIN};
			polls[count++] = (struct pollfd){.fd = c->err, .events = POLLIN};
			polls[count++] = (struct pollfd){.fd = c->input ? c->in : -1, .events = POLLOUT};
		}
		if (poll(polls, count, -1) < 0 && errno != EINTR)
			fatal("poll");
		/* Slots are walked in the same order as above; nothing has changed them yet. */
		int at = 2;
		for (struct command *c = commands; c < commands + COMMANDS_MAX; c++) {
			if (!c->pid)
				continue;
			if (polls[at++].revents)
				forward(c, &c->out, STDOUT);
			if (polls[at++].revents)
				forward(c, &c->err, STDERR);
			if (polls[at++].revents)
				feed(c);
		}
		if (polls[1].revents) {
			struct signalfd_siginfo info;
			while (read(signals, &info, sizeof(info)) == sizeof(info))
				if (info.ssi_signo != SIGCHLD)
					reboot(info.ssi_signo == SIGTERM ? RB_AUTOBOOT : RB_POWER_OFF);
			reap();
		}
		if (polls[0].revents)
			from_host();
	}
}
