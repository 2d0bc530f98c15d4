/** The one blocking wait of a device thread: descriptors and what to do when each becomes ready. */
import { arena, arenaAlloc, native } from './native.js';

const EPOLLIN = 1;
const EPOLLET = 0x8000_0000;
const MAX_EVENTS = 64;

/** Called when a descriptor is ready; `events` is the EPOLL* mask. */
export type ReadyHandler = (events: number) => void;

/** An epoll set with handlers. Not bound to Node's event loop: {@link turn} blocks the thread it is called in. */
export class WaitLoop {
  readonly #epoll: number;
  readonly #events = arenaAlloc(MAX_EVENTS * 8);
  readonly #handlers: (ReadyHandler | undefined)[] = [];
  readonly #fds: number[] = [];

  constructor() {
    this.#epoll = native.epollCreate();
    if (this.#epoll < 0) throw new Error(`epoll_create1 failed with errno ${-this.#epoll}: raise the open files limit`);
  }

  /**
   * Waits for `fd` from now on.
   * @param edge true for eventfds: each write wakes once and needs no read (EPOLLET), which saves a system call per kick
   * @param events what for: EPOLLIN, or EPOLLOUT 4
   * @returns a tag for {@link remove}, or -errno (-EPERM for a regular file, -EEXIST when it is there already)
   */
  add(fd: number, edge: boolean, handler: ReadyHandler, events: number = EPOLLIN): number {
    let tag = this.#handlers.indexOf(undefined);
    if (tag < 0) tag = this.#handlers.length;
    const result = native.epollAdd(this.#epoll, fd, edge ? events + EPOLLET : events, tag);
    if (result < 0) return result;
    this.#handlers[tag] = handler;
    this.#fds[tag] = fd;
    return tag;
  }

  /** Stops waiting for the descriptor of this tag; before it is closed. */
  remove(tag: number): void {
    if (this.#handlers[tag] === undefined) return;
    native.epollDelete(this.#epoll, this.#fds[tag] as number);
    this.#handlers[tag] = undefined;
  }

  /**
   * Waits at most `timeout` milliseconds (-1: for ever, 0: not at all) and calls the handlers of what is ready.
   * @returns how many were ready.
   */
  turn(timeout: number): number {
    const n = native.epollWait(this.#epoll, this.#events, MAX_EVENTS, timeout);
    for (let i = 0; i < n; i++) {
      const at = (this.#events >> 2) + 2 * i;
      // A handler that ran before may have removed this one.
      const handler = this.#handlers[arena.u32[at] as number];
      if (handler !== undefined) handler(arena.u32[at + 1] as number);
    }
    return n;
  }

  close(): void {
    native.close(this.#epoll);
  }
}
