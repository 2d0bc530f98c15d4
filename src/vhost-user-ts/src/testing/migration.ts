/** What a VMM does for live migration: the log of dirty pages, and the device's state from one back end to another. */
import type { VhostUserFrontend } from '../frontend.js';
import { arena, arenaAlloc, arenaFree, cString, native } from '../native.js';
import type { MockMemory } from './mock-memory.js';

const PAGE = 4096;
const POLLIN = 1;
const POLLOUT = 4;
const EAGAIN = 11;
const CHUNK = 64 << 10;
const SAVE = 0;
const LOAD = 1;
const PHASE_STOPPED = 0;

/** One bit for each page of guest memory that the back end wrote to. */
export class DirtyLog {
  readonly fd: number;
  readonly bytes: number;
  readonly #mapping: number;
  readonly #bits: Buffer;

  constructor(memory: MockMemory) {
    const end = Math.max(...memory.regions.map((region) => region.guestAddress + region.size));
    this.bytes = Math.ceil(end / PAGE / 8);
    this.fd = native.memfdCreate(cString('dirty-log'), this.bytes);
    this.#mapping = native.regionMap(this.fd, 0, this.bytes, 1);
    if (this.#mapping < 0) throw new Error(`mapping the dirty log: errno ${-this.#mapping}`);
    this.#bits = Buffer.from(native.regionBuffer(this.#mapping, 0, this.bytes));
  }

  /** Page numbers that are marked; they are no more afterwards. */
  take(): number[] {
    const pages: number[] = [];
    for (const [at, byte] of this.#bits.entries()) {
      if (byte === 0) continue;
      for (let bit = 0; bit < 8; bit++) if ((byte >> bit) & 1) pages.push(at * 8 + bit);
      this.#bits[at] = 0;
    }
    return pages;
  }

  close(): void {
    native.regionUnmap(this.#mapping);
    native.close(this.fd);
  }
}

/** Has the back end save the device's state (its rings are stopped). @returns the stream; throws when the back end says that it failed */
export function saveState(frontend: VhostUserFrontend, timeout = 30_000): Buffer {
  const [ours, theirs] = pair();
  const chunks: Buffer[] = [];
  const buffer = arenaAlloc(CHUNK);
  try {
    try {
      frontend.setDeviceStateFd({ direction: SAVE, phase: PHASE_STOPPED }, theirs);
    } finally {
      native.close(theirs);
    }
    for (;;) {
      const n = native.read(ours, buffer, CHUNK);
      if (n === 0) break;
      if (n > 0) chunks.push(Buffer.from(arena.u8.slice(buffer, buffer + n)));
      else if (n !== -EAGAIN) throw new Error(`reading the state: errno ${-n}`);
      else if (native.poll(ours, POLLIN, timeout) === 0) throw new Error(`no more of the state within ${timeout} ms`);
    }
  } finally {
    native.close(ours);
    arenaFree(buffer, CHUNK);
  }
  const status = frontend.checkDeviceState();
  if (status !== 0) throw new Error(`CHECK_DEVICE_STATE after saving: ${status}`);
  return Buffer.concat(chunks);
}

/** Has the back end take over a state. @returns what CHECK_DEVICE_STATE answers: 0 when all went well */
export function loadState(frontend: VhostUserFrontend, state: Uint8Array, timeout = 30_000): number {
  const [ours, theirs] = pair();
  const buffer = arenaAlloc(CHUNK);
  try {
    try {
      frontend.setDeviceStateFd({ direction: LOAD, phase: PHASE_STOPPED }, theirs);
    } finally {
      native.close(theirs);
    }
    for (let done = 0; done < state.length; ) {
      const part = state.subarray(done, done + CHUNK);
      arena.u8.set(part, buffer);
      const n = native.write(ours, buffer, part.length);
      if (n > 0) done += n;
      else if (n !== -EAGAIN)
        break; // it has given up: the answer says so
      else if (native.poll(ours, POLLOUT, timeout) === 0) throw new Error(`the state is not read within ${timeout} ms`);
    }
  } finally {
    native.close(ours);
    arenaFree(buffer, CHUNK);
  }
  return frontend.checkDeviceState();
}

function pair(): [number, number] {
  const at = arenaAlloc(8);
  const error = native.socketpair(at);
  if (error < 0) throw new Error(`socketpair: errno ${-error}`);
  const fds: [number, number] = [arena.i32[at >> 2] as number, arena.i32[(at >> 2) + 1] as number];
  arenaFree(at, 8);
  return fds;
}
