/**
 * One worker after the other, and to the guest they are one: what outlives a worker, and how the next one takes it up (RESTART.md).
 *
 * Two memfds of the launcher hold the state: the share's stores (fs/block.ts), and the session (below). Descriptors are kept by the keeper
 * (native/keeper.cc), and the next worker opens them under the same numbers, so that no record has to change: numbers
 * below {@link FIRST_FD} are never given to what is kept.
 */
import { constants } from 'node:os';
import type { BackendState, SessionKeeper } from 'vhost-user-ts';
import { Ledger, MessageStage, VhostUserBackend } from 'vhost-user-ts';
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { Block, Part } from './fs/block.js';
import { BlockDescriptors } from './fs/descriptors.js';
import type { Session } from './fuse/init.js';
import { log } from './log.js';
import type { Handover } from './sandbox.js';
import { StartError } from './starterror.js';

const { EAGAIN } = constants.errno;
const POLLIN = 1;
/** Descriptors with lower numbers are Node's, the launcher's and those of the start. */
const FIRST_FD = 128;
/** Descriptors asked for at a time: so many low numbers must be free while they come. */
const BATCH = 64;
const ANSWER_MS = 2000;
/** 'G', wait status, time. */
const TURN_BYTES = 13;

/** What is saved of a session: everything that changes rarely. */
export interface SavedSession {
  /** The front end's; null: there is none. */
  readonly client: BackendState | null;
  readonly fuse: Session | null;
  readonly events: SavedEvents | null;
  /** The worker's pid. */
  readonly pid: number;
}

/** Remote fsnotify; the guest's masks are in the inodes' records. */
export interface SavedEvents {
  readonly fanotify: number;
  readonly inotify: number;
  /** The mask for everything, see `FUSE_FSNOTIFY_ALL`. */
  readonly all: number;
  /** The guest can be told of changes. */
  readonly told: boolean;
  /** Every directory is marked (`--cache=notify`). */
  readonly coherent: boolean;
}

const MAGIC = 0x53565349;
/** Grows with every change of what is saved, or of what it means: a worker does not take up what another version has saved. */
const VERSION = 1;
const M = 1 << 20;
const COUNT_MASK = 0x3fff_ffff;
/** Words of the first page. */
const Word = { magic: 0, version: 1, sequence: 2, stage: 3, events: 4, handled: 5, length: 8 } as const;
/** Words of what was handled last, in two places that are written in turn: count, length, bytes of the reply, and then these. */
const Handled = { count: 0, length: 1, bytes: 2, reply: 3 } as const;
const HANDLED = [16 << 10, 32 << 10] as const;
const HANDLED_BYTES = 16 << 10;
/** Byte offsets: two places for the JSON, written in turn; the ledger. */
const TEXT = [1 * M, 2 * M] as const;
const LEDGER = 4 * M;
/** More queues than any device here has. */
const QUEUES = 1024;
const BYTES = LEDGER + Ledger.bytes(QUEUES);

/** The session in its memfd. */
export class SessionStore implements SessionKeeper {
  readonly ledger: Ledger;
  /** One word: 1 while events were read from the host that the guest does not have yet. */
  readonly events: Uint32Array;
  /** What an earlier worker has saved. */
  readonly earlier: SavedSession | undefined;
  /** What is to be saved, asked for when it is. */
  source: () => SavedSession | undefined = () => undefined;
  /** What was done with the message that an earlier worker has handled last. */
  readonly earlierStage: number;
  readonly #words: Uint32Array;
  readonly #handled: readonly Uint8Array[];
  readonly #text: readonly Buffer[];

  constructor(fd: number) {
    const region = native.regionMap(fd, 0, BYTES, 1);
    if (region < 0) throw new StartError(`the memory of the session cannot be mapped (errno ${-region})`);
    this.#words = new Uint32Array(native.regionBuffer(region, 0, 4096));
    this.#text = TEXT.map((at) => Buffer.from(native.regionBuffer(region, at, M)));
    this.events = this.#words.subarray(Word.events, Word.events + 1);
    this.ledger = new Ledger(native.regionBuffer(region, LEDGER, Ledger.bytes(QUEUES)));
    this.#handled = HANDLED.map((at) => new Uint8Array(native.regionBuffer(region, at, HANDLED_BYTES)));
    if (this.#words[Word.magic] === MAGIC && this.#sequence > 0) {
      const place = this.#sequence & 1;
      const saved = JSON.parse((this.#text[place] as Buffer).toString('utf8', 0, this.#words[Word.length + place])) as SavedSession;
      this.earlier = this.#withHandled(saved);
    }
    const count = this.earlier?.client?.handled.count ?? 0;
    const stage = this.#words[Word.stage] as number;
    this.earlierStage = stage >>> 2 === (count & COUNT_MASK) ? stage & 3 : MessageStage.handled;
    this.#words[Word.magic] = MAGIC;
    this.#words[Word.version] = VERSION;
  }

  /** Whether this program can go on with what is in a memfd. */
  static fits(fd: number): boolean {
    const head = native.regionMap(fd, 0, 4096, 0);
    if (head < 0) return false;
    const words = new Uint32Array(native.regionBuffer(head, 0, 4096));
    const fits = words[Word.magic] === MAGIC && words[Word.version] === VERSION;
    native.regionUnmap(head);
    return fits;
  }

  get #sequence(): number {
    return this.#words[Word.sequence] as number;
  }

  /** The message that was handled last, if nothing has changed by it, is not in the state. */
  #withHandled(saved: SavedSession): SavedSession {
    const bytes = this.#handled[(this.#words[Word.handled] as number) & 1] as Uint8Array;
    const words = new Uint32Array(bytes.buffer, bytes.byteOffset, 4);
    const count = words[Handled.count] as number;
    if (saved.client === null || count <= saved.client.handled.count) return saved;
    const reply = Buffer.from(bytes).toString('hex', 4 * Handled.reply, 4 * Handled.reply + (words[Handled.bytes] as number));
    return { ...saved, client: { ...saved.client, handled: { count, length: words[Handled.length] as number, reply } } };
  }

  handled(count: number, length: number, at: number, replyBytes: number): void {
    const next = ((this.#words[Word.handled] as number) + 1) >>> 0;
    const bytes = this.#handled[next & 1] as Uint8Array;
    const words = new Uint32Array(bytes.buffer, bytes.byteOffset, 4);
    words[Handled.count] = count;
    words[Handled.length] = length;
    words[Handled.bytes] = replyBytes;
    bytes.set(arena.u8.subarray(at, at + replyBytes), 4 * Handled.reply);
    this.#words[Word.handled] = next;
  }

  stage(count: number, stage: number): void {
    this.#words[Word.stage] = (count << 2) | stage;
  }

  save(): void {
    const saved = this.source();
    if (saved === undefined) return;
    const next = (this.#sequence + 1) >>> 0;
    const place = next & 1;
    this.#words[Word.length + place] = (this.#text[place] as Buffer).write(JSON.stringify(saved));
    // It counts from here on.
    this.#words[Word.sequence] = next;
  }
}

/** A worker with what it has taken up. */
export class Worker {
  readonly store: SessionStore;
  readonly block: Block;
  /** Readable when the launcher says something. */
  readonly control: number;
  /** 1 for the first worker. */
  readonly generation: number;
  /** Whether the worker before this one failed by itself: neither killed nor replaced. */
  fault = false;
  readonly #keep: number;
  readonly #memfd: number;
  #before = '';
  #endedAt = 0;
  readonly #byte = arenaAlloc(64);
  /** Numbers that were filled, their count first. */
  readonly #low = arenaAlloc(4 * (FIRST_FD + 1));

  /**
   * Waits for its turn, takes up what there is, and has it kept for the next one.
   * @param words what the launcher said: control, keep, from, generation
   */
  constructor(words: string, { state, session, seccomp }: Pick<Handover, 'state' | 'session' | 'seccomp'>) {
    const [control = -1, keep = -1, from = -1, generation = 1] = words.split(' ').map(Number);
    this.control = control;
    this.#keep = keep;
    this.#memfd = session;
    this.generation = generation;
    if (from >= 0) this.#waitForTurn(state, session);
    else {
      native.ftruncate(state, Part.end);
      native.ftruncate(session, BYTES);
    }
    this.store = new SessionStore(session);
    this.block = new Block(state);
    const full = this.fill() < 0;
    if (from >= 0) this.#takeDescriptors(from);
    // Without room for descriptors above those of Node nothing can be kept.
    const keeper = full ? 0 : native.keeperStart(keep, seccomp ?? -1);
    if (keeper <= 0)
      log.warn(`a worker that ends cannot be followed by another one: ${full ? 'the limit of open files is too low' : `errno ${-keeper}`}`);
    this.#say('R', Math.max(keeper, 0));
  }

  /** Low numbers that were given back since the last time are taken again: after what closes descriptors of the start. -EMFILE: they cannot be. */
  fill(): number {
    return native.fillNumbers(this.#memfd, FIRST_FD, this.#low);
  }

  /** It serves. */
  serves(): void {
    this.#say('S');
    if (this.generation === 1) return;
    const pause = (native.monotonic() - this.#endedAt) / 1e6;
    log.warn(`the worker before this one ${this.#before}: the guest goes on after ${pause.toFixed(0)} ms`);
  }

  /** When the worker before this one ended, in milliseconds since the epoch; 0: there was none. */
  get endOfBefore(): number {
    return this.#endedAt === 0 ? 0 : Date.now() - (native.monotonic() - this.#endedAt) / 1e6;
  }

  /** What the launcher says, '' when nothing more. */
  listen(): string {
    const n = native.recvmsg(this.control, this.#byte, 1, this.#byte + 8, -1);
    return n === 1 ? String.fromCharCode(arena.u8[this.#byte] as number) : '';
  }

  /** Everything is written down, and nothing under way: gives the descriptors to the next worker. Returns when that one has them. */
  handOver(): void {
    this.#say('U');
    native.keeperServe(this.#keep);
  }

  /** A request that has not ended would end later than the next worker begins. */
  refuse(): void {
    log.warn('the worker is not replaced: requests are with a slow host');
    this.#say('X');
  }

  #say(what: string, number?: number): void {
    arena.u8[this.#byte] = what.charCodeAt(0);
    const bytes = number === undefined ? 1 : 5;
    if (number !== undefined) arena.buffer.writeInt32LE(number, this.#byte + 1);
    native.sendmsg(this.control, this.#byte, bytes, 0, 0);
  }

  #waitForTurn(state: number, session: number): void {
    if (!Block.fits(state) || !SessionStore.fits(session))
      throw new StartError('this version cannot go on with the state of the one that runs: end that one, and start this one');
    this.#say('H');
    const at = this.#byte;
    while (native.recvmsg(this.control, at, TURN_BYTES, at + 32, -1) !== TURN_BYTES) native.poll(this.control, POLLIN, -1);
    const status = arena.buffer.readInt32LE(at + 1);
    this.#endedAt = Number(arena.buffer.readBigUInt64LE(at + 5));
    const signal = status & 0x7f;
    this.fault = signal !== 0 ? signal !== constants.signals.SIGKILL : status !== 0;
    this.#before = status === 0 ? 'was replaced' : signal !== 0 ? `was ended by signal ${signal}` : `ended with status ${status >> 8}`;
  }

  /** Has every descriptor of the state open under its number. */
  #takeDescriptors(from: number): void {
    const low = this.#low;
    const client = this.store.earlier?.client;
    const events = this.store.earlier?.events;
    const places = new BlockDescriptors(this.block);
    const wanted = new Set(places.list());
    if (client != null) for (const fd of VhostUserBackend.descriptors(client)) wanted.add(fd);
    for (const fd of [events?.fanotify ?? -1, events?.inotify ?? -1]) if (fd >= 0) wanted.add(fd);
    // What comes gets the lowest numbers that are free.
    const fillers = Array.from({ length: arena.i32[low >> 2] as number }, (_, i) => arena.i32[(low >> 2) + 1 + i] as number).slice(-BATCH);
    for (const fd of fillers) native.close(fd);
    const lost = new Set<number>();
    const list = [...wanted];
    const at = arenaAlloc(4 * BATCH);
    const came = arenaAlloc(4 * (BATCH + 1));
    for (let done = 0; done < list.length; done += BATCH) this.#takeBatch(from, list.slice(done, done + BATCH), at, came, lost);
    native.close(from);
    this.fill();
    places.drop(lost);
    places.close();
    this.#lost = lost;
  }

  #lost: ReadonlySet<number> = new Set();

  /** Descriptors of the state that nobody has. */
  get lost(): ReadonlySet<number> {
    return this.#lost;
  }

  #takeBatch(from: number, fds: readonly number[], at: number, came: number, lost: Set<number>): void {
    for (const [i, fd] of fds.entries()) arena.i32[(at >> 2) + i] = fd;
    const bytes = 4 * fds.length;
    if (native.sendmsg(from, at, bytes, 0, 0) !== bytes) throw new StartError('the descriptors of the worker before cannot be asked for');
    let n = -EAGAIN;
    for (let tries = 0; n === -EAGAIN && tries < 2; tries++) {
      native.poll(from, POLLIN, ANSWER_MS);
      n = native.recvmsg(from, at, bytes, came, BATCH);
    }
    if (n !== bytes) throw new StartError('the descriptors of the worker before are not to be had');
    let next = 1;
    for (const [i, fd] of fds.entries()) {
      if ((arena.i32[(at >> 2) + i] as number) < 0) {
        lost.add(fd);
        continue;
      }
      const error = native.moveFd(arena.i32[(came >> 2) + next++] as number, fd);
      if (error < 0) throw new StartError(`descriptor ${fd} is not free for the state (errno ${-error})`);
    }
  }
}

/** Name of the environment variable that the launcher starts a worker with. */
const VARIABLE = 'VIRTIOFSD_TS_WORKER';

/** This process's place in the line, if the launcher has started it. */
export function takeUp(handover: Handover): Worker | undefined {
  const words = process.env[VARIABLE];
  if (words === undefined) return undefined;
  delete process.env[VARIABLE];
  return new Worker(words, handover);
}
