/**
 * The log: one line an event, written at once.
 *
 * The device runs on the main thread and sleeps in native calls, so the event loop may not turn for hours: every line is written
 * synchronously by the thread that has something to say, and nothing here uses timers. pino makes the records; it is loaded with
 * the first line, because loading it takes 15 ms that the start does not have.
 *
 * Whatever a line contains stays on that line: control characters and the like are escaped in messages and values alike. Bytes
 * that a guest chose (names, link targets) go through {@link escapeBytes}, which shows every byte.
 */
import { isUtf8 } from 'node:buffer';
import { closeSync, writeSync } from 'node:fs';
import { createRequire } from 'node:module';
import type { Logger as Pino } from 'pino';
import { native } from 'vhost-user-ts/native';

export type Level = 'error' | 'warn' | 'info' | 'debug' | 'trace';
export type LogLevel = Level | 'off';

/** human: time, level, message and values; bare: the same without time and level, which the system log has itself; json: pino's records. */
export type LogFormat = 'human' | 'bare' | 'json';

/** What belongs to a line beside its message. */
export type Fields = Readonly<Record<string, string | number | bigint | boolean | null | undefined>>;

/** Writes one finished line (without its newline). */
export type Sink = (line: string, level: Level) => void;

export interface LogOptions {
  readonly level: LogLevel;
  /** Default: human. */
  readonly format?: LogFormat;
  /** Default: standard error. */
  readonly sink?: Sink;
  /** What json lines name: in a pid namespace our own number means nothing to anybody else. Default: our own. */
  readonly pid?: number;
}

const RANK: Readonly<Record<LogLevel, number>> = { off: 0, error: 1, warn: 2, info: 3, debug: 4, trace: 5 };

/** A kind of line that may come too often: lines written in this window, and lines not written. */
interface Limit {
  since: number;
  written: number;
  suppressed: number;
  /** When {@link Log.flushSuppressed} told of it last. */
  told: number;
}

const LIMIT_LINES = 10;
const LIMIT_WINDOW_MS = 60_000;
/** A session can end as soon as it began: what was suppressed is told so often and not with each of its ends. */
const TELL_EVERY_MS = LIMIT_WINDOW_MS / LIMIT_LINES;
/** Kinds counted one by one; should there be more, the others share one count, so that nothing grows without bound. */
const LIMIT_KINDS = 256;
const OTHER_KINDS = 'other';

export class Log {
  #level: LogLevel;
  /** The level to come back to from debug and trace; see cycleLevel. */
  #base: LogLevel;
  #rank: number;
  #format: LogFormat;
  #sink: Sink;
  #pid: number;
  #pino: Pino | undefined;
  readonly #limits = new Map<string, Limit>();

  constructor(options: LogOptions) {
    this.#level = this.#base = options.level;
    this.#rank = RANK[options.level];
    this.#format = options.format ?? 'human';
    this.#sink = options.sink ?? stderrSink;
    this.#pid = options.pid ?? process.pid;
  }

  get level(): LogLevel {
    return this.#level;
  }

  /** Takes other options from now on: the daemon's log exists before its command line is read. */
  configure(options: LogOptions): void {
    this.#format = options.format ?? 'human';
    this.#sink = options.sink ?? stderrSink;
    this.#pid = options.pid ?? process.pid;
    this.#pino = undefined;
    this.#base = options.level;
    this.setLevel(options.level);
  }

  setLevel(level: LogLevel): void {
    this.#level = level;
    this.#rank = RANK[level];
  }

  /** The next level, for SIGUSR1: the configured one, debug, trace, and around. Returns it; says so in the log, whatever the level. */
  cycleLevel(): LogLevel {
    const levels = [...new Set<LogLevel>([this.#base, 'debug', 'trace'])];
    const next = levels[(levels.indexOf(this.#level) + 1) % levels.length] as LogLevel;
    this.setLevel(next);
    this.#write('info', `log level is now ${next}`);
    return next;
  }

  /** Whether lines of this level are written: asked before an expensive message is put together. */
  enabled(level: Level): boolean {
    return RANK[level] <= this.#rank;
  }

  error(message: string, fields?: Fields): void {
    if (this.#rank >= RANK.error) this.#write('error', message, fields);
  }

  warn(message: string, fields?: Fields): void {
    if (this.#rank >= RANK.warn) this.#write('warn', message, fields);
  }

  info(message: string, fields?: Fields): void {
    if (this.#rank >= RANK.info) this.#write('info', message, fields);
  }

  debug(message: string, fields?: Fields): void {
    if (this.#rank >= RANK.debug) this.#write('debug', message, fields);
  }

  trace(message: string, fields?: Fields): void {
    if (this.#rank >= RANK.trace) this.#write('trace', message, fields);
  }

  /**
   * A line of a kind that a guest can cause at will: of each kind ten a minute are written and the others counted. The count
   * appears with the next line of the kind that is written, or with {@link flushSuppressed}.
   * @param kind a constant of the caller, nothing that a guest can vary.
   * @param most another number than ten
   */
  limited(level: Level, kind: string, message: string, fields?: Fields, now: number = performance.now(), most: number = LIMIT_LINES): void {
    if (!this.enabled(level)) return;
    const limit = this.#limitOf(kind, now);
    if (now - limit.since >= LIMIT_WINDOW_MS) {
      limit.since = now;
      limit.written = 0;
    }
    if (limit.written >= most) {
      limit.suppressed++;
      return;
    }
    limit.written++;
    const suppressed = limit.suppressed;
    limit.suppressed = 0;
    this.#write(level, message, suppressed > 0 ? { ...fields, suppressed } : fields);
  }

  #limitOf(kind: string, now: number): Limit {
    const key = this.#limits.has(kind) || this.#limits.size < LIMIT_KINDS ? kind : OTHER_KINDS;
    let limit = this.#limits.get(key);
    if (limit === undefined) {
      limit = { since: now, written: 0, suppressed: 0, told: Number.NEGATIVE_INFINITY };
      this.#limits.set(key, limit);
    }
    return limit;
  }

  /** Says how many lines were suppressed and not yet told: at the end of a session (unless that was told just now) and of the process. */
  flushSuppressed(final = false, now: number = performance.now()): void {
    for (const [kind, limit] of this.#limits) {
      if (limit.suppressed === 0 || (!final && now - limit.told < TELL_EVERY_MS)) continue;
      limit.told = now;
      const suppressed = limit.suppressed;
      limit.suppressed = 0;
      this.warn('lines of one kind were suppressed', { kind, suppressed });
    }
  }

  /** Loads what the first line would. */
  load(): void {
    this.#pino ??= this.#load();
  }

  #write(level: Level, message: string, fields?: Fields): void {
    this.#pino ??= this.#load();
    this.#pino[level](fields ?? {}, message);
  }

  #load(): Pino {
    const pino = createRequire(import.meta.url)('pino') as typeof import('pino');
    const format = this.#format;
    const sink = this.#sink;
    // The level is checked above, without loading pino for a line that is not written.
    return pino.pino(
      {
        level: 'trace',
        base: { pid: this.#pid },
        timestamp: pino.stdTimeFunctions.isoTime,
        formatters: { level: (label) => ({ level: label }) },
      },
      {
        write(record: string): void {
          const parsed = JSON.parse(record) as Entry;
          sink(format === 'json' ? jsonLine(record) : textLine(parsed, format === 'human'), parsed.level);
        },
      },
    );
  }
}

/** A record as pino makes it. */
interface Entry {
  level: Level;
  time: string;
  pid: number;
  msg: string;
  [field: string]: unknown;
}

/** JSON itself escapes only C0; what it lets stand may be an escape sequence to a terminal, or a new line to a collector of logs. */
function jsonLine(record: string): string {
  return record.trimEnd().replace(UNSAFE, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`);
}

/** `2026-01-31T12:00:00.000Z WARN  message key=value key="two words"` */
function textLine({ level, time, pid: _, msg, ...fields }: Entry, full: boolean): string {
  let line = full ? `${time} ${level.toUpperCase().padEnd(5)} ${escapeText(msg)}` : escapeText(msg);
  for (const [key, value] of Object.entries(fields)) line += ` ${key}=${quote(escapeText(String(value)))}`;
  return line;
}

function quote(text: string): string {
  return /^[^\s"=]+$/.test(text) ? text : `"${text.replaceAll('"', '\\"')}"`;
}

// --- escaping ---

/**
 * What could break a line or rule a terminal: control characters (C0, DEL, C1), line and paragraph separators, marks that turn
 * the direction of text, and surrogates without their other half.
 */
const UNSAFE = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\p{Cs}]/gu;
const UNSAFE_OR_BACKSLASH = new RegExp(`${UNSAFE.source}|\\\\`, 'gu');
const SHORT: Readonly<Record<string, string>> = { '\n': '\\n', '\r': '\\r', '\t': '\\t', '\\': '\\\\' };

function escapeCharacter(character: string): string {
  const code = character.codePointAt(0) as number;
  return SHORT[character] ?? (code < 0x80 ? hex(code) : `\\u{${code.toString(16)}}`);
}

function hex(byte: number): string {
  return `\\x${byte.toString(16).padStart(2, '0')}`;
}

/** Text in which every character that could end the line or rule a terminal is shown as an escape. */
export function escapeText(text: string): string {
  return text.replace(UNSAFE, escapeCharacter);
}

/**
 * Bytes from a guest (a name, a link target) as text for a log: unsafe characters, backslashes and bytes that are no UTF-8 as
 * escapes, so that different bytes look different; cut after `max` bytes.
 */
export function escapeBytes(bytes: Uint8Array, max = 512): string {
  const view = Buffer.from(bytes.buffer, bytes.byteOffset, Math.min(bytes.length, max));
  const ellipsis = bytes.length > max ? '…' : '';
  if (isUtf8(view)) return view.toString().replace(UNSAFE_OR_BACKSLASH, escapeCharacter) + ellipsis;
  let text = '';
  for (let i = 0; i < view.length; ) {
    const end = characterEnd(view, i);
    text += end < 0 ? hex(view[i] as number) : view.toString('utf8', i, end).replace(UNSAFE_OR_BACKSLASH, escapeCharacter);
    i = end < 0 ? i + 1 : end;
  }
  return text + ellipsis;
}

/** Where the UTF-8 character at `start` ends, or -1 when there is none. */
function characterEnd(bytes: Buffer, start: number): number {
  const lead = bytes[start] as number;
  const end = start + (lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4);
  return end <= bytes.length && isUtf8(bytes.subarray(start, end)) ? end : -1;
}

// --- where lines go ---

/** Lines that could not be written because standard error took no more; told when it does again. */
let lost = 0;

/**
 * Writes to standard error. It may be a pipe that nobody reads or a terminal that is stopped: the line is then given up after a
 * moment, and the next ones at once until it takes some again.
 */
export const stderrSink: Sink = (line) => {
  const text = lost > 0 ? `${lost} log lines were lost: standard error took no more\n${line}\n` : `${line}\n`;
  if (writeFully(2, Buffer.from(text), lost > 0 ? 0 : PATIENCE_MS)) lost = 0;
  else lost++;
};

const POLLOUT = 4;
const PATIENCE_MS = 20;
/** What a pipe that is ready takes without blocking (PIPE_BUF); whether the descriptor blocks is not ours to change, as others have it, too. */
const PIECE = 4096;

/** Writes all bytes to a descriptor. False when it took no more within `patience` ms; what cannot be written at all (a full disk, a reader that is gone) counts as written. */
function writeFully(fd: number, bytes: Buffer, patience: number): boolean {
  for (let done = 0; done < bytes.length; ) {
    if (native.poll(fd, POLLOUT, patience) === 0) return false;
    try {
      done += writeSync(fd, bytes, done, Math.min(PIECE, bytes.length - done));
    } catch (error) {
      return (error as NodeJS.ErrnoException).code !== 'EAGAIN';
    }
  }
  return true;
}

/** Facility "user" as virtiofsd has it, severities of syslog(3). */
const LOG_USER = 1 << 3;
const SEVERITY: Readonly<Record<Level, number>> = { error: 3, warn: 4, info: 6, debug: 7, trace: 7 };

/**
 * Writes to the system log: one datagram a line to /dev/log. Goes with the formats `bare` and `json`.
 * @param connect opens a datagram socket connected to the system log: a descriptor, or -errno. Called at once, and again when the
 *   log daemon was restarted.
 * @param pid what the lines name; in a pid namespace our own number means nothing to anybody else
 * @returns the sink, or -errno when there is no system log.
 */
export function syslogSink(ident: string, connect: () => number, pid: number = process.pid): Sink | number {
  let fd = connect();
  if (fd < 0) return fd;
  return (line, level) => {
    // Without a time, which is allowed: the log daemon puts its own.
    const bytes = Buffer.from(`<${LOG_USER | SEVERITY[level]}>${ident}[${pid}]: ${line}`);
    let sent = fd >= 0 ? sendDatagram(fd, bytes) : Sent.broken;
    if (sent === Sent.broken) {
      if (fd >= 0) closeSync(fd);
      fd = connect();
      if (fd >= 0) sent = sendDatagram(fd, bytes);
    }
    if (sent !== Sent.yes) stderrSink(line, level);
  };
}

const Sent = { yes: 0, full: 1, broken: 2 } as const;

function sendDatagram(fd: number, bytes: Buffer): number {
  try {
    writeSync(fd, bytes);
    return Sent.yes;
  } catch (error) {
    // The log daemon is slow: the socket, which cannot be made again in the sandbox, is as good as before.
    return (error as NodeJS.ErrnoException).code === 'EAGAIN' ? Sent.full : Sent.broken;
  }
}

/** The log of this thread. */
export const log = new Log({ level: 'info' });
