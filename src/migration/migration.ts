/**
 * Live migration of the device's state (vhost-user, "Migrating back-end state"): it is written to, or read from, the descriptor
 * that the front end gives, in the turns of the daemon's loop, since the front end reads and writes the other end itself.
 */
import type { WaitLoop } from 'vhost-user-ts';
import { native } from 'vhost-user-ts/native';
import type { Share } from '../fs/passthrough/share.js';
import type { FuseServer } from '../fuse/server.js';
import type { Fsnotify } from '../watch/fsnotify.js';
import { Loader, type LoadOptions } from './load.js';
import { type Saved, type SaveOptions, save } from './save.js';
import { StateReader, StateWriter } from './stream.js';

export type { MigrationMode } from './save.js';

const EAGAIN = 11;
const EPERM = 1;
const POLLIN = 1;
const POLLOUT = 4;
const SAVE = 0;
/** Steps of one turn, so that signals are heard. */
const STEPS = 16;
/** How long CHECK_DEVICE_STATE waits for the rest of a state that is still on its way. */
const REST_MS = 10_000;

export interface MigrationOptions extends SaveOptions, Omit<LoadOptions, 'server'> {}

/** A transfer under way: {@link step} until it is over. */
interface Transfer {
  readonly reads: boolean;
  /** Goes on as far as it can without waiting. @returns false when it is over */
  step(): boolean;
  free(): void;
}

/** The device's half of a live migration. */
export class Migration {
  readonly #server: FuseServer;
  readonly #share: Share;
  readonly #fsnotify: Fsnotify | undefined;
  readonly #loop: WaitLoop;
  readonly #options: MigrationOptions;
  readonly #serverOptions: LoadOptions['server'];
  readonly #log: (level: 'info' | 'warn' | 'error', line: string) => void;

  #transfer: Transfer | undefined;
  #fd = -1;
  #tag = -1;
  /** How the last transfer ended; undefined while none has. */
  #ended: 'well' | 'badly' | undefined;

  /**
   * @param serverOptions what the daemon agrees on with a guest
   * @param log lines for people
   */
  constructor(
    server: FuseServer,
    share: Share,
    fsnotify: Fsnotify | undefined,
    loop: WaitLoop,
    options: MigrationOptions,
    serverOptions: LoadOptions['server'],
    log: (level: 'info' | 'warn' | 'error', line: string) => void,
  ) {
    this.#server = server;
    this.#share = share;
    this.#fsnotify = fsnotify;
    this.#loop = loop;
    this.#options = options;
    this.#serverOptions = serverOptions;
    this.#log = log;
  }

  /** Begins to write (`direction` 0) or to read (1) the state; `fd` is ours from now on. Rings stand still. */
  begin(direction: number, fd: number): boolean {
    this.abort();
    this.#ended = undefined;
    native.setNonBlocking(fd, 1);
    this.#fd = fd;
    this.#transfer = direction === SAVE ? this.#saving(fd) : this.#loading(fd);
    this.#tag = this.#loop.add(fd, false, () => this.#turn(), direction === SAVE ? POLLOUT : POLLIN);
    if (this.#tag >= 0) return true;
    // A regular file is always ready.
    if (this.#tag === -EPERM) while (this.#transfer !== undefined) this.#turn();
    else this.abort();
    return this.#ended === 'well';
  }

  /** CHECK_DEVICE_STATE: whether the transfer ended well. What was sent to us and is not read yet is read now. */
  check(): boolean {
    while (this.#transfer?.reads && native.poll(this.#fd, POLLIN, REST_MS) > 0) this.#turn();
    if (this.#transfer !== undefined) this.#fail(this.#transfer.reads ? 'the state does not end' : 'the state was not read to its end');
    return this.#ended === 'well';
  }

  /** The device is reset, or the front end is gone: what was under way is given up. */
  abort(): void {
    if (this.#transfer !== undefined) this.#finish('badly');
  }

  #turn(): void {
    for (let i = 0; i < STEPS && this.#transfer !== undefined; i++) if (!this.#transfer.step()) return;
  }

  #finish(how: 'well' | 'badly'): void {
    const transfer = this.#transfer;
    this.#transfer = undefined;
    this.#ended = how;
    if (this.#tag >= 0) this.#loop.remove(this.#tag);
    this.#tag = -1;
    native.close(this.#fd);
    this.#fd = -1;
    transfer?.free();
  }

  #fail(why: string): boolean {
    this.#log('error', `live migration: ${why}`);
    this.#finish('badly');
    return false;
  }

  #saving(fd: number): Transfer {
    const out = new StateWriter();
    const saved: Saved = { inodes: 0, handles: 0, watches: 0, locks: 0, lost: 0, reason: '' };
    const records = save(this.#server.session, this.#share, this.#fsnotify, this.#options, out, saved);
    let done = false;
    const step = (): boolean => {
      if (!done && !out.full) done = records.next().done === true;
      const n = out.length === 0 ? 0 : native.write(fd, out.start, out.length);
      if (n === -EAGAIN) return false;
      if (n < 0) return this.#fail(`the state cannot be written (errno ${-n})`);
      out.shift(n);
      if (!done || out.length > 0) return true;
      if (saved.lost > 0) this.#log('warn', `live migration: the destination cannot have ${saved.lost} inodes, as ${saved.reason}`);
      this.#log('info', `live migration: sent ${counts(saved)}`);
      this.#finish('well');
      return false;
    };
    return { reads: false, step, free: () => out.free() };
  }

  #loading(fd: number): Transfer {
    this.#server.reset();
    const input = new StateReader();
    const loader = new Loader(this.#server, this.#share, this.#fsnotify, { ...this.#options, server: this.#serverOptions });
    const step = (): boolean => {
      const { at, bytes } = input.room;
      const n = native.read(fd, at, bytes);
      if (n === -EAGAIN) return false;
      if (n < 0) return this.#fail(`the state cannot be read (errno ${-n})`);
      if (n === 0) {
        if (!loader.complete || input.rest) return this.#fail('the state is damaged (it ends too early)');
        if (loader.lost > 0) this.#log('warn', `live migration: ${loader.lost} inodes and open files are lost: ${loader.reason}`);
        if (loader.locksTaken > 0)
          this.#log(
            'info',
            `live migration: ${loader.locksTaken} locks are set when whoever has them, the source most likely, lets them go`,
          );
        this.#log('info', `live migration: took over ${counts(loader)}`);
        this.#finish('well');
        return false;
      }
      input.filled(n);
      for (let got = input.next(); got !== 0; got = input.next()) {
        const wrong = got < 0 ? 'the state is damaged (length)' : loader.record(input.type, input.body, input.bytes);
        if (wrong !== undefined) return this.#fail(wrong);
      }
      return true;
    };
    const free = (): void => {
      loader.close();
      input.free();
      // Half a session is none.
      if (this.#ended !== 'well') this.#server.reset();
    };
    return { reads: true, step, free };
  }
}

function counts({ inodes, handles, locks, watches }: Pick<Saved, 'inodes' | 'handles' | 'locks' | 'watches'>): string {
  return `${inodes} inodes, ${handles} open files, ${locks} locks, ${watches} watches`;
}
