/** Programs that people watch trees with, in a guest with a stock kernel and the replay agent. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { startAgent, withAgent } from '../support/agent.js';
import { watchWithPrograms } from '../support/guest-programs.js';
import { type Setup, setUp } from '../support/guests.js';
import { readMetrics } from '../support/metrics.js';

const folder = mkdtempSync(join(tmpdir(), 'agent-watchers-'));
after(() => rmSync(folder, { recursive: true, force: true }));
const socket = join(folder, 'metrics');

async function machine(): Promise<Setup> {
  const setup = await setUp({
    kind: 'uml',
    kernel: '7.2-plain',
    hostRoot: true,
    memoryMiB: 512,
    daemonOptions: [...withAgent(folder).daemonOptions, `--metrics=unix:${socket}`],
  });
  await startAgent(setup, true);
  return setup;
}

/** Waits until the agent has reported so many watches. */
async function settled(_setup: Setup, watches: number): Promise<void> {
  while (((await readMetrics(socket)).get('virtiofsd_fsnotify_watches') as number) < watches) await sleep(50);
}

watchWithPrograms('watchers of trees in a guest with the replay agent: User Mode Linux 7.2', machine, { settled });
