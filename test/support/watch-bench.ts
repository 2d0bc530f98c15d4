/** A share with a guest, a second process and a local inotify watcher: everything that tests of the watcher on a real host need. */
import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { arena, arenaAlloc, cString, native } from 'vhost-user-ts/native';
import { Counters } from '../../src/watch/counters.js';
import { Fsnotify, type FsnotifyOptions } from '../../src/watch/fsnotify.js';
import { FS_DELETE_SELF, FS_EVENT_ON_CHILD, FS_IN_IGNORED, FS_MOVED_FROM, FS_MOVED_TO, maskText } from '../../src/watch/mask.js';
import { Changer } from './watch-changer.js';
import { deliver, type GuestMessage, TestGuest } from './watch-guest.js';
import { TestNodes } from './watch-nodes.js';

/** What inotify knows. */
export const IN_ALL = 0xfff;

export class Share {
  readonly root: string;
  readonly nodes: TestNodes;
  readonly guest: TestGuest;
  readonly counters = new Counters();
  readonly fsnotify: Fsnotify;
  readonly local = new LocalWatcher();
  readonly changer: Changer;
  /** The guest's watches. */
  readonly watches = new Map<number, number>();
  readonly warnings: string[] = [];

  /** @param base a directory; the share is a new one in it */
  constructor(base: string, options: Partial<FsnotifyOptions> & { handles?: boolean; buffers?: number } = {}) {
    this.root = mkdtempSync(join(base, 'watch-'));
    this.nodes = new TestNodes({ handles: options.handles ?? true });
    this.nodes.look(this.root);
    this.guest = new TestGuest(options.buffers);
    const rootFd = this.nodes.fd(1);
    this.fsnotify = new Fsnotify(
      this.nodes,
      rootFd,
      this.nodes.procfd,
      { mode: 'fanotify', warn: (line) => this.warnings.push(line), ...options },
      this.counters,
    );
    this.fsnotify.begin();
    this.fsnotify.attach(this.guest);
    this.changer = new Changer(this.root);
  }

  /** The guest watches a path of the share; so does the local watcher. Returns the nodeid. */
  watch(path: string, mask: number): number {
    const nodeid = this.nodes.look(join(this.root, path));
    const error = this.fsnotify.watch(nodeid, this.nodes.generation(nodeid), mask, 0, 0);
    if (error < 0) throw new Error(`watch ${path}: errno ${-error}`);
    if (mask === 0) this.watches.delete(nodeid);
    else this.watches.set(nodeid, mask);
    if ((mask & IN_ALL) !== 0) this.local.watch(join(this.root, path), path, mask & IN_ALL);
    return nodeid;
  }

  name(nodeid: number): string {
    return this.nodes.path(nodeid).slice(this.root.length + 1) || '.';
  }

  /** Everything that has come. */
  messages(): GuestMessage[] {
    while (this.fsnotify.drain());
    return this.guest.take();
  }

  /** What the guest's watcher and the local one saw since the last call. */
  seen(): { guest: string[]; local: string[] } {
    return { guest: deliver(this.messages(), this.watches, (nodeid) => this.name(nodeid)), local: this.local.take() };
  }

  close(): void {
    this.changer.close();
    this.fsnotify.close();
    this.local.close();
    this.nodes.close();
    rmSync(this.root, { recursive: true, force: true });
  }
}

/** inotify in this process, its events as {@link deliver} writes them. */
export class LocalWatcher {
  readonly #fd = native.inotifyInit();
  readonly #procfd = native.openat(-100, cString('/proc/self/fd'), 0x200000, 0);
  readonly #paths = new Map<number, string>();
  readonly #buffer = arenaAlloc(65536);

  watch(path: string, label: string, mask: number): void {
    const fd = native.openat(-100, cString(path), 0x200000, 0);
    const wd = native.inotifyAddWatch(this.#fd, this.#procfd, fd, mask & ~FS_DELETE_SELF);
    if (wd < 0) throw new Error(`inotify_add_watch: errno ${-wd}`);
    native.close(fd);
    this.#paths.set(wd, label === '' ? '.' : label);
  }

  take(): string[] {
    const events: { line: string; cookie: number; mask: number }[] = [];
    for (;;) {
      const n = native.read(this.#fd, this.#buffer, 65536);
      if (n <= 0) break;
      for (let at = this.#buffer; at < this.#buffer + n; ) {
        const mask = arena.u32[(at + 4) >> 2] as number;
        const length = arena.u32[(at + 12) >> 2] as number;
        const name = arena.buffer.toString('utf8', at + 16, at + 16 + length).replace(/\0+$/, '');
        if ((mask & (FS_DELETE_SELF | FS_IN_IGNORED)) === 0) {
          events.push({
            line: `${this.#paths.get(arena.i32[at >> 2] as number)} ${name} ${maskText((mask & ~FS_EVENT_ON_CHILD) >>> 0)}`,
            cookie: arena.u32[(at + 8) >> 2] as number,
            mask,
          });
        }
        at += 16 + length;
      }
    }
    const pair = (cookie: number, bit: number) =>
      cookie !== 0 && events.some((event) => event.cookie === cookie && (event.mask & bit) !== 0);
    return events.map(({ line, cookie, mask }) =>
      (mask & FS_MOVED_FROM) !== 0 && pair(cookie, FS_MOVED_TO)
        ? `${line} →`
        : (mask & FS_MOVED_TO) !== 0 && pair(cookie, FS_MOVED_FROM)
          ? `${line} ←`
          : line,
    );
  }

  close(): void {
    native.close(this.#fd);
    native.close(this.#procfd);
  }
}

/** Of equal lines only the last: fanotify has merged them, in whose place a local watcher hears each. */
export function merged(lines: readonly string[]): string[] {
  return lines.filter((line, i) => !lines.includes(line, i + 1));
}

/** Directories on the file systems that tests run on: ext4 or whatever the temporary directory is on, and tmpfs. */
export const BASES: readonly (readonly [string, string])[] = [
  ['disk', process.env['WATCH_TEST_DISK'] ?? '/var/tmp'],
  ['tmpfs', '/dev/shm'],
];
