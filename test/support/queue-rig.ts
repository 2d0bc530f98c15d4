/** One virtqueue with both its sides in one thread: the driver's over mock memory, the device's over the same memfds. */
import { DescriptorChain, GuestMemory, type Ledger, Virtqueue } from 'vhost-user-ts';
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { MockMemory, QueueDriver, type QueueOptions, type RegionLayout } from 'vhost-user-ts/testing';

const SCRATCH_BYTES = 8 << 20;
const scratch = arenaAlloc(SCRATCH_BYTES);
const chain = new DescriptorChain();

export interface RigOptions extends QueueOptions {
  size?: number;
  eventIdx?: boolean;
  indirect?: boolean;
  regions?: readonly RegionLayout[];
  ledger?: Ledger;
}

export class QueueRig {
  readonly guest: MockMemory;
  readonly memory = new GuestMemory();
  readonly driver: QueueDriver;
  readonly queue: Virtqueue;

  constructor(options: RigOptions = {}) {
    this.guest = new MockMemory(options.regions);
    for (const region of this.guest.regions) {
      const result = this.memory.add({ ...region }, region.fd);
      if (result < 0) throw new Error(`region: errno ${-result}`);
    }
    this.driver = new QueueDriver(this.guest, 0, options.size ?? 8, options);
    this.driver.eventIdx = options.eventIdx ?? false;
    this.queue = new Virtqueue(0, this.memory, chain, options.ledger);
    this.queue.callFd = this.driver.callFd;
    const problem = this.queue.start(this.driver.size, this.ringAddresses(), options.base ?? 0, {
      eventIdx: this.driver.eventIdx,
      indirect: options.indirect ?? true,
    });
    if (problem !== undefined) throw new Error(problem);
  }

  ringAddresses() {
    const user = (address: number) => Number(this.guest.userAddress(address));
    return { descriptors: user(this.driver.descriptors), avail: user(this.driver.avail), used: user(this.driver.used), log: -1 };
  }

  /** Text in guest memory. */
  put(text: string, region = 0): { address: number; length: number } {
    const address = this.guest.allocate(text.length, 16, region);
    this.guest.write(address, Buffer.from(text, 'latin1'));
    return { address, length: text.length };
  }

  room(length: number, region = 0): { address: number; length: number } {
    return { address: this.guest.allocate(length, 16, region), length };
  }

  /** What the popped chain has to read. */
  readable(): string {
    const length = native.gather(chain.iov, chain.readableCount, scratch, SCRATCH_BYTES);
    return arena.buffer.toString('latin1', scratch, scratch + length);
  }

  /** Writes text to where the popped chain may be written. */
  respond(text: string): number {
    arena.buffer.write(text, scratch, 'latin1');
    return native.scatter(chain.writableIov, chain.writableCount, 0, scratch, text.length);
  }

  /** The device's turn: returns every chain with what it had to read, upper-cased. Returns how many, or the chain error. */
  serve(): number {
    for (let served = 0; ; served++) {
      const result = this.queue.pop();
      if (result < 0) return result;
      if (result === 0) {
        this.queue.flush();
        return served;
      }
      this.queue.push(chain.head, this.respond(this.readable().toUpperCase()));
    }
  }

  /** The iovecs of the popped chain, as [our address, length]. */
  iovecs(): [address: number, length: number][] {
    return Array.from({ length: chain.readableCount + chain.writableCount }, (_, i) => {
      const at = (chain.iov >> 2) + i * 4;
      return [(arena.u32[at] as number) + (arena.u32[at + 1] as number) * 2 ** 32, arena.u32[at + 2] as number];
    });
  }

  close(): void {
    this.queue.stop();
    this.memory.clear();
    this.driver.close();
    this.guest.close();
  }
}
