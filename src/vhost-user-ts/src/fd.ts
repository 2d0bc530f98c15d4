/** Descriptors that came over a socket: owned by whoever takes them, closed when nobody does. */
import { native } from './native.js';

/** The descriptors of one message. */
export class PassedFds {
  #fds: number[] = [];

  get count(): number {
    return this.#fds.length;
  }

  append(fd: number): void {
    this.#fds.push(fd);
  }

  /** Hands over the next descriptor (the caller closes it from now on), or -1. */
  take(): number {
    return this.#fds.shift() ?? -1;
  }

  /** Closes what nobody took. */
  closeAll(): void {
    for (const fd of this.#fds) native.close(fd);
    this.#fds = [];
  }
}

/** Closes a descriptor unless it is -1; returns -1, to be stored in its place. */
export function closeFd(fd: number): -1 {
  if (fd >= 0) native.close(fd);
  return -1;
}
