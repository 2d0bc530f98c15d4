/** Locks that guests share with each other and with the host: two daemons on one directory, and processes of the host. */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { InitFlag, Opcode } from '../../src/fuse/abi.js';
import { TestDaemon } from '../support/daemon.js';
import { errnoOf, type FuseClient, type FuseError, LINUX_INIT_FLAGS, lockIn, type Pending } from '../support/fuse-client.js';

const { EAGAIN, EBADF, EINTR, EINVAL, ENOLCK, ENOSYS } = constants.errno;
const O_RDWR = 2;
const READ = 0;
const WRITE = 1;
const UNLOCK = 2;
const FLOCK = 1;
const END = (1n << 63n) - 1n;

const share = mkdtempSync(join(tmpdir(), 'locks-'));
const processes = new Set<HostProcess>();
after(async () => {
  for (const process of processes) await process.end();
  rmSync(share, { recursive: true, force: true });
});
const OPTIONS = ['--posix-lock', '--flock'];

let files = 0;
/** A fresh file's path in the share. */
function fresh(): string {
  const name = `file${files++}`;
  writeFileSync(join(share, name), 'text');
  return name;
}

/** A guest that has a file open. */
class Opener {
  readonly client: FuseClient;
  readonly nodeid: number;
  readonly fh: number;
  constructor(client: FuseClient, name: string, flags = O_RDWR) {
    this.client = client;
    this.nodeid = client.lookup(1, name).nodeid;
    this.fh = client.open(this.nodeid, flags).fh;
  }
  /** SETLK by an owner; the errno. */
  set(owner: number | bigint, type: number, start: number | bigint = 0, end: number | bigint = END, flags = 0, pid = 100): number {
    return errnoOf(() => this.client.setlk(this.nodeid, this.fh, owner, { start, end, type, pid }, flags));
  }
  flock(type: number): number {
    return this.set(0, type, 0, END, FLOCK);
  }
  get(owner: number | bigint, type: number, start: number | bigint = 0, end: number | bigint = END) {
    return this.client.getlk(this.nodeid, this.fh, owner, { start, end, type, pid: 1 });
  }
  /** SETLKW under way. */
  wait(owner: number | bigint, type: number, start: number | bigint = 0, end: number | bigint = END, flags = 0): Pending {
    return this.client.submit(Opcode.SETLKW, this.nodeid, [lockIn(this.fh, owner, { start, end, type, pid: 100 }, flags)], 0);
  }
  flush(owner: number | bigint): void {
    this.client.flush(this.nodeid, this.fh, owner);
  }
  release(): void {
    this.client.release(this.nodeid, this.fh);
  }
}

/** A process of the host that locks a file, as `fcntl`, `flock` or an open file description, until it is told to go on. */
class HostProcess {
  readonly #process: ChildProcess;
  #text = '';
  constructor(name: string, kind: 'lockf' | 'flock', mode: 'LOCK_EX' | 'LOCK_SH', range = '') {
    const code = `
import fcntl, sys
f = open(sys.argv[1], 'r+')
fcntl.${kind}(f, fcntl.${mode}${range === '' ? '' : `, ${range}`})
print('locked', flush=True)
sys.stdin.readline()
fcntl.${kind}(f, fcntl.LOCK_UN)
print('free', flush=True)
sys.stdin.readline()
`;
    this.#process = spawn('python3', ['-c', code, join(share, name)], { cwd: '/', stdio: ['pipe', 'pipe', 'inherit'] });
    processes.add(this);
    this.#process.stdout?.on('data', (data) => {
      this.#text += data;
    });
  }
  has(word: 'locked' | 'free'): boolean {
    return this.#text.includes(word);
  }
  async until(word: 'locked' | 'free'): Promise<void> {
    for (const end = performance.now() + 20_000; !this.has(word); await sleep(2))
      assert.ok(performance.now() < end, `${word}: not in 20 s`);
  }
  async unlock(): Promise<void> {
    this.#process.stdin?.write('\n');
    await this.until('free');
  }
  get pid(): number {
    return this.#process.pid as number;
  }
  async end(): Promise<void> {
    this.#process.kill('SIGKILL');
    if (this.#process.exitCode === null && this.#process.signalCode === null) await once(this.#process, 'exit');
  }
}

/** Waits until the reply is there. */
async function granted(opener: Opener, pending: Pending): Promise<number> {
  for (const end = performance.now() + 20_000; !opener.client.done(pending); await sleep(1)) assert.ok(performance.now() < end);
  return Math.abs(pending.reply?.error ?? 0);
}

/** Not before the condition, but then. */
async function stillWaits(opener: Opener, pending: Pending): Promise<void> {
  await sleep(150);
  assert.equal(opener.client.done(pending), false);
}

/** Lines of /proc/locks for a file: kind, type, start, end. */
function hostLocks(name: string): string[] {
  const { ino } = statSync(join(share, name));
  return readFileSync('/proc/locks', 'utf8')
    .split('\n')
    .filter((line) => line.includes(`:${ino} `) && !line.includes('->'))
    .map((line) => line.replace(/^\d+: +(\S+) +\S+ +(\S+) +\S+ +\S+ +(\S+) +(\S+)$/, '$1 $2 $3 $4'))
    .sort();
}

describe('record locks', () => {
  test('owners of a guest conflict as processes do', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    const file = new Opener(daemon.session(), fresh());
    assert.equal(file.set(1, WRITE, 10, 19), 0);
    assert.equal(file.set(1, READ, 10, 12), 0, 'its own lock is in nobody’s way');
    assert.equal(file.set(2, READ, 12, 12), 0);
    assert.equal(file.set(2, WRITE, 12, 12), EAGAIN);
    assert.equal(file.set(2, READ, 13, 100), EAGAIN);
    assert.equal(file.set(2, WRITE, 20, END), 0);
    assert.equal(file.set(1, WRITE, 9, 9), 0);
    assert.equal(file.set(1, UNLOCK), 0);
    assert.equal(file.set(3, UNLOCK), 0, 'nothing to unlock');
    assert.equal(file.set(2, WRITE, 0, 50), 0);
    // Closing any descriptor takes all of an owner's locks.
    const again = new Opener(file.client, `file${files - 1}`);
    again.flush(2);
    assert.equal(file.set(1, WRITE), 0);
    file.flush(1);
    assert.deepEqual(hostLocks(`file${files - 1}`), []);
  });

  test('ranges are exact up to the last byte, and are what the host sees', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    const name = fresh();
    const file = new Opener(daemon.session(), name);
    for (const [start, end] of [
      [0n, 0n],
      [0xffffffffn, 0x100000000n],
      [0x100000000n - 1n, 0x1ffffffffn],
      [0x40000000n, 0x40000001n],
      [(1n << 53n) + 1n, (1n << 53n) + 2n],
      [(1n << 62n) + 1n, END - 1n],
      [END - 1n, END - 1n],
      [END, END],
      [5n, END],
      [0n, END],
    ] as const) {
      assert.equal(file.set(1, WRITE, start, end), 0);
      const last = end === END ? 'EOF' : `${end}`;
      assert.deepEqual(hostLocks(name), [`OFDLCK WRITE ${start} ${last}`]);
      assert.deepEqual(file.get(2, READ, start, start), { start, end, type: WRITE, pid: 100 });
      if (start > 0n) assert.equal(file.get(2, READ, 0, start - 1n).type, UNLOCK);
      assert.equal(file.get(1, WRITE, 0, END).type, UNLOCK, 'its own');
      assert.equal(file.set(1, UNLOCK), 0);
    }
    for (const [start, end, type] of [
      [2, 1, WRITE],
      [1n << 63n, (1n << 63n) + 1n, WRITE],
      [0, -1n, READ],
      [0, 10, 3],
      [0, 10, 0xffff0001],
    ] as const)
      assert.equal(file.set(1, type, start, end), EINVAL);
    assert.equal(
      errnoOf(() => file.get(1, UNLOCK)),
      EINVAL,
    );
    assert.deepEqual(hostLocks(name), []);
  });

  test('GETLK tells the pid of a process of the same guest, and of nobody else', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    await using other = await TestDaemon.start(OPTIONS, { share });
    const name = fresh();
    const file = new Opener(daemon.session(), name);
    const foreign = new Opener(other.session(), name);
    file.set(1, WRITE, 0, 9, 0, 111);
    file.set(2, WRITE, 10, 19, 0, 222);
    file.set(3, READ, 20, 29, 0, 333);
    foreign.set(1, WRITE, 30, 39, 0, 444);
    const pid = (start: number) => file.get(9, WRITE, start, start).pid;
    assert.deepEqual([pid(0), pid(10), pid(20), pid(30), pid(40)], [111, 222, 333, 0, 0]);
    assert.equal(foreign.get(5, WRITE, 0, 0).pid, 0);
    assert.equal(foreign.get(5, WRITE, 30, 30).pid, 444);
    const host = new HostProcess(name, 'lockf', 'LOCK_EX', '10, 50');
    await host.until('locked');
    assert.deepEqual(file.get(1, READ, 55, 55), { start: 50n, end: 59n, type: WRITE, pid: 0 });
    await host.end();
  });

  test('two guests and a process of the host, all ways', async () => {
    await using one = await TestDaemon.start(OPTIONS, { share });
    await using two = await TestDaemon.start(OPTIONS, { share });
    const name = fresh();
    const a = new Opener(one.session(), name);
    const b = new Opener(two.session(), name);
    assert.equal(a.set(1, WRITE, 0, 9), 0);
    assert.equal(b.set(1, WRITE, 0, 9), EAGAIN);
    assert.equal(b.set(1, WRITE, 10, 19), 0);
    // Host against guest.
    const host = new HostProcess(name, 'lockf', 'LOCK_EX', '20, 0');
    await sleep(300);
    assert.equal(host.has('locked'), false);
    a.flush(1);
    await sleep(100);
    assert.equal(host.has('locked'), false);
    b.flush(1);
    await host.until('locked');
    // Guests against host; both wait, and both get it.
    assert.equal(a.set(1, READ, 19, 19), EAGAIN);
    assert.equal(b.set(1, READ, 20, 29), 0);
    const waits = [a.wait(1, WRITE, 0, 0), b.wait(1, WRITE, 1, 1)];
    await stillWaits(a, waits[0] as Pending);
    await stillWaits(b, waits[1] as Pending);
    await host.unlock();
    assert.deepEqual([await granted(a, waits[0] as Pending), await granted(b, waits[1] as Pending)], [0, 0]);
    await host.end();
    // A guest that goes leaves nothing.
    assert.equal(b.set(2, READ, 0, 0), EAGAIN);
    const left = b.wait(2, WRITE, 0, 0);
    await stillWaits(b, left);
    await one.disconnect(a.client);
    assert.equal(await granted(b, left), 0);
    // A host process that is killed, too.
    const killed = new HostProcess(name, 'lockf', 'LOCK_EX', '10, 100');
    await killed.until('locked');
    const last = b.wait(1, WRITE, 100, 100);
    await stillWaits(b, last);
    await killed.end();
    assert.equal(await granted(b, last), 0);
  });

  test('waits: order, INTERRUPT, other requests meanwhile, the end of the session', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    const name = fresh();
    const client = daemon.session({}, { queueSize: 64 });
    const file = new Opener(client, name);
    assert.equal(file.set(1, WRITE), 0);
    const first = file.wait(2, WRITE);
    const second = file.wait(3, WRITE);
    const third = file.wait(4, WRITE);
    for (let i = 0; i < 200; i++) client.getattr(file.nodeid);
    await stillWaits(file, first);
    client.interrupt(second.unique);
    assert.equal(await granted(file, second), EINTR);
    client.interrupt(second.unique);
    client.interrupt(12345n);
    assert.equal(file.set(1, UNLOCK), 0);
    assert.equal(await granted(file, first), 0);
    await stillWaits(file, third);
    // Closed while another of its threads waits: its locks go, the wait goes on.
    file.flush(4);
    file.flush(2);
    assert.equal(await granted(file, third), 0);
    assert.equal(file.set(1, READ), EAGAIN);
    file.flush(4);
    assert.equal(file.set(1, WRITE), 0);
    // Those of other files are not disturbed.
    const other = new Opener(client, fresh());
    other.set(1, WRITE);
    const elsewhere = other.wait(2, WRITE);
    const here = file.wait(2, READ);
    file.flush(1);
    assert.equal(await granted(file, here), 0);
    await stillWaits(other, elsewhere);
    client.destroy();
    assert.equal(await granted(other, elsewhere), EINTR);
    assert.deepEqual(hostLocks(name), []);
    client.init();
    client.getattr(1);
  });

  test('waits never fill a queue, and end when it stops', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    const client = daemon.session({}, { queueSize: 64 });
    const file = new Opener(client, fresh());
    assert.equal(file.set(1, WRITE), 0);
    const waits = Array.from({ length: 60 }, (_, i) => file.wait(i + 2, READ));
    await daemon.until(() => waits.filter((wait) => client.done(wait)).length === 28);
    const refused = waits.filter((wait) => wait.reply !== undefined);
    for (const { reply } of refused) assert.equal(reply?.error, -ENOLCK);
    file.flush(1);
    for (const wait of waits.slice(0, 32)) assert.equal(await granted(file, wait), 0);
    for (let i = 0; i < 60; i++) file.flush(i + 2);
    assert.equal(file.set(1, WRITE), 0);
    const stopped = file.wait(2, WRITE);
    await stillWaits(file, stopped);
    client.driver.frontend.getVringBase(stopped.queue.index);
    assert.equal(await granted(file, stopped), EAGAIN);
  });

  test('open file description locks of the guest go with RELEASE', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    const client = daemon.session();
    const name = fresh();
    const file = new Opener(client, name);
    const other = new Opener(client, name);
    // Their owner is no process, and no FLUSH names it.
    assert.equal(file.set(0xabcdef0123456789n, WRITE), 0);
    assert.equal(other.set(5, WRITE), EAGAIN);
    file.flush(77);
    assert.equal(other.set(5, WRITE), EAGAIN);
    const waits = other.wait(5, WRITE);
    await stillWaits(other, waits);
    file.release();
    assert.equal(await granted(other, waits), 0);
    assert.deepEqual(hostLocks(name), ['OFDLCK WRITE 0 EOF']);
  });

  test('a file that has no name any more; one open for reading; --readonly', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    const name = fresh();
    const file = new Opener(daemon.session(), name);
    rmSync(join(share, name));
    assert.equal(file.set(1, WRITE), 0);
    assert.equal(file.set(2, WRITE), EAGAIN);
    const reading = new Opener(file.client, fresh(), 0);
    assert.equal(reading.set(1, READ), 0);
    assert.equal(reading.set(2, WRITE), EAGAIN);
    await using readonly = await TestDaemon.start([...OPTIONS, '--readonly'], { share });
    const there = new Opener(readonly.session(), `file${files - 1}`, 0);
    assert.equal(there.set(1, READ, 0, 5), 0);
    assert.equal(there.set(2, READ, 0, 5), 0);
    // Linux itself asks no exclusive lock of a file that is open for reading.
    assert.equal(there.set(3, WRITE, 100, 100), EBADF);
    assert.equal(reading.set(1, WRITE), EAGAIN);
  });

  test('owners are bounded, and others go on', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    const name = fresh();
    const file = new Opener(daemon.session(), name);
    let owner = 1;
    while (file.set(owner, READ, owner, owner) === 0) owner++;
    assert.equal(owner, 1025);
    assert.equal(file.set(owner, READ, 0, 0), ENOLCK);
    assert.equal(file.set(7, READ, 5000, 5000), 0, 'those that are there');
    const elsewhere = new Opener(file.client, fresh());
    assert.equal(elsewhere.set(1, WRITE), 0);
    for (let i = 1; i < owner; i++) file.flush(i);
    assert.equal(file.set(owner, WRITE), 0);
    assert.equal(daemon.descriptors().filter(({ target }) => target.endsWith(name)).length, 2);
    // All descriptors of few.
    await using few = await TestDaemon.start([...OPTIONS, '--rlimit-nofile=512'], { share });
    const client = few.session();
    const openers = Array.from({ length: 100 }, () => new Opener(client, fresh()));
    const results = openers.map((opener) => opener.set(1, WRITE));
    assert.ok(results.includes(0) && results.includes(ENOLCK));
    for (let i = 0; i < 20; i++) new Opener(client, fresh()).release();
  });
});

describe('flock', () => {
  test('between open files of a guest, guests and the host', async () => {
    await using one = await TestDaemon.start(OPTIONS, { share });
    await using two = await TestDaemon.start(OPTIONS, { share });
    const name = fresh();
    const client = one.session();
    const a = new Opener(client, name, 0);
    const b = new Opener(client, name);
    const c = new Opener(two.session(), name);
    assert.equal(a.flock(READ), 0);
    assert.equal(b.flock(READ), 0);
    assert.equal(c.flock(WRITE), EAGAIN);
    assert.equal(b.flock(UNLOCK), 0);
    assert.equal(a.flock(WRITE), 0, 'though open for reading');
    assert.equal(b.flock(READ), EAGAIN);
    assert.deepEqual(hostLocks(name), ['FLOCK WRITE 0 EOF']);
    // Record locks are another matter.
    assert.equal(b.set(1, WRITE), 0);
    const host = new HostProcess(name, 'flock', 'LOCK_SH');
    const near = b.wait(0, READ, 0, END, FLOCK);
    const far = c.wait(0, READ, 0, END, FLOCK);
    await stillWaits(b, near);
    assert.equal(host.has('locked'), false);
    a.release();
    await host.until('locked');
    assert.deepEqual([await granted(b, near), await granted(c, far)], [0, 0]);
    const exclusive = c.wait(0, WRITE, 0, END, FLOCK);
    b.release();
    await stillWaits(c, exclusive);
    await host.unlock();
    assert.equal(await granted(c, exclusive), 0);
    await host.end();
  });

  test('goes with the guest; a wait ends with its file', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    const name = fresh();
    const client = daemon.session();
    const a = new Opener(client, name);
    const b = new Opener(client, name);
    assert.equal(a.flock(WRITE), 0);
    const wait = b.wait(0, WRITE, 0, END, FLOCK);
    await stillWaits(b, wait);
    b.release();
    assert.equal(await granted(b, wait), EBADF);
    await daemon.disconnect(client);
    assert.deepEqual(hostLocks(name), []);
    const host = new HostProcess(name, 'flock', 'LOCK_EX');
    await host.until('locked');
    await host.end();
  });
});

describe('negotiation', () => {
  test('without the options, and with a guest that cannot, nothing is locked here', async () => {
    for (const [options, flags] of [
      [[], LINUX_INIT_FLAGS],
      [OPTIONS, LINUX_INIT_FLAGS & ~InitFlag.POSIX_LOCKS & ~InitFlag.FLOCK_LOCKS],
    ] as const) {
      await using daemon = await TestDaemon.start(options, { share });
      const name = fresh();
      const file = new Opener(daemon.session({ flags }), name);
      assert.equal((file.client.session?.flags ?? 0) & (InitFlag.POSIX_LOCKS | InitFlag.FLOCK_LOCKS), 0);
      for (const request of [
        () => file.client.setlk(file.nodeid, file.fh, 1, { start: 0, end: 1, type: 1, pid: 1 }),
        () => file.get(1, READ),
      ])
        assert.throws(request, (error: FuseError) => error.errno === ENOSYS);
      assert.equal(file.flock(WRITE), ENOSYS);
      file.flush(1);
      assert.deepEqual(hostLocks(name), []);
    }
  });

  test('each alone', async () => {
    await using posix = await TestDaemon.start(['--posix-lock'], { share });
    const a = new Opener(posix.session(), fresh());
    assert.deepEqual([a.set(1, WRITE), a.flock(WRITE)], [0, ENOSYS]);
    await using flock = await TestDaemon.start(['-o', 'flock,no_posix_lock'], { share });
    const b = new Opener(flock.session(), fresh());
    assert.deepEqual([b.set(1, WRITE), b.flock(WRITE)], [ENOSYS, 0]);
    b.release();
    assert.deepEqual(hostLocks(`file${files - 1}`), []);
  });

  test('requests that name the wrong file', async () => {
    await using daemon = await TestDaemon.start(OPTIONS, { share });
    const client = daemon.session();
    const file = new Opener(client, fresh());
    const directory = client.opendir(1).fh;
    const lock = { start: 0, end: 9, type: WRITE, pid: 1 };
    for (const fh of [file.fh + 1, 0, directory, Number.MAX_SAFE_INTEGER]) {
      for (const request of [
        () => client.setlk(file.nodeid, fh, 1, lock),
        () => client.setlk(1, fh, 1, lock),
        () => client.setlkw(file.nodeid, fh, 1, lock),
        () => client.getlk(file.nodeid, fh, 1, lock),
        () => client.setlk(file.nodeid, fh, 1, lock, FLOCK),
      ])
        assert.equal(errnoOf(request), EBADF);
    }
    assert.equal(
      errnoOf(() => client.setlk(1, file.fh, 1, lock)),
      EBADF,
    );
    // The record of a lock owner is no file of the guest's.
    assert.equal(file.set(1, WRITE), 0);
    for (let slot = 1; slot < 8; slot++)
      for (let generation = 1; generation < 8; generation++) {
        const fh = generation * 2 ** 20 + slot;
        if (fh !== file.fh)
          assert.notEqual(
            errnoOf(() => client.read(file.nodeid, fh, 0, 10)),
            0,
          );
      }
  });
});
