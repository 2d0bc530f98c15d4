/**
 * The contract between the FUSE server (`src/fuse/`) and a file system: the operations in the vocabulary of system calls.
 *
 * Conventions, the same for every method:
 *  - the result is 0 or a count (≥ 0), or `-errno`; nothing throws for what a guest or the host did;
 *  - names, values and link targets are arena offsets of bytes that the decoder has copied out of guest memory and checked
 *    (NUL-terminated; a `name` has 1 to 255 bytes, no '/', and is not "." or ".." except in {@link FileSystem.lookup});
 *  - results that are more than a number lie in the objects `entry` and `opened` and in the arena structures `attr` and
 *    `statfsBuffer` until the next call;
 *  - `nodeid` and `fh` come from the guest unchecked: each method looks them up and answers -ENOENT (-ESTALE) or -EBADF;
 *  - a method that would block starts a job on the offload threads and returns {@link PENDING}; see {@link FileSystem.completed}.
 */

/** "Not yet": the operation goes on in an offload job (`Offload.lastJob`); its result comes later. Larger than any count or length. */
export const PENDING = 0x4000_0000;

/** "Not yet, and no job": who has returned it keeps the chain and answers it. As large. */
export const KEPT = 0x4000_0001;

/** No file handle was given with the request. */
export const NO_FH = -1;

/** Who asks: filled by the FUSE server before each call. */
export interface Caller {
  /** fuse_in_header.uid and gid as the guest sent them (before `--translate-uid`). */
  uid: number;
  gid: number;
  pid: number;
  /** Supplementary group that the new object's directory needs (FUSE_CREATE_SUPP_GROUP), or -1. */
  supplementaryGid: number;
  /** Security contexts to set on a new object (FUSE_SECURITY_CTX): arena offset and length of the first fuse_secctx, or 0. */
  securityContexts: number;
  securityContextCount: number;
  securityContextBytes: number;
}

/** What LOOKUP, MKNOD, MKDIR, SYMLINK, LINK, CREATE, TMPFILE and READDIRPLUS say of an object; attributes are in `attr`. */
export interface Entry {
  nodeid: number;
  generation: number;
  /** FUSE_ATTR_* flags (FUSE_ATTR_SUBMOUNT 1). */
  attrFlags: number;
  /** The guest shall keep neither the name nor the attributes. */
  volatile: boolean;
}

/** What OPEN, OPENDIR and CREATE say. */
export interface Opened {
  fh: number;
  /** FOPEN_* flags. */
  openFlags: number;
}

/** SETATTR: `valid` is the FATTR_* mask; the other fields count where their bit is set. */
export interface SetAttr {
  valid: number;
  fh: number;
  mode: number;
  uid: number;
  gid: number;
  size: number;
  /** Seconds (signed, exact to 2^53) and nanoseconds. */
  atime: number;
  atimeNsec: number;
  mtime: number;
  mtimeNsec: number;
  ctime: number;
  ctimeNsec: number;
}

/**
 * GETLK, SETLK, SETLKW. Numbers of 64 bits come in two halves, as locks lie anywhere up to 2^63 - 1 (the last byte, and the end of
 * the file wherever it is).
 */
export interface Lock {
  /** Who holds it: a number of the guest's own. */
  ownerLow: number;
  ownerHigh: number;
  /** First and last byte. */
  startLow: number;
  startHigh: number;
  endLow: number;
  endHigh: number;
  /** F_RDLCK 0, F_WRLCK 1, F_UNLCK 2. */
  type: number;
  pid: number;
  /** By flock(2): of the open file, not of the owner, and of all of it. */
  flock: boolean;
  /** The request, as INTERRUPT names it. */
  uniqueLow: number;
  uniqueHigh: number;
}

/** Takes directory entries one by one; knows the space left in the guest's buffer. */
export interface DirectorySink {
  /**
   * One entry of READDIR: name bytes at arena `name`, `ino` in two halves, `type` DT_*, the position after it in two halves
   * (a hash of 63 bits on ext4: no number holds it).
   * @returns false when it does not fit any more (it was not taken).
   */
  add(name: number, nameLength: number, inoLow: number, inoHigh: number, type: number, offsetLow: number, offsetHigh: number): boolean;
  /** Whether an entry with a name of this length still fits: asked before the look-up that READDIRPLUS costs. */
  fits(nameLength: number): boolean;
  /** One entry of READDIRPLUS: as add, with `entry` and `attr` filled by the file system; nodeid 0: attributes not known. */
  addPlus(
    name: number,
    nameLength: number,
    inoLow: number,
    inoHigh: number,
    type: number,
    offsetLow: number,
    offsetHigh: number,
    known: boolean,
  ): boolean;
}

/** What FUSE_INIT agreed on that the file system must know. */
export interface SessionOptions {
  /** Guest applies the umask itself? With FUSE_DONT_MASK it does not, and create-type calls carry it. */
  dontMask: boolean;
  posixAcl: boolean;
  /** The guest's VFS has taken S_ISGID from modes where its caller may not set it (Linux 6.0 and later): it is not judged again. */
  stripsSetgid: boolean;
  /** FUSE_HANDLE_KILLPRIV_V2. */
  killPrivV2: boolean;
  writebackCache: boolean;
  /** FUSE_SUBMOUNTS and --announce-submounts. */
  submounts: boolean;
  /** FUSE_ATOMIC_O_TRUNC. */
  atomicOTrunc: boolean;
  /** FUSE_SECURITY_CTX. */
  securityContext: boolean;
  /** FUSE_EXPORT_SUPPORT: LOOKUP "." may name an inode that the guest has forgotten since. */
  exportSupport: boolean;
  /** FUSE_AUTO_INVAL_DATA: the guest drops what it has of a file whose times or size are others. */
  autoInvalData: boolean;
  /** FUSE_POSIX_LOCKS and FUSE_FLOCK_LOCKS. */
  posixLock: boolean;
  flock: boolean;
}

/** A file system as the FUSE server sees it. */
export interface FileSystem {
  readonly caller: Caller;
  readonly entry: Entry;
  readonly opened: Opened;
  /** Arena offset of a `struct statx` (256 bytes): attributes of the last entry or getattr, ids already translated for the guest. */
  readonly attr: number;
  /** Arena offset of a `struct statfs` (120 bytes): the last statfs. */
  readonly statfsBuffer: number;

  /** A session begins (FUSE_INIT). */
  init(session: SessionOptions): void;
  /** A session goes on that an earlier process has begun: nodeids and file handles are those of before. */
  resume(session: SessionOptions): void;
  /** The session ends (DESTROY, a second INIT, device reset, client gone): all nodeids but the root and all file handles go. */
  destroy(): void;

  /**
   * LOOKUP. `name` may be "." (then `parent` may be of any type) or "..", for export support; ".." of the root is the root. On
   * success nlookup grows by one.
   */
  lookup(parent: number, name: number, nameLength: number): number;
  forget(nodeid: number, nlookup: number): void;
  /** GETATTR and STATX: `attr` gets everything in `mask` (STATX_*); with mask and flags 0 what fstat(2) tells. `fh` may be NO_FH. */
  getattr(nodeid: number, fh: number, statxFlags: number, mask: number): number;
  setattr(nodeid: number, change: SetAttr): number;
  /** READLINK to arena offset `out`; returns the length. */
  readlink(nodeid: number, out: number, size: number): number;
  symlink(parent: number, name: number, target: number): number;
  mknod(parent: number, name: number, mode: number, umask: number, rdev: number): number;
  mkdir(parent: number, name: number, mode: number, umask: number): number;
  unlink(parent: number, name: number): number;
  rmdir(parent: number, name: number): number;
  /** RENAME2 flags: RENAME_NOREPLACE 1, RENAME_EXCHANGE 2, RENAME_WHITEOUT 4. */
  rename(parent: number, name: number, newParent: number, newName: number, flags: number): number;
  link(nodeid: number, newParent: number, newName: number): number;
  /** OPEN; `killPriv`: FUSE_OPEN_KILL_SUIDGID (with O_TRUNC). */
  open(nodeid: number, flags: number, killPriv: boolean): number;
  create(parent: number, name: number, flags: number, mode: number, umask: number, killPriv: boolean): number;
  /** TMPFILE: an unnamed file in directory `parent`, opened. */
  tmpfile(parent: number, flags: number, mode: number, umask: number): number;
  /** READ into `count` iovecs after their first `skip` bytes (the reply header's place). Returns the bytes read, or PENDING. */
  read(nodeid: number, fh: number, offset: number, size: number, iov: number, count: number, skip: number): number;
  /**
   * WRITE from `count` iovecs after their first `skip` bytes; `writeFlags`: FUSE_WRITE_*, and O_APPEND (0x400) when
   * fuse_write_in.flags has it. Returns the bytes written, or PENDING.
   */
  write(nodeid: number, fh: number, offset: number, size: number, writeFlags: number, iov: number, count: number, skip: number): number;
  flush(nodeid: number, fh: number): number;
  release(nodeid: number, fh: number): number;
  fsync(nodeid: number, fh: number, dataOnly: boolean): number;
  opendir(nodeid: number, flags: number): number;
  /** READDIR (`plus` false) or READDIRPLUS from a position (0, or one that an entry came with); `size` is the room in bytes. Every entry goes to `sink`. */
  readdir(nodeid: number, fh: number, offsetLow: number, offsetHigh: number, size: number, sink: DirectorySink, plus: boolean): number;
  releasedir(nodeid: number, fh: number): number;
  fsyncdir(nodeid: number, fh: number, dataOnly: boolean): number;
  statfs(nodeid: number): number;
  access(nodeid: number, mask: number): number;
  /** GETXATTR and LISTXATTR: size 0 asks for the length. Values go to arena offset `out`. */
  getxattr(nodeid: number, name: number, out: number, size: number): number;
  /** `extraFlags`: FUSE_SETXATTR_ACL_KILL_SGID 1 (with SETXATTR_EXT). */
  setxattr(nodeid: number, name: number, value: number, size: number, flags: number, extraFlags: number): number;
  listxattr(nodeid: number, out: number, size: number): number;
  removexattr(nodeid: number, name: number): number;
  fallocate(nodeid: number, fh: number, offset: number, length: number, mode: number): number;
  /** LSEEK with SEEK_DATA or SEEK_HOLE (others too); returns the position, never PENDING (a position can be that number). */
  lseek(nodeid: number, fh: number, offset: number, whence: number): number;
  copyFileRange(fhIn: number, offsetIn: number, nodeidOut: number, fhOut: number, offsetOut: number, length: number): number;
  /** IOCTL on an open file: `input` bytes at arena `data`; the result overwrites them; returns the output length. */
  ioctl(nodeid: number, fh: number, command: number, data: number, inputSize: number, outputSize: number): number;
  syncfs(nodeid: number): number;
  /** GETLK: `lock` becomes the lock that is in the way, or of type F_UNLCK. */
  getlk(nodeid: number, fh: number, lock: Lock): number;
  /** SETLK; SETLKW where `wait` is set: then PENDING until the lock is free, and -EINTR after {@link interrupt}. */
  setlk(nodeid: number, fh: number, lock: Lock, wait: boolean): number;
  /** After FLUSH: an owner has closed a descriptor of the file, and so lost all its locks on it but those by flock(2). */
  unlockOwner(nodeid: number, ownerLow: number, ownerHigh: number): void;
  /** INTERRUPT of the request with this number; no matter when none of them waits. */
  interrupt(uniqueLow: number, uniqueHigh: number): void;
  /** What waits for a lock ends with -EAGAIN: its queue stops. */
  cancelWaits(): void;

  /** An offload job of this file system ended: lets go of what it held (file handles in use). Called before its reply. */
  completed(job: number): void;
}
