/** The back end's session: negotiation as real front ends do it, ring states, memory changes, acknowledgements, framing. */
import assert from 'node:assert/strict';
import { afterEach, describe, it } from 'node:test';
import {
  encodeFrontendMessage,
  Feature,
  FRONTEND_MESSAGES,
  type FrontendName,
  type FrontendPayload,
  features,
  HEADER_SIZE,
  HeaderFlag,
  MAX_MESSAGE,
  type MessageSpec,
  NO_FD,
  type PayloadKind,
  ProtocolFeature,
  SUPPORTED_PROTOCOL_FEATURES,
  VhostUserError,
} from 'vhost-user-ts';
import { cString, native } from 'vhost-user-ts/native';
import { describeRegion, type MockDriver, MockMemory, type QueueDriver } from 'vhost-user-ts/testing';
import { EchoDevice, echo, openFds, Session } from '../support/vhost-user.js';

let sessions: Session[] = [];

function session(...args: ConstructorParameters<typeof Session>): Session {
  const made = new Session(...args);
  sessions.push(made);
  return made;
}

afterEach(() => {
  for (const made of sessions) made.close();
  sessions = [];
});

function queue(driver: MockDriver, index: number): QueueDriver {
  return driver.queues[index] as QueueDriver;
}

function refusal(action: () => void): number {
  try {
    action();
  } catch (error) {
    if (error instanceof VhostUserError && error.kind === 'refused') return error.value;
    throw error;
  }
  return 0;
}

describe('negotiation', () => {
  it('in QEMU’s order, with memory slots, three call descriptors and an unused queue', () => {
    const s = session();
    const driver = s.drive({ order: 'qemu', unused: [2] }).start();
    assert.equal(driver.protocolFeatures, SUPPORTED_PROTOCOL_FEATURES);
    assert.equal(driver.queueNum, 3);
    assert.equal(driver.features, s.backend.offered & ~features(Feature.LOG_ALL));
    assert.equal(echo(driver, queue(driver, 0), 'hiprio'), 'hiprio');
    assert.equal(echo(driver, queue(driver, 1), 'request', true), 'request');
    assert.deepEqual(s.device.events, ['features 170000000', 'started 0', 'started 1']);
    assert.deepEqual(s.device.lines, []);
  });

  it('in QEMU’s order with a memory table', () => {
    const s = session();
    const driver = s.drive({ protocolFeatures: ~features(ProtocolFeature.CONFIGURE_MEM_SLOTS) }).start();
    assert.equal(echo(driver, queue(driver, 1), 'table'), 'table');
  });

  it('in User Mode Linux’ order, with a memory table that is one region too long', () => {
    const s = session();
    const driver = s.drive({ order: 'uml' }).start();
    assert.equal(s.backend.memory.regionCount, 1);
    assert.equal(echo(driver, queue(driver, 2), 'uml', true), 'uml');
    assert.deepEqual(s.frontend.getConfig(0, 44), s.device.configuration);
  });

  it('without protocol features: rings are enabled from the start', () => {
    const s = session();
    const driver = s.drive({ features: features(Feature.VERSION_1), order: 'qemu' });
    driver.offered = s.frontend.getFeatures();
    driver.setFeatures();
    driver.shareMemory();
    for (const q of driver.queues) {
      s.frontend.setVringCall(q.index, q.callFd);
      driver.placeQueue(q);
      s.frontend.setVringKick(q.index, q.kickFd);
    }
    assert.equal(echo(driver, queue(driver, 1), 'old'), 'old');
  });

  it('without EVENT_IDX and indirect descriptors', () => {
    const s = session();
    const driver = s.drive({ features: features(Feature.VERSION_1, Feature.PROTOCOL_FEATURES) }).start();
    assert.equal(echo(driver, queue(driver, 1), 'plain'), 'plain');
    assert.equal(queue(driver, 1).eventIdx, false);
  });

  it('features that were not offered are refused', () => {
    const { frontend } = session();
    frontend.setProtocolFeatures(features(ProtocolFeature.REPLY_ACK));
    assert.notEqual(
      refusal(() => frontend.setFeatures(features(Feature.RING_PACKED))),
      0,
    );
    assert.notEqual(
      refusal(() => frontend.setProtocolFeatures(features(ProtocolFeature.REPLY_ACK, ProtocolFeature.STATUS))),
      0,
    );
  });
});

describe('ring states', () => {
  it('a kick before ENABLE is not lost, and not served too early', () => {
    const s = session();
    const driver = s.drive();
    driver.initialise();
    driver.setFeatures();
    driver.shareMemory();
    const q = queue(driver, 1);
    driver.placeQueue(q);
    s.frontend.setVringCall(1, q.callFd);
    s.frontend.setVringKick(1, q.kickFd);
    const address = driver.memory.allocate(64);
    q.send([{ address, length: 8 }], [{ address: address + 8, length: 8 }]);
    s.turn();
    assert.deepEqual(s.device.served, []);
    s.frontend.setVringEnable(1, true);
    assert.equal(s.device.served[1], 1);
    assert.equal(q.collect().length, 1);
    assert.equal(q.takeCalls(), 1);
  });

  it('a disabled ring waits, and goes on when it is enabled again', () => {
    const s = session();
    const driver = s.drive().start();
    const q = queue(driver, 1);
    s.frontend.setVringEnable(1, false);
    const address = driver.memory.allocate(64);
    q.send([{ address, length: 8 }], []);
    s.turn();
    assert.equal(q.ready, false);
    s.frontend.setVringEnable(1, true);
    assert.equal(q.collectAll(1).length, 1);
  });

  it('the latest call descriptor is the one that is called, also for what is pending', () => {
    const s = session();
    const driver = s.drive().start();
    const q = queue(driver, 1);
    s.device.holding = true;
    const address = driver.memory.allocate(64);
    q.send([{ address, length: 8 }], []);
    s.turn();
    const first = native.dup(q.callFd);
    const second = native.eventfd(0);
    native.eventfdRead(first);
    s.frontend.setVringCall(1, second);
    native.eventfdRead(second);
    driver.replaceCall(q);
    q.takeCalls();
    s.device.release();
    assert.equal(q.takeCalls(), 1);
    assert.equal(native.eventfdRead(first), 0);
    assert.equal(native.eventfdRead(second), 0);
    native.close(first);
    native.close(second);
  });

  it('a call descriptor set after the completion is called too', () => {
    const s = session();
    const driver = s.drive().start();
    const q = queue(driver, 1);
    const address = driver.memory.allocate(64);
    q.send([{ address, length: 8 }], []);
    s.turn();
    driver.replaceCall(q);
    assert.equal(q.takeCalls(), 1);
  });

  it('a ring without a call descriptor is polled by its driver', () => {
    const s = session();
    const driver = s.drive().start();
    s.frontend.setVringCall(1);
    assert.equal(echo(driver, queue(driver, 1), 'polled'), 'polled');
  });

  it('GET_VRING_BASE stops the ring, gives back what was taken and says where it stood', () => {
    const s = session();
    const driver = s.drive().start();
    const q = queue(driver, 1);
    for (let i = 0; i < 5; i++) echo(driver, q, `${i}`);
    s.device.holding = true;
    const address = driver.memory.allocate(64);
    q.send([{ address, length: 8 }], []);
    s.turn();
    assert.equal(q.ready, false);
    assert.equal(s.frontend.getVringBase(1), 6);
    assert.equal(q.collect().length, 1, 'what the device held came back');
    q.add([{ address, length: 8 }]);
    q.publish();
    q.forceKick();
    s.turn();
    assert.equal(q.ready, false, 'a stopped ring is not served');
    s.device.holding = false;
    driver.placeQueue(q, 6);
    s.frontend.setVringKick(1, q.kickFd);
    assert.equal(q.collectAll(1).length, 1, 'and goes on where it stood');
    assert.deepEqual(s.device.events.slice(-3), ['started 2', 'stopping 1', 'started 1']);
  });

  it('GET_VRING_BASE of a ring that never ran gives the base it was set to', () => {
    const { frontend } = session();
    frontend.setVringBase(2, 4711);
    assert.equal(frontend.getVringBase(2), 4711);
  });

  it('stop and start again, as QEMU does for stop and cont', () => {
    const s = session();
    const driver = s.drive().start();
    const q = queue(driver, 1);
    echo(driver, q, 'before');
    const bases = driver.stop();
    assert.deepEqual(bases, [0, 1, 0]);
    for (const each of driver.queues) {
      driver.placeQueue(each, bases[each.index]);
      s.frontend.setVringKick(each.index, each.kickFd);
      s.frontend.setVringEnable(each.index, true);
    }
    assert.equal(echo(driver, q, 'after'), 'after');
  });

  it('RESET_DEVICE stops the rings and forgets them; the guest can start over', () => {
    const s = session();
    const driver = s.drive().start();
    echo(driver, queue(driver, 1), 'before');
    s.frontend.resetDevice();
    assert.deepEqual(s.device.events.slice(-4), ['stopping 0', 'stopping 1', 'stopping 2', 'reset']);
    for (const q of driver.queues) q.reset();
    for (const region of driver.memory.regions) s.frontend.remMemReg(describeRegion(region));
    driver.run();
    assert.equal(echo(driver, queue(driver, 1), 'rebooted'), 'rebooted');
  });

  it('a second SET_OWNER is another device on the same connection: nothing of the first is left', () => {
    const s = session();
    const driver = s.drive({ order: 'qemu' }).start();
    echo(driver, queue(driver, 1), 'before');
    driver.stop();
    for (const q of driver.queues) q.reset();
    driver.start();
    assert.equal(s.device.events.filter((event) => event === 'reset').length, 1);
    assert.equal(s.backend.memory.regionCount, driver.memory.regions.length);
    assert.equal(echo(driver, queue(driver, 1), 'plugged in again'), 'plugged in again');
  });

  it('what makes no ring is refused', () => {
    const s = session();
    const driver = s.drive();
    driver.initialise();
    driver.setFeatures();
    driver.shareMemory();
    const { frontend } = s;
    const q = queue(driver, 0);
    for (const size of [0, 3, 127, 65536, 0xffff_ffff])
      assert.notEqual(
        refusal(() => frontend.setVringNum(0, size)),
        0,
        `size ${size}`,
      );
    assert.notEqual(
      refusal(() => frontend.setVringNum(3, 128)),
      0,
      'vring 3 of 3',
    );
    assert.notEqual(
      refusal(() => frontend.setVringKick(0, q.kickFd)),
      0,
      'no addresses yet',
    );
    driver.placeQueue(q);
    assert.notEqual(
      refusal(() => frontend.setVringKick(0)),
      0,
      'polling is not supported',
    );
    const good = {
      index: 0,
      flags: 0,
      descriptor: driver.memory.userAddress(q.descriptors),
      used: driver.memory.userAddress(q.used),
      available: driver.memory.userAddress(q.avail),
      log: 0n,
    };
    const bad = [
      { descriptor: 0n },
      { descriptor: BigInt(q.descriptors) }, // a guest address
      { descriptor: good.descriptor + 8n },
      { available: good.available + 1n },
      { used: good.used + 2n },
      { used: driver.memory.userAddress(0) + BigInt((64 << 20) - 64) },
    ];
    for (const wrong of bad) {
      frontend.setVringAddr({ ...good, ...wrong });
      assert.notEqual(
        refusal(() => frontend.setVringKick(0, q.kickFd)),
        0,
        JSON.stringify(wrong, (_, v) => String(v)),
      );
    }
    assert.notEqual(
      refusal(() => frontend.setVringAddr({ ...good, descriptor: 2n ** 64n - 16n })),
      0,
      'beyond 2^53',
    );
    frontend.setVringAddr(good);
    frontend.setVringKick(0, q.kickFd);
    frontend.setVringEnable(0, true);
    assert.notEqual(
      refusal(() => frontend.setVringNum(0, 64)),
      0,
      'while it runs',
    );
    assert.notEqual(
      refusal(() => frontend.setVringBase(0, 5)),
      0,
      'while it runs',
    );
    assert.equal(echo(driver, q, 'none of this did any harm'), 'none of this did any harm');
  });

  it('a broken ring is reported by its error descriptor and left alone; the others go on, and a restart heals it', () => {
    const s = session();
    const driver = s.drive().start();
    const q = queue(driver, 1);
    q.sendRaw(1000);
    s.turn();
    assert.equal(q.takeErrors(), 1);
    assert.match(s.device.lines.join(), /queue 1 stopped/);
    q.forceKick();
    s.turn();
    assert.equal(q.takeErrors(), 0, 'reported once');
    assert.equal(echo(driver, queue(driver, 2), 'alive'), 'alive');
    s.frontend.setVringEnable(1, false);
    s.frontend.getVringBase(1);
    q.reset();
    driver.placeQueue(q, 0);
    s.frontend.setVringKick(1, q.kickFd);
    s.frontend.setVringEnable(1, true);
    assert.equal(echo(driver, q, 'healed'), 'healed');
  });
});

describe('memory', () => {
  it('regions can be added and removed while the rings run', () => {
    const s = session();
    const driver = s.drive().start();
    const region = driver.memory.add({ guestAddress: 8 * 2 ** 30, size: 1 << 20 });
    s.frontend.addMemReg(describeRegion(region), region.fd);
    const address = driver.memory.allocate(64, 16, 1);
    driver.memory.write(address, Buffer.from('hot plug'));
    const q = queue(driver, 1);
    q.send([{ address, length: 8 }], [{ address: address + 8, length: 8 }]);
    q.collectAll(1);
    assert.equal(driver.memory.read(address + 8, 8).toString(), 'hot plug');
    s.frontend.remMemReg(describeRegion(region), [region.fd]);
    assert.equal(s.backend.memory.regionCount, 1);
    q.send([{ address, length: 8 }], [{ address: address + 8, length: 8 }]);
    s.turn();
    assert.equal(q.takeErrors(), 1, 'the region is gone');
    assert.equal(echo(driver, queue(driver, 2), 'rest'), 'rest');
  });

  it('a new table with the same memory leaves the rings where they are', () => {
    const s = session();
    const driver = s.drive({ protocolFeatures: ~features(ProtocolFeature.CONFIGURE_MEM_SLOTS) }).start();
    echo(driver, queue(driver, 1), 'one');
    s.frontend.setMemTable(driver.memory.table(), driver.memory.fds());
    assert.equal(echo(driver, queue(driver, 1), 'two'), 'two');
  });

  it('a table without the rings’ memory stops them', () => {
    const s = session();
    const driver = s.drive({ protocolFeatures: ~features(ProtocolFeature.CONFIGURE_MEM_SLOTS) }).start();
    s.frontend.setMemTable([], []);
    queue(driver, 1).forceKick();
    s.turn();
    assert.equal(queue(driver, 1).takeErrors(), 1);
    s.frontend.setMemTable(driver.memory.table(), driver.memory.fds());
    s.turn();
    assert.ok(s.backend.connected);
  });

  it('regions that cannot be are refused, and leave nothing behind', () => {
    const s = session(new EchoDevice(), {}, 2);
    const driver = s.drive();
    driver.initialise();
    const { frontend } = s;
    assert.equal(frontend.getMaxMemSlots(), 2);
    const [fd] = driver.memory.fds() as [number];
    const region = { guestAddress: 0n, size: 1n << 20n, userAddress: 0x7f00_0000_0000n, mmapOffset: 0n };
    frontend.addMemReg(region, fd);
    const before = openFds();
    assert.notEqual(
      refusal(() => frontend.addMemReg(region, fd)),
      0,
      'twice',
    );
    assert.notEqual(
      refusal(() => frontend.addMemReg({ ...region, guestAddress: 0xf_f000n }, fd)),
      0,
      'overlapping',
    );
    assert.notEqual(
      refusal(() => frontend.addMemReg({ ...region, guestAddress: 1n << 30n, size: 0n }, fd)),
      0,
      'empty',
    );
    assert.notEqual(
      refusal(() => frontend.addMemReg({ ...region, guestAddress: 1n << 30n, size: 1n << 40n }, fd)),
      0,
      'longer than its file',
    );
    assert.notEqual(
      refusal(() => frontend.addMemReg({ ...region, guestAddress: 1n << 30n, mmapOffset: 1n << 60n }, fd)),
      0,
      'offset',
    );
    assert.notEqual(
      refusal(() => frontend.addMemReg({ ...region, guestAddress: 2n ** 64n - 4096n }, fd)),
      0,
      'wrapping',
    );
    assert.notEqual(
      refusal(() => frontend.addMemReg({ ...region, size: 2n ** 64n - 1n }, fd)),
      0,
      'of 2^64 - 1 bytes',
    );
    assert.notEqual(
      refusal(() => frontend.remMemReg({ ...region, size: 4096n })),
      0,
      'never added',
    );
    frontend.addMemReg({ ...region, guestAddress: 1n << 30n }, fd);
    assert.notEqual(
      refusal(() => frontend.addMemReg({ ...region, guestAddress: 2n << 30n }, fd)),
      0,
      'a third of two',
    );
    assert.equal(openFds(), before);
    assert.equal(s.backend.memory.regionCount, 2);
  });

  it('the dirty log has a bit for each page that the device wrote, and for the used ring where asked for', () => {
    const s = session();
    const driver = s.drive({ features: ~0n }).start();
    const q = queue(driver, 1);
    const log = native.memfdCreate(cString('log'), 8192);
    const map = native.regionMap(log, 0, 8192, 1);
    const bits = Buffer.from(native.regionBuffer(map, 0, 8192));
    const dirty = () => {
      const pages: number[] = [];
      for (const [at, byte] of bits.entries()) for (let bit = 0; bit < 8; bit++) if ((byte >> bit) & 1) pages.push(at * 8 + bit);
      return pages;
    };
    s.frontend.setLogBase(4096n, 4096n, log);
    s.frontend.setVringAddr({
      index: 1,
      flags: 1,
      descriptor: driver.memory.userAddress(q.descriptors),
      used: driver.memory.userAddress(q.used),
      available: driver.memory.userAddress(q.avail),
      log: BigInt(q.used),
    });
    const address = driver.memory.allocate(5 * 4096, 4096);
    q.send([{ address, length: 4100 }], [{ address: address + 8192 - 4, length: 8192 }]);
    q.collectAll(1);
    const first = 4096 * 8; // the log begins at byte 4096 of its file
    const page = address / 4096;
    const usedPage = Math.floor(q.used / 4096);
    assert.deepEqual(
      dirty(),
      [usedPage, page + 1, page + 2].map((p) => first + p),
    );
    // Only as much as was written, and nothing once logging is off.
    bits.fill(0);
    s.frontend.setFeatures(driver.features & ~features(Feature.LOG_ALL));
    echo(driver, q, 'not logged');
    assert.deepEqual(dirty(), []);
    native.regionUnmap(map);
    native.close(log);
  });

  it('a dirty log that cannot be mapped is refused', () => {
    const s = session();
    s.drive().initialise();
    const log = native.memfdCreate(cString('log'), 4096);
    assert.notEqual(
      refusal(() => s.frontend.setLogBase(8192n, 0n, log)),
      0,
      'longer than its file',
    );
    assert.notEqual(
      refusal(() => s.frontend.setLogBase(0n, 0n, log)),
      0,
      'empty',
    );
    assert.notEqual(
      refusal(() => s.frontend.setLogBase(2n ** 64n - 1n, 0n, log)),
      0,
    );
    s.frontend.setLogFd(log);
    s.frontend.setLogFd(log);
    native.close(log);
  });
});

describe('acknowledgements', () => {
  /** A payload for each message, good enough to be decoded; whether it is accepted does not matter. */
  const payloads: Partial<Record<PayloadKind, unknown>> = {
    none: undefined,
    u64: 0n,
    vringState: { index: 0, num: 0 },
    vringAddress: { index: 0, flags: 0, descriptor: 0n, used: 0n, available: 0n, log: 0n },
    memoryTable: [],
    memoryRegion: { guestAddress: 0n, size: 0n, userAddress: 0n, mmapOffset: 0n },
    log: { size: 0n, offset: 0n },
    iotlb: { iova: 0n, size: 0n, userAddress: 0n, permissions: 0, type: 2 },
    config: { offset: 0, flags: 0, data: new Uint8Array(4) },
    inflight: { mmapSize: 0n, mmapOffset: 0n, queues: 1, queueSize: 128 },
    uuid: new Uint8Array(16),
    deviceState: { direction: 0, phase: 0 },
    raw: new Uint8Array(8),
  };

  for (const name of Object.keys(FRONTEND_MESSAGES) as FrontendName[]) {
    const spec: MessageSpec = FRONTEND_MESSAGES[name];
    // Messages whose own reply the back end cannot give end the session: an unsupported one must not leave its sender waiting.
    const unanswerable = ['GET_INFLIGHT_FD', 'GET_SHARED_OBJECT', 'GET_SHMEM_CONFIG', 'CREATE_CRYPTO_SESSION', 'POSTCOPY_ADVISE'].includes(
      name,
    );

    it(`${name} with NEED_REPLY is answered once`, () => {
      const s = session();
      const { frontend } = s;
      frontend.setProtocolFeatures(SUPPORTED_PROTOCOL_FEATURES);
      const fd = native.eventfd(0);
      const fds = spec.fds === 1 || spec.fds === 'flag' ? [fd] : [];
      // Negotiating something else would take REPLY_ACK away.
      const payload = name === 'SET_PROTOCOL_FEATURES' ? SUPPORTED_PROTOCOL_FEATURES : payloads[spec.payload];
      frontend.send(name, payload as FrontendPayload<FrontendName>, fds, true);
      native.close(fd);
      if (unanswerable) {
        assert.ok(frontend.closedByPeer());
        return;
      }
      const { header } = frontend.receiveFrame();
      assert.equal(header.request, spec.request);
      assert.equal(header.flags, HeaderFlag.VERSION | HeaderFlag.REPLY);
      assert.equal(frontend.readable(), false, 'and only once');
      assert.equal(frontend.getFeatures(), s.backend.offered, 'the session goes on');
      if (s.device.transfer !== undefined) native.close(s.device.transfer.fd);
    });
  }

  it('nothing is acknowledged that did not ask for it, or before REPLY_ACK is negotiated', () => {
    const s = session();
    s.frontend.send('SET_OWNER', undefined, [], true);
    assert.equal(s.frontend.readable(), false);
    s.frontend.setProtocolFeatures(features(ProtocolFeature.REPLY_ACK));
    s.frontend.send('SET_OWNER', undefined, [], false);
    assert.equal(s.frontend.readable(), false);
    s.frontend.send('SET_OWNER', undefined, [], true);
    assert.equal(s.frontend.receiveReply('SET_OWNER'), 0n);
  });

  it('unknown and malformed messages are refused, not fatal', () => {
    const s = session();
    const { frontend } = s;
    frontend.setProtocolFeatures(features(ProtocolFeature.REPLY_ACK));
    for (const [request, kind, payload] of [
      [99, 'raw', new Uint8Array(20)],
      [0, 'none', undefined],
      [FRONTEND_MESSAGES.SET_VRING_NUM.request, 'u64', 0xffff_ffffn],
      [FRONTEND_MESSAGES.SET_OWNER.request, 'u64', 0n],
      [FRONTEND_MESSAGES.SET_FEATURES.request, 'none', undefined],
      [FRONTEND_MESSAGES.SET_MEM_TABLE.request, 'raw', Buffer.alloc(40, 1)],
    ] as const) {
      frontend.sendFrame(request, HeaderFlag.NEED_REPLY, kind as PayloadKind, payload as never);
      const { header, payload: reply } = frontend.receiveFrame();
      assert.equal(header.request, request);
      assert.notEqual(Buffer.from(reply).readBigUInt64LE(), 0n);
    }
    frontend.sendFrame(99, 0, 'none', undefined);
    assert.equal(frontend.getFeatures(), s.backend.offered);
  });

  it('messages of a protocol feature that was not negotiated are refused', () => {
    const s = session();
    const { frontend } = s;
    frontend.setProtocolFeatures(features(ProtocolFeature.REPLY_ACK));
    assert.notEqual(
      refusal(() => frontend.resetDevice()),
      0,
    );
    assert.notEqual(
      refusal(() => void frontend.getConfig(0, 4)),
      undefined,
    );
    assert.deepEqual(s.device.events, []);
  });
});

describe('configuration space', () => {
  it('is read in any part; what lies beyond is zero', () => {
    const s = session();
    s.drive().initialise();
    assert.deepEqual([...s.frontend.getConfig(0, 4)], [1, 2, 3, 4]);
    assert.deepEqual([...s.frontend.getConfig(43, 1)], [44], 'one byte at a time, as the generic device reads it');
    assert.deepEqual([...s.frontend.getConfig(42, 4)], [43, 44, 0, 0]);
    assert.deepEqual([...s.frontend.getConfig(0xffff_fff0, 4)], [0, 0, 0, 0]);
    assert.equal(s.frontend.getConfig(0, 256).length, 256);
    assert.equal(s.frontend.getConfig(0, 0).length, 0);
  });

  it('is written only where the device lets it', () => {
    const s = session();
    s.drive().initialise();
    const config = { offset: 4, flags: 0, data: Uint8Array.of(9, 9) };
    assert.notEqual(
      refusal(() => s.frontend.setConfig(config)),
      0,
    );
    s.device.writable = true;
    s.frontend.setConfig(config);
    assert.deepEqual([...s.frontend.getConfig(3, 4)], [4, 9, 9, 7]);
  });

  it('an error is a reply without payload', () => {
    const s = session();
    s.frontend.setProtocolFeatures(features(ProtocolFeature.REPLY_ACK));
    s.frontend.send('GET_CONFIG', { offset: 0, flags: 0, data: new Uint8Array(4) });
    const { header } = s.frontend.receiveFrame();
    assert.deepEqual(header, { request: 24, flags: 5, size: 0 });
  });
});

describe('device state', () => {
  it('goes over the front end’s descriptor', () => {
    const s = session();
    s.drive().initialise();
    const [reader, writer] = [native.eventfd(0), native.eventfd(0)];
    assert.equal(s.frontend.setDeviceStateFd({ direction: 0, phase: 0 }, writer), -1);
    assert.equal(s.device.transfer?.direction, 0);
    native.eventfdWrite(s.device.transfer?.fd ?? -1);
    assert.equal(native.eventfdRead(writer), 1, 'the same file');
    native.close(s.device.transfer?.fd ?? -1);
    assert.equal(s.frontend.checkDeviceState(), 0);
    for (const fd of [reader, writer]) native.close(fd);
  });

  it('a transfer that fails is said so', () => {
    const s = session();
    s.drive().initialise();
    s.device.transferWorks = false;
    const fd = native.eventfd(0);
    assert.notEqual(
      refusal(() => void s.frontend.setDeviceStateFd({ direction: 1, phase: 0 }, fd)),
      0,
    );
    native.close(s.device.transfer?.fd ?? -1);
    assert.notEqual(s.frontend.checkDeviceState(), 0);
    native.close(fd);
  });

  it('an error never claims that a descriptor comes along', () => {
    const s = session();
    s.drive().initialise();
    s.device.transferWorks = false;
    const fd = native.eventfd(0);
    const reply = s.frontend.request('SET_DEVICE_STATE_FD', { direction: 0, phase: 0 }, [fd]);
    assert.notEqual(reply & 0xffn, 0n);
    assert.notEqual(reply & NO_FD, 0n);
    native.close(s.device.transfer?.fd ?? -1);
    native.close(fd);
  });
});

describe('the back end’s own requests', () => {
  it('reach the front end once there is a channel', () => {
    const s = session();
    assert.equal(s.backend.request('CONFIG_CHANGE_MSG', undefined), false);
    s.drive().initialise();
    assert.equal(s.backend.request('CONFIG_CHANGE_MSG', undefined), true);
    const request = s.frontend.receiveBackendRequest();
    assert.equal(request?.message.name, 'CONFIG_CHANGE_MSG');
    assert.equal(s.backend.request('SHARED_OBJECT_ADD', new Uint8Array(16)), false, 'its feature is not negotiated');
  });

  it('end quietly when the front end closes the channel', () => {
    const s = session();
    s.drive().initialise();
    s.frontend.closeBackendChannel();
    assert.equal(s.backend.request('CONFIG_CHANGE_MSG', undefined), false);
    assert.equal(s.frontend.getFeatures(), s.backend.offered);
  });

  it('a channel can be replaced any number of times', () => {
    const s = session();
    s.drive().initialise();
    const before = openFds();
    for (let i = 0; i < 5000; i++) s.frontend.openBackendChannel();
    assert.equal(openFds(), before);
  });
});

describe('framing', () => {
  it('a message may come byte by byte', () => {
    const s = session();
    const bytes = Buffer.alloc(MAX_MESSAGE);
    const length = encodeFrontendMessage(bytes, 0, 'SET_VRING_NUM', { index: 0, num: 64 });
    for (let i = 0; i < length; i++) {
      s.frontend.sendBytes(bytes.subarray(i, i + 1));
      s.turn();
    }
    assert.equal(s.frontend.getFeatures(), s.backend.offered);
    assert.deepEqual(s.device.lines, []);
  });

  it('several messages may come at once, each with its own descriptors', () => {
    const s = session();
    const { frontend } = s;
    frontend.setProtocolFeatures(features(ProtocolFeature.REPLY_ACK));
    const fds = [native.eventfd(0), native.eventfd(0)];
    for (const [i, fd] of fds.entries()) frontend.send('SET_VRING_CALL', BigInt(i), [fd], true);
    frontend.send('SET_VRING_ERR', NO_FD, [], true);
    assert.equal(frontend.receiveReply('SET_VRING_CALL'), 0n);
    assert.equal(frontend.receiveReply('SET_VRING_CALL'), 0n);
    assert.equal(frontend.receiveReply('SET_VRING_ERR'), 0n);
    for (const [i, fd] of fds.entries()) {
      s.backend.queue(i)?.signal();
      assert.equal(native.eventfdRead(fd), 1);
      native.close(fd);
    }
  });

  for (const [what, request, flags, size] of [
    ['another version', 1, 2, 0],
    ['no version', 1, 0, 0],
    ['a reply', 1, 5, 0],
    ['a payload that is too long', 1, 1, MAX_MESSAGE],
    ['a payload of 4 GiB', 1, 1, 0xffff_ffff],
  ] as const) {
    it(`${what} ends the session`, () => {
      const s = session();
      const header = Buffer.alloc(HEADER_SIZE);
      header.writeUInt32LE(request, 0);
      header.writeUInt32LE(flags, 4);
      header.writeUInt32LE(size, 8);
      s.frontend.sendBytes(header);
      assert.ok(s.frontend.closedByPeer());
      assert.deepEqual(s.device.events, ['disconnected']);
    });
  }

  it('a front end that goes in the middle of a message leaves no descriptor behind', () => {
    const before = openFds();
    for (const cut of [1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 3]) {
      const s = new Session();
      const bytes = Buffer.alloc(MAX_MESSAGE);
      encodeFrontendMessage(bytes, 0, 'SET_VRING_CALL', 0n);
      const fd = native.eventfd(0);
      s.frontend.sendBytes(bytes.subarray(0, cut), [fd]);
      native.close(fd);
      s.turn();
      s.close();
      assert.equal(s.backend.connected, false);
    }
    assert.equal(openFds(), before);
  });

  it('descriptors that no message wants are closed', () => {
    const s = session();
    s.frontend.setProtocolFeatures(features(ProtocolFeature.REPLY_ACK));
    const fd = native.eventfd(0);
    const before = openFds();
    const many = Array.from({ length: 200 }, () => fd);
    assert.notEqual(
      refusal(() => s.frontend.command('SET_OWNER', undefined, many)),
      0,
    );
    s.frontend.sendFrame(99, HeaderFlag.NEED_REPLY, 'none', undefined, many);
    s.frontend.receiveFrame();
    assert.equal(openFds(), before);
    native.close(fd);
  });
});

describe('a thousand sessions', () => {
  it('leave no descriptor, mapping or buffer behind', () => {
    const once = () => {
      const s = new Session();
      const driver = s.drive({ memory: new MockMemory([{ guestAddress: 0, size: 1 << 20 }]) }).start();
      echo(driver, queue(driver, 1), 'hello');
      s.close();
    };
    once();
    const before = openFds();
    for (let i = 0; i < 1000; i++) once();
    assert.equal(openFds(), before);
  });
});
