/** A device that echoes, and a session with it: front end, back end and mock driver in one thread, so that tests are deterministic. */
import { readdirSync } from 'node:fs';
import {
  chainErrorText,
  Feature,
  type FrontendOptions,
  features,
  type LogLevel,
  SUPPORTED_PROTOCOL_FEATURES,
  VhostUserBackend,
  type VhostUserDevice,
  VhostUserFrontend,
  type Virtqueue,
  WaitLoop,
} from 'vhost-user-ts';
import { arenaAlloc, native } from 'vhost-user-ts/native';
import { type DriverOptions, MockDriver, type QueueDriver } from 'vhost-user-ts/testing';

/** What the device copies through at most: a chain of 1024 pages. */
const SCRATCH_BYTES = 4 << 20;
const scratch = arenaAlloc(SCRATCH_BYTES);

/** Copies what a chain has to read to where it may write, and remembers what happened to it. */
export class EchoDevice implements VhostUserDevice {
  readonly queueCount: number = 3;
  features = features(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.LOG_ALL);
  protocolFeatures = SUPPORTED_PROTOCOL_FEATURES;
  backend!: VhostUserBackend;
  /** `started 1`, `stopping 1`, `reset`, `features 170000000`, `disconnected`, in their order. */
  readonly events: string[] = [];
  readonly lines: string[] = [];
  /** Chains served, by queue. */
  readonly served: number[] = [];
  /** Whether chains are taken but not returned until {@link release}. */
  holding = false;
  private held: { queue: Virtqueue; head: number }[] = [];
  configuration: Uint8Array | undefined = Uint8Array.from({ length: 44 }, (_, i) => i + 1);
  writable = false;
  /** What transferState was called with. */
  transfer: { direction: number; fd: number } | undefined;
  transferWorks = true;

  serve(queue: Virtqueue): void {
    const { chain } = queue;
    do {
      queue.disableKicks();
      let result = queue.pop();
      for (; result === 1; result = queue.pop()) {
        this.served[queue.index] = (this.served[queue.index] ?? 0) + 1;
        if (this.holding) {
          this.held.push({ queue, head: chain.head });
          continue;
        }
        const length = native.gather(chain.iov, chain.readableCount, scratch, SCRATCH_BYTES);
        const written = native.scatter(chain.writableIov, chain.writableCount, 0, scratch, length);
        if (queue.memory.logging) chain.markDirty(queue.memory, written);
        queue.push(chain.head, written);
      }
      queue.flush();
      if (result < 0) {
        this.backend.fail(queue, chainErrorText(result));
        return;
      }
    } while (queue.enableKicks());
  }

  /** Returns what was held, newest first. */
  release(): void {
    const held = this.held.splice(0).reverse();
    for (const { queue, head } of held) queue.push(head, 0);
    for (const queue of new Set(held.map((item) => item.queue))) queue.flush();
  }

  featuresAcked(acked: bigint): void {
    this.events.push(`features ${acked.toString(16)}`);
  }

  queueStarted(queue: Virtqueue): void {
    this.events.push(`started ${queue.index}`);
  }

  queueStopping(queue: Virtqueue): void {
    this.events.push(`stopping ${queue.index}`);
    this.release();
  }

  reset(): void {
    this.events.push('reset');
  }

  disconnected(): void {
    this.events.push('disconnected');
  }

  config(): Uint8Array {
    return this.configuration ?? new Uint8Array(0);
  }

  writeConfig(offset: number, data: Uint8Array): boolean {
    if (this.writable) this.configuration?.set(data, offset);
    return this.writable;
  }

  transferState(direction: number, fd: number): boolean {
    this.transfer = { direction, fd };
    return this.transferWorks;
  }

  checkState(): boolean {
    return this.transferWorks;
  }

  log(level: LogLevel, message: string): void {
    if (level !== 'debug') this.lines.push(message);
  }
}

export class Session {
  readonly loop = new WaitLoop();
  readonly device: EchoDevice;
  readonly frontend: VhostUserFrontend;
  readonly backend: VhostUserBackend;
  driver: MockDriver | undefined;

  constructor(device = new EchoDevice(), options: FrontendOptions = {}, maxRegions = 509) {
    this.device = device;
    const { frontend, backendFd } = VhostUserFrontend.pair({ turn: () => this.turn(), timeout: 500, ...options });
    this.frontend = frontend;
    this.backend = new VhostUserBackend(device, backendFd, this.loop, { maxRegions });
    device.backend = this.backend;
  }

  /** One turn of the back end: it handles everything that has come. */
  turn(): void {
    while (this.loop.turn(0) > 0);
  }

  /** A driver on this session, not yet started. */
  drive(options: Partial<DriverOptions> = {}): MockDriver {
    this.driver = new MockDriver(this.frontend, { queues: 3, turn: () => this.turn(), ...options });
    return this.driver;
  }

  /** Closes the front end's side, lets the back end see it, and frees everything. */
  close(): void {
    if (this.driver !== undefined) this.driver.close();
    else this.frontend.close();
    this.turn();
    this.backend.close('test over');
    this.loop.close();
  }
}

/** Sends text through a queue and returns what comes back. */
export function echo(driver: MockDriver, queue: QueueDriver, text: string, indirect = false): string {
  const from = driver.memory.allocate(text.length);
  const to = driver.memory.allocate(text.length + 8);
  driver.memory.write(from, Buffer.from(text));
  queue.send([{ address: from, length: text.length }], [{ address: to, length: text.length + 8 }], indirect);
  const [used] = queue.collectAll(1, 500);
  return driver.memory.read(to, used?.length ?? 0).toString();
}

/** Open descriptors of this process. */
export function openFds(): number {
  return readdirSync('/proc/self/fd').length;
}
