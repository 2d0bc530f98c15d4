/** The same requests to the real program in its default sandbox, over its socket: it must not end, grow, or write a long log. */
import { type ChildProcess, spawn } from 'node:child_process';
import * as fs from 'node:fs';
import { Feature, features, VhostUserFrontend } from 'vhost-user-ts';
import { native } from 'vhost-user-ts/native';
import { MockDriver, MockMemory } from 'vhost-user-ts/testing';
import { PROGRAM_PATH } from '../support/daemon.js';
import { type Case, Finding, must, type Target } from './engine.js';
import { anySession, FuseGuest, type FuseHost, type FuseStep } from './fuse.js';
import type { Random } from './random.js';
import { FuzzShare } from './share.js';

const POLLIN = 1;
const SETUPS: readonly (readonly string[])[] = [
  ['--xattr'],
  ['--xattr', '--readonly'],
  ['--xattr', '--cache=notify', '--writeback', '--posix-acl', '--killpriv-v2'],
  ['--inode-file-handles=never', '--fsnotify=inotify', '--cache=always', '--thread-pool-size=0'],
];
/** How long a request may take, and the start. */
const PATIENCE_MS = 20_000;
/** Memory that a session may leave the daemon with: its tables have grown. */
const GROWTH = 96 << 20;
const LOG_BYTES = 1 << 20;

const pause = new Int32Array(new SharedArrayBuffer(4));

class Daemon implements FuseHost {
  readonly share = new FuzzShare();
  readonly memory = new MockMemory([{ guestAddress: 0, size: 8 << 20 }]);
  readonly events = true;
  readonly #process: ChildProcess;
  readonly #log: string;
  readonly #socket: string;
  #driver: MockDriver | undefined;
  #inside = 0;
  #fds = 0;
  #resident = 0;

  constructor(options: readonly string[]) {
    const { base, path } = this.share;
    this.#log = `${base}.log`;
    this.#socket = `${base}.sock`;
    const log = fs.openSync(this.#log, 'w');
    // The sanitizer is for this process's add-on: the sandbox has none of its files.
    const { LD_PRELOAD: _1, ASAN_OPTIONS: _2, VHOST_USER_TS_ADDON: _3, ...env } = process.env;
    this.#process = spawn(PROGRAM_PATH, ['--shared-dir', path, '--socket-path', this.#socket, ...options], {
      stdio: ['ignore', log, log],
      env,
    });
    fs.closeSync(log);
  }

  drive(): MockDriver {
    let frontend: VhostUserFrontend | undefined;
    for (const end = performance.now() + PATIENCE_MS; frontend === undefined; Atomics.wait(pause, 0, 0, 5)) {
      try {
        frontend = VhostUserFrontend.connect(this.#socket, { timeout: PATIENCE_MS });
      } catch (error) {
        if (performance.now() > end) throw new Finding(`the daemon does not listen: ${error}\n${this.#said()}`);
      }
    }
    this.#driver = new MockDriver(frontend, {
      queues: 2,
      queueSize: 64,
      memory: this.memory,
      features: ~features(0, Feature.LOG_ALL),
    }).start();
    this.#inside = innermost(this.#process.pid as number);
    return this.#driver;
  }

  kick(index: number): void {
    this.#driver?.queues[index]?.kick();
  }

  job(): boolean {
    const queues = this.#driver?.queues ?? [];
    const last = queues.at(-1);
    for (const end = performance.now() + PATIENCE_MS; ; ) {
      if (queues.some(({ ready }) => ready)) return true;
      if (last === undefined || performance.now() > end)
        throw new Finding(`no answer within ${PATIENCE_MS / 1000} s: ${this.#state()}\n${this.#said()}`);
      // The urgent queue has another descriptor: it is looked at every so often.
      if (native.poll(last.callFd, POLLIN, 2) > 0) native.eventfdRead(last.callFd);
      if (!fs.existsSync(`/proc/${this.#inside}/exe`)) throw new Finding(`the daemon has ended\n${this.#said()}`);
    }
  }

  turn(): void {
    for (const queue of this.#driver?.queues ?? []) if (queue.ready) return;
  }

  check(): void {
    const fds = fs.readdirSync(`/proc/${this.#inside}/fd`).length;
    const resident = Number(/^VmRSS:\s+(\d+)/m.exec(fs.readFileSync(`/proc/${this.#inside}/status`, 'utf8'))?.[1]) << 10;
    if (this.#fds === 0) {
      this.#fds = fds;
      this.#resident = resident;
    }
    must(fds < this.#fds + 32, () => `${fds} descriptors are open, after the first session ${this.#fds}`);
    must(
      resident < this.#resident + GROWTH,
      () => `${resident >> 20} MiB are resident, after the first session ${this.#resident >> 20} MiB`,
    );
    must(fs.statSync(this.#log).size < LOG_BYTES, () => `a long log:\n${this.#said()}`);
  }

  /** What the daemon's threads wait in, and what its rings hold. */
  #state(): string {
    const task = `/proc/${this.#inside}/task`;
    const waits = fs
      .readdirSync(task)
      .map((thread) => `${fs.readFileSync(`${task}/${thread}/comm`, 'utf8').trim()} ${fs.readFileSync(`${task}/${thread}/wchan`, 'utf8')}`);
    const rings = this.#driver?.queues.map((queue) => `queue ${queue.index}: ${queue.inFlight} in flight, avail event ${queue.availEvent}`);
    return [...waits, ...(rings ?? [])].join('; ');
  }

  /** The end of its log. */
  #said(): string {
    return fs.readFileSync(this.#log, 'utf8').slice(-2000);
  }

  close(): void {
    this.#driver?.frontend.close();
    this.#process.kill('SIGKILL');
    for (let i = 0; fs.existsSync(`/proc/${this.#inside}/exe`) && i < 1000; i++) Atomics.wait(pause, 0, 0, 1);
    this.share.close();
    for (const file of [this.#log, this.#socket]) fs.rmSync(file, { force: true });
  }
}

/** The process inside the sandbox: the launchers around it have one child each. */
function innermost(pid: number): number {
  for (;;) {
    const children = fs.readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(' ').map(Number);
    if (!children[0]) return pid;
    pid = children[0];
  }
}

export class DaemonTarget implements Target<FuseStep> {
  readonly name = 'daemon';
  readonly #guests: (FuseGuest | undefined)[] = [];

  generate(random: Random): Case<FuseStep> {
    const setup = random.below(SETUPS.length);
    const steps = anySession(random, !SETUPS[setup]?.includes('--readonly'));
    // Two processes: waiting for each reply would be most of the time.
    for (const step of steps) if (!('host' in step) && !random.oneIn(6)) step.later = 1;
    return { setup, steps };
  }

  run({ setup, steps }: Case<FuseStep>): number {
    const index = setup % SETUPS.length;
    const options = SETUPS[index] as readonly string[];
    let guest = this.#guests[index];
    if (guest === undefined) {
      guest = new FuseGuest(new Daemon(options));
      this.#guests[index] = guest;
    }
    const { share } = guest.host;
    const readonly = options.includes('--readonly');
    if (!readonly) share.refill();
    const before = readonly ? share.contents() : '';
    guest.requests = 0;
    try {
      guest.begin();
      guest.run(steps);
      guest.end();
      share.checkOutside();
      if (readonly) must(share.contents() === before, 'a read-only share has changed');
    } catch (error) {
      this.#guests[index] = undefined;
      guest.host.close();
      throw error;
    }
    return guest.requests;
  }

  close(): void {
    for (const guest of this.#guests) guest?.host.close();
    this.#guests.length = 0;
  }
}
