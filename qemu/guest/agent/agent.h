/* SPDX-License-Identifier: Apache-2.0 */
/* The replay agent: what its files share. The control file's format is that of src/replay/abi.ts. */
#ifndef AGENT_H
#define AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/types.h>

#define CONTROL_NAME ".virtiofsd-ts-agent/control"
#define STAGING_NAME ".virtiofsd-ts-staging"

enum { CONTROL_VERSION = 1, TOKEN_MAX = 256, READ_WAIT_MS = 1000, MESSAGE_MAX = 4096 };

union auth {
	struct {
		uint32_t version, length;
		char token[264];
	} in;
	struct {
		uint32_t version, uid;
	} out;
};

union begin {
	struct {
		uint32_t operation, flags;
		uint64_t parent, target, child, replaced;
		uint16_t name_len, new_name_len;
		uint32_t zero;
		char name[256], new_name[256];
	} in;
	struct {
		uint32_t go, mode;
	} out;
};

struct watch_in {
	uint64_t nodeid;
	uint32_t generation, mask;
};

#define CONTROL_AUTH _IOWR(0xf5, 1, union auth)
#define CONTROL_BEGIN _IOWR(0xf5, 2, union begin)

_Static_assert(sizeof(union auth) == 272, "AUTH");
_Static_assert(sizeof(union begin) == 560, "BEGIN");
_Static_assert(sizeof(struct watch_in) == 16, "WATCH");

enum { BEGIN_ISDIR = 1 };
enum operation { OP_NONE, OP_CREATE, OP_REMOVE, OP_RENAME, OP_CHANGE, OP_OPEN };

/* Notifications (src/watch/PROTOCOL.md): all begin with struct message. */
enum { NOTIFY_DELETE = 6, NOTIFY_FSNOTIFY = 128, NOTIFY_LOOK = 129 };
enum { RECORD_OVERFLOW = 1, RECORD_PAIRED = 2 };

struct message {
	uint32_t len;
	int32_t code;
	uint64_t unique;
};

struct record {
	uint32_t reclen, flags;
	uint64_t nodeid, child, mask;
	uint32_t generation, child_generation, cookie, namelen;
	char name[];
};

struct delete_out {
	uint64_t parent, child;
	uint32_t namelen, padding;
	char name[];
};

#define FS_ACCESS 0x1u
#define FS_MODIFY 0x2u
#define FS_ATTRIB 0x4u
#define FS_CLOSE_WRITE 0x8u
#define FS_CLOSE_NOWRITE 0x10u
#define FS_OPEN 0x20u
#define FS_MOVED_FROM 0x40u
#define FS_MOVED_TO 0x80u
#define FS_CREATE 0x100u
#define FS_DELETE 0x200u
#define FS_DELETE_SELF 0x400u
#define FS_MOVE_SELF 0x800u
#define FS_EVENT_ON_CHILD 0x08000000u
#define FS_ISDIR 0x40000000u

/* main.c */
extern int control, staging, root;
extern dev_t device;
extern bool verbose;
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Milliseconds of the monotonic clock. */
double now_ms(void);
/* An O_PATH descriptor of an inode that the kernel has in its cache, by its number in FUSE; -1 with errno. */
int open_node(uint64_t nodeid, uint32_t generation);
/*
 * Whether what is open is a directory, as far as the kernel knows. It must not ask the daemon, which would say that a removed file has no link
 * any more: the file would end before that is replayed.
 */
bool is_directory(int fd);
/* The number in FUSE of what is open, 0 when it is not on the mount (on another one of the same share, or below a mount point). */
uint64_t node_of(int fd);

/* watches.c */
/* A descriptor of a directory, which is held; -1: the kernel does not know it, or it is none. */
int directory_fd(uint64_t nodeid, uint32_t generation);
/* Closes it: the directory is about to end. */
void release_fd(uint64_t nodeid);
/* Whether the directory that a watched object is in is watched, too, with this event of what is in it. */
bool watched_within(uint64_t nodeid, uint32_t bit);
/* The name that a watched object was found by, and the directory it is in; NULL if it is not known. */
const char *watched_name(uint64_t nodeid, uint64_t *parent);
/* The watched object that has this name, 0 if there is none; and what happens to names. */
uint64_t watched_at(uint64_t parent, const char *name, size_t length);
void watched_moved(uint64_t nodeid, uint64_t parent, const char *name, size_t length);
void watched_gone(uint64_t nodeid);
/* Processes that may watch something now. */
void look_at(const uint32_t *pids, size_t count);
/* Looks at what is due. Returns milliseconds until something is due again, or -1: the connection is lost. */
int discover(void);
/* Forgets everything: a new session. */
void forget_watches(void);

/* mounts.c */
/* Nothing is replayed for now. */
void mounts_rest(void);
/* Whether a name (NULL: what is open) is a mount point in some namespace; `or_above`: or a directory with one below it. */
bool is_mount_point(int fd, const char *name, size_t length, bool or_above);

/* replay.c */
/* Replays a notification of `length` bytes. -1: the connection is lost. */
int replay(const char *message, size_t length);
/* Nothing has followed what was held back. */
int replay_rest(void);
bool something_held_back(void);
/* A new session. */
void forget_replays(void);
extern unsigned long replayed, failed;

#endif
