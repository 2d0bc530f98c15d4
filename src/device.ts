/**
 * The virtio-fs device: FUSE requests come out of virtqueues and replies go back (virtio 1.2, 5.11). Every queue is served
 * by one thread, in batches: all chains that wait, one publication of the used ring, one interrupt.
 */
import {
  BusyLoop,
  chainErrorText,
  Feature,
  features,
  hasFeature,
  type LogLevel,
  ProtocolFeature,
  type VhostUserBackend,
  type VhostUserDevice,
  type Virtqueue,
} from 'vhost-user-ts';
import { native } from 'vhost-user-ts/native';
import { PENDING } from './fs/filesystem.js';
import type { FuseServer } from './fuse/server.js';
import { type HotMetrics, Slot } from './metrics/hot.js';
import type { Migration } from './migration/migration.js';
import { type EventCarriers, NOTIFY_BUFFER_BYTES } from './queue/carriers.js';
import type { Offload } from './queue/offload.js';

/** Length of the tag in the configuration space (struct virtio_fs_config). */
const TAG_BYTES = 36;
/**
 * Chains served before other queues, host events and the control socket get their turn. Another look at those costs half a request
 * (with 512 an event came after 3 ms beside 16 GETATTRs of a driver that never pauses, instead of 0.1).
 */
const BATCH = 64;
/**
 * Replies are shown to the driver, which is woken for them, while the rest of a batch is served: after so many, or a quarter of what
 * waits. Both sides are at work then, instead of each waiting for the other: 1.5 times the GETATTRs and 1.3 times the READs of 4 KiB at
 * depth 16, for an interrupt more per batch. After each one, as others do, is slower again; and large data are not to be looked at
 * while the next are copied (0.9 times the READs of 1 MiB).
 */
const PUBLISH = 4;
const LARGE = 64 << 10;
/** VIRTIO_FS_F_NOTIFICATION (virtio 1.2, 5.11.3): queue 1 is the notification queue. */
const F_NOTIFICATION = 0;
const POLLIN = 1;
/** Most requests that wait for locks, whatever the size of the queues. */
const MOST_WAITS = 1024;
const EIO = 5;
/** Most request queues a front end can configure: as many as Linux makes use of on a large machine. */
const MAX_REQUEST_QUEUES = 64;

export interface DeviceOptions {
  /** Offer the configuration space with this tag (virtiofsd's `--tag`); QEMU's vhost-user-fs has its own, UML needs ours. */
  tag: string | undefined;
  /** num_request_queues of the configuration space. */
  requestQueues: number;
  /** Nanoseconds that the rings are looked at before the thread sleeps (`--busy-poll`). */
  busyPoll: number;
  /** Remote fsnotify; undefined: not offered. */
  events: EventCarriers | undefined;
}

/** What a session's device does with chains; one object for the life of the daemon, one back end at a time. */
export class VirtioFsDevice implements VhostUserDevice {
  readonly queueCount: number;
  readonly features: bigint;
  readonly protocolFeatures: bigint;
  /** The queues of this session, and whether kicks are off for any. */
  readonly #busyLoop: BusyLoop;
  readonly #busyPoll: number;
  #busy = false;
  /** The batch before had large data: what is gained by looking is little then beside what it costs (READ 128k: no more, for 1.5 times the time). */
  #large = false;
  /** Chains served since {@link serveAgain} began. */
  #served = 0;

  readonly #server: FuseServer;
  readonly #offload: Offload;
  readonly #events: EventCarriers | undefined;
  /** Index of the notification queue: 1 when the driver took VIRTIO_FS_F_NOTIFICATION, else there is none (-1). */
  #notificationQueue = -1;
  readonly #config: Uint8Array | undefined;
  readonly #logLine: (level: LogLevel, message: string) => void;
  readonly #onDisconnect: (reason: string) => void;
  #backend: VhostUserBackend | undefined;
  #migration: Migration | undefined;

  // Per offload job: where its chain goes back to.
  readonly #jobQueue: (Virtqueue | undefined)[];
  readonly #jobHead: Uint16Array;
  /** Queues that got replies of jobs; no Set, whose clear() makes a new one. */
  readonly #touched: (Virtqueue | undefined)[] = [];
  #touchedCount = 0;
  /** Queues of this session, for the counters. */
  readonly #started = new Set<Virtqueue>();
  #poison = 0;
  /** Queues that were stopped for a corrupt ring, since the daemon's start. */
  queueFailures = 0;

  constructor(
    server: FuseServer,
    offload: Offload,
    options: DeviceOptions,
    log: (level: LogLevel, message: string) => void,
    onDisconnect: (reason: string) => void,
  ) {
    this.#server = server;
    this.#offload = offload;
    this.#logLine = log;
    this.#onDisconnect = onDisconnect;
    this.#events = options.events;
    this.features =
      features(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.LOG_ALL) |
      (options.events === undefined ? 0n : features(F_NOTIFICATION));
    this.#jobQueue = new Array(offload.capacity).fill(undefined);
    this.#jobHead = new Uint16Array(offload.capacity);
    let protocol = features(
      ProtocolFeature.MQ,
      ProtocolFeature.LOG_SHMFD,
      // virtio_uml takes its interrupt from the back-end channel and has none without it.
      ProtocolFeature.BACKEND_REQ,
      ProtocolFeature.REPLY_ACK,
      ProtocolFeature.CONFIGURE_MEM_SLOTS,
      ProtocolFeature.RESET_DEVICE,
      ProtocolFeature.DEVICE_STATE,
    );
    // QEMU prints a warning for a vhost-user-fs back end that offers CONFIG, so only who asks for it by --tag gets it.
    if (options.tag !== undefined) {
      protocol |= features(ProtocolFeature.CONFIG);
      this.#config = new Uint8Array(TAG_BYTES + 8);
      this.#config.set(Buffer.from(options.tag));
      const view = new DataView(this.#config.buffer);
      view.setUint32(TAG_BYTES, options.requestQueues, true);
      if (options.events !== undefined) view.setUint32(TAG_BYTES + 4, NOTIFY_BUFFER_BYTES, true);
    }
    this.protocolFeatures = protocol;
    // One high priority queue, perhaps the notification queue, then request queues: a front end may use as many as it likes, up to this.
    this.queueCount = 2 + Math.max(options.requestQueues, MAX_REQUEST_QUEUES);
    this.#busyPoll = options.busyPoll;
    this.#busyLoop = new BusyLoop(this.queueCount, options.busyPoll);
  }

  /** The session whose rings are served from now on. */
  attach(backend: VhostUserBackend): void {
    this.#backend = backend;
  }

  /** Who writes and reads the device's state. */
  set migration(migration: Migration) {
    this.#migration = migration;
  }

  transferState(direction: number, fd: number): boolean {
    if (this.#migration === undefined) native.close(fd);
    return this.#migration?.begin(direction, fd) ?? false;
  }

  checkState(): boolean {
    return this.#migration?.check() ?? false;
  }

  config(): Uint8Array {
    return this.#config ?? new Uint8Array(0);
  }

  log(level: LogLevel, message: string): void {
    this.#logLine(level, message);
  }

  featuresAcked(acked: bigint): void {
    this.#notificationQueue = hasFeature(acked, F_NOTIFICATION) ? 1 : -1;
  }

  /** Serves what waits in a queue; at most one batch. {@link serveAgain} goes on. */
  serve(queue: Virtqueue): void {
    if (queue.index === this.#notificationQueue) {
      this.#events?.kicked(queue);
      return;
    }
    const server = this.#server;
    const chain = queue.chain;
    server.batch();
    queue.disableKicks();
    queue.batches++;
    this.#busyLoop.add(queue);
    this.#busy = true;
    let unseen = 0;
    let most = PUBLISH;
    let large = false;
    for (let left = BATCH; left > 0; left--) {
      const got = queue.pop();
      if (got === 0) break;
      if (got < 0) {
        queue.flush();
        this.#backend?.fail(queue, chainErrorText(got));
        return;
      }
      this.#served++;
      const head = chain.head;
      const length = this.#poison !== 0 && queue.number === this.#poison ? server.refuse(chain, EIO) : server.serve(chain);
      if (length === PENDING) {
        queue.postpone(head);
        if (server.pendingJob >= 0) this.#keep(queue, head, server.pendingJob);
        else this.#events?.placed(queue, head);
        continue;
      }
      if (queue.memory.logging) chain.markDirty(queue.memory, length);
      queue.push(head, length);
      if (chain.readableBytes + length >= LARGE) large = true;
      else if (++unseen >= most) {
        queue.flush();
        unseen = 0;
        most = Math.max(PUBLISH, queue.backlog >> 2);
      }
    }
    queue.flush();
    this.#large = large;
  }

  /** True when a queue was served whose driver sends no kicks since: the loop must not sleep before {@link serveAgain} says so. */
  get busy(): boolean {
    return this.#busy;
  }

  /** Serves what else waits or comes within a moment, in whatever queue; then asks for kicks. Not for so long that others would have to wait. */
  serveAgain(): void {
    const busyLoop = this.#busyLoop;
    const backend = this.#backend;
    if (backend === undefined) {
      this.#busy = false;
      return;
    }
    this.#served = 0;
    busyLoop.looked = 0;
    do {
      const queue = busyLoop.next(!this.#large);
      if (queue === undefined) {
        this.#busy = !busyLoop.enableKicks();
        return;
      }
      if (!backend.serve(queue)) busyLoop.remove(queue);
    } while (this.#served < BATCH && busyLoop.looked < this.#busyPoll);
  }

  /** The request with this number is answered with EIO: every process that has served it ended within it. */
  set poison(number: number) {
    this.#poison = number;
  }

  #keep(queue: Virtqueue, head: number, job: number): void {
    this.#jobQueue[job] = queue;
    this.#jobHead[job] = head;
    queue.memory.pin();
  }

  /** Jobs ended: their replies go out, one interrupt per queue. */
  completions(): void {
    this.#offload.reap(this.#done);
    for (let i = 0; i < this.#touchedCount; i++) this.#touched[i]?.flush();
    this.#touched.fill(undefined);
    this.#touchedCount = 0;
  }

  readonly #done = (job: number, result: number): void => {
    const queue = this.#jobQueue[job];
    if (queue === undefined) return;
    this.#jobQueue[job] = undefined;
    if (queue.running) {
      const head = this.#jobHead[job] as number;
      const length = this.#server.complete(job, result);
      if (queue.memory.logging) queue.markDirty(head, length);
      queue.push(head, length);
      if (!this.#touched.includes(queue)) this.#touched[this.#touchedCount++] = queue;
    } else {
      this.#server.drop(job);
    }
    queue.memory.unpin();
  };

  queueStarted(queue: Virtqueue): void {
    this.#started.add(queue);
    // Requests that wait for a lock must not fill a queue: by it comes the request that frees the lock.
    if (queue.index > 0) this.#offload.mostWaits = Math.min(this.#offload.mostWaits, queue.size >> 1);
  }

  /** Adds up what the queues counted. */
  countQueues(metrics: HotMetrics): void {
    const { values } = metrics;
    let depth = 0;
    for (const queue of this.#started) {
      metrics.add(Slot.kicks, queue.kicks);
      metrics.add(Slot.batches, queue.batches);
      metrics.add(Slot.interruptsSent, queue.interruptsSent);
      metrics.add(Slot.interruptsSaved, queue.interruptsSaved);
      queue.kicks = queue.batches = queue.interruptsSent = queue.interruptsSaved = 0;
      depth += queue.inFlight;
    }
    values[Slot.queueDepth] = depth;
  }

  /**
   * Waits until no job holds a chain of this queue: its driver may use the memory for something else then. For a front end that is
   * gone nobody is waited for: the mapping stays until the last job ends, and their replies go nowhere.
   */
  queueStopping(queue: Virtqueue): void {
    this.#busyLoop.remove(queue);
    this.#events?.stopping(queue);
    this.#server.fs.cancelWaits();
    this.completions();
    while (this.#backend?.connected === true && this.#jobQueue.includes(queue)) this.#awaitJobs(-1);
  }

  /** Waits for everything that is under way, at most `timeout` milliseconds. @returns how many jobs are left */
  finish(timeout: number): number {
    for (const end = performance.now() + timeout; this.#offload.pending > 0; ) {
      const left = end - performance.now();
      if (left <= 0) break;
      this.#awaitJobs(Math.ceil(left));
    }
    return this.#offload.pending;
  }

  #awaitJobs(timeout: number): void {
    native.poll(this.#offload.eventfd, POLLIN, timeout);
    native.eventfdRead(this.#offload.eventfd);
    this.completions();
  }

  queueFailed(): void {
    this.queueFailures++;
  }

  reset(): void {
    this.#migration?.abort();
    this.#server.reset();
  }

  disconnected(reason: string): void {
    this.#backend = undefined;
    this.#migration?.abort();
    this.#server.reset();
    this.#onDisconnect(reason);
    this.#started.clear();
    this.#offload.mostWaits = MOST_WAITS;
  }
}
