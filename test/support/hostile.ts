/** What hostile tests have in common: a daemon with something beside its share, and what must be as before after each attempt. */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { join } from 'node:path';
import { Opcode } from '../../src/fuse/abi.js';
import { sanitized, TestDaemon } from './daemon.js';
import { type FuseClient, InitFlag2, type Pending, Struct } from './fuse-client.js';

/** Every name below a directory with what it is: type, mode, owner, size, times of change, content. */
export function snapshot(folder: string): Record<string, string> {
  const found: Record<string, string> = {};
  const visit = (path: string): void => {
    for (const name of fs.readdirSync(join(folder, path)).sort()) {
      const at = join(path, name);
      const st = fs.lstatSync(join(folder, at), { bigint: true });
      const content = st.isFile()
        ? fs.readFileSync(join(folder, at), 'latin1')
        : st.isSymbolicLink()
          ? fs.readlinkSync(join(folder, at))
          : '';
      found[at] = `${st.mode.toString(8)} ${st.uid}:${st.gid} ${st.nlink} ${st.size} ${st.mtimeNs} ${st.ctimeNs} ${content}`;
      if (st.isDirectory()) visit(at);
    }
  };
  visit('.');
  return found;
}

/** What a secret outside the share says; no reply may hold it. */
export const SECRET = 'nobody in the guest may read this';

/** A daemon with a share (`file`, `dir/inner`, `link`) and a directory beside it that nothing may read or change. */
export class Target implements AsyncDisposable {
  readonly daemon: TestDaemon;
  readonly outside: string;
  #before: Record<string, string>;

  private constructor(daemon: TestDaemon) {
    this.daemon = daemon;
    const { share } = daemon;
    fs.writeFileSync(join(share, 'file'), 'content');
    fs.mkdirSync(join(share, 'dir'));
    fs.writeFileSync(join(share, 'dir', 'inner'), 'inner');
    fs.symlinkSync('../outside/secret', join(share, 'link'));
    this.outside = join(daemon.folder, 'outside');
    fs.mkdirSync(join(this.outside, 'sub'), { recursive: true });
    fs.writeFileSync(join(this.outside, 'secret'), SECRET);
    this.#before = snapshot(this.outside);
  }

  static async start(options: readonly string[] = [], settings: Parameters<typeof TestDaemon.start>[1] = {}): Promise<Target> {
    return new Target(await TestDaemon.start(options, settings));
  }

  /** The test itself has changed something outside: that is how it must stay from now on. */
  settle(): void {
    this.#before = snapshot(this.outside);
  }

  assertNothingOutside(): void {
    assert.deepEqual(snapshot(this.outside), this.#before);
    const others = fs.readdirSync(this.daemon.folder).filter((name) => !['fs.sock', 'log', 'outside', 'share'].includes(name));
    assert.deepEqual(others, []);
  }

  /** Open descriptors, after `settle` was given its time. */
  async descriptors(expected?: number): Promise<number> {
    if (expected !== undefined) {
      // Jobs and closes that the last request left behind may still run.
      await this.daemon.until(() => this.daemon.descriptors().length === expected).catch(() => undefined);
    }
    return this.daemon.descriptors().length;
  }

  /** As many descriptors as there were must be open, soon. */
  async assertDescriptors(before: { fd: number; target: string }[]): Promise<void> {
    const { daemon } = this;
    const more = () => daemon.descriptors().length > before.length;
    await daemon.until(() => !more()).catch(() => undefined);
    if (more()) assert.deepEqual(daemon.descriptors(), before);
  }

  /** Resident memory must not have grown by more than this many bytes since `before`. */
  assertMemory(before: number, growth = 24 << 20): void {
    const now = this.daemon.memory;
    assert.ok(sanitized || now < before + growth, `memory went from ${before >> 20} to ${now >> 20} MiB`);
  }

  warnings(): string[] {
    return this.daemon.lines.filter((line) => / (WARN|ERROR) /.test(line));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.assertNothingOutside();
    await this.daemon[Symbol.asyncDispose]();
  }
}

/** FUSE_INIT flags of a guest that hears of file events. */
export const EVENT_FLAGS2 = InitFlag2.HAS_FSNOTIFY;

/** The device goes on: a good request is answered on each of these request queues. */
export function assertServes(client: FuseClient, queues: readonly number[] = [0]): void {
  const before = client.requestQueue;
  for (const queue of queues) {
    client.requestQueue = queue;
    assert.equal(client.getattr(1).attr.mode & 0o170000, 0o040000);
  }
  client.requestQueue = before;
}

/** What a VMM does when the guest resets one queue: it stops, and starts anew. Chains in flight are forgotten. */
export function restartQueue(client: FuseClient, index: number): void {
  const { driver } = client;
  const queue = driver.queues[index] as (typeof driver.queues)[number];
  driver.frontend.getVringBase(index);
  client.dropInFlight(queue);
  queue.reset();
  driver.placeQueue(queue, 0);
  driver.frontend.setVringKick(index, queue.kickFd);
  driver.frontend.setVringEnable(index, true);
}

/** FSYNC of an open file: a job on another thread. */
export function submitFsync(client: FuseClient, nodeid: number, fh: number): Pending {
  return client.submit(Opcode.FSYNC, nodeid, [new Struct(16).u64(0, fh).bytes], 0);
}

/** Processor seconds that the daemon has used. */
export function cpuSeconds(daemon: TestDaemon): number {
  const fields = daemon
    .proc('stat')
    .replace(/^.*\) /s, '')
    .split(' ');
  return (Number(fields[11]) + Number(fields[12])) / 100;
}
