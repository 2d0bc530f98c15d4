/**
 * The control file of the replay agent, as it is on the wire: qemu/guest/agent/agent.h is the other end.
 *
 * A guest whose kernel has no remote fsnotify can still get exact events: an agent in it repeats each change of the host as an
 * ordinary system call on the mount, its requests are answered as if the change had not happened yet, and nothing is done. The
 * guest's own VFS makes the events.
 *
 * The file is `/.virtiofsd-ts-agent/control` of the share. Nothing lists it, and only root can look it up. It is in a directory of its own so
 * that who watches the share's root does not hear of it. One process has it open:
 *  - AUTH (ioctl) with the token; the answer says under which user id (fsuid) the agent's thread has to make its requests;
 *  - WATCH (write): what is watched in the guest, a record per node, the mask absolute as with FUSE_FSNOTIFY;
 *  - read: one notification as a guest kernel gets it (watch/PROTOCOL.md), or LOOK: processes that may watch something now. The
 *    offset is how many milliseconds it may wait, at most {@link READ_WAIT_MS}; an empty answer says "nothing yet". virtio-fs cannot interrupt
 *    a request, so that a longer wait would make the agent unkillable for as long;
 *  - BEGIN (ioctl): the next calls of this thread replay one change; the answer says whether and of what. It ends with the next
 *    BEGIN, and when the file is closed.
 *
 * Little-endian, offsets in bytes.
 */

/** Name of the control file's directory in the root of the share, and the file's own. */
export const CONTROL_DIRECTORY = '.virtiofsd-ts-agent';
export const CONTROL_NAME = 'control';
/** Name of the staging directory, for who has the agent's user id alone: what comes from outside and what leaves is moved from and to it. */
export const STAGING_NAME = '.virtiofsd-ts-staging';

export const CONTROL_VERSION = 1;
export const TOKEN_MAX = 256;
export const READ_WAIT_MS = 1000;

/** Requests: _IOWR(0xf5, 1, 272), _IOWR(0xf5, 2, 560). */
export const AUTH = 0xc110f501;
export const BEGIN = 0xc230f502;

/** AUTH: u32 version; u32 length; token. The answer: u32 version; u32 fsuid. */
export const AuthIn = { version: 0, length: 4, token: 8, bytes: 272 } as const;
export const AuthOut = { version: 0, uid: 4, bytes: 8 } as const;

/** A record of WATCH: u64 nodeid; u32 generation; u32 mask. */
export const WatchIn = { nodeid: 0, generation: 8, mask: 12, bytes: 16 } as const;

/**
 * BEGIN: u32 operation, flags; u64 parent, target (the directory that a rename goes to), child (the object, if known), replaced (what the
 * guest has under the new name, if known); u16 lengths of both names; u32 zero; the names, without NUL.
 */
export const BeginIn = {
  operation: 0,
  flags: 4,
  parent: 8,
  target: 16,
  child: 24,
  replaced: 32,
  nameLength: 40,
  newNameLength: 42,
  name: 48,
  newName: 304,
  bytes: 560,
} as const;
/** The answer: u32 go (0: leave it out); u32 mode of the object (0: not known yet). */
export const BeginOut = { go: 0, mode: 4, bytes: 8 } as const;

export const BEGIN_ISDIR = 1;

/** What is replayed. */
export const Replay = {
  /** Nothing: the last one is over. */
  none: 0,
  /** A name appears: mknod, mkdir, symlink. */
  create: 1,
  /** A name goes: unlink, rmdir. */
  remove: 2,
  /** rename. */
  rename: 3,
  /** Data or attributes changed, or were read: utimensat, fchmodat. */
  change: 4,
  /** open and close. */
  open: 5,
} as const;

/** Code of a LOOK message (fuse_out_header.error): u32 thread ids of processes that made requests lately. */
export const NOTIFY_LOOK = 129;
/** Thread ids in a LOOK at most. */
export const LOOK_MAX = 64;
