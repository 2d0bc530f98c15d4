/**
 * Guest memory as the front end sees it: memfd regions of any number, place and size, mapped here and passed to the back end.
 * Sparse: a region of 8 GiB costs only the pages that are touched.
 */
import type { MemoryRegion } from '../message.js';
import { cString, native } from '../native.js';

/** Where a region lies. Sizes and addresses are numbers: exact up to 2^53, which no test needs to pass. */
export interface RegionLayout {
  guestAddress: number;
  size: number;
  /** What the front end says of its own mapping: ring addresses refer to it. Apart from the guest address by default, so that mixing them up shows. */
  userAddress?: number;
  /** Where in its file the region begins. */
  mmapOffset?: number;
}

export interface MockRegion extends Required<RegionLayout> {
  /** The memfd. */
  readonly fd: number;
  /** Id of our mapping of it. */
  readonly mapping: number;
  /** Windows of {@link WINDOW} bytes onto the mapping, made when first needed (an ArrayBuffer ends at 4 GiB). */
  readonly windows: (ArrayBuffer | undefined)[];
  /** Where {@link MockMemory.allocate} goes on, from the region's start. */
  top: number;
}

const WINDOW = 2 ** 30;
const USER_BASE = 0x7f00_0000_0000;

export class MockMemory {
  readonly regions: MockRegion[];

  constructor(layout: readonly RegionLayout[] = [{ guestAddress: 0, size: 64 << 20 }]) {
    this.regions = layout.map(createRegion);
  }

  /** Takes `length` bytes of region `region` for good and returns their guest address. The region's first page is never handed out. */
  allocate(length: number, alignment = 16, region = 0): number {
    const target = this.regions[region];
    if (target === undefined) throw new RangeError(`no region ${region}`);
    const start = Math.ceil((target.guestAddress + target.top) / alignment) * alignment;
    const top = start + length - target.guestAddress;
    if (top > target.size) throw new RangeError(`guest memory region ${region} is full`);
    target.top = top;
    return start;
  }

  /** The region that holds all of these bytes. */
  find(address: number, length: number): MockRegion {
    for (const region of this.regions) {
      if (address >= region.guestAddress && address + length <= region.guestAddress + region.size) return region;
    }
    throw new RangeError(`no region holds ${length} bytes at ${address.toString(16)}`);
  }

  /** A view of guest memory, as the guest has it: what the back end writes appears in it. */
  view(address: number, length: number): Buffer {
    const region = this.find(address, length);
    const offset = address - region.guestAddress;
    const first = Math.floor(offset / WINDOW);
    const within = offset - first * WINDOW;
    if (within + length > WINDOW) return Buffer.from(native.regionBuffer(region.mapping, offset, length));
    let window = region.windows[first];
    if (window === undefined) {
      window = native.regionBuffer(region.mapping, first * WINDOW, Math.min(WINDOW, region.size - first * WINDOW));
      region.windows[first] = window;
    }
    return Buffer.from(window, within, length);
  }

  /** A copy of guest memory. */
  read(address: number, length: number): Buffer {
    return Buffer.from(this.view(address, length));
  }

  write(address: number, bytes: Uint8Array): void {
    this.view(address, bytes.length).set(bytes);
  }

  /** Where the front end says that it has a guest address mapped: what SET_VRING_ADDR wants. */
  userAddress(address: number): bigint {
    const region = this.find(address, 1);
    return BigInt(region.userAddress) + BigInt(address - region.guestAddress);
  }

  /** The payload of SET_MEM_TABLE; the descriptors are {@link fds}. */
  table(): MemoryRegion[] {
    return this.regions.map(describeRegion);
  }

  /** The memfds, in the order of {@link table}. */
  fds(): number[] {
    return this.regions.map((region) => region.fd);
  }

  /** Adds a region while the guest runs (memory hot-plug). */
  add(layout: RegionLayout): MockRegion {
    const region = createRegion(layout);
    this.regions.push(region);
    return region;
  }

  /** Unmaps everything: views end here. */
  close(): void {
    for (const region of this.regions.splice(0)) {
      native.regionUnmap(region.mapping);
      native.close(region.fd);
    }
  }
}

/** A region as ADD_MEM_REG and SET_MEM_TABLE describe it. */
export function describeRegion(region: Required<RegionLayout>): MemoryRegion {
  return {
    guestAddress: BigInt(region.guestAddress),
    size: BigInt(region.size),
    userAddress: BigInt(region.userAddress),
    mmapOffset: BigInt(region.mmapOffset),
  };
}

function createRegion({ guestAddress, size, userAddress = USER_BASE + guestAddress, mmapOffset = 0 }: RegionLayout): MockRegion {
  const fd = native.memfdCreate(cString('guest-memory'), mmapOffset + size);
  if (fd < 0) throw new Error(`memfd_create: errno ${-fd}`);
  const mapping = native.regionMap(fd, mmapOffset, size, 1);
  if (mapping < 0) {
    native.close(fd);
    throw new Error(`mmap of ${size} bytes: errno ${-mapping}`);
  }
  return { guestAddress, size, userAddress, mmapOffset, fd, mapping, windows: [], top: Math.min(4096, size) };
}
