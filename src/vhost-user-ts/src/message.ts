/**
 * The vhost-user ABI (QEMU, docs/interop/vhost-user.rst): request codes, flags, feature bits, payload layouts, and one table
 * per channel that says for each request what its payload is, which descriptors come along and what the reply is.
 *
 * Decoding checks syntax only: sizes, counts and the number of descriptors. Whether a message is allowed now (is the feature
 * negotiated, does the vring exist, is its address mapped) is the question of the session that takes it.
 *
 * 64-bit fields are bigints: guest addresses and feature masks use all 64 bits, and none of this is on the data path.
 */
import { Cursor } from './cursor.js';

/** struct vhost_user_header: u32 request, u32 flags, u32 size of the payload that follows. */
export const HEADER_SIZE = 12;

/** Bits of the header's `flags`. The lower two are the version, 1. */
export const HeaderFlag = { VERSION: 1, VERSION_MASK: 3, REPLY: 4, NEED_REPLY: 8 } as const;

/** Most descriptors that sendmsg(2) passes at once (SCM_MAX_FD of the kernel): so many regions a SET_MEM_TABLE can have. */
export const MAX_FDS = 253;

/** QEMU's and libvhost-user's limit of a configuration space access. */
export const MAX_CONFIG_SIZE = 256;

/** Regions in the reply of GET_SHMEM_CONFIG at most (VIRTIO_MAX_SHMEM_REGIONS of QEMU). */
export const MAX_SHARED_MEMORY_REGIONS = 256;

/** In the u64 of SET_VRING_KICK, _CALL and _ERR: bits 0 to 7 are the vring, bit 8 says that no descriptor comes along. */
export const VRING_INDEX_MASK = 0xffn;
export const NO_FD = 0x100n;

/** In `flags` of SET_VRING_ADDR (VHOST_VRING_F_LOG): writes to the used ring are logged at `log`. */
export const VRING_FLAG_LOG = 1;

/** Protocol feature bits (VHOST_USER_PROTOCOL_F_*), as bit numbers. */
export const ProtocolFeature = {
  MQ: 0,
  LOG_SHMFD: 1,
  RARP: 2,
  REPLY_ACK: 3,
  MTU: 4,
  BACKEND_REQ: 5,
  CROSS_ENDIAN: 6,
  CRYPTO_SESSION: 7,
  PAGEFAULT: 8,
  CONFIG: 9,
  BACKEND_SEND_FD: 10,
  HOST_NOTIFIER: 11,
  INFLIGHT_SHMFD: 12,
  RESET_DEVICE: 13,
  INBAND_NOTIFICATIONS: 14,
  CONFIGURE_MEM_SLOTS: 15,
  STATUS: 16,
  XEN_MMAP: 17,
  SHARED_OBJECT: 18,
  DEVICE_STATE: 19,
  GET_VRING_BASE_INFLIGHT: 20,
  GPA_ADDRESSES: 21,
  SHMEM: 22,
} as const;

/** Feature bits that are not a device type's own (virtio 1.3, 6; vhost's LOG_ALL and vhost-user's PROTOCOL_FEATURES), as bit numbers. */
export const Feature = {
  NOTIFY_ON_EMPTY: 24,
  /** VHOST_F_LOG_ALL: what the back end writes to guest memory is logged. Never seen by the guest. */
  LOG_ALL: 26,
  ANY_LAYOUT: 27,
  INDIRECT_DESC: 28,
  EVENT_IDX: 29,
  /** VHOST_USER_F_PROTOCOL_FEATURES: protocol features can be negotiated, and vrings start disabled. Never seen by the guest. */
  PROTOCOL_FEATURES: 30,
  VERSION_1: 32,
  ACCESS_PLATFORM: 33,
  RING_PACKED: 34,
  IN_ORDER: 35,
  ORDER_PLATFORM: 36,
  SR_IOV: 37,
  NOTIFICATION_DATA: 38,
  NOTIF_CONFIG_DATA: 39,
  RING_RESET: 40,
} as const;

/** The mask with these bit numbers set. */
export function features(...bits: number[]): bigint {
  return bits.reduce((mask, bit) => mask | (1n << BigInt(bit)), 0n);
}

/** Whether bit number `bit` is set. */
export function hasFeature(mask: bigint, bit: number): boolean {
  return (mask & (1n << BigInt(bit))) !== 0n;
}

// --- payloads ---

/** struct vhost_vring_state: u32 index, u32 num. */
export interface VringState {
  index: number;
  num: number;
}

/** struct vhost_vring_addr: u32 index, u32 flags, u64 descriptor, u64 used, u64 available, u64 log. */
export interface VringAddress {
  index: number;
  /** {@link VRING_FLAG_LOG} or 0. */
  flags: number;
  /** Ring addresses are the front end's user addresses (guest addresses only with GPA_ADDRESSES). */
  descriptor: bigint;
  used: bigint;
  available: bigint;
  /** Guest address that writes to the used ring are logged at. */
  log: bigint;
}

/** u64 guest address, u64 size, u64 user address, u64 mmap offset. */
export interface MemoryRegion {
  guestAddress: bigint;
  size: bigint;
  /** Where the front end has it mapped: the ring addresses of SET_VRING_ADDR refer to it. */
  userAddress: bigint;
  /** Where in the descriptor's file the region begins. */
  mmapOffset: bigint;
}

/** u64 size, u64 offset of the dirty log in its file. */
export interface Log {
  size: bigint;
  offset: bigint;
}

/** struct vhost_iotlb_msg: u64 iova, u64 size, u64 user address, u8 permissions, u8 type, 6 bytes of padding. */
export interface Iotlb {
  iova: bigint;
  size: bigint;
  userAddress: bigint;
  /** 1 read, 2 write. */
  permissions: number;
  /** 1 miss, 2 update, 3 invalidate, 4 access failed. */
  type: number;
}

/** u32 offset, u32 size, u32 flags, then `size` bytes. */
export interface Config {
  offset: number;
  /** 0: the guest writes a writable field; 1: live migration. */
  flags: number;
  /** The bytes; those of a GET_CONFIG request say nothing but how many are wanted. */
  data: Uint8Array;
}

/** u64 vring index and NO_FD flag, u64 size, u64 offset. */
export interface VringArea {
  index: bigint;
  size: bigint;
  offset: bigint;
}

/** u64 mmap size, u64 mmap offset, u16 number of queues, u16 queue size, and 4 bytes of padding (QEMU sends them, rust-vmm does not). */
export interface Inflight {
  mmapSize: bigint;
  mmapOffset: bigint;
  queues: number;
  queueSize: number;
}

/** u32 direction, u32 phase. */
export interface DeviceState {
  /** 0: the back end writes its state to the descriptor; 1: it reads its state from it. */
  direction: number;
  /** 0: all vrings are stopped. The only one defined. */
  phase: number;
}

/** VhostUserMMap: u8 shmid, 7 bytes of padding, u64 fd offset, u64 offset in the shared memory region, u64 length, u64 flags. */
export interface SharedMemoryMap {
  id: number;
  fdOffset: bigint;
  offset: bigint;
  length: bigint;
  /** 0 read-only, 1 read and write. */
  flags: bigint;
}

/** The TypeScript type of each payload. */
export interface Payloads {
  none: undefined;
  u64: bigint;
  vringState: VringState;
  vringAddress: VringAddress;
  /** u32 number of regions, u32 padding, then the regions. */
  memoryTable: MemoryRegion[];
  /** u64 padding, then one region. */
  memoryRegion: MemoryRegion;
  log: Log;
  iotlb: Iotlb;
  config: Config;
  vringArea: VringArea;
  inflight: Inflight;
  /** 16 bytes. */
  uuid: Uint8Array;
  deviceState: DeviceState;
  sharedMemoryMap: SharedMemoryMap;
  /** u32 number of regions, u32 padding, u64 size of each (always 256 of them, the unused ones 0). */
  sharedMemoryConfig: bigint[];
  /** Bytes whose layout is a device type's own (crypto sessions). */
  raw: Uint8Array;
}

export type PayloadKind = keyof Payloads;

interface Codec<T> {
  /** Sizes the payload can have. What a peer appends beyond the fields, up to `max`, is padding and ignored. */
  readonly min: number;
  readonly max: number;
  /** Reads the fields; `undefined` when a field contradicts the size. An overrun is noticed by the caller. */
  decode(cursor: Cursor): T | undefined;
  encode(cursor: Cursor, value: T): void;
}

const REGION_SIZE = 32;
const CONFIG_HEADER = 12;

function decodeRegion(c: Cursor): MemoryRegion {
  return { guestAddress: c.u64(), size: c.u64(), userAddress: c.u64(), mmapOffset: c.u64() };
}

function encodeRegion(c: Cursor, region: MemoryRegion): void {
  c.putU64(region.guestAddress);
  c.putU64(region.size);
  c.putU64(region.userAddress);
  c.putU64(region.mmapOffset);
}

const codecs: { readonly [K in PayloadKind]: Codec<Payloads[K]> } = {
  none: { min: 0, max: 0, decode: () => undefined, encode: () => undefined },
  u64: { min: 8, max: 8, decode: (c) => c.u64(), encode: (c, value) => c.putU64(value) },
  vringState: {
    min: 8,
    max: 8,
    decode: (c) => ({ index: c.u32(), num: c.u32() }),
    encode(c, state) {
      c.putU32(state.index);
      c.putU32(state.num);
    },
  },
  vringAddress: {
    min: 40,
    max: 40,
    decode: (c) => ({ index: c.u32(), flags: c.u32(), descriptor: c.u64(), used: c.u64(), available: c.u64(), log: c.u64() }),
    encode(c, address) {
      c.putU32(address.index);
      c.putU32(address.flags);
      c.putU64(address.descriptor);
      c.putU64(address.used);
      c.putU64(address.available);
      c.putU64(address.log);
    },
  },
  memoryTable: {
    min: 8,
    // Larger than its regions it may be: virtio_uml up to Linux 6.12 sends the size of two with num = 1.
    max: 8 + MAX_FDS * REGION_SIZE,
    decode(c) {
      const count = c.u32();
      c.skip(4);
      if (count * REGION_SIZE > c.left) return undefined;
      return Array.from({ length: count }, () => decodeRegion(c));
    },
    encode(c, regions) {
      c.putU32(regions.length);
      c.putU32(0);
      for (const region of regions) encodeRegion(c, region);
    },
  },
  memoryRegion: {
    min: 40,
    max: 40,
    decode(c) {
      c.skip(8);
      return decodeRegion(c);
    },
    encode(c, region) {
      c.putU64(0n);
      encodeRegion(c, region);
    },
  },
  log: {
    min: 16,
    max: 16,
    decode: (c) => ({ size: c.u64(), offset: c.u64() }),
    encode(c, log) {
      c.putU64(log.size);
      c.putU64(log.offset);
    },
  },
  iotlb: {
    min: 32,
    max: 32,
    decode: (c) => ({ iova: c.u64(), size: c.u64(), userAddress: c.u64(), permissions: c.u8(), type: c.u8() }),
    encode(c, iotlb) {
      c.putU64(iotlb.iova);
      c.putU64(iotlb.size);
      c.putU64(iotlb.userAddress);
      c.putU8(iotlb.permissions);
      c.putU8(iotlb.type);
      c.putZeros(6);
    },
  },
  config: {
    min: CONFIG_HEADER,
    max: CONFIG_HEADER + MAX_CONFIG_SIZE,
    decode(c) {
      const offset = c.u32();
      const size = c.u32();
      const flags = c.u32();
      if (size > c.left) return undefined;
      return { offset, flags, data: c.bytes(size) };
    },
    encode(c, config) {
      c.putU32(config.offset);
      c.putU32(config.data.length);
      c.putU32(config.flags);
      c.putBytes(config.data);
    },
  },
  vringArea: {
    min: 24,
    max: 24,
    decode: (c) => ({ index: c.u64(), size: c.u64(), offset: c.u64() }),
    encode(c, area) {
      c.putU64(area.index);
      c.putU64(area.size);
      c.putU64(area.offset);
    },
  },
  inflight: {
    min: 20,
    max: 24,
    decode: (c) => ({ mmapSize: c.u64(), mmapOffset: c.u64(), queues: c.u16(), queueSize: c.u16() }),
    encode(c, inflight) {
      c.putU64(inflight.mmapSize);
      c.putU64(inflight.mmapOffset);
      c.putU16(inflight.queues);
      c.putU16(inflight.queueSize);
      c.putZeros(4);
    },
  },
  uuid: {
    min: 16,
    max: 16,
    decode: (c) => c.bytes(16),
    encode(c, uuid) {
      if (uuid.length !== 16) throw new RangeError('a UUID has 16 bytes');
      c.putBytes(uuid);
    },
  },
  deviceState: {
    min: 8,
    max: 8,
    decode: (c) => ({ direction: c.u32(), phase: c.u32() }),
    encode(c, state) {
      c.putU32(state.direction);
      c.putU32(state.phase);
    },
  },
  sharedMemoryMap: {
    min: 40,
    max: 40,
    decode(c) {
      const id = c.u8();
      c.skip(7);
      return { id, fdOffset: c.u64(), offset: c.u64(), length: c.u64(), flags: c.u64() };
    },
    encode(c, map) {
      c.putU8(map.id);
      c.putZeros(7);
      c.putU64(map.fdOffset);
      c.putU64(map.offset);
      c.putU64(map.length);
      c.putU64(map.flags);
    },
  },
  sharedMemoryConfig: {
    min: 8,
    max: 8 + MAX_SHARED_MEMORY_REGIONS * 8,
    decode(c) {
      const count = c.u32();
      c.skip(4);
      if (count * 8 > c.left) return undefined;
      return Array.from({ length: count }, () => c.u64());
    },
    encode(c, sizes) {
      if (sizes.length > MAX_SHARED_MEMORY_REGIONS) throw new RangeError('more shared memory regions than the message has room for');
      c.putU32(sizes.length);
      c.putU32(0);
      for (const size of sizes) c.putU64(size);
      c.putZeros((MAX_SHARED_MEMORY_REGIONS - sizes.length) * 8);
    },
  },
  raw: { min: 0, max: 4096, decode: (c) => c.bytes(c.left), encode: (c, bytes) => c.putBytes(bytes) },
};

/** The largest payload of any message: a frame above it is not vhost-user, and its end cannot be found. */
export const MAX_PAYLOAD = Math.max(...Object.values(codecs).map((codec) => codec.max));

/** The largest message with its header: what a receive buffer must hold. */
export const MAX_MESSAGE = HEADER_SIZE + MAX_PAYLOAD;

// --- the tables ---

/**
 * Which descriptors come with a message: a number of them; `region`: one per region of the table; `flag`: one, unless
 * {@link NO_FD} is set in the u64 (or in `index` of a vring area); `optional`: one or none.
 */
export type FdRule = 0 | 1 | 'region' | 'flag' | 'optional';

/** What the tables say of one request. */
export interface MessageSpec {
  readonly request: number;
  readonly payload: PayloadKind;
  readonly fds: FdRule;
  /** The payload of the reply that is always sent, or `ack`: a u64 (0 is success), and only if asked for with NEED_REPLY. */
  readonly reply: PayloadKind | 'ack';
  /** Descriptors that come with the reply. */
  readonly replyFds: FdRule;
  /** The protocol feature that must have been negotiated before it may be sent. */
  readonly feature: number | undefined;
}

function spec<P extends PayloadKind, R extends PayloadKind | 'ack'>(
  request: number,
  payload: P,
  fds: FdRule,
  reply: R,
  feature?: number,
  replyFds: FdRule = 0,
): MessageSpec & { readonly payload: P; readonly reply: R } {
  return { request, payload, fds, reply, replyFds, feature };
}

const F = ProtocolFeature;

/** What the front end sends, by name. */
export const FRONTEND_MESSAGES = {
  GET_FEATURES: spec(1, 'none', 0, 'u64'),
  SET_FEATURES: spec(2, 'u64', 0, 'ack'),
  SET_OWNER: spec(3, 'none', 0, 'ack'),
  RESET_OWNER: spec(4, 'none', 0, 'ack'),
  SET_MEM_TABLE: spec(5, 'memoryTable', 'region', 'ack'),
  // The form without LOG_SHMFD (a u64 address of the front end's own memory) is of no use to another process: it is malformed here.
  SET_LOG_BASE: spec(6, 'log', 1, 'u64', F.LOG_SHMFD),
  SET_LOG_FD: spec(7, 'none', 1, 'ack'),
  SET_VRING_NUM: spec(8, 'vringState', 0, 'ack'),
  SET_VRING_ADDR: spec(9, 'vringAddress', 0, 'ack'),
  SET_VRING_BASE: spec(10, 'vringState', 0, 'ack'),
  GET_VRING_BASE: spec(11, 'vringState', 0, 'vringState'),
  SET_VRING_KICK: spec(12, 'u64', 'flag', 'ack'),
  SET_VRING_CALL: spec(13, 'u64', 'flag', 'ack'),
  SET_VRING_ERR: spec(14, 'u64', 'flag', 'ack'),
  GET_PROTOCOL_FEATURES: spec(15, 'none', 0, 'u64'),
  SET_PROTOCOL_FEATURES: spec(16, 'u64', 0, 'ack'),
  GET_QUEUE_NUM: spec(17, 'none', 0, 'u64', F.MQ),
  SET_VRING_ENABLE: spec(18, 'vringState', 0, 'ack'),
  SEND_RARP: spec(19, 'u64', 0, 'ack', F.RARP),
  NET_SET_MTU: spec(20, 'u64', 0, 'ack', F.MTU),
  SET_BACKEND_REQ_FD: spec(21, 'none', 1, 'ack', F.BACKEND_REQ),
  IOTLB_MSG: spec(22, 'iotlb', 0, 'u64'),
  SET_VRING_ENDIAN: spec(23, 'vringState', 0, 'ack', F.CROSS_ENDIAN),
  GET_CONFIG: spec(24, 'config', 0, 'config', F.CONFIG),
  SET_CONFIG: spec(25, 'config', 0, 'ack', F.CONFIG),
  CREATE_CRYPTO_SESSION: spec(26, 'raw', 0, 'raw', F.CRYPTO_SESSION),
  CLOSE_CRYPTO_SESSION: spec(27, 'u64', 0, 'ack', F.CRYPTO_SESSION),
  POSTCOPY_ADVISE: spec(28, 'none', 0, 'none', F.PAGEFAULT, 1),
  POSTCOPY_LISTEN: spec(29, 'none', 0, 'ack', F.PAGEFAULT),
  POSTCOPY_END: spec(30, 'none', 0, 'u64', F.PAGEFAULT),
  GET_INFLIGHT_FD: spec(31, 'inflight', 0, 'inflight', F.INFLIGHT_SHMFD, 'optional'),
  SET_INFLIGHT_FD: spec(32, 'inflight', 1, 'ack', F.INFLIGHT_SHMFD),
  GPU_SET_SOCKET: spec(33, 'none', 1, 'ack'),
  RESET_DEVICE: spec(34, 'none', 0, 'ack', F.RESET_DEVICE),
  VRING_KICK: spec(35, 'vringState', 0, 'ack', F.INBAND_NOTIFICATIONS),
  GET_MAX_MEM_SLOTS: spec(36, 'none', 0, 'u64', F.CONFIGURE_MEM_SLOTS),
  ADD_MEM_REG: spec(37, 'memoryRegion', 1, 'ack', F.CONFIGURE_MEM_SLOTS),
  // "For compatibility with existing incorrect implementations" one descriptor may come along; it is to be closed unused.
  REM_MEM_REG: spec(38, 'memoryRegion', 'optional', 'ack', F.CONFIGURE_MEM_SLOTS),
  SET_STATUS: spec(39, 'u64', 0, 'ack', F.STATUS),
  GET_STATUS: spec(40, 'none', 0, 'u64', F.STATUS),
  GET_SHARED_OBJECT: spec(41, 'uuid', 0, 'none', F.SHARED_OBJECT, 'optional'),
  SET_DEVICE_STATE_FD: spec(42, 'deviceState', 1, 'u64', F.DEVICE_STATE, 'flag'),
  CHECK_DEVICE_STATE: spec(43, 'none', 0, 'u64', F.DEVICE_STATE),
  GET_SHMEM_CONFIG: spec(44, 'none', 0, 'sharedMemoryConfig', F.SHMEM),
} as const satisfies Record<string, MessageSpec>;

/** What the back end sends on the channel of SET_BACKEND_REQ_FD, by name. */
export const BACKEND_MESSAGES = {
  IOTLB_MSG: spec(1, 'iotlb', 0, 'ack'),
  CONFIG_CHANGE_MSG: spec(2, 'none', 0, 'ack', F.CONFIG),
  VRING_HOST_NOTIFIER_MSG: spec(3, 'vringArea', 'flag', 'ack', F.HOST_NOTIFIER),
  VRING_CALL: spec(4, 'vringState', 0, 'ack', F.INBAND_NOTIFICATIONS),
  VRING_ERR: spec(5, 'vringState', 0, 'ack', F.INBAND_NOTIFICATIONS),
  SHARED_OBJECT_ADD: spec(6, 'uuid', 0, 'ack', F.SHARED_OBJECT),
  SHARED_OBJECT_REMOVE: spec(7, 'uuid', 0, 'ack', F.SHARED_OBJECT),
  SHARED_OBJECT_LOOKUP: spec(8, 'uuid', 0, 'u64', F.SHARED_OBJECT, 'optional'),
  SHMEM_MAP: spec(9, 'sharedMemoryMap', 1, 'ack', F.SHMEM),
  SHMEM_UNMAP: spec(10, 'sharedMemoryMap', 0, 'ack', F.SHMEM),
} as const satisfies Record<string, MessageSpec>;

type FrontendTable = typeof FRONTEND_MESSAGES;
type BackendTable = typeof BACKEND_MESSAGES;

export type FrontendName = keyof FrontendTable;
export type BackendName = keyof BackendTable;

/** The payload of the front end's request `N`. */
export type FrontendPayload<N extends FrontendName> = Payloads[FrontendTable[N]['payload']];
/** The payload of the reply to the front end's request `N`; an acknowledgement is a u64. */
export type FrontendReply<N extends FrontendName> = Payloads[FrontendTable[N]['reply'] extends PayloadKind
  ? FrontendTable[N]['reply']
  : 'u64'];
/** The payload of the back end's request `N`. */
export type BackendPayload<N extends BackendName> = Payloads[BackendTable[N]['payload']];

/** A message whose frame is sound but whose request code nobody knows: it is skipped, and refused when NEED_REPLY is set. */
export interface UnknownMessage {
  readonly name: 'unknown';
  readonly header: Header;
}

/** A message whose payload or descriptors do not fit its request: refused, and the next one can still be read. */
export interface MalformedMessage {
  readonly name: 'malformed';
  readonly header: Header;
  readonly reason: string;
}

/** A decoded request of the front end: `switch (message.name)` narrows its payload. */
export type FrontendMessage =
  | { [N in FrontendName]: { readonly name: N; readonly header: Header; readonly payload: FrontendPayload<N> } }[FrontendName]
  | UnknownMessage
  | MalformedMessage;

/** A decoded request of the back end. */
export type BackendMessage =
  | { [N in BackendName]: { readonly name: N; readonly header: Header; readonly payload: BackendPayload<N> } }[BackendName]
  | UnknownMessage
  | MalformedMessage;

export interface Header {
  request: number;
  flags: number;
  size: number;
}

// --- decoding ---

/** Reads the header of the message at `offset`; {@link HEADER_SIZE} bytes must be there. */
export function decodeHeader(bytes: Uint8Array, offset = 0): Header {
  const cursor = new Cursor(bytes, offset, HEADER_SIZE);
  return { request: cursor.u32(), flags: cursor.u32(), size: cursor.u32() };
}

/** Why the stream cannot be followed past this header (the connection must be closed), or undefined. */
export function headerFault(header: Header, kind: 'request' | 'reply'): string | undefined {
  if ((header.flags & HeaderFlag.VERSION_MASK) !== HeaderFlag.VERSION)
    return `version ${header.flags & HeaderFlag.VERSION_MASK} instead of 1`;
  if (((header.flags & HeaderFlag.REPLY) !== 0) !== (kind === 'reply'))
    return kind === 'reply' ? 'a request instead of a reply' : 'a reply nobody waits for';
  if (header.size > MAX_PAYLOAD) return `a payload of ${header.size} bytes (${MAX_PAYLOAD} at most)`;
  return undefined;
}

const frontendNames = namesByRequest(FRONTEND_MESSAGES);
const backendNames = namesByRequest(BACKEND_MESSAGES);

function namesByRequest<N extends string>(table: Record<N, MessageSpec>): (N | undefined)[] {
  const names: (N | undefined)[] = [];
  for (const name in table) names[table[name].request] = name;
  return names;
}

/** The name of a front-end request code, for logs. */
export function frontendName(request: number): string {
  return frontendNames[request] ?? `request ${request}`;
}

/** The name of a back-end request code, for logs. */
export function backendName(request: number): string {
  return backendNames[request] ?? `back-end request ${request}`;
}

/** Decodes the front end's request whose payload lies at `offset` and came with `fdCount` descriptors. */
export function decodeFrontendMessage(header: Header, bytes: Uint8Array, offset: number, fdCount: number): FrontendMessage {
  return decodeMessage(FRONTEND_MESSAGES, frontendNames, header, bytes, offset, fdCount) as FrontendMessage;
}

/** Decodes the back end's request whose payload lies at `offset` and came with `fdCount` descriptors. */
export function decodeBackendMessage(header: Header, bytes: Uint8Array, offset: number, fdCount: number): BackendMessage {
  return decodeMessage(BACKEND_MESSAGES, backendNames, header, bytes, offset, fdCount) as BackendMessage;
}

function decodeMessage<N extends string>(
  table: Record<N, MessageSpec>,
  names: readonly (N | undefined)[],
  header: Header,
  bytes: Uint8Array,
  offset: number,
  fdCount: number,
) {
  const name = names[header.request];
  if (name === undefined) return { name: 'unknown', header };
  const { payload: kind, fds } = table[name];
  const payload = decodePayload(kind, bytes, offset, header.size);
  if (payload === MALFORMED) return { name: 'malformed', header, reason: `${name} with a payload of ${header.size} bytes` };
  const [least, most] = fdsExpected(fds, payload);
  if (fdCount < least || fdCount > most) {
    return { name: 'malformed', header, reason: `${name} with ${fdCount} descriptors instead of ${most}` };
  }
  return { name, header, payload };
}

/** How many descriptors must and may come with a payload. */
function fdsExpected(rule: FdRule, payload: Payloads[PayloadKind]): readonly [least: number, most: number] {
  switch (rule) {
    case 'region':
      return Array.isArray(payload) ? [payload.length, payload.length] : [0, 0];
    case 'optional':
      return [0, 1];
    case 'flag': {
      const flags = typeof payload === 'bigint' ? payload : (payload as VringArea).index;
      return (flags & NO_FD) !== 0n ? [0, 0] : [1, 1];
    }
    default:
      return [rule, rule];
  }
}

/** What {@link decodePayload} gives for bytes that are not such a payload. */
export const MALFORMED = Symbol('malformed payload');

/** Decodes a payload of `size` bytes at `offset`, of a request or a reply. */
export function decodePayload<K extends PayloadKind>(
  kind: K,
  bytes: Uint8Array,
  offset: number,
  size: number,
): Payloads[K] | typeof MALFORMED {
  const codec: Codec<Payloads[K]> = codecs[kind];
  if (size < codec.min || size > codec.max || offset + size > bytes.length) return MALFORMED;
  const cursor = new Cursor(bytes, offset, size);
  const value = codec.decode(cursor);
  return cursor.overrun || (value === undefined && kind !== 'none') ? MALFORMED : (value as Payloads[K]);
}

// --- encoding ---

/**
 * Writes a message of any kind at `offset`: header and payload.
 * @returns the number of bytes written.
 */
export function encodeMessage<K extends PayloadKind>(
  bytes: Uint8Array,
  offset: number,
  request: number,
  flags: number,
  kind: K,
  payload: Payloads[K],
): number {
  const cursor = new Cursor(bytes, offset);
  cursor.position = HEADER_SIZE;
  codecs[kind].encode(cursor, payload);
  const end = cursor.position;
  cursor.position = 0;
  cursor.putU32(request);
  cursor.putU32(flags | HeaderFlag.VERSION);
  cursor.putU32(end - HEADER_SIZE);
  return end;
}

/** Writes the front end's request `name` at `offset`; returns the number of bytes. */
export function encodeFrontendMessage<N extends FrontendName>(
  bytes: Uint8Array,
  offset: number,
  name: N,
  payload: FrontendPayload<N>,
  needReply = false,
): number {
  const { request, payload: kind } = FRONTEND_MESSAGES[name];
  return encodeMessage(bytes, offset, request, needReply ? HeaderFlag.NEED_REPLY : 0, kind as PayloadKind, payload);
}

/** Writes the back end's request `name` at `offset`; returns the number of bytes. */
export function encodeBackendMessage<N extends BackendName>(
  bytes: Uint8Array,
  offset: number,
  name: N,
  payload: BackendPayload<N>,
  needReply = false,
): number {
  const { request, payload: kind } = BACKEND_MESSAGES[name];
  return encodeMessage(bytes, offset, request, needReply ? HeaderFlag.NEED_REPLY : 0, kind as PayloadKind, payload);
}

/** Writes the reply to request code `request` at `offset`; returns the number of bytes. */
export function encodeReply<K extends PayloadKind>(
  bytes: Uint8Array,
  offset: number,
  request: number,
  kind: K,
  payload: Payloads[K],
): number {
  return encodeMessage(bytes, offset, request, HeaderFlag.REPLY, kind, payload);
}
