/** Scenarios for test/native: each runs in a process (or a thread of it) of its own, because it may end that. */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { constants } from 'node:os';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { arena, arenaAlloc, cString, native, OffloadOp } from 'vhost-user-ts/native';

const { EBUSY, EBADF, EINVAL, EFAULT } = constants.errno;
const { SIGUSR2, SIGTERM } = constants.signals;
const MIB = 1 << 20;
const RDWR_CREAT_EXCL_TMP = 0x400000 | 0x10000 | 2; // O_TMPFILE | O_RDWR
const words = new BigUint64Array(arena.u8.buffer);

function openFds(): number {
  return readdirSync('/proc/self/fd').length;
}

function memfd(bytes: number): number {
  const fd = native.memfdCreate(cString('test'), bytes);
  assert.ok(fd >= 0);
  return fd;
}

/** One iovec at a fresh place of the arena. */
function iovec(address: number, length: number): number {
  const at = arenaAlloc(16);
  words[at >> 3] = BigInt(address);
  words[(at >> 3) + 1] = BigInt(length);
  return at;
}

/** Runs a scenario in a thread until it says or posts something. */
function thread(name: string): { worker: Worker; said: Promise<unknown>; ended: Promise<number> } {
  const worker = new Worker(new URL(import.meta.url), { workerData: name });
  return {
    worker,
    said: new Promise((done, fail) => {
      worker.once('message', done);
      worker.once('error', fail);
    }),
    ended: new Promise((done) => worker.once('exit', done)),
  };
}

/** Ten jobs of 8 MiB each on two threads: more than are done when the caller goes on. */
function startJobs(): number {
  const event = native.offloadStart(2);
  assert.ok(event >= 0);
  assert.equal(native.offloadStart(2), -EBUSY);
  const fd = native.openat(-100, cString('/tmp'), RDWR_CREAT_EXCL_TMP, 0o600);
  assert.ok(fd >= 0);
  const region = native.regionMap(memfd(8 * MIB), 0, 8 * MIB, 1);
  const iov = iovec(native.regionAddress(region), 8 * MIB);
  for (let job = 0; job < 10; job++)
    assert.equal(native.offloadSubmit(job, OffloadOp.write, fd, iov, 1, 0, 8 * MIB, job * 8 * MIB, -1, 0, 0), 0);
  return event;
}

const scenarios: Record<string, () => unknown> = {
  /** A buffer over a region is detached when the region goes; what was copied stays. */
  detached() {
    const region = native.regionMap(memfd(4 * MIB), 0, 4 * MIB, 1);
    const whole = native.regionBuffer(region, 0, 4 * MIB);
    const part = new Uint8Array(native.regionBuffer(region, 4096, 100));
    const view = new DataView(whole);
    const bytes = Buffer.from(whole, 0, 64);
    part[0] = 7;
    assert.equal(view.getUint8(4096), 7);
    const other = native.regionMap(memfd(MIB), 0, MIB, 1);
    const untouched = new Uint8Array(native.regionBuffer(other, 0, MIB));
    assert.equal(native.regionUnmap(region), 0);
    assert.equal(whole.byteLength, 0);
    assert.equal(part.length, 0);
    assert.equal(part[0], undefined);
    part[0] = 1;
    assert.throws(() => view.getUint8(0), TypeError);
    assert.equal(bytes.length, 0);
    assert.equal(untouched.length, MIB);
    untouched[5] = 1;
    assert.equal(native.regionUnmap(region), -EBADF);
    assert.equal(native.regionAddress(region), -EBADF);
    assert.throws(() => native.regionBuffer(region, 0, 1), RangeError);
    // One buffer alone.
    const one = native.regionBuffer(other, 0, 10);
    assert.equal(native.regionDetach(one), 0);
    assert.equal(native.regionDetach(one), -EINVAL);
    assert.equal(one.byteLength, 0);
    assert.equal(untouched.length, MIB);
    assert.equal(native.regionUnmap(other), 0);
  },

  /** Buffers that nobody holds are collected, before and after their region. */
  collected() {
    const gc = globalThis.gc as () => void;
    for (let round = 0; round < 50; round++) {
      const region = native.regionMap(memfd(MIB), 0, MIB, 1);
      for (let i = 0; i < 20; i++) new Uint8Array(native.regionBuffer(region, 0, MIB))[i] = i;
      if (round % 2 === 0) gc();
      native.regionUnmap(region);
      gc();
    }
  },

  /** What does not lie within a region, or a region within its file, is refused. */
  bounds() {
    const fd = memfd(MIB);
    assert.equal(native.regionMap(fd, 0, MIB + 4096, 1), -EINVAL);
    assert.equal(native.regionMap(fd, MIB, 4096, 1), -EINVAL);
    assert.equal(native.regionMap(fd, -4096, 4096, 1), -EINVAL);
    assert.equal(native.regionMap(fd, 0, 0, 1), -EINVAL);
    assert.equal(native.regionMap(-1, 0, 4096, 1), -EBADF);
    const region = native.regionMap(fd, 4096, 8192, 0);
    for (const [offset, length] of [
      [0, 8193],
      [8192, 1],
      [-1, 10],
      [0, 0],
      [2 ** 52, 2 ** 52],
    ] as const)
      assert.throws(() => native.regionBuffer(region, offset, length), RangeError);
    for (const id of [-1, 4096, 1 << 30]) assert.equal(native.regionUnmap(id), -EBADF);
  },

  /** The process exits while jobs run: at once, and without a crash. */
  exit() {
    startJobs();
    process.exit(3);
  },

  /** The same by falling off the end, by an exception, and after the pool was stopped. */
  end() {
    startJobs();
  },
  exception() {
    startJobs();
    process.on('uncaughtException', () => process.exit(4));
    setImmediate(() => {
      throw new Error('on purpose');
    });
  },
  stop() {
    startJobs();
    assert.equal(native.offloadStop(), 0);
    assert.equal(native.offloadStop(), -EBADF);
    assert.equal(native.offloadReap(arenaAlloc(160), 10), 0);
    startJobs();
  },

  /** Threads end with a pool running, by themselves and from outside; their descriptors are closed, their memory goes. */
  async threads() {
    let descriptors = 0;
    for (let round = 0; round < 6; round++) {
      const { worker, said, ended } = thread('pool');
      assert.equal(await said, 'submitted');
      if (round % 2 === 0) await worker.terminate();
      else worker.postMessage('end');
      await ended;
      const now = openFds();
      if (round === 1) descriptors = now;
      // Two files a round are not the add-on's: the test's own.
      if (round > 1) assert.equal(now - descriptors, 2 * (round - 1));
    }
  },
  pool() {
    startJobs();
    parentPort?.postMessage('submitted');
    parentPort?.once('message', () => process.exit());
  },

  /** Two environments at a time: an arena, a pool and buffers each; regions belong to the process. */
  async environments() {
    const mine = native.arenaAddress();
    const event = native.offloadStart(1);
    const at = arenaAlloc(64);
    arena.u32[at >> 2] = 0x11111111;
    const threads = [thread('environment'), thread('environment')];
    const theirs = (await Promise.all(threads.map(({ said }) => said))) as { arena: number; event: number; region: number; at: number }[];
    assert.equal(new Set([mine, ...theirs.map((one) => one.arena)]).size, 3);
    assert.equal(new Set([event, ...theirs.map((one) => one.event)]).size, 3);
    assert.equal(arena.u32[at >> 2], 0x11111111);
    const { region } = theirs[0] as { region: number };
    const bytes = new Uint8Array(native.regionBuffer(region, 0, 4));
    assert.deepEqual([...bytes], [1, 2, 3, 4]);
    for (const { worker } of threads) worker.postMessage('end');
    await Promise.all(threads.map(({ ended }) => ended));
    // The region outlives the thread that made it.
    assert.deepEqual([...bytes], [1, 2, 3, 4]);
    assert.equal(native.regionUnmap(region), 0);
    assert.equal(bytes.length, 0);
    assert.equal(native.offloadStop(), 0);
  },
  environment() {
    const at = arenaAlloc(64);
    arena.u32[at >> 2] = 0x22222222;
    const region = native.regionMap(memfd(4096), 0, 4096, 1);
    new Uint8Array(native.regionBuffer(region, 0, 4)).set([1, 2, 3, 4]);
    parentPort?.postMessage({ arena: native.arenaAddress(), event: native.offloadStart(1), region, at });
    parentPort?.once('message', () => process.exit());
  },

  /** A peer truncates the file behind a region: nothing ends, the region reads as zeros and says that it is broken. */
  sigbus() {
    const size = 64 * 4096;
    const fd = memfd(size);
    const region = native.regionMap(fd, 0, size, 1);
    const healthy = native.regionMap(memfd(size), 0, size, 1);
    const bytes = new Uint8Array(native.regionBuffer(region, 0, size)).fill(7);
    const other = new Uint8Array(native.regionBuffer(healthy, 0, size)).fill(9);
    assert.equal(native.ftruncate(fd, 16 * 4096), 0);
    assert.deepEqual([native.regionBroken(region), native.brokenCount()], [0, 0]);
    assert.equal(bytes[15 * 4096], 7);
    // System calls of the daemon see EFAULT, not a signal.
    const file = native.openat(-100, cString('/tmp'), RDWR_CREAT_EXCL_TMP, 0o600);
    const lost = iovec(native.regionAddress(region) + 20 * 4096, 100);
    assert.equal(native.pwritev2(file, lost, 1, 0, 100, 0, 0), -EFAULT);
    assert.equal(native.regionBroken(region), 0);
    assert.equal(bytes[20 * 4096 + 5], 0);
    assert.deepEqual([native.regionBroken(region), native.regionBroken(healthy), native.brokenCount()], [1, 0, 1]);
    for (let page = 0; page < 64; page++) {
      bytes[page * 4096] = page;
      assert.equal(bytes[page * 4096], page);
    }
    // By the add-on's own copies, by Atomics, and once more after it grew again.
    const fd2 = memfd(size);
    const second = native.regionMap(fd2, 0, size, 1);
    native.ftruncate(fd2, 0);
    const at = arenaAlloc(256);
    assert.equal(native.gather(iovec(native.regionAddress(second), 100), 1, at, 100), 100);
    assert.deepEqual([native.regionBroken(second), native.brokenCount()], [1, 2]);
    const third = native.regionMap(fd2, 0, 4096, 1);
    assert.equal(third, -EINVAL);
    native.ftruncate(fd2, size);
    const fourth = native.regionMap(fd2, 0, size, 1);
    const shared = new Int32Array(native.regionBuffer(fourth, 0, size));
    native.ftruncate(fd2, 0);
    Atomics.add(shared, 1000, 5);
    assert.equal(Atomics.load(shared, 1000), 5);
    assert.deepEqual([native.regionBroken(fourth), native.brokenCount()], [1, 3]);
    assert.ok(other.every((byte) => byte === 9));
    for (const id of [region, healthy, second, fourth]) assert.equal(native.regionUnmap(id), 0);
  },

  /** A job reads into memory that is lost: its result says so. */
  sigbusInJob() {
    const event = native.offloadStart(2);
    const fd = memfd(MIB);
    const region = native.regionMap(fd, 0, MIB, 1);
    native.ftruncate(fd, 0);
    const file = memfd(MIB);
    const iov = iovec(native.regionAddress(region), MIB);
    assert.equal(native.offloadSubmit(5, OffloadOp.read, file, iov, 1, 0, MIB, 0, -1, 0, 0), 0);
    assert.equal(native.poll(event, 1, 10_000), 1);
    const out = arenaAlloc(64);
    assert.equal(native.offloadReap(out, 4), 1);
    assert.deepEqual([arena.i32[out >> 2], arena.f64[(out + 8) >> 3]], [5, -EFAULT]);
  },

  /** Signals become numbers in an eventfd, also while the thread sleeps in the wait. */
  async signals() {
    const fd = native.eventfd(0);
    assert.equal(native.signalToEventfd(SIGUSR2, fd), 0);
    assert.equal(native.signalToEventfd(SIGTERM, fd), 0);
    assert.equal(native.signalToEventfd(0, fd), -EINVAL);
    assert.equal(native.signalToEventfd(65, fd), -EINVAL);
    for (const signal of [SIGUSR2, SIGTERM, SIGUSR2]) process.kill(process.pid, signal);
    assert.equal(native.poll(fd, 1, 5000), 1);
    let count = 0;
    while (count < 3 && native.poll(fd, 1, 5000) === 1) count += native.eventfdRead(fd);
    assert.equal(count, 3);
    assert.equal(native.eventfdRead(fd), 0);
    const epoll = native.epollCreate();
    const out = arenaAlloc(64);
    assert.equal(native.epollAdd(epoll, fd, 1, 77), 0);
    const { said, worker } = thread('killer');
    await said;
    worker.postMessage('now');
    let ready = 0;
    for (let i = 0; i < 100 && ready === 0; i++) ready = native.epollWait(epoll, out, 8, 10_000);
    assert.equal(ready, 1);
    assert.deepEqual([arena.u32[out >> 2], arena.u32[(out >> 2) + 1]], [77, 1]);
    assert.equal(native.eventfdRead(fd), 1);
    await worker.terminate();
  },
  killer() {
    parentPort?.once('message', () => setTimeout(() => process.kill(process.pid, SIGUSR2), 100));
    parentPort?.postMessage('ready');
  },

  /** Descriptors that come along beyond those wanted are closed, and none leaks when the socket goes unread. */
  descriptors() {
    const pair = arenaAlloc(8);
    const buffer = arenaAlloc(64);
    const list = arenaAlloc(4 * 260);
    const start = openFds();
    assert.equal(native.socketpair(pair), 0);
    const [a, b] = [arena.i32[pair >> 2] as number, arena.i32[(pair >> 2) + 1] as number];
    const fd = memfd(4096);
    const before = openFds();
    for (const [sent, wanted] of [
      [5, 2],
      [253, 0],
      [253, 253],
      [0, 5],
      [1, 8],
    ] as const) {
      for (let i = 0; i < sent; i++) arena.i32[(list >> 2) + i] = fd;
      assert.equal(native.sendmsg(a, buffer, 10, list, sent), 10);
      assert.equal(native.recvmsg(b, buffer, 64, list, wanted), 10);
      const got = arena.i32[list >> 2] as number;
      assert.equal(got, Math.min(sent, wanted));
      assert.equal(openFds() - before, got);
      for (let i = 1; i <= got; i++) native.close(arena.i32[(list >> 2) + i] as number);
    }
    assert.equal(native.sendmsg(a, buffer, 1, list, 254), -EINVAL);
    for (let i = 0; i < 10; i++) arena.i32[(list >> 2) + i] = fd;
    native.sendmsg(a, buffer, 1, list, 10);
    for (const one of [a, b, fd]) native.close(one);
    assert.equal(openFds(), start);
  },

  /** The add-on of this process is the one with the sanitizer. */
  sanitized() {
    const maps = readFileSync('/proc/self/maps', 'utf8');
    assert.match(maps, /libasan/);
    assert.ok(maps.includes(process.env['VHOST_USER_TS_ADDON'] as string));
  },
};

const name = isMainThread ? (process.argv[2] as string) : (workerData as string);
await scenarios[name]?.();
if (isMainThread) console.log(`${name}: done`);
