/**
 * The sandbox, as seen from outside and from inside.
 *
 * Outside ({@link launch}): everything that will be out of reach later is made: sockets, limits. Then the process becomes the launcher
 * (native/sandbox.c), which starts node again with the same arguments, inside. Inside ({@link handover}): a memfd tells what was made,
 * and the last lock ({@link lockUp}) is put on when the daemon is ready.
 */
import { existsSync, lstatSync, readdirSync, readlinkSync, readSync, realpathSync, writeSync } from 'node:fs';
import { userInfo } from 'node:os';
import { delimiter, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { arena, arenaAlloc, arenaString, cString, native } from 'vhost-user-ts/native';
import { type Capability, capabilityMask, capabilitySet } from './capabilities.js';
import type { Config } from './config.js';
import { type IdRange, insideOf, mapText, ownMap, subordinateIds } from './idranges.js';
import { type FileSizeLimit, liftFileSizeLimit, setOpenFilesLimit } from './limits.js';
import { listenForMetrics } from './listen.js';
import type { Started } from './start.js';
import { StartError } from './starterror.js';
import { SYSTEMD_VARIABLES } from './systemd.js';

/** What the daemon finds ready. */
export interface Handover {
  readonly config: Config;
  /** The listening socket. */
  readonly listen: number;
  /** The metrics' listening socket. */
  readonly metrics?: number;
  /** A socket connected to systemd. */
  readonly notify?: number;
  /** A socket connected to the system log. */
  readonly syslog?: number;
  /** Where the shared directory is. */
  readonly root: string;
  /** The filter of system calls. */
  readonly seccomp?: number;
  /** The pid that the host knows. */
  readonly pid: number;
  /** Memfds that outlive a worker: the share's stores, the session. */
  readonly state: number;
  readonly session: number;
  /** The limit of file sizes, if there is one. */
  readonly fileSize?: FileSizeLimit;
}

/** Name of the environment variable with the memfd's number. */
const VARIABLE = 'VIRTIOFSD_TS_HANDOVER';
/** The share's place in the daemon's file tree. No library or application file may be below it. */
const SHARE_AT = '/.share';
const HANDOVER_BYTES = 1 << 20;
/** This file is build/js/src/sandbox.js, or LIBDIR/js/src/sandbox.js. */
export const LAUNCHER = fileURLToPath(new URL('../../virtiofsd-ts-sandbox', import.meta.url));

/** Becomes the launcher. Returns only by throwing. @throws StartError */
export function launch(config: Config, started: Started): never {
  if (!existsSync(LAUNCHER))
    throw new StartError(
      `${LAUNCHER} is missing: install the program as a whole (with npm: apt-get install gcc libc6-dev libseccomp-dev, then npm rebuild virtiofsd-ts), or use --sandbox=none --seccomp=none`,
    );
  setOpenFilesLimit(config.rlimitNofile);
  const fileSize = liftFileSizeLimit();
  const { flags, handover } = prepare(config, started.socket, started);
  const memfd = must(native.memfdCreate(cString('handover'), 0), 'memfd_create');
  writeSync(memfd, JSON.stringify(fileSize === undefined ? handover : ({ ...handover, fileSize } satisfies Handover)), 0);
  inheritAll();
  native.setInheritable(started.end, 1);
  const environment: NodeJS.ProcessEnv = { ...process.env, [VARIABLE]: String(memfd) };
  // Files that are not there inside, and would be complained about; what is not for another process.
  for (const name of ['NODE_EXTRA_CA_CERTS', 'NODE_V8_COVERAGE', ...SYSTEMD_VARIABLES]) delete environment[name];
  // A signal that came before the launcher listens is in the eventfd.
  become([LAUNCHER, ...flags, '--keep', String(memfd), '--stop-fd', String(started.end), '--', ...nodeCommand()], environment);
}

/** The command that this process was started with. */
function nodeCommand(): string[] {
  return [process.execPath, ...process.execArgv, fileURLToPath(new URL('./main.js', import.meta.url)), ...process.argv.slice(2)];
}

/** Makes what is needed from outside; the launcher's flags, and what the daemon is told. */
export function prepare(
  config: Config,
  { fd: listen, file }: { readonly fd: number; readonly file: string | undefined },
  { syslog, notify }: { readonly syslog: number; readonly notify: number } = { syslog: -1, notify: -1 },
): { flags: string[]; handover: Handover } {
  const { sandbox, seccomp, metrics } = config;
  const state = must(native.memfdCreate(cString('virtiofsd-ts-state'), 0), 'memfd_create');
  const session = must(native.memfdCreate(cString('virtiofsd-ts-session'), 0), 'memfd_create');
  const keep = [listen, state, session];
  const flags = ['--mode', sandbox, '--where', `--sandbox=${sandbox}`];
  if (file !== undefined) flags.push('--remove', file);
  let metricsFd: number | undefined;
  if (metrics !== undefined) {
    metricsFd = listenForMetrics(metrics);
    keep.push(metricsFd);
    if ('path' in metrics) flags.push('--remove', `${lstatSync(metrics.path).ino}:${resolve(metrics.path)}`);
  }
  for (const fd of [syslog, notify]) if (fd >= 0) keep.push(fd);
  let seccompFd: number | undefined;
  // The capability to change roots, which every thread of node still has then, is made useless by a filter.
  const filter = seccomp === 'none' ? (sandbox === 'chroot' ? 'chroot' : undefined) : seccomp;
  if (filter !== undefined) {
    seccompFd = must(native.memfdCreate(cString('seccomp'), 0), 'memfd_create');
    keep.push(seccompFd);
    flags.push('--seccomp', filter, '--seccomp-fd', String(seccompFd));
  }
  if (config.readonly) flags.push('--readonly');
  const maps = sandbox === 'namespace' ? idMaps(config) : undefined;
  if (maps !== undefined) flags.push(...maps);
  if (process.geteuid?.() === 0 || maps !== undefined) flags.push('--caps', capabilities(config));
  if (sandbox === 'namespace') {
    flags.push('--share', config.sharedDir, '--share-at', SHARE_AT);
    flags.push(...binds());
  }
  for (const fd of keep) flags.push('--keep', String(fd));
  const handover: Handover = {
    config,
    listen,
    ...(metricsFd === undefined ? {} : { metrics: metricsFd }),
    ...(syslog < 0 ? {} : { syslog }),
    ...(notify < 0 ? {} : { notify }),
    root: sandbox === 'namespace' ? SHARE_AT : config.sharedDir,
    ...(seccompFd === undefined ? {} : { seccomp: seccompFd }),
    pid: process.pid,
    state,
    session,
  };
  return { flags, handover };
}

function capabilities({ sandbox, inodeFileHandles, migrationMode, modcaps }: Config): string {
  const more: Capability[] = [];
  // It opens whatever file of the share's file system one can guess the handle of: only where handles are used.
  if (inodeFileHandles !== 'never' || migrationMode === 'file-handles') more.push('dac_read_search');
  const set = capabilitySet(more, modcaps);
  if (sandbox === 'chroot') set.add('sys_chroot'); // given up after it was used
  return capabilityMask(set);
}

/** Flags for a user namespace; undefined when none is needed: for root, unless a map is given. */
function idMaps(config: Config): string[] | undefined {
  const uid = process.geteuid?.() ?? 0;
  const gid = process.getegid?.() ?? 0;
  if (uid === 0 && config.uidMap.length === 0 && config.gidMap.length === 0) return undefined;
  let name: string | undefined;
  try {
    name = userInfo().username;
  } catch {
    // A user without an entry has no subordinate ids either.
  }
  const helpers = uid === 0 ? undefined : findHelpers();
  const uids = config.uidMap.length > 0 ? config.uidMap : ownMap(uid, helpers && subordinateIds('/etc/subuid', uid, name));
  const gids = config.gidMap.length > 0 ? config.gidMap : ownMap(gid, helpers && subordinateIds('/etc/subgid', uid, name));
  const flags = ['--uid-map', mapText(uids), '--gid-map', mapText(gids)];
  // The kernel itself lets a user map the own id and nothing else.
  if (uid !== 0 && !isOwn(uids, uid)) flags.push('--newuidmap', required(helpers?.uid, 'newuidmap'));
  if (uid !== 0 && !isOwn(gids, gid)) flags.push('--newgidmap', required(helpers?.gid, 'newgidmap'));
  const insideUid = insideOf(uids, uid) ?? uids[0]?.inside;
  const insideGid = insideOf(gids, gid) ?? gids[0]?.inside;
  return [...flags, '--uid', String(insideUid), '--gid', String(insideGid)];
}

function isOwn(ranges: readonly IdRange[], id: number): boolean {
  return ranges.length === 1 && ranges[0]?.outside === id && ranges[0].count === 1;
}

function required(path: string | undefined, name: string): string {
  if (path === undefined) throw new StartError(`--uid-map, --gid-map: this map needs ${name}: install it (Debian: package uidmap)`);
  return path;
}

function findHelpers(): { uid: string; gid: string } | undefined {
  for (const folder of [...(process.env['PATH'] ?? '').split(delimiter), '/usr/bin']) {
    const uid = join(folder, 'newuidmap');
    const gid = join(folder, 'newgidmap');
    if (folder !== '' && existsSync(uid) && existsSync(gid)) return { uid, gid };
  }
  return undefined;
}

// --- the daemon's own files ---

/** Packages that are loaded inside. */
const PACKAGES = ['pino', 'prom-client', 'vhost-user-ts', 'yargs-parser'];

/** Flags for what node and the daemon read: its binary and libraries, our JavaScript, the packages. */
function binds(): string[] {
  const own = realpathSync(dirname(fileURLToPath(import.meta.url)));
  const files = new Set<string>([own]);
  files.add(nearest(own, 'package.json'));
  // npm may have put some packages beside the program and others above it.
  for (const name of PACKAGES) files.add(dirname(nearest(own, `node_modules/${name}`)));
  // In a checkout it is a link to where it is developed.
  const vhostUser = realpathSync(nearest(own, 'node_modules/vhost-user-ts'));
  files.add(join(vhostUser, 'package.json'));
  files.add(join(vhostUser, 'dist'));
  for (const file of files) for (const other of files) if (file.startsWith(`${other}/`)) files.delete(file);
  const executable = new Set([process.execPath, ...loaded()]);
  // Where the loader looks for libraries first.
  if (existsSync('/etc/ld.so.cache')) files.add('/etc/ld.so.cache');
  for (const file of builtins()) files.add(file);
  return [...[...files].flatMap((file) => ['--bind', file]), ...[...executable].flatMap((file) => ['--bind-exec', file])];
}

/** The closest `name` in a directory or those above it. */
function nearest(folder: string, name: string): string {
  for (let at = folder; ; at = dirname(at)) {
    const path = join(at, name);
    if (existsSync(path)) return path;
    if (at === '/') throw new StartError(`${name} is missing above ${folder}: install the program as a whole`);
  }
}

/** Parts of node's own library that a distribution keeps in files (Debian 13: /usr/share/nodejs/undici/…). */
function builtins(): string[] {
  const defines = process.config.target_defaults.defines.map(String);
  return defines.flatMap((text) => /^NODE_SHARED_BUILTIN_\w+_PATH="?(\/[^"]*)/.exec(text)?.[1] ?? []).filter((path) => existsSync(path));
}

/** What the dynamic loader has loaded for this process: the next one is the same program. */
function loaded(): string[] {
  const size = 64 << 10;
  const out = arenaAlloc(size);
  const count = native.sharedObjects(out, size);
  const paths: string[] = [];
  for (let i = 0, at = out; i < count; i++) {
    const path = arenaString(at, arena.u8.indexOf(0, at) - at);
    at += Buffer.byteLength(path) + 1;
    paths.push(path);
  }
  return paths;
}

// --- becoming another program ---

/** Node marks whatever descriptors it inherits as its own; those are ours to hand on (a locked pid file, see libvirt). */
function inheritAll(): void {
  const targets = new Map<number, string>();
  for (const name of readdirSync('/proc/self/fd')) {
    try {
      targets.set(Number(name), readlinkSync(`/proc/self/fd/${name}`));
    } catch {
      // The directory's own, closed by now.
    }
  }
  const seen = [...targets.values()];
  for (const [fd, target] of targets) {
    // epoll, eventfd and pipes with both ends are node's.
    const nodes = target.startsWith('anon_inode:') || (target.startsWith('pipe:') && seen.indexOf(target) !== seen.lastIndexOf(target));
    if (fd <= 2 || !nodes) native.setInheritable(fd, 1);
  }
}

function become(words: readonly string[], environment: NodeJS.ProcessEnv): never {
  const variables = Object.entries(environment).map(([name, value]) => `${name}=${value}`);
  const error = native.become(strings(words), words.length, strings(variables), variables.length);
  throw new StartError(`${words[0]} cannot be run (errno ${-error})`);
}

function strings(words: readonly string[]): number {
  const text = Buffer.from(words.map((word) => `${word}\0`).join(''));
  const at = arenaAlloc(text.length);
  arena.u8.set(text, at);
  return at;
}

function must(result: number, what: string): number {
  if (result < 0) throw new StartError(`${what}: errno ${-result}`);
  return result;
}

// --- inside ---

/** What was made outside, if this process is the one inside. */
export function handover(): Handover | undefined {
  const fd = Number(process.env[VARIABLE] ?? 'none');
  if (Number.isNaN(fd)) return undefined;
  delete process.env[VARIABLE];
  const bytes = Buffer.alloc(HANDOVER_BYTES);
  const length = readSync(fd, bytes, 0, bytes.length, 0);
  native.close(fd);
  const made = JSON.parse(bytes.toString('utf8', 0, length)) as Handover;
  // Before the device thread gets a working directory of its own.
  if (made.config.sandbox === 'chroot') native.prepareChroot();
  return made;
}

/** The last lock, when everything is loaded: no path leads out of the share any more, and no needless system call is made. */
export function lockUp({ config, seccomp }: Handover, rootFd: number): void {
  if (config.sandbox === 'chroot') {
    const error = native.chrootAll(rootFd);
    if (error < 0) throw new StartError(`--sandbox=chroot: chroot is refused (errno ${-error}): start as root with CAP_SYS_CHROOT`);
  }
  if (seccomp === undefined) return;
  const error = native.loadFilter(seccomp);
  if (error < 0) throw new StartError(`--seccomp=${config.seccomp}: the filter cannot be loaded (errno ${-error}): use --seccomp=none`);
  native.close(seccomp);
}
