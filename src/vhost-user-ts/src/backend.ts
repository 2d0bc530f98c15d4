/**
 * The back-end half of vhost-user: the session with one front end, its vrings and the device behind them.
 *
 * A ring is started by SET_VRING_KICK and stopped by GET_VRING_BASE; it is served while it is started and enabled
 * (vhost-user, "Ring states"). Everything happens in the thread that turns the {@link WaitLoop}: no locks, and the
 * memory table can only change between two batches.
 */
import { DescriptorChain } from './chain.js';
import { Connection, Received } from './connection.js';
import { closeFd } from './fd.js';
import { Ledger } from './ledger.js';
import type { WaitLoop } from './loop.js';
import { GuestMemory, type LogSpec, type RegionSpec } from './memory.js';
import {
  BACKEND_MESSAGES,
  type BackendName,
  type BackendPayload,
  decodeFrontendMessage,
  encodeBackendMessage,
  encodeReply,
  Feature,
  FRONTEND_MESSAGES,
  type FrontendMessage,
  features,
  HeaderFlag,
  hasFeature,
  type MemoryRegion,
  type MessageSpec,
  NO_FD,
  type PayloadKind,
  type Payloads,
  ProtocolFeature,
  VRING_FLAG_LOG,
  VRING_INDEX_MASK,
} from './message.js';
import { arena, native } from './native.js';
import { MAX_QUEUE_SIZE, type RingAddresses, Virtqueue } from './virtqueue.js';

/** Severity of a line for {@link VhostUserDevice.log}. */
export type LogLevel = 'error' | 'warn' | 'info' | 'debug';

/** A device type, as the back end sees it. */
export interface VhostUserDevice {
  /** Most queues the device can have (GET_QUEUE_NUM). */
  readonly queueCount: number;
  /** Virtio feature bits offered. VHOST_USER_F_PROTOCOL_FEATURES is added by the back end. */
  readonly features: bigint;
  /** Protocol feature bits offered (as a mask), out of {@link SUPPORTED_PROTOCOL_FEATURES}. */
  readonly protocolFeatures: bigint;

  /** Serves every chain that waits in a queue. Called for a kick, when the ring is enabled, and after the memory changed. */
  serve(queue: Virtqueue): void;
  /** The front end chose features (SET_FEATURES); before any ring starts. */
  featuresAcked?(acked: bigint): void;
  /** The ring was started and enabled for the first time since it was stopped. */
  queueStarted?(queue: Virtqueue): void;
  /** The ring is about to stop: give back every chain that was taken (waiting for it where it must be), or drop it. */
  queueStopping?(queue: Virtqueue): void;
  /** The ring broke the rules and is served no more until it is started anew. */
  queueFailed?(queue: Virtqueue, reason: string): void;
  /** RESET_DEVICE, or a driver that starts over. Rings are stopped already. */
  reset?(): void;
  /** The front end is gone. Rings are stopped already. */
  disconnected?(reason: string): void;
  /** The configuration space (PROTOCOL_F_CONFIG). */
  config?(): Uint8Array;
  /** SET_CONFIG; false refuses it. */
  writeConfig?(offset: number, data: Uint8Array): boolean;
  /** DEVICE_STATE: writes (`direction` 0) or reads (1) the device's state on `fd`, which it owns from now on. False: cannot. */
  transferState?(direction: number, fd: number): boolean;
  /** CHECK_DEVICE_STATE: whether the last transfer ended well. */
  checkState?(): boolean;
  log?(level: LogLevel, message: string): void;
}

/** Protocol features this back end implements; a device offers some of them. */
export const SUPPORTED_PROTOCOL_FEATURES = features(
  ProtocolFeature.MQ,
  ProtocolFeature.LOG_SHMFD,
  ProtocolFeature.REPLY_ACK,
  ProtocolFeature.BACKEND_REQ,
  ProtocolFeature.BACKEND_SEND_FD,
  ProtocolFeature.CONFIG,
  ProtocolFeature.RESET_DEVICE,
  ProtocolFeature.CONFIGURE_MEM_SLOTS,
  ProtocolFeature.DEVICE_STATE,
);

/** Messages handled before the loop looks after everything else: more than any front end sends at once. */
const MESSAGES_PER_TURN = 256;
/** A session in numbers, for another process to go on with it ({@link BackendOptions.earlier}). Descriptors keep their numbers. */
export interface BackendState {
  readonly fd: number;
  readonly acked: string;
  readonly ackedProtocol: string;
  readonly owned: boolean;
  /** The back-end channel, or -1. */
  readonly requests: number;
  readonly logFd: number;
  readonly log: LogSpec;
  readonly regions: readonly (RegionSpec & { readonly fd: number })[];
  readonly vrings: readonly RingState[];
  readonly handled: HandledMessage;
}

/** The message that was handled last. */
export interface HandledMessage {
  /** How many were before it. */
  readonly count: number;
  /** Its length; 0: it is not in the socket any more. */
  readonly length: number;
  /** The bytes that answer it, in hexadecimal. */
  readonly reply: string;
}

/** A ring that the front end has said something of. */
export interface RingState {
  readonly index: number;
  readonly size: number;
  readonly base: number;
  readonly addresses: RingAddresses | null;
  readonly kickFd: number;
  readonly callFd: number;
  readonly errFd: number;
  readonly enabled: boolean;
  readonly started: boolean;
  readonly failed: boolean;
  readonly running: boolean;
}

/** What happens to a message after it was handled and that was saved. A system call that was about to be made counts as made. */
export const MessageStage = { handled: 0, answered: 1, consumed: 2 } as const;

/** Keeps a session for another process. */
export interface SessionKeeper {
  /** {@link VhostUserBackend.state} is another one: it must be kept when this returns. */
  save(): void;
  /** As {@link save}, when only {@link BackendState.handled} is another one: the reply has `bytes` bytes at arena offset `at`. */
  handled(count: number, length: number, at: number, bytes: number): void;
  /** What was done with the message with this count. */
  stage(count: number, stage: number): void;
}

/** What a back end can be given. */
export interface BackendOptions {
  /** How many memory regions are taken (GET_MAX_MEM_SLOTS). */
  maxRegions?: number;
  /** Where is written down what is in flight. */
  ledger?: Ledger;
  keeper?: SessionKeeper;
  /** The session of an earlier process, to go on with by {@link VhostUserBackend.prepare} and {@link VhostUserBackend.resume}. */
  earlier?: BackendState;
}

interface Vring {
  readonly queue: Virtqueue;
  size: number;
  base: number;
  addresses: RingAddresses | undefined;
  kickFd: number;
  kickTag: number;
  errFd: number;
  enabled: boolean;
  /** Its position is the queue's, not `base`; the queue may have stopped since, when its rings left the memory table. */
  started: boolean;
  /** The device broke off: served again only after the ring was started anew. */
  failed: boolean;
  /** queueStarted was called. */
  announced: boolean;
}

/** Thrown by a handler to refuse a message: never leaves this file. */
class Refusal extends Error {}

/** Requests that change nothing: no whole state is written for them. */
const UNCHANGING = new Set(
  (['GET_FEATURES', 'GET_PROTOCOL_FEATURES', 'GET_QUEUE_NUM', 'GET_MAX_MEM_SLOTS', 'GET_CONFIG', 'CHECK_DEVICE_STATE'] as const).map(
    (name) => FRONTEND_MESSAGES[name].request,
  ),
);

const isServed = (number: number): boolean => number > 0;

function exact(value: bigint): number {
  if (value > 0x1f_ffff_ffff_ffffn) throw new Refusal(`address or size 0x${value.toString(16)} out of range`);
  return Number(value);
}

function toSpec(region: MemoryRegion): RegionSpec {
  return {
    guestAddress: exact(region.guestAddress),
    size: exact(region.size),
    userAddress: exact(region.userAddress),
    mmapOffset: exact(region.mmapOffset),
  };
}

/** A session with one front end. */
export class VhostUserBackend {
  readonly memory: GuestMemory;
  /** Features the driver and the front end accepted. */
  acked = 0n;
  ackedProtocol = 0n;
  /** False once the connection ended. */
  connected = true;

  readonly #device: VhostUserDevice;
  readonly #loop: WaitLoop;
  readonly #connection: Connection;
  readonly #tag: number;
  /** Those that the front end has named, in that order; and by index. */
  readonly #vrings: Vring[] = [];
  readonly #byIndex: (Vring | undefined)[] = [];
  readonly #ledger: Ledger;
  readonly #chain = new DescriptorChain();
  readonly #keeper: SessionKeeper | undefined;
  readonly #earlier: BackendState | undefined;
  #requests: Connection | undefined; // the back-end channel
  #logFd = -1;
  #owned = false;
  /** Rings are enabled from the start: the front end has no protocol features. */
  #enabled = false;
  #brokenSeen = native.brokenCount();
  #replyBytes = 0;
  readonly #disposed: number[] = [];
  #handled: HandledMessage = { count: 0, length: 0, reply: '' };

  /** @param fd connected Unix socket, non-blocking; owned by the session from now on */
  constructor(device: VhostUserDevice, fd: number, loop: WaitLoop, options: BackendOptions = {}) {
    const { ledger = new Ledger(), maxRegions = 509 } = options;
    this.#device = device;
    this.#loop = loop;
    this.#keeper = options.keeper;
    this.#earlier = options.earlier;
    this.memory = new GuestMemory(maxRegions);
    this.memory.dispose = (fd) => void this.#dispose(fd);
    this.#connection = new Connection(fd, 'request', options.keeper !== undefined);
    this.#ledger = ledger;
    this.#tag = loop.add(fd, false, () => this.#readable());
  }

  /** The queues, by index. */
  queue(index: number): Virtqueue | undefined {
    return this.#ring(index)?.queue;
  }

  get offered(): bigint {
    return this.#device.features | features(Feature.PROTOCOL_FEATURES);
  }

  #log(level: LogLevel, message: string): void {
    this.#device.log?.(level, message);
  }

  // --- another process goes on ---

  /** The session as it is. */
  state(): BackendState {
    const touched = (vring: Vring) =>
      vring.size > 0 || vring.addresses !== undefined || vring.enabled || vring.kickFd >= 0 || vring.queue.callFd >= 0 || vring.errFd >= 0;
    return {
      fd: this.#connection.fd,
      acked: String(this.acked),
      ackedProtocol: String(this.ackedProtocol),
      owned: this.#owned,
      requests: this.#requests?.fd ?? -1,
      logFd: this.#logFd,
      log: this.memory.log,
      regions: this.memory.table.map(({ guestAddress, size, userAddress, mmapOffset, fd }) => ({
        guestAddress,
        size,
        userAddress,
        mmapOffset,
        fd,
      })),
      vrings: this.#vrings.filter(touched).map((vring) => ({
        index: vring.queue.index,
        size: vring.size,
        base: vring.started ? vring.queue.lastAvail : vring.base,
        addresses: vring.addresses ?? null,
        kickFd: vring.kickFd,
        callFd: vring.queue.callFd,
        errFd: vring.errFd,
        enabled: vring.enabled,
        started: vring.started,
        failed: vring.failed,
        running: vring.queue.running,
      })),
      handled: this.#handled,
    };
  }

  /** Descriptors of a session, which {@link prepare} must find open. */
  static descriptors(state: BackendState): number[] {
    const rings = state.vrings.flatMap(({ kickFd, callFd, errFd }) => [kickFd, callFd, errFd]);
    return [state.fd, state.requests, state.logFd, state.log.fd, ...state.regions.map(({ fd }) => fd), ...rings].filter((fd) => fd >= 0);
  }

  /**
   * Takes up the earlier session: memory and rings are mapped, nothing is served yet.
   * @returns the numbers of the requests in flight; the one that was being served is positive
   */
  prepare(): number[] {
    const earlier = this.#earlier;
    if (earlier === undefined) return [];
    this.acked = BigInt(earlier.acked);
    this.ackedProtocol = BigInt(earlier.ackedProtocol);
    this.#owned = earlier.owned;
    this.#handled = earlier.handled;
    this.#logFd = earlier.logFd;
    if (earlier.requests >= 0) this.#requests = new Connection(earlier.requests, 'reply');
    for (const { fd, ...spec } of earlier.regions) {
      const error = this.memory.add(spec, fd, fd);
      if (error < 0) this.#log('error', `memory region at 0x${spec.guestAddress.toString(16)} cannot be mapped again (errno ${-error})`);
    }
    const { log } = earlier;
    if (log.fd >= 0) this.memory.setLog(log.fd, log.offset, log.size, log.fd);
    this.memory.setLogging(hasFeature(this.acked, Feature.LOG_ALL));
    this.#device.featuresAcked?.(this.acked);
    for (const { index, addresses, running: ran, callFd, ...state } of earlier.vrings) {
      const vring = this.#ring(index);
      if (vring === undefined) continue;
      Object.assign(vring, state, { addresses: addresses ?? undefined });
      vring.queue.callFd = callFd;
      if (!ran || addresses === null) continue;
      const problem = vring.queue.resume(vring.size, addresses, {
        eventIdx: hasFeature(this.acked, Feature.EVENT_IDX),
        indirect: hasFeature(this.acked, Feature.INDIRECT_DESC),
      });
      if (problem !== undefined) {
        this.fail(vring.queue, problem);
        continue;
      }
      if (vring.kickFd >= 0) vring.kickTag = this.#wait(vring);
    }
    return this.#vrings.flatMap(({ queue }) => queue.interrupted);
  }

  /**
   * Goes on, after {@link prepare}: the message that was under way is answered if it was not, and what was in flight is served again. The
   * device's own state must be there.
   * @param stage what was done with that message, a {@link MessageStage}
   */
  resume(stage: number): void {
    if (this.#earlier === undefined) return;
    this.#settle(stage);
    const running = this.#vrings.filter(({ queue }) => queue.running);
    // What was being served is served before anything else is.
    running.sort((a, b) => Number(b.queue.interrupted.some(isServed)) - Number(a.queue.interrupted.some(isServed)));
    for (const vring of running) {
      do this.#run(vring);
      while (vring.queue.interrupted.length > 0 && vring.enabled && !vring.failed);
      // The interrupt for what was answered before may have got lost with the earlier process.
      vring.queue.signal();
    }
  }

  /** Sends the reply that an earlier process has not sent, and takes the message out of the socket. */
  #settle(stage: number): void {
    const { length, reply } = this.#handled;
    const connection = this.#connection;
    if (length === 0 || stage === MessageStage.consumed) return;
    connection.unconsumed = length;
    arena.buffer.write(reply, connection.out, 'hex');
    this.#replyBytes = reply.length / 2;
    this.#finish(stage);
  }

  /** Has the state kept. */
  save(): void {
    this.#keeper?.save();
    for (const fd of this.#disposed.splice(0)) closeFd(fd);
  }

  /** A descriptor is not needed any more. Where the state is kept it stays open until the state is without it. */
  #dispose(fd: number): -1 {
    if (this.#keeper === undefined) return closeFd(fd);
    if (fd >= 0) this.#disposed.push(fd);
    return -1;
  }

  // --- the control channel ---

  #readable(): void {
    // A front end that never stops talking must not keep the thread from its rings, its signals and everything else.
    for (let left = MESSAGES_PER_TURN; left > 0 && this.connected; left--) {
      const got = this.#connection.receive();
      if (got === Received.none) return;
      if (got === Received.closed) {
        this.close(this.#connection.reason);
        return;
      }
      this.#handle();
    }
  }

  #handle(): void {
    const connection = this.#connection;
    const { header, fds } = connection;
    const message = decodeFrontendMessage(header, connection.bytes, connection.payload, fds.count);
    const spec: MessageSpec | undefined =
      message.name === 'unknown' || message.name === 'malformed'
        ? Object.values(FRONTEND_MESSAGES).find((s) => s.request === header.request)
        : FRONTEND_MESSAGES[message.name];
    let reply: Payloads[PayloadKind] | undefined;
    let refused: string | undefined;
    let dispatched = false;
    try {
      if (message.name === 'unknown') throw new Refusal(`unknown request ${header.request}`);
      if (message.name === 'malformed') throw new Refusal(message.reason);
      const needs = FRONTEND_MESSAGES[message.name].feature;
      if (needs !== undefined && !hasFeature(this.ackedProtocol, needs)) {
        throw new Refusal(`${message.name} without its protocol feature (bit ${needs})`);
      }
      this.#log('debug', `vhost-user ${message.name}`);
      dispatched = true;
      reply = this.#dispatch(message);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      refused = error.message;
      this.#log('warn', `vhost-user: refused: ${refused}`);
    }
    fds.closeAll();
    if (!this.connected) return;
    this.#replyBytes = 0;
    this.#answer(spec, reply, refused);
    if (!this.connected) return;
    if (this.#keeper !== undefined) {
      const count = this.#handled.count + 1;
      const length = connection.unconsumed;
      const changes = dispatched && spec !== undefined && !UNCHANGING.has(spec.request);
      const reply = changes ? arena.buffer.toString('hex', connection.out, connection.out + this.#replyBytes) : '';
      this.#handled = { count, length: changes ? length : 0, reply };
      if (changes) this.save();
      else this.#keeper.handled(count, length, connection.out, this.#replyBytes);
    }
    this.#finish(MessageStage.handled);
  }

  /** Answers and consumes the message that was handled, as far as that was not done. */
  #finish(stage: number): void {
    const connection = this.#connection;
    const keeper = this.#keeper;
    if (stage < MessageStage.answered) {
      keeper?.stage(this.#handled.count, MessageStage.answered);
      if (this.#replyBytes > 0 && !connection.send(connection.out, this.#replyBytes)) this.close('the front end does not read its replies');
      if (!this.connected) return;
    }
    keeper?.stage(this.#handled.count, MessageStage.consumed);
    connection.consume();
  }

  /** Makes the reply, if there is to be one. */
  #answer(spec: MessageSpec | undefined, reply: Payloads[PayloadKind] | undefined, refused: string | undefined): void {
    const { header, out, bytes } = this.#connection;
    const wantsAck = (header.flags & HeaderFlag.NEED_REPLY) !== 0 && hasFeature(this.ackedProtocol, ProtocolFeature.REPLY_ACK);
    let length: number;
    if (spec === undefined || spec.reply === 'ack') {
      if (!wantsAck) return;
      length = encodeReply(bytes, out, header.request, 'u64', refused === undefined ? 0n : 1n);
    } else if (refused === undefined) {
      length = encodeReply(bytes, out, header.request, spec.reply, reply);
    } else if (spec.reply === 'u64') {
      length = encodeReply(bytes, out, header.request, 'u64', 1n);
    } else if (spec.reply === 'config') {
      // "uses a zero length of payload to indicate an error" (GET_CONFIG)
      length = encodeReply(bytes, out, header.request, 'none', undefined);
    } else {
      this.close(`no answer is possible to a refused request: ${refused}`);
      return;
    }
    this.#replyBytes = length;
  }

  #dispatch(message: Exclude<FrontendMessage, { name: 'unknown' | 'malformed' }>): Payloads[PayloadKind] | undefined {
    const device = this.#device;
    const { fds } = this.#connection;
    switch (message.name) {
      case 'GET_FEATURES':
        return this.offered;
      case 'SET_FEATURES':
        this.#setFeatures(message.payload);
        return undefined;
      case 'GET_PROTOCOL_FEATURES':
        return device.protocolFeatures;
      case 'SET_PROTOCOL_FEATURES':
        if ((message.payload & ~device.protocolFeatures) !== 0n) throw new Refusal('protocol features that were not offered');
        this.ackedProtocol = message.payload;
        return undefined;
      case 'SET_OWNER':
        // Again on the same connection: QEMU's device was unplugged and another is plugged in, with all its memory new to us.
        if (this.#owned) {
          this.#startOver();
          this.memory.clearRegions();
        }
        this.#owned = true;
        return undefined;
      case 'RESET_OWNER': // deprecated; front ends used it for "stop everything"
      case 'RESET_DEVICE':
        this.#startOver();
        return undefined;
      case 'GET_QUEUE_NUM':
        return BigInt(device.queueCount);
      case 'GET_MAX_MEM_SLOTS':
        return BigInt(this.memory.maxRegions);
      case 'SET_MEM_TABLE':
        this.#setMemoryTable(message.payload);
        return undefined;
      case 'ADD_MEM_REG':
        this.#addRegion(message.payload);
        this.#memoryChanged();
        return undefined;
      case 'REM_MEM_REG':
        if (this.memory.remove(toSpec(message.payload)) !== 0) throw new Refusal('REM_MEM_REG for a region that was never added');
        this.#memoryChanged();
        return undefined;
      case 'SET_VRING_NUM': {
        const vring = this.#vring(message.payload.index);
        const { num } = message.payload;
        if (num < 1 || num > MAX_QUEUE_SIZE || (num & (num - 1)) !== 0)
          throw new Refusal(`ring size ${num} is not a power of two up to ${MAX_QUEUE_SIZE}`);
        if (vring.queue.running) throw new Refusal('SET_VRING_NUM while the ring runs');
        vring.size = num;
        return undefined;
      }
      case 'SET_VRING_ADDR':
        this.#setAddresses(message.payload);
        return undefined;
      case 'SET_VRING_BASE': {
        const vring = this.#vring(message.payload.index);
        if (vring.queue.running) throw new Refusal('SET_VRING_BASE while the ring runs');
        vring.base = message.payload.num & 0xffff;
        return undefined;
      }
      case 'GET_VRING_BASE': {
        const vring = this.#vring(message.payload.index);
        this.#stop(vring);
        return { index: message.payload.index, num: vring.base };
      }
      case 'SET_VRING_KICK':
        this.#setKick(this.#vring(Number(message.payload & VRING_INDEX_MASK)), message.payload);
        return undefined;
      case 'SET_VRING_CALL': {
        const { queue } = this.#vring(Number(message.payload & VRING_INDEX_MASK));
        this.#dispose(queue.callFd);
        queue.callFd = this.#takeSignal(message.payload);
        // Completions that were signalled on the old descriptor may not have been seen: one interrupt too many does no harm.
        if (queue.running) queue.signal();
        return undefined;
      }
      case 'SET_VRING_ERR': {
        const vring = this.#vring(Number(message.payload & VRING_INDEX_MASK));
        this.#dispose(vring.errFd);
        vring.errFd = this.#takeSignal(message.payload);
        return undefined;
      }
      case 'SET_VRING_ENABLE': {
        const vring = this.#vring(message.payload.index);
        vring.enabled = message.payload.num !== 0;
        this.#run(vring);
        return undefined;
      }
      case 'SET_BACKEND_REQ_FD': {
        this.#requests?.close();
        const fd = fds.take();
        native.setNonBlocking(fd, 1);
        this.#requests = new Connection(fd, 'reply');
        return undefined;
      }
      case 'GET_CONFIG':
        return this.#getConfig(message.payload.offset, message.payload.data.length, message.payload.flags);
      case 'SET_CONFIG':
        if (device.writeConfig?.(message.payload.offset, message.payload.data) !== true)
          throw new Refusal('the configuration space is read-only');
        return undefined;
      case 'SET_LOG_BASE': {
        const [offset, size] = [exact(message.payload.offset), exact(message.payload.size)];
        const fd = fds.take();
        const keep = this.#keeper !== undefined;
        const result = this.memory.setLog(fd, offset, size, keep ? fd : -1);
        if (!keep || result < 0) closeFd(fd);
        if (result < 0) throw new Refusal(`the dirty log cannot be mapped (errno ${-result})`);
        return 0n;
      }
      case 'SET_LOG_FD':
        this.#logFd = this.#dispose(this.#logFd);
        this.#logFd = fds.take();
        return undefined;
      case 'SET_DEVICE_STATE_FD':
        return this.#transferState(message.payload);
      case 'CHECK_DEVICE_STATE':
        return device.checkState?.() === true ? 0n : 1n;
      default:
        throw new Refusal(`${message.name} is not supported`);
    }
  }

  #transferState({ direction, phase }: Payloads['deviceState']): bigint {
    const device = this.#device;
    if (device.transferState === undefined) throw new Refusal('the device state cannot be transferred');
    if (direction > 1 || phase !== 0) throw new Refusal(`transfer of the device state in direction ${direction}, phase ${phase}`);
    if (this.#vrings.some((vring) => vring.queue.running)) throw new Refusal('transfer of the device state while rings run');
    return device.transferState(direction, this.#connection.fds.take()) ? NO_FD : NO_FD | 1n;
  }

  #setFeatures(acked: bigint): void {
    if ((acked & ~this.offered) !== 0n) throw new Refusal(`features that were not offered: 0x${(acked & ~this.offered).toString(16)}`);
    this.acked = acked;
    this.memory.setLogging(hasFeature(acked, Feature.LOG_ALL));
    // Without protocol features rings are enabled from the start.
    this.#enabled ||= !hasFeature(acked, Feature.PROTOCOL_FEATURES);
    if (this.#enabled) for (const vring of this.#vrings) vring.enabled = true;
    this.#device.featuresAcked?.(acked);
  }

  #vring(index: number): Vring {
    const vring = this.#ring(index);
    if (vring === undefined) throw new Refusal(`vring ${index} of ${this.#device.queueCount}`);
    return vring;
  }

  /** A ring, made when it is first named: a device has more than any front end uses. */
  #ring(index: number): Vring | undefined {
    const known = this.#byIndex[index];
    if (known !== undefined || !(index >= 0 && index < this.#device.queueCount)) return known;
    const vring: Vring = {
      queue: new Virtqueue(index, this.memory, this.#chain, this.#ledger),
      size: 0,
      base: 0,
      addresses: undefined,
      kickFd: -1,
      kickTag: -1,
      errFd: -1,
      enabled: this.#enabled,
      started: false,
      failed: false,
      announced: false,
    };
    this.#byIndex[index] = vring;
    this.#vrings.push(vring);
    return vring;
  }

  #takeEventfd(value: bigint): number {
    return (value & NO_FD) !== 0n ? -1 : this.#connection.fds.take();
  }

  /** A descriptor that is written to: virtio_uml passes pipes, which must never block us when nobody reads them. */
  #takeSignal(value: bigint): number {
    const fd = this.#takeEventfd(value);
    if (fd >= 0) native.setNonBlocking(fd, 1);
    return fd;
  }

  #getConfig(offset: number, size: number, flags: number): Payloads['config'] {
    const config = this.#device.config?.();
    if (config === undefined) throw new Refusal('no configuration space');
    // What lies beyond reads as zero: front ends ask for the whole structure of a newer specification.
    const data = new Uint8Array(size);
    data.set(config.subarray(Math.min(offset, config.length), Math.min(offset + size, config.length)));
    return { offset, flags, data };
  }

  // --- memory ---

  #addRegion(region: MemoryRegion): void {
    const spec = toSpec(region);
    const fd = this.#connection.fds.take();
    const keep = this.#keeper !== undefined;
    const result = this.memory.add(spec, fd, keep ? fd : -1);
    if (!keep || result < 0) closeFd(fd);
    if (result < 0) {
      throw new Refusal(`memory region of ${spec.size} bytes at 0x${spec.guestAddress.toString(16)} cannot be mapped (errno ${-result})`);
    }
  }

  #setMemoryTable(table: MemoryRegion[]): void {
    this.memory.clearRegions();
    try {
      for (const region of table) this.#addRegion(region);
    } finally {
      this.#memoryChanged();
    }
  }

  #memoryChanged(): void {
    for (const vring of this.#vrings) {
      if (!vring.queue.running || vring.addresses === undefined) continue;
      const problem = vring.queue.remap(vring.addresses);
      if (problem !== undefined) this.fail(vring.queue, problem);
    }
  }

  // --- rings ---

  #setAddresses(payload: Payloads['vringAddress']): void {
    const vring = this.#vring(payload.index);
    vring.addresses = {
      descriptors: exact(payload.descriptor),
      avail: exact(payload.available),
      used: exact(payload.used),
      log: (payload.flags & VRING_FLAG_LOG) !== 0 ? exact(payload.log) : -1,
    };
    // Migration turns logging on with the ring running: same addresses, other flags.
    if (vring.queue.running) {
      const problem = vring.queue.remap(vring.addresses);
      if (problem !== undefined) {
        this.fail(vring.queue, problem); // it has no rings now
        throw new Refusal(problem);
      }
    }
  }

  #setKick(vring: Vring, payload: bigint): void {
    this.#dropKick(vring);
    const fd = this.#takeEventfd(payload);
    if (fd < 0) throw new Refusal('a ring without a kick descriptor would have to be polled');
    vring.kickFd = fd;
    const tag = this.#wait(vring);
    if (tag < 0) {
      vring.kickFd = -1;
      closeFd(fd);
      throw new Refusal(`the kick descriptor cannot be waited for (errno ${-tag})`);
    }
    vring.kickTag = tag;
    try {
      if (!vring.queue.running) this.#start(vring);
    } catch (error) {
      this.#dropKick(vring);
      throw error;
    }
    // The old descriptor's number can be another one's as soon as something is served.
    this.save();
    this.#run(vring);
  }

  /** Waits for kicks. */
  #wait(vring: Vring): number {
    return this.#loop.add(vring.kickFd, true, () => {
      vring.queue.kicks++;
      this.#run(vring);
    });
  }

  #start(vring: Vring): void {
    if (vring.addresses === undefined || vring.size === 0) throw new Refusal('SET_VRING_KICK before the ring has a size and addresses');
    const problem = vring.queue.start(vring.size, vring.addresses, vring.base, {
      eventIdx: hasFeature(this.acked, Feature.EVENT_IDX),
      indirect: hasFeature(this.acked, Feature.INDIRECT_DESC),
    });
    if (problem !== undefined) throw new Refusal(`vring ${vring.queue.index}: ${problem}`);
    vring.started = true;
    vring.failed = false;
    vring.announced = false;
  }

  /** Lets the device serve a queue if it may be served now, and says whether. */
  serve(queue: Virtqueue): boolean {
    const vring = this.#byIndex[queue.index];
    return vring !== undefined && this.#run(vring);
  }

  /** As {@link serve}. */
  #run(vring: Vring): boolean {
    if (!vring.queue.running || !vring.enabled || vring.failed) return false;
    if (!vring.announced) {
      vring.announced = true;
      this.#device.queueStarted?.(vring.queue);
    }
    this.#device.serve(vring.queue);
    if (native.brokenCount() !== this.#brokenSeen) this.#memoryLost();
    return true;
  }

  /** The front end truncated its memory file under us: what the rings say is no longer what the driver wrote. */
  #memoryLost(): void {
    this.#brokenSeen = native.brokenCount();
    if (!this.memory.broken) return; // another session's
    for (const { queue } of this.#vrings) if (queue.running) this.fail(queue, 'its memory was truncated by the front end');
  }

  #dropKick(vring: Vring): void {
    if (vring.kickTag >= 0) this.#loop.remove(vring.kickTag);
    vring.kickTag = -1;
    vring.kickFd = this.#dispose(vring.kickFd);
  }

  #stop(vring: Vring): void {
    if (vring.announced) this.#device.queueStopping?.(vring.queue);
    vring.announced = false;
    if (vring.started) vring.base = vring.queue.lastAvail;
    vring.started = false;
    vring.queue.stop();
    this.#dropKick(vring);
  }

  #forget(vring: Vring): void {
    vring.size = 0;
    vring.base = 0;
    vring.addresses = undefined;
    vring.enabled = false;
    vring.failed = false;
  }

  #startOver(): void {
    this.#stopAll();
    for (const vring of this.#vrings) this.#forget(vring);
    this.#enabled = false;
    this.#device.reset?.();
  }

  #stopAll(): void {
    for (const vring of this.#vrings) this.#stop(vring);
  }

  /**
   * The driver broke the rules of a ring: it is served no more until it is started anew. The front end hears of it by the
   * ring's error eventfd; the other rings go on.
   */
  fail(queue: Virtqueue, reason: string): void {
    const vring = this.#byIndex[queue.index];
    if (vring === undefined || vring.failed) return;
    vring.failed = true;
    this.#log('error', `queue ${queue.index} stopped: ${reason}; it comes back when the guest resets the device`);
    this.#device.queueFailed?.(queue, reason);
    if (vring.errFd >= 0) native.eventfdWrite(vring.errFd);
  }

  /** Whether {@link fail} was called since the ring was started. */
  failed(queue: Virtqueue): boolean {
    return this.#byIndex[queue.index]?.failed === true;
  }

  // --- the back-end channel ---

  /**
   * Sends a request to the front end without waiting for an acknowledgement.
   * @returns false when there is no channel, its feature was not negotiated, or the front end is gone.
   */
  request<N extends BackendName>(name: N, payload: BackendPayload<N>, fds: readonly number[] = []): boolean {
    const needs = BACKEND_MESSAGES[name].feature;
    if (this.#requests === undefined || (needs !== undefined && !hasFeature(this.ackedProtocol, needs))) return false;
    const length = encodeBackendMessage(this.#requests.bytes, this.#requests.out, name, payload);
    return this.#requests.send(this.#requests.out, length, fds);
  }

  /** Ends the session: rings stop, descriptors and mappings go. */
  close(reason: string): void {
    if (!this.connected) return;
    this.connected = false;
    this.#stopAll();
    for (const vring of this.#vrings) {
      this.#dropKick(vring);
      vring.queue.callFd = closeFd(vring.queue.callFd);
      vring.errFd = closeFd(vring.errFd);
    }
    this.#loop.remove(this.#tag);
    this.#connection.close();
    this.#requests?.close();
    this.#logFd = closeFd(this.#logFd);
    this.memory.clear();
    this.#chain.free();
    this.#device.disconnected?.(reason);
    for (const fd of this.#disposed.splice(0)) closeFd(fd);
  }
}
