/**
 * vhost-user messages as no VMM sends them: of any kind in any order, with wrong sizes, descriptors too many, too few or of the
 * wrong kind, in pieces, half, and connections that end in between.
 *
 * After each case a front end that connects anew must get a device that works, and every descriptor that came along is closed.
 */
import * as fs from 'node:fs';
import { join } from 'node:path';
import {
  Feature,
  FRONTEND_MESSAGES,
  type FrontendName,
  features,
  HEADER_SIZE,
  HeaderFlag,
  type MessageSpec,
  type VhostUserFrontend,
} from 'vhost-user-ts';
import { arena, arenaAlloc, cString, native } from 'vhost-user-ts/native';
import type { MockRegion } from 'vhost-user-ts/testing';
import { Opcode } from '../../src/fuse/abi.js';
import { type Case, must, type Target } from './engine.js';
import type { Random } from './random.js';
import { HUGE } from './requests.js';
import { lastFds, openFds, Rig, type RigOptions } from './rig.js';

/** Descriptors that a message can bring. */
const FD_KINDS = [
  'eventfd',
  'pipe',
  'socket',
  'file',
  'directory',
  'epoll',
  'memory0',
  'memory1',
  'memory2',
  'short',
  'kick0',
  'kick1',
] as const;
type FdKind = (typeof FD_KINDS)[number];

interface MessageStep {
  op: 'message';
  /** A name of `FRONTEND_MESSAGES`, or any number. */
  name: FrontendName | number;
  /** The payload in words of 64 bits; negative: see `HUGE`. */
  words?: number[];
  /** Bytes behind them. */
  more?: number;
  fds?: FdKind[];
  /** Flags besides the version; 8 asks for a reply. */
  flags?: number;
  /** The size in the header is off by so much. */
  lie?: number;
  /** Sent in two parts, the second after so many bytes and a turn of the back end. */
  split?: number;
  /** Only so many bytes are sent. */
  half?: number;
}

type Step =
  | MessageStep
  | { op: 'connect' }
  | { op: 'kick'; queue: number }
  | { op: 'garbage'; seed: number; bytes: number }
  | { op: 'truncate'; region: number; bytes: number };

/** The good front end takes no notification queue. */
const PLAIN = ~features(0, Feature.LOG_ALL);
const SETUPS: readonly RigOptions[] = [
  { fs: { xattr: true }, features: PLAIN },
  { fs: {}, fsnotify: 'auto', tag: 'share', features: PLAIN },
];
const QUEUES = 3;
const QUEUE_SIZE = 16;
const AREA = 1 << 16;
const area = arenaAlloc(AREA);
const fdList = arenaAlloc(4 * 300);

class Messages {
  readonly rig: Rig;
  requests = 0;
  #socket = -1;
  #frontend: VhostUserFrontend | undefined;
  readonly #fds: Record<FdKind, number>;
  readonly #sizes: number[];

  constructor(options: RigOptions) {
    this.rig = new Rig(options);
    const { memory, share } = this.rig;
    this.#sizes = memory.regions.map(({ size, mmapOffset }) => size + mmapOffset);
    (memory.regions[0] as MockRegion).top = TOP;
    native.socketpair(fdList);
    const [one = -1, other = -1] = [arena.i32[fdList >> 2], arena.i32[(fdList >> 2) + 1]];
    native.close(other);
    const file = join(share.base, 'share', 'file');
    const region = (i: number): number => memory.regions[i]?.fd ?? -1;
    this.#fds = {
      eventfd: native.eventfd(0),
      pipe: fs.openSync('/dev/null', 'w'),
      socket: one,
      file: fs.openSync(file, 'r'),
      directory: fs.openSync(share.path, 'r'),
      epoll: native.epollCreate(),
      memory0: region(0),
      memory1: region(1),
      memory2: region(2),
      short: native.memfdCreate(cString('short'), 4096),
      kick0: native.eventfd(0),
      kick1: native.eventfd(0),
    };
  }

  connect(): void {
    this.hangUp();
    this.#frontend = this.rig.connect();
    this.#socket = this.#frontend.fd;
  }

  hangUp(): void {
    this.#frontend?.close();
    this.#frontend = undefined;
    this.#socket = -1;
    this.rig.turn();
    must(this.rig.backend === undefined, 'the device has not seen that the front end is gone');
  }

  step(step: Step): void {
    this.requests++;
    switch (step.op) {
      case 'connect':
        this.connect();
        break;
      case 'kick':
        native.eventfdWrite(this.#fds[step.queue & 1 ? 'kick1' : 'kick0']);
        this.rig.turn();
        break;
      case 'garbage': {
        let state = step.seed | 1;
        const bytes = Math.min(Math.max(1, step.bytes), 4096);
        for (let i = 0; i < bytes; i++) {
          state = (Math.imul(state, 1664525) + 1013904223) | 0;
          arena.u8[area + i] = state >>> 24;
        }
        this.#send(bytes, []);
        break;
      }
      case 'truncate': {
        const region = this.rig.memory.regions[step.region % 3];
        if (region !== undefined) native.ftruncate(region.fd, step.bytes);
        break;
      }
      case 'message':
        this.#message(step);
        break;
    }
    if (this.rig.backend === undefined) this.connect();
  }

  #message({ name, words = [], more = 0, fds = [], flags = 0, lie = 0, split, half }: MessageStep): void {
    const size = 8 * words.length + more;
    const view = new DataView(arena.u8.buffer, arena.u8.byteOffset + area, AREA);
    view.setUint32(0, typeof name === 'number' ? name : FRONTEND_MESSAGES[name].request, true);
    view.setUint32(4, (HeaderFlag.VERSION | flags) >>> 0, true);
    view.setUint32(8, (size + lie) >>> 0, true);
    for (const [i, word] of words.entries()) {
      const [low, high] =
        word < 0 ? (HUGE[(-1 - word) % HUGE.length] as readonly [number, number]) : [word >>> 0, Math.floor(word / 4294967296)];
      view.setUint32(HEADER_SIZE + 8 * i, low, true);
      view.setUint32(HEADER_SIZE + 8 * i + 4, high, true);
    }
    arena.u8.fill(0, area + HEADER_SIZE + 8 * words.length, area + HEADER_SIZE + size);
    const total = Math.min(HEADER_SIZE + size, Math.max(1, half ?? AREA));
    if (split === undefined || split <= 0 || split >= total) this.#send(total, fds);
    else {
      this.#send(split, fds);
      this.#send(total - split, [], split);
    }
  }

  /** Sends bytes of the area, and takes what the back end answers. */
  #send(bytes: number, fds: readonly FdKind[], from = 0): void {
    if (this.#socket < 0) return;
    for (const [i, kind] of fds.entries()) arena.i32[(fdList >> 2) + i] = this.#fds[kind];
    native.sendmsg(this.#socket, area + from, bytes, fdList, Math.min(fds.length, 253));
    this.rig.turn();
    while (this.rig.job());
    for (;;) {
      const got = native.recvmsg(this.#socket, area + AREA / 2, AREA / 2, fdList, 16);
      if (got <= 0) break;
      const passed = arena.i32[fdList >> 2] ?? 0;
      for (let i = 1; i <= passed; i++) native.close(arena.i32[(fdList >> 2) + i] ?? -1);
      for (let at = area + AREA / 2; at < area + AREA / 2 + got; ) {
        const flags = arena.u32[(at + 4) >> 2] as number;
        const size = arena.u32[(at + 8) >> 2] as number;
        must((flags & 7) === 5 && size <= 4096, () => `a reply with flags ${flags} and size ${size}`);
        at += HEADER_SIZE + size;
        if (size % 4 !== 0) break; // only its beginning can be read in place
      }
    }
  }

  /** A front end that does as it should. */
  end(): void {
    this.hangUp();
    const { memory } = this.rig;
    for (const [i, region] of memory.regions.entries()) native.ftruncate(region.fd, this.#sizes[i] as number);
    const driver = this.rig.drive(2, QUEUE_SIZE);
    const queue = driver.queues[1];
    if (queue === undefined) return;
    const at = memory.allocate(4096, 4096);
    for (const [opcode, words] of [
      [Opcode.INIT, [7, 45, 131072, 0, 0]],
      [Opcode.GETATTR, [0]],
      [Opcode.DESTROY, []],
    ] as const) {
      const bytes = opcode === Opcode.INIT ? 64 : opcode === Opcode.GETATTR ? 16 : 0;
      const request = memory.view(at, 2048);
      request.fill(0);
      request.writeUInt32LE(40 + bytes, 0);
      request.writeUInt32LE(opcode, 4);
      request.writeUInt32LE(1, 16);
      for (const [i, word] of words.entries()) request.writeUInt32LE(word, 40 + 4 * i);
      queue.send([{ address: at, length: 40 + bytes }], [{ address: at + 1024, length: 256 }]);
      this.rig.turn();
      const [used] = queue.collect();
      must(used !== undefined && request.readInt32LE(1024 + 4) === 0, `request ${opcode} of a good front end was not answered`);
    }
    driver.frontend.close();
    for (const one of driver.queues) one.close();
    this.rig.turn();
    (memory.regions[0] as MockRegion).top = TOP;
  }

  close(): void {
    this.#frontend?.close();
    for (const [kind, fd] of Object.entries(this.#fds)) if (!kind.startsWith('memory')) native.close(fd);
    this.rig.close();
  }
}

/** In region 0: the rings of a case lie below, those of the good front end behind it. */
const TOP = 1 << 20;

const NAMES = Object.keys(FRONTEND_MESSAGES) as FrontendName[];
const OFTEN: readonly FrontendName[] = [
  'SET_FEATURES',
  'SET_PROTOCOL_FEATURES',
  'SET_OWNER',
  'SET_MEM_TABLE',
  'ADD_MEM_REG',
  'ADD_MEM_REG',
  'REM_MEM_REG',
  'SET_VRING_NUM',
  'SET_VRING_NUM',
  'SET_VRING_ADDR',
  'SET_VRING_ADDR',
  'SET_VRING_BASE',
  'SET_VRING_KICK',
  'SET_VRING_KICK',
  'SET_VRING_CALL',
  'SET_VRING_ERR',
  'SET_VRING_ENABLE',
  'SET_VRING_ENABLE',
  'GET_VRING_BASE',
  'SET_LOG_BASE',
  'SET_BACKEND_REQ_FD',
  'GET_CONFIG',
  'RESET_DEVICE',
];
const USER_BASE = 0x7f00_0000_0000;
/** The regions of the rig: guest address, size, user address, offset. */
const REGIONS: readonly (readonly number[])[] = [
  [0, 8 << 20, USER_BASE, 0],
  [1 << 30, 4 << 20, USER_BASE + (1 << 30), 0],
  [(1 << 30) + (4 << 20), 4 << 20, USER_BASE + (1 << 30) + (4 << 20), 4096],
];
const FEATURE_WORDS = [0x1_7000_0000, 0x1_3000_0000, 0x1_4000_0000, 0x1_7400_0000, 0, 0x1_7000_0001, 1 << 30, 0x4_0000_0000];
const PROTOCOL_WORDS = [0, 8, 0x200b, 0xa02b, 0x200, 0xa22b, 0xffffffff];
const RING_AT = 4096;

function word(random: Random, values: readonly number[]): number {
  return random.oneIn(25) ? -1 - random.below(8) : random.oneIn(25) ? random.u32() : random.pick(values);
}

/** u32 and u32 as one word. */
function pair(low: number, high: number): number {
  return low + (high % 0x100000) * 4294967296;
}

function anyMessage(random: Random): MessageStep {
  const name = random.oneIn(60) ? random.below(60) : random.oneIn(8) ? random.pick(NAMES) : random.pick(OFTEN);
  const step: MessageStep = { op: 'message', name };
  const queue = random.oneIn(20) ? random.pick([3, 65, 66, 255]) : random.below(QUEUES);
  const region = random.below(3);
  const fields = (i: number): number[] =>
    (REGIONS[i] as readonly number[]).map((value) => (random.oneIn(15) ? word(random, [0, 1, 4096, 2 ** 40]) : value));
  const fds: FdKind[] = [];
  const fd = (kind: FdKind): void => {
    fds.push(random.oneIn(10) ? random.pick(FD_KINDS) : kind);
  };
  switch (name) {
    case 'SET_FEATURES':
      step.words = [word(random, FEATURE_WORDS)];
      break;
    case 'SET_PROTOCOL_FEATURES':
      step.words = [word(random, PROTOCOL_WORDS)];
      break;
    case 'SET_MEM_TABLE': {
      const count = random.oneIn(10) ? random.below(20) : random.below(4);
      step.words = [pair(random.oneIn(20) ? random.below(300) : count, 0)];
      for (let i = 0; i < count; i++) {
        step.words.push(...fields(i % 3));
        fd(`memory${(i % 3) as 0 | 1 | 2}`);
      }
      break;
    }
    case 'ADD_MEM_REG':
      step.words = [0, ...fields(region)];
      fd(`memory${region as 0 | 1 | 2}`);
      break;
    case 'REM_MEM_REG':
      step.words = [0, ...fields(region)];
      if (random.oneIn(4)) fd('memory0');
      break;
    case 'SET_VRING_NUM':
      step.words = [pair(queue, random.oneIn(8) ? random.pick([0, 1, 3, 32768, 65536]) : QUEUE_SIZE)];
      break;
    case 'SET_VRING_ADDR': {
      const at = USER_BASE + RING_AT + (queue % QUEUES) * 4096;
      step.words = [
        pair(queue, random.below(2)),
        word(random, [at]),
        word(random, [at + 1024]),
        word(random, [at + 512]),
        word(random, [0, 4096]),
      ];
      break;
    }
    case 'SET_VRING_BASE':
      step.words = [pair(queue, random.pick([0, 0, 1, 65535, 0xfffff]))];
      break;
    case 'GET_VRING_BASE':
    case 'SET_VRING_ENABLE':
      step.words = [pair(queue, random.below(2))];
      break;
    case 'SET_VRING_KICK':
      step.words = [queue + (random.oneIn(10) ? 256 : 0)];
      if (!random.oneIn(10)) fd(random.oneIn(2) ? 'kick0' : 'kick1');
      break;
    case 'SET_VRING_CALL':
    case 'SET_VRING_ERR':
      step.words = [queue + (random.oneIn(10) ? 256 : 0)];
      if (!random.oneIn(10)) fd('eventfd');
      break;
    case 'SET_LOG_BASE':
      step.words = [word(random, [4096, 1 << 20]), word(random, [0, 4096])];
      fd('short');
      break;
    case 'SET_BACKEND_REQ_FD':
    case 'SET_LOG_FD':
      fd('socket');
      break;
    case 'GET_CONFIG':
    case 'SET_CONFIG':
      step.words = [pair(random.pick([0, 36, 44, 100]), random.pick([0, 8, 44, 256]))];
      step.more = 4 + random.pick([0, 8, 44, 256]);
      break;
    default: {
      const payload = typeof name === 'string' ? (FRONTEND_MESSAGES[name] as MessageSpec).payload : 'u64';
      const words =
        { none: 0, u64: 1, vringState: 1, log: 2, iotlb: 4, vringArea: 3, inflight: 3, uuid: 2, deviceState: 1 }[payload as string] ?? 2;
      step.words = [];
      for (let i = 0; i < words; i++) step.words.push(word(random, [0, 1, 2, 256]));
      if (random.oneIn(10)) fd(random.pick(FD_KINDS));
    }
  }
  if (random.oneIn(30)) for (let i = random.below(random.oneIn(4) ? 260 : 10); i > 0; i--) fds.push(random.pick(FD_KINDS));
  if (random.oneIn(30)) fds.pop();
  if (fds.length > 0) step.fds = fds;
  if (random.oneIn(2)) step.flags = random.oneIn(20) ? random.u32() & ~3 : 8;
  if (random.oneIn(60)) step.lie = random.pick([-8, -1, 1, 4, 8, 4096, 0x7fffffff]);
  if (random.oneIn(60)) step.more = random.below(100);
  if (random.oneIn(20)) step.split = random.below(60);
  if (random.oneIn(200)) step.half = random.below(40);
  return step;
}

/** What a VMM sends until its queues run. */
function preamble(random: Random): MessageStep[] {
  const say = (name: FrontendName, words: number[], fds: FdKind[] = []): MessageStep => ({ op: 'message', name, words, fds, flags: 8 });
  const all = [
    say('SET_PROTOCOL_FEATURES', [random.pick([0xa02b, 0xa02b, 0xa00b, 0x200b])]),
    say('SET_OWNER', []),
    say('SET_FEATURES', [random.pick([0x1_7000_0000, 0x1_7400_0000, 0x1_5000_0000])]),
  ];
  for (const i of [0, 1, 2] as const) all.push(say('ADD_MEM_REG', [0, ...(REGIONS[i] as readonly number[])], [`memory${i}`]));
  for (let queue = 0; queue < QUEUES; queue++) all.push(...startQueue(queue));
  return all.filter(() => !random.oneIn(25));
}

function startQueue(queue: number): MessageStep[] {
  const at = USER_BASE + RING_AT + queue * 4096;
  const say = (name: FrontendName, words: number[], fds: FdKind[] = []): MessageStep => ({ op: 'message', name, words, fds, flags: 8 });
  return [
    say('SET_VRING_NUM', [pair(queue, QUEUE_SIZE)]),
    say('SET_VRING_BASE', [pair(queue, 0)]),
    say('SET_VRING_ADDR', [pair(queue, 0), at, at + 1024, at + 512, 0]),
    say('SET_VRING_CALL', [queue], ['eventfd']),
    say('SET_VRING_KICK', [queue], [queue & 1 ? 'kick1' : 'kick0']),
    say('SET_VRING_ENABLE', [pair(queue, 1)]),
  ];
}

export class MessageTarget implements Target<Step> {
  readonly name = 'messages';
  readonly #devices: (Messages | undefined)[] = [];
  #fds = 0;

  generate(random: Random): Case<Step> {
    const steps: Step[] = random.oneIn(5) ? [] : preamble(random);
    for (let i = 3 + random.below(120); i > 0; i--) {
      if (random.oneIn(60)) steps.push({ op: 'connect' }, ...preamble(random));
      else if (random.oneIn(20)) steps.push(...startQueue(random.below(QUEUES)));
      else if (random.oneIn(15)) steps.push({ op: 'kick', queue: random.below(2) });
      else if (random.oneIn(300)) steps.push({ op: 'garbage', seed: random.u32(), bytes: random.below(4096) });
      else if (random.oneIn(100)) steps.push({ op: 'truncate', region: random.below(3), bytes: random.pick([0, 4096, 1 << 20]) });
      else steps.push(anyMessage(random));
    }
    return { setup: random.below(SETUPS.length), steps };
  }

  run({ setup, steps }: Case<Step>): number {
    const index = setup % SETUPS.length;
    const device = this.#devices[index] ?? new Messages(SETUPS[index] as RigOptions);
    this.#devices[index] = device;
    const fds = openFds();
    device.requests = 0;
    try {
      device.connect();
      for (const step of steps) device.step(step);
      device.end();
      device.rig.share.checkOutside();
      this.#fds += openFds() - fds;
      must(this.#fds < 64, () => `${this.#fds} descriptors are left: ${lastFds()}`);
    } catch (error) {
      this.#devices[index] = undefined;
      this.#fds = 0;
      device.close();
      throw error;
    }
    return device.requests;
  }

  close(): void {
    for (const device of this.#devices) device?.close();
  }
}
