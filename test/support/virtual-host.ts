/**
 * For tests that run inside a virtual host (test/guest/virtual-host.test.ts): what they do to its clock and disks, and its sleep.
 * None of that may be done to the machine that the tests run on, so this cannot even be loaded there.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import * as fs from 'node:fs';
import { join } from 'node:path';
import { Feature, features } from 'vhost-user-ts';
import { FsnotifyRecord, NotifyCode } from '../../src/fuse/abi.js';
import { FS_ATTRIB, FS_CREATE, FS_DELETE, FS_EVENT_ON_CHILD, FS_MODIFY } from '../../src/watch/mask.js';
import type { TestDaemon } from './daemon.js';
import { type FuseClient, LINUX_INIT_FLAGS2 } from './fuse-client.js';
import { EVENT_FLAGS2 } from './hostile.js';
import { RESUMED, SUSPENDS } from './virtual-host-sleep.js';

if (!/User Mode Linux/.test(fs.readFileSync('/proc/cpuinfo', 'utf8'))) throw new Error('this is for a virtual host: make test-guest');

/** A file system with events for its guest, which waits long: a virtual host is slow. */
export function eventSession(daemon: TestDaemon): FuseClient {
  const client = daemon.session(
    { flags2: LINUX_INIT_FLAGS2 | EVENT_FLAGS2 },
    { features: ~features(Feature.LOG_ALL), queues: 3, timeout: 60_000 },
  );
  assert.ok(client.hasNotificationQueue);
  client.lendNotificationBuffers(16);
  return client;
}

export function watch(client: FuseClient, nodeid: number): void {
  client.fsnotify(nodeid, FS_CREATE | FS_DELETE | FS_MODIFY | FS_ATTRIB | FS_EVENT_ON_CHILD);
}

/** Another process makes a file in a directory that is watched: the guest hears of it. Its own changes would be echoes. */
export function makesEvent(client: FuseClient, directory: string, name: string): void {
  execFileSync('touch', [join(directory, name)]);
  hears(client, name);
}

/** Waits until an event names this file. */
export function hears(client: FuseClient, name: string): void {
  const heard: string[] = [];
  for (const end = performance.now() + 60_000; performance.now() < end; ) {
    for (const { error, body } of client.takeNotifications(500)) {
      if (error !== NotifyCode.FSNOTIFY) continue;
      for (let at = 0; at < body.length; at += body.readUInt32LE(at + FsnotifyRecord.reclen)) {
        const length = body.readUInt32LE(at + FsnotifyRecord.namelen);
        heard.push(body.toString('utf8', at + FsnotifyRecord.name, at + FsnotifyRecord.name + length));
      }
    }
    if (heard.includes(name)) return;
  }
  assert.fail(`no event of ${name}, only of ${heard}`);
}

/** A process of the host that holds a lock by flock(2) until it is told to go, or for as long as it is used. */
export class LockHolder implements Disposable {
  readonly #process: ChildProcess;

  private constructor(holder: ChildProcess) {
    this.#process = holder;
  }

  static async start(path: string): Promise<LockHolder> {
    const holder = spawn('flock', [path, 'sh', '-c', 'echo held; read -r _'], { stdio: ['pipe', 'pipe', 'inherit'] });
    await once(holder.stdout, 'data');
    return new LockHolder(holder);
  }

  async release(): Promise<void> {
    const ended = once(this.#process, 'exit');
    this.#process.stdin?.end();
    await ended;
  }

  [Symbol.dispose](): void {
    this.#process.stdin?.end();
  }
}

// --- the clock ---

/** Sets CLOCK_REALTIME, in seconds since 1970. */
export function setClock(seconds: number): void {
  execFileSync('date', ['-u', '-s', `@${seconds}`], { stdio: ['ignore', 'ignore', 'inherit'] });
}

// --- sleep ---

const suspended = () => Number(fs.readFileSync('/sys/power/suspend_stats/success', 'utf8'));

/**
 * Suspends until somebody outside wakes the virtual host, who is told by lines on its console. Resolves when it goes on; meanwhile
 * this process may go on, too, until it is frozen.
 * @param state `freeze`: to idle. `mem`: to RAM, with devices and timers suspended as well, from which User Mode Linux comes back at once.
 * @param ahead seconds that the clock is found ahead by then, as after a long sleep
 */
export async function suspend(state: 'freeze' | 'mem', ahead: number): Promise<void> {
  const before = suspended();
  for (let tries = 0; ; tries++) {
    // Level 2, that it comes through `quiet`.
    fs.writeFileSync('/dev/kmsg', `<2>${SUSPENDS}`);
    const command = `echo ${state} >/sys/power/state && date -s @$(($(date +%s) + ${ahead}))`;
    const [status] = await once(spawn('sh', ['-c', command], { stdio: 'ignore' }), 'exit');
    fs.writeFileSync('/dev/kmsg', `<2>${RESUMED}`);
    if (status === 0) break;
    // Woken before it slept.
    assert.ok(tries < 5, 'this virtual host does not suspend');
  }
  assert.equal(suspended(), before + 1);
}

// --- disks ---

/** Runs a program, which must succeed. */
function run(program: string, ...args: string[]): string {
  // No udev waits for device mapper's devices here.
  return execFileSync(program, args, { encoding: 'utf8', env: { ...process.env, DM_DISABLE_UDEV: '1' } }).trim();
}

/** A file in memory as a disk, by way of device mapper, with ext4 on it. */
export class Disk implements Disposable {
  readonly device: string;
  readonly #name: string;
  readonly #loop: string;
  readonly #table: string;
  readonly #sectors: string;
  #at: string | undefined;

  constructor(image: string, name: string, ...mkfs: string[]) {
    run('truncate', '-s', '32M', image);
    this.#name = name;
    this.#loop = run('losetup', '-f', '--show', image);
    this.#sectors = run('blockdev', '--getsz', this.#loop);
    this.#table = `0 ${this.#sectors} linear ${this.#loop} 0`;
    run('dmsetup', 'create', name, '--table', this.#table);
    this.device = `/dev/mapper/${name}`;
    run('mkfs.ext4', '-q', '-b', '4096', '-m', '0', '-E', 'nodiscard', ...mkfs, this.device);
  }

  mount(at: string, options = 'defaults'): void {
    fs.mkdirSync(at, { recursive: true });
    run('mount', '-o', options, this.device, at);
    this.#at = at;
  }

  unmount(...options: string[]): void {
    if (this.#at !== undefined) run('umount', ...options, this.#at);
    this.#at = undefined;
  }

  /** From now on each read and write of it fails, until `works` again. What was cached of files is not: that would be read still. */
  set works(works: boolean) {
    if (!works) fs.writeFileSync('/proc/sys/vm/drop_caches', '3');
    run('dmsetup', 'suspend', '--nolockfs', '--noflush', this.#name);
    run('dmsetup', 'load', this.#name, '--table', works ? this.#table : `0 ${this.#sectors} error`);
    run('dmsetup', 'resume', this.#name);
  }

  /** What e2fsck has to say, after it has put right what it could. */
  check(): string {
    try {
      return run('e2fsck', '-f', '-y', this.device);
    } catch (error) {
      const { status, stdout } = error as { status: number; stdout: string };
      assert.ok(status < 4, stdout); // 1: errors were corrected
      return stdout;
    }
  }

  [Symbol.dispose](): void {
    this.unmount('-l');
    // A lazy unmount may take a moment.
    run('dmsetup', 'remove', '--retry', this.#name);
    run('losetup', '-d', this.#loop);
  }
}
