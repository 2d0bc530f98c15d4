/**
 * A hostile or broken front end at the socket of the daemon as it is shipped: whatever it sends, the daemon goes on, closes the
 * descriptors that came along, uses bounded time and memory, and serves the next one.
 */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Feature, features, HeaderFlag, NO_FD, ProtocolFeature, VhostUserFrontend } from 'vhost-user-ts';
import { arena, arenaAlloc, cString, native } from 'vhost-user-ts/native';
import { describeRegion, MockMemory, type QueueDriver } from 'vhost-user-ts/testing';
import { needsRoot } from '../support/daemon.js';
import { assertServes, cpuSeconds, restartQueue, Target } from '../support/hostile.js';

const { O_RDWR, O_NONBLOCK, O_RDONLY } = fs.constants;
const REPLY_ACK = features(ProtocolFeature.REPLY_ACK);
const pair = arenaAlloc(8);

function socketPair(): [number, number] {
  assert.equal(native.socketpair(pair), 0);
  return [arena.i32[pair >> 2] as number, arena.i32[(pair >> 2) + 1] as number];
}

/** Descriptors of kinds that a message does not want; closed by {@link closeAll}. */
class Kinds {
  readonly fds: Record<string, number> = {};
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
    const memfd = (bytes: number) => native.memfdCreate(cString('hostile'), bytes);
    const [one, other] = socketPair();
    native.close(other);
    const fifo = join(folder, 'fifo');
    execFileSync('mkfifo', [fifo]);
    const both = fs.openSync(fifo, O_RDWR | O_NONBLOCK);
    fs.writeFileSync(join(folder, 'plain'), 'text');
    Object.assign(this.fds, {
      'a directory': fs.openSync('/', O_RDONLY),
      'a short file': fs.openSync(join(folder, 'plain'), O_RDWR),
      'a read-only file': fs.openSync(join(folder, 'plain'), O_RDONLY),
      'a socket whose other end is closed': one,
      'a pipe': both,
      'the writing end of a pipe without readers': fs.openSync(fifo, fs.constants.O_WRONLY | O_NONBLOCK),
      '/dev/null': fs.openSync('/dev/null', O_RDWR),
      'a memfd without size': memfd(0),
      'a memfd of 100 bytes': memfd(100),
      'an eventfd': native.eventfd(0),
      'an epoll': native.epollCreate(),
    });
    const full = this.fds['a memfd of 100 bytes'] as number;
    this.fds['a memfd that may only be read'] = fs.openSync(`/proc/self/fd/${full}`, O_RDONLY);
  }

  closeAll(): void {
    for (const fd of Object.values(this.fds)) native.close(fd);
    fs.rmSync(join(this.#folder, 'fifo'));
    fs.rmSync(join(this.#folder, 'plain'));
  }
}

/** A front end that has agreed on REPLY_ACK. */
function acknowledged(target: Target): VhostUserFrontend {
  for (let tries = 0; ; tries++) {
    const frontend = VhostUserFrontend.connect(target.daemon.socket);
    try {
      frontend.getFeatures();
      frontend.setProtocolFeatures(frontend.getProtocolFeatures());
      return frontend;
    } catch (error) {
      // The client before is not seen to be gone yet.
      frontend.close();
      if (tries === 1000) throw error;
    }
  }
}

async function gone(target: Target, frontend: VhostUserFrontend): Promise<void> {
  const before = target.daemon.log.split('the client is gone').length;
  frontend.close();
  await target.daemon.until(() => target.daemon.log.split('the client is gone').length > before);
}

function frame(request: number, flags: number, size: number, payload: Uint8Array): Buffer {
  const bytes = Buffer.alloc(12 + payload.length);
  bytes.writeUInt32LE(request, 0);
  bytes.writeUInt32LE(flags, 4);
  bytes.writeUInt32LE(size, 8);
  bytes.set(payload, 12);
  return bytes;
}

describe('messages', () => {
  test('every request code with payloads of every size and descriptors that it does not want', { timeout: 120_000 }, async () => {
    await using target = await Target.start();
    const { daemon } = target;
    await idle(target);
    const baseline = daemon.descriptors();
    const memory = daemon.memory;
    const passed = Array.from({ length: 3 }, () => native.eventfd(0));
    let sent = 0;
    let closed = 0;
    for (let request = 0; request <= 50; request++) {
      for (const [size, fill] of [
        [0, 0],
        [1, 0xff],
        [7, 0xff],
        [8, 0xff],
        [8, 0],
        [16, 0xff],
        [40, 0xff],
        [40, 0],
        [268, 0xff],
        [4000, 0x41],
      ] as const) {
        for (const count of [0, 1, 3]) {
          const frontend = acknowledged(target);
          frontend.sendBytes(
            frame(request, HeaderFlag.VERSION | HeaderFlag.NEED_REPLY, size, Buffer.alloc(size, fill)),
            passed.slice(0, count),
          );
          sent++;
          // Either the connection is over, or it is answered, here or to the next message.
          if (!answers(frontend)) closed++;
          frontend.close();
        }
      }
    }
    for (const fd of passed) native.close(fd);
    await idle(target);
    await target.assertDescriptors(baseline);
    target.assertMemory(memory);
    assert.ok(daemon.lines.length <= 200, `${daemon.lines.length} lines`);
    console.log(`${sent} messages, ${closed} of them ended their connection`);
    assertServes(target.daemon.session());
  });

  test('bytes that are no message', async () => {
    await using target = await Target.start();
    await idle(target);
    const baseline = await target.descriptors();
    for (const bytes of [
      Buffer.alloc(1),
      Buffer.alloc(11, 0xff),
      Buffer.alloc(12, 0xff),
      Buffer.alloc(100_000, 0x5a),
      Buffer.from('GET / HTTP/1.1\r\nHost: a\r\n\r\n'),
      frame(1, 0, 0, Buffer.alloc(0)), // version 0
      frame(1, 2, 0, Buffer.alloc(0)), // version 2
      frame(1, HeaderFlag.VERSION | HeaderFlag.REPLY, 0, Buffer.alloc(0)),
      frame(1, HeaderFlag.VERSION, 0xffffffff, Buffer.alloc(0)),
      frame(1, HeaderFlag.VERSION, 0x7fffffff, Buffer.alloc(4096)),
      frame(5, HeaderFlag.VERSION, 1 << 20, Buffer.alloc(1 << 16)),
    ]) {
      const frontend = VhostUserFrontend.connect(target.daemon.socket);
      try {
        frontend.sendBytes(bytes);
      } catch {
        // It has closed the connection before all of it was sent.
      }
      await sleep(5);
      frontend.close();
      await idle(target);
    }
    assert.equal(await target.descriptors(baseline), baseline);
  });

  test('half a message, and one byte at a time', async () => {
    await using target = await Target.start();
    const { daemon } = target;
    await idle(target);
    const baseline = await target.descriptors();
    const frontend = VhostUserFrontend.connect(daemon.socket);
    const message = frame(1, HeaderFlag.VERSION, 0, Buffer.alloc(0));
    const fd = native.eventfd(0);
    for (let i = 0; i < message.length; i++) {
      assert.ok(!frontend.readable(10));
      frontend.sendBytes(message.subarray(i, i + 1), i === 5 ? [fd] : []);
    }
    // It came with a descriptor that GET_FEATURES does not take: refused.
    assert.equal(frontend.receiveReply('GET_FEATURES'), 1n);
    await gone(target, frontend);
    const half = VhostUserFrontend.connect(daemon.socket);
    half.sendBytes(message.subarray(0, 7), [fd, fd, fd]);
    const before = cpuSeconds(daemon);
    await sleep(500);
    assert.ok(cpuSeconds(daemon) - before < 0.2, 'it spins');
    await gone(target, half);
    native.close(fd);
    assert.equal(await target.descriptors(baseline), baseline);
    // Somebody who says nothing keeps nobody from ending.
    const silent = VhostUserFrontend.connect(daemon.socket);
    const began = performance.now();
    await daemon.stop();
    assert.ok(performance.now() - began < 5000);
    silent.close();
  });

  test('a flood of messages keeps the daemon from nothing', { timeout: 60_000 }, async () => {
    await using target = await Target.start();
    const { daemon } = target;
    await idle(target);
    const memory = daemon.memory;
    // Requests whose replies nobody reads.
    for (const request of [1, 15, 11]) {
      const frontend = VhostUserFrontend.connect(daemon.socket);
      const message = frame(request, HeaderFlag.VERSION, request === 11 ? 8 : 0, Buffer.alloc(request === 11 ? 8 : 0));
      const many = Buffer.concat(Array.from({ length: 500 }, () => message));
      const end = performance.now() + 20_000;
      let open = true;
      while (open && performance.now() < end) {
        try {
          frontend.sendBytes(many);
        } catch {
          open = false;
        }
      }
      assert.ok(!open, 'a client that reads no replies is not put up with for ever');
      frontend.close();
    }
    // Commands without replies, as fast as they go: signals are heard all the same, and then the end.
    await idle(target);
    const frontend = acknowledged(target);
    const many = Buffer.concat(Array.from({ length: 1000 }, () => frame(18, HeaderFlag.VERSION, 8, Buffer.alloc(8))));
    const lines = daemon.lines.length;
    daemon.process.kill('SIGUSR1');
    for (const end = performance.now() + 500; performance.now() < end; ) frontend.sendBytes(many);
    assert.ok(daemon.lines.slice(lines).some((line) => line.includes('log level is now')));
    target.assertMemory(memory);
    daemon.process.kill('SIGTERM');
    const began = performance.now();
    assert.throws(() => {
      for (const end = performance.now() + 10_000; performance.now() < end; ) frontend.sendBytes(many);
    });
    assert.ok(performance.now() - began < 5000);
    frontend.close();
    assert.deepEqual(await daemon.ended, { status: 0, signal: null });
  });

  test('a thousand connections', { timeout: 60_000 }, async () => {
    await using target = await Target.start();
    const { daemon } = target;
    const client = daemon.session();
    assertServes(client);
    const baseline = await target.descriptors();
    const memory = daemon.memory;
    for (let i = 0; i < 1000; i++) {
      const frontend = VhostUserFrontend.connect(daemon.socket);
      try {
        if (i % 3 === 0) frontend.sendBytes(Buffer.alloc(100, i));
      } catch {
        // refused already
      }
      frontend.close();
      if (i % 100 === 0) assertServes(client);
    }
    assertServes(client);
    assert.equal(await target.descriptors(baseline), baseline);
    assert.ok(daemon.lines.length <= 30, 'what happens a thousand times is not logged a thousand times');
    await daemon.disconnect(client);
    for (let i = 0; i < 300; i++) {
      const frontend = VhostUserFrontend.connect(daemon.socket);
      try {
        if (i % 2 === 0) frontend.setOwner();
      } catch {
        // the one before is not gone yet
      }
      frontend.close();
    }
    await idle(target);
    assertServes(daemon.session());
    target.assertMemory(memory);
  });
});

/** Whether the connection still answers GET_FEATURES. */
function answers(frontend: VhostUserFrontend): boolean {
  try {
    frontend.sendBytes(frame(1, HeaderFlag.VERSION, 0, Buffer.alloc(0)));
    for (;;) {
      const { header } = frontend.receiveFrame(5000);
      if (header.request === 1) return true;
    }
  } catch {
    return false;
  }
}

/** Waits until no client is connected. */
async function idle(target: Target): Promise<void> {
  const { daemon } = target;
  await daemon.until(() => {
    const probe = VhostUserFrontend.connect(daemon.socket);
    const free = (() => {
      try {
        probe.getFeatures();
        return true;
      } catch {
        return false;
      }
    })();
    probe.close();
    return free;
  });
  await sleep(50);
}

describe('descriptors', () => {
  test('of every wrong kind, wherever one can be passed', { timeout: 60_000 }, async () => {
    await using target = await Target.start();
    const { daemon } = target;
    const client = daemon.session();
    const { driver } = client;
    const { frontend } = driver;
    assertServes(client, [0, 1]);
    const baseline = await target.descriptors();
    const kinds = new Kinds(daemon.folder);
    const queue = driver.queues[1] as QueueDriver;
    const region = { guestAddress: 2 ** 40, size: 1 << 20, userAddress: 2 ** 41, mmapOffset: 0 };
    for (const [kind, fd] of Object.entries(kinds.fds)) {
      // Errors and interrupts may go to anything that can be written to, or nowhere.
      frontend.setVringErr(1, fd);
      frontend.setVringCall(1, fd);
      queue.sendRaw(0xffff);
      assertServes(client, [1]);
      frontend.setVringCall(1, queue.callFd);
      frontend.setVringErr(1, queue.errorFd);
      restartQueue(client, 1);
      // To be waited for.
      frontend.send('SET_VRING_KICK', 1n, [fd], true);
      frontend.receiveReply('SET_VRING_KICK');
      const before = cpuSeconds(daemon);
      await sleep(100);
      assert.ok(cpuSeconds(daemon) - before < 0.08, `${kind} as a kick makes it spin`);
      restartQueue(client, 1);
      assertServes(client, [0, 1]);
      // Memory.
      for (const mmapOffset of [0, 4096, 2 ** 40, 1]) {
        frontend.send('ADD_MEM_REG', describeRegion({ ...region, mmapOffset }), [fd], true);
        assert.equal(frontend.receiveReply('ADD_MEM_REG'), 1n, `${kind} as memory`);
      }
      // The channel for our requests.
      frontend.send('SET_BACKEND_REQ_FD', undefined, [fd], true);
      frontend.receiveReply('SET_BACKEND_REQ_FD');
      frontend.openBackendChannel();
      // What takes no descriptor, or another number of them.
      for (const fds of [[fd], [fd, fd, fd]]) {
        frontend.send('SET_VRING_NUM', { index: 1, num: 128 }, fds, true);
        assert.equal(frontend.receiveReply('SET_VRING_NUM'), 1n);
      }
      assertServes(client, [0, 1]);
      assert.equal(await target.descriptors(baseline), baseline, kind);
    }
    kinds.closeAll();
    await daemon.disconnect(client);
  });

  test('memory files with seals: those that cannot be written to are refused, others serve', async () => {
    await using target = await Target.start();
    const { daemon } = target;
    const client = daemon.session();
    const { frontend } = client.driver;
    const queue = client.driver.queues[1] as QueueDriver;
    const baseline = await target.descriptors();
    // SHRINK 2, GROW 4, WRITE 8, FUTURE_WRITE 16, and SEAL 1: no more seals.
    for (const seals of [2, 4, 6, 7, 8, 14, 16, 31]) {
      const script = `import os, fcntl, sys
fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
os.truncate(fd, 1 << 20)
request = (56).to_bytes(4, "little") + (3).to_bytes(4, "little") + (77).to_bytes(8, "little") + (1).to_bytes(8, "little")
os.write(fd, request)
fcntl.fcntl(fd, 1033, ${seals})
print(fd, flush=True)
sys.stdin.read()`;
      const holder = spawn('python3', ['-c', script], { stdio: ['pipe', 'pipe', 'inherit'], cwd: '/' });
      const [said] = (await once(holder.stdout, 'data')) as [Buffer];
      const fd = fs.openSync(`/proc/${holder.pid}/fd/${Number(String(said))}`, fs.constants.O_RDWR);
      const region = describeRegion({ guestAddress: 2 ** 40, size: 1 << 20, userAddress: 2 ** 41, mmapOffset: 0 });
      frontend.send('ADD_MEM_REG', region, [fd], true);
      const refused = (seals & 24) !== 0;
      assert.equal(frontend.receiveReply('ADD_MEM_REG'), refused ? 1n : 0n, `seals ${seals}`);
      if (!refused) {
        // GETATTR of the root, in that memory.
        queue.setDescriptor(0, { address: 2 ** 40, length: 56, flags: 1, next: 1 });
        queue.setDescriptor(1, { address: 2 ** 40 + 4096, length: 120, flags: 2 });
        queue.offer(0);
        queue.publish();
        queue.forceKick();
        const reply = Buffer.alloc(120);
        await daemon.until(() => fs.readSync(fd, reply, 0, 120, 4096) === 120 && reply.readUInt32LE(8) === 77);
        assert.deepEqual([reply.readUInt32LE(0), reply.readInt32LE(4)], [120, 0]);
        if ((seals & 2) !== 0) assert.throws(() => fs.ftruncateSync(fd, 0), { code: 'EPERM' });
        frontend.send('REM_MEM_REG', region, [], true);
        assert.equal(frontend.receiveReply('REM_MEM_REG'), 0n);
        restartQueue(client, 1);
      }
      assertServes(client, [0, 1]);
      fs.closeSync(fd);
      holder.stdin.end();
      await once(holder, 'exit');
      assert.equal(await target.descriptors(baseline), baseline, `seals ${seals}`);
    }
  });

  test('253 of them with every message', async () => {
    await using target = await Target.start();
    const { daemon } = target;
    const frontend = acknowledged(target);
    const baseline = await target.descriptors();
    const fd = native.eventfd(0);
    const many = new Array<number>(253).fill(fd);
    for (let i = 0; i < 50; i++) {
      frontend.send('SET_VRING_ENABLE', { index: 0, num: 1 }, many, true);
      assert.equal(frontend.receiveReply('SET_VRING_ENABLE'), 1n);
    }
    assert.equal(await target.descriptors(baseline), baseline);
    // In the middle of one message.
    const message = frame(18, HeaderFlag.VERSION, 8, Buffer.alloc(8));
    frontend.sendBytes(message.subarray(0, 4), many);
    frontend.sendBytes(message.subarray(4, 12), many);
    assert.ok(frontend.closedByPeer(5000));
    frontend.close();
    native.close(fd);
    assertServes(daemon.session());
  });

  test('a kick that never ends, and interrupts that nobody reads', async () => {
    await using target = await Target.start();
    const { daemon } = target;
    const client = daemon.session();
    const { frontend } = client.driver;
    const fifo = join(daemon.folder, 'fifo');
    execFileSync('mkfifo', [fifo]);
    const both = fs.openSync(fifo, O_RDWR | O_NONBLOCK);
    fs.rmSync(fifo);
    const queue = client.driver.queues[1] as QueueDriver;
    // A pipe that is full, and one that is never emptied.
    frontend.setVringCall(1, both);
    try {
      for (;;) fs.writeSync(both, Buffer.alloc(4096));
    } catch {
      // full
    }
    frontend.setVringKick(1, both);
    const before = cpuSeconds(daemon);
    await sleep(300);
    assert.ok(cpuSeconds(daemon) - before < 0.15, 'it spins');
    queue.forceKick();
    assertServes(client, [1]);
    restartQueue(client, 1);
    frontend.setVringCall(1, queue.callFd);
    assertServes(client, [0, 1]);
    native.close(both);
  });

  test('huge pages that are not to be had', needsRoot, async (t) => {
    await using target = await Target.start();
    const { daemon } = target;
    const huge = fs.mkdtempSync(join(tmpdir(), 'huge-'));
    try {
      execFileSync('mount', ['-t', 'hugetlbfs', '-o', 'pagesize=2M', 'none', huge], { stdio: 'pipe' });
    } catch {
      fs.rmdirSync(huge);
      t.skip('this kernel has no hugetlbfs');
      return;
    }
    let file = -1;
    try {
      file = fs.openSync(join(huge, 'pages'), O_RDWR | fs.constants.O_CREAT);
      fs.ftruncateSync(file, 64 << 20);
      const client = daemon.session();
      const { frontend, queues } = client.driver;
      const queue = queues[1] as QueueDriver;
      const region = { guestAddress: 2 ** 40, size: (64 << 20) - 4096, userAddress: 2 ** 41, mmapOffset: 0 };
      const mappings = () =>
        daemon
          .proc('maps')
          .split('\n')
          .filter((line) => line.includes('/pages')).length;
      for (let i = 0; i < 5; i++) {
        frontend.addMemReg(describeRegion(region), file);
        assert.equal(mappings(), 1);
        // A request there: the first byte is a SIGBUS.
        queue.setDescriptor(0, { address: 2 ** 40 + 12_345, length: 56, flags: 0 });
        queue.sendRaw(0);
        await daemon.until(() => queue.takeErrors() > 0);
        frontend.remMemReg(describeRegion(region));
        assert.equal(mappings(), 0);
        for (const { index } of queues) restartQueue(client, index);
        assertServes(client, [0, 1]);
      }
      await daemon.disconnect(client);
    } finally {
      if (file >= 0) fs.closeSync(file);
      execFileSync('umount', ['-l', huge]);
      fs.rmdirSync(huge);
    }
  });
});

describe('order and values', () => {
  test('rings of every size, number and place', async () => {
    await using target = await Target.start();
    const client = target.daemon.session();
    const { driver } = client;
    const { frontend } = driver;
    const baseline = await target.descriptors();
    const refused = (send: () => void) => assert.throws(send, /was answered with 1/);
    frontend.getVringBase(1);
    for (const num of [0, 3, 127, 129, 32769, 65536, 0x80000000, 0xffffffff]) refused(() => frontend.setVringNum(1, num));
    for (const index of [66, 200, 255, 0xffffffff]) {
      refused(() => frontend.setVringNum(index, 128));
      refused(() => frontend.setVringBase(index, 0));
      refused(() => frontend.setVringEnable(index, true));
      refused(() => frontend.setVringAddr({ index, flags: 0, descriptor: 0n, available: 0n, used: 0n, log: 0n }));
    }
    refused(() => frontend.setVringKick(200, (driver.queues[1] as QueueDriver).kickFd));
    frontend.send('SET_VRING_KICK', 1n | NO_FD, [], true);
    assert.equal(frontend.receiveReply('SET_VRING_KICK'), 1n);
    for (const address of [0n, 1n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 16n]) {
      frontend.send(
        'SET_VRING_ADDR',
        { index: 1, flags: 1, descriptor: address, available: address, used: address, log: address },
        [],
        true,
      );
      frontend.receiveReply('SET_VRING_ADDR');
      frontend.send('SET_VRING_KICK', 1n, [(driver.queues[1] as QueueDriver).kickFd], true);
      assert.equal(frontend.receiveReply('SET_VRING_KICK'), 1n);
    }
    frontend.setVringBase(1, 0xffffffff);
    for (let i = 0; i < 20; i++) {
      frontend.getVringBase(1);
      frontend.setVringEnable(1, i % 2 === 0);
    }
    for (const bit of [0n, 1n << 26n, 1n << 34n, 1n << 63n, 2n ** 64n - 1n]) {
      frontend.send('SET_FEATURES', bit, [], true);
      frontend.receiveReply('SET_FEATURES');
    }
    refused(() => frontend.setProtocolFeatures(2n ** 64n - 1n));
    driver.setFeatures();
    restartQueue(client, 1);
    assertServes(client, [0, 1]);
    assert.equal(await target.descriptors(baseline), baseline);
  });

  test('memory that cannot be', async () => {
    await using target = await Target.start();
    const { daemon } = target;
    const client = daemon.session();
    const { frontend } = client.driver;
    assertServes(client);
    const baseline = await target.descriptors();
    const fd = native.memfdCreate(cString('memory'), 1 << 20);
    const good = { guestAddress: 1n << 40n, size: 1n << 20n, userAddress: 1n << 41n, mmapOffset: 0n };
    for (const wrong of [
      { size: 0n },
      { size: (1n << 20n) + 1n },
      { size: 2n ** 63n },
      { size: 2n ** 64n - 1n },
      { guestAddress: 0n },
      { guestAddress: 2n ** 64n - 4096n },
      { userAddress: 2n ** 64n - 4096n },
      { mmapOffset: 1n },
      { mmapOffset: 1n << 20n },
      { mmapOffset: 2n ** 63n },
      { mmapOffset: 2n ** 64n - 4096n },
    ]) {
      frontend.send('ADD_MEM_REG', { ...good, ...wrong }, [fd], true);
      assert.equal(
        frontend.receiveReply('ADD_MEM_REG'),
        1n,
        JSON.stringify(wrong, (_, v) => String(v)),
      );
    }
    assertServes(client);
    // As many as there is room for, and more.
    let added = 0;
    for (let i = 0; i < 600; i++) {
      frontend.send('ADD_MEM_REG', { ...good, guestAddress: (1n << 40n) + BigInt(i << 20) }, [fd], true);
      if (frontend.receiveReply('ADD_MEM_REG') === 0n) added++;
    }
    assert.equal(added, 508);
    assertServes(client);
    // One each, for a worker that may follow.
    assert.equal(await target.descriptors(baseline + added), baseline + added);
    // A table of regions that do not exist: the device has no memory then, and gets it back.
    frontend.send(
      'SET_MEM_TABLE',
      Array.from({ length: 8 }, () => good),
      new Array<number>(8).fill(fd),
      true,
    );
    assert.equal(frontend.receiveReply('SET_MEM_TABLE'), 1n);
    await daemon.disconnect(client);
    native.close(fd);
    const maps = daemon
      .proc('maps')
      .split('\n')
      .filter((line) => /memfd:(memory|guest-memory)/.test(line));
    assert.deepEqual(maps, []);
    assertServes(daemon.session());
  });

  test('acknowledgements only where they were agreed on, and one for each message', async () => {
    await using target = await Target.start();
    const frontend = VhostUserFrontend.connect(target.daemon.socket);
    frontend.send('SET_OWNER', undefined, [], true);
    frontend.send('SET_VRING_NUM', { index: 0, num: 3 }, [], true);
    assert.ok(!frontend.readable(100));
    frontend.getFeatures();
    frontend.setProtocolFeatures(REPLY_ACK);
    for (let i = 0; i < 100; i++) frontend.send('SET_VRING_NUM', { index: 0, num: i }, [], i % 2 === 0);
    for (let i = 0; i < 100; i += 2) assert.equal(frontend.receiveReply('SET_VRING_NUM'), [2, 4, 8, 16, 32, 64].includes(i) ? 0n : 1n);
    // A request with a reply of its own has one, not two.
    frontend.send('GET_FEATURES', undefined, [], true);
    assert.ok(frontend.receiveReply('GET_FEATURES') !== 0n);
    assert.ok(!frontend.readable(100));
    // Without its protocol feature, and the dirty log, which this device does not have.
    frontend.send('ADD_MEM_REG', { guestAddress: 0n, size: 4096n, userAddress: 0n, mmapOffset: 0n }, [native.eventfd(0)], true);
    assert.equal(frontend.receiveReply('ADD_MEM_REG'), 1n);
    const log = native.memfdCreate(cString('log'), 4096);
    for (const size of [0n, 4096n, 2n ** 63n]) {
      frontend.send('SET_LOG_BASE', { size, offset: 0n }, [log], true);
      assert.notEqual(frontend.receiveReply('SET_LOG_BASE'), 0n);
    }
    for (let i = 0; i < 100; i++) frontend.send('SET_LOG_FD', undefined, [log], true);
    native.close(log);
    const memory = new MockMemory();
    frontend.send('SET_FEATURES', features(Feature.LOG_ALL), [], false);
    memory.close();
    await gone(target, frontend);
    assertServes(target.daemon.session());
  });
});
