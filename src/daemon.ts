/**
 * The life of the daemon: its socket, one front end at a time, signals, and the loop that serves them all.
 *
 * The device runs on the main thread, which blocks in one native wait and does not return to Node's event loop until the end:
 * no second isolate (10 MiB), no message between threads on a request's way. What needs the event loop (the metrics server)
 * has a worker thread of its own; signals arrive through eventfds.
 */
import { constants } from 'node:os';
import { type BackendState, VhostUserBackend, WaitLoop } from 'vhost-user-ts';
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import type { Config } from './config.js';
import { VirtioFsDevice } from './device.js';
import type { FileSystem } from './fs/filesystem.js';
import { ROOT_SLOT } from './fs/inodes.js';
import { lookupAgain } from './fs/passthrough/lookup.js';
import { openPassthrough, type PassthroughFs } from './fs/passthrough.js';
import { Opcode } from './fuse/abi.js';
import { OPCODES, operationOf } from './fuse/opcodes.js';
import { describe, FuseServer, type RequestMetrics, type ServerHooks } from './fuse/server.js';
import { liftFileSizeLimit, restoreFileSizeLimit, setOpenFilesLimit } from './limits.js';
import type { ListeningSocket } from './listen.js';
import { log } from './log.js';
import { HotMetrics, Slot } from './metrics/hot.js';
import { type FeedEnd, MetricsServer } from './metrics/server.js';
import { Migration } from './migration/migration.js';
import { VERSION } from './options.js';
import { EventCarriers } from './queue/carriers.js';
import { Offload } from './queue/offload.js';
import { refusingAgent } from './replay/refusing.js';
import { Replay } from './replay/replay.js';
import type { SavedEvents, SavedSession, Worker } from './restart.js';
import { type Handover, lockUp } from './sandbox.js';
import type { Started } from './start.js';
import { StartError } from './starterror.js';
import { ServiceManager } from './systemd.js';
import { withEchoes } from './watch/echofs.js';
import { EventFeed } from './watch/feed.js';
import { Fsnotify } from './watch/fsnotify.js';
import { ShareNodes } from './watch/sharenodes.js';
import type { GuestCaches } from './watch/translate.js';

const { EAGAIN, EMFILE } = constants.errno;
/** Threads for calls that would block, unless --thread-pool-size says otherwise. They start only when they are needed. */
const DEFAULT_OFFLOAD_THREADS = 8;
/** What the guest must be told beside the events when these are replayed: the end of what is watched. The rest its VFS does itself. */
const REPLAYED = { inodes: false, entries: true, negative: false };
const POLLHUP = 0x10;
/** For systemctl status. */
const WAITING = 'STATUS=waiting for a guest';
const SERVING = 'STATUS=serving a guest';
/** Lines a minute about clients that come and go. */
const CLIENT_LINES = 120;
/** Clients looked at before everything else gets its turn. */
const ACCEPTS_PER_TURN = 16;
/** When no client can be accepted (no descriptors are left), how long until the next try. */
const ACCEPT_AGAIN_MS = 1000;
/** How long the end waits for requests that the host's file system has not answered. The launcher waits a little longer. */
const END_WITHIN_MS = 6000;
/** How long a worker that is to be replaced waits for its requests. */
const QUIET_MS = 5000;
/** Notes of the ledger, behind those of the file system's journal: the request that a worker failed within, and how often. */
const POISON = { number: 16, count: 17, most: 2 } as const;

/** One daemon: made once, {@link run} once. */
export class Daemon {
  readonly #config: Config;
  readonly #loop = new WaitLoop();
  readonly #socket: ListeningSocket;
  readonly #fs: PassthroughFs;
  readonly #offload: Offload;
  readonly #device: VirtioFsDevice;
  readonly #events: EventCarriers | undefined;
  /** The host may have more events than were read in the last turn. */
  #moreEvents = false;
  #toldHow = false;
  /** Clients may wait that were not accepted: milliseconds until the next try, -1 when there are none. */
  #acceptAgain = -1;
  readonly #metrics: HotMetrics | undefined;
  readonly #metricsServer: MetricsServer | undefined;
  readonly #manager: ServiceManager;
  #backend: VhostUserBackend | undefined;
  /** Its socket. */
  #client = -1;
  #running = true;
  readonly #worker: Worker | undefined;
  readonly #server: FuseServer;
  /** The launcher has another worker ready. */
  #replaced = false;
  /** Has each request logged, or not, by the level of now. */
  #trace = (): void => {};

  /**
   * Makes everything ready to serve.
   * @param sandbox what was made outside the sandbox that we are in
   * @param worker what outlives this process, and what was taken up from the one before
   * @throws StartError for what the user can put right
   */
  constructor(config: Config, { socket, end, level, notify }: Started, sandbox?: Handover, worker?: Worker) {
    this.#config = config;
    this.#socket = socket;
    this.#worker = worker;
    this.#manager = new ServiceManager(notify);
    this.#loop.add(end, true, () => this.#stop('signal'));
    this.#loop.add(level, true, () => {
      native.eventfdRead(level);
      log.cycleLevel();
      this.#trace();
    });
    if (worker === undefined || worker.generation === 1) for (const warning of config.warnings) log.warn(warning);
    if (sandbox === undefined) setOpenFilesLimit(config.rlimitNofile);
    native.umask(0); // modes come from the guest as they are to be
    this.#offload = new Offload(config.threadPoolSize ?? DEFAULT_OFFLOAD_THREADS);
    const fileSize = sandbox === undefined ? liftFileSizeLimit() : sandbox.fileSize;
    this.#fs = openShare(config, sandbox?.root ?? config.sharedDir, this.#offload, worker);
    restoreFileSizeLimit(fileSize);
    const hooks: ServerHooks = { jobs: this.#offload, warn: (line) => log.limited('warn', 'session', line) };
    this.#events = this.#openEvents();
    if (this.#events !== undefined) hooks.events = this.#events;
    if (config.metrics !== undefined) {
      this.#metrics = new HotMetrics(OPCODES.length);
      if (worker !== undefined) this.#metrics.values[Slot.restarts] = worker.generation - 1;
      this.#metricsServer = serveMetrics(config, this.#metrics, this.#events, this.#openFeed(sandbox), sandbox);
      hooks.metrics = requestMetrics(this.#metrics);
    }
    const { share } = this.#fs;
    if (config.exportSupport && !share.useHandles)
      log.warn('--export-support: without file handles (CAP_DAC_READ_SEARCH) handles in the guest last only as long as it knows the file');
    const server = new FuseServer(this.#served(), serverOptions(config), hooks);
    this.#server = server;
    this.#device = new VirtioFsDevice(
      server,
      this.#offload,
      { tag: config.tag, requestQueues: config.requestQueues, busyPoll: config.busyPoll * 1000, events: this.#events },
      (level, message) => log.limited(level, `device ${level}`, message),
      (reason) => this.#disconnected(reason),
    );
    this.#trace = () => {
      server.trace = log.enabled('trace') ? (operation, request, result) => log.trace(`${describe(operation, request)}: ${result}`) : null;
    };
    this.#trace();
    this.#coherence(server);
    this.#device.migration = this.#migration(server);
    // Edge: a client that cannot be accepted must not wake us again and again.
    this.#loop.add(this.#socket.fd, true, () => this.#accept());
    this.#loop.add(this.#offload.eventfd, true, () => this.#device.completions());
    if (sandbox !== undefined) {
      if (config.sandbox === 'chroot') log.load(); // no module can be read later
      lockUp(sandbox, this.#fs.share.fd(ROOT_SLOT));
    }
    worker?.fill();
    if (worker !== undefined) this.#follow(worker);
  }

  /** Has the state kept from now on, after it has gone on with that of the worker before. */
  #follow(worker: Worker): void {
    const { store } = worker;
    const events = this.#events;
    this.#loop.add(worker.control, false, () => {
      for (let word = worker.listen(); word !== ''; word = worker.listen()) if (word === 'Q') this.#replaced = true;
    });
    const { earlier } = store;
    if (earlier?.client != null && !worker.lost.has(earlier.client.fd)) this.#resume(worker, earlier);
    else if (earlier !== undefined) this.#fs.share.reset();
    store.source = () => ({
      client: this.#backend?.state() ?? null,
      fuse: this.#server.session.minor === 0 ? null : this.#server.session,
      events: events === undefined ? null : { ...events.fsnotify.saved, told: events.told },
      pid: native.getpid(),
    });
    const save = () => store.save();
    this.#server.onChange = save;
    if (events !== undefined) events.onTold = events.fsnotify.onWatcher = save;
    save();
    worker.serves();
    this.#backend?.resume(store.earlierStage);
  }

  /** What the worker before had: a front end, and perhaps a session. */
  #resume({ store, fault, lost, endOfBefore }: Worker, earlier: SavedSession): void {
    const client = earlier.client as BackendState;
    const events = this.#events;
    this.#client = client.fd;
    const kept = (fd: number) => (lost.has(fd) ? -1 : fd);
    const rings = client.vrings.map((ring) => ({ ...ring, kickFd: kept(ring.kickFd), callFd: kept(ring.callFd), errFd: kept(ring.errFd) }));
    this.#backend = new VhostUserBackend(this.#device, client.fd, this.#loop, {
      ledger: store.ledger,
      keeper: store,
      earlier: { ...client, vrings: rings, requests: kept(client.requests), logFd: kept(client.logFd) },
    });
    this.#device.attach(this.#backend);
    const interrupted = this.#backend.prepare();
    this.#fs.share.journal.interrupted = endOfBefore;
    this.#fs.share.dropOpened(new Set(interrupted.map(Math.abs)));
    const served = interrupted.find((number) => number > 0) ?? 0;
    if (served !== 0 && fault) this.#device.poison = suspect(store.ledger.notes, served);
    if (earlier.fuse === null) {
      this.#fs.share.reset();
      return;
    }
    this.#server.goOn(earlier.fuse);
    if (!earlier.fuse.fsnotify || events === undefined || earlier.events === null) return;
    this.#beginEvents(events.fsnotify, false, (caches) => events.fsnotify.resume(caches, earlier.events as SavedEvents));
    events.resume(earlier.events.told, earlier.events.coherent || this.#config.cache !== 'notify');
  }

  /** Serves until the end. @returns the process's exit status */
  run(): number {
    const { sharedDir, listenOn } = this.#config;
    if (this.#worker === undefined || this.#worker.generation === 1)
      log.info(`sharing ${sharedDir}`, listenOn.kind === 'path' ? { socket: listenOn.path } : { fd: listenOn.fd });
    this.#manager.tell('READY=1', this.#backend === undefined ? WAITING : SERVING);
    if (this.#metrics !== undefined) this.#updateGauges(this.#metrics);
    while (this.#running) {
      if (this.#replaced && this.#handOver()) return 0;
      this.turn();
    }
    this.#end();
    return 0;
  }

  /** Waits for whatever comes next, at most `timeout` milliseconds (-1: for ever), and serves it. {@link run} is this in a loop. */
  turn(timeout = this.#untilDue()): void {
    const device = this.#device;
    const { locks } = this.#fs.share;
    this.#loop.turn(device.busy || this.#moreEvents ? 0 : timeout);
    this.#events?.expire();
    if (locks.waiting > 0) locks.poll(performance.now());
    if (this.#acceptAgain >= 0) this.#accept();
    if (device.busy) device.serveAgain();
    if (this.#moreEvents) this.#drainEvents();
    if (this.#metrics !== undefined) this.#updateGauges(this.#metrics);
  }

  #end(): void {
    const late = this.#device.finish(END_WITHIN_MS);
    this.#backend?.close('the daemon ends');
    this.#socket.close();
    if (late > 0) {
      log.error(`${late} requests are not waited for any longer: the host's file system does not answer`);
      // Threads in such a call cannot be joined; only the end of the process ends them.
      native.exitNow(1);
    }
    this.#offload.stop();
    this.#events?.fsnotify.close();
    this.#fs.close();
    this.#metricsServer?.close();
    log.flushSuppressed(true);
  }

  /** Milliseconds until something is due by the clock; -1: nothing is. */
  #untilDue(): number {
    const { locks } = this.#fs.share;
    const waits = locks.waiting === 0 ? -1 : locks.timeout(performance.now());
    return soonest(soonest(this.#events?.timeout ?? -1, waits), this.#acceptAgain);
  }

  /** Leaves everything as it is to the next worker. Returns false when a request has not ended. */
  #handOver(): boolean {
    const worker = this.#worker as Worker;
    this.#replaced = false;
    if (this.#device.finish(QUIET_MS) > 0) {
      worker.refuse();
      return false;
    }
    worker.store.save();
    this.#metricsServer?.close();
    worker.handOver();
    return true;
  }

  /** Remote fsnotify, unless it is turned off. */
  #openEvents(): EventCarriers | undefined {
    const { fsnotify: mode, fsnotifyLimit } = this.#config;
    if (mode === 'off') return undefined;
    const { share } = this.#fs;
    const store = this.#worker?.store;
    const saved = store?.earlier?.events;
    const pid = store?.earlier?.pid;
    let fsnotify: Fsnotify;
    try {
      fsnotify = new Fsnotify(new ShareNodes(share), share.fd(ROOT_SLOT), share.procfd, {
        mode,
        limit: fsnotifyLimit,
        warn: (line) => log.limited('warn', 'fsnotify', line),
        ...(store === undefined ? {} : { unsaid: store.events }),
        ...(saved == null || pid === undefined ? {} : { earlier: { fanotify: saved.fanotify, inotify: saved.inotify, pid } }),
      });
    } catch (error) {
      throw new StartError(`--fsnotify=${mode}: ${(error as Error).message}`);
    }
    this.#loop.add(fsnotify.fd, false, () => this.#drainEvents());
    return new EventCarriers(
      fsnotify,
      (session, agent) => this.#beginEvents(session, agent, (caches, coherent) => session.begin(caches, coherent)),
      (queue, reason) => this.#backend?.fail(queue, reason),
    );
  }

  /** A session with file events begins, or goes on. */
  #beginEvents(session: Fsnotify, agent: boolean, begin: (caches: GuestCaches, coherent: boolean) => void): void {
    const coherent = this.#config.cache === 'notify';
    const { entryTimeout, attrTimeout, negativeTimeout } = this.#config.timeouts;
    const caches = {
      inodes: coherent || attrTimeout > 0,
      entries: coherent || entryTimeout > 0,
      negative: coherent || negativeTimeout > 0,
    };
    const keeps = coherent && !agent;
    begin(agent ? REPLAYED : caches, keeps);
    this.#fs.share.watcher = {
      known(nodeid) {
        session.known(nodeid);
        return keeps;
      },
      forgotten: (nodeid) => session.forget(nodeid),
    };
  }

  /** The share with the layers that events need. */
  #served(): FileSystem {
    const events = this.#events;
    if (events === undefined) return refusingAgent(this.#fs);
    const { share } = this.#fs;
    const fs = withEchoes(this.#fs, events.fsnotify, new ShareNodes(share), this.#offload);
    if (this.#config.agentToken === undefined) return refusingAgent(fs);
    const token = Buffer.from(this.#config.agentToken, 'latin1');
    const again = (nodeid: number) => lookupAgain(share, nodeid);
    const replay = new Replay(fs, again, events, token, (level, line) => log.limited(level, `agent ${line}`, line));
    events.onRead = () => replay.readable();
    return replay.served;
  }

  /** What `virtiofsd-ts events` reads of the metrics server. */
  #openFeed(sandbox: Handover | undefined): FeedEnd | undefined {
    const events = this.#events;
    if (events === undefined) return undefined;
    const { share } = this.#fs;
    const root = this.#config.sandbox === 'chroot' ? '/' : (sandbox?.root ?? this.#config.sharedDir);
    const feed = new EventFeed(root, {
      procfd: share.procfd,
      fd(nodeid) {
        const slot = share.inodes.find(nodeid);
        return slot < 0 ? slot : share.fd(slot);
      },
      list: () => events.fsnotify.list(),
    });
    events.feed = feed;
    events.fsnotify.notifier.observer = (at, length) => feed.sent(at, length);
    const wake = native.eventfd(0);
    this.#loop.add(wake, true, () => feed.listIfWanted());
    return { buffer: feed.buffer, wake };
  }

  #migration(server: FuseServer): Migration {
    const config = this.#config;
    const options = {
      mode: config.migrationMode,
      onError: config.migrationOnError,
      verifyHandles: config.migrationVerifyHandles,
      confirmPaths: config.migrationConfirmPaths,
      readonly: config.readonly,
    };
    const { share } = this.#fs;
    return new Migration(
      server,
      share,
      this.#events?.fsnotify,
      this.#loop,
      options,
      () => serverOptions(config),
      (level, line) => log[level](line),
    );
  }

  #drainEvents(): void {
    this.#moreEvents = this.#events?.fsnotify.drain() ?? false;
  }

  /** `--cache=notify`: long timeouts from the moment that the guest can be told of changes, those of auto before. */
  #coherence(server: FuseServer): void {
    const events = this.#events;
    if (events === undefined) return;
    const { share } = this.#fs;
    const coherent = this.#config.cache === 'notify';
    const { timeouts, notifiedTimeouts } = this.#config;
    server.onSession = (session) => {
      // Set again when the session's events begin, if they do.
      share.watcher = null;
      if (!session.fsnotify && (this.#worker?.generation ?? 1) === 1) this.#tellHow();
      if (!coherent) return;
      server.setTimeouts(timeouts);
      share.cache = 'auto';
      if (!session.fsnotify) {
        log.warn(
          '--cache=notify: this guest cannot be told of changes (its kernel has no remote fsnotify): it caches as with --cache=auto',
        );
      }
    };
    if (!coherent) return;
    events.onCarrier = () => {
      server.setTimeouts(notifiedTimeouts);
      share.cache = 'always';
      log.debug('--cache=notify: the guest keeps what it knows until it is told');
    };
    events.fsnotify.onIncoherent = () => {
      server.setTimeouts(timeouts);
      share.cache = 'auto';
      log.warn(
        '--cache=notify: not every directory can be watched: from now on the guest caches as with --cache=auto (see --fsnotify-limit)',
      );
    };
  }

  /** Once: how a guest whose kernel cannot be told of events gets them. */
  #tellHow(): void {
    if (this.#toldHow) return;
    this.#toldHow = true;
    log.info(
      this.#config.agentToken === undefined
        ? "the guest's kernel cannot be told of file events: give it our patch (qemu/guest/kernel), or run the replay agent in it (--agent, qemu/guest/agent)"
        : "the guest's kernel cannot be told of file events: they wait for virtiofsd-ts-agent in the guest",
    );
  }

  #accept(): void {
    this.#acceptAgain = 0;
    for (let left = ACCEPTS_PER_TURN; left > 0; left--) {
      const fd = this.#socket.accept();
      if (fd < 0) {
        this.#acceptAgain = fd === -EAGAIN ? -1 : ACCEPT_AGAIN_MS;
        if (fd !== -EAGAIN)
          log.limited('error', 'accept', `a client cannot be accepted (errno ${-fd})${fd === -EMFILE ? ': raise --rlimit-nofile' : ''}`);
        return;
      }
      if (this.#backend !== undefined && (native.poll(this.#client, 0, 0) & POLLHUP) !== 0) this.#backend.close('it has hung up');
      if (this.#backend !== undefined) {
        // One guest, one daemon: a second front end would share nothing but the socket.
        native.close(fd);
        log.limited('warn', 'second client', 'refused a second client: one is connected already');
        continue;
      }
      log.limited('info', 'client', 'a client connected', undefined, undefined, CLIENT_LINES);
      this.#manager.tell(SERVING);
      this.#metrics?.add(Slot.connections, 1);
      this.#client = fd;
      const store = this.#worker?.store;
      store?.handled(0, 0, 0, 0); // the numbers of its messages begin anew
      this.#backend = new VhostUserBackend(this.#device, fd, this.#loop, store && { ledger: store.ledger, keeper: store });
      this.#device.attach(this.#backend);
      store?.save();
    }
  }

  #disconnected(reason: string): void {
    this.#backend = undefined;
    this.#worker?.store.save();
    if (this.#metrics !== undefined) this.#device.countQueues(this.#metrics);
    log.limited('info', 'client', `the client is gone: ${reason}`, undefined, undefined, CLIENT_LINES);
    log.flushSuppressed();
    // libvirt and others that pass a socket start a daemon per guest and expect it to end with it.
    if (this.#socket.inherited) this.#running = false;
    else if (this.#running) this.#manager.tell(WAITING);
  }

  #stop(why: string): void {
    if (this.#running) {
      log.info(`ending on ${why}`);
      this.#manager.tell('STOPPING=1', 'STATUS=ending');
    }
    this.#running = false;
  }

  /** What is kept elsewhere is copied once per turn of the loop: numbers are right whenever the device sleeps. */
  #updateGauges(metrics: HotMetrics): void {
    const { values } = metrics;
    this.#device.countQueues(metrics);
    values[Slot.offloadPending] = this.#offload.pending;
    values[Slot.offloadJobs] = this.#offload.submitted;
    values[Slot.queueFailures] = this.#device.queueFailures;
    values[Slot.connected] = this.#backend === undefined ? 0 : 1;
    const { share } = this.#fs;
    values[Slot.inodes] = share.inodes.size;
    values[Slot.openFiles] = share.handles.open;
    values[Slot.fds] = share.descriptors;
  }
}

/** The shorter of two time-outs, of which -1 is for ever. */
function soonest(a: number, b: number): number {
  return a < 0 ? b : b < 0 ? a : Math.min(a, b);
}

/** Counts that a worker failed within the request with this number. Returns the number when that was once too often, else 0. */
function suspect(notes: Float64Array, number: number): number {
  const count = notes[POISON.number] === number ? (notes[POISON.count] as number) + 1 : 1;
  notes[POISON.number] = number;
  notes[POISON.count] = count;
  if (count < POISON.most) return 0;
  log.error(`${count} workers have failed within the same request: the guest gets EIO for it`);
  return number;
}

function openShare(config: Config, root: string, offload: Offload, worker: Worker | undefined): PassthroughFs {
  try {
    return openPassthrough({
      root,
      cache: config.cache === 'notify' ? 'auto' : config.cache,
      xattr: config.xattr,
      ...(config.xattrmap === undefined ? {} : { xattrmap: config.xattrmap }),
      inodeFileHandles: config.inodeFileHandles,
      allowDirectIo: config.allowDirectIo,
      preserveNoatime: config.preserveNoatime,
      readonly: config.readonly,
      translateUid: config.translateUid,
      translateGid: config.translateGid,
      ...(config.threadPoolSize === 0 ? {} : { offload }),
      waits: offload,
      ...(worker === undefined ? {} : { block: worker.block, journal: worker.store.ledger.notes }),
      warn: (message) => log.limited('warn', 'share', message),
    });
  } catch (error) {
    // In the sandbox the share is at another path, which means nothing to anybody.
    throw new StartError((error as Error).message.replace(new RegExp(`^${root}:`), `${config.sharedDir}:`));
  }
}

function serverOptions(config: Config) {
  return {
    ...config.timeouts,
    cacheSymlinks: config.cacheSymlinks,
    readdirplus: config.readdirplus,
    writeback: config.writeback,
    killprivV2: config.killprivV2,
    posixAcl: config.posixAcl,
    securityLabel: config.securityLabel,
    announceSubmounts: config.announceSubmounts,
    allowMmap: config.allowMmap,
    posixLock: config.posixLock,
    flock: config.flock,
    // The agent opens directories by their nodeid, and the guest's kernel then asks for those that they are in.
    exportSupport: config.exportSupport || config.agentToken !== undefined,
    allowIdmap: config.agentToken === undefined,
  };
}

function serveMetrics(
  config: Config,
  metrics: HotMetrics,
  events: EventCarriers | undefined,
  feed: FeedEnd | undefined,
  sandbox: Handover | undefined,
): MetricsServer {
  const address = config.metrics as NonNullable<Config['metrics']>;
  const server = new MetricsServer(
    address,
    {
      buffers: [metrics.buffer],
      opcodes: OPCODES.map((operation) => operation.name),
      fsnotify: events?.fsnotify.counters.buffer,
      version: VERSION,
    },
    feed,
    sandbox?.metrics,
  );
  try {
    server.ready();
    if (config.sandbox === 'chroot') server.loaded();
  } catch (error) {
    throw new StartError((error as Error).message);
  }
  return server;
}

/** Nanoseconds of one tick of the time stamps at arena word `stamp`. */
function calibrate(stamp: number): number {
  native.stampAt(stamp << 3);
  const ticks = arena.f64[stamp] as number;
  const start = native.monotonic();
  let elapsed = 0;
  // 2 ms are exact to a thousandth; only a daemon that serves metrics spends them.
  while (elapsed < 2_000_000) elapsed = native.monotonic() - start;
  native.stamp();
  return elapsed / ((arena.f64[stamp] as number) - ticks);
}

/** Counts requests in the shared block. */
function requestMetrics(metrics: HotMetrics): RequestMetrics {
  const read = operationOf(Opcode.READ).slot;
  const write = operationOf(Opcode.WRITE).slot;
  const init = operationOf(Opcode.INIT).slot;
  const stamp = arenaAlloc(8) >> 3;
  const perTick = calibrate(stamp);
  return {
    batch: () => void native.stamp(),
    begin: () => arena.f64[stamp] as number,
    end(slot, began, errno, bytes) {
      metrics.record(slot, errno, ((arena.f64[stamp] as number) - began) * perTick);
      if (slot === read) metrics.add(Slot.readBytes, bytes);
      else if (slot === write) metrics.add(Slot.writtenBytes, bytes);
      else if (slot === init && errno === 0) metrics.add(Slot.sessions, 1);
    },
    malformed: () => metrics.add(Slot.malformed, 1),
  };
}
