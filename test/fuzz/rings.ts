/**
 * Virtqueues that no driver would make: descriptors, indirect tables, ring indexes and event indexes as they come, rings moved and
 * memory taken away while they run, and in some setups a thread that rewrites all of it while it is read.
 *
 * After each case the device must be as good as before for a driver that resets it.
 */
import { Worker } from 'node:worker_threads';
import { Feature, features, VhostUserError } from 'vhost-user-ts';
import { native } from 'vhost-user-ts/native';
import { describeRegion, type MockDriver, type MockRegion, type QueueDriver } from 'vhost-user-ts/testing';
import { Opcode } from '../../src/fuse/abi.js';
import { type Case, must, type Target } from './engine.js';
import type { Random } from './random.js';
import { HUGE } from './requests.js';
import { lastFds, openFds, Rig } from './rig.js';
import type { Scribble } from './scribbler.js';

const QUEUE_SIZE = 16;
const REQUESTS = 1;
const BUFFER = 1 << 16;
const TABLE_BYTES = 1 << 15;

const SETUPS = [
  { features: ~features(0, Feature.LOG_ALL) },
  { features: features(Feature.VERSION_1, Feature.PROTOCOL_FEATURES, Feature.INDIRECT_DESC) },
  { features: ~features(0) },
  { features: ~features(0, Feature.LOG_ALL), scribbled: true },
] as const;

/** An address: which of {@link Rings.place}, and an offset. */
type Place = [what: number, offset: number];

type RingStep =
  /** A descriptor of the table. */
  | { op: 'descriptor'; i: number; at: Place; length: number; flags: number; next: number }
  /** Descriptors somewhere in memory, for an indirect table. */
  | { op: 'table'; offset: number; of: [Place, length: number, flags: number, next: number][] }
  /** A chain from descriptor `i` on: what each piece is, and whether it is writable. */
  | { op: 'chain'; i: number; of: [Place, length: number, write: number][]; indirect: number }
  /** What lies in the request's buffer: a FUSE request. */
  | { op: 'request'; opcode: number; length: number; offset: number }
  | { op: 'offer'; heads: number[] }
  /** avail.idx, relative to what it is. */
  | { op: 'index'; by: number }
  /** used_event, and the flags of the avail ring. */
  | { op: 'event'; value: number; flags: number }
  | { op: 'bytes'; at: Place; value: number; length: number }
  | { op: 'kick'; queue: number }
  /** Memory goes, and comes back. */
  | { op: 'memory'; region: number; there: number }
  /** SET_VRING_ADDR of a running ring. */
  | { op: 'move'; part: number; at: Place }
  | { op: 'restart'; base: number; size: number };

/** The device with a driver that writes to its rings by itself. */
class Rings {
  readonly rig: Rig;
  readonly driver: MockDriver;
  readonly queue: QueueDriver;
  readonly request: number;
  readonly reply: number;
  readonly table: number;
  readonly scribbler: Scribbler | undefined;
  requests = 0;

  constructor(setup: (typeof SETUPS)[number]) {
    this.rig = new Rig({ features: setup.features, fs: { xattr: true } });
    this.driver = this.rig.drive(2, QUEUE_SIZE);
    this.queue = this.driver.queues[REQUESTS] as QueueDriver;
    const { memory } = this.rig;
    this.request = memory.allocate(BUFFER, 4096);
    this.reply = memory.allocate(BUFFER, 4096);
    this.table = memory.allocate(TABLE_BYTES, 4096);
    if ('scribbled' in setup) {
      const region = memory.regions[0] as MockRegion;
      this.scribbler = new Scribbler(region.fd, [
        [this.queue.descriptors, QUEUE_SIZE * 16],
        [this.queue.avail, 6 + 2 * QUEUE_SIZE],
        [this.queue.used, 6 + 8 * QUEUE_SIZE],
        [this.request, 96],
        [this.table, 256],
      ]);
    }
  }

  /** Where a place is: guest memory of all kinds, its ends, and what is none. */
  place([what, offset]: Place): number | bigint {
    const starts = [
      this.request,
      this.reply,
      this.table,
      this.queue.descriptors,
      this.queue.avail,
      this.queue.used,
      (8 << 20) - 64,
      (1 << 30) + (4 << 20) - 64,
      (1 << 30) + (8 << 20) - 64,
      1 << 30,
      2 ** 40,
      2 ** 53 - 64,
    ];
    const start = starts[what];
    if (start !== undefined) return Math.max(0, start + offset);
    const [low, high] = HUGE[what % HUGE.length] as readonly [number, number];
    return BigInt.asUintN(64, (BigInt(high) << 32n) + BigInt(low) + BigInt(offset));
  }

  /** INIT, so that requests reach the file system. */
  begin(): void {
    this.#honest(Opcode.INIT, 64, (view) => {
      for (const [i, value] of [7, 45, 131072, 0x40000000, 0].entries()) view.setUint32(40 + 4 * i, value, true);
    });
  }

  step(step: RingStep): void {
    const { queue, rig } = this;
    switch (step.op) {
      case 'descriptor':
        queue.setDescriptor(step.i % QUEUE_SIZE, { address: this.place(step.at), length: step.length, flags: step.flags, next: step.next });
        break;
      case 'table':
        queue.writeTable(
          this.table + (step.offset % 256) * 16,
          step.of.map(([at, length, flags, next]) => ({ address: this.place(at), length, flags, next })),
        );
        break;
      case 'chain': {
        const chain = step.of.map(([at, length, write], i) => ({
          address: this.place(at),
          length,
          flags: (write ? 2 : 0) | (i < step.of.length - 1 ? 1 : 0),
          next: step.indirect ? i + 1 : (step.i + i + 1) % QUEUE_SIZE,
        }));
        if (step.indirect) {
          queue.writeTable(this.table, chain);
          queue.setDescriptor(step.i % QUEUE_SIZE, { address: this.table, length: chain.length * 16, flags: 4 });
        } else for (const [i, descriptor] of chain.entries()) queue.setDescriptor((step.i + i) % QUEUE_SIZE, descriptor);
        this.#offer([step.i % QUEUE_SIZE]);
        break;
      }
      case 'request': {
        const bytes = rig.memory.view(this.request + (step.offset % 4096), 256);
        bytes.fill(0);
        bytes.writeUInt32LE(step.length >>> 0, 0);
        bytes.writeUInt32LE(step.opcode >>> 0, 4);
        bytes.writeUInt32LE(1, 16);
        bytes.write('file', 40);
        break;
      }
      case 'offer':
        this.#offer(step.heads);
        break;
      case 'index':
        queue.setAvailIndex((queue.deviceUsedIndex + step.by) & 0xffff);
        this.#kick(REQUESTS);
        break;
      case 'event': {
        const avail = rig.memory.view(queue.avail, 6 + 2 * QUEUE_SIZE);
        avail.writeUInt16LE(step.flags & 0xffff, 0);
        avail.writeUInt16LE(step.value & 0xffff, 4 + 2 * QUEUE_SIZE);
        break;
      }
      case 'bytes': {
        const at = Number(this.place(step.at));
        try {
          rig.memory.view(at, step.length % 64).fill(step.value);
        } catch {
          // There is no such memory.
        }
        break;
      }
      case 'kick':
        this.#kick(step.queue % 2);
        break;
      case 'memory': {
        const region = rig.memory.regions[step.region % 3] as MockRegion;
        this.#say(() => {
          if (step.there) this.driver.frontend.addMemReg(describeRegion(region), region.fd);
          else this.driver.frontend.remMemReg(describeRegion(region));
        });
        break;
      }
      case 'move': {
        const part = (i: number, at: number): bigint => (step.part === i ? BigInt(this.place(step.at)) : rig.memory.userAddress(at));
        this.#say(() =>
          this.driver.frontend.setVringAddr({
            index: REQUESTS,
            flags: 0,
            descriptor: part(0, queue.descriptors),
            used: part(1, queue.used),
            available: part(2, queue.avail),
            log: 0n,
          }),
        );
        break;
      }
      case 'restart':
        this.#say(() => {
          this.driver.frontend.getVringBase(REQUESTS);
          if (step.size !== 0) this.driver.frontend.setVringNum(REQUESTS, step.size);
          this.driver.frontend.setVringBase(REQUESTS, step.base);
          this.driver.frontend.setVringKick(REQUESTS, queue.kickFd);
        });
        break;
    }
  }

  #offer(heads: readonly number[]): void {
    for (const head of heads) this.queue.offer(head);
    this.queue.publish();
    this.#kick(REQUESTS);
  }

  #kick(index: number): void {
    this.requests++;
    native.eventfdWrite((this.driver.queues[index] as QueueDriver).kickFd);
    this.rig.turn();
    while (this.rig.job());
  }

  /** A message that may be refused. */
  #say(action: () => void): void {
    try {
      action();
    } catch (error) {
      if (!(error instanceof VhostUserError) || error.kind !== 'refused') throw error;
    }
    this.rig.turn();
  }

  /** The guest resets the device and drives it as it should. */
  end(): void {
    const { frontend } = this.driver;
    const { memory } = this.rig;
    while (this.rig.job());
    for (const region of memory.regions) {
      this.#say(() => frontend.remMemReg(describeRegion(region)));
      frontend.addMemReg(describeRegion(region), region.fd);
    }
    for (const queue of this.driver.queues) {
      frontend.getVringBase(queue.index);
      queue.reset();
      this.driver.placeQueue(queue, 0);
      frontend.setVringKick(queue.index, queue.kickFd);
    }
    this.begin();
    this.#honest(Opcode.GETATTR, 16, () => undefined);
    this.#honest(Opcode.DESTROY, 0, () => undefined);
  }

  /** A request whose reply must be a success. */
  #honest(opcode: number, bytes: number, fill: (view: DataView) => void): void {
    const { queue, rig } = this;
    const request = rig.memory.view(this.request, 40 + bytes);
    request.fill(0);
    request.writeUInt32LE(40 + bytes, 0);
    request.writeUInt32LE(opcode, 4);
    request.writeUInt32LE(1, 16);
    fill(new DataView(request.buffer, request.byteOffset, request.length));
    queue.send([{ address: this.request, length: 40 + bytes }], [{ address: this.reply, length: 256 }]);
    rig.turn();
    while (rig.job());
    const [used] = queue.collect();
    const reply = rig.memory.view(this.reply, 16);
    must(used !== undefined && used.length >= 16, `request ${opcode} of a driver that has reset the device was not answered`);
    must(reply.readUInt32LE(0) === used.length && reply.readInt32LE(4) === 0, `request ${opcode}: error ${reply.readInt32LE(4)}`);
    this.requests++;
  }
}

/** Another thread that rewrites parts of guest memory while it is asked to. */
class Scribbler {
  readonly #control = new Int32Array(new SharedArrayBuffer(8));
  readonly #worker: Worker;

  constructor(fd: number, parts: [number, number][]) {
    const workerData: Scribble = { control: this.#control, fd, parts };
    this.#worker = new Worker(new URL('scribbler.js', import.meta.url), { workerData });
    this.#worker.unref();
  }

  start(): void {
    Atomics.store(this.#control, 0, 1);
    Atomics.notify(this.#control, 0);
  }

  /** Returns when it has stopped. */
  stop(): void {
    Atomics.store(this.#control, 0, 0);
    for (let i = 0; Atomics.load(this.#control, 1) === 1 && i < 10_000; i++) Atomics.wait(this.#control, 1, 1, 1);
    must(Atomics.load(this.#control, 1) === 0, 'the other thread does not stop');
  }

  close(): void {
    Atomics.store(this.#control, 0, -1);
    Atomics.notify(this.#control, 0);
  }
}

const LENGTHS = [0, 1, 15, 16, 39, 40, 41, 56, 64, 80, 100, 128, 144, 4096, 65536, 1 << 20, 0x7fffffff, 0x80000000, 0xffffffff];
const FLAGS = [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 0xffff];
const OPCODES = [1, 3, 3, 3, 14, 15, 17, 22, 26, 27, 28, 44, 38, 2049, 999];

function place(random: Random): Place {
  return random.oneIn(4) ? [random.below(20), random.below(200) - 100] : [random.below(2), random.oneIn(3) ? random.below(5000) : 0];
}

function length(random: Random): number {
  return random.oneIn(20) ? random.u32() : random.pick(LENGTHS);
}

function anyStep(random: Random): RingStep {
  switch (random.below(16)) {
    case 0:
      return {
        op: 'descriptor',
        i: random.below(QUEUE_SIZE),
        at: place(random),
        length: length(random),
        flags: random.pick(FLAGS),
        next: random.below(20),
      };
    case 1: {
      const of: [Place, number, number, number][] = [];
      for (let i = 1 + random.below(6); i > 0; i--) of.push([place(random), length(random), random.pick(FLAGS), random.below(8)]);
      return { op: 'table', offset: random.below(4), of };
    }
    case 2:
    case 3:
    case 4:
    case 5:
    case 6: {
      // What an honest driver sends, but for a place or a length.
      const of: [Place, number, number][] = [];
      for (let i = 1 + random.below(3); i > 0; i--)
        of.push([random.oneIn(10) ? place(random) : [0, 0], random.oneIn(10) ? length(random) : 56, 0]);
      for (let i = random.below(3); i > 0; i--)
        of.push([random.oneIn(10) ? place(random) : [1, 0], random.oneIn(10) ? length(random) : 256, 1]);
      return { op: 'chain', i: random.below(QUEUE_SIZE), of, indirect: random.below(2) };
    }
    case 7:
    case 8:
      return {
        op: 'request',
        opcode: random.pick(OPCODES),
        length: random.oneIn(5) ? length(random) : 56,
        offset: random.oneIn(5) ? random.below(64) : 0,
      };
    case 9: {
      const heads: number[] = [];
      for (let i = 1 + random.below(5); i > 0; i--) heads.push(random.oneIn(20) ? random.below(65536) : random.below(QUEUE_SIZE));
      return { op: 'offer', heads };
    }
    case 10:
      return random.oneIn(4)
        ? { op: 'index', by: random.pick([0, 1, 16, 17, 32767, 32768, 65535, random.below(65536)]) }
        : { op: 'kick', queue: random.below(2) };
    case 11:
      return { op: 'event', value: random.below(65536), flags: random.pick([0, 1, 0xffff]) };
    case 12:
      return { op: 'bytes', at: place(random), value: random.below(256), length: random.below(64) };
    case 13:
      return { op: 'memory', region: random.below(3), there: random.below(2) };
    case 14:
      return { op: 'move', part: random.below(5), at: place(random) };
    default:
      return {
        op: 'restart',
        base: random.pick([0, 0, 65535, 65530, random.below(65536)]),
        size: random.pick([0, 0, QUEUE_SIZE, 1, 8, 32768, 3, 0xffffffff]),
      };
  }
}

export class RingTarget implements Target<RingStep> {
  readonly name = 'rings';
  readonly #devices: (Rings | undefined)[] = [];
  #fds = 0;

  generate(random: Random): Case<RingStep> {
    const steps: RingStep[] = [];
    for (let i = 5 + random.below(200); i > 0; i--) steps.push(anyStep(random));
    return { setup: random.below(SETUPS.length), steps };
  }

  run({ setup, steps }: Case<RingStep>): number {
    const index = setup % SETUPS.length;
    const rings = this.#devices[index] ?? new Rings(SETUPS[index] as (typeof SETUPS)[number]);
    this.#devices[index] = rings;
    const fds = openFds();
    rings.rig.lines = 0;
    rings.requests = 0;
    try {
      rings.begin();
      rings.scribbler?.start();
      for (const step of steps) rings.step(step);
      rings.scribbler?.stop();
      rings.end();
      rings.rig.share.checkOutside();
      this.#fds += openFds() - fds;
      must(this.#fds < 64, () => `${this.#fds} descriptors are left: ${lastFds()}`);
    } catch (error) {
      this.#devices[index] = undefined;
      this.#fds = 0;
      rings.scribbler?.close();
      rings.rig.close();
      throw error;
    }
    return rings.requests;
  }

  close(): void {
    for (const rings of this.#devices) {
      rings?.scribbler?.close();
      rings?.rig.close();
    }
  }
}
