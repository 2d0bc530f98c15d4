/** Events of the host in guests with stock kernels, by the replay agent: they are those of a watcher on the host. */
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Guest } from '../../qemu/guest.js';
import { startAgent, withAgent } from '../support/agent.js';
import { buildFsnotify, PROGRAM, type Watcher } from '../support/fsnotify.js';
import { assertSame, look, MMAP, makeTree, steps, unordered, WATCHED, watchers, withoutEnd } from '../support/guest-events.js';
import { type Setup, setUp } from '../support/guests.js';
import { CHANGES } from '../support/watch-changes.js';

const folder = mkdtempSync(join(tmpdir(), 'agent-events-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => rmSync(folder, { recursive: true, force: true }));

const MACHINES: ['uml' | 'qemu', string][] = [
  ['uml', '6.12-plain'],
  ['uml', '7.2-plain'],
  ['qemu', 'debian-plain'],
];

async function machine(kind: 'uml' | 'qemu', kernel: string): Promise<Setup> {
  const agent = withAgent(folder);
  const setup = await setUp({ kind, kernel, memoryMiB: 256, ...agent, files: { ...agent.files, [PROGRAM]: program } });
  await startAgent(setup);
  return setup;
}

/** Waits until the agent has found what is watched; the lines until then are taken. */
async function armed(root: string, all: readonly Watcher[]): Promise<void> {
  const local = all.at(-1) as Watcher;
  let last = '';
  for (let turn = 0; !local.lines.some((line) => line.includes('probe')); turn++) {
    last = `probe${turn}`;
    mkdirSync(join(root, 'sync', last));
    await sleep(50);
  }
  mkdirSync(join(root, 'sync/end'));
  for (const watcher of all) await watcher.until('sync CREATE,ISDIR end');
}

for (const [kind, kernel] of MACHINES) {
  describe(`events by the replay agent: ${kind} ${kernel}`, () => {
    let setup: Setup;
    let guest: Guest;
    before(async () => {
      setup = await machine(kind, kernel);
      guest = setup.guest;
    });
    after(() => setup.end());

    for (const known of [false, true]) {
      it(`inotify, files that the guest ${known ? 'knows' : 'never looked up'}`, { timeout: 120_000 }, async (t) => {
        const root = makeTree(setup.share);
        const [host, local] = await watchers(t, program, root, guest, 'inotify', WATCHED);
        await armed(root, [host, local]);
        const ends: string[] = [];
        for await (const { change, lists } of steps(
          program,
          root,
          [host, local],
          [MMAP, ...CHANGES],
          known ? look(local, root) : undefined,
        )) {
          const [onHost, seen] = lists.map(withoutEnd) as [string[], string[]];
          const what = JSON.stringify(change);
          if (change.op === 'tmpfile') assert.deepEqual(unordered(seen), unordered(onHost), what);
          else assertSame(seen, onHost, what);
          ends.push(...(lists[1] as string[]).filter((line) => / (DELETE_SELF|IGNORED|DELETE,ISDIR s2|DELETE moved)/.test(line)));
        }
        // As a local watcher hears it: the object's end, then the name's.
        assert.deepEqual(ends, ['w/s DELETE_SELF', 'w/s IGNORED', 'w DELETE,ISDIR s2', 'w/f DELETE_SELF', 'w/f IGNORED', 'w DELETE moved']);
      });
    }
  });
}
