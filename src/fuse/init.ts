/**
 * FUSE_INIT: what the guest can do, what the options want, what the session then does (`process_init_reply()` in fs/fuse/inode.c
 * reads our answer). Nothing here touches a request or a file system.
 */
import type { SessionOptions } from '../fs/filesystem.js';
import { Errno, FUSE_KERNEL_MINOR_VERSION, FUSE_KERNEL_VERSION, FUSE_MINIMUM_MINOR_VERSION, InitFlag, InitFlag2 } from './abi.js';

/** `never`: not offered. `auto`: used when the guest can. `always`: a guest that cannot is refused with EPROTO. */
export type Negotiation = 'never' | 'auto' | 'always';

/** How the server behaves; each field names the command line option that sets it. */
export interface ServerOptions {
  /** Seconds that the guest may keep a name (fractions allowed; `--cache`, `--entry-timeout`). */
  entryTimeout: number;
  /** Seconds that the guest may keep attributes (`--cache`, `--attr-timeout`). */
  attrTimeout: number;
  /** Seconds that the guest may remember that a name does not exist; 0: not at all (`--negative-timeout`). */
  negativeTimeout: number;
  /**
   * FUSE_CACHE_SYMLINKS: the guest reads a symbolic link once for as long as it knows the inode. No system call changes the
   * target of a link that is there: another target is another inode, and so another nodeid.
   */
  cacheSymlinks: boolean;
  /** FUSE_DO_READDIRPLUS and FUSE_READDIRPLUS_AUTO (`--no-readdirplus` clears it). */
  readdirplus: boolean;
  /** FUSE_WRITEBACK_CACHE (`--writeback`). */
  writeback: boolean;
  /** FUSE_HANDLE_KILLPRIV_V2 (`--killpriv-v2`). */
  killprivV2: boolean;
  /** FUSE_POSIX_ACL, with DONT_MASK and SETXATTR_EXT, which it does not work without (`--posix-acl`). */
  posixAcl: Negotiation;
  /** FUSE_SECURITY_CTX (`--security-label`). */
  securityLabel: Negotiation;
  /** FUSE_SUBMOUNTS (`--announce-submounts`). */
  announceSubmounts: boolean;
  /** FUSE_DIRECT_IO_ALLOW_MMAP (`--allow-mmap`): shared mappings of files opened for direct I/O. */
  allowMmap: boolean;
  /** FUSE_POSIX_LOCKS (`--posix-lock`): record locks by fcntl(2) are asked for here. */
  posixLock: boolean;
  /** FUSE_FLOCK_LOCKS (`--flock`): those by flock(2). */
  flock: boolean;
  /** FUSE_EXPORT_SUPPORT (`--export-support`): the guest may look up "." and ".." by nodeid, which nfsd and open_by_handle_at(2) need. */
  exportSupport: boolean;
  /** FUSE_ALLOW_IDMAP: most requests then do not say under which user id they are made (`--agent` needs to know). */
  allowIdmap: boolean;
}

/** What virtiofsd does when no option is given (`--cache=auto`). */
export const DEFAULT_SERVER_OPTIONS: Readonly<ServerOptions> = {
  entryTimeout: 1,
  attrTimeout: 1,
  negativeTimeout: 0,
  cacheSymlinks: true,
  readdirplus: true,
  writeback: false,
  killprivV2: false,
  posixAcl: 'never',
  securityLabel: 'never',
  announceSubmounts: true,
  allowMmap: false,
  posixLock: false,
  flock: false,
  exportSupport: false,
  allowIdmap: true,
};

/** Largest WRITE and, in pages of 4 KiB, the largest READ: virtiofsd's numbers. */
export const MAX_WRITE = 1 << 20;
export const MAX_PAGES = 256;
/** Largest WRITE of a guest without FUSE_MAX_PAGES (FUSE_DEFAULT_MAX_PAGES_PER_REQ, 32 pages). */
const MAX_WRITE_WITHOUT_MAX_PAGES = 32 << 12;
/** The driver's queue is the real limit; these two let it be used in full. */
export const MAX_BACKGROUND = 0xffff;
export const CONGESTION_THRESHOLD = 0xbffd;

const ALWAYS =
  InitFlag.ASYNC_READ |
  InitFlag.ATOMIC_O_TRUNC |
  InitFlag.BIG_WRITES |
  InitFlag.AUTO_INVAL_DATA |
  InitFlag.ASYNC_DIO |
  InitFlag.PARALLEL_DIROPS |
  InitFlag.MAX_PAGES |
  InitFlag.INIT_EXT;
const ALWAYS_2 = InitFlag2.CREATE_SUPP_GROUP;
const ACL = InitFlag.POSIX_ACL | InitFlag.DONT_MASK | InitFlag.SETXATTR_EXT;

/** A session's agreement, fixed from one FUSE_INIT to the next. */
export interface Session extends SessionOptions {
  /** The smaller of the two minor versions. */
  readonly minor: number;
  /** INIT flags agreed on: bits 0 to 31 and 32 to 63 (both as signed 32-bit numbers). */
  readonly flags: number;
  readonly flags2: number;
  readonly maxWrite: number;
  readonly maxReadahead: number;
  /** SETXATTR requests have 16 bytes before the name, not 8. */
  readonly setxattrExt: boolean;
  /** FUSE_CREATE_SUPP_GROUP: create-type requests may carry a group. */
  readonly createSuppGroup: boolean;
  /** FUSE_HAS_FSNOTIFY. */
  readonly fsnotify: boolean;
}

/** What the guest's fuse_init_in says, with flags2 0 unless it has FUSE_INIT_EXT. */
export interface InitRequest {
  minor: number;
  maxReadahead: number;
  flags: number;
  flags2: number;
}

/**
 * Decides a session. The guest's major version is FUSE_KERNEL_VERSION.
 * @param fsnotify whether a handler for FUSE_FSNOTIFY exists
 * @param warn gets one line for each option that this guest cannot follow
 * @returns the session, or -EPROTO: too old, or without what an option marked `always` needs.
 */
export function negotiate(
  request: InitRequest,
  options: Readonly<ServerOptions>,
  fsnotify: boolean,
  warn: (line: string) => void,
): Session | number {
  if (request.minor < FUSE_MINIMUM_MINOR_VERSION) {
    warn(
      `the guest speaks FUSE ${FUSE_KERNEL_VERSION}.${request.minor}; ${FUSE_KERNEL_VERSION}.${FUSE_MINIMUM_MINOR_VERSION} (Linux 5.4) is the oldest supported`,
    );
    return -Errno.EPROTO;
  }
  let flags = ALWAYS;
  let flags2 = ALWAYS_2;
  if (options.readdirplus) flags |= InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO;
  if (options.cacheSymlinks) flags |= InitFlag.CACHE_SYMLINKS;
  if (options.exportSupport) flags |= wanted(request.flags, InitFlag.EXPORT_SUPPORT, '--export-support', warn);
  if (options.posixLock) flags |= wanted(request.flags, InitFlag.POSIX_LOCKS, '--posix-lock', warn);
  if (options.flock) flags |= wanted(request.flags, InitFlag.FLOCK_LOCKS, '--flock', warn);
  if (options.writeback) flags |= wanted(request.flags, InitFlag.WRITEBACK_CACHE, '--writeback', warn);
  if (options.announceSubmounts) flags |= wanted(request.flags, InitFlag.SUBMOUNTS, '--announce-submounts', warn);
  if (options.killprivV2) flags |= wanted(request.flags, InitFlag.HANDLE_KILLPRIV_V2, '--killpriv-v2', warn);
  if (options.allowMmap) flags2 |= wanted(request.flags2, InitFlag2.DIRECT_IO_ALLOW_MMAP, '--allow-mmap', warn);
  if (options.posixAcl !== 'never') {
    if ((request.flags & ACL) === ACL) flags |= ACL;
    else if (options.posixAcl === 'always') return refused('--posix-acl=always', warn);
  }
  if (options.securityLabel !== 'never') {
    if ((request.flags2 & InitFlag2.SECURITY_CTX) !== 0) flags2 |= InitFlag2.SECURITY_CTX;
    else if (options.securityLabel === 'always') return refused('--security-label=always', warn);
  }
  if (options.allowIdmap) flags2 |= InitFlag2.ALLOW_IDMAP;
  if (fsnotify) flags2 |= InitFlag2.HAS_FSNOTIFY;
  flags &= request.flags;
  flags2 &= request.flags2;
  return {
    minor: Math.min(request.minor, FUSE_KERNEL_MINOR_VERSION),
    flags,
    flags2,
    maxWrite: (flags & InitFlag.MAX_PAGES) !== 0 ? MAX_WRITE : MAX_WRITE_WITHOUT_MAX_PAGES,
    maxReadahead: request.maxReadahead,
    setxattrExt: (flags & InitFlag.SETXATTR_EXT) !== 0,
    createSuppGroup: (flags2 & InitFlag2.CREATE_SUPP_GROUP) !== 0,
    fsnotify: (flags2 & InitFlag2.HAS_FSNOTIFY) !== 0,
    dontMask: (flags & InitFlag.DONT_MASK) !== 0,
    posixAcl: (flags & InitFlag.POSIX_ACL) !== 0,
    killPrivV2: (flags & InitFlag.HANDLE_KILLPRIV_V2) !== 0,
    writebackCache: (flags & InitFlag.WRITEBACK_CACHE) !== 0,
    submounts: (flags & InitFlag.SUBMOUNTS) !== 0,
    atomicOTrunc: (flags & InitFlag.ATOMIC_O_TRUNC) !== 0,
    // TMPFILE came with 7.37 (Linux 6.1), mode_strip_sgid() in vfs_create() and the like with 6.0.
    stripsSetgid: request.minor >= 37,
    securityContext: (flags2 & InitFlag2.SECURITY_CTX) !== 0,
    exportSupport: (flags & InitFlag.EXPORT_SUPPORT) !== 0,
    autoInvalData: (flags & InitFlag.AUTO_INVAL_DATA) !== 0,
    posixLock: (flags & InitFlag.POSIX_LOCKS) !== 0,
    flock: (flags & InitFlag.FLOCK_LOCKS) !== 0,
  };
}

/**
 * Takes over a session that another server has agreed on with the guest (live migration): the guest does not ask again.
 * @param agreed minor version, flags and max_readahead of that session
 * @returns the session; or the names of what the guest makes use of and these options do not give it
 */
export function takeOver(agreed: InitRequest, options: Readonly<ServerOptions>, fsnotify: boolean): Session | string[] {
  const session = negotiate(agreed, options, fsnotify, () => undefined);
  if (typeof session === 'number') return ['what --posix-acl=always or --security-label=always asks for'];
  const missing = (bits: number, table: Readonly<Record<string, number>>) =>
    Object.entries(table).flatMap(([name, bit]) => ((bits & bit) !== 0 ? [name] : []));
  const names = [...missing(agreed.flags & ~session.flags, InitFlag), ...missing(agreed.flags2 & ~session.flags2, InitFlag2)];
  return names.length === 0 && session.flags === agreed.flags && session.flags2 === agreed.flags2 ? session : names;
}

/** The state before FUSE_INIT and after DESTROY: nothing agreed (`minor` 0). */
export const NO_SESSION: Session = {
  minor: 0,
  flags: 0,
  flags2: 0,
  maxWrite: 0,
  maxReadahead: 0,
  setxattrExt: false,
  createSuppGroup: false,
  fsnotify: false,
  dontMask: false,
  posixAcl: false,
  killPrivV2: false,
  writebackCache: false,
  submounts: false,
  atomicOTrunc: false,
  stripsSetgid: false,
  securityContext: false,
  exportSupport: false,
  autoInvalData: false,
  posixLock: false,
  flock: false,
};

function wanted(capable: number, flag: number, option: string, warn: (line: string) => void): number {
  if ((capable & flag) === 0) warn(`${option} has no effect: the guest's kernel does not support it`);
  return flag;
}

function refused(option: string, warn: (line: string) => void): number {
  warn(`${option}: the guest's kernel does not support it, its mount is refused`);
  return -Errno.EPROTO;
}
