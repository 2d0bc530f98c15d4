/**
 * The daemon without its process: the real device, FUSE server and file system over a real directory, and a front end with a
 * driver, all in one thread, so that a case runs the same way each time.
 */
import { readdirSync, readlinkSync } from 'node:fs';
import { VhostUserBackend, VhostUserFrontend, WaitLoop } from 'vhost-user-ts';
import { native } from 'vhost-user-ts/native';
import { MockDriver, MockMemory } from 'vhost-user-ts/testing';
import { VirtioFsDevice } from '../../src/device.js';
import type { FileSystem } from '../../src/fs/filesystem.js';
import { ROOT_SLOT } from '../../src/fs/inodes.js';
import { lookupAgain } from '../../src/fs/passthrough/lookup.js';
import { openPassthrough, type PassthroughFs, type PassthroughOptions } from '../../src/fs/passthrough.js';
import { DEFAULT_SERVER_OPTIONS, type ServerOptions } from '../../src/fuse/init.js';
import { FuseServer, type ServerHooks } from '../../src/fuse/server.js';
import { EventCarriers } from '../../src/queue/carriers.js';
import { Offload } from '../../src/queue/offload.js';
import { Replay } from '../../src/replay/replay.js';
import { withEchoes } from '../../src/watch/echofs.js';
import { Fsnotify } from '../../src/watch/fsnotify.js';
import { ShareNodes } from '../../src/watch/sharenodes.js';
import { Finding } from './engine.js';
import { FuzzShare } from './share.js';

const POLLIN = 1;
/** A job takes no time, but the machine may be busy. */
const JOB_MS = 60_000;

/** How a daemon was started, and what its VMM offers. */
export interface RigOptions {
  fs?: Partial<PassthroughOptions>;
  server?: Partial<ServerOptions>;
  fsnotify?: 'auto' | 'inotify';
  /** Without offload threads, as --thread-pool-size=0. */
  inline?: boolean;
  /** Accepted of the features offered. */
  features?: bigint;
  tag?: string;
  /** The token of a replay agent: events go by one instead of the guest's kernel. */
  agent?: string;
}

let pool: Offload | undefined;

/** The threads of this process. */
function offload(): Offload {
  pool ??= new Offload(4);
  return pool;
}

export class Rig {
  readonly share = new FuzzShare();
  readonly loop = new WaitLoop();
  readonly fs: PassthroughFs;
  readonly server: FuseServer;
  readonly device: VirtioFsDevice;
  readonly events: EventCarriers | undefined;
  readonly memory = new MockMemory([
    { guestAddress: 0, size: 8 << 20 },
    { guestAddress: 1 << 30, size: 4 << 20 },
    { guestAddress: (1 << 30) + (4 << 20), size: 4 << 20, mmapOffset: 4096 },
  ]);
  /** Lines for people since the last {@link takeLines}; not those of level debug. */
  lines = 0;
  backend: VhostUserBackend | undefined;
  readonly options: RigOptions;
  readonly #offload: Offload;

  constructor(options: RigOptions) {
    this.options = options;
    this.#offload = offload();
    const said = (): void => {
      this.lines++;
    };
    const blocking: Partial<PassthroughOptions> = options.inline ? {} : { offload: this.#offload };
    this.fs = openPassthrough({ warn: said, ...options.fs, ...blocking, root: this.share.path });
    const { share } = this.fs;
    if (options.fsnotify !== undefined) {
      const fsnotify = new Fsnotify(new ShareNodes(share), share.fd(ROOT_SLOT), share.procfd, {
        mode: options.fsnotify,
        limit: 200,
        warn: said,
      });
      this.loop.add(fsnotify.fd, false, () => void fsnotify.drain());
      this.events = new EventCarriers(
        fsnotify,
        (session, agent) => {
          session.begin(agent ? { inodes: false, entries: true, negative: false } : undefined);
          share.watcher = {
            known(nodeid) {
              session.known(nodeid);
              return false;
            },
            forgotten: (nodeid) => session.forget(nodeid),
          };
        },
        (queue, reason) => this.backend?.fail(queue, reason),
      );
    }
    const hooks: ServerHooks = { jobs: this.#offload, warn: said };
    if (this.events !== undefined) hooks.events = this.events;
    const served = this.events === undefined ? this.fs : withEchoes(this.fs, this.events.fsnotify, new ShareNodes(share), this.#offload);
    this.server = new FuseServer(this.#replayed(served, said), { ...DEFAULT_SERVER_OPTIONS, ...options.server }, hooks);
    this.server.onSession = () => {
      share.watcher = null;
    };
    this.device = new VirtioFsDevice(
      this.server,
      this.#offload,
      { tag: options.tag, requestQueues: 1, busyPoll: 1000, events: this.events },
      (level) => {
        if (level !== 'debug') this.lines++;
      },
      () => {
        this.backend = undefined;
      },
    );
    this.loop.add(this.#offload.eventfd, true, () => this.device.completions());
  }

  /** The file system with the replay agent's layer, if there is one. */
  #replayed(fs: FileSystem, said: () => void): FileSystem {
    const { events } = this;
    const { agent } = this.options;
    if (agent === undefined || events === undefined) return fs;
    const { share } = this.fs;
    const replay = new Replay(
      fs,
      (nodeid) => lookupAgain(share, nodeid),
      events,
      Buffer.from(agent),
      (level) => {
        if (level !== 'debug') said();
      },
    );
    events.onRead = () => replay.readable();
    return replay.served;
  }

  /** A front end that has just connected. */
  connect(): VhostUserFrontend {
    const { frontend, backendFd } = VhostUserFrontend.pair({ turn: () => this.turn(), timeout: 2000 });
    this.backend = new VhostUserBackend(this.device, backendFd, this.loop);
    this.device.attach(this.backend);
    return frontend;
  }

  /** A driver whose queues run. */
  drive(queues = 3, queueSize = 64): MockDriver {
    const options = { queues, queueSize, memory: this.memory, turn: () => this.turn() };
    return new MockDriver(
      this.connect(),
      this.options.features === undefined ? options : { ...options, features: this.options.features },
    ).start();
  }

  /** Everything that has come is handled. */
  turn(): void {
    while (this.loop.turn(0) > 0 || this.device.busy) this.device.serveAgain();
  }

  /** Waits for a job on the threads, which must end soon. @returns false when none is out, @throws Finding */
  job(): boolean {
    if (this.#offload.pending === 0) return false;
    const before = this.#offload.pending;
    if (native.poll(this.#offload.eventfd, POLLIN, JOB_MS) <= 0) throw new Finding('a job does not end');
    native.eventfdRead(this.#offload.eventfd);
    this.device.completions();
    return this.#offload.pending < before || this.job();
  }

  close(): void {
    this.backend?.close('over');
    this.events?.fsnotify.close();
    this.fs.close();
    this.loop.close();
    this.memory.close();
    this.share.close();
  }
}

/** What the descriptors that were opened last lead to, for people. */
export function lastFds(): string {
  const fds = readdirSync('/proc/self/fd').map(Number);
  fds.sort((a, b) => b - a);
  return fds
    .slice(0, 40)
    .map((fd) => {
      try {
        return `${fd} ${readlinkSync(`/proc/self/fd/${fd}`)}`;
      } catch {
        return ''; // the one that the list was read by
      }
    })
    .join(', ');
}

/** Descriptors that this process has open. */
export function openFds(): number {
  return readdirSync('/proc/self/fd').length;
}
