/**
 * The store-buffering litmus of virtqueue notifications (virtio 1.3, 2.7.21.3.1), the driver's half: a thread of its own.
 *
 * In each round both sides act at the same moment. First the driver publishes a chain and decides whether to kick, while the
 * device asks for a kick and looks whether a chain is there; then the driver asks for a call and looks whether one came back,
 * while the device publishes it and decides whether to call. If in either half both sides conclude "nothing there, and the other
 * need not be woken", a guest would hang.
 */
import { isMainThread, parentPort, workerData } from 'node:worker_threads';
import { MockMemory, type MockRegion, QueueDriver } from 'vhost-user-ts/testing';

/** What the threads share. */
export const Word = { driver: 0, device: 1, kicked: 2, ready: 3, stop: 4 } as const;

/** Says that this side has reached `step`, and spins until the other has. False when it is over. */
export function meet(words: Int32Array, mine: number, other: number, step: number): boolean {
  Atomics.store(words, mine, step);
  while (Atomics.load(words, other) < step) if (Atomics.load(words, Word.stop) !== 0) return false;
  return true;
}

function play(words: Int32Array, queue: QueueDriver, address: number): void {
  for (let step = 0; ; ) {
    queue.add([{ address, length: 8 }]);
    if (!meet(words, Word.driver, Word.device, ++step)) return;
    queue.publish();
    Atomics.store(words, Word.kicked, queue.kick() ? 1 : 0);
    if (!meet(words, Word.driver, Word.device, ++step)) return;
    queue.wantCalls(false);
    if (!meet(words, Word.driver, Word.device, ++step)) return;
    queue.wantCalls(true);
    Atomics.store(words, Word.ready, queue.ready ? 1 : 0);
    if (!meet(words, Word.driver, Word.device, ++step)) return;
    queue.collect();
  }
}

if (!isMainThread && parentPort !== null && workerData?.litmus === true) {
  const memory = new MockMemory([{ guestAddress: 0, size: 1 << 20 }]);
  const queue = new QueueDriver(memory, 0, 8);
  queue.eventIdx = workerData.eventIdx;
  const user = (address: number) => Number(memory.userAddress(address));
  const addresses = { descriptors: user(queue.descriptors), avail: user(queue.avail), used: user(queue.used), log: -1 };
  const [region] = memory.regions as [MockRegion];
  const { guestAddress, size, userAddress, mmapOffset, fd } = region;
  parentPort.postMessage({ fd, region: { guestAddress, size, userAddress, mmapOffset }, addresses });
  play(new Int32Array(workerData.words), queue, memory.allocate(64));
  queue.close();
  memory.close();
}
