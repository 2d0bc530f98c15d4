/**
 * The front-end half: what a VMM does on the vhost-user socket, for tests, benches, fuzzers and anyone who needs a small front end.
 *
 * Synchronous on purpose: each method sends one message and, when a reply is due, waits for it, so that a test reads like the
 * protocol. Where front end and back end share one thread, the `turn` hook lets the back end run between send and wait.
 *
 * This is the control plane, where a failed message ends the session: failures are thrown as {@link VhostUserError}.
 */
import {
  BACKEND_MESSAGES,
  type BackendMessage,
  type Config,
  type DeviceState,
  decodeBackendMessage,
  decodeHeader,
  decodePayload,
  encodeFrontendMessage,
  encodeMessage,
  encodeReply,
  FRONTEND_MESSAGES,
  type FrontendName,
  type FrontendPayload,
  type FrontendReply,
  HEADER_SIZE,
  type Header,
  HeaderFlag,
  hasFeature,
  headerFault,
  type Inflight,
  type Iotlb,
  MALFORMED,
  MAX_FDS,
  MAX_MESSAGE,
  type MemoryRegion,
  type MessageSpec,
  NO_FD,
  type PayloadKind,
  ProtocolFeature,
  type VringAddress,
} from './message.js';
import { arena, arenaAlloc, cString, native } from './native.js';

const POLLIN = 1;
const POLLOUT = 4;
const EAGAIN = 11;
const EINTR = 4;

// One set of buffers for the thread: a message is built and sent, or received and decoded, in one go.
const frame = arenaAlloc(MAX_MESSAGE);
const fdList = arenaAlloc(4 + MAX_FDS * 4);

/** Why a front end could not go on. */
export class VhostUserError extends Error {
  /** `refused`: the back end answered with an error; `timeout`: no answer in time; `closed`: the connection ended; `protocol`: an answer that is none; `system`: a system call failed. */
  readonly kind: 'refused' | 'timeout' | 'closed' | 'protocol' | 'system';
  /** The value of the refusal, or the errno of the failed system call. */
  readonly value: number;

  constructor(kind: VhostUserError['kind'], message: string, value = 0) {
    super(message);
    this.name = 'VhostUserError';
    this.kind = kind;
    this.value = value;
  }
}

export interface FrontendOptions {
  /** Milliseconds to wait for a reply (5000). */
  timeout?: number;
  /** Asks for an acknowledgement of every message once REPLY_ACK is negotiated (true). */
  acknowledge?: boolean;
  /** Runs the back end's turn, where it lives in this thread: called until the reply is there. */
  turn?: () => void;
}

/** A received frame: header, payload (a copy) and the descriptors that came along, which belong to the caller. */
export interface Frame {
  header: Header;
  payload: Uint8Array;
  fds: number[];
}

/** A request that the back end sent on its own channel. */
export interface BackendRequest {
  message: BackendMessage;
  /** Descriptors that came along; they belong to the caller. */
  fds: number[];
}

export class VhostUserFrontend {
  /** The connected socket. */
  readonly fd: number;
  /** What SET_PROTOCOL_FEATURES negotiated. */
  protocolFeatures = 0n;
  /** Descriptors of the last reply. They belong to the front end until {@link takeReplyFds}. */
  private replyFds: number[] = [];
  private backendChannel = -1;
  private readonly timeout: number;
  private readonly acknowledge: boolean;
  private readonly turn: (() => void) | undefined;

  /** Takes over a connected Unix socket. */
  constructor(fd: number, options: FrontendOptions = {}) {
    this.fd = fd;
    this.timeout = options.timeout ?? 5000;
    this.acknowledge = options.acknowledge ?? true;
    this.turn = options.turn;
  }

  /** Connects to a back end that listens on `path`. */
  static connect(path: string, options: FrontendOptions = {}): VhostUserFrontend {
    return new VhostUserFrontend(checked(native.unixConnect(cString(path)), `connect to ${path}`), options);
  }

  /** A connected pair: a front end and the socket for a back end. */
  static pair(options: FrontendOptions = {}): { frontend: VhostUserFrontend; backendFd: number } {
    const [ours, theirs] = socketPair();
    return { frontend: new VhostUserFrontend(ours, options), backendFd: theirs };
  }

  /** Closes the connection and the back-end channel. */
  close(): void {
    this.dropReplyFds();
    this.closeBackendChannel();
    native.close(this.fd);
  }

  // --- features and session ---

  getFeatures(): bigint {
    return this.request('GET_FEATURES', undefined);
  }

  setFeatures(features: bigint): void {
    this.command('SET_FEATURES', features);
  }

  getProtocolFeatures(): bigint {
    return this.request('GET_PROTOCOL_FEATURES', undefined);
  }

  setProtocolFeatures(features: bigint): void {
    this.command('SET_PROTOCOL_FEATURES', features);
    this.protocolFeatures = features;
  }

  setOwner(): void {
    this.command('SET_OWNER', undefined);
  }

  resetOwner(): void {
    this.command('RESET_OWNER', undefined);
  }

  getQueueNum(): number {
    return Number(this.request('GET_QUEUE_NUM', undefined));
  }

  resetDevice(): void {
    this.command('RESET_DEVICE', undefined);
  }

  setStatus(status: number): void {
    this.command('SET_STATUS', BigInt(status));
  }

  getStatus(): number {
    return Number(this.request('GET_STATUS', undefined));
  }

  // --- memory ---

  /** `fds[i]` is the file of `regions[i]`. */
  setMemTable(regions: MemoryRegion[], fds: readonly number[]): void {
    this.command('SET_MEM_TABLE', regions, fds);
  }

  getMaxMemSlots(): number {
    return Number(this.request('GET_MAX_MEM_SLOTS', undefined));
  }

  addMemReg(region: MemoryRegion, fd: number): void {
    this.command('ADD_MEM_REG', region, [fd]);
  }

  /** Some front ends pass a descriptor here, which the back end must close unused. */
  remMemReg(region: MemoryRegion, fds: readonly number[] = []): void {
    this.command('REM_MEM_REG', region, fds);
  }

  /** The log covers guest memory from address 0, one bit for 4096 bytes. */
  setLogBase(size: bigint, offset: bigint, fd: number): void {
    const status = this.request('SET_LOG_BASE', { size, offset }, [fd]);
    if (status !== 0n) throw new VhostUserError('refused', `SET_LOG_BASE was answered with ${status}`, Number(status));
  }

  setLogFd(fd: number): void {
    this.command('SET_LOG_FD', undefined, [fd]);
  }

  iotlb(message: Iotlb): bigint {
    return this.request('IOTLB_MSG', message);
  }

  // --- vrings ---

  setVringNum(index: number, num: number): void {
    this.command('SET_VRING_NUM', { index, num });
  }

  setVringAddr(address: VringAddress): void {
    this.command('SET_VRING_ADDR', address);
  }

  setVringBase(index: number, num: number): void {
    this.command('SET_VRING_BASE', { index, num });
  }

  /** Stops the vring; returns the avail index that the back end would have taken next. */
  getVringBase(index: number): number {
    return this.request('GET_VRING_BASE', { index, num: 0 }).num;
  }

  /** Without `fd` the back end is told that there is none. */
  setVringKick(index: number, fd?: number): void {
    this.setVringFd('SET_VRING_KICK', index, fd);
  }

  setVringCall(index: number, fd?: number): void {
    this.setVringFd('SET_VRING_CALL', index, fd);
  }

  setVringErr(index: number, fd?: number): void {
    this.setVringFd('SET_VRING_ERR', index, fd);
  }

  setVringEnable(index: number, enable: boolean): void {
    this.command('SET_VRING_ENABLE', { index, num: enable ? 1 : 0 });
  }

  setVringEndian(index: number, bigEndian: boolean): void {
    this.command('SET_VRING_ENDIAN', { index, num: bigEndian ? 1 : 0 });
  }

  /** The kick as a message (INBAND_NOTIFICATIONS). */
  vringKick(index: number): void {
    this.command('VRING_KICK', { index, num: 0 });
  }

  // --- configuration space ---

  getConfig(offset: number, size: number, flags = 0): Uint8Array {
    const { data } = this.request('GET_CONFIG', { offset, flags, data: new Uint8Array(size) });
    if (data.length !== size) throw new VhostUserError('protocol', `${data.length} bytes of configuration instead of ${size}`);
    return data;
  }

  setConfig(config: Config): void {
    this.command('SET_CONFIG', config);
  }

  // --- migration ---

  /**
   * Offers `fd` for the transfer of the back end's state.
   * @returns the descriptor that the back end wants used instead (the caller's), or -1.
   */
  setDeviceStateFd(state: DeviceState, fd: number): number {
    const reply = this.request('SET_DEVICE_STATE_FD', state, [fd]);
    if ((reply & 0xffn) !== 0n)
      throw new VhostUserError('refused', `SET_DEVICE_STATE_FD was answered with ${reply}`, Number(reply & 0xffn));
    if ((reply & NO_FD) !== 0n) return -1;
    return this.takeReplyFds()[0] ?? -1;
  }

  /** 0 when the transfer went well. */
  checkDeviceState(): number {
    return Number(this.request('CHECK_DEVICE_STATE', undefined));
  }

  /** The descriptor of the buffer comes with the reply: {@link takeReplyFds}. */
  getInflightFd(inflight: Inflight): Inflight {
    return this.request('GET_INFLIGHT_FD', inflight);
  }

  setInflightFd(inflight: Inflight, fd: number): void {
    this.command('SET_INFLIGHT_FD', inflight, [fd]);
  }

  /** The userfaultfd comes with the reply: {@link takeReplyFds}. */
  postcopyAdvise(): void {
    this.request('POSTCOPY_ADVISE', undefined);
  }

  postcopyListen(): void {
    this.command('POSTCOPY_LISTEN', undefined);
  }

  postcopyEnd(): bigint {
    return this.request('POSTCOPY_END', undefined);
  }

  // --- what only some device types have ---

  /** `mac` in the first six bytes of the u64. */
  sendRarp(mac: bigint): void {
    this.command('SEND_RARP', mac);
  }

  netSetMtu(mtu: number): void {
    this.command('NET_SET_MTU', BigInt(mtu));
  }

  createCryptoSession(session: Uint8Array): Uint8Array {
    return this.request('CREATE_CRYPTO_SESSION', session);
  }

  closeCryptoSession(session: bigint): void {
    this.command('CLOSE_CRYPTO_SESSION', session);
  }

  gpuSetSocket(fd: number): void {
    this.command('GPU_SET_SOCKET', undefined, [fd]);
  }

  /** The dma-buf comes with the reply, if the back end has it: {@link takeReplyFds}. */
  getSharedObject(uuid: Uint8Array): void {
    this.request('GET_SHARED_OBJECT', uuid);
  }

  /** The size of each shared memory region, by its id. */
  getSharedMemoryConfig(): bigint[] {
    return this.request('GET_SHMEM_CONFIG', undefined);
  }

  // --- the back end's own requests ---

  /** Makes the channel for the back end's requests and passes its other end. */
  openBackendChannel(): void {
    const [ours, theirs] = socketPair();
    this.closeBackendChannel();
    this.backendChannel = ours;
    try {
      this.command('SET_BACKEND_REQ_FD', undefined, [theirs]);
    } finally {
      native.close(theirs);
    }
  }

  /** The next request of the back end, or undefined when none came within `timeout` milliseconds. */
  receiveBackendRequest(timeout = this.timeout): BackendRequest | undefined {
    if (!this.wait(this.backendChannel, POLLIN, timeout)) return undefined;
    const { header, payload, fds } = this.receiveFrom(this.backendChannel, timeout, 'request');
    return { message: decodeBackendMessage(header, payload, 0, fds.length), fds };
  }

  /** Answers a request of the back end that asked for it (NEED_REPLY, or a kind that always has a reply); otherwise nothing is sent. */
  answerBackendRequest(message: BackendMessage, status = 0n, fds: readonly number[] = []): void {
    const { header } = message;
    const always = message.name in BACKEND_MESSAGES && BACKEND_MESSAGES[message.name as keyof typeof BACKEND_MESSAGES].reply !== 'ack';
    if (!always && (header.flags & HeaderFlag.NEED_REPLY) === 0) return;
    this.transmit(this.backendChannel, encodeReply(arena.u8, frame, header.request, 'u64', status), fds);
  }

  closeBackendChannel(): void {
    if (this.backendChannel >= 0) native.close(this.backendChannel);
    this.backendChannel = -1;
  }

  // --- one message at a time ---

  /** Sends a request that always has a reply, and waits for it. */
  request<N extends FrontendName>(name: N, payload: FrontendPayload<N>, fds: readonly number[] = []): FrontendReply<N> {
    this.send(name, payload, fds, false);
    return this.receiveReply(name);
  }

  /** Sends a request that has no reply of its own; with REPLY_ACK the acknowledgement is asked for and must be 0. */
  command<N extends FrontendName>(name: N, payload: FrontendPayload<N>, fds: readonly number[] = []): void {
    const needReply = this.acknowledge && hasFeature(this.protocolFeatures, ProtocolFeature.REPLY_ACK);
    this.send(name, payload, fds, needReply);
    if (!needReply) return;
    const status = this.receiveReply(name) as bigint;
    if (status !== 0n) throw new VhostUserError('refused', `${name} was answered with ${status}`, Number(status));
  }

  /** Only sends: the reply, if any, is the caller's to receive. */
  send<N extends FrontendName>(name: N, payload: FrontendPayload<N>, fds: readonly number[] = [], needReply = false): void {
    this.transmit(this.fd, encodeFrontendMessage(arena.u8, frame, name, payload, needReply), fds);
  }

  /** Sends a message with any request code, flags and payload: for tests of what a back end does with it. */
  sendFrame<K extends PayloadKind>(
    request: number,
    flags: number,
    kind: K,
    payload: Parameters<typeof encodeMessage<K>>[5],
    fds: readonly number[] = [],
  ): void {
    this.transmit(this.fd, encodeMessage(arena.u8, frame, request, flags, kind, payload), fds);
  }

  /** Sends bytes as they are. */
  sendBytes(bytes: Uint8Array, fds: readonly number[] = []): void {
    for (let sent = 0; sent < bytes.length; sent += MAX_MESSAGE) {
      const part = bytes.subarray(sent, sent + MAX_MESSAGE);
      arena.u8.set(part, frame);
      this.transmit(this.fd, part.length, sent === 0 ? fds : []);
    }
  }

  /** Receives the reply to `name`: its own payload, or the acknowledgement. */
  receiveReply<N extends FrontendName>(name: N): FrontendReply<N> {
    const { header, payload, fds } = this.receiveFrame();
    this.replyFds = fds;
    const { request, reply }: MessageSpec = FRONTEND_MESSAGES[name];
    if (header.request !== request) throw new VhostUserError('protocol', `a reply to request ${header.request} instead of ${name}`);
    const kind = reply === 'ack' ? 'u64' : reply;
    // "uses zero length of payload to indicate an error" (GET_CONFIG)
    if (header.size === 0 && kind === 'config') throw new VhostUserError('refused', `${name} was refused`);
    const value = decodePayload(kind, payload, 0, header.size);
    if (value === MALFORMED) throw new VhostUserError('protocol', `a reply of ${header.size} bytes to ${name}`);
    return value as FrontendReply<N>;
  }

  /** Receives one reply as it is. */
  receiveFrame(timeout = this.timeout): Frame {
    this.dropReplyFds();
    return this.receiveFrom(this.fd, timeout, 'reply');
  }

  /** Whether something (a reply, or the end of the stream) can be received within `timeout` milliseconds. */
  readable(timeout = 0): boolean {
    return this.wait(this.fd, POLLIN, timeout);
  }

  /** Whether the back end has closed the connection, waiting at most `timeout` milliseconds for it. */
  closedByPeer(timeout = this.timeout): boolean {
    if (!this.wait(this.fd, POLLIN, timeout)) return false;
    const length = native.recvmsg(this.fd, frame, 1, fdList, 0);
    return length === 0 || (length < 0 && length !== -EAGAIN);
  }

  /** The descriptors of the last reply, the caller's from now on. */
  takeReplyFds(): number[] {
    const fds = this.replyFds;
    this.replyFds = [];
    return fds;
  }

  private setVringFd(name: 'SET_VRING_KICK' | 'SET_VRING_CALL' | 'SET_VRING_ERR', index: number, fd: number | undefined): void {
    if (fd === undefined) this.command(name, BigInt(index) | NO_FD);
    else this.command(name, BigInt(index), [fd]);
  }

  private dropReplyFds(): void {
    for (const fd of this.takeReplyFds()) native.close(fd);
  }

  /** Sends `length` bytes of the frame buffer. */
  private transmit(fd: number, length: number, fds: readonly number[]): void {
    let sent = 0;
    while (sent < length) {
      // Descriptors travel with the first byte: a rest is sent without them.
      const passed = sent === 0 ? fds : [];
      arena.i32.set(passed, fdList >> 2);
      const result = native.sendmsg(fd, frame + sent, length - sent, fdList, passed.length);
      if (result > 0) sent += result;
      else if (result === -EAGAIN) this.mustWait(fd, POLLOUT, this.timeout);
      else if (result !== -EINTR) throw new VhostUserError('closed', `sendmsg: errno ${-result}`, -result);
    }
  }

  private receiveFrom(fd: number, timeout: number, kind: 'request' | 'reply'): Frame {
    const fds: number[] = [];
    this.receiveExactly(fd, HEADER_SIZE, timeout, fds);
    const header = decodeHeader(arena.u8, frame);
    const fault = headerFault(header, kind);
    if (fault !== undefined) throw new VhostUserError('protocol', fault);
    this.receiveExactly(fd, header.size, timeout, fds);
    return { header, payload: arena.u8.slice(frame, frame + header.size), fds };
  }

  /** Fills the frame buffer with `length` bytes, collecting descriptors in `fds`. */
  private receiveExactly(fd: number, length: number, timeout: number, fds: number[]): void {
    let received = 0;
    while (received < length) {
      arena.i32[fdList >> 2] = 0;
      const result = native.recvmsg(fd, frame + received, length - received, fdList, MAX_FDS);
      if (result > 0) {
        received += result;
        const count = arena.i32[fdList >> 2] ?? 0;
        for (let i = 1; i <= count; i++) fds.push(arena.i32[(fdList >> 2) + i] ?? -1);
      } else if (result === -EAGAIN) this.mustWait(fd, POLLIN, timeout);
      else if (result !== -EINTR)
        throw new VhostUserError('closed', result === 0 ? 'the back end closed the connection' : `recvmsg: errno ${-result}`, -result);
    }
  }

  private mustWait(fd: number, events: number, timeout: number): void {
    if (!this.wait(fd, events, timeout)) throw new VhostUserError('timeout', `no answer within ${timeout} ms`);
  }

  /** Waits for `events` of `fd`, giving the back end its turn where it lives in this thread. */
  private wait(fd: number, events: number, timeout: number): boolean {
    const end = performance.now() + timeout;
    for (let round = 0; ; round++) {
      this.turn?.();
      const left = Math.max(0, Math.ceil(end - performance.now()));
      // With a turn to give, the first rounds only look: the answer mostly comes with the first.
      const revents = native.poll(fd, events, this.turn === undefined ? left : Math.min(left, round < 4 ? 0 : 1));
      if (revents > 0) return true;
      if (revents < 0 && revents !== -EINTR) throw new VhostUserError('system', `poll: errno ${-revents}`, -revents);
      if (left === 0) return false;
    }
  }
}

function socketPair(): [number, number] {
  checked(native.socketpair(fdList), 'socketpair');
  return [arena.i32[fdList >> 2] ?? -1, arena.i32[(fdList >> 2) + 1] ?? -1];
}

function checked(result: number, what: string): number {
  if (result < 0) throw new VhostUserError('system', `${what}: errno ${-result}`, -result);
  return result;
}
