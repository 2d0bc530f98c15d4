/** Events in real guests are those of a watcher on the host: inotify and fanotify, made by others, by the guest itself, by another guest. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe } from 'node:test';
import { buildFsnotify } from '../support/fsnotify.js';
import { compareEvents, compareTwo, machine } from '../support/guest-events.js';

const folder = mkdtempSync(join(tmpdir(), 'events-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => rmSync(folder, { recursive: true, force: true }));

/** Notification queue (UML), lent buffers (QEMU). */
const MACHINES: ['uml' | 'qemu', string][] = [
  ['uml', '6.12'],
  ['uml', '7.2'],
  ['qemu', 'debian'],
];
if (process.env['FSNOTIFY_DEBUG']) MACHINES.push(['uml', '6.12-debug']);

for (const [kind, kernel] of MACHINES) {
  compareEvents(
    `events of the host in a guest: ${kind} ${kernel}`,
    () => program,
    () => machine(folder, program, { kind, kernel }),
  );
}

describe('two guests on one share', () => {
  compareTwo(
    () => program,
    (share) =>
      Promise.all([
        machine(folder, program, { kind: 'uml', kernel: '6.12', share }),
        machine(folder, program, { kind: 'qemu', kernel: 'debian', share }),
      ]),
  );
});
