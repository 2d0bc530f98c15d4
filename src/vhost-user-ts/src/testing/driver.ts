/**
 * A guest with its VMM, without either: memory, split virtqueues and the vhost-user session that hands them to a back end.
 * For tests, benches and fuzzers of any vhost-user device.
 *
 * ```ts
 * const driver = new MockDriver(VhostUserFrontend.connect(path), { queues: 2 });
 * driver.start();
 * const queue = driver.queues[0]!;
 * queue.send([request], [response]);
 * const [used] = queue.collectAll(1);
 * ```
 */
import type { VhostUserFrontend } from '../frontend.js';
import {
  encodeFrontendMessage,
  Feature,
  features,
  HeaderFlag,
  hasFeature,
  MAX_MESSAGE,
  type MemoryRegion,
  ProtocolFeature,
  VRING_FLAG_LOG,
} from '../message.js';
import { native } from '../native.js';
import { DirtyLog } from './migration.js';
import { describeRegion, MockMemory } from './mock-memory.js';
import { QueueDriver, type QueueOptions } from './queue-driver.js';

export { DirtyLog, loadState, saveState } from './migration.js';
export { describeRegion, MockMemory, type MockRegion, type RegionLayout } from './mock-memory.js';
export { DescriptorFlag, needEvent, QueueDriver, type QueueOptions, type RawDescriptor, type Segment, type Used } from './queue-driver.js';

export interface DriverOptions {
  /** Guest memory: 64 MiB at 0 by default. */
  memory?: MockMemory;
  /** How many virtqueues the device has. */
  queues: number;
  /** Ring size (128). */
  queueSize?: number;
  /** Of what the back end offers, the features accepted (everything but LOG_ALL). */
  features?: bigint;
  /** Of what the back end offers, the protocol features accepted (everything). */
  protocolFeatures?: bigint;
  /** Whose order of messages to follow: QEMU's vhost-user-fs, or User Mode Linux' virtio_uml, with their peculiarities. */
  order?: 'qemu' | 'uml';
  /** Queues that the guest's driver does not use: they get CALL, ERR and ENABLE only. */
  unused?: readonly number[];
  /** Where and how the queues are laid out. */
  queue?: QueueOptions;
  /** Runs the device's turn, where it lives in this thread. */
  turn?: () => void;
}

const DEFAULT_FEATURES = ~features(Feature.LOG_ALL);

export class MockDriver {
  frontend: VhostUserFrontend;
  readonly memory: MockMemory;
  readonly queues: QueueDriver[];
  /** What the back end offers and what of it was accepted. */
  offered = 0n;
  features = 0n;
  offeredProtocol = 0n;
  protocolFeatures = 0n;
  /** Answer of GET_QUEUE_NUM, 0 before it. */
  queueNum = 0;
  private readonly options: DriverOptions;

  constructor(frontend: VhostUserFrontend, options: DriverOptions) {
    this.frontend = frontend;
    this.options = options;
    this.memory = options.memory ?? new MockMemory();
    const queue: QueueOptions = { ...options.queue };
    if (options.turn !== undefined) queue.turn = options.turn;
    this.queues = Array.from({ length: options.queues }, (_, i) => new QueueDriver(this.memory, i, options.queueSize ?? 128, queue));
  }

  /** From a fresh connection to a running device. */
  start(): this {
    this.initialise();
    this.run();
    return this;
  }

  /** What a VMM does when it starts: features are read, protocol features negotiated. */
  initialise(): void {
    if (this.options.order === 'uml') this.initialiseUml();
    else this.initialiseQemu();
  }

  /** What a VMM does when the guest's driver says DRIVER_OK: features, memory, vrings. */
  run(): void {
    if (this.options.order === 'uml') this.runUml();
    else this.runQemu();
  }

  /** What QEMU does when the guest resets the device or is stopped: returns the avail index of each queue. */
  stop(): number[] {
    for (const queue of this.queues) this.frontend.setVringEnable(queue.index, false);
    return this.used().map((queue) => this.frontend.getVringBase(queue.index));
  }

  /** Has the running device log what it writes, as QEMU does when a migration begins. */
  startLogging(): DirtyLog {
    const log = new DirtyLog(this.memory);
    this.frontend.setLogBase(BigInt(log.bytes), 0n, log.fd);
    this.setFeatures(features(Feature.LOG_ALL));
    for (const queue of this.used()) this.setAddresses(queue, true);
    return log;
  }

  /** The opposite: the migration is over, or was given up. */
  stopLogging(log: DirtyLog): void {
    this.setFeatures();
    for (const queue of this.used()) this.setAddresses(queue, false);
    log.close();
  }

  /**
   * Goes on at another back end, which has been started no further than {@link initialise}: same memory, same rings.
   * @param bases what {@link stop} returned
   */
  moveTo(frontend: VhostUserFrontend, bases: readonly number[]): void {
    this.frontend.close();
    this.frontend = frontend;
    this.runQemu(bases);
    // An interrupt may have been lost on the way: drivers look, and so do back ends.
    for (const queue of this.used()) queue.forceKick();
  }

  /** Goes on where the device was stopped, as after a migration that failed. `bases`: what {@link stop} returned. */
  resume(bases: readonly number[]): void {
    this.setFeatures();
    this.runQueues(bases);
    for (const queue of this.used()) queue.forceKick();
  }

  /** Closes connection, memory and eventfds. */
  close(): void {
    this.frontend.close();
    for (const queue of this.queues) queue.close();
    this.memory.close();
  }

  // --- the steps, for tests that need another order ---

  setFeatures(extra = 0n): void {
    this.features = (this.offered & (this.options.features ?? DEFAULT_FEATURES)) | extra;
    this.frontend.setFeatures(this.features);
    for (const queue of this.queues) queue.eventIdx = hasFeature(this.features, Feature.EVENT_IDX);
  }

  /** Hands over guest memory: region by region where CONFIGURE_MEM_SLOTS is negotiated, else as a table. */
  shareMemory(): void {
    if (hasFeature(this.protocolFeatures, ProtocolFeature.CONFIGURE_MEM_SLOTS)) {
      for (const region of this.memory.regions) this.frontend.addMemReg(describeRegion(region), region.fd);
    } else {
      this.frontend.setMemTable(this.memory.table(), this.memory.fds());
    }
  }

  /** NUM, BASE, ADDR of a queue. `base` is where the rings stand: their start, or what GET_VRING_BASE said. */
  placeQueue(queue: QueueDriver, base = this.options.queue?.base ?? 0): void {
    this.frontend.setVringNum(queue.index, queue.size);
    this.frontend.setVringBase(queue.index, base);
    this.setAddresses(queue, false);
  }

  private setAddresses(queue: QueueDriver, log: boolean): void {
    this.frontend.setVringAddr({
      index: queue.index,
      flags: log ? VRING_FLAG_LOG : 0,
      descriptor: this.memory.userAddress(queue.descriptors),
      used: this.memory.userAddress(queue.used),
      available: this.memory.userAddress(queue.avail),
      log: log ? BigInt(queue.used) : 0n,
    });
  }

  /** Gives the back end a new call eventfd for a queue, and closes the old one. */
  replaceCall(queue: QueueDriver): void {
    const old = queue.callFd;
    queue.callFd = native.eventfd(0);
    this.frontend.setVringCall(queue.index, queue.callFd);
    native.close(old);
  }

  private used(): QueueDriver[] {
    return this.queues.filter((queue) => !this.options.unused?.includes(queue.index));
  }

  private negotiateProtocol(): void {
    if (!hasFeature(this.offered, Feature.PROTOCOL_FEATURES)) return;
    this.offeredProtocol = this.frontend.getProtocolFeatures();
    this.protocolFeatures = this.offeredProtocol & (this.options.protocolFeatures ?? ~0n);
    this.frontend.setProtocolFeatures(this.protocolFeatures);
  }

  /** vhost_dev_init and vhost_user_backend_init. */
  private initialiseQemu(): void {
    const { frontend } = this;
    this.offered = frontend.getFeatures();
    this.negotiateProtocol();
    if (hasFeature(this.protocolFeatures, ProtocolFeature.MQ)) this.queueNum = frontend.getQueueNum();
    if (hasFeature(this.protocolFeatures, ProtocolFeature.CONFIGURE_MEM_SLOTS)) frontend.getMaxMemSlots();
    if (hasFeature(this.protocolFeatures, ProtocolFeature.BACKEND_REQ)) frontend.openBackendChannel();
    frontend.setOwner();
    this.offered = frontend.getFeatures();
    for (const queue of this.queues) {
      frontend.setVringCall(queue.index, queue.callFd);
      frontend.setVringErr(queue.index, queue.errorFd);
    }
  }

  /** vhost_dev_start: the call descriptor is replaced before and after, and ENABLE comes last and for every queue. */
  private runQemu(bases: readonly number[] = []): void {
    for (const queue of this.queues) this.replaceCall(queue);
    this.setFeatures();
    this.shareMemory();
    this.runQueues(bases);
    for (const queue of this.used()) this.replaceCall(queue);
  }

  private runQueues(bases: readonly number[]): void {
    const { frontend } = this;
    for (const queue of this.used()) {
      this.placeQueue(queue, bases[queue.index]);
      frontend.setVringKick(queue.index, queue.kickFd);
    }
    if (hasFeature(this.features, Feature.PROTOCOL_FEATURES)) for (const queue of this.queues) frontend.setVringEnable(queue.index, true);
  }

  /** vhost_user_init of virtio_uml. */
  private initialiseUml(): void {
    const { frontend } = this;
    frontend.setOwner();
    this.offered = frontend.getFeatures();
    this.negotiateProtocol();
    if (hasFeature(this.protocolFeatures, ProtocolFeature.BACKEND_REQ)) frontend.openBackendChannel();
    if (hasFeature(this.protocolFeatures, ProtocolFeature.MQ)) this.queueNum = frontend.getQueueNum();
  }

  /** vu_find_vqs: a memory table that is one region too long, no SET_VRING_ERR, every queue enabled as it comes. */
  private runUml(): void {
    const { frontend } = this;
    this.setFeatures();
    this.sendPaddedTable();
    for (const queue of this.used()) {
      frontend.setVringCall(queue.index, queue.callFd);
      this.placeQueue(queue);
    }
    for (const queue of this.used()) {
      frontend.setVringKick(queue.index, queue.kickFd);
      if (hasFeature(this.features, Feature.PROTOCOL_FEATURES)) frontend.setVringEnable(queue.index, true);
    }
  }

  /** SET_MEM_TABLE with room for one more region than it has: virtio_uml up to Linux 6.12 sends it so. */
  private sendPaddedTable(): void {
    const regions = this.memory.table();
    const padding: MemoryRegion = { guestAddress: 0n, size: 0n, userAddress: 0n, mmapOffset: 0n };
    const message = Buffer.alloc(MAX_MESSAGE);
    const length = encodeFrontendMessage(message, 0, 'SET_MEM_TABLE', [...regions, padding]);
    const needReply = hasFeature(this.protocolFeatures, ProtocolFeature.REPLY_ACK);
    message.writeUInt32LE(HeaderFlag.VERSION | (needReply ? HeaderFlag.NEED_REPLY : 0), 4);
    message.writeUInt32LE(regions.length, 12);
    this.frontend.sendBytes(message.subarray(0, length), this.memory.fds());
    if (needReply && this.frontend.receiveReply('SET_MEM_TABLE') !== 0n) throw new Error('the padded memory table was refused');
  }
}
