/**
 * The device thread's half of the metrics server: it starts a thread that serves HTTP (`server-thread.ts`), because the device
 * thread itself sleeps in native calls and answers nobody.
 */
import { unlinkSync } from 'node:fs';
import { resolve } from 'node:path';
import { Worker } from 'node:worker_threads';
import type { MetricsAddress } from '../config.js';
import type { MetricsSource } from './prometheus.js';

/** Words of the block that tells how the start went; a message follows after them. */
export const Report = { state: 0, port: 1, length: 2, words: 3 } as const;
export const State = { starting: 0, listening: 1, failed: 2, loaded: 3 } as const;
export const REPORT_BYTES = 1024;

/** What GET /events reads: the block of `watch/feed.ts`, and an eventfd that tells the device thread of a new reader. */
export interface FeedEnd {
  readonly buffer: SharedArrayBuffer;
  readonly wake: number;
}

/** What the thread is started with. */
export interface ThreadData extends MetricsSource {
  readonly address: MetricsAddress;
  readonly report: SharedArrayBuffer;
  readonly feed: FeedEnd | undefined;
  /** A socket that listens at `address` already. */
  readonly socket: number | undefined;
}

const START_TIMEOUT_MS = 10_000;

/** Serves the metrics from the moment of its making until {@link close}. */
export class MetricsServer {
  readonly #address: MetricsAddress;
  readonly #worker: Worker;
  readonly #report = new SharedArrayBuffer(REPORT_BYTES);
  readonly #words = new Int32Array(this.#report, 0, Report.words);

  readonly #socket: number | undefined;

  /**
   * Starts the thread and returns at once; {@link ready} tells whether it serves.
   * @param socket a socket that listens at `address` already, whose file somebody else removes
   */
  constructor(address: MetricsAddress, source: MetricsSource, feed?: FeedEnd, socket?: number) {
    this.#address = 'path' in address ? { path: resolve(address.path) } : address; // the working directory changes
    this.#socket = socket;
    const workerData: ThreadData = { ...source, address, report: this.#report, feed, socket };
    this.#worker = new Worker(new URL('./server-thread.js', import.meta.url), {
      workerData,
      execArgv: [],
      resourceLimits: { maxOldGenerationSizeMb: 64 },
    });
    this.#worker.unref();
    // What ends the thread later (a defect) must not end the device with it.
    this.#worker.on('error', () => {});
  }

  /**
   * Waits, without the event loop, until the address is bound.
   * @returns the port (0 for a Unix socket)
   * @throws Error with one line to show when it cannot be.
   */
  ready(): number {
    if (Atomics.wait(this.#words, Report.state, State.starting, START_TIMEOUT_MS) === 'timed-out')
      throw new Error(`metrics are not served: no answer within ${START_TIMEOUT_MS / 1000} s`);
    if (Atomics.load(this.#words, Report.state) === State.failed) {
      const bytes = new Uint8Array(this.#report, 4 * Report.words, this.#words[Report.length]);
      throw new Error(Buffer.from(bytes).toString());
    }
    return this.#words[Report.port] as number;
  }

  /** Waits until the thread needs to load nothing more. */
  loaded(): void {
    Atomics.wait(this.#words, Report.state, State.listening, START_TIMEOUT_MS);
  }

  /** Ends the thread and removes its Unix socket; at once, so that it can be the last thing before the process ends. */
  close(): void {
    void this.#worker.terminate();
    const state = Atomics.load(this.#words, Report.state);
    if (!('path' in this.#address) || this.#socket !== undefined || (state !== State.listening && state !== State.loaded)) return;
    try {
      unlinkSync(this.#address.path);
    } catch {
      // Somebody else removed it.
    }
  }
}
