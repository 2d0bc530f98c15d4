/**
 * The real daemon (build/virtiofsd-ts) as a child process, for tests at its socket. Its log goes to a file: a test that talks to
 * it synchronously cannot empty a pipe meanwhile.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { closeSync, mkdirSync, mkdtempSync, openSync, readdirSync, readFileSync, readlinkSync, rmSync, statSync } from 'node:fs';
import { get } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Feature, features } from 'vhost-user-ts';
import { type ClientOptions, FuseClient } from './fuse-client.js';

/** The program; this file is compiled to build/js/test/support. */
export const PROGRAM_PATH = process.env['DAEMON'] ?? fileURLToPath(new URL('../../../virtiofsd-ts', import.meta.url));

/** VIRTIO_FS_F_NOTIFICATION is for tests of file events: with it queue 1 carries no requests. */
const PLAIN = ~features(0, Feature.LOG_ALL);

export interface End {
  status: number | null;
  signal: NodeJS.Signals | null;
}

export interface Settings {
  /** A directory to share instead of a fresh one in `folder`. */
  share?: string;
  /** Instead of --socket-path (for --fd: []). */
  listen?: string[];
  /** Descriptors that the daemon inherits as 3, 4... */
  inherit?: number[];
  /** A command that ends in running its arguments, and the pid stays: `unshare -m`, `strace -D`. */
  wrapper?: string[];
  env?: NodeJS.ProcessEnv;
  /** What `await using` wants of the end. */
  status?: number;
}

export class TestDaemon {
  /** Holds everything of this daemon: share, socket, log. Removed at the end. */
  readonly folder: string;
  readonly share: string;
  readonly socket: string;
  readonly process: ChildProcess;
  readonly ended: Promise<End>;
  end: End | undefined;
  /** Milliseconds from its start until its socket took connections. */
  ready = 0;
  readonly #clients = new Set<FuseClient>();
  readonly #status: number;
  readonly #sandboxed: boolean;
  #inside: number | undefined;

  private constructor(options: readonly string[], settings: Settings) {
    this.folder = mkdtempSync(join(tmpdir(), 'daemon-'));
    this.share = settings.share ?? join(this.folder, 'share');
    this.socket = join(this.folder, 'fs.sock');
    this.#status = settings.status ?? 0;
    this.#sandboxed = !(options.includes('--sandbox=none') && options.includes('--seccomp=none'));
    if (settings.share === undefined) mkdirSync(this.share);
    const log = openSync(join(this.folder, 'log'), 'w');
    const listen = settings.listen ?? ['--socket-path', this.socket];
    const command = [...(settings.wrapper ?? []), PROGRAM_PATH, '--shared-dir', this.share, ...listen, ...options];
    const [program, ...args] = command.map((word) => word.replaceAll('{folder}', this.folder));
    // The add-on may have changed this thread's working directory to one that means something else to a child.
    this.process = spawn(program as string, args, {
      cwd: '/',
      env: { ...process.env, ...settings.env },
      stdio: ['ignore', log, log, ...(settings.inherit ?? [])],
    });
    closeSync(log);
    this.ended = new Promise((done) => {
      this.process.on('exit', (status, signal) => {
        this.end = { status, signal };
        done(this.end);
      });
    });
  }

  /** Starts it and waits until it listens. In options and wrapper `{folder}` stands for its folder. */
  static async start(options: readonly string[] = [], settings: Settings = {}): Promise<TestDaemon> {
    const began = performance.now();
    const daemon = new TestDaemon(options, settings);
    if (settings.listen === undefined) {
      while (!listens(daemon.socket)) {
        if (daemon.end !== undefined || performance.now() - began > 20_000) {
          const text = daemon.log;
          daemon.process.kill('SIGKILL');
          rmSync(daemon.folder, { recursive: true, force: true });
          throw new Error(`the daemon does not listen: ${JSON.stringify(daemon.end)} ${text}`);
        }
        await sleep(1);
      }
      daemon.ready = performance.now() - began;
    }
    return daemon;
  }

  /** The process that was started, and gets the signals. */
  get pid(): number {
    return this.process.pid as number;
  }

  /** The process that serves: inside the sandbox, if there is one. */
  get inside(): number {
    if (this.#inside !== undefined && commandLine(this.#inside).length > 1) return this.#inside;
    for (const end = performance.now() + 10_000; performance.now() < end; Atomics.wait(pause, 0, 0, 1)) {
      const found = this.#sandboxed ? this.workers[0] : this.pid;
      if (found !== undefined && commandLine(found).some((word) => word.endsWith('/main.js'))) {
        this.#inside = found;
        return found;
      }
    }
    throw new Error(`no process inside the sandbox: ${this.log}`);
  }

  /** The launcher's processes around it. */
  get launchers(): number[] {
    return launchersOf(this.pid);
  }

  /** The workers that there are, and the processes that keep their descriptors. */
  get workers(): number[] {
    return workersOf(this.pid);
  }

  get keepers(): number[] {
    return familyOf(this.pid).filter((pid) => commandLine(pid).length <= 1 && !isLauncher(pid));
  }

  /** A front end that has started the device. */
  connect(options: ClientOptions = {}): FuseClient {
    const client = FuseClient.connect(this.socket, { features: PLAIN, ...options });
    this.#clients.add(client);
    return client;
  }

  /** A front end with a FUSE session. */
  session(init: Parameters<FuseClient['init']>[0] = {}, options: ClientOptions = {}): FuseClient {
    const client = this.connect(options);
    client.init(init);
    return client;
  }

  /** Closes a front end and waits until the daemon has seen that. */
  async disconnect(client: FuseClient): Promise<void> {
    const before = this.log.split('the client is gone').length;
    this.close(client);
    await this.until(() => this.end !== undefined || this.log.split('the client is gone').length > before);
  }

  close(client: FuseClient): void {
    if (this.#clients.delete(client)) client.close();
  }

  /** Everything that it wrote. */
  get log(): string {
    return readFileSync(join(this.folder, 'log'), 'utf8');
  }

  get lines(): string[] {
    return this.log.split('\n').slice(0, -1);
  }

  /** Waits for something that comes soon. */
  async until(condition: () => boolean, timeout = 10_000): Promise<void> {
    for (const end = performance.now() + timeout; !condition(); await sleep(2)) {
      if (performance.now() > end) assert.fail(`not within ${timeout} ms: ${condition}\n${this.log}`);
    }
  }

  /** A file of /proc/PID. */
  proc(name: string): string {
    return readFileSync(`/proc/${this.inside}/${name}`, 'utf8');
  }

  /** What each open descriptor leads to. */
  descriptors(): { fd: number; target: string }[] {
    return readdirSync(`/proc/${this.inside}/fd`).flatMap((fd) => {
      try {
        return [{ fd: Number(fd), target: readlinkSync(`/proc/${this.inside}/fd/${fd}`) }];
      } catch {
        return []; // closed meanwhile
      }
    });
  }

  /** Open flags of the descriptors that lead to `path`. */
  openFlags(path: string): number[] {
    const { dev, ino } = statSync(path);
    return this.descriptors()
      .filter(({ fd }) => {
        const found = statSync(`/proc/${this.inside}/fd/${fd}`, { throwIfNoEntry: false });
        return found?.dev === dev && found.ino === ino;
      })
      .map(({ fd }) => Number.parseInt(/^flags:\s+(\d+)/m.exec(this.proc(`fdinfo/${fd}`))?.[1] as string, 8));
  }

  /** Resident memory in bytes. */
  get memory(): number {
    return Number(/^VmRSS:\s+(\d+)/m.exec(this.proc('status'))?.[1]) * 1024;
  }

  get threads(): number {
    return readdirSync(`/proc/${this.inside}/task`).length;
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<End> {
    this.process.kill(signal);
    const late = setTimeout(() => this.process.kill('SIGKILL'), 10_000);
    const end = await this.ended;
    clearTimeout(late);
    return end;
  }

  /** Ends it; it must end well and have written nothing that a programming error would. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const client of [...this.#clients]) this.close(client);
    const end = this.end ?? (await this.stop());
    const text = this.log;
    rmSync(this.folder, { recursive: true, force: true });
    assert.deepEqual(end, { status: this.#status, signal: null }, text);
    assertNoStack(text);
  }
}

const pause = new Int32Array(new SharedArrayBuffer(4));

function commandLine(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0');
  } catch {
    return [];
  }
}

/** The launcher's processes, outermost first, of the daemon that was started as `pid`. */
export function launchersOf(pid: number): number[] {
  const found: number[] = [];
  for (let at: number | undefined = pid; at !== undefined; at = children(at).find(isLauncher)) if (isLauncher(at)) found.push(at);
  return found;
}

/** The workers of the daemon that was started as `pid`. */
export function workersOf(pid: number): number[] {
  return familyOf(pid).filter((child) => commandLine(child).some((word) => word.endsWith('/main.js')));
}

function familyOf(pid: number): number[] {
  const parent = launchersOf(pid).at(-1);
  return parent === undefined ? [] : children(parent);
}

function isLauncher(pid: number): boolean {
  return commandLine(pid)[0]?.endsWith('/virtiofsd-ts-sandbox') === true;
}

/** Those that have not ended. */
function children(pid: number): number[] {
  try {
    const pids = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(' ').filter(Boolean).map(Number);
    return pids.filter((child) => !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${child}/status`, 'utf8')));
  } catch {
    return []; // ended meanwhile
  }
}

/** No stack trace, whatever happened: those are for programming errors. */
export function assertNoStack(text: string): void {
  assert.doesNotMatch(text, /^\s+at .*[:(]|Error:|node:internal|FATAL|AddressSanitizer/m);
}

/** Runs the program to its end. */
export function runDaemon(args: readonly string[], input: { stdio?: (number | 'ignore' | 'pipe')[] } = {}) {
  const { status, signal, stdout, stderr } = spawnSync(PROGRAM_PATH, args, {
    cwd: '/',
    encoding: 'utf8',
    timeout: 20_000,
    stdio: input.stdio ?? ['ignore', 'pipe', 'pipe'],
  });
  assertNoStack(`${stdout}${stderr}`);
  return { status, signal, stdout, stderr };
}

/** Whether a Unix socket at this path listens; a trial connection would be the daemon's first client. */
export function listens(path: string): boolean {
  return readFileSync('/proc/net/unix', 'utf8')
    .split('\n')
    .some((line) => line.endsWith(` ${path}`) && (Number.parseInt(line.split(' ')[3] ?? '0', 16) & 0x10000) !== 0);
}

/** The numbers of a metrics server, by `name` or `name{label="value"}`. */
export function scrape(at: { socketPath: string } | { host: string; port: number }): Promise<Map<string, number>> {
  return new Promise((done, fail) => {
    get({ ...at, path: '/metrics', agent: false }, (response) => {
      let text = '';
      response.setEncoding('utf8');
      response.on('data', (part) => {
        text += part;
      });
      response.on('end', () => {
        const lines = text.split('\n').filter((line) => line !== '' && !line.startsWith('#'));
        done(new Map(lines.map((line) => [line.slice(0, line.lastIndexOf(' ')), Number(line.slice(line.lastIndexOf(' ') + 1))])));
      });
    }).on('error', fail);
  });
}

export const root = process.geteuid?.() === 0;
/** For tests that mount, change ids and the like. */
export const needsRoot = { skip: root ? false : 'needs root' };
/** Under the address sanitizer, what memory costs says nothing. */
export const sanitized = process.env['ASAN_OPTIONS'] !== undefined;
