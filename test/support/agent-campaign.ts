/**
 * Fail closed: random replays against the real layers over a real directory, with everything that can go wrong with them, mixed with real
 * changes of other processes. A shadow directory gets what real requests ask for and nothing else; after each round both trees are the same.
 */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { join } from 'node:path';
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { KEPT } from '../../src/fs/filesystem.js';
import { lookupAgain } from '../../src/fs/passthrough/lookup.js';
import { openPassthrough } from '../../src/fs/passthrough.js';
import { InitFlag, Opcode } from '../../src/fuse/abi.js';
import { DEFAULT_SERVER_OPTIONS } from '../../src/fuse/init.js';
import { FuseServer } from '../../src/fuse/server.js';
import { AUTH, BEGIN, BEGIN_ISDIR, CONTROL_DIRECTORY, CONTROL_NAME, CONTROL_VERSION, Replay as Op } from '../../src/replay/abi.js';
import { STAGING_NODE } from '../../src/replay/phantoms.js';
import { AGENT_UID, Replay } from '../../src/replay/replay.js';
import { longs, request, string, words } from './fuse-guest.js';

const TOKEN = 'token of the campaign';
const NAMES = ['a', 'b', 'c', 'd', 'e', 'sub', 'dir'];
const EPERM = 1;

/** What happened, for the test to see that all of it did. */
export interface Tally {
  replays: number;
  refused: number;
  realDone: number;
  kills: number;
}

/** A random number generator that a seed repeats (mulberry32). */
export function random(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

export class Campaign {
  readonly tally: Tally = { replays: 0, refused: 0, realDone: 0, kills: 0 };
  readonly #share: string;
  readonly #shadow: string;
  readonly #server: FuseServer;
  readonly #replay: Replay;
  readonly #passthrough: ReturnType<typeof openPassthrough>;
  readonly #below: (n: number) => number;
  readonly #memory = arenaAlloc(1 << 16);
  readonly #iov = arenaAlloc(64);
  /** The agent's thread, and its handle of the control file; 0: there is none. */
  #thread = 0;
  #control = 0n;
  /** Nodeids that the guest has heard of, by path in the share. */
  readonly #nodes = new Map<string, bigint>([['', 1n]]);
  readonly #log: string[] = [];

  /** @param flags that the guest offers in FUSE_INIT */
  constructor(folder: string, seed: number, flags: number = InitFlag.AUTO_INVAL_DATA | InitFlag.EXPORT_SUPPORT) {
    this.#below = random(seed);
    this.#share = join(folder, 'share');
    this.#shadow = join(folder, 'shadow');
    for (const root of [this.#share, this.#shadow]) fs.mkdirSync(root);
    this.#renew();
    this.#passthrough = openPassthrough({ root: this.#share, xattr: true });
    const { share } = this.#passthrough;
    const events = {
      supportedLow: 0xfff,
      beginAgent: () => 0,
      endAgent: () => undefined,
      watch: () => 0,
      lendRead: () => KEPT,
      look: () => false,
    };
    this.#replay = new Replay(
      this.#passthrough,
      (nodeid) => lookupAgain(share, nodeid),
      events,
      Buffer.from(TOKEN),
      () => undefined,
    );
    this.#server = new FuseServer(this.#replay.served, { ...DEFAULT_SERVER_OPTIONS, allowIdmap: false, exportSupport: true });
    this.#send(Opcode.INIT, { uid: 0 }, words(7, 45, 0, flags));
  }

  close(): void {
    this.#passthrough.close();
  }

  /** One round; throws when the host has what it should not have, or has not what it should. */
  round(): void {
    this.#log.length = 0;
    if (this.#below(100) === 0) this.#renew();
    if (this.#thread === 0) assert.equal(this.connect(), 0);
    if (this.#below(4) === 0) this.#real();
    else this.#agentRound();
    this.#compare();
  }

  /** The host makes everything anew. */
  #renew(): void {
    for (const root of [this.#share, this.#shadow]) {
      for (const name of fs.readdirSync(root)) fs.rmSync(join(root, name), { recursive: true });
      for (const name of ['dir', 'sub']) fs.mkdirSync(join(root, name));
      for (const name of ['a', 'b', 'dir/a', 'dir/c', 'sub/e']) fs.writeFileSync(join(root, name), name, { mode: 0o644 });
    }
    this.#nodes.clear();
    this.#nodes.set('', 1n);
  }

  // --- the agent ---

  /** An agent comes. @returns the errno that it gets for the right token */
  connect(): number {
    const thread = 100 + this.#below(5);
    const directory = this.#send(Opcode.LOOKUP, { uid: 0, pid: thread }, string(CONTROL_DIRECTORY));
    assert.equal(directory.errno, 0);
    const looked = this.#send(Opcode.LOOKUP, { uid: 0, pid: thread, nodeid: directory.body.readBigUInt64LE(0) }, string(CONTROL_NAME));
    assert.equal(looked.errno, 0);
    const nodeid = looked.body.readBigUInt64LE(0);
    const opened = this.#send(Opcode.OPEN, { nodeid, uid: 0, pid: thread }, words(2, 0));
    assert.equal(opened.errno, 0);
    this.#control = opened.body.readBigUInt64LE(0);
    const token = Buffer.alloc(264);
    token.write(TOKEN);
    const wrong = Buffer.alloc(264, 'x');
    const auth = (bytes: Buffer, uid: number, pid: number) =>
      this.#ioctl(AUTH, Buffer.concat([words(CONTROL_VERSION, TOKEN.length), bytes]), uid, pid);
    if (this.#below(4) === 0) {
      assert.equal(auth(wrong, 0, thread).errno, 13);
      assert.equal(auth(token, 1000, thread).errno, 13);
    }
    const reply = auth(token, 0, thread);
    if (reply.errno !== 0) return reply.errno;
    assert.equal(reply.body.readUInt32LE(16 + 4), AGENT_UID);
    this.#thread = thread;
    return 0;
  }

  /** It dies: its files are closed, then its thread id is free. */
  #kill(): void {
    if (this.#thread === 0) return;
    this.tally.kills++;
    const nodeid = this.#controlNode;
    this.#send(Opcode.FLUSH, { nodeid, uid: AGENT_UID, pid: this.#thread }, longs(this.#control, 0, 0));
    if (this.#below(2) === 0) this.#send(Opcode.RELEASE, { nodeid, uid: 0, pid: 0 }, longs(this.#control, 0, 0));
    else {
      // Later, or never heard of: nobody may be served by it.
      this.#send(Opcode.UNLINK, { uid: AGENT_UID, pid: this.#thread }, string('a'));
      this.#send(Opcode.RELEASE, { nodeid, uid: 0, pid: 0 }, longs(this.#control, 0, 0));
    }
    this.#thread = 0;
  }

  get #controlNode(): bigint {
    return BigInt(2 ** 24);
  }

  #ioctl(command: number, data: Buffer, uid: number, pid: number) {
    const args = [longs(this.#control), words(0, command), longs(0), words(data.length, data.length), data];
    return this.#send(Opcode.IOCTL, { nodeid: this.#controlNode, uid, pid }, ...args);
  }

  #begin(
    operation: number,
    isdir: boolean,
    parent: bigint,
    name: string,
    target = 0n,
    newName = '',
    child = 0n,
    replaced = 0n,
    pid = this.#thread,
  ) {
    const names = Buffer.alloc(512);
    names.write(name, 0, 'latin1');
    names.write(newName, 256, 'latin1');
    const lengths = Buffer.alloc(8);
    lengths.writeUInt16LE(name.length, 0);
    lengths.writeUInt16LE(newName.length, 2);
    const head = words(operation, isdir ? BEGIN_ISDIR : 0);
    this.#log.push(`BEGIN ${operation} ${isdir} ${parent}/${name} ${target}/${newName} child ${child} replaced ${replaced}`);
    return this.#ioctl(BEGIN, Buffer.concat([head, longs(parent, target, child, replaced), lengths, names]), AGENT_UID, pid);
  }

  /** A replay as the agent and its kernel do it, with a fault at a random place; or a forgery. Nothing of it may reach the host. */
  #agentRound(): void {
    const before = tree(this.#share, true);
    const pid = this.#thread;
    const directory = this.#pick(['', '', 'dir', 'sub']);
    const other = this.#pick(['', 'dir', 'sub']);
    const parent = this.#node(directory);
    const target = this.#node(other);
    const name = this.#pick(NAMES);
    const newName = this.#pick(NAMES);
    const isdir = this.#below(3) === 0;
    const child = this.#below(2) === 0 ? this.#node(join(directory, name)) : 0n;
    const replaced = this.#below(2) === 0 ? this.#node(join(other, newName)) : 0n;
    const steps: (() => unknown)[] = [];
    const as = { uid: AGENT_UID, pid };
    const send =
      (opcode: number, nodeid: bigint, ...parts: Buffer[]) =>
      () =>
        this.#send(opcode, { ...as, nodeid }, ...parts);
    const look = (nodeid: bigint, what: string) => send(Opcode.LOOKUP, nodeid, string(what));
    const staged = this.#below(4) === 0;
    switch (this.#below(6)) {
      case 0:
        steps.push(() => this.#begin(Op.create, isdir, parent, name, 0n, '', child), look(parent, name), look(parent, name));
        if (isdir) steps.push(send(Opcode.MKDIR, parent, words(0o755, 0), string(name)));
        else if (this.#below(4) === 0) steps.push(send(Opcode.SYMLINK, parent, string(name), string('.')));
        else steps.push(send(Opcode.MKNOD, parent, words(0o100644, 0, 0, 0), string(name)));
        break;
      case 1:
        steps.push(() => this.#begin(Op.remove, isdir, parent, name, 0n, '', child), look(parent, name));
        steps.push(look(parent, name), send(isdir ? Opcode.RMDIR : Opcode.UNLINK, parent, string(name)));
        break;
      case 2: {
        const from = staged ? BigInt(STAGING_NODE) : parent;
        const to = !staged && this.#below(4) === 0 ? BigInt(STAGING_NODE) : target;
        steps.push(() => this.#begin(Op.rename, isdir, from, name, to, newName, child, replaced));
        steps.push(look(from, name), look(to, newName));
        if (this.#below(2) === 0) steps.push(send(Opcode.RENAME2, from, longs(to), words(0, 0), string(name), string(newName)));
        else steps.push(send(Opcode.RENAME, from, longs(to), string(name), string(newName)));
        break;
      }
      case 3: {
        const nodeid = child === 0n ? parent : child;
        const valid = this.#pick([32, 16, 48, 1, 1024 | 32, 64 | 32]);
        steps.push(() => this.#begin(Op.change, isdir, parent, name, 0n, '', nodeid), look(parent, name));
        steps.push(send(Opcode.GETATTR, nodeid, words(0, 0), longs(0)), this.#setattr(as, nodeid, valid));
        break;
      }
      case 4: {
        const nodeid = child === 0n ? parent : child;
        steps.push(() => this.#begin(Op.open, isdir, parent, name, 0n, '', nodeid), look(parent, name));
        steps.push(send(isdir ? Opcode.OPENDIR : Opcode.OPEN, nodeid, words(this.#pick([0, 1, 2, 0x201, 0x8241]), 0)));
        break;
      }
      default:
        steps.push(this.#forged(as, parent, target, name, newName));
    }
    this.#disturb(steps, parent, target, name, newName);
    for (const step of steps) step();
    // None of it has changed anything, not even a time.
    assert.equal(tree(this.#share, true), before, this.#log.join('\n'));
    if (this.#below(20) === 0) this.#kill();
  }

  /** Drops, repeats, delays; kills the agent, lets another one come; puts a forgery in between. */
  #disturb(steps: (() => unknown)[], parent: bigint, target: bigint, name: string, newName: string): void {
    const at = this.#below(steps.length);
    const as = { uid: AGENT_UID, pid: this.#thread };
    switch (this.#below(10)) {
      case 0:
        steps.splice(at, 1);
        break;
      case 1:
        steps.splice(at, 0, steps[at] as () => unknown);
        break;
      case 2:
        steps.splice(at, 0, () => this.#kill());
        break;
      case 3:
        // The next one has the same thread id, perhaps, and has announced nothing.
        steps.splice(at, 0, () => {
          this.#kill();
          assert.equal(this.connect(), 0);
        });
        break;
      case 4:
        steps.splice(at, 0, () => this.#begin(Op.none, false, 0n, ''));
        break;
      case 5:
        steps.splice(at, 0, this.#forged(as, parent, target, name, newName));
        break;
      case 6:
        steps.splice(at, 0, this.#forged({ uid: AGENT_UID, pid: 999 }, parent, target, name, newName));
        break;
      case 7:
        // Another thread announces something: it may not.
        steps.splice(at, 0, () => assert.notEqual(this.#begin(Op.remove, false, parent, name, 0n, '', 0n, 0n, 999).errno, 0));
        break;
      default:
    }
  }

  /** A change under the agent's user id that nobody has announced, or that is another one than that. */
  #forged(as: { uid: number; pid: number }, parent: bigint, target: bigint, name: string, newName: string): () => unknown {
    const send =
      (opcode: number, nodeid: bigint, ...parts: Buffer[]) =>
      () =>
        this.#send(opcode, { ...as, nodeid }, ...parts);
    const file = this.#node(this.#pick(['a', 'dir/a', 'sub/e']));
    const kinds = [
      send(Opcode.UNLINK, parent, string(name)),
      send(Opcode.RMDIR, parent, string(name)),
      send(Opcode.RENAME, parent, longs(target), string(name), string(newName)),
      send(Opcode.RENAME2, parent, longs(target), words(2, 0), string(name), string(newName)),
      send(Opcode.MKNOD, parent, words(0o100644, 0, 0, 0), string(newName)),
      send(Opcode.MKDIR, parent, words(0o755, 0), string(newName)),
      send(Opcode.SYMLINK, parent, string(newName), string('x')),
      send(Opcode.LINK, parent, longs(file), string(newName)),
      send(Opcode.CREATE, parent, words(0x8241, 0o644, 0, 0), string(name)),
      send(Opcode.TMPFILE, parent, words(2, 0o644, 0, 0), string('/')),
      this.#setattr(as, file, this.#pick([1, 2, 4, 8, 8 | 32, 256, 128, 2048 | 8])),
      send(Opcode.OPEN, file, words(0x201, 0)),
      send(Opcode.SETXATTR, file, words(1, 0), string('user.x'), Buffer.from('v')),
      send(Opcode.REMOVEXATTR, file, string('user.x')),
    ];
    return this.#pick(kinds);
  }

  #setattr(as: { uid: number; pid: number }, nodeid: bigint, valid: number): () => unknown {
    // valid, fh, size, lock owner, atime, mtime, ctime, their nanoseconds, mode, unused, uid, gid, unused
    const args = [words(valid, 0), longs(0, 1, 0, 11, 22, 33), words(1, 2, 3, 0o600, 0, 5, 6, 0)];
    return () => this.#send(Opcode.SETATTR, { ...as, nodeid }, ...args);
  }

  // --- everybody else ---

  /** A change of another process, perhaps while a replay is under way: it is done, and the shadow says what that is. */
  #real(): void {
    const pid = this.#pick([this.#thread, 1, 4242]);
    const as = { uid: 0, pid, gid: 0 };
    const directory = this.#pick(['', 'dir', 'sub']);
    const other = this.#pick(['', 'dir', 'sub']);
    const parent = this.#node(directory);
    const target = this.#node(other);
    const [name, newName] = [this.#pick(NAMES), this.#pick(NAMES)];
    // The kernel asks for nothing in what is gone or no directory.
    const isDirectory = (path: string) => fs.lstatSync(join(this.#shadow, path), { throwIfNoEntry: false })?.isDirectory();
    if (parent === 0n || target === 0n || !isDirectory(directory) || !isDirectory(other)) return;
    const path = join(this.#shadow, directory, name);
    const newPath = join(this.#shadow, other, newName);
    if (this.#below(2) === 0) {
      const isdir = this.#below(2) === 0;
      const operation = this.#pick([Op.create, Op.remove, Op.rename, Op.change]);
      this.#begin(operation, isdir, parent, name, target, newName, this.#node(join(directory, name)), 0n);
    }
    const send = (opcode: number, nodeid: bigint, ...parts: Buffer[]) => this.#send(opcode, { ...as, nodeid }, ...parts).errno;
    let errno: number;
    let expected: number;
    switch (this.#below(7)) {
      case 0:
        errno = send(Opcode.UNLINK, parent, string(name));
        expected = errnoOf(() => fs.unlinkSync(path));
        break;
      case 1:
        errno = send(Opcode.RMDIR, parent, string(name));
        expected = errnoOf(() => fs.rmdirSync(path));
        break;
      case 2:
        errno = send(Opcode.RENAME, parent, longs(target), string(name), string(newName));
        expected = errnoOf(() => fs.renameSync(path, newPath));
        break;
      case 3:
        errno = send(Opcode.MKNOD, parent, words(0o100644, 0, 0, 0), string(name));
        expected = errnoOf(() => fs.closeSync(fs.openSync(path, 'wx', 0o644)));
        break;
      case 4:
        errno = send(Opcode.MKDIR, parent, words(0o755, 0), string(name));
        expected = errnoOf(() => fs.mkdirSync(path, 0o755));
        break;
      case 5:
        errno = send(Opcode.SYMLINK, parent, string(name), string('a'));
        expected = errnoOf(() => fs.symlinkSync('a', path));
        break;
      default: {
        const node = this.#node(join(directory, name));
        if (node === 0n || !fs.lstatSync(path).isFile()) return;
        const mode = this.#pick([0o600, 0o644]);
        errno = this.#send(
          Opcode.SETATTR,
          { ...as, nodeid: node },
          words(1, 0),
          longs(0, 0, 0, 0, 0, 0),
          words(0, 0, 0, mode, 0, 0, 0, 0),
        ).errno;
        expected = errnoOf(() => fs.chmodSync(path, mode));
      }
    }
    assert.equal(errno, expected, `a real change under pid ${pid}: ${this.#log.join('\n')}`);
    if (errno === 0) this.tally.realDone++;
    this.#nodes.clear();
    this.#nodes.set('', 1n);
  }

  /** What the guest knows of a path, looked up by an ordinary process; 0 for what is not there. */
  #node(path: string): bigint {
    const known = this.#nodes.get(path);
    if (known !== undefined) return known;
    const slash = path.lastIndexOf('/');
    const parent = this.#node(path.slice(0, Math.max(slash, 0)));
    if (parent === 0n) return 0n;
    const { errno, body } = this.#send(Opcode.LOOKUP, { nodeid: parent, uid: 0, pid: 7 }, string(path.slice(slash + 1)));
    const nodeid = errno === 0 ? body.readBigUInt64LE(0) : 0n;
    this.#nodes.set(path, nodeid);
    return nodeid;
  }

  #compare(): void {
    assert.equal(tree(this.#share, false), tree(this.#shadow, false), this.#log.join('\n'));
  }

  #pick<T>(values: readonly T[]): T {
    return values[this.#below(values.length)] as T;
  }

  #send(
    opcode: number,
    header: { nodeid?: bigint; uid: number; pid?: number; gid?: number },
    ...parts: Buffer[]
  ): { errno: number; body: Buffer } {
    const bytes = request(opcode, { gid: 0, ...header }, ...parts);
    bytes.copy(arena.buffer, this.#memory);
    const out = this.#memory + 4096;
    const set = (at: number, address: number, length: number) =>
      arena.u32.set([address % 2 ** 32, Math.floor(address / 2 ** 32), length, 0], at >> 2);
    set(this.#iov, native.arenaAddress() + this.#memory, bytes.length);
    set(this.#iov + 16, native.arenaAddress() + out, 8192);
    const used = this.#server.serve({
      iov: this.#iov,
      readableCount: 1,
      readableBytes: bytes.length,
      writableIov: this.#iov + 16,
      writableCount: 1,
      writableBytes: 8192,
    });
    const errno = used === 0 ? 0 : Math.abs(arena.i32[(out + 4) >> 2] as number);
    if (header.uid === AGENT_UID && opcode !== Opcode.IOCTL) {
      this.#log.push(`${opcode} nodeid ${header.nodeid} pid ${header.pid}: ${errno}`);
      if (errno === EPERM) this.tally.refused++;
      else if (errno === 0 && opcode !== Opcode.LOOKUP && opcode !== Opcode.GETATTR) this.tally.replays++;
    }
    return { errno, body: Buffer.from(arena.buffer.subarray(out + 16, out + Math.max(used, 16))) };
  }
}

function errnoOf(call: () => void): number {
  try {
    call();
    return 0;
  } catch (error) {
    return -((error as NodeJS.ErrnoException).errno as number);
  }
}

/** All there is below a directory; `exact`: with inode numbers and times. */
function tree(root: string, exact: boolean): string {
  const lines: string[] = [];
  const visit = (path: string) => {
    for (const name of fs.readdirSync(path).sort()) {
      const at = `${path}/${name}`;
      const st = fs.lstatSync(at, { bigint: true });
      lines.push(`${at.slice(root.length)} ${st.mode.toString(8)} ${st.isDirectory() ? '' : `${st.nlink} ${st.size}`}`);
      if (exact) lines.push(`${st.ino} ${st.mtimeNs} ${st.ctimeNs}`);
      if (st.isDirectory()) visit(at);
    }
  };
  visit(root);
  return lines.join('\n');
}
