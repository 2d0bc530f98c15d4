/**
 * The FUSE kernel ABI, version 7.45 (Linux 7.2, include/uapi/linux/fuse.h), and this project's own extension: numbers and
 * layouts only. A structure is an object of byte offsets with its size as `bytes`; u64 fields are read as two halves.
 */

export const FUSE_KERNEL_VERSION = 7;
export const FUSE_KERNEL_MINOR_VERSION = 45;
/**
 * The oldest minor version spoken: Linux 5.4's, the first kernel with a virtio-fs driver. What older ones need (compat sizes of
 * structures below) no virtio-fs guest can ask for.
 */
export const FUSE_MINIMUM_MINOR_VERSION = 31;

export const FUSE_ROOT_ID = 1;

/** enum fuse_opcode. */
export const Opcode = {
  LOOKUP: 1,
  FORGET: 2,
  GETATTR: 3,
  SETATTR: 4,
  READLINK: 5,
  SYMLINK: 6,
  MKNOD: 8,
  MKDIR: 9,
  UNLINK: 10,
  RMDIR: 11,
  RENAME: 12,
  LINK: 13,
  OPEN: 14,
  READ: 15,
  WRITE: 16,
  STATFS: 17,
  RELEASE: 18,
  FSYNC: 20,
  SETXATTR: 21,
  GETXATTR: 22,
  LISTXATTR: 23,
  REMOVEXATTR: 24,
  FLUSH: 25,
  INIT: 26,
  OPENDIR: 27,
  READDIR: 28,
  RELEASEDIR: 29,
  FSYNCDIR: 30,
  GETLK: 31,
  SETLK: 32,
  SETLKW: 33,
  ACCESS: 34,
  CREATE: 35,
  INTERRUPT: 36,
  BMAP: 37,
  DESTROY: 38,
  IOCTL: 39,
  POLL: 40,
  NOTIFY_REPLY: 41,
  BATCH_FORGET: 42,
  FALLOCATE: 43,
  READDIRPLUS: 44,
  RENAME2: 45,
  LSEEK: 46,
  COPY_FILE_RANGE: 47,
  SETUPMAPPING: 48,
  REMOVEMAPPING: 49,
  SYNCFS: 50,
  TMPFILE: 51,
  STATX: 52,
  COPY_FILE_RANGE_64: 53,
  /** Ours: set the watch of a nodeid. */
  FSNOTIFY: 2048,
  /** Ours: lend one buffer for a notification. */
  READ_NOTIFY: 2049,
} as const;

/** enum fuse_notify_code: `error` of a fuse_out_header whose `unique` is 0. */
export const NotifyCode = {
  POLL: 1,
  INVAL_INODE: 2,
  INVAL_ENTRY: 3,
  STORE: 4,
  RETRIEVE: 5,
  DELETE: 6,
  RESEND: 7,
  INC_EPOCH: 8,
  PRUNE: 9,
  /** Ours: event records. */
  FSNOTIFY: 128,
} as const;

/** FUSE_INIT flags 0 to 31 (`flags`). */
export const InitFlag = {
  ASYNC_READ: 1 << 0,
  POSIX_LOCKS: 1 << 1,
  FILE_OPS: 1 << 2,
  ATOMIC_O_TRUNC: 1 << 3,
  EXPORT_SUPPORT: 1 << 4,
  BIG_WRITES: 1 << 5,
  DONT_MASK: 1 << 6,
  SPLICE_WRITE: 1 << 7,
  SPLICE_MOVE: 1 << 8,
  SPLICE_READ: 1 << 9,
  FLOCK_LOCKS: 1 << 10,
  HAS_IOCTL_DIR: 1 << 11,
  AUTO_INVAL_DATA: 1 << 12,
  DO_READDIRPLUS: 1 << 13,
  READDIRPLUS_AUTO: 1 << 14,
  ASYNC_DIO: 1 << 15,
  WRITEBACK_CACHE: 1 << 16,
  NO_OPEN_SUPPORT: 1 << 17,
  PARALLEL_DIROPS: 1 << 18,
  HANDLE_KILLPRIV: 1 << 19,
  POSIX_ACL: 1 << 20,
  ABORT_ERROR: 1 << 21,
  MAX_PAGES: 1 << 22,
  CACHE_SYMLINKS: 1 << 23,
  NO_OPENDIR_SUPPORT: 1 << 24,
  EXPLICIT_INVAL_DATA: 1 << 25,
  MAP_ALIGNMENT: 1 << 26,
  SUBMOUNTS: 1 << 27,
  HANDLE_KILLPRIV_V2: 1 << 28,
  SETXATTR_EXT: 1 << 29,
  INIT_EXT: 1 << 30,
} as const;

/** FUSE_INIT flags 32 to 63, as bits of `flags2`. */
export const InitFlag2 = {
  SECURITY_CTX: 1 << 0,
  HAS_INODE_DAX: 1 << 1,
  CREATE_SUPP_GROUP: 1 << 2,
  HAS_EXPIRE_ONLY: 1 << 3,
  DIRECT_IO_ALLOW_MMAP: 1 << 4,
  PASSTHROUGH: 1 << 5,
  NO_EXPORT_SUPPORT: 1 << 6,
  HAS_RESEND: 1 << 7,
  ALLOW_IDMAP: 1 << 8,
  OVER_IO_URING: 1 << 9,
  REQUEST_TIMEOUT: 1 << 10,
  /** Ours: FUSE_HAS_FSNOTIFY, bit 60. */
  HAS_FSNOTIFY: 1 << 28,
} as const;

/** FATTR_*: fuse_setattr_in.valid. */
export const SetattrValid = {
  MODE: 1 << 0,
  UID: 1 << 1,
  GID: 1 << 2,
  SIZE: 1 << 3,
  ATIME: 1 << 4,
  MTIME: 1 << 5,
  FH: 1 << 6,
  ATIME_NOW: 1 << 7,
  MTIME_NOW: 1 << 8,
  LOCKOWNER: 1 << 9,
  CTIME: 1 << 10,
  KILL_SUIDGID: 1 << 11,
} as const;

/** FOPEN_*: fuse_open_out.open_flags. */
export const OpenOutFlag = {
  DIRECT_IO: 1 << 0,
  KEEP_CACHE: 1 << 1,
  NONSEEKABLE: 1 << 2,
  CACHE_DIR: 1 << 3,
  STREAM: 1 << 4,
  NOFLUSH: 1 << 5,
  PARALLEL_DIRECT_WRITES: 1 << 6,
  PASSTHROUGH: 1 << 7,
} as const;

/** FUSE_GETATTR_FH: fuse_getattr_in.getattr_flags. */
export const GETATTR_FH = 1 << 0;
/** FUSE_OPEN_KILL_SUIDGID: fuse_open_in.open_flags and fuse_create_in.open_flags. */
export const OPEN_KILL_SUIDGID = 1 << 0;
/** FUSE_FSYNC_FDATASYNC: fuse_fsync_in.fsync_flags. */
export const FSYNC_FDATASYNC = 1 << 0;
/** FUSE_WRITE_*: fuse_write_in.write_flags. */
export const WriteFlag = { CACHE: 1 << 0, LOCKOWNER: 1 << 1, KILL_SUIDGID: 1 << 2 } as const;
/** FUSE_ATTR_*: fuse_attr.flags. */
export const AttrFlag = { SUBMOUNT: 1 << 0, DAX: 1 << 1 } as const;
/** FUSE_EXPIRE_ONLY: fuse_notify_inval_entry_out.flags. */
export const INVAL_ENTRY_EXPIRE_ONLY = 1 << 0;
/** FUSE_IOCTL_*: fuse_ioctl_in.flags. */
export const IoctlFlag = {
  COMPAT: 1 << 0,
  UNRESTRICTED: 1 << 1,
  RETRY: 1 << 2,
  IOCTL_32BIT: 1 << 3,
  DIR: 1 << 4,
  COMPAT_X32: 1 << 5,
} as const;

/** enum fuse_ext_type: 0 to 31 is the number of contexts in a fuse_secctx_header. */
export const EXT_MAX_SECCTX = 31;
export const EXT_GROUPS = 32;

/** struct fuse_in_header { u32 len; u32 opcode; u64 unique; u64 nodeid; u32 uid; u32 gid; u32 pid; u16 total_extlen; u16 padding; } */
export const InHeader = { len: 0, opcode: 4, unique: 8, nodeid: 16, uid: 24, gid: 28, pid: 32, totalExtlen: 36, bytes: 40 } as const;

/** struct fuse_out_header { u32 len; s32 error; u64 unique; } */
export const OutHeader = { len: 0, error: 4, unique: 8, bytes: 16 } as const;

/**
 * struct fuse_attr { u64 ino; u64 size; u64 blocks; u64 atime; u64 mtime; u64 ctime; u32 atimensec; u32 mtimensec; u32 ctimensec;
 *   u32 mode; u32 nlink; u32 uid; u32 gid; u32 rdev; u32 blksize; u32 flags; }
 */
export const Attr = {
  ino: 0,
  size: 8,
  blocks: 16,
  atime: 24,
  mtime: 32,
  ctime: 40,
  atimensec: 48,
  mtimensec: 52,
  ctimensec: 56,
  mode: 60,
  nlink: 64,
  uid: 68,
  gid: 72,
  rdev: 76,
  blksize: 80,
  flags: 84,
  bytes: 88,
} as const;

/**
 * struct fuse_entry_out { u64 nodeid; u64 generation; u64 entry_valid; u64 attr_valid; u32 entry_valid_nsec; u32 attr_valid_nsec;
 *   struct fuse_attr attr; }
 */
export const EntryOut = {
  nodeid: 0,
  generation: 8,
  entryValid: 16,
  attrValid: 24,
  entryValidNsec: 32,
  attrValidNsec: 36,
  attr: 40,
  bytes: 128,
} as const;

/** struct fuse_forget_in { u64 nlookup; } */
export const ForgetIn = { nlookup: 0, bytes: 8 } as const;
/** struct fuse_forget_one { u64 nodeid; u64 nlookup; } */
export const ForgetOne = { nodeid: 0, nlookup: 8, bytes: 16 } as const;
/** struct fuse_batch_forget_in { u32 count; u32 dummy; }, then `count` fuse_forget_one */
export const BatchForgetIn = { count: 0, bytes: 8 } as const;

/** struct fuse_getattr_in { u32 getattr_flags; u32 dummy; u64 fh; } */
export const GetattrIn = { flags: 0, fh: 8, bytes: 16 } as const;
/** struct fuse_attr_out { u64 attr_valid; u32 attr_valid_nsec; u32 dummy; struct fuse_attr attr; } */
export const AttrOut = { attrValid: 0, attrValidNsec: 8, dummy: 12, attr: 16, bytes: 104 } as const;

/** struct fuse_statx_in { u32 getattr_flags; u32 reserved; u64 fh; u32 sx_flags; u32 sx_mask; } */
export const StatxIn = { flags: 0, fh: 8, sxFlags: 16, sxMask: 20, bytes: 24 } as const;
/** struct fuse_statx_out { u64 attr_valid; u32 attr_valid_nsec; u32 flags; u64 spare[2]; struct fuse_statx stat; } */
export const StatxOut = { attrValid: 0, attrValidNsec: 8, flags: 12, spare: 16, stat: 32, bytes: 288 } as const;

/**
 * struct statx of the host (linux/stat.h), 256 bytes; struct fuse_statx is the same up to dev_minor.
 * { u32 mask; u32 blksize; u64 attributes; u32 nlink; u32 uid; u32 gid; u16 mode; u16 spare; u64 ino; u64 size; u64 blocks;
 *   u64 attributes_mask; struct { s64 sec; u32 nsec; s32 reserved; } atime, btime, ctime, mtime;
 *   u32 rdev_major; u32 rdev_minor; u32 dev_major; u32 dev_minor; … }
 */
export const Statx = {
  mask: 0,
  blksize: 4,
  attributes: 8,
  nlink: 16,
  uid: 20,
  gid: 24,
  mode: 28,
  ino: 32,
  size: 40,
  blocks: 48,
  attributesMask: 56,
  atime: 64,
  btime: 80,
  ctime: 96,
  mtime: 112,
  rdevMajor: 128,
  rdevMinor: 132,
  devMajor: 136,
  devMinor: 140,
  bytes: 256,
} as const;
/** Offset of the nanoseconds in a statx timestamp. */
export const STATX_NSEC = 8;
export const STATX_BASIC_STATS = 0x7ff;
export const STATX_BTIME = 0x800;
/** AT_STATX_FORCE_SYNC and AT_STATX_DONT_SYNC. */
export const AT_STATX_SYNC_TYPE = 0x6000;

/** struct fuse_mknod_in { u32 mode; u32 rdev; u32 umask; u32 padding; }, then the name */
export const MknodIn = { mode: 0, rdev: 4, umask: 8, bytes: 16 } as const;
/** struct fuse_mkdir_in { u32 mode; u32 umask; }, then the name */
export const MkdirIn = { mode: 0, umask: 4, bytes: 8 } as const;
/** struct fuse_rename_in { u64 newdir; }, then the old and the new name */
export const RenameIn = { newdir: 0, bytes: 8 } as const;
/** struct fuse_rename2_in { u64 newdir; u32 flags; u32 padding; }, then the old and the new name */
export const Rename2In = { newdir: 0, flags: 8, bytes: 16 } as const;
/** struct fuse_link_in { u64 oldnodeid; }, then the new name */
export const LinkIn = { oldnodeid: 0, bytes: 8 } as const;

/**
 * struct fuse_setattr_in { u32 valid; u32 padding; u64 fh; u64 size; u64 lock_owner; u64 atime; u64 mtime; u64 ctime; u32 atimensec;
 *   u32 mtimensec; u32 ctimensec; u32 mode; u32 unused4; u32 uid; u32 gid; u32 unused5; }
 */
export const SetattrIn = {
  valid: 0,
  fh: 8,
  size: 16,
  lockOwner: 24,
  atime: 32,
  mtime: 40,
  ctime: 48,
  atimensec: 56,
  mtimensec: 60,
  ctimensec: 64,
  mode: 68,
  uid: 76,
  gid: 80,
  bytes: 88,
} as const;

/** struct fuse_open_in { u32 flags; u32 open_flags; } */
export const OpenIn = { flags: 0, openFlags: 4, bytes: 8 } as const;
/** struct fuse_create_in { u32 flags; u32 mode; u32 umask; u32 open_flags; }, then the name; TMPFILE too */
export const CreateIn = { flags: 0, mode: 4, umask: 8, openFlags: 12, bytes: 16 } as const;
/** struct fuse_open_out { u64 fh; u32 open_flags; s32 backing_id; } */
export const OpenOut = { fh: 0, openFlags: 8, backingId: 12, bytes: 16 } as const;

/** struct fuse_release_in { u64 fh; u32 flags; u32 release_flags; u64 lock_owner; } */
export const ReleaseIn = { fh: 0, flags: 8, releaseFlags: 12, lockOwner: 16, bytes: 24 } as const;
/** struct fuse_flush_in { u64 fh; u32 unused; u32 padding; u64 lock_owner; } */
export const FlushIn = { fh: 0, lockOwner: 16, bytes: 24 } as const;
/** struct fuse_read_in { u64 fh; u64 offset; u32 size; u32 read_flags; u64 lock_owner; u32 flags; u32 padding; }; READDIR(PLUS) too */
export const ReadIn = { fh: 0, offset: 8, size: 16, readFlags: 20, lockOwner: 24, flags: 32, bytes: 40 } as const;
/** struct fuse_write_in { u64 fh; u64 offset; u32 size; u32 write_flags; u64 lock_owner; u32 flags; u32 padding; }, then the data */
export const WriteIn = { fh: 0, offset: 8, size: 16, writeFlags: 20, lockOwner: 24, flags: 32, bytes: 40 } as const;
/** struct fuse_write_out { u32 size; u32 padding; } */
export const WriteOut = { size: 0, padding: 4, bytes: 8 } as const;
/** struct fuse_fsync_in { u64 fh; u32 fsync_flags; u32 padding; } */
export const FsyncIn = { fh: 0, flags: 8, bytes: 16 } as const;

/**
 * struct fuse_kstatfs { u64 blocks; u64 bfree; u64 bavail; u64 files; u64 ffree; u32 bsize; u32 namelen; u32 frsize; u32 padding;
 *   u32 spare[6]; }
 */
export const StatfsOut = { blocks: 0, bfree: 8, bavail: 16, files: 24, ffree: 32, bsize: 40, namelen: 44, frsize: 48, bytes: 80 } as const;
/** struct statfs of the host (64-bit): all fields of 8 bytes. */
export const Statfs = { bsize: 8, blocks: 16, bfree: 24, bavail: 32, files: 40, ffree: 48, namelen: 64, frsize: 72, bytes: 120 } as const;

/**
 * struct fuse_setxattr_in { u32 size; u32 flags; u32 setxattr_flags; u32 padding; }, then name and value; without
 * FUSE_SETXATTR_EXT only its first 8 bytes (FUSE_COMPAT_SETXATTR_IN_SIZE)
 */
export const SetxattrIn = { size: 0, flags: 4, setxattrFlags: 8, compatBytes: 8, bytes: 16 } as const;
/** struct fuse_getxattr_in { u32 size; u32 padding; }, then the name (GETXATTR) or nothing (LISTXATTR) */
export const GetxattrIn = { size: 0, bytes: 8 } as const;
/** struct fuse_getxattr_out { u32 size; u32 padding; }: the reply when size 0 was asked */
export const GetxattrOut = { size: 0, padding: 4, bytes: 8 } as const;

/** struct fuse_lk_in { u64 fh; u64 owner; struct { u64 start; u64 end; u32 type; u32 pid; } lk; u32 lk_flags; u32 padding; } */
export const LkIn = { fh: 0, owner: 8, start: 16, end: 24, type: 32, pid: 36, flags: 40, bytes: 48 } as const;
/** struct fuse_lk_out { struct { u64 start; u64 end; u32 type; u32 pid; } lk; } */
export const LkOut = { start: 0, end: 8, type: 16, pid: 20, bytes: 24 } as const;
/** fuse_lk_in.lk_flags: FUSE_LK_FLOCK. */
export const LK_FLOCK = 1;
/** struct fuse_access_in { u32 mask; u32 padding; } */
export const AccessIn = { mask: 0, bytes: 8 } as const;
/** struct fuse_interrupt_in { u64 unique; } */
export const InterruptIn = { unique: 0, bytes: 8 } as const;
/** struct fuse_bmap_in { u64 block; u32 blocksize; u32 padding; } */
export const BmapIn = { block: 0, blocksize: 8, bytes: 16 } as const;
/** struct fuse_ioctl_in { u64 fh; u32 flags; u32 cmd; u64 arg; u32 in_size; u32 out_size; }, then in_size bytes */
export const IoctlIn = { fh: 0, flags: 8, cmd: 12, arg: 16, inSize: 24, outSize: 28, bytes: 32 } as const;
/** struct fuse_ioctl_out { s32 result; u32 flags; u32 in_iovs; u32 out_iovs; }, then at most out_size bytes */
export const IoctlOut = { result: 0, flags: 4, inIovs: 8, outIovs: 12, bytes: 16 } as const;
/** struct fuse_poll_in { u64 fh; u64 kh; u32 flags; u32 events; } */
export const PollIn = { fh: 0, kh: 8, flags: 16, events: 20, bytes: 24 } as const;
/** struct fuse_fallocate_in { u64 fh; u64 offset; u64 length; u32 mode; u32 padding; } */
export const FallocateIn = { fh: 0, offset: 8, length: 16, mode: 24, bytes: 32 } as const;
/** struct fuse_lseek_in { u64 fh; u64 offset; u32 whence; u32 padding; } */
export const LseekIn = { fh: 0, offset: 8, whence: 16, bytes: 24 } as const;
/** struct fuse_lseek_out { u64 offset; } */
export const LseekOut = { offset: 0, bytes: 8 } as const;
/** struct fuse_copy_file_range_in { u64 fh_in; u64 off_in; u64 nodeid_out; u64 fh_out; u64 off_out; u64 len; u64 flags; } */
export const CopyFileRangeIn = { fhIn: 0, offIn: 8, nodeidOut: 16, fhOut: 24, offOut: 32, len: 40, flags: 48, bytes: 56 } as const;
/** struct fuse_copy_file_range_out { u64 bytes_copied; }: the reply of COPY_FILE_RANGE_64; COPY_FILE_RANGE has fuse_write_out */
export const CopyFileRangeOut = { bytesCopied: 0, bytes: 8 } as const;
/** struct fuse_setupmapping_in { u64 fh; u64 foffset; u64 len; u64 flags; u64 moffset; } */
export const SetupmappingIn = { bytes: 40 } as const;
/** struct fuse_removemapping_in { u32 count; } */
export const RemovemappingIn = { count: 0, bytes: 4 } as const;
/** struct fuse_syncfs_in { u64 padding; } */
export const SyncfsIn = { bytes: 8 } as const;

/** struct fuse_init_in { u32 major; u32 minor; u32 max_readahead; u32 flags; u32 flags2; u32 unused[11]; }; 16 bytes before 7.36 */
export const InitIn = { major: 0, minor: 4, maxReadahead: 8, flags: 12, flags2: 16, compatBytes: 16, bytes: 64 } as const;
/**
 * struct fuse_init_out { u32 major; u32 minor; u32 max_readahead; u32 flags; u16 max_background; u16 congestion_threshold;
 *   u32 max_write; u32 time_gran; u16 max_pages; u16 map_alignment; u32 flags2; u32 max_stack_depth; u16 request_timeout;
 *   u16 unused[11]; }
 */
export const InitOut = {
  major: 0,
  minor: 4,
  maxReadahead: 8,
  flags: 12,
  maxBackground: 16,
  congestionThreshold: 18,
  maxWrite: 20,
  timeGran: 24,
  maxPages: 28,
  mapAlignment: 30,
  flags2: 32,
  maxStackDepth: 36,
  requestTimeout: 40,
  bytes: 64,
} as const;

/** struct fuse_dirent { u64 ino; u64 off; u32 namelen; u32 type; char name[]; }, padded with zeros to 8 */
export const Dirent = { ino: 0, off: 8, namelen: 16, type: 20, name: 24 } as const;
/** struct fuse_direntplus { struct fuse_entry_out entry_out; struct fuse_dirent dirent; } */
export const Direntplus = { entry: 0, dirent: 128 } as const;

/** struct fuse_ext_header { u32 size; u32 type; }; struct fuse_secctx_header { u32 size; u32 nr_secctx; } is the same with type ≤ 31 */
export const ExtHeader = { size: 0, type: 4, bytes: 8 } as const;
/** struct fuse_secctx { u32 size; u32 padding; }, then the name with its NUL, then `size` bytes of context; padded to 8 */
export const Secctx = { size: 0, padding: 4, bytes: 8 } as const;
/** struct fuse_supp_groups { u32 nr_groups; u32 groups[]; }, behind a fuse_ext_header */
export const SuppGroups = { nrGroups: 8, groups: 12 } as const;

/** struct fuse_notify_inval_inode_out { u64 ino; s64 off; s64 len; } */
export const NotifyInvalInodeOut = { ino: 0, off: 8, len: 16, bytes: 24 } as const;
/** struct fuse_notify_inval_entry_out { u64 parent; u32 namelen; u32 flags; }, then the name with its NUL */
export const NotifyInvalEntryOut = { parent: 0, namelen: 8, flags: 12, bytes: 16 } as const;
/** struct fuse_notify_delete_out { u64 parent; u64 child; u32 namelen; u32 padding; }, then the name with its NUL */
export const NotifyDeleteOut = { parent: 0, child: 8, namelen: 16, padding: 20, bytes: 24 } as const;

/** Ours: struct fuse_fsnotify_in { u64 mask; u32 generation; u32 flags; } */
export const FsnotifyIn = { mask: 0, generation: 8, flags: 12, bytes: 16 } as const;
/** Ours: struct fuse_fsnotify_out { u64 mask; u64 supported; } */
export const FsnotifyOut = { mask: 0, supported: 8, bytes: 16 } as const;
/** Ours: FUSE_FSNOTIFY_ALL, events for every object that the guest has looked up. */
export const FSNOTIFY_ALL = 1;
/** Ours: struct fuse_read_notify_in { u32 size; u32 flags; }; flag 1 is STOP */
export const ReadNotifyIn = { size: 0, flags: 4, bytes: 8 } as const;
export const READ_NOTIFY_STOP = 1;
/**
 * Ours: one event record { u32 reclen; u32 flags; u64 nodeid; u64 child; u64 mask; u32 generation; u32 child_generation; u32 cookie;
 *   u32 namelen; }, then the name with its NUL; padded with zeros to 8
 */
export const FsnotifyRecord = {
  reclen: 0,
  flags: 4,
  nodeid: 8,
  child: 16,
  mask: 24,
  generation: 32,
  childGeneration: 36,
  cookie: 40,
  namelen: 44,
  name: 48,
} as const;
/** Ours: flags of a record. PAIRED: this one is the source and the next one the target of one rename. */
export const FsnotifyRecordFlag = { OVERFLOW: 1, PAIRED: 2 } as const;

/** Limits of Linux that the decoder applies (linux/limits.h, linux/fs.h). */
export const NAME_MAX = 255;
export const PATH_MAX = 4096;
export const XATTR_NAME_MAX = 255;
export const XATTR_SIZE_MAX = 65536;
export const XATTR_LIST_MAX = 65536;

/** Errnos that the server itself answers with (asm-generic/errno.h): the guest reads Linux's numbers on every architecture. */
export const Errno = {
  EALREADY: 114,
  ENOENT: 2,
  EIO: 5,
  ENODEV: 19,
  ENOBUFS: 105,
  ENXIO: 6,
  E2BIG: 7,
  EBADF: 9,
  EINVAL: 22,
  EFBIG: 27,
  ERANGE: 34,
  ENAMETOOLONG: 36,
  ENOSYS: 38,
  EPROTO: 71,
} as const;

/** Rounds up to the 8 bytes that records of variable length are padded to (FUSE_REC_ALIGN). */
export function recordAlign(bytes: number): number {
  return (bytes + 7) & ~7;
}
