/** Split virtqueues: what both sides of a ring see, at every edge, and with a driver that does not keep to the rules. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { closeSync, openSync } from 'node:fs';
import { afterEach, describe, it } from 'node:test';
import { Worker } from 'node:worker_threads';
import fc from 'fast-check';
import { BusyLoop, ChainError, DescriptorChain, GuestMemory, VhostUserFrontend, Virtqueue } from 'vhost-user-ts';
import { arena, arenaAlloc, arenaFree, native, OffloadOp } from 'vhost-user-ts/native';
import { DescriptorFlag, MockDriver, needEvent, type RawDescriptor } from 'vhost-user-ts/testing';
import { meet, Word } from '../support/litmus.js';
import { QueueRig, type RigOptions } from '../support/queue-rig.js';
import { echo } from '../support/vhost-user.js';

const GIB = 2 ** 30;
const { NEXT, WRITE, INDIRECT } = DescriptorFlag;

let rigs: QueueRig[] = [];

function rig(options: RigOptions = {}): QueueRig {
  const made = new QueueRig(options);
  rigs.push(made);
  return made;
}

afterEach(() => {
  for (const made of rigs) made.close();
  rigs = [];
});

describe('chains', () => {
  for (const indirect of [false, true]) {
    it(`${indirect ? 'indirect' : 'direct'}: what is to be read comes first, then what may be written`, () => {
      const r = rig();
      const [a, b, out1, out2] = [r.put('hello '), r.put('world'), r.room(4), r.room(100)];
      r.driver.send([a, b], [out1, out2], indirect);
      assert.equal(r.queue.pop(), 1);
      const { chain } = r.queue;
      assert.deepEqual([chain.readableCount, chain.readableBytes, chain.writableCount, chain.writableBytes], [2, 11, 2, 104]);
      assert.equal(r.readable(), 'hello world');
      r.queue.push(chain.head, r.respond('HELLO WORLD'));
      r.queue.flush();
      const [used] = r.driver.collect();
      assert.equal(used?.length, 11);
      assert.equal(r.guest.read(out1.address, 4).toString() + r.guest.read(out2.address, 7).toString(), 'HELLO WORLD');
    });
  }

  it('may have only a readable or only a writable part, and empty descriptors', () => {
    const r = rig();
    r.driver.send([r.put('to read')]);
    r.driver.send([], [r.room(10)]);
    r.driver.send([{ address: 0xdead_0000_0000, length: 0 }, r.put('x')], [{ address: 0, length: 0 }]);
    assert.equal(r.serve(), 3);
    assert.deepEqual(
      r.driver.collect().map((used) => used.length),
      [0, 0, 0],
    );
  });

  it('of 1024 descriptors: direct in a ring of 1024', () => {
    const r = rig({ size: 1024 });
    const parts = Array.from({ length: 512 }, (_, i) => r.put(String.fromCharCode(97 + (i % 26))));
    const rooms = Array.from({ length: 512 }, () => r.room(1));
    assert.ok(r.driver.send(parts, rooms) >= 0);
    assert.equal(r.driver.freeDescriptors, 0);
    assert.equal(r.serve(), 1);
    assert.equal(r.driver.collect()[0]?.length, 512);
    const text = rooms.map((room) => r.guest.read(room.address, 1).toString()).join('');
    assert.equal(text, Array.from({ length: 512 }, (_, i) => String.fromCharCode(65 + (i % 26))).join(''));
  });

  it('of 1024 descriptors: indirect in a ring of 2', () => {
    const r = rig({ size: 2 });
    const parts = Array.from({ length: 1023 }, () => r.put('z'));
    assert.ok(r.driver.send(parts, [r.room(2000)], true) >= 0);
    assert.equal(r.serve(), 1);
    assert.equal(r.driver.collect()[0]?.length, 1023);
  });

  it('of 1025 descriptors is too long', () => {
    const r = rig({ size: 2 });
    r.driver.send(
      Array.from({ length: 1025 }, () => r.put('z')),
      [],
      true,
    );
    assert.ok(r.serve() < 0);
  });

  it('whose buffer crosses from one region into the next comes in two pieces', () => {
    const r = rig({
      regions: [
        { guestAddress: 0, size: 1 << 20 },
        { guestAddress: 1 << 20, size: 1 << 20 },
      ],
    });
    r.guest.write((1 << 20) - 3, Buffer.from('one'));
    r.guest.write(1 << 20, Buffer.from('two'));
    r.driver.send([{ address: (1 << 20) - 3, length: 6 }], [r.room(6)]);
    assert.equal(r.queue.pop(), 1);
    assert.equal(r.queue.chain.readableCount, 2);
    assert.equal(r.readable(), 'onetwo');
  });

  it('whose indirect table crosses from one region into the next', () => {
    const r = rig({
      regions: [
        { guestAddress: 0, size: 1 << 20 },
        { guestAddress: 1 << 20, size: 1 << 20 },
      ],
    });
    const [a, b] = [r.put('first '), r.put('second')];
    const split = new QueueTable(r, (1 << 20) - 16);
    split.put(0, { ...a, flags: NEXT, next: 1 });
    split.put(1, { ...b });
    r.driver.setDescriptor(0, { address: (1 << 20) - 16, length: 32, flags: INDIRECT });
    r.driver.sendRaw(0);
    assert.equal(r.queue.pop(), 1);
    assert.equal(r.readable(), 'first second');
  });

  it('lie anywhere in a region of more than 4 GiB, and so do the rings', () => {
    const base = 4 * GIB;
    const r = rig({
      size: 128,
      regions: [{ guestAddress: base, size: 9 * GIB }],
      descriptors: base + 5 * GIB,
      avail: base + 6 * GIB + 2,
      used: base + 8 * GIB - 64, // across 4 GiB windows of any size
    });
    for (const offset of [64, 4 * GIB - 8, 8 * GIB + 12_345, 9 * GIB - 64]) {
      r.guest.write(base + offset, Buffer.from('far away'));
      r.driver.send([{ address: base + offset, length: 8 }], [{ address: base + offset + 16, length: 8 }]);
      assert.equal(r.serve(), 1);
      assert.equal(r.driver.collect()[0]?.length, 8);
      assert.equal(r.guest.read(base + offset + 16, 8).toString(), 'FAR AWAY');
    }
  });

  it('in many regions', () => {
    const regions = Array.from({ length: 64 }, (_, i) => ({ guestAddress: i * 2 ** 32, size: 1 << 20 }));
    const r = rig({ regions, size: 64 });
    const parts = regions.map((_, i) => r.put(`${i % 10}`, i));
    assert.ok(r.driver.send(parts.slice(0, 63), [r.room(100, 63)]) >= 0);
    assert.equal(r.serve(), 1);
    assert.equal(r.driver.collect()[0]?.length, 63);
  });
});

/** Writes descriptors where a table crosses regions. */
class QueueTable {
  private readonly rig: QueueRig;
  private readonly address: number;
  constructor(r: QueueRig, address: number) {
    this.rig = r;
    this.address = address;
  }
  put(index: number, descriptor: RawDescriptor): void {
    this.rig.driver.writeTable(this.address + index * 16, [descriptor]);
  }
}

describe('ring indexes', () => {
  for (const size of [1, 2, 8, 256, 32768]) {
    it(`a ring of ${size} wraps at its size and at 65536`, () => {
      const r = rig({ size, base: 65_530 });
      const segment = r.put('abc');
      const room = r.room(3);
      for (let i = 0; i < 20; i++) {
        // In a ring of one only an indirect chain has two descriptors.
        assert.ok(r.driver.send([segment], [room], size === 1) >= 0);
        assert.equal(r.serve(), 1);
        assert.equal(r.driver.collect().length, 1);
      }
      assert.equal(r.queue.lastAvail, (65_530 + 20) & 0xffff);
      assert.equal(r.driver.deviceUsedIndex, (65_530 + 20) & 0xffff);
    });
  }

  it('a full ring is served whole, many times around', () => {
    const r = rig({ size: 8 });
    const segments = Array.from({ length: 8 }, (_, i) => r.put(`${i}`));
    for (let round = 0; round < 10_000; round++) {
      for (const segment of segments) assert.ok(r.driver.add([segment]) >= 0);
      assert.equal(r.driver.add([segments[0] as never]), -1, 'full');
      r.driver.publish();
      assert.equal(r.serve(), 8);
      assert.equal(r.driver.collect().length, 8);
    }
    assert.equal(r.driver.deviceUsedIndex, 80_000 & 0xffff);
  });

  it('chains may come back in another order', () => {
    const r = rig({ size: 8 });
    const heads = ['a', 'b', 'c'].map((text) => r.driver.add([r.put(text)], [r.room(1)]));
    r.driver.publish();
    const taken: number[] = [];
    while (r.queue.pop() === 1) taken.push(r.queue.chain.head);
    assert.deepEqual(taken, heads);
    assert.equal(r.queue.inFlight, 3);
    for (const head of taken.reverse()) r.queue.push(head, 0);
    r.queue.flush();
    assert.deepEqual(
      r.driver.collect().map((used) => used.head),
      heads.reverse(),
    );
    assert.equal(r.queue.inFlight, 0);
  });

  it('nothing is seen before it is published', () => {
    const r = rig();
    r.driver.add([r.put('x')], [r.room(1)]);
    assert.equal(r.queue.pending, false);
    assert.equal(r.queue.pop(), 0);
    r.driver.publish();
    assert.equal(r.queue.pending, true);
    assert.equal(r.queue.pop(), 1);
    r.queue.push(r.queue.chain.head, 1);
    assert.equal(r.driver.ready, false);
    r.queue.publish();
    assert.equal(r.driver.ready, true);
  });

  it('a ring that is taken up again goes on from its used index', () => {
    const r = rig({ base: 100 });
    r.driver.send([r.put('one')]);
    r.serve();
    r.queue.stop();
    assert.equal(r.queue.pop(), 0);
    assert.equal(r.queue.start(8, r.ringAddresses(), r.queue.lastAvail, { eventIdx: false, indirect: true }), undefined);
    r.driver.send([r.put('two')]);
    assert.equal(r.serve(), 1);
    assert.deepEqual(r.driver.collect().length, 2);
  });

  it('addresses that are not aligned, or beyond memory, start nothing', () => {
    const r = rig();
    const good = r.ringAddresses();
    for (const bad of [
      { descriptors: good.descriptors + 8 },
      { avail: good.avail + 1 },
      { used: good.used + 2 },
      { used: 16 },
      { avail: 2 ** 52 },
    ]) {
      const queue = new Virtqueue(0, r.memory, new DescriptorChain());
      assert.notEqual(queue.start(8, { ...good, ...bad }, 0, { eventIdx: false, indirect: false }), undefined);
      assert.equal(queue.pop(), 0);
      assert.equal(queue.enableKicks(), false);
      queue.flush();
    }
  });
});

describe('notifications', () => {
  it('without EVENT_IDX the driver’s flag decides on calls', () => {
    const r = rig();
    r.driver.send([r.put('a')]);
    r.serve();
    assert.equal(r.driver.takeCalls(), 1);
    r.driver.wantCalls(false);
    r.driver.send([r.put('b')]);
    r.serve();
    assert.equal(r.driver.takeCalls(), 0);
    r.driver.wantCalls(true);
    r.driver.send([r.put('c')]);
    r.serve();
    assert.equal(r.driver.takeCalls(), 1);
    assert.deepEqual([r.queue.interruptsSent, r.queue.interruptsSaved], [2, 1]);
  });

  it('without EVENT_IDX the device’s flag decides on kicks', () => {
    const r = rig();
    r.queue.disableKicks();
    assert.ok(r.driver.kicksSuppressed);
    r.driver.send([r.put('a')]);
    assert.equal(r.driver.kicks, 0);
    assert.equal(r.queue.enableKicks(), true, 'one came meanwhile');
    r.serve();
    assert.equal(r.queue.enableKicks(), false);
    r.driver.send([r.put('b')]);
    assert.equal(r.driver.kicks, 1);
  });

  it('with EVENT_IDX a batch is one call, and only when the driver’s mark is passed', () => {
    const r = rig({ eventIdx: true });
    for (let i = 0; i < 5; i++) r.driver.send([r.put('x')]);
    r.serve();
    assert.equal(r.driver.takeCalls(), 1);
    r.driver.wantCalls(false);
    r.driver.collect();
    r.driver.wantCalls(false);
    for (let i = 0; i < 5; i++) {
      r.driver.send([r.put('x')]);
      r.serve();
    }
    assert.equal(r.driver.takeCalls(), 0);
  });

  it('with EVENT_IDX kicks come for the first chain after the device went to sleep', () => {
    const r = rig({ eventIdx: true, base: 65_534 });
    assert.equal(r.queue.enableKicks(), false);
    assert.equal(r.driver.availEvent, 65_534);
    for (let i = 0; i < 4; i++) r.driver.send([r.put('x')]);
    assert.equal(r.driver.kicks, 1);
    assert.equal(r.driver.kicksSaved, 3);
    r.serve();
    assert.equal(r.queue.enableKicks(), false);
    r.driver.send([r.put('x')]);
    assert.equal(r.driver.kicks, 2);
  });

  it('is looked at for a moment before kicks are asked for, unless nothing ever comes', () => {
    const [a, b] = [rig({ eventIdx: true }), rig({ eventIdx: false })];
    const loop = new BusyLoop(2, 50_000);
    for (const { queue } of [a, b]) {
      queue.disableKicks();
      loop.add(queue);
    }
    a.driver.send([a.put('x')]);
    b.driver.send([b.put('x')]);
    assert.deepEqual([loop.next(true), loop.next(true)], [a.queue, b.queue], 'each in its turn');
    a.serve();
    b.serve();
    assert.equal(loop.next(false), undefined);
    assert.equal(loop.looked, 0, 'there was no need to look');
    assert.equal(loop.next(true), undefined);
    assert.ok(loop.looked >= 50_000, `${loop.looked} ns`);
    assert.equal(loop.next(true), undefined);
    const twice = loop.looked;
    assert.ok(twice >= 100_000, `${twice} ns`);
    for (let i = 0; i < 63; i++) assert.equal(loop.next(true), undefined);
    assert.equal(loop.looked, twice, 'not looked at for a while');
    assert.equal(loop.next(true), undefined);
    assert.ok(loop.looked > twice, 'and then once more');

    assert.equal(loop.enableKicks(), true);
    b.queue.disableKicks();
    b.driver.send([b.put('x')]);
    assert.equal(b.driver.kicks, 0);
    assert.equal(loop.enableKicks(), false, 'a chain waits');
    loop.remove(b.queue);
    assert.equal(loop.next(true), undefined, 'removed');
    a.driver.send([a.put('x')]);
    assert.equal(loop.next(true), a.queue);
  });

  it('is found changed by another thread while it is looked at', () => {
    const [table, word, iov] = [arenaAlloc(64), arenaAlloc(16), arenaAlloc(16)];
    const address = native.arenaAddress() + word;
    arena.u32[word >> 2] = 0xffff;
    arena.f64[(table + 8) >> 3] = 0; // skipped
    arena.f64[(table + 24) >> 3] = address;
    arena.u32[(table + 32) >> 2] = 0xffff;
    assert.equal(native.busyLoop(table, 2, 1000), -1);
    new BigUint64Array(arena.buffer.buffer, iov, 2).set([BigInt(address), 2n]);
    const zero = openSync('/dev/zero', 'r');
    assert.ok(native.offloadStart(1) >= 0);
    assert.equal(native.offloadSubmit(0, OffloadOp.read, zero, iov, 1, 0, 2, 0, -1, 0, 0), 0);
    assert.equal(native.busyLoop(table, 2, 60e9), 1);
    assert.equal(native.offloadStop(), 0);
    closeSync(zero);
    arenaFree(table, 64);
    arenaFree(word, 16);
    arenaFree(iov, 16);
  });

  it('publishing nothing calls nobody', () => {
    const r = rig({ eventIdx: true });
    r.queue.flush();
    r.queue.flush();
    assert.equal(r.driver.takeCalls(), 0);
  });

  it('whatever the two do, a driver that waits for calls is called', () => {
    fc.assert(
      fc.property(
        fc.nat(0xffff),
        fc.array(fc.integer({ min: 1, max: 8 }), { minLength: 1, maxLength: 60 }),
        fc.boolean(),
        (base, batches, eventIdx) => {
          const r = new QueueRig({ base, eventIdx, size: 8, regions: [{ guestAddress: 0, size: 1 << 18 }] });
          try {
            const segment = r.put('x');
            r.queue.enableKicks();
            for (const count of batches) {
              const kicks = r.driver.kicks;
              for (let i = 0; i < count; i++) r.driver.send([segment]);
              assert.ok(r.driver.kicks > kicks, 'the sleeping device is kicked');
              assert.equal(r.serve(), count);
              assert.equal(r.queue.enableKicks(), false);
              assert.equal(r.driver.takeCalls(), 1, 'the waiting driver is called once');
              assert.equal(r.driver.collect().length, count);
            }
          } finally {
            r.close();
          }
        },
      ),
      { numRuns: 60 },
    );
  });

  it('needEvent is the specification’s comparison', () => {
    assert.equal(needEvent(0, 1, 0), true);
    assert.equal(needEvent(1, 1, 0), false);
    assert.equal(needEvent(65_535, 2, 65_534), true);
    assert.equal(needEvent(3, 2, 65_534), false);
  });
});

describe('the store-buffering litmus, with two threads', () => {
  for (const eventIdx of [true, false]) {
    it(`never do both sides of a ring ${eventIdx ? 'with' : 'without'} EVENT_IDX rely on the other to wake them`, async () => {
      const words = new Int32Array(new SharedArrayBuffer(64));
      const worker = new Worker(new URL('../support/litmus.js', import.meta.url), {
        workerData: { litmus: true, eventIdx, words: words.buffer },
      });
      const [{ fd, region, addresses }] = await once(worker, 'message');
      const memory = new GuestMemory();
      assert.equal(memory.add(region, fd), 0);
      const queue = new Virtqueue(0, memory, new DescriptorChain());
      assert.equal(queue.start(8, addresses, 0, { eventIdx, indirect: false }), undefined);
      let lostKicks = 0;
      let lostCalls = 0;
      let rounds = 0;
      // Both threads spin: where other processes take their processors, a round takes milliseconds.
      const start = performance.now();
      const time = (): number => performance.now() - start;
      for (let step = 0; rounds < 100_000 && (time() < 2000 || (rounds <= 100 && time() < 60_000)); rounds++) {
        queue.disableKicks();
        meet(words, Word.device, Word.driver, ++step);
        const more = queue.enableKicks();
        meet(words, Word.device, Word.driver, ++step);
        if (!more && Atomics.load(words, Word.kicked) === 0) lostKicks++;
        assert.equal(queue.pop(), 1);
        queue.push(queue.chain.head, 0);
        meet(words, Word.device, Word.driver, ++step);
        const wanted = queue.publish();
        meet(words, Word.device, Word.driver, ++step);
        if (!wanted && Atomics.load(words, Word.ready) === 0) lostCalls++;
      }
      Atomics.store(words, Word.stop, 1);
      await once(worker, 'exit');
      queue.stop();
      memory.clear();
      assert.ok(rounds > 100, `${rounds} rounds`);
      assert.deepEqual({ lostKicks, lostCalls }, { lostKicks: 0, lostCalls: 0 }, `in ${rounds} rounds`);
    });
  }

  it('and a device that sleeps between kicks answers every time', async () => {
    const { frontend, backendFd } = VhostUserFrontend.pair();
    const worker = new Worker(new URL('../support/echo-thread.js', import.meta.url), { workerData: { socket: backendFd } });
    const driver = new MockDriver(frontend, { queues: 3 }).start();
    const [queue] = driver.queues;
    assert.ok(queue);
    assert.equal(echo(driver, queue, 'two threads'), 'two threads');
    const segment = { address: driver.memory.allocate(64), length: 8 };
    const end = performance.now() + 1500;
    let rounds = 0;
    for (; rounds < 20_000 && performance.now() < end; rounds++) {
      queue.send([segment], []);
      assert.equal(queue.collectAll(1, 2000).length, 1, `round ${rounds}`);
    }
    assert.ok(rounds > 20);
    driver.close();
    await once(worker, 'exit');
  });
});

describe('a driver that does not keep to the rules', () => {
  /** One chain of descriptors at 0, 1, 2…, offered at head 0. */
  type Case = [what: string, error: number, build: (r: QueueRig, address: number) => RawDescriptor[] | number];

  const cases: Case[] = [
    ['a head beyond the ring', ChainError.headOutOfRange, () => 8],
    ['a head of 65535', ChainError.headOutOfRange, () => 65_535],
    ['a next beyond the ring', ChainError.nextOutOfRange, (_, address) => [{ address, length: 4, flags: NEXT, next: 8 }]],
    ['a chain that is a loop of one', ChainError.tooLong, (_, address) => [{ address, length: 4, flags: NEXT, next: 0 }]],
    [
      'a chain that is a loop of two',
      ChainError.tooLong,
      (_, address) => [
        { address, length: 4, flags: NEXT, next: 1 },
        { address, length: 4, flags: NEXT, next: 0 },
      ],
    ],
    ['a loop of empty descriptors', ChainError.tooLong, () => [{ address: 0, length: 0, flags: NEXT, next: 0 }]],
    ['an address in no region', ChainError.badAddress, () => [{ address: 2 ** 40, length: 4 }]],
    ['a buffer that runs over the end of memory', ChainError.badAddress, () => [{ address: (64 << 20) - 4, length: 8 }]],
    ['a buffer at the very end of the address space', ChainError.badAddress, () => [{ address: 2n ** 64n - 4n, length: 4 }]],
    ['a buffer that wraps around 2^64', ChainError.badAddress, () => [{ address: 2n ** 64n - 4n, length: 8 }]],
    ['a buffer of 4 GiB - 1', ChainError.badAddress, () => [{ address: 0, length: 0xffff_ffff }]],
    [
      'a readable descriptor after a writable one',
      ChainError.readableAfterWritable,
      (_, address) => [
        { address, length: 4, flags: WRITE | NEXT, next: 1 },
        { address, length: 4 },
      ],
    ],
    ['an indirect table of no descriptors', ChainError.indirectSize, (_, address) => [{ address, length: 0, flags: INDIRECT }]],
    ['an indirect table of an odd size', ChainError.indirectSize, (_, address) => [{ address, length: 24, flags: INDIRECT }]],
    ['an indirect table of 1025 descriptors', ChainError.indirectSize, (_, address) => [{ address, length: 1025 * 16, flags: INDIRECT }]],
    ['an indirect table of 4 GiB', ChainError.indirectSize, (_, address) => [{ address, length: 0xffff_fff0, flags: INDIRECT }]],
    ['an indirect table in no region', ChainError.badAddress, () => [{ address: 2 ** 41, length: 16, flags: INDIRECT }]],
    [
      'an indirect table that runs over the end of memory',
      ChainError.badAddress,
      () => [{ address: (64 << 20) - 16, length: 32, flags: INDIRECT }],
    ],
    ['an indirect table that wraps around 2^64', ChainError.badAddress, () => [{ address: 2n ** 64n - 16n, length: 32, flags: INDIRECT }]],
    [
      'an indirect descriptor with a next',
      ChainError.indirectWithNext,
      (_, address) => [{ address, length: 16, flags: INDIRECT | NEXT, next: 1 }],
    ],
    [
      'an indirect table in an indirect table',
      ChainError.indirectInIndirect,
      (r, address) => {
        r.driver.writeTable(address, [{ address, length: 16, flags: INDIRECT }]);
        return [{ address, length: 16, flags: INDIRECT }];
      },
    ],
    [
      'an indirect table whose next leaves it',
      ChainError.nextOutOfRange,
      (r, address) => {
        r.driver.writeTable(address, [{ address, length: 4, flags: NEXT, next: 1 }]);
        return [{ address, length: 16, flags: INDIRECT }];
      },
    ],
    [
      'an indirect table that is a loop',
      ChainError.tooLong,
      (r, address) => {
        r.driver.writeTable(address, [{ address, length: 4, flags: NEXT, next: 0 }]);
        return [{ address, length: 16, flags: INDIRECT }];
      },
    ],
  ];

  for (const [what, error, build] of cases) {
    it(`${what} is refused`, () => {
      const r = rig();
      const address = r.guest.allocate(4096, 4096);
      const built = build(r, address);
      if (typeof built === 'number') r.driver.sendRaw(built);
      else {
        for (const [i, descriptor] of built.entries()) r.driver.setDescriptor(i, descriptor);
        r.driver.sendRaw(0);
      }
      assert.equal(r.queue.pop(), error);
      assert.equal(r.queue.pop(), error, 'and again: it does not go away');
    });
  }

  it('an indirect descriptor that was not negotiated is refused', () => {
    const r = rig({ indirect: false });
    r.driver.send([r.put('x'), r.put('y')], [], true);
    assert.equal(r.queue.pop(), ChainError.indirectNotNegotiated);
  });

  it('a chain of more than 4 GiB is refused', () => {
    const r = rig({ regions: [{ guestAddress: 0, size: 5 * GIB }] });
    for (const i of [0, 1]) r.driver.setDescriptor(i, { address: 0, length: 3 * GIB, flags: i === 0 ? NEXT : 0, next: 1 });
    r.driver.sendRaw(0);
    assert.equal(r.queue.pop(), ChainError.tooManyBytes);
  });

  it('an avail index that jumps by more than the ring is refused; by the whole ring it is fine', () => {
    for (const [jump, expected] of [
      [8, 1],
      [9, ChainError.availJump],
      [0x8000, ChainError.availJump],
      [0xffff, ChainError.availJump],
    ] as const) {
      const r = rig();
      r.driver.setDescriptor(0, { address: 4096, length: 4 });
      r.driver.setAvailIndex(jump);
      assert.equal(r.queue.pop(), expected, `jump by ${jump}`);
    }
  });

  it('whatever stands in the ring, the device ends in a chain within guest memory or an error', () => {
    const r = rig({
      size: 16,
      regions: [
        { guestAddress: 0, size: 1 << 20 },
        { guestAddress: 1 << 20, size: 1 << 16 },
        { guestAddress: 2 ** 33, size: 1 << 16 },
      ],
    });
    const mapped = r.guest.regions.map(({ guestAddress, size }) => {
      const start = r.memory.translate(guestAddress);
      return [start, start + size] as const;
    });
    const table = r.guest.allocate(16 * 64);
    const address = fc.oneof(
      fc.nat(1 << 20).map(BigInt),
      fc.constantFrom(0n, (1n << 20n) - 8n, (1n << 20n) + 65_000n, 1n << 33n, BigInt(table), 2n ** 64n - 1n, 2n ** 63n, 2n ** 53n),
      fc.bigInt(0n, 2n ** 64n - 1n),
    );
    const length = fc.oneof(fc.nat(64), fc.constantFrom(0, 16, 32, 17, 65_536, 0x7fff_ffff, 0xffff_ffff));
    const flags = fc.oneof(fc.nat(7), fc.constantFrom(0, 1, 2, 3, 4), fc.nat(0xffff));
    const descriptor = fc.record({ address, length, flags, next: fc.oneof(fc.nat(17), fc.nat(0xffff)) }, { noNullPrototype: true });
    let chains = 0;
    fc.assert(
      fc.property(
        fc.array(descriptor, { minLength: 16, maxLength: 16 }),
        fc.array(descriptor, { minLength: 1, maxLength: 64 }),
        fc.array(fc.oneof(fc.nat(15), fc.nat(0xffff)), { minLength: 1, maxLength: 20 }),
        (direct, indirect, heads) => {
          for (const [i, one] of direct.entries()) r.driver.setDescriptor(i, one);
          r.driver.writeTable(table, indirect);
          r.driver.setAvailIndex(r.queue.lastAvail);
          for (const head of heads) r.driver.offer(head);
          r.driver.publish();
          for (let i = 0; i <= heads.length; i++) {
            const result = r.queue.pop();
            if (result <= 0) {
              // What was refused stays at the front: the next run starts behind it.
              if (result < 0) restart(r);
              return;
            }
            chains++;
            const vectors = r.iovecs();
            const { chain } = r.queue;
            assert.ok(vectors.length <= 1024);
            for (const [start, bytes] of vectors) {
              assert.ok(bytes > 0 && mapped.some(([low, high]) => start >= low && start + bytes <= high), 'within guest memory');
            }
            const sum = vectors.reduce((total, [, bytes]) => total + bytes, 0);
            assert.equal(sum, chain.readableBytes + chain.writableBytes);
            r.queue.push(chain.head, 0);
          }
        },
      ),
      { numRuns: 3000 },
    );
    assert.ok(chains > 100, `${chains} chains were good`);
  });

  function restart(r: QueueRig): void {
    const base = r.queue.lastAvail;
    r.queue.stop();
    assert.equal(r.queue.start(r.driver.size, r.ringAddresses(), base, { eventIdx: false, indirect: true }), undefined);
  }
});
