/**
 * The FUSE server: one request in, one reply out. It knows no virtio (a {@link Chain} is two lists of buffers) and no host file
 * system (that is behind `FileSystem`), and it throws for nothing that a guest sends.
 */
import { arena, arenaAlloc } from 'vhost-user-ts/native';
import { type FileSystem, type Lock, NO_FH, PENDING, type SetAttr } from '../fs/filesystem.js';
import { Errno, Opcode, OutHeader, WriteOut } from './abi.js';
import { type InitRequest, NO_SESSION, negotiate, type ServerOptions, type Session } from './init.js';
import { NO_REPLY, OPCODES, type Operation, operationOf } from './opcodes.js';
import { Reply, type Timeouts } from './reply.js';
import { type Chain, Request, Tail } from './request.js';

export type { Timeouts } from './reply.js';
export type { Chain } from './request.js';

/** Where requests are counted. `slot` is an index of `OPCODES`. */
export interface RequestMetrics {
  /** A batch of requests begins, after the device has slept. */
  batch(): void;
  /** A request was taken. Returns what `end` gets back, a time stamp: of the reply before it in its batch. */
  begin(): number;
  /** It was answered: `errno` 0 or positive, `bytes` of data read or written (0 for all but READ, WRITE and copies). */
  end(slot: number, began: number, errno: number, bytes: number): void;
  /** It was refused before the file system saw it: no guest kernel sends such a request. */
  malformed(): void;
}

/** What the server must know of the offload threads: `Offload` has it. */
export interface Jobs {
  /** Number of the job that the last PENDING result stands for, below `capacity`. */
  readonly lastJob: number;
  readonly capacity: number;
  /** Ends a job early, if that is possible. */
  cancel(job: number): void;
}

/** The file event extension (FUSE_HAS_FSNOTIFY), if the daemon has it. */
export interface FileEvents {
  /** The bits of a mask that can be delivered. */
  readonly supportedLow: number;
  readonly supportedHigh: number;
  /** A session begins that has agreed on it. */
  begin(): void;
  /** The session ends: watches go, and every kept chain is answered. */
  end(): void;
  /** FUSE_FSNOTIFY: sets the watch of a node. Returns 0 (the mask is accepted as it is) or -errno. */
  watch(nodeid: number, generation: number, maskLow: number, maskHigh: number, flags: number): number;
  /**
   * FUSE_READ_NOTIFY: takes the chain's writable buffers (it copies the iovecs) for a later notification.
   * Returns KEPT, then the chain is answered by the event code alone; or 0 or -errno.
   */
  lend(chain: Chain, uniqueLow: number, uniqueHigh: number, size: number, flags: number): number;
}

/** Called with what a served request was and how it ended. */
export type Trace = (operation: Operation, request: Request, result: number) => void;

/** What a server is connected to besides its file system. */
export interface ServerHooks {
  jobs?: Jobs;
  metrics?: RequestMetrics;
  events?: FileEvents;
  /** One line for people: an option that the guest cannot follow. */
  warn?: (line: string) => void;
  trace?: Trace;
}

const NO_METRICS: RequestMetrics = { batch: () => undefined, begin: () => 0, end: () => undefined, malformed: () => undefined };
const NO_JOBS: Jobs = { lastJob: -1, capacity: 0, cancel: () => undefined };
const NO_CHAIN: Chain = { iov: 0, readableCount: 0, readableBytes: 0, writableIov: 0, writableCount: 0, writableBytes: 0 };

const UNKNOWN = OPCODES[0] as Operation;
const WRITE = operationOf(Opcode.WRITE);
const INIT = operationOf(Opcode.INIT);

/** The longest reply of an offloaded request that is not already in the guest's buffer; it can lie in as many pieces as bytes. */
const LATE_REPLY_BYTES = OutHeader.bytes + WriteOut.bytes;
const IOVEC_BYTES = 16;
const LATE_IOV_BYTES = LATE_REPLY_BYTES * IOVEC_BYTES;
/** Places for saved iovecs are taken from the arena this many at a time, when so many jobs were out at once. */
const BLOCK = 64;

/** Serves one file system to one guest. */
export class FuseServer {
  readonly fs: FileSystem;
  readonly events: FileEvents | null;
  /** Scratch of SETATTR. */
  readonly change: SetAttr = {
    valid: 0,
    fh: NO_FH,
    mode: 0,
    uid: 0,
    gid: 0,
    size: 0,
    atime: 0,
    atimeNsec: 0,
    mtime: 0,
    mtimeNsec: 0,
    ctime: 0,
    ctimeNsec: 0,
  };
  /** Scratch of GETLK and SETLK. */
  readonly lock: Lock = {
    ownerLow: 0,
    ownerHigh: 0,
    startLow: 0,
    startHigh: 0,
    endLow: 0,
    endHigh: 0,
    type: 0,
    pid: 0,
    flock: false,
    uniqueLow: 0,
    uniqueHigh: 0,
  };
  /** What the last FUSE_INIT agreed on; `minor` 0 before it. */
  session: Session = NO_SESSION;
  /** The chain being served. */
  chain: Chain = NO_CHAIN;
  /** After PENDING: the job whose end `complete` wants to hear of, or -1 when the event code has kept the chain. */
  pendingJob = -1;
  /** Called when a session has begun. */
  onSession: (session: Session) => void = () => undefined;
  /** Called when {@link session} is another one, and the file system follows it. */
  onChange: () => void = () => undefined;
  /** Set to see every request (debug logging); null costs nothing. */
  trace: Trace | null;

  readonly #options: Readonly<ServerOptions>;
  readonly #request = new Request();
  readonly #reply: Reply;
  readonly #jobs: Jobs;
  readonly #metrics: RequestMetrics;
  readonly #warn: (line: string) => void;

  // What a request leaves behind until its job ends, by job number.
  readonly #iovBlocks: number[] = [];
  readonly #iovCount: Uint8Array;
  readonly #room: Float64Array;
  readonly #uniqueLow: Uint32Array;
  readonly #uniqueHigh: Uint32Array;
  /** Index of its operation; 0: no request waits for the job. */
  readonly #slot: Uint8Array;
  #kept = 0;
  readonly #began: Float64Array;

  constructor(fs: FileSystem, options: Readonly<ServerOptions>, hooks: ServerHooks = {}) {
    this.fs = fs;
    this.events = hooks.events ?? null;
    this.trace = hooks.trace ?? null;
    this.#options = options;
    this.#reply = new Reply(fs, options);
    this.#jobs = hooks.jobs ?? NO_JOBS;
    this.#metrics = hooks.metrics ?? NO_METRICS;
    this.#warn = hooks.warn ?? (() => undefined);
    const capacity = this.#jobs.capacity;
    this.#iovCount = new Uint8Array(capacity);
    this.#room = new Float64Array(capacity);
    this.#uniqueLow = new Uint32Array(capacity);
    this.#uniqueHigh = new Uint32Array(capacity);
    this.#slot = new Uint8Array(capacity);
    this.#began = new Float64Array(capacity);
  }

  /**
   * Serves the request in a chain.
   * @returns the bytes written to the chain's writable part (0: no reply), or PENDING: then the chain stays with the device until
   *   job {@link pendingJob} ends and {@link complete} says how long the reply is.
   */
  serve(chain: Chain): number {
    const began = this.#metrics.begin();
    const q = this.#request;
    const r = this.#reply;
    this.chain = chain;
    let operation = UNKNOWN;
    let result = q.begin(chain);
    if (result === 0) {
      operation = operationOf(q.opcode);
      if (operation !== WRITE && q.truncated) result = q.complete(chain);
    }
    r.begin(chain, q.uniqueLow, q.uniqueHigh);
    if (result === 0) result = this.#check(operation, q, r);
    if (result === 0) {
      q.caller(this.fs.caller);
      result = operation.handler(this, q, r);
    } else this.#metrics.malformed();
    if (this.trace !== null) this.trace(operation, q, result);
    if (result >= PENDING) {
      if (result === PENDING) this.#keep(operation, q, began);
      else this.pendingJob = -1;
      return PENDING;
    }
    if (result === NO_REPLY) {
      this.#metrics.end(operation.slot, began, 0, 0);
      return 0;
    }
    return this.#answer(operation, began, result);
  }

  /**
   * Answers a request whose offloaded job has ended; `result` is a count or -errno.
   * @returns the bytes written to the writable part of the chain that the job's request came in.
   */
  complete(job: number, result: number): number {
    this.fs.completed(job);
    const operation = OPCODES[this.#slot[job] as number] as Operation;
    this.#slot[job] = 0;
    this.#kept--;
    const iov = this.#savedIov(job);
    this.#reply.to(
      iov,
      this.#iovCount[job] as number,
      this.#room[job] as number,
      this.#uniqueLow[job] as number,
      this.#uniqueHigh[job] as number,
    );
    const encoded = result < 0 || operation.inPlace || operation.encode !== null ? result : 0;
    return this.#answer(operation, this.#began[job] as number, encoded);
  }

  /** A batch of requests begins: the time of the first is counted from here. */
  batch(): void {
    this.#metrics.batch();
  }

  /** As {@link complete} for a chain that is gone (its queue was reset): nothing is written. */
  drop(job: number): void {
    this.fs.completed(job);
    this.#slot[job] = 0;
    this.#kept--;
  }

  /** FUSE_INTERRUPT: the request with this number ends with EINTR if it waits, or if what it waits for can be interrupted. */
  interrupt(uniqueLow: number, uniqueHigh: number): void {
    this.fs.interrupt(uniqueLow, uniqueHigh);
    if (this.#kept === 0) return;
    for (let job = 0; job < this.#slot.length; job++) {
      if (this.#uniqueLow[job] !== uniqueLow || this.#uniqueHigh[job] !== uniqueHigh || this.#slot[job] === 0) continue;
      this.#jobs.cancel(job);
      return;
    }
  }

  /** Replies carry these timeouts from now on (the options' until then). */
  setTimeouts(timeouts: Readonly<Timeouts>): void {
    this.#reply.setTimeouts(timeouts);
  }

  /** The device was reset or the guest is gone: ends the session. */
  reset(): void {
    this.endSession();
  }

  /** Goes on with what an earlier process has agreed on with the guest; the file system has its state already. */
  goOn(session: Session): void {
    this.session = session;
    this.fs.resume(session);
    this.onSession(session);
  }

  /** Answers a request with an error without looking at what it asks. Returns the bytes written. */
  refuse(chain: Chain, errno: number): number {
    const q = this.#request;
    const r = this.#reply;
    q.begin(chain);
    r.begin(chain, q.uniqueLow, q.uniqueHigh);
    return operationOf(q.opcode).noReply ? 0 : r.error(errno);
  }

  /** FUSE_INIT: ends the session there was and begins one. Returns 0 or -EPROTO. */
  beginSession(request: InitRequest): number {
    this.endSession();
    const session = negotiate(request, this.#options, this.events !== null, this.#warn);
    if (typeof session === 'number') return session;
    this.session = session;
    this.fs.init(session);
    this.onSession(session);
    if (session.fsnotify && this.events !== null) this.events.begin();
    this.onChange();
    return 0;
  }

  /** A session comes from another server (live migration), after {@link takeOver}; {@link resumeEvents} follows when its nodes are there. */
  resume(session: Session): void {
    this.endSession();
    this.session = session;
    this.fs.init(session);
    this.onSession(session);
  }

  /** The second half of {@link resume}. */
  resumeEvents(): void {
    if (this.session.fsnotify && this.events !== null) this.events.begin();
    this.onChange();
  }

  /** FUSE_DESTROY and other ends of a session; does nothing when there is none. */
  endSession(): void {
    const session = this.session;
    if (session === NO_SESSION) return;
    this.session = NO_SESSION;
    if (session.fsnotify && this.events !== null) this.events.end();
    this.fs.destroy();
    this.onChange();
  }

  /** Everything that the table says about a request. 0 or -errno. */
  #check(operation: Operation, q: Request, r: Reply): number {
    const session = this.session;
    if (session === NO_SESSION && operation !== INIT) return -Errno.EIO;
    if (r.room < operation.room && !operation.noReply) return -Errno.EINVAL;
    return q.decode(session.setxattrExt ? operation.extendedBytes : operation.bytes, operation.first, operation.second, operation.tail);
  }

  /** Writes the reply for a handler's or a job's result, and counts it. */
  #answer(operation: Operation, began: number, result: number): number {
    const r = this.#reply;
    const encode = operation.encode;
    let length: number;
    if (result < 0) length = operation.noReply ? 0 : r.error(-result);
    else if (encode !== null) length = r.ok(encode(r, result), false);
    else length = r.ok(result, operation.inPlace);
    // After the reply: its writing notes the time.
    this.#metrics.end(operation.slot, began, result < 0 ? -result : 0, result > 0 && (encode !== null || operation.inPlace) ? result : 0);
    return length;
  }

  /** Saves what {@link complete} needs; of the iovecs only those that a header and a small body go to. */
  #keep(operation: Operation, q: Request, began: number): void {
    const job = this.#jobs.lastJob;
    if (job < 0 || job >= this.#jobs.capacity) throw new RangeError(`PENDING with job ${job} of ${this.#jobs.capacity}`);
    this.pendingJob = job;
    const chain = this.chain;
    const u32 = arena.u32;
    const to = this.#savedIov(job) >> 2;
    let count = 0;
    let bytes = 0;
    for (let i = 0; i < chain.writableCount && bytes < LATE_REPLY_BYTES; i++) {
      const from = (chain.writableIov + i * IOVEC_BYTES) >> 2;
      const length = (u32[from + 2] as number) + (u32[from + 3] as number) * 4294967296;
      if (length === 0) continue;
      for (let k = 0; k < 4; k++) u32[to + count * 4 + k] = u32[from + k] as number;
      bytes += length;
      count++;
    }
    this.#iovCount[job] = count;
    this.#room[job] = chain.writableBytes;
    this.#uniqueLow[job] = q.uniqueLow;
    this.#uniqueHigh[job] = q.uniqueHigh;
    this.#slot[job] = operation.slot;
    this.#kept++;
    this.#began[job] = began;
  }

  #savedIov(job: number): number {
    const block = Math.floor(job / BLOCK);
    let at = this.#iovBlocks[block];
    if (at === undefined) {
      at = arenaAlloc(BLOCK * LATE_IOV_BYTES);
      this.#iovBlocks[block] = at;
    }
    return at + (job % BLOCK) * LATE_IOV_BYTES;
  }
}

/** A request as one line for a log: names from the guest are escaped, its numbers are decimal. */
export function describe(operation: Operation, request: Request): string {
  const unique = BigInt(request.uniqueHigh) * 4294967296n + BigInt(request.uniqueLow);
  let line = `${operation.name} unique ${unique} nodeid ${request.nodeid}`;
  if (operation === UNKNOWN) line += ` opcode ${request.opcode}`;
  if (operation.first !== 0) line += ` ${quoted(request.name, request.nameLength)}`;
  if (operation.second !== 0) line += ` ${quoted(request.name2, request.name2Length)}`;
  if (operation.tail === Tail.data) line += ` +${request.tailBytes} bytes`;
  return line;
}

function quoted(at: number, length: number): string {
  return JSON.stringify(arena.buffer.toString('latin1', at, at + Math.min(length, 256))).replace(
    /[^ -~]/g,
    (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, '0')}`,
  );
}
