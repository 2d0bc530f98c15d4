/** Another processor of a hostile guest: rewrites parts of guest memory while the device looks at them. */
import { parentPort, workerData } from 'node:worker_threads';
import { native } from 'vhost-user-ts/native';

/** `mapping`: region id of guest memory; `parts`: offsets and lengths in it; `stop`: one word, not 0 ends it. */
const { mapping, parts, stop } = workerData as { mapping: number; parts: { offset: number; length: number }[]; stop: Int32Array };
const views = parts.map(({ offset, length }) => new Uint32Array(native.regionBuffer(mapping, offset, length), 0, length >> 2));

let state = 0x9e3779b9;
function random(below: number): number {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return (state >>> 0) % below;
}

let writes = 0;
while (Atomics.load(stop, 0) === 0) {
  for (let i = 0; i < 1000; i++) {
    const view = views[random(views.length)] as Uint32Array;
    const at = random(view.length);
    const old = view[at] as number;
    // Mostly back and forth, so that much of what the device sees is almost right.
    view[at] = random(4) === 0 ? random(2 ** 32) : old ^ (1 << random(32));
    for (let pause = random(50); pause > 0; pause--) writes++;
    view[at] = old;
  }
}
parentPort?.postMessage(writes);
