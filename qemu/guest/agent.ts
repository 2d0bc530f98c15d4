/**
 * The host's end of the channel to `agent.c`: runs commands in a guest and carries their input and output.
 * The frames are described there; keep the two alike.
 */
import { EventEmitter } from 'node:events';
import { constants } from 'node:os';
import type { Duplex } from 'node:stream';

const FRAME_MAX = 32768;
const CHANNEL_WINDOW = 3072;
const HEADER = 8;
const EXEC = 1;
const STDIN = 2;
const KILL = 3;
const RESIZE = 4;
const POWER = 5;
const STDOUT = 65; // 66 is stderr
const EXIT = 67;
const STDIN_TAKEN = 68;
const CREDIT = 69;
const FLAG_PTY = 1;

/** Something is wrong with the guest or its daemon, not with a command in it. The message is one line for a person. */
export class GuestError extends Error {
  override name = 'GuestError';
}

/** How a command is run; everything has a default. */
export interface CommandOptions {
  /** Directory it starts in; `/` by default. */
  cwd?: string;
  /** Added to PATH, HOME, USER, LANG and TMPDIR. */
  env?: Record<string, string>;
  /** User and group id it runs as, without supplementary groups; root by default. */
  uid?: number;
  gid?: number;
  /** Gives it a terminal of this size for all three streams; its stderr then comes as stdout. */
  pty?: { rows: number; columns: number };
  /** false: no `line` events and no `waitForLine`, for much output. */
  lines?: boolean;
}

/** How a command ended: the status as a shell gives it (128 + n after signal n), and the signal, if one ended it. */
export interface CommandEnd {
  status: number;
  signal?: NodeJS.Signals;
}

/** A line of output and where it came from. */
export interface OutputLine {
  stream: 'stdout' | 'stderr';
  text: string;
}

interface CommandEvents {
  stdout: [data: Buffer];
  stderr: [data: Buffer];
  line: [line: OutputLine];
  end: [end: CommandEnd];
}

/**
 * A command running in the guest. Events: `stdout` and `stderr` with bytes, `line` with each complete {@link OutputLine},
 * `end` with the {@link CommandEnd}.
 */
export class Command extends EventEmitter<CommandEvents> {
  /** Resolves when it has ended and all its output has been delivered; rejects with a GuestError when the guest dies. */
  readonly ended: Promise<CommandEnd>;
  /** Lines that no `waitForLine` has returned yet, the last 10 000. */
  readonly lines: OutputLine[] = [];
  #partial = { stdout: '', stderr: '' };
  #decoders = { stdout: new TextDecoder(), stderr: new TextDecoder() };
  #input: Buffer[] = [];
  #inputWaits = false;
  #drained: (() => void)[] = [];
  #done = false;
  readonly #id: number;
  readonly #splits: boolean;
  readonly #send: (type: number, id: number, payload?: Buffer) => void;
  #settle!: { resolve: (end: CommandEnd) => void; reject: (error: Error) => void };

  /** @internal */
  constructor(id: number, splits: boolean, send: (type: number, id: number, payload?: Buffer) => void) {
    super();
    this.#id = id;
    this.#splits = splits;
    this.#send = send;
    this.ended = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    this.ended.catch(() => {}); // whoever cares awaits it
  }

  /** Writes to its stdin; resolves when the guest is ready for more. Nothing happens after it has ended. */
  write(data: Buffer | string): Promise<void> {
    const bytes = Buffer.from(data);
    for (let at = 0; at < bytes.length; at += FRAME_MAX) this.#input.push(bytes.subarray(at, at + FRAME_MAX));
    this.#feed();
    return new Promise((resolve) => {
      this.#drained.push(resolve);
      if (!this.#inputWaits) this.#release();
    });
  }

  /** End of its stdin (on a terminal: end of file typed). */
  endInput(): void {
    this.#input.push(Buffer.alloc(0));
    this.#feed();
  }

  /** Sends a signal to it and to the processes of its group. */
  kill(signal: NodeJS.Signals = 'SIGTERM'): void {
    if (!this.#done) this.#send(KILL, this.#id, words(constants.signals[signal]));
  }

  /** The terminal's new size. */
  resize(rows: number, columns: number): void {
    if (!this.#done) this.#send(RESIZE, this.#id, words(rows, columns));
  }

  /**
   * The first line, of those so far or to come, that contains or matches `pattern`; it is taken out of `lines`.
   * Rejects after `timeoutMs` (10 s), and when the command ends without it.
   */
  waitForLine(pattern: string | RegExp, { timeoutMs = 10_000 } = {}): Promise<OutputLine> {
    return new Promise((resolve, reject) => {
      const look = (): boolean => {
        const at = this.lines.findIndex(({ text }) => (typeof pattern === 'string' ? text.includes(pattern) : pattern.test(text)));
        const line = this.lines[at];
        if (!line) return false;
        this.lines.splice(at, 1);
        stop();
        resolve(line);
        return true;
      };
      const fail = (why: string): void => {
        stop();
        const seen = this.lines.slice(-5).map((line) => JSON.stringify(line.text));
        reject(new GuestError(`no line with ${pattern} ${why}; lines so far: ${seen.join(' ') || 'none'}`));
      };
      const timer = setTimeout(() => fail(`within ${timeoutMs / 1000} s`), timeoutMs);
      const stop = (): void => {
        clearTimeout(timer);
        this.off('line', look);
      };
      this.on('line', look);
      if (look()) return;
      this.ended.then(
        () => fail('before the command ended'),
        (error: Error) => fail(`before: ${error.message}`),
      );
    });
  }

  #feed(): void {
    if (this.#inputWaits || this.#done) return;
    const next = this.#input.shift();
    if (!next) {
      this.#release();
      return;
    }
    this.#send(STDIN, this.#id, next);
    this.#inputWaits = next.length > 0;
  }

  #release(): void {
    for (const resolve of this.#drained.splice(0)) resolve();
  }

  /** @internal */
  receive(type: number, payload: Buffer): void {
    if (type === STDIN_TAKEN) {
      this.#inputWaits = false;
      this.#feed();
    } else if (type === EXIT) {
      const wait = payload.readUInt32LE();
      const number = wait & 0x7f;
      const signal = Object.entries(constants.signals).find(([, value]) => value === number)?.[0];
      const end: CommandEnd = { status: number ? 128 + number : (wait >> 8) & 0xff };
      if (number && signal) end.signal = signal as NodeJS.Signals;
      this.#finish();
      this.#settle.resolve(end);
      this.emit('end', end);
    } else {
      const stream = type === STDOUT ? 'stdout' : 'stderr';
      this.emit(stream, payload);
      if (this.#splits) this.#split(stream, this.#decoders[stream].decode(payload, { stream: true }));
    }
  }

  /** @internal */
  fail(error: GuestError): void {
    if (this.#done) return;
    this.#finish();
    this.#settle.reject(error);
  }

  #finish(): void {
    this.#done = true;
    for (const stream of ['stdout', 'stderr'] as const) if (this.#partial[stream]) this.#split(stream, '\n');
    this.#release();
  }

  #split(stream: OutputLine['stream'], text: string): void {
    const parts = (this.#partial[stream] + text).split('\n');
    this.#partial[stream] = parts.pop() ?? '';
    for (const part of parts) {
      const line = { stream, text: part };
      this.lines.push(line);
      if (this.lines.length > 10_000) this.lines.shift();
      this.emit('line', line);
    }
  }
}

/** Commands over one channel. The guest calls in when it is up, and again after each restart. */
export class Agent {
  #stream: Duplex;
  readonly #hello: Buffer;
  readonly #commands = new Map<number, Command>();
  readonly #environment: Record<string, string>;
  #nextId = 1;
  #received: Buffer = Buffer.alloc(0);
  readonly #outgoing: Buffer[] = [];
  #unread = 0;
  #connected = false;
  #waiting: { resolve: () => void; reject: (error: Error) => void }[] = [];
  #failure: GuestError | undefined;

  constructor(stream: Duplex, nonce: string, environment: Record<string, string>) {
    this.#stream = stream;
    this.#hello = Buffer.from(nonce, 'latin1').map((byte) => byte | 0x80) as Buffer;
    this.#environment = environment;
    this.#listen(stream);
    stream.on('error', () => {}); // the guest's end is reported by whoever runs it
  }

  #listen(stream: Duplex): void {
    this.#stream = stream;
    stream.removeAllListeners('data');
    stream.on('data', (data: Buffer) => this.#take(data));
  }

  /** The guest has moved to the machine that `other` is for (live migration): each gets the other's channel. */
  exchange(other: Agent): void {
    const stream = this.#stream;
    this.#listen(other.#stream);
    other.#listen(stream);
  }

  /** Resolves at the guest's next call (at once, if it is connected and has not been told to expect a restart). */
  connected(): Promise<void> {
    if (this.#failure) return Promise.reject(this.#failure);
    if (this.#connected) return Promise.resolve();
    return new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }));
  }

  /** Runs `command` with the guest's /bin/sh. */
  spawn(command: string, options: CommandOptions = {}): Command {
    if (this.#failure) throw this.#failure;
    if (!this.#connected) throw new GuestError('the guest is not up');
    while (this.#commands.has(this.#nextId)) this.#nextId = (this.#nextId % 0xffff) + 1;
    const id = this.#nextId;
    this.#nextId = (id % 0xffff) + 1;

    const env = Object.entries({ ...this.#environment, ...options.env }).map(([name, value]) => `${name}=${value}`);
    const payload = Buffer.concat([
      words(
        options.pty ? FLAG_PTY : 0,
        options.uid ?? 0,
        options.gid ?? options.uid ?? 0,
        options.pty?.rows ?? 0,
        options.pty?.columns ?? 0,
      ),
      Buffer.from([options.cwd ?? '/', command, ...env].map((text) => `${text}\0`).join('')),
    ]);
    if (payload.length > FRAME_MAX) throw new GuestError(`a command may have ${FRAME_MAX} bytes; put longer ones in a file`);
    const running = new Command(id, options.lines ?? true, this.#send);
    this.#commands.set(id, running);
    this.#send(EXEC, id, payload);
    return running;
  }

  /** Turns the guest off, or restarts it, without unmounting anything. */
  power(action: 'off' | 'restart'): void {
    this.#send(POWER, 0, words(action === 'restart' ? 1 : 0));
  }

  /** The guest is about to restart: what runs in it is lost, and `connected` waits for its next call. */
  expectRestart(): void {
    this.#connected = false;
    this.#drop(new GuestError('the guest was restarted'));
  }

  /** The guest is gone for good. */
  fail(error: GuestError): void {
    if (this.#failure) return;
    this.#failure = error;
    this.#connected = false;
    this.#drop(error);
    for (const { reject } of this.#waiting.splice(0)) reject(error);
  }

  /** Stops reading: the guest's output then waits in the guest. */
  pause(): void {
    this.#stream.pause();
  }

  resume(): void {
    this.#stream.resume();
  }

  #drop(error: GuestError): void {
    const commands = [...this.#commands.values()];
    this.#commands.clear();
    for (const command of commands) command.fail(error);
  }

  #send = (type: number, id: number, payload: Buffer = Buffer.alloc(0)): void => {
    const header = Buffer.alloc(HEADER);
    header.writeUInt32LE(payload.length, 0);
    header.writeUInt16LE(id, 4);
    header.writeUInt8(type, 6);
    this.#outgoing.push(header, payload);
    this.#write();
  };

  #write(): void {
    while (this.#outgoing[0] && this.#unread < CHANNEL_WINDOW && !this.#stream.destroyed) {
      const next = this.#outgoing[0];
      const part = next.subarray(0, CHANNEL_WINDOW - this.#unread);
      if (part.length === next.length) this.#outgoing.shift();
      else this.#outgoing[0] = next.subarray(part.length);
      this.#unread += part.length;
      this.#stream.write(part);
    }
  }

  #take(data: Buffer): void {
    this.#received = this.#received.length ? Buffer.concat([this.#received, data]) : data;
    const hello = this.#received.indexOf(this.#hello);
    if (hello < 0) {
      this.#frames();
      return;
    }
    // The guest (re)started; a frame that the old one did not finish lies before this.
    const rest = this.#received.subarray(hello + this.#hello.length);
    this.#received = this.#received.subarray(0, hello);
    this.#frames();
    this.#drop(new GuestError('the guest restarted'));
    this.#outgoing.length = 0;
    this.#unread = 0;
    this.#connected = true;
    this.#received = rest;
    for (const { resolve } of this.#waiting.splice(0)) resolve();
    this.#frames();
  }

  #frames(): void {
    if (!this.#connected) return;
    while (this.#received.length >= HEADER) {
      const length = this.#received.readUInt32LE(0);
      if (this.#received.length < HEADER + length) return;
      const id = this.#received.readUInt16LE(4);
      const type = this.#received.readUInt8(6);
      const payload = this.#received.subarray(HEADER, HEADER + length);
      this.#received = this.#received.subarray(HEADER + length);
      if (type === CREDIT) {
        this.#unread -= payload.readUInt32LE();
        this.#write();
        continue;
      }
      const command = this.#commands.get(id);
      if (type === EXIT) this.#commands.delete(id);
      command?.receive(type, payload);
    }
  }
}

function words(...values: number[]): Buffer {
  const bytes = Buffer.alloc(4 * values.length);
  values.forEach((value, index) => {
    bytes.writeUInt32LE(value >>> 0, 4 * index);
  });
  return bytes;
}
