/**
 * Framing of vhost-user messages on a Unix stream socket: bytes and descriptors become whole messages, and replies go back.
 * A message may arrive in pieces; the socket never blocks the thread.
 */

import { PassedFds } from './fd.js';
import { decodeFrontendMessage, decodeHeader, HEADER_SIZE, type Header, headerFault, MAX_FDS, MAX_MESSAGE } from './message.js';
import { arena, arenaAlloc, arenaFree, native } from './native.js';

const EAGAIN = 11;
const POLLOUT = 4;
/** How long a peer may leave a reply unread before it counts as gone. */
const SEND_TIMEOUT_MS = 1000;

const FD_AREA_BYTES = 4 * (1 + MAX_FDS);

/** What {@link Connection.receive} found. */
export const Received = { none: 0, message: 1, closed: 2 } as const;

/** One end of a vhost-user connection. */
export class Connection {
  /** The socket; -1 once closed. */
  fd: number;
  readonly kind: 'request' | 'reply';
  /** Header of the last received message. */
  header: Header = { request: 0, flags: 0, size: 0 };
  /** Descriptors of the last received message. */
  readonly fds = new PassedFds();
  /** Why the connection ended, when {@link receive} said so. */
  reason = '';

  readonly #buffer = arenaAlloc(MAX_MESSAGE);
  readonly #out = arenaAlloc(MAX_MESSAGE);
  readonly #fdArea = arenaAlloc(FD_AREA_BYTES);
  readonly #leaves: boolean;
  #filled = 0;

  /** Bytes of the last message that are still in the socket, see {@link consume}. */
  unconsumed = 0;

  /**
   * @param fd connected socket, non-blocking; owned by the connection
   * @param kind which messages are expected: a back end gets requests, the other end replies
   * @param leaves a message of a front end that is there as a whole stays in the socket until {@link consume}: should the process end, the next one finds it
   */
  constructor(fd: number, kind: 'request' | 'reply' = 'request', leaves = false) {
    this.fd = fd;
    this.kind = kind;
    this.#leaves = leaves;
  }

  /** Where the payload of the last message lies, in {@link bytes}. */
  get payload(): number {
    return this.#buffer + HEADER_SIZE;
  }

  /** The memory that messages lie in. */
  get bytes(): Uint8Array {
    return arena.u8;
  }

  /** Where an outgoing message may be built before {@link send}. */
  get out(): number {
    return this.#out;
  }

  /** Reads as much of the next message as there is. Descriptors of a message that was not handled further are closed. */
  receive(): number {
    this.consume();
    if (this.#filled === 0) {
      this.fds.closeAll();
      if (this.#leaves && this.#peek()) return Received.message;
    }
    for (;;) {
      // Never read past the message: the descriptors of the next one would come along.
      const want = this.#filled < HEADER_SIZE ? HEADER_SIZE : HEADER_SIZE + this.header.size;
      if (this.#filled === want) {
        this.#filled = 0;
        return Received.message;
      }
      const n = native.recvmsg(this.fd, this.#buffer + this.#filled, want - this.#filled, this.#fdArea, MAX_FDS);
      if (n === -EAGAIN) return Received.none;
      if (n <= 0) return this.#end(n === 0 ? 'the peer closed the connection' : `recvmsg failed with errno ${-n}`);
      const passed = arena.i32[this.#fdArea >> 2] as number;
      for (let i = 0; i < passed; i++) this.fds.append(arena.i32[(this.#fdArea >> 2) + 1 + i] as number);
      if (this.fds.count > MAX_FDS) return this.#end('too many descriptors with one message');
      this.#filled += n;
      if (this.#filled === HEADER_SIZE) {
        this.header = decodeHeader(arena.u8, this.#buffer);
        const fault = headerFault(this.header, this.kind);
        if (fault !== undefined) return this.#end(`not a vhost-user message: ${fault}`);
      }
    }
  }

  /** Looks at the front end's next message without taking it; false when it is not there as a whole, or not to be told apart. */
  #peek(): boolean {
    let n = native.peekmsg(this.fd, this.#buffer, HEADER_SIZE, this.#fdArea, -1);
    if (n < HEADER_SIZE) return false;
    this.header = decodeHeader(arena.u8, this.#buffer);
    if (headerFault(this.header, this.kind) !== undefined) return false;
    const whole = HEADER_SIZE + this.header.size;
    n = native.peekmsg(this.fd, this.#buffer, whole, this.#fdArea, MAX_FDS);
    if (n < 0) return false;
    const passed = arena.i32[this.#fdArea >> 2] as number;
    for (let i = 0; i < passed; i++) this.fds.append(arena.i32[(this.#fdArea >> 2) + 1 + i] as number);
    // The kernel shows descriptors of a later message, too (unix_stream_read_generic()): where they do not fit, only taking tells.
    const { name } = decodeFrontendMessage(this.header, arena.u8, this.payload, this.fds.count);
    if (n < whole || this.fds.count > MAX_FDS || name === 'malformed' || (name === 'unknown' && this.fds.count > 0)) {
      this.fds.closeAll();
      return false;
    }
    this.unconsumed = whole;
    return true;
  }

  /** Takes the last message out of the socket. Its payload is gone then. */
  consume(): void {
    if (this.unconsumed === 0) return;
    native.recvmsg(this.fd, this.#buffer, this.unconsumed, this.#fdArea, -1);
    this.unconsumed = 0;
  }

  #end(reason: string): number {
    this.reason = reason;
    this.#filled = 0;
    this.fds.closeAll();
    return Received.closed;
  }

  /**
   * Sends `length` bytes from arena offset `from`, with descriptors (which stay the caller's).
   * @returns false when the peer is gone or does not read.
   */
  send(from: number, length: number, fds: readonly number[] = []): boolean {
    let done = 0;
    let passed = fds.length;
    let deadline = 0;
    while (done < length) {
      for (let i = 0; i < passed; i++) arena.i32[(this.#fdArea >> 2) + i] = fds[i] as number;
      const n = native.sendmsg(this.fd, from + done, length - done, this.#fdArea, passed);
      if (n === -EAGAIN) {
        const now = performance.now();
        if (deadline === 0) deadline = now + SEND_TIMEOUT_MS;
        if (now >= deadline) return false;
        native.poll(this.fd, POLLOUT, Math.ceil(deadline - now)); // a signal may end it early
        continue;
      }
      if (n < 0) return false;
      passed = 0;
      done += n;
    }
    return true;
  }

  /** Closes the socket; the connection is of no use afterwards. */
  close(): void {
    if (this.fd < 0) return;
    this.fds.closeAll();
    native.close(this.fd);
    this.fd = -1;
    arenaFree(this.#buffer, MAX_MESSAGE);
    arenaFree(this.#out, MAX_MESSAGE);
    arenaFree(this.#fdArea, FD_AREA_BYTES);
  }
}
