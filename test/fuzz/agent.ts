/**
 * The replay agent's control file, written and read by an agent as nobody has built one: AUTH, BEGIN and WATCH of wrong sizes, with numbers
 * and names that mean nothing, from threads and users that are not the agent's, in any order; and requests under the agent's user id.
 *
 * Nothing of it changes the share, requests are answered once, and the end of the session leaves no descriptor.
 */
import * as fs from 'node:fs';
import { join } from 'node:path';
import type { MockDriver, QueueDriver } from 'vhost-user-ts/testing';
import { InHeader, InitFlag, IoctlIn, Opcode, OutHeader } from '../../src/fuse/abi.js';
import {
  AUTH,
  AuthIn,
  BEGIN,
  BeginIn,
  CONTROL_DIRECTORY,
  CONTROL_NAME,
  CONTROL_VERSION,
  STAGING_NAME,
  WatchIn,
} from '../../src/replay/abi.js';
import { CONTROL_DIRECTORY_NODE, CONTROL_NODE, STAGING_NODE } from '../../src/replay/phantoms.js';
import { AGENT_UID } from '../../src/replay/replay.js';
import { type Case, must, type Target } from './engine.js';
import type { Random } from './random.js';
import { lastFds, openFds, Rig, type RigOptions } from './rig.js';

const TOKEN = 'the token of this case';
const NAMES = [
  'file',
  'dir',
  'sub',
  'new',
  'big',
  'many',
  CONTROL_DIRECTORY,
  CONTROL_NAME,
  STAGING_NAME,
  '..',
  '.',
  '',
  'a/b',
  'x'.repeat(255),
];
const COMMANDS = [AUTH, BEGIN, 0, 0xffffffff, AUTH + 1, 0x5401];

/** Who makes a request: user id and thread, as places in {@link UIDS} and {@link PIDS}. */
interface Who {
  uid: number;
  pid: number;
}
/** Nodes are places in the list of those that the guest has met, or, below 0, one of {@link ODD_NODES}. */
type Step = Who &
  (
    | { op: 'lookup'; parent: number; name: string }
    | { op: 'open' | 'flush' | 'release'; handle: number }
    /** `sizes`: what the header says of the data in and out. */
    | { op: 'auth'; handle: number; version: number; length: number; token: string; sizes?: [number, number] }
    | {
        op: 'begin';
        handle: number;
        words: [number, number];
        nodes: number[];
        names: [string, string];
        lengths?: [number, number];
        sizes?: [number, number];
      }
    | { op: 'ioctl'; handle: number; command: number; seed: number; bytes: number; sizes?: [number, number] }
    | { op: 'write'; handle: number; records: [node: number, generation: number, mask: number][]; more: number; size?: number }
    | { op: 'read'; handle: number; size: number; wait: number }
    | { op: 'change'; what: number; node: number; name: string; other: number; otherName: string }
    | { op: 'host'; what: number; name: string }
    | { op: 'init' }
  );

const UIDS = [0, AGENT_UID, AGENT_UID, 1000];
const PIDS = [100, 100, 100, 101, 0];
const ODD_NODES = [0, 2, 2 ** 24 + 1, 2 ** 24 * 2, 2 ** 52, 2 ** 53 - 1, 0xffffffff, 2 ** 24 * 1000];
const SETUPS: readonly RigOptions[] = [
  { fs: { xattr: true }, server: { exportSupport: true, allowIdmap: false }, fsnotify: 'auto', agent: TOKEN },
  { fs: { readonly: true }, server: { exportSupport: true, allowIdmap: false }, fsnotify: 'inotify', agent: TOKEN },
];
const INIT_FLAGS = InitFlag.AUTO_INVAL_DATA | InitFlag.EXPORT_SUPPORT;
const AREAS = 24;
const AREA = 128 << 10;
const REPLY_AT = 72 << 10;
const REPLY = 8 << 10;
const { unlinkSync, writeFileSync, renameSync } = fs;

class Agent {
  readonly rig: Rig;
  requests = 0;
  readonly #driver: MockDriver;
  readonly #queue: QueueDriver;
  readonly #areas: number[] = [];
  /** Chains that are out, and their place and number. */
  readonly #out = new Map<number, { area: number; unique: number }>();
  #unique = 1;
  #nodes: number[] = [];
  #handles: number[] = [];

  constructor(options: RigOptions) {
    this.rig = new Rig({ ...options, features: 0x1_7000_0000n });
    this.#driver = this.rig.drive(2, 64);
    this.#queue = this.#driver.queues[1] as QueueDriver;
    for (let i = 0; i < AREAS; i++) this.#areas.push(this.rig.memory.allocate(AREA, 4096));
    this.begin();
  }

  /** A session as new. */
  begin(): void {
    this.#send(Opcode.INIT, 1, { uid: 0, pid: 0 }, words(7, 45, 131072, INIT_FLAGS, 0), Buffer.alloc(44));
    this.#nodes = [1, CONTROL_DIRECTORY_NODE, CONTROL_NODE, STAGING_NODE];
    this.#handles = [0];
  }

  /** The session ends; the next case finds nothing of it. */
  end(): void {
    this.#send(Opcode.DESTROY, 1, { uid: 0, pid: 0 });
    must(this.#out.size === 0, () => `${this.#out.size} requests are not answered after the end`);
    this.begin();
    const reply = this.#send(Opcode.GETATTR, 1, { uid: 0, pid: 3 }, Buffer.alloc(16));
    must(reply?.readInt32LE(OutHeader.error) === 0, 'the root is not to be had any more');
    const { share } = this.rig.fs;
    must(
      share.handles.open === 0 && share.inodes.size === 1,
      () => `${share.inodes.size} inodes and ${share.handles.open} handles are left`,
    );
  }

  step(step: Step): void {
    this.requests++;
    const who = { uid: UIDS[step.uid % UIDS.length] as number, pid: PIDS[step.pid % PIDS.length] as number };
    switch (step.op) {
      case 'lookup': {
        const reply = this.#send(Opcode.LOOKUP, this.#node(step.parent), who, name(step.name));
        if (reply !== undefined && reply.readInt32LE(OutHeader.error) === 0 && this.#nodes.length < 40)
          this.#nodes.push(Number(reply.readBigUInt64LE(OutHeader.bytes)));
        break;
      }
      case 'open': {
        const reply = this.#send(Opcode.OPEN, step.handle % 4 === 3 ? this.#node(step.handle) : CONTROL_NODE, who, words(2, 0));
        if (reply !== undefined && reply.readInt32LE(OutHeader.error) === 0)
          this.#handles.push(Number(reply.readBigUInt64LE(OutHeader.bytes)));
        break;
      }
      case 'flush':
      case 'release':
        this.#send(step.op === 'flush' ? Opcode.FLUSH : Opcode.RELEASE, CONTROL_NODE, who, longs(this.#handle(step.handle), 0, 0));
        break;
      case 'auth': {
        const data = Buffer.alloc(AuthIn.bytes);
        data.writeUInt32LE(step.version >>> 0, 0);
        data.writeUInt32LE(step.length >>> 0, AuthIn.length);
        data.write(step.token, AuthIn.token, 'latin1');
        this.#ioctl(step.handle, who, AUTH, data, step.sizes);
        break;
      }
      case 'begin': {
        const data = Buffer.alloc(BeginIn.bytes);
        for (const [i, word] of step.words.entries()) data.writeUInt32LE(word >>> 0, 4 * i);
        for (const [i, node] of step.nodes.slice(0, 4).entries()) data.writeBigUInt64LE(BigInt(this.#node(node)), BeginIn.parent + 8 * i);
        for (const [i, at] of [BeginIn.name, BeginIn.newName].entries()) {
          const text = step.names[i] ?? '';
          data.writeUInt16LE((step.lengths?.[i] ?? text.length) & 0xffff, i === 0 ? BeginIn.nameLength : BeginIn.newNameLength);
          data.write(text, at, 255, 'latin1');
        }
        this.#ioctl(step.handle, who, BEGIN, data, step.sizes);
        break;
      }
      case 'ioctl': {
        const data = Buffer.alloc(Math.min(Math.max(0, step.bytes), 4096));
        for (let i = 0, state = step.seed | 1; i < data.length; i++) {
          state = (Math.imul(state, 1664525) + 1013904223) | 0;
          data[i] = state >>> 24;
        }
        this.#ioctl(step.handle, who, step.command, data, step.sizes);
        break;
      }
      case 'write': {
        const data = Buffer.alloc(Math.max(0, step.records.length * WatchIn.bytes + step.more));
        for (const [i, [node, generation, mask]] of step.records.entries()) {
          if ((i + 1) * WatchIn.bytes > data.length) break;
          data.writeBigUInt64LE(BigInt(this.#node(node)), i * WatchIn.bytes);
          data.writeUInt32LE(generation >>> 0, i * WatchIn.bytes + WatchIn.generation);
          data.writeUInt32LE(mask >>> 0, i * WatchIn.bytes + WatchIn.mask);
        }
        const size = step.size ?? data.length;
        this.#send(Opcode.WRITE, CONTROL_NODE, who, longs(this.#handle(step.handle), 0), words(size, 0, 0, 0, 0, 0), data);
        break;
      }
      case 'read':
        this.#send(Opcode.READ, CONTROL_NODE, who, longs(this.#handle(step.handle), step.wait), words(step.size, 0, 0, 0, 0, 0));
        break;
      case 'change':
        // Whatever else the agent is or does: as itself, or as it would have to be.
        this.#change({ uid: AGENT_UID, pid: who.pid }, step);
        break;
      case 'host': {
        const at = join(this.rig.share.path, 'dir', `host-${step.name.length}`);
        try {
          if (step.what % 3 === 0) writeFileSync(at, 'text');
          else if (step.what % 3 === 1) unlinkSync(at);
          else renameSync(at, `${at}-`);
        } catch {
          // It was not there.
        }
        this.rig.turn();
        break;
      }
      case 'init':
        this.#send(Opcode.DESTROY, 1, who);
        this.begin();
        break;
    }
    this.#collect();
  }

  #change(who: Who, { what, node, name: text, other, otherName }: Extract<Step, { op: 'change' }>): void {
    const parent = this.#node(node);
    const to = this.#node(other);
    const kinds: [number, ...Buffer[]][] = [
      [Opcode.UNLINK, name(text)],
      [Opcode.RMDIR, name(text)],
      [Opcode.RENAME, longs(to), name(text), name(otherName)],
      [Opcode.RENAME2, longs(to), words(what >>> 8, 0), name(text), name(otherName)],
      [Opcode.MKNOD, words(0o100644, 0, 0, 0), name(text)],
      [Opcode.MKDIR, words(0o755, 0), name(text)],
      [Opcode.SYMLINK, name(text), name(otherName)],
      [Opcode.LINK, longs(to), name(text)],
      [Opcode.CREATE, words(0x8241, 0o644, 0, 0), name(text)],
      [Opcode.TMPFILE, words(2, 0o644, 0, 0), name('/')],
      [Opcode.SETATTR, words(what & 0xfff, 0), longs(0, 0, 0, 1, 2, 3), words(1, 2, 3, 0o600, 0, 5, 6, 0)],
      [Opcode.OPEN, words(0x201, 0)],
      [Opcode.SETXATTR, words(1, 0), name('user.x'), Buffer.from('v')],
      [Opcode.REMOVEXATTR, name('user.x')],
      [Opcode.GETATTR, Buffer.alloc(16)],
      [Opcode.FALLOCATE, longs(this.#handle(what), 0, 4096), words(0, 0)],
      [Opcode.WRITE, longs(this.#handle(what), 0), words(4, 0, 0, 0, 0, 0), Buffer.from('text')],
      [Opcode.OPENDIR, words(0, 0)],
      [Opcode.FORGET, longs(what % 4)],
    ];
    const [opcode, ...parts] = kinds[what % kinds.length] as (typeof kinds)[number];
    // What is not opened for reading alone must stay closed; the directories that were are let go of at the session's end.
    this.#send(opcode, parent, who, ...parts);
  }

  #ioctl(handle: number, who: Who, command: number, data: Buffer, sizes?: [number, number]): void {
    const [input = data.length, output = data.length] = sizes ?? [];
    const head = Buffer.alloc(IoctlIn.bytes);
    head.writeBigUInt64LE(BigInt(this.#handle(handle)), 0);
    head.writeUInt32LE(command >>> 0, IoctlIn.cmd);
    head.writeUInt32LE(input >>> 0, IoctlIn.inSize);
    head.writeUInt32LE(output >>> 0, IoctlIn.outSize);
    this.#send(Opcode.IOCTL, CONTROL_NODE, who, head, data);
  }

  #node(place: number): number {
    if (place < 0) return ODD_NODES[(-1 - place) % ODD_NODES.length] as number;
    return this.#nodes[place % this.#nodes.length] as number;
  }

  /** Mostly the control file's last one. */
  #handle(place: number): number {
    return (place < 0 ? ODD_NODES[(-1 - place) % ODD_NODES.length] : this.#handles.at(-1 - (place % this.#handles.length))) as number;
  }

  /** Sends a request, and returns its reply, if it is there at once. */
  #send(opcode: number, nodeid: number, { uid, pid }: Who, ...parts: Buffer[]): Buffer | undefined {
    if (this.#areas.length === 0) this.#collect();
    const area = this.#areas.pop();
    must(area !== undefined, 'too many requests are not answered');
    const body = Buffer.concat(parts);
    const length = InHeader.bytes + body.length;
    const view = this.rig.memory.view(area, AREA);
    view.fill(0, 0, InHeader.bytes);
    const unique = this.#unique++;
    view.writeUInt32LE(length, 0);
    view.writeUInt32LE(opcode, InHeader.opcode);
    view.writeUInt32LE(unique, InHeader.unique);
    view.writeBigUInt64LE(BigInt(nodeid), InHeader.nodeid);
    view.writeUInt32LE(uid, InHeader.uid);
    view.writeUInt32LE(pid, InHeader.pid);
    view.set(body, InHeader.bytes);
    const head = this.#queue.send(
      [{ address: area, length }],
      opcode === Opcode.FORGET ? [] : [{ address: area + REPLY_AT, length: REPLY }],
    );
    must(head >= 0, 'the queue is full');
    this.#out.set(head, { area, unique });
    this.rig.turn();
    while (this.rig.job());
    return this.#collect(head);
  }

  /** Takes what was answered. @returns the reply of the chain `wanted` */
  #collect(wanted = -1): Buffer | undefined {
    this.rig.events?.expire();
    let found: Buffer | undefined;
    for (const { head, length } of this.#queue.collect()) {
      const out = this.#out.get(head);
      must(out !== undefined, 'a request is answered that is not out');
      this.#out.delete(head);
      const reply = Buffer.from(this.rig.memory.view(out.area + REPLY_AT, REPLY).subarray(0, length));
      this.#areas.push(out.area);
      if (length === 0) continue; // FORGET
      must(length >= OutHeader.bytes && reply.readUInt32LE(0) === length, () => `a reply of ${length} bytes says ${reply.readUInt32LE(0)}`);
      const unique = reply.readUInt32LE(OutHeader.unique);
      const error = reply.readInt32LE(OutHeader.error);
      // A notification has no number, and a code above 0.
      must(unique === out.unique || (unique === 0 && error > 0), () => `reply ${unique} to request ${out.unique}`);
      must(error > -512, () => `error ${error}`);
      if (head === wanted) found = reply;
    }
    return found;
  }

  close(): void {
    this.#driver.stop();
    this.rig.close();
  }
}

function words(...values: number[]): Buffer {
  return Buffer.from(Uint32Array.from(values, (value) => value >>> 0).buffer);
}

function longs(...values: number[]): Buffer {
  return Buffer.from(BigUint64Array.from(values, (value) => BigInt(Math.max(0, value))).buffer);
}

function name(text: string): Buffer {
  return Buffer.from(`${text}\0`, 'latin1');
}

export class AgentTarget implements Target<Step> {
  readonly name = 'agent';
  readonly #devices: (Agent | undefined)[] = [];

  generate(random: Random): Case<Step> {
    const agent = { uid: 1, pid: 0 };
    const who = (right: Who): Who => (random.oneIn(8) ? { uid: random.below(4), pid: random.below(5) } : right);
    const node = (): number => (random.oneIn(15) ? -1 - random.below(ODD_NODES.length) : random.below(12));
    const handle = (): number => (random.oneIn(15) ? (random.oneIn(2) ? -1 : 1) * random.below(9) : 0);
    const text = (): string => random.pick(NAMES);
    const sizes = (): { sizes?: [number, number] } =>
      random.oneIn(15) ? { sizes: [random.pick([0, 8, 272, 560, 0xffffffff]), random.pick([0, 7, 8, 272, 560, 0xffffffff])] } : {};
    const steps: Step[] = [];
    const connect = (): void => {
      const root = { uid: 0, pid: 0 };
      steps.push({ op: 'open', handle: 0, ...who(root) });
      const wrong = random.oneIn(8);
      const length = random.oneIn(15) ? random.pick([0, 256, 257, 0xffffffff]) : TOKEN.length;
      steps.push({
        op: 'auth',
        handle: handle(),
        version: random.oneIn(15) ? random.u32() : CONTROL_VERSION,
        length,
        token: wrong ? 'x'.repeat(random.below(260)) : TOKEN,
        ...sizes(),
        ...who(root),
      });
    };
    if (!random.oneIn(10)) connect();
    for (let i = 5 + random.below(60); i > 0; i--) {
      switch (random.below(12)) {
        case 0:
          if (random.oneIn(4)) connect();
          else steps.push({ op: random.pick(['flush', 'release', 'open'] as const), handle: handle(), ...who(agent) });
          break;
        case 1:
          steps.push({ op: 'lookup', parent: node(), name: text(), ...who(random.pick([agent, { uid: 0, pid: 3 }])) });
          break;
        case 2:
        case 3: {
          const records = Array.from({ length: random.oneIn(20) ? random.below(5000) : random.below(6) }, (): [number, number, number] => [
            node(),
            random.oneIn(10) ? random.u32() : 0,
            random.oneIn(3) ? 0 : random.u32(),
          ]);
          const odd = random.oneIn(15) ? { size: random.pick([0, 1, 15, 16, 65_536, 1 << 20, 0xffffffff]) } : {};
          steps.push({ op: 'write', handle: handle(), records, more: random.oneIn(15) ? random.below(40) - 20 : 0, ...odd, ...who(agent) });
          break;
        }
        case 4:
          steps.push({
            op: 'read',
            handle: handle(),
            size: random.oneIn(6) ? random.pick([0, 1, 16, 4095, 0xffffffff]) : 4096,
            wait: random.oneIn(6) ? random.pick([1, 1000, 2 ** 40]) : 0,
            ...who(agent),
          });
          break;
        case 5:
          steps.push({ op: 'host', what: random.below(3), name: 'x'.repeat(random.below(3)), ...agent });
          break;
        case 6:
          if (random.oneIn(4)) {
            const command = random.oneIn(2) ? random.pick(COMMANDS) : random.u32();
            const bytes = random.oneIn(2) ? random.pick([AuthIn.bytes, BeginIn.bytes]) : random.below(700);
            steps.push({ op: 'ioctl', handle: handle(), command, seed: random.u32(), bytes, ...sizes(), ...who(agent) });
          } else if (random.oneIn(10)) steps.push({ op: 'init', ...who(agent) });
          break;
        default: {
          // A replay, and perhaps what it says.
          const nodes = [node(), node(), random.oneIn(2) ? -1 : node(), random.oneIn(2) ? -1 : node()];
          const names: [string, string] = [text(), text()];
          const operation = random.oneIn(20) ? random.u32() : random.below(6);
          const lengths: { lengths?: [number, number] } = random.oneIn(15)
            ? { lengths: [random.pick([0, 255, 256, 65_535, random.below(300)]), random.pick([0, 255, 256, 65_535])] }
            : {};
          steps.push({
            op: 'begin',
            handle: handle(),
            words: [operation, random.below(3)],
            nodes,
            names,
            ...lengths,
            ...sizes(),
            ...who(agent),
          });
          if (random.oneIn(2)) steps.push({ op: 'lookup', parent: nodes[0] as number, name: names[0], ...who(agent) });
          for (let times = random.below(3); times > 0; times--) {
            const same = !random.oneIn(3);
            steps.push({
              op: 'change',
              what: random.oneIn(3) ? random.u32() : random.below(19),
              node: same ? (nodes[0] as number) : node(),
              name: same ? names[0] : text(),
              other: same ? (nodes[1] as number) : node(),
              otherName: same ? names[1] : text(),
              ...who(agent),
            });
          }
        }
      }
    }
    return { setup: random.below(SETUPS.length), steps };
  }

  run({ setup, steps }: Case<Step>): number {
    const index = setup % SETUPS.length;
    const device = this.#devices[index] ?? new Agent(SETUPS[index] as RigOptions);
    this.#devices[index] = device;
    const fds = openFds();
    device.requests = 0;
    device.rig.lines = 0;
    try {
      const { share } = device.rig;
      for (const name of fs.readdirSync(join(share.path, 'dir'))) if (name.startsWith('host-')) unlinkSync(join(share.path, 'dir', name));
      const before = tree(share.path);
      for (const step of steps) device.step(step);
      device.end();
      must(tree(share.path) === before, 'a request of the agent has changed the share');
      share.checkOutside();
      must(openFds() - fds < 4, () => `${openFds() - fds} descriptors are left: ${lastFds()}`);
      return device.requests;
    } catch (error) {
      this.#devices[index] = undefined;
      device.close();
      throw error;
    }
  }

  close(): void {
    for (const device of this.#devices) device?.close();
  }
}

/** What an agent could change, without what the host itself does: names, types, owners, modes, links, sizes, and times of what no host step touches. */
function tree(path: string): string {
  const lines: string[] = [];
  for (const at of ['', 'dir', 'dir/sub', 'many', 'deep/dir']) {
    for (const name of fs.readdirSync(join(path, at)).sort()) {
      if (name.startsWith('host-')) continue;
      const { ino, mode, uid, gid, nlink, size, mtimeMs } = fs.lstatSync(join(path, at, name));
      // The host makes files in `dir`.
      const touched = at === '' && name === 'dir';
      lines.push([at, name, ino, mode, uid, gid, nlink, ...(touched ? [] : [size, mtimeMs])].join(' '));
    }
  }
  return lines.join('\n');
}
