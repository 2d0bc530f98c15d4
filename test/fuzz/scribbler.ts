/** A thread that rewrites guest memory while the device reads it, as a guest with several processors can. */
import { isMainThread, workerData } from 'node:worker_threads';
import { native } from 'vhost-user-ts/native';
import { Random } from './random.js';

export interface Scribble {
  /** What it shall do: 1 write, 0 wait, -1 end; and what it does: 1 or 0. */
  control: Int32Array;
  /** The file behind region 0 of guest memory. */
  fd: number;
  /** Start and length of what it writes to. */
  parts: [number, number][];
}

function scribble({ control, fd, parts }: Scribble): void {
  const views = parts.map(([at, length]) => {
    const start = at & ~4095;
    const mapping = native.regionMap(fd, start, 2 * 4096 + length, 1);
    return new Uint16Array(native.regionBuffer(mapping, at - start, length & ~1));
  });
  const random = new Random(fd);
  const values = [0, 1, 2, 3, 4, 16, 40, 56, 0xffff, 0x8000];
  for (;;) {
    const order = Atomics.load(control, 0);
    if (order < 0) return;
    if (order === 0) {
      Atomics.store(control, 1, 0);
      Atomics.notify(control, 1);
      Atomics.wait(control, 0, 0);
      continue;
    }
    Atomics.store(control, 1, 1);
    for (let i = 0; i < 1000; i++) {
      const view = random.pick(views);
      const at = random.below(view.length);
      // Mostly it is put back: half of what the device sees makes sense.
      const was = view[at] as number;
      view[at] = random.pick(values);
      for (let k = random.below(64); k > 0; k--) random.u32();
      if (!random.oneIn(4)) view[at] = was;
    }
  }
}

if (!isMainThread) scribble(workerData as Scribble);
