/** Events of the host in guests with stock kernels, by the replay agent: they are those of a watcher on the host. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe } from 'node:test';
import { startAgent, withAgent } from '../support/agent.js';
import { buildFsnotify } from '../support/fsnotify.js';
import { armAgent, type Comparison, compareEvents, compareTwo, machine } from '../support/guest-events.js';
import type { Setup } from '../support/guests.js';

const folder = mkdtempSync(join(tmpdir(), 'agent-events-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => rmSync(folder, { recursive: true, force: true }));

/** Kernels as others have them, and what is different with them. Debian 11's User Mode Linux is 5.10.46, its cloud kernel a newer 5.10. */
const MACHINES: ['uml' | 'qemu', string, Comparison][] = [
  ['uml', '6.12-plain', {}],
  ['uml', '7.2-plain', {}],
  ['qemu', 'debian-plain', { fanotify: false }],
  ['uml', 'debian-5.10', { fanotify: false, looksAreHeard: true, nameFirst: true, replacedTwice: true }],
  ['qemu', 'debian-5.10', { fanotify: false, replacedTwice: true }],
];

async function withItsAgent(kind: 'uml' | 'qemu', kernel: string, share?: string): Promise<Setup> {
  const setup = await machine(folder, program, { kind, kernel, ...(share === undefined ? {} : { share }), ...withAgent(folder) });
  await startAgent(setup);
  return setup;
}

for (const [kind, kernel, differences] of MACHINES) {
  compareEvents(
    `events by the replay agent: ${kind} ${kernel}`,
    () => program,
    () => withItsAgent(kind, kernel),
    { arm: armAgent, ...differences },
  );
}

describe('two guests on one share, each with an agent', () => {
  compareTwo(
    () => program,
    (share) => Promise.all([withItsAgent('uml', '6.12-plain', share), withItsAgent('qemu', 'debian-plain', share)]),
    { arm: armAgent },
  );
});
