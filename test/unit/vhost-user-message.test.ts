/** Golden bytes for each vhost-user message, and what the decoder does with bytes that are none. */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import {
  BACKEND_MESSAGES,
  type BackendMessage,
  type BackendName,
  type BackendPayload,
  backendName,
  Cursor,
  decodeBackendMessage,
  decodeFrontendMessage,
  decodeHeader,
  decodePayload,
  encodeBackendMessage,
  encodeFrontendMessage,
  encodeReply,
  FRONTEND_MESSAGES,
  type FrontendMessage,
  type FrontendName,
  type FrontendPayload,
  type FrontendReply,
  features,
  frontendName,
  HEADER_SIZE,
  hasFeature,
  headerFault,
  MALFORMED,
  MAX_MESSAGE,
  MAX_PAYLOAD,
  type MessageSpec,
  NO_FD,
  type PayloadKind,
  ProtocolFeature,
} from 'vhost-user-ts';

const region = { guestAddress: 0x1_0000_0000n, size: 0x4000_0000n, userAddress: 0x7f12_3456_7000n, mmapOffset: 0x8000_0000n };
const REGION = '0000000001000000 0000004000000000 00705634127f0000 0000008000000000';
const low = { guestAddress: 0n, size: 0xa_0000n, userAddress: 0x7f12_0000_0000n, mmapOffset: 0n };
const LOW = '0000000000000000 00000a0000000000 00000000127f0000 0000000000000000';
const uuid = Uint8Array.from({ length: 16 }, (_, i) => 0xa0 + i);
const UUID = 'a0a1a2a3a4a5a6a7a8a9aaabacadaeaf';
const iotlb = { iova: 0x1000n, size: 0x2000n, userAddress: 0x7f00_0000_3000n, permissions: 3, type: 2 };
const IOTLB = '0010000000000000 0020000000000000 00300000007f0000 03 02 000000000000';
const inflight = { mmapSize: 0x1234n, mmapOffset: 0x1000n, queues: 2, queueSize: 128 };
const INFLIGHT = '3412000000000000 0010000000000000 0200 8000 00000000';
const map = { id: 3, fdOffset: 0x1000n, offset: 0x20_0000n, length: 0x3000n, flags: 1n };
const MAP = '03 00000000000000 0010000000000000 0000200000000000 0030000000000000 0100000000000000';

/** Each request: its payload, how many descriptors come along, and the bytes (u32 request, u32 flags, u32 size, payload). */
type Golden<P> = { payload: P; fds: number; bytes: string };

const frontendGolden: { [N in FrontendName]: Golden<FrontendPayload<N>> } = {
  GET_FEATURES: { payload: undefined, fds: 0, bytes: '01000000 01000000 00000000' },
  SET_FEATURES: { payload: 0x1_7000_0000n, fds: 0, bytes: '02000000 01000000 08000000 0000007001000000' },
  SET_OWNER: { payload: undefined, fds: 0, bytes: '03000000 01000000 00000000' },
  RESET_OWNER: { payload: undefined, fds: 0, bytes: '04000000 01000000 00000000' },
  SET_MEM_TABLE: { payload: [low, region], fds: 2, bytes: `05000000 01000000 48000000 02000000 00000000 ${LOW} ${REGION}` },
  SET_LOG_BASE: {
    payload: { size: 0x8000n, offset: 0x1000n },
    fds: 1,
    bytes: '06000000 01000000 10000000 0080000000000000 0010000000000000',
  },
  SET_LOG_FD: { payload: undefined, fds: 1, bytes: '07000000 01000000 00000000' },
  SET_VRING_NUM: { payload: { index: 2, num: 1024 }, fds: 0, bytes: '08000000 01000000 08000000 02000000 00040000' },
  SET_VRING_ADDR: {
    payload: {
      index: 1,
      flags: 1,
      descriptor: 0x7f00_0000_1000n,
      used: 0x7f00_0000_3000n,
      available: 0x7f00_0000_2000n,
      log: 0xffff_ffff_ffff_ffffn,
    },
    fds: 0,
    bytes: '09000000 01000000 28000000 01000000 01000000 00100000007f0000 00300000007f0000 00200000007f0000 ffffffffffffffff',
  },
  SET_VRING_BASE: { payload: { index: 1, num: 65535 }, fds: 0, bytes: '0a000000 01000000 08000000 01000000 ffff0000' },
  GET_VRING_BASE: { payload: { index: 1, num: 0 }, fds: 0, bytes: '0b000000 01000000 08000000 01000000 00000000' },
  SET_VRING_KICK: { payload: 1n, fds: 1, bytes: '0c000000 01000000 08000000 0100000000000000' },
  SET_VRING_CALL: { payload: 255n, fds: 1, bytes: '0d000000 01000000 08000000 ff00000000000000' },
  SET_VRING_ERR: { payload: 2n | NO_FD, fds: 0, bytes: '0e000000 01000000 08000000 0201000000000000' },
  GET_PROTOCOL_FEATURES: { payload: undefined, fds: 0, bytes: '0f000000 01000000 00000000' },
  SET_PROTOCOL_FEATURES: { payload: 0x8a62bn, fds: 0, bytes: '10000000 01000000 08000000 2ba6080000000000' },
  GET_QUEUE_NUM: { payload: undefined, fds: 0, bytes: '11000000 01000000 00000000' },
  SET_VRING_ENABLE: { payload: { index: 3, num: 1 }, fds: 0, bytes: '12000000 01000000 08000000 03000000 01000000' },
  SEND_RARP: { payload: 0x5634_1200_5452n, fds: 0, bytes: '13000000 01000000 08000000 5254001234560000' },
  NET_SET_MTU: { payload: 1500n, fds: 0, bytes: '14000000 01000000 08000000 dc05000000000000' },
  SET_BACKEND_REQ_FD: { payload: undefined, fds: 1, bytes: '15000000 01000000 00000000' },
  IOTLB_MSG: { payload: iotlb, fds: 0, bytes: `16000000 01000000 20000000 ${IOTLB}` },
  SET_VRING_ENDIAN: { payload: { index: 0, num: 1 }, fds: 0, bytes: '17000000 01000000 08000000 00000000 01000000' },
  GET_CONFIG: {
    payload: { offset: 36, flags: 0, data: new Uint8Array(4) },
    fds: 0,
    bytes: '18000000 01000000 10000000 24000000 04000000 00000000 00000000',
  },
  SET_CONFIG: {
    payload: { offset: 8, flags: 1, data: Uint8Array.of(1, 2, 3) },
    fds: 0,
    bytes: '19000000 01000000 0f000000 08000000 03000000 01000000 010203',
  },
  CREATE_CRYPTO_SESSION: { payload: Uint8Array.of(9, 8), fds: 0, bytes: '1a000000 01000000 02000000 0908' },
  CLOSE_CRYPTO_SESSION: { payload: 7n, fds: 0, bytes: '1b000000 01000000 08000000 0700000000000000' },
  POSTCOPY_ADVISE: { payload: undefined, fds: 0, bytes: '1c000000 01000000 00000000' },
  POSTCOPY_LISTEN: { payload: undefined, fds: 0, bytes: '1d000000 01000000 00000000' },
  POSTCOPY_END: { payload: undefined, fds: 0, bytes: '1e000000 01000000 00000000' },
  GET_INFLIGHT_FD: { payload: inflight, fds: 0, bytes: `1f000000 01000000 18000000 ${INFLIGHT}` },
  SET_INFLIGHT_FD: { payload: inflight, fds: 1, bytes: `20000000 01000000 18000000 ${INFLIGHT}` },
  GPU_SET_SOCKET: { payload: undefined, fds: 1, bytes: '21000000 01000000 00000000' },
  RESET_DEVICE: { payload: undefined, fds: 0, bytes: '22000000 01000000 00000000' },
  VRING_KICK: { payload: { index: 1, num: 0 }, fds: 0, bytes: '23000000 01000000 08000000 01000000 00000000' },
  GET_MAX_MEM_SLOTS: { payload: undefined, fds: 0, bytes: '24000000 01000000 00000000' },
  ADD_MEM_REG: { payload: region, fds: 1, bytes: `25000000 01000000 28000000 0000000000000000 ${REGION}` },
  REM_MEM_REG: { payload: low, fds: 0, bytes: `26000000 01000000 28000000 0000000000000000 ${LOW}` },
  SET_STATUS: { payload: 15n, fds: 0, bytes: '27000000 01000000 08000000 0f00000000000000' },
  GET_STATUS: { payload: undefined, fds: 0, bytes: '28000000 01000000 00000000' },
  GET_SHARED_OBJECT: { payload: uuid, fds: 0, bytes: `29000000 01000000 10000000 ${UUID}` },
  SET_DEVICE_STATE_FD: { payload: { direction: 1, phase: 0 }, fds: 1, bytes: '2a000000 01000000 08000000 01000000 00000000' },
  CHECK_DEVICE_STATE: { payload: undefined, fds: 0, bytes: '2b000000 01000000 00000000' },
  GET_SHMEM_CONFIG: { payload: undefined, fds: 0, bytes: '2c000000 01000000 00000000' },
};

const backendGolden: { [N in BackendName]: Golden<BackendPayload<N>> } = {
  IOTLB_MSG: { payload: iotlb, fds: 0, bytes: `01000000 01000000 20000000 ${IOTLB}` },
  CONFIG_CHANGE_MSG: { payload: undefined, fds: 0, bytes: '02000000 01000000 00000000' },
  VRING_HOST_NOTIFIER_MSG: {
    payload: { index: 2n, size: 4096n, offset: 0x10000n },
    fds: 1,
    bytes: '03000000 01000000 18000000 0200000000000000 0010000000000000 0000010000000000',
  },
  VRING_CALL: { payload: { index: 1, num: 0 }, fds: 0, bytes: '04000000 01000000 08000000 01000000 00000000' },
  VRING_ERR: { payload: { index: 1, num: 0 }, fds: 0, bytes: '05000000 01000000 08000000 01000000 00000000' },
  SHARED_OBJECT_ADD: { payload: uuid, fds: 0, bytes: `06000000 01000000 10000000 ${UUID}` },
  SHARED_OBJECT_REMOVE: { payload: uuid, fds: 0, bytes: `07000000 01000000 10000000 ${UUID}` },
  SHARED_OBJECT_LOOKUP: { payload: uuid, fds: 0, bytes: `08000000 01000000 10000000 ${UUID}` },
  SHMEM_MAP: { payload: map, fds: 1, bytes: `09000000 01000000 28000000 ${MAP}` },
  SHMEM_UNMAP: { payload: map, fds: 0, bytes: `0a000000 01000000 28000000 ${MAP}` },
};

/** The reply of each request that always has one. */
const replyGolden: { [N in FrontendName as (typeof FRONTEND_MESSAGES)[N]['reply'] extends 'ack' ? never : N]: Golden<FrontendReply<N>> } = {
  GET_FEATURES: { payload: 0x1_7000_0000n, fds: 0, bytes: '01000000 05000000 08000000 0000007001000000' },
  SET_LOG_BASE: { payload: 0n, fds: 0, bytes: '06000000 05000000 08000000 0000000000000000' },
  GET_VRING_BASE: { payload: { index: 1, num: 65533 }, fds: 0, bytes: '0b000000 05000000 08000000 01000000 fdff0000' },
  GET_PROTOCOL_FEATURES: { payload: 0x8a62bn, fds: 0, bytes: '0f000000 05000000 08000000 2ba6080000000000' },
  GET_QUEUE_NUM: { payload: 9n, fds: 0, bytes: '11000000 05000000 08000000 0900000000000000' },
  IOTLB_MSG: { payload: 0n, fds: 0, bytes: '16000000 05000000 08000000 0000000000000000' },
  GET_CONFIG: {
    payload: { offset: 36, flags: 0, data: Uint8Array.of(4, 0, 0, 0) },
    fds: 0,
    bytes: '18000000 05000000 10000000 24000000 04000000 00000000 04000000',
  },
  CREATE_CRYPTO_SESSION: { payload: Uint8Array.of(1), fds: 0, bytes: '1a000000 05000000 01000000 01' },
  POSTCOPY_ADVISE: { payload: undefined, fds: 1, bytes: '1c000000 05000000 00000000' },
  POSTCOPY_END: { payload: 0n, fds: 0, bytes: '1e000000 05000000 08000000 0000000000000000' },
  GET_INFLIGHT_FD: { payload: inflight, fds: 1, bytes: `1f000000 05000000 18000000 ${INFLIGHT}` },
  GET_MAX_MEM_SLOTS: { payload: 509n, fds: 0, bytes: '24000000 05000000 08000000 fd01000000000000' },
  GET_STATUS: { payload: 15n, fds: 0, bytes: '28000000 05000000 08000000 0f00000000000000' },
  GET_SHARED_OBJECT: { payload: undefined, fds: 1, bytes: '29000000 05000000 00000000' },
  SET_DEVICE_STATE_FD: { payload: NO_FD, fds: 0, bytes: '2a000000 05000000 08000000 0001000000000000' },
  CHECK_DEVICE_STATE: { payload: 0n, fds: 0, bytes: '2b000000 05000000 08000000 0000000000000000' },
  GET_SHMEM_CONFIG: {
    payload: [0x1_0000_0000n, 0n, 0x1000n],
    fds: 0,
    bytes: `2c000000 05000000 08080000 03000000 00000000 0000000001000000 0000000000000000 0010000000000000 ${'00'.repeat(253 * 8)}`,
  },
};

function bytes(hex: string): Buffer {
  return Buffer.from(hex.replaceAll(' ', ''), 'hex');
}

function names<N extends string>(table: Record<N, unknown>): N[] {
  return Object.keys(table) as N[];
}

function decodeFrontend(message: Uint8Array, fds: number): FrontendMessage {
  return decodeFrontendMessage(decodeHeader(message), message, HEADER_SIZE, fds);
}

function decodeBackend(message: Uint8Array, fds: number): BackendMessage {
  return decodeBackendMessage(decodeHeader(message), message, HEADER_SIZE, fds);
}

describe('golden bytes of the front end’s requests', () => {
  for (const name of names(FRONTEND_MESSAGES)) {
    const golden = frontendGolden[name];
    const expected = bytes(golden.bytes);

    it(`${name} is encoded`, () => {
      const out = Buffer.alloc(MAX_MESSAGE, 0xee);
      const length = encodeFrontendMessage(out, 0, name, golden.payload);
      assert.deepEqual(out.subarray(0, length), expected);
    });

    it(`${name} is decoded`, () => {
      const message = decodeFrontend(expected, golden.fds);
      assert.deepEqual(message, { name, header: decodeHeader(expected), payload: golden.payload });
      assert.equal(headerFault(message.header, 'request'), undefined);
    });
  }

  it('no request code is used twice, and the names are the specification’s', () => {
    const codes = Object.values(FRONTEND_MESSAGES).map((spec) => spec.request);
    assert.deepEqual(
      codes,
      [...codes.keys()].map((i) => i + 1),
    );
    assert.equal(frontendName(34), 'RESET_DEVICE');
    assert.equal(frontendName(77), 'request 77');
    assert.equal(backendName(9), 'SHMEM_MAP');
  });

  it('NEED_REPLY is bit 3', () => {
    const out = Buffer.alloc(MAX_MESSAGE);
    encodeFrontendMessage(out, 0, 'SET_OWNER', undefined, true);
    assert.equal(out.readUInt32LE(4), 9);
  });
});

describe('golden bytes of the back end’s requests', () => {
  for (const name of names(BACKEND_MESSAGES)) {
    const golden = backendGolden[name];
    const expected = bytes(golden.bytes);

    it(`${name} is encoded`, () => {
      const out = Buffer.alloc(MAX_MESSAGE, 0xee);
      const length = encodeBackendMessage(out, 0, name, golden.payload);
      assert.deepEqual(out.subarray(0, length), expected);
    });

    it(`${name} is decoded`, () => {
      assert.deepEqual(decodeBackend(expected, golden.fds), { name, header: decodeHeader(expected), payload: golden.payload });
    });
  }
});

describe('golden bytes of replies', () => {
  it('there is one for each request that always has a reply', () => {
    const always = names(FRONTEND_MESSAGES).filter((name) => FRONTEND_MESSAGES[name].reply !== 'ack');
    assert.deepEqual(Object.keys(replyGolden), always);
  });

  for (const name of names(replyGolden)) {
    const golden = replyGolden[name];
    const expected = bytes(golden.bytes);
    const kind = FRONTEND_MESSAGES[name].reply as PayloadKind;

    it(`${name} is encoded`, () => {
      const out = Buffer.alloc(MAX_MESSAGE, 0xee);
      const length = encodeReply(out, 0, FRONTEND_MESSAGES[name].request, kind, golden.payload);
      assert.deepEqual(out.subarray(0, length), expected);
    });

    it(`${name} is decoded`, () => {
      const header = decodeHeader(expected);
      assert.equal(headerFault(header, 'reply'), undefined);
      assert.deepEqual(decodePayload(kind, expected, HEADER_SIZE, header.size), golden.payload);
    });
  }

  it('an acknowledgement is a u64 under the code of its request', () => {
    const out = Buffer.alloc(MAX_MESSAGE);
    const length = encodeReply(out, 0, FRONTEND_MESSAGES.SET_MEM_TABLE.request, 'u64', 0n);
    assert.deepEqual(out.subarray(0, length), bytes('05000000 05000000 08000000 0000000000000000'));
  });
});

describe('messages that do not fit their request', () => {
  /** Requests whose payload has exactly one size. */
  const fixed = names(FRONTEND_MESSAGES).filter(
    (name) => !['memoryTable', 'config', 'inflight', 'raw'].includes(FRONTEND_MESSAGES[name].payload),
  );

  for (const name of fixed) {
    const golden = frontendGolden[name];
    it(`${name} one byte longer or shorter is malformed`, () => {
      const longer = Buffer.concat([bytes(golden.bytes), Buffer.alloc(1)]);
      longer.writeUInt32LE(longer.length - HEADER_SIZE, 8);
      assert.equal(decodeFrontend(longer, golden.fds).name, 'malformed');
      if (longer.length === HEADER_SIZE + 1) return;
      const shorter = bytes(golden.bytes).subarray(0, -1);
      shorter.writeUInt32LE(shorter.length - HEADER_SIZE, 8);
      assert.equal(decodeFrontend(shorter, golden.fds).name, 'malformed');
    });
  }

  for (const name of names(FRONTEND_MESSAGES)) {
    const golden = frontendGolden[name];
    const { fds }: MessageSpec = FRONTEND_MESSAGES[name];
    it(`${name} with a descriptor too many is malformed`, () => {
      const most = fds === 'optional' ? 1 : golden.fds;
      assert.equal(decodeFrontend(bytes(golden.bytes), most).name, name);
      assert.equal(decodeFrontend(bytes(golden.bytes), most + 1).name, 'malformed');
    });
    if (golden.fds === 0) continue;
    it(`${name} without its descriptor is malformed`, () => {
      assert.equal(decodeFrontend(bytes(golden.bytes), golden.fds - 1).name, 'malformed');
    });
  }

  it('REM_MEM_REG may bring one descriptor', () => {
    assert.equal(decodeFrontend(bytes(frontendGolden.REM_MEM_REG.bytes), 1).name, 'REM_MEM_REG');
  });

  it('SET_VRING_CALL with the no-descriptor flag has none', () => {
    const flagged = bytes('0d000000 01000000 08000000 0001000000000000');
    assert.equal(decodeFrontend(flagged, 0).name, 'SET_VRING_CALL');
    assert.equal(decodeFrontend(flagged, 1).name, 'malformed');
  });

  it('SET_MEM_TABLE may have padding behind its regions (virtio_uml)', () => {
    const padded = bytes(`05000000 01000000 48000000 01000000 00000000 ${REGION} ${'00'.repeat(32)}`);
    const message = decodeFrontend(padded, 1);
    assert.equal(message.name, 'SET_MEM_TABLE');
    assert.deepEqual('payload' in message && message.payload, [region]);
  });

  it('SET_MEM_TABLE with more regions than bytes is malformed', () => {
    for (const count of ['02000000', 'ffffffff', '01000008']) {
      const lying = bytes(`05000000 01000000 28000000 ${count} 00000000 ${REGION}`);
      assert.equal(decodeFrontend(lying, 1).name, 'malformed');
    }
  });

  it('a configuration access with more bytes than there are is malformed; an empty one is not', () => {
    assert.equal(decodeFrontend(bytes('18000000 01000000 10000000 00000000 05000000 00000000 00000000'), 0).name, 'malformed');
    assert.equal(decodeFrontend(bytes('18000000 01000000 0c000000 00000000 ffffffff 00000000'), 0).name, 'malformed');
    assert.equal(decodeFrontend(bytes('18000000 01000000 0c000000 00000000 00000000 00000000'), 0).name, 'GET_CONFIG');
  });

  it('inflight descriptions come with and without their padding', () => {
    const short = bytes(`1f000000 01000000 14000000 ${INFLIGHT.slice(0, -9)}`);
    assert.deepEqual(decodeFrontend(short, 0), { name: 'GET_INFLIGHT_FD', header: decodeHeader(short), payload: inflight });
  });

  it('SET_LOG_BASE without LOG_SHMFD (an address of the front end’s own) is malformed', () => {
    assert.equal(decodeFrontend(bytes('06000000 01000000 08000000 00100000007f0000'), 0).name, 'malformed');
  });

  it('unknown request codes are told apart from malformed messages', () => {
    for (const request of [0, 45, 1000, 0xffff_ffff]) {
      const message = Buffer.alloc(HEADER_SIZE);
      message.writeUInt32LE(request, 0);
      message.writeUInt32LE(1, 4);
      assert.equal(decodeFrontend(message, 0).name, 'unknown');
      assert.equal(decodeBackend(message, 0).name, 'unknown');
    }
  });

  it('a frame that cannot be followed is named', () => {
    const fault = (flags: number, size: number, kind: 'request' | 'reply' = 'request') => headerFault({ request: 1, flags, size }, kind);
    assert.equal(fault(1, 0), undefined);
    assert.equal(fault(9, MAX_PAYLOAD), undefined);
    assert.match(fault(0, 0) ?? '', /version 0/);
    assert.match(fault(2, 0) ?? '', /version 2/);
    assert.match(fault(5, 0) ?? '', /reply/);
    assert.match(fault(1, 0, 'reply') ?? '', /request/);
    assert.match(fault(1, MAX_PAYLOAD + 1) ?? '', /payload/);
    assert.match(fault(1, 0xffff_ffff) ?? '', /payload/);
  });
});

describe('feature masks', () => {
  it('are built from and asked for bit numbers', () => {
    assert.equal(features(ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK), 9n);
    assert.equal(features(), 0n);
    assert.ok(hasFeature(1n << 63n, 63));
    assert.ok(!hasFeature(1n << 63n, 62));
  });
});

describe('the cursor', () => {
  it('reads 0 past the end, and says so', () => {
    const cursor = new Cursor(Buffer.from([1, 2, 3]));
    assert.equal(cursor.u16(), 0x0201);
    assert.equal(cursor.overrun, false);
    assert.equal(cursor.u32(), 0);
    assert.equal(cursor.overrun, true);
    assert.equal(cursor.u8(), 0, 'and stays at that, though a byte is left');
    assert.deepEqual(cursor.bytes(1), new Uint8Array(0));
  });

  it('does not leave its part of the buffer', () => {
    const cursor = new Cursor(Buffer.alloc(16, 0xff), 4, 4);
    assert.equal(cursor.u32(), 0xffff_ffff);
    assert.equal(cursor.left, 0);
    assert.equal(cursor.u8(), 0);
    assert.ok(cursor.overrun);
  });

  it('throws when we write too much, and over a part that does not exist', () => {
    const cursor = new Cursor(Buffer.alloc(4));
    assert.throws(() => cursor.putU64(0n), RangeError);
    assert.throws(() => cursor.putBytes(new Uint8Array(5)), RangeError);
    assert.throws(() => cursor.putZeros(5), RangeError);
    assert.throws(() => new Cursor(Buffer.alloc(4), 2, 3), RangeError);
    assert.throws(() => new Cursor(Buffer.alloc(4), 5), RangeError);
  });
});

describe('properties', () => {
  const anyRegion = fc.record(
    {
      guestAddress: fc.bigInt(0n, 2n ** 64n - 1n),
      size: fc.bigInt(0n, 2n ** 64n - 1n),
      userAddress: fc.bigInt(0n, 2n ** 64n - 1n),
      mmapOffset: fc.bigInt(0n, 2n ** 64n - 1n),
    },
    { noNullPrototype: true },
  );

  it('whatever bytes come, decoding ends in a message, never in an exception', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 50 }),
        fc.uint8Array({ maxLength: 600 }),
        fc.integer({ min: 0, max: 12 }),
        (request, payload, fds) => {
          const header = { request, flags: 1, size: payload.length };
          const front = decodeFrontendMessage(header, payload, 0, fds);
          assert.ok(front.name === 'unknown' || front.name === 'malformed' || FRONTEND_MESSAGES[front.name].request === request);
          const back = decodeBackendMessage(header, payload, 0, fds);
          assert.ok(back.name === 'unknown' || back.name === 'malformed' || BACKEND_MESSAGES[back.name].request === request);
        },
      ),
      { numRuns: 2000 },
    );
  });

  it('a size beyond the buffer is malformed', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 44 }), fc.integer({ min: 1, max: 0xffff_ffff }), (request, size) => {
        const message = decodeFrontendMessage({ request, flags: 1, size }, Buffer.alloc(0), 0, 0);
        assert.equal(message.name, 'malformed');
      }),
    );
  });

  it('memory tables of any length and padding come back as they were', () => {
    fc.assert(
      fc.property(fc.array(anyRegion, { maxLength: 40 }), fc.integer({ min: 0, max: 3 }), (table, padding) => {
        const out = Buffer.alloc(MAX_MESSAGE, 0xff);
        const length = encodeFrontendMessage(out, 0, 'SET_MEM_TABLE', table) + padding * 32;
        out.writeUInt32LE(length - HEADER_SIZE, 8);
        const message = decodeFrontend(out, table.length);
        assert.deepEqual(message, { name: 'SET_MEM_TABLE', header: decodeHeader(out), payload: table });
      }),
    );
  });

  it('configuration accesses of any size come back as they were', () => {
    fc.assert(
      fc.property(fc.nat(0xffff_ffff), fc.nat(1), fc.uint8Array({ maxLength: 256 }), (offset, flags, data) => {
        const out = Buffer.alloc(MAX_MESSAGE);
        encodeFrontendMessage(out, 0, 'SET_CONFIG', { offset, flags, data });
        const message = decodeFrontend(out, 0);
        assert.ok(message.name === 'SET_CONFIG');
        assert.deepEqual(message.payload, { offset, flags, data });
      }),
    );
  });

  it('a payload is read at its offset only', () => {
    fc.assert(
      fc.property(fc.nat(64), fc.bigInt(0n, 2n ** 64n - 1n), (offset, value) => {
        const out = Buffer.alloc(offset + HEADER_SIZE + 8 + 5, 0x5a);
        encodeFrontendMessage(out, offset, 'SET_FEATURES', value);
        assert.equal(decodePayload('u64', out, offset + HEADER_SIZE, 8), value);
        assert.equal(decodePayload('u64', out, offset + HEADER_SIZE, 9), MALFORMED);
        assert.ok(out.subarray(offset + HEADER_SIZE + 8).every((byte) => byte === 0x5a));
      }),
    );
  });
});
