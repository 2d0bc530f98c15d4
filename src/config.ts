/**
 * The daemon's configuration: what the command line comes to, checked and frozen. Everything below `daemon.ts` reads this and
 * knows nothing of options.
 */
import { readFileSync, statSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { capabilitySet } from './capabilities.js';
import { IdMap } from './fs/idmap.js';
import { XattrMap } from './fs/xattrmap.js';
import { type IdRange, parseRange } from './idranges.js';
import { UsageError, type Values } from './options.js';
import { TOKEN_MAX } from './replay/abi.js';

/** Whether a feature is used: never, when the guest offers it, or always (a guest that does not is refused). */
export type Negotiation = 'never' | 'auto' | 'always';
/** How long a guest may keep what replies say, in seconds (fractions count). */
export interface CacheTimeouts {
  readonly entryTimeout: number;
  readonly attrTimeout: number;
  readonly negativeTimeout: number;
  /** Attributes of files with several names; without it those of all others. */
  readonly linkedAttrTimeout?: number;
}

export type CachePolicy = 'auto' | 'always' | 'never' | 'metadata' | 'notify';
export type FsnotifyMode = 'auto' | 'fanotify' | 'inotify' | 'off';
export type LogFormat = 'text' | 'json';
export type LogLevel = 'error' | 'warn' | 'info' | 'debug' | 'trace' | 'off';

/** Where the vhost-user front end connects: a socket to make, or an inherited one that already listens. */
export type ListenOn =
  | {
      readonly kind: 'path';
      readonly path: string;
      /** Name of the group that gets the socket; without one only its owner may connect. */
      readonly group: string | undefined;
    }
  | { readonly kind: 'fd'; readonly fd: number }
  /** From a .socket unit of systemd. It stands for --socket-path, so the daemon serves one client after the other. */
  | { readonly kind: 'passed'; readonly fd: number };

/** Where metrics are served: a Unix socket, or a host (name or address) and port. */
export type MetricsAddress = { readonly path: string } | { readonly host: string; readonly port: number };

export interface Config {
  /** Absolute path of the shared directory. It existed and was a directory. */
  readonly sharedDir: string;
  readonly listenOn: ListenOn;
  /** Tag of the device: when given, VHOST_USER_PROTOCOL_F_CONFIG is offered and the device configuration holds it. */
  readonly tag: string | undefined;
  /** num_request_queues of the device configuration; counts only with `tag`. */
  readonly requestQueues: number;
  /** Every change is answered with EROFS. */
  readonly readonly: boolean;
  /** Entries that are mount points are marked (FUSE_ATTR_SUBMOUNT) when the guest offers FUSE_SUBMOUNTS. */
  readonly announceSubmounts: boolean;
  readonly inodeFileHandles: 'never' | 'prefer' | 'mandatory';
  /** FUSE_POSIX_LOCKS and FUSE_FLOCK_LOCKS are asked for: locks are those of the host. */
  readonly posixLock: boolean;
  readonly flock: boolean;
  /** FUSE_EXPORT_SUPPORT is asked for. */
  readonly exportSupport: boolean;
  /** false: O_NOATIME is dropped from open flags. */
  readonly preserveNoatime: boolean;

  /** notify: as auto until the guest can be told of changes, then everything for a day. */
  readonly cache: CachePolicy;
  /** How long the guest may keep a name, attributes, and that a name does not exist. */
  readonly timeouts: CacheTimeouts;
  /** The same while the guest is told of changes (`cache` notify); else equal to `timeouts`. */
  readonly notifiedTimeouts: CacheTimeouts;
  /** The guest keeps where symbolic links lead to as long as it knows the link (FUSE_CACHE_SYMLINKS): not with cache never. */
  readonly cacheSymlinks: boolean;
  /** Files opened uncached (cache never and metadata) may be mapped shared: FUSE_DIRECT_IO_ALLOW_MMAP is asked for. */
  readonly allowMmap: boolean;
  /** FUSE_WRITEBACK_CACHE is asked for. */
  readonly writeback: boolean;
  /** READDIRPLUS is offered; never with cache never, where its attributes would be thrown away at once. */
  readonly readdirplus: boolean;
  /** false: O_DIRECT is dropped from open flags. */
  readonly allowDirectIo: boolean;

  /** Extended attributes; implied by `xattrmap`, `posixAcl` and `securityLabel`. */
  readonly xattr: boolean;
  /** The rules of --xattrmap as given, known to be right. */
  readonly xattrmap: string | undefined;
  /** FUSE_POSIX_ACL. Never together with `translateUid` or `translateGid`: ids inside an ACL are not translated. */
  readonly posixAcl: Negotiation;
  /** FUSE_SECURITY_CTX. */
  readonly securityLabel: Negotiation;
  /** FUSE_HANDLE_KILLPRIV_V2 is asked for. */
  readonly killprivV2: boolean;
  /** The maps of --translate-uid and --translate-gid as given, in their order, known to be right. */
  readonly translateUid: readonly string[];
  readonly translateGid: readonly string[];

  /** How host changes are watched for the guest. */
  readonly fsnotify: FsnotifyMode;
  /** How many objects the guest may watch at a time. */
  readonly fsnotifyLimit: number;
  /** The token of --agent, a byte a character; undefined: no agent may come. */
  readonly agentToken: string | undefined;

  readonly sandbox: 'namespace' | 'chroot' | 'none';
  /** What happens on a system call that is not allowed; none: all are. */
  readonly seccomp: 'none' | 'kill' | 'log' | 'trap';
  /** --modcaps as given, known to be right. */
  readonly modcaps: string | undefined;
  /** Maps of the user namespace; without one root needs none, and an ordinary user gets a usual one. */
  readonly uidMap: readonly IdRange[];
  readonly gidMap: readonly IdRange[];

  /** Most threads for requests that would block; 0: none, every request is served in turn; undefined: the daemon chooses. */
  readonly threadPoolSize: number | undefined;
  /** Microseconds that the rings are looked at before the device sleeps. */
  readonly busyPoll: number;
  /** Limit of open files to set; 0 leaves it; undefined: the smaller of 1000000 and /proc/sys/fs/nr_open. */
  readonly rlimitNofile: number | undefined;
  readonly logLevel: LogLevel;
  readonly logFormat: LogFormat;
  /** Log to the system log instead of standard error. */
  readonly syslog: boolean;
  readonly metrics: MetricsAddress | undefined;

  /** How the destination of a live migration finds inodes again: by their paths, or by their file handles (in the same directory). */
  readonly migrationMode: 'find-paths' | 'file-handles';
  /** What a destination does about inodes that it cannot have: it refuses the migration, or the guest gets errors for them. */
  readonly migrationOnError: 'abort' | 'guest-error';
  /** With paths go file handles, which the destination compares. */
  readonly migrationVerifyHandles: boolean;
  /** Paths that had to be searched for are looked at once more before they are sent. */
  readonly migrationConfirmPaths: boolean;

  /** What to tell about the command line (deprecated spellings), one log line each at level warn. */
  readonly warnings: readonly string[];
}

/** Whether the daemon is to be started by the launcher. */
export function needsSandbox({ sandbox, seccomp, modcaps }: Config): boolean {
  return sandbox !== 'none' || seccomp !== 'none' || modcaps !== undefined;
}

/** Longest path of a Unix socket: sizeof(sun_path) without the NUL. */
const SOCKET_PATH_MAX = 107;
const TAG_MAX = 36;
const TOKEN_MIN = 16;
const DAY = 86400;
const TIMEOUT: Readonly<Record<CachePolicy, number>> = { never: 0, auto: 1, notify: 1, metadata: DAY, always: DAY };

/**
 * Checks the parsed options against each other and against the host.
 * @param passed a listening socket that systemd has passed
 * @throws UsageError for the first thing that is wrong.
 */
export function configFrom(values: Values, warnings: readonly string[], passed?: number): Config {
  const posixAcl = values['posix-acl'];
  const securityLabel = values['security-label'];
  if (posixAcl !== 'never' && values['translate-uid'].length + values['translate-gid'].length > 0)
    throw new UsageError(`--translate-uid and --translate-gid would break access control lists: leave out --posix-acl=${posixAcl}`);
  if (values.cache === 'notify' && values.fsnotify === 'off')
    throw new UsageError('--cache=notify needs to know of changes: leave out --fsnotify=off');
  requireRules('translate-uid', () => new IdMap(values['translate-uid']));
  requireRules('translate-gid', () => new IdMap(values['translate-gid']));
  const { modcaps, xattrmap } = values;
  if (modcaps !== undefined) requireRules('modcaps', () => capabilitySet([], modcaps));
  if (xattrmap !== undefined) requireRules('xattrmap', () => new XattrMap(xattrmap));
  return Object.freeze({
    sharedDir: sharedDirectory(values['shared-dir']),
    listenOn: Object.freeze(listenOn(values, passed)),
    tag: tag(values.tag),
    requestQueues: values['num-request-queues'],
    readonly: values.readonly,
    announceSubmounts: !values['no-announce-submounts'],
    inodeFileHandles: values['inode-file-handles'],
    posixLock: values['posix-lock'],
    flock: values.flock,
    exportSupport: values['export-support'],
    preserveNoatime: values['preserve-noatime'],
    cache: values.cache,
    ...timeouts(values),
    cacheSymlinks: values.cache !== 'never',
    allowMmap: values['allow-mmap'],
    writeback: values.writeback,
    readdirplus: values.cache !== 'never' && !values['no-readdirplus'],
    allowDirectIo: values['allow-direct-io'],
    xattr: values.xattr || values.xattrmap !== undefined || posixAcl !== 'never' || securityLabel !== 'never',
    xattrmap: values.xattrmap,
    posixAcl,
    securityLabel,
    killprivV2: values['killpriv-v2'],
    translateUid: Object.freeze([...values['translate-uid']]),
    translateGid: Object.freeze([...values['translate-gid']]),
    fsnotify: values.fsnotify,
    fsnotifyLimit: values['fsnotify-limit'],
    agentToken: agentToken(values),
    sandbox: values.sandbox,
    seccomp: values.seccomp,
    modcaps: values.modcaps,
    uidMap: idMap(values, 'uid-map'),
    gidMap: idMap(values, 'gid-map'),
    threadPoolSize: values['thread-pool-size'],
    busyPoll: values['busy-poll'],
    rlimitNofile: values['rlimit-nofile'],
    logLevel: values.d ? 'debug' : values['log-level'],
    logFormat: values['log-format'],
    syslog: values.syslog,
    metrics: values.metrics === undefined ? undefined : Object.freeze(metricsAddress(values.metrics)),
    migrationMode: values['migration-mode'],
    migrationOnError: values['migration-on-error'],
    migrationVerifyHandles: values['migration-verify-handles'],
    migrationConfirmPaths: values['migration-confirm-paths'],
    warnings: Object.freeze([...warnings]),
  });
}

/** `--cache`, and what `--entry-timeout`, `--attr-timeout` and `--negative-timeout` say instead. */
function timeouts(values: Values): Pick<Config, 'timeouts' | 'notifiedTimeouts'> {
  const entry = values['entry-timeout'];
  const attr = values['attr-timeout'];
  const negative = values['negative-timeout'];
  const usual = TIMEOUT[values.cache];
  const timeouts = Object.freeze({
    entryTimeout: entry ?? usual,
    attrTimeout: attr ?? usual,
    negativeTimeout: negative ?? 0,
  });
  if (values.cache !== 'notify') return { timeouts, notifiedTimeouts: timeouts };
  const notifiedTimeouts = Object.freeze({
    entryTimeout: entry ?? DAY,
    attrTimeout: attr ?? DAY,
    negativeTimeout: negative ?? DAY,
    // A file with several names can change by one in a directory that is not watched.
    linkedAttrTimeout: timeouts.attrTimeout,
  });
  return { timeouts, notifiedTimeouts };
}

function idMap(values: Values, option: 'uid-map' | 'gid-map'): readonly IdRange[] {
  if (values[option].length > 0 && values.sandbox !== 'namespace')
    throw new UsageError(`--${option} needs a user namespace: use --sandbox=namespace`);
  try {
    return Object.freeze(values[option].map(parseRange));
  } catch (error) {
    throw new UsageError(`--${option}: ${(error as Error).message}`);
  }
}

function sharedDirectory(path: string | undefined): string {
  if (path === undefined) throw new UsageError('no directory to share: give --shared-dir=DIR');
  if (path === '') throw new UsageError('--shared-dir is empty: name a directory');
  requireDirectory(path, '--shared-dir');
  return resolve(path);
}

function listenOn(values: Values, passed: number | undefined): ListenOn {
  const { fd, socket } = values;
  const group = values['socket-group'];
  const path = values['socket-path'] ?? socket;
  if (socket !== undefined && values['socket-path'] !== undefined)
    throw new UsageError('--socket is the old name of --socket-path: give only --socket-path');
  if (fd !== undefined) {
    if (path !== undefined) throw new UsageError('--fd and --socket-path exclude each other: give one of them');
    if (group !== undefined) throw new UsageError('--socket-group is for --socket-path: the socket of --fd has its owner already');
    return { kind: 'fd', fd };
  }
  if (passed !== undefined) return { kind: 'passed', fd: passed };
  if (path === undefined) throw new UsageError('no socket to listen on: give --socket-path=PATH or --fd=FD');
  if (group === '') throw new UsageError('--socket-group is empty: name a group');
  requireSocketPath(path, '--socket-path');
  return { kind: 'path', path, group };
}

/** Reads the token of --agent: what is in the file, without white space around it. */
function agentToken(values: Values): string | undefined {
  const file = values.agent;
  if (file === 'off') return undefined;
  if (values.fsnotify === 'off') throw new UsageError('--agent brings file events to the guest: leave out --fsnotify=off');
  if (values.writeback) throw new UsageError('--agent does not work with --writeback: the guest then keeps its own times of files');
  let token: string;
  let mode: number;
  try {
    token = readFileSync(file, 'latin1').trim();
    ({ mode } = statSync(file));
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code ?? String(error);
    throw new UsageError(`--agent: ${file} cannot be read (${code}): name a file with a token, or off`);
  }
  if ((mode & 0o077) !== 0) throw new UsageError(`--agent: others may read or change ${file}: chmod 600 it`);
  if (token.length < TOKEN_MIN || token.length > TOKEN_MAX)
    throw new UsageError(`--agent: the token in ${file} has ${token.length} bytes: it must have ${TOKEN_MIN} to ${TOKEN_MAX}`);
  return token;
}

function tag(tag: string | undefined): string | undefined {
  if (tag === undefined) return undefined;
  const bytes = Buffer.byteLength(tag);
  if (bytes === 0 || bytes > TAG_MAX) throw new UsageError(`--tag has ${bytes} bytes: it must have 1 to ${TAG_MAX}`);
  return tag;
}

/** `unix:PATH`, `HOST:PORT` or `[V6]:PORT`. */
export function metricsAddress(text: string): MetricsAddress {
  if (text.startsWith('unix:')) {
    const path = text.slice('unix:'.length);
    requireSocketPath(path, '--metrics');
    return { path };
  }
  const [, v6, name, digits = ''] = /^(?:\[([0-9a-fA-F:.]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text) ?? [];
  const host = v6 ?? name;
  if (host === undefined || Number(digits) > 65535) throw new UsageError(`--metrics=${text} is no address: give unix:PATH or HOST:PORT`);
  return { host, port: Number(digits) };
}

/** Rules are compiled where they are used; here only to see whether they can be. */
function requireRules(option: string, compile: () => unknown): void {
  try {
    compile();
  } catch (error) {
    throw new UsageError(`--${option}: ${(error as Error).message.replace(`${option}: `, '')}`);
  }
}

function requireSocketPath(path: string, option: string): void {
  if (path === '') throw new UsageError(`${option} is empty: name a socket`);
  const bytes = Buffer.byteLength(path);
  if (bytes > SOCKET_PATH_MAX) throw new UsageError(`${option} has ${bytes} bytes: the path of a socket has at most ${SOCKET_PATH_MAX}`);
  requireDirectory(dirname(path), option);
}

function requireDirectory(path: string, option: string): void {
  const wrong = directoryProblem(path);
  if (wrong !== undefined) throw new UsageError(`${option}: ${path} ${wrong}`);
}

function directoryProblem(path: string): string | undefined {
  try {
    return statSync(path).isDirectory() ? undefined : 'is not a directory: name one';
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code ?? String(error);
    return code === 'ENOENT' ? 'does not exist: name an existing directory' : `cannot be reached (${code}): name an existing directory`;
  }
}
