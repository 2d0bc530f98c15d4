/** A host process that swaps what names of the share mean, as fast as it can, while a guest uses them. */
import { parentPort, workerData } from 'node:worker_threads';
import { cString, native } from 'vhost-user-ts/native';

/** `swaps`: pairs of paths that change places; `moves`: paths that go away and come back; `stop`: one word, not 0 ends it. */
const { swaps, moves, stop } = workerData as { swaps: [string, string][]; moves: [string, string][]; stop: Int32Array };
const AT_FDCWD = -100;
const EXCHANGE = 2;
const pairs = [
  ...swaps.map(([a, b]) => [cString(a), cString(b), EXCHANGE] as const),
  ...moves.flatMap(([a, b]) => [[cString(a), cString(b), 0] as const, [cString(b), cString(a), 0] as const]),
];

let done = 0;
while (Atomics.load(stop, 0) === 0) {
  for (const [from, to, flags] of pairs) if (native.renameat2(AT_FDCWD, from, AT_FDCWD, to, flags) === 0) done++;
}
// Everything back in its place.
for (const [from, to] of moves) native.renameat2(AT_FDCWD, cString(to), AT_FDCWD, cString(from), 0);
parentPort?.postMessage(done);
