/** What is not exact with the replay agent: each row of its README's table, so that the table and what is so cannot part. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { after, before, describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { repository } from '../../qemu/guest/daemon.js';
import type { Command } from '../../qemu/guest.js';
import { startAgent, withAgent } from '../support/agent.js';
import { buildFsnotify, PROGRAM, Watcher } from '../support/fsnotify.js';
import { armAgent, watch } from '../support/guest-events.js';
import { type Setup, setUp } from '../support/guests.js';

const folder = fs.mkdtempSync(join(tmpdir(), 'agent-exceptions-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => fs.rmSync(folder, { recursive: true, force: true }));

interface Machine {
  setup: Setup;
  agent: Command;
}

async function boot(kernel: string): Promise<Machine> {
  const agent = withAgent(folder);
  const files = { ...agent.files, [PROGRAM]: program };
  // The guest keeps what it knows: what it asks for is the agent's doing.
  const setup = await setUp({ kind: 'uml', kernel, files, daemonOptions: [...agent.daemonOptions, '--cache=always'] });
  return { setup, agent: await startAgent(setup) };
}

/** A directory `w` and `w/sync` in a directory of their own, watched here and in the guest. */
class Pair {
  readonly root: string;
  readonly inGuest: string;
  readonly here: Watcher;
  readonly there: Watcher;
  #turn = 0;

  private constructor(machine: Machine, t: TestContext, how: string, more: readonly string[], prepare: (root: string) => void) {
    this.root = fs.mkdtempSync(join(machine.setup.share, 't'));
    this.inGuest = join('/mnt', basename(this.root));
    fs.mkdirSync(join(this.root, 'w/sync'), { recursive: true });
    prepare(this.root);
    const names = ['w', 'w/sync', ...more];
    this.here = Watcher.onHost(program, ...how.split(' '), ...watch(this.root, names));
    this.there = Watcher.inGuest(machine.setup.guest, ['fsnotify', how, ...watch(this.inGuest, names)].join(' '));
    t.after(() => {
      this.here.close();
      this.there.close();
    });
  }

  static async watching(
    machine: Machine,
    t: TestContext,
    how = 'inotify',
    more: readonly string[] = [],
    prepare: (root: string) => void = () => undefined,
  ): Promise<Pair> {
    const pair = new Pair(machine, t, how, more, prepare);
    await Promise.all([pair.here.ready(), pair.there.ready()]);
    await armAgent([pair.here, pair.there], join(pair.root, 'w/sync'));
    return pair;
  }

  path(name: string): string {
    return join(this.root, 'w', name);
  }

  /** What both hear of what is done, but of the directory `sync`. */
  async heard(act: () => void): Promise<{ here: string[]; there: string[] }> {
    act();
    const name = `end${this.#turn++}`;
    fs.mkdirSync(this.path(`sync/${name}`));
    const [here, there] = await Promise.all(
      [this.here, this.there].map(async (watcher) => {
        const lines = await watcher.until(new RegExp(`^w/sync CREATE,ISDIR( ${name}| by |$)`));
        return lines.slice(0, -1).filter((line) => !line.includes('sync'));
      }),
    );
    return { here: here as string[], there: there as string[] };
  }
}

const text = (lines: readonly string[]) => lines.map((line) => line.replace(/ #\d+/, ''));
const open = (file: string, flags: string, act: (fd: number) => void) => {
  const fd = fs.openSync(file, flags);
  act(fd);
  fs.closeSync(fd);
};

/** By the first column of the table. */
const EXCEPTIONS: Record<string, (t: TestContext) => Promise<void>> = {};
/** For those of older kernels. */
const OLDER: typeof EXCEPTIONS = {};
let machine: Machine;

EXCEPTIONS['OPEN'] = async (t) => {
  const pair = await Pair.watching(machine, t);
  fs.writeFileSync(pair.path('f'), 'f');
  await pair.heard(() => undefined);
  let fd = -1;
  const opened = await pair.heard(() => {
    fd = fs.openSync(pair.path('f'), 'r');
  });
  assert.deepEqual(opened, { here: ['w OPEN f'], there: [] });
  const read = await pair.heard(() => fs.readSync(fd, Buffer.alloc(1)));
  assert.deepEqual(read, { here: ['w ACCESS f'], there: ['w OPEN f', 'w ACCESS f'] });
  const closed = await pair.heard(() => fs.closeSync(fd));
  assert.deepEqual(closed, { here: ['w CLOSE_NOWRITE f'], there: ['w CLOSE_NOWRITE f'] });
};

EXCEPTIONS['CLOSE_WRITE (and its OPEN) of executable files'] = async (t) => {
  const pair = await Pair.watching(machine, t);
  fs.writeFileSync(pair.path('program'), '#!/bin/sh\n', { mode: 0o755 });
  await pair.heard(() => undefined);
  const { here, there } = await pair.heard(() => open(pair.path('program'), 'a', (fd) => fs.writeSync(fd, '#\n')));
  assert.deepEqual(here, ['w OPEN program', 'w MODIFY program', 'w CLOSE_WRITE program']);
  assert.deepEqual(there, ['w MODIFY program']);
};

EXCEPTIONS['OPEN_EXEC'] = async (t) => {
  const prepare = (root: string) => fs.copyFileSync('/bin/true', join(root, 'w/true'));
  const pair = await Pair.watching(machine, t, 'fanotify exec', ['w/true'], prepare);
  const { here, there } = await pair.heard(() => execFileSync(pair.path('true')));
  assert.ok(here.join().includes('OPEN_EXEC'), here.join('\n'));
  assert.doesNotMatch(there.join(), /OPEN_EXEC/);
  assert.match(there.join(), /OPEN.*CLOSE_NOWRITE/);
};

EXCEPTIONS['a file that was read first and then written through the same descriptor'] = async (t) => {
  const pair = await Pair.watching(machine, t);
  fs.writeFileSync(pair.path('f'), 'f');
  await pair.heard(() => undefined);
  const { here, there } = await pair.heard(() =>
    open(pair.path('f'), 'r+', (fd) => {
      fs.readSync(fd, Buffer.alloc(1), 0, 1, 0);
      fs.writeSync(fd, 'g', 0);
    }),
  );
  assert.deepEqual(here, ['w OPEN f', 'w ACCESS f', 'w MODIFY f', 'w CLOSE_WRITE f']);
  assert.deepEqual(there, ['w OPEN f', 'w ACCESS f', 'w MODIFY f', 'w CLOSE_NOWRITE f']);
};

// All of it is in agent-mounts.test.ts.
EXCEPTIONS['a name that is a mount point in the guest, in any mount namespace'] = async (t) => {
  const pair = await Pair.watching(machine, t);
  fs.mkdirSync(pair.path('mounted'));
  await pair.heard(() => undefined);
  const at = `${pair.inGuest}/w/mounted`;
  assert.equal((await machine.setup.guest.run(`mount -t tmpfs none ${at}`)).stderr, '');
  const { here, there } = await pair.heard(() => {
    fs.chmodSync(pair.path('mounted'), 0o700);
    fs.rmdirSync(pair.path('mounted'));
  });
  assert.deepEqual(here, ['w ATTRIB,ISDIR mounted', 'w DELETE,ISDIR mounted']);
  assert.deepEqual(there, []);
  assert.equal((await machine.setup.guest.run(`grep -c ' ${at} ' /proc/self/mountinfo`)).stdout, '1\n');
};

EXCEPTIONS['more events than the queues hold'] = async (t) => {
  // Long names fill the daemon's queue of 4 MiB soon, and of an OPEN alone nothing is replayed.
  const names = Array.from({ length: 16_000 }, (_, i) => `${'x'.repeat(240)}${i}`);
  const prepare = (root: string) => {
    for (const name of names) fs.writeFileSync(join(root, 'w', name), '');
  };
  const pair = await Pair.watching(machine, t, 'inotify', [], prepare);
  const { agent } = machine;
  agent.kill('SIGSTOP');
  const all = names.map((name) => fs.openSync(pair.path(name), 'r'));
  for (const fd of all) fs.closeSync(fd);
  agent.kill('SIGCONT');
  await agent.waitForLine('events were lost', { timeoutMs: 60_000 });
  fs.mkdirSync(pair.path('last'));
  const lines = await pair.there.until('w CREATE,ISDIR last', 60_000);
  assert.ok(!lines.some((line) => line.includes('Q_OVERFLOW')));
  assert.ok(lines.length < names.length, `${lines.length} events`);
};

EXCEPTIONS['what has gone before its event is replayed'] = async (t) => {
  const pair = await Pair.watching(machine, t);
  machine.agent.kill('SIGSTOP');
  open(pair.path('f'), 'w', () => undefined);
  fs.rmSync(pair.path('f'));
  machine.agent.kill('SIGCONT');
  await pair.there.until('w CREATE f');
  const { stderr } = await machine.setup.guest.run(`cat ${pair.inGuest}/w/f`);
  assert.match(stderr, /No such file or directory/);
  await pair.there.until('w DELETE f');
};

EXCEPTIONS['fanotify marks on mounts and file systems'] = async (t) => {
  const directory = fs.mkdtempSync(join(machine.setup.share, 't'));
  const inGuest = join('/mnt', basename(directory));
  const other = join('/mnt', basename(fs.mkdtempSync(join(machine.setup.share, 't'))));
  fs.writeFileSync(join(directory, 'f'), '');
  for (const how of ['mount', 'filesystem']) {
    const watcher = Watcher.inGuest(machine.setup.guest, `fsnotify fanotify ${how} w=${inGuest}`);
    t.after(() => watcher.close());
    await watcher.ready();
    // For some seconds it may be that somebody watches what was looked at. Another look ends that, and is what the agent reads of.
    await sleep(3200);
    assert.equal((await machine.setup.guest.run(`ls ${other}`)).status, 0);
    await watcher.until(/^- (.*,)?ACCESS.*\/control$/);
    watcher.lines.length = 0;
    for (let i = 0; i < 20; i++, await sleep(50)) fs.appendFileSync(join(directory, 'f'), 'x');
    assert.deepEqual(
      watcher.lines.filter((line) => line.endsWith('/f')),
      [],
    );
    assert.equal((await machine.setup.guest.run(`echo x >>${inGuest}/f`)).status, 0);
    await watcher.until(/^- (.*,)?MODIFY.*\/f$/);
    watcher.close();
  }
};

EXCEPTIONS['mounts within the share (`--announce-submounts`)'] = async (t) => {
  const pair = await Pair.watching(machine, t);
  const at = pair.path('other');
  fs.mkdirSync(at);
  execFileSync('mount', ['-t', 'tmpfs', 'none', at]);
  t.after(() => execFileSync('umount', ['-l', at]));
  const inGuest = `${pair.inGuest}/w/other`;
  const below = Watcher.inGuest(machine.setup.guest, `fsnotify inotify other=${inGuest}`);
  t.after(() => below.close());
  await below.ready();
  for (let i = 0; i < 30; i++, await sleep(100)) fs.mkdirSync(join(at, `d${i}`));
  assert.deepEqual(below.lines, []);
  assert.equal((await machine.setup.guest.run(`mkdir ${inGuest}/own`)).status, 0);
  await below.until('other CREATE,ISDIR own');
  // Before it is unmounted here.
  below.close();
};

EXCEPTIONS['who did it (fanotify’s pid)'] = async (t) => {
  const pair = await Pair.watching(machine, t, 'fanotify pid');
  const pid = (await machine.setup.guest.run('pidof virtiofsd-ts-agent')).stdout.trim();
  const { here, there } = await pair.heard(() => fs.mkdirSync(pair.path('d')));
  assert.match(here.join(), new RegExp(`^w CREATE,ISDIR by ${process.pid}$`));
  assert.match(there.join(), new RegExp(`^w CREATE,ISDIR by ${pid}$`));
};

EXCEPTIONS['the directory above a watched one'] = async (t) => {
  const pair = await Pair.watching(machine, t);
  machine.agent.kill('SIGTERM');
  await machine.agent.ended;
  // The kernel keeps what is watched, but not its name.
  await machine.setup.guest.run('echo 2 >/proc/sys/vm/drop_caches');
  pair.there.lines.length = 0;
  machine.agent = machine.setup.guest.spawn('exec virtiofsd-ts-agent /mnt 2>&1');
  await machine.agent.waitForLine('connected');
  const seen = await pair.there.until('w CLOSE_NOWRITE,ISDIR');
  assert.deepEqual(
    seen.filter((line) => line.startsWith('w ')),
    ['w OPEN,ISDIR', 'w ACCESS,ISDIR', 'w CLOSE_NOWRITE,ISDIR'],
  );
};

OLDER['fanotify marks on files and directories, Linux before 6.8'] = async () => {
  const { stdout } = await machine.setup.guest.run('fsnotify fanotify fid w=/mnt');
  assert.match(stdout, /^cannot watch \/mnt: No such device$/m);
};

OLDER['a watched file that another one is renamed over, Linux before 5.16'] = async (t) => {
  const prepare = (root: string) => fs.writeFileSync(join(root, 'f'), 'f');
  const pair = await Pair.watching(machine, t, 'inotify', ['f'], prepare);
  const { there } = await pair.heard(() => {
    fs.writeFileSync(join(pair.root, 'g'), 'g');
    fs.renameSync(join(pair.root, 'g'), join(pair.root, 'f'));
  });
  const ends = there.filter((line) => /ATTRIB|DELETE_SELF|IGNORED/.test(line));
  assert.deepEqual(ends, ['f ATTRIB', 'f ATTRIB', 'f DELETE_SELF', 'f IGNORED']);
};

OLDER['what the agent looks at, Linux before 6.10 but for stable ones from 5.10.222, 6.1.98'] = async (t) => {
  const pair = await Pair.watching(machine, t);
  fs.writeFileSync(pair.path('f'), 'f');
  await pair.heard(() => undefined);
  const { here, there } = await pair.heard(() => fs.chmodSync(pair.path('f'), 0o600));
  assert.deepEqual(here, ['w ATTRIB f']);
  assert.deepEqual(text(there), ['w OPEN f', 'w ATTRIB f', 'w CLOSE_NOWRITE f']);
};

it('the table has these rows', () => {
  const readme = fs.readFileSync(join(repository, 'qemu/guest/agent/README.md'), 'utf8');
  const table = /\n## What to expect\n[\s\S]*?\n\|---\|---\|\n((?:\|.*\n)*)/.exec(readme)?.[1] as string;
  const rows = table
    .trim()
    .split('\n')
    .map((row) => row.split('|')[1]?.trim() as string);
  assert.deepEqual(
    rows.slice(1).map((row) => row.replaceAll("'", '’')),
    [...Object.keys(EXCEPTIONS), ...Object.keys(OLDER)],
  );
  assert.match(rows[0] as string, /^exact/);
});

for (const [kernel, exceptions] of [
  ['6.12-plain', EXCEPTIONS],
  ['debian-5.10', OLDER],
] as const) {
  describe(`not exact with the replay agent: ${kernel}`, () => {
    before(async () => {
      machine = await boot(kernel);
    });
    after(async () => {
      machine.agent.kill('SIGTERM');
      await machine.agent.ended;
      await machine.setup.end();
    });
    for (const [what, test] of Object.entries(exceptions)) it(what, { timeout: 150_000 }, test);
  });
}
