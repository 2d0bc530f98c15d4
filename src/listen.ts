/** The socket that front ends connect to: made at a path, or inherited (libvirt passes one that already listens). */
import { lstatSync, rmSync } from 'node:fs';
import { constants } from 'node:os';
import { resolve } from 'node:path';
import { arenaAlloc, cString, native } from 'vhost-user-ts/native';
import type { ListenOn, MetricsAddress } from './config.js';
import { StartError } from './starterror.js';

const BACKLOG = 8;
const AF_UNIX = 1;
const UNCHANGED = 0xffff_ffff;
const { EADDRINUSE, EADDRNOTAVAIL, ECONNREFUSED, ENOTSOCK, EACCES, EPERM } = constants.errno;

/** A listening Unix socket. */
export class ListeningSocket {
  readonly fd: number;
  /** Inherited: the daemon ends with its first client (libvirt's contract). */
  readonly inherited: boolean;
  readonly #path: string | undefined;
  readonly #inode: number;
  #closed = false;

  /**
   * @param ready the socket, when it was made already (and somebody else removes its file)
   * @throws StartError with what to do
   */
  constructor(on: ListenOn, ready?: number) {
    this.inherited = on.kind === 'fd';
    if (ready !== undefined) {
      this.fd = ready;
      this.#path = undefined;
      this.#inode = 0;
      return;
    }
    if (on.kind !== 'path') {
      this.fd = inherited(on.fd, on.kind === 'fd' ? `--fd=${on.fd}` : `descriptor ${on.fd} from systemd`);
      this.#path = undefined;
      this.#inode = 0;
      return;
    }
    this.#path = resolve(on.path); // the working directory changes (see xattrs in native/fsops.cc)
    this.fd = bind(on.path, on.group);
    this.#inode = lstatSync(on.path, { throwIfNoEntry: false })?.ino ?? 0;
  }

  /** The socket's file, for whoever is to remove it: its inode number and path. */
  get file(): string | undefined {
    return this.#path === undefined ? undefined : `${this.#inode}:${this.#path}`;
  }

  /** The next client, or -errno (-EAGAIN when none waits). */
  accept(): number {
    return native.accept(this.fd);
  }

  /** Stops listening; removes the socket's file unless somebody has put another one in its place. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    native.close(this.fd);
    if (this.#path === undefined) return;
    const there = lstatSync(this.#path, { throwIfNoEntry: false });
    if (there?.isSocket() && there.ino === this.#inode) rmSync(this.#path, { force: true });
  }
}

function inherited(fd: number, name: string): number {
  const domain = native.socketDomain(fd);
  if (domain === -ENOTSOCK) throw new StartError(`${name} is not a socket: pass a listening Unix socket`);
  if (domain < 0) throw new StartError(`${name} is not open: pass a listening Unix socket`);
  if (domain !== AF_UNIX || native.socketListening(fd) !== 1) throw new StartError(`${name} is not a listening Unix socket: pass one`);
  native.setNonBlocking(fd, 1);
  return fd;
}

/** The socket that metrics are served at, for a daemon that can make none itself. @throws StartError as the metrics server says it */
export function listenForMetrics(address: MetricsAddress): number {
  if ('path' in address) {
    let fd = native.unixListen(cString(address.path), METRICS_BACKLOG);
    if (fd === -EADDRINUSE && isStale(address.path)) {
      rmSync(address.path, { force: true });
      fd = native.unixListen(cString(address.path), METRICS_BACKLOG);
    }
    return served(fd, `unix:${address.path}`);
  }
  const { host, port } = address;
  const fd = native.tcpListen(cString(host), cString(String(port), portName), METRICS_BACKLOG);
  return served(fd, host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`);
}

const METRICS_BACKLOG = 64;
const portName = arenaAlloc(64);

function served(fd: number, name: string): number {
  if (fd >= 0) return fd;
  const reason = fd === -EADDRINUSE ? 'it is in use already' : fd === -EADDRNOTAVAIL ? 'there is no such address here' : `errno ${-fd}`;
  throw new StartError(`metrics cannot be served at ${name}: ${reason}`);
}

/** Whether a path is a socket that nobody listens on. */
function isStale(path: string): boolean {
  if (!lstatSync(path, { throwIfNoEntry: false })?.isSocket()) return false;
  const probe = native.unixConnect(cString(path));
  if (probe >= 0) native.close(probe);
  return probe === -ECONNREFUSED;
}

function bind(path: string, group: string | undefined): number {
  const gid = group === undefined ? -1 : native.groupId(cString(group));
  if (group !== undefined && gid < 0) throw new StartError(`--socket-group=${group}: there is no such group`);
  // Nobody but the owner (and the group) may ever connect, not even for the moment before a chmod.
  const umask = native.umask(group === undefined ? 0o177 : 0o117);
  let fd = native.unixListen(cString(path), BACKLOG);
  if (fd === -EADDRINUSE) {
    removeStale(path);
    fd = native.unixListen(cString(path), BACKLOG);
  }
  native.umask(umask);
  if (fd === -EACCES || fd === -EPERM) throw new StartError(`--socket-path=${path}: no permission to make a socket there`);
  if (fd < 0) throw new StartError(`--socket-path=${path}: cannot listen (errno ${-fd})`);
  if (gid >= 0 && native.lchown(cString(path), UNCHANGED, gid) < 0) {
    native.close(fd);
    rmSync(path, { force: true });
    throw new StartError(`--socket-group=${group}: no permission to give the socket to that group`);
  }
  return fd;
}

/** A daemon that was killed leaves its socket behind; one that lives answers, and anything else is not ours to remove. */
function removeStale(path: string): void {
  if (!lstatSync(path).isSocket())
    throw new StartError(`--socket-path=${path} exists and is not a socket: remove it or choose another path`);
  if (!isStale(path)) throw new StartError(`--socket-path=${path}: another process listens there: choose another path`);
  rmSync(path, { force: true });
}
