/** Events of the host in guests with stock kernels, by the replay agent: they are those of a watcher on the host. */
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { startAgent, withAgent } from '../support/agent.js';
import { buildFsnotify, type Watcher } from '../support/fsnotify.js';
import { compareEvents, compareTwo, machine } from '../support/guest-events.js';
import type { Setup } from '../support/guests.js';

const folder = mkdtempSync(join(tmpdir(), 'agent-events-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => rmSync(folder, { recursive: true, force: true }));

/** Kernels as others have them, and whether they let fanotify mark files of FUSE. */
const MACHINES: ['uml' | 'qemu', string, boolean][] = [
  ['uml', '6.12-plain', true],
  ['uml', '7.2-plain', true],
  ['qemu', 'debian-plain', false],
];

async function withItsAgent(kind: 'uml' | 'qemu', kernel: string, share?: string): Promise<Setup> {
  const setup = await machine(folder, program, { kind, kernel, ...(share === undefined ? {} : { share }), ...withAgent(folder) });
  await startAgent(setup);
  return setup;
}

/** Waits until the agent has found what is watched, and takes what was heard until then. */
async function arm(watchers: readonly Watcher[], probe: string): Promise<void> {
  const local = watchers.at(-1) as Watcher;
  while (!local.lines.some((line) => /CREATE,ISDIR( |$)/.test(line))) {
    mkdirSync(join(probe, `probe${process.hrtime.bigint()}`));
    await sleep(50);
  }
  for (let before = -1; before !== local.lines.length; await sleep(200)) before = local.lines.length;
  for (const watcher of watchers) watcher.lines.length = 0;
}

for (const [kind, kernel, fanotify] of MACHINES) {
  compareEvents(
    `events by the replay agent: ${kind} ${kernel}`,
    () => program,
    () => withItsAgent(kind, kernel),
    { arm, fanotify },
  );
}

describe('two guests on one share, each with an agent', () => {
  compareTwo(
    () => program,
    (share) => Promise.all([withItsAgent('uml', '6.12-plain', share), withItsAgent('qemu', 'debian-plain', share)]),
    { arm },
  );
});
