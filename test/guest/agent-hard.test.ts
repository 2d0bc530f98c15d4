/** The replay agent where it is hard: names cached as missing, storms of renames and renames that cross, daemons that are not there for a while. */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { startAgent, withAgent } from '../support/agent.js';
import { workersOf } from '../support/daemon.js';
import { buildFsnotify, PROGRAM, Watcher } from '../support/fsnotify.js';
import { type Setup, setUp } from '../support/guests.js';
import { random, SEED } from '../support/random-changes.js';

const folder = fs.mkdtempSync(join(tmpdir(), 'agent-hard-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => fs.rmSync(folder, { recursive: true, force: true }));

async function machine(daemonOptions: string[] = []): Promise<Setup> {
  const agent = withAgent(folder);
  const files = { ...agent.files, [PROGRAM]: program };
  return setUp({ kind: 'uml', kernel: '6.12-plain', files, daemonOptions: [...agent.daemonOptions, ...daemonOptions] });
}

/** Makes and removes `probe` until it is heard of, and another name that ends what is heard of that. */
async function found(setup: Setup, watcher: Watcher, directory: string, label = 'w', probe = 'probe'): Promise<void> {
  const path = join(setup.share, directory, probe);
  for (const deadline = Date.now() + 20_000; !watcher.lines.some((line) => line === `${label} CREATE,ISDIR ${probe}`); await sleep(20)) {
    assert.ok(Date.now() < deadline, 'nothing is heard');
    fs.mkdirSync(path);
    fs.rmdirSync(path);
  }
  fs.mkdirSync(`${path}.end`);
  await watcher.until(`${label} CREATE,ISDIR ${probe}.end`);
  fs.rmdirSync(`${path}.end`);
  await watcher.until(`${label} DELETE,ISDIR ${probe}.end`);
}

async function watch(setup: Setup, t: TestContext, ...directories: string[]): Promise<Watcher> {
  const watcher = Watcher.inGuest(setup.guest, `fsnotify inotify ${directories.map((name) => `${name}=/mnt/${name}`).join(' ')}`);
  t.after(() => watcher.close());
  await watcher.ready();
  for (const name of directories) await found(setup, watcher, name, name);
  return watcher;
}

/** Lines about names, each rename's cookie as the number of its first half. */
const names = (lines: readonly string[]) => lines.filter((line) => / (CREATE|DELETE|MOVED_FROM|MOVED_TO)(,ISDIR)? /.test(line));

describe('names and long timeouts (--cache=always --negative-timeout=3600)', () => {
  let setup: Setup;
  before(async () => {
    setup = await machine(['--cache=always', '--negative-timeout=3600']);
    await startAgent(setup);
  });
  after(() => setup.end());

  /** The guest has the host's names. */
  const sameTree = async (...directories: string[]) => {
    const command = `find ${directories.join(' ')} | sort`;
    const { stdout } = await setup.guest.run(`cd /mnt; ${command}`);
    assert.equal(stdout, execFileSync('sh', ['-c', command], { cwd: setup.share, encoding: 'utf8', env: { ...process.env, LC_ALL: 'C' } }));
  };

  it('a name that the guest knows as missing', { timeout: 60_000 }, async (t) => {
    fs.mkdirSync(join(setup.share, 'n'));
    const watcher = await watch(setup, t, 'n');
    const there = async (name: string) => (await setup.guest.run(`stat /mnt/n/${name}`)).status === 0;
    const cases: [string, string, string, string][] = [
      ['file', 'echo x >file', 'rm file', ''],
      ['directory', 'mkdir directory', 'rmdir directory', ',ISDIR'],
      ['link', 'ln -s x link', 'rm link', ''],
    ];
    for (const [name, make, remove, isdir] of cases) {
      for (let turn = 0; turn < 2; turn++) {
        for (let asked = 0; asked < 2; asked++) assert.equal(await there(name), false);
        execFileSync('sh', ['-c', make], { cwd: join(setup.share, 'n') });
        await watcher.until(`n CREATE${isdir} ${name}`);
        assert.ok(await there(name), `${name} after its CREATE`);
        execFileSync('sh', ['-c', remove], { cwd: join(setup.share, 'n') });
        await watcher.until(`n DELETE${isdir} ${name}`);
        assert.equal(await there(name), false, `${name} after its DELETE`);
      }
      // It comes and goes before anything of it is replayed: both are heard.
      execFileSync('sh', ['-c', `${make}; ${remove}`], { cwd: join(setup.share, 'n') });
      await watcher.until(`n CREATE${isdir} ${name}`);
      await watcher.until(`n DELETE${isdir} ${name}`);
      assert.equal(await there(name), false, name);
    }
    // Moved from and to names that are missing.
    await setup.guest.run('ls /mnt/n/old /mnt/n/new');
    execFileSync('sh', ['-c', 'echo y >old; mv old new'], { cwd: join(setup.share, 'n') });
    await watcher.until(/^n MOVED_TO .*new$/);
    assert.equal((await setup.guest.run('cat /mnt/n/new')).stdout, 'y\n');
    assert.equal(await there('old'), false);
  });

  it('a storm of renames: each is heard, in order, and the names are right', { timeout: 60_000 }, async (t) => {
    for (const name of ['a', 'b']) fs.mkdirSync(join(setup.share, name));
    const all: string[] = [];
    for (let i = 0; i < 12; i++) {
      all.push(`a/${i}`);
      if (i % 3 === 0) fs.mkdirSync(join(setup.share, 'a', String(i)));
      else fs.writeFileSync(join(setup.share, 'a', String(i)), String(i));
    }
    await setup.guest.run('ls -lR /mnt/a /mnt/b');
    const watcher = await watch(setup, t, 'a', 'b');
    const pick = random(SEED);
    const expected: string[] = [];
    for (let turn = 0; turn < 400; turn++) {
      const at = pick(all.length);
      const from = all[at] as string;
      const to = `${pick(2) === 0 ? 'a' : 'b'}/n${turn}`;
      const isdir = fs.statSync(join(setup.share, from)).isDirectory() ? ',ISDIR' : '';
      fs.renameSync(join(setup.share, from), join(setup.share, to));
      all[at] = to;
      expected.push(`${from.replace('/', ` MOVED_FROM${isdir} `)}`, `${to.replace('/', ` MOVED_TO${isdir} `)}`);
    }
    fs.mkdirSync(join(setup.share, 'b/end'));
    const lines = names(await watcher.until('b CREATE,ISDIR end')).slice(0, -1);
    assert.deepEqual(
      lines.map((line) => line.replace(/ #\d+/, '')),
      expected,
      `SEED=${SEED}`,
    );
    await sameTree('a', 'b');
  });

  it('renames that cross, of two processes', { timeout: 60_000 }, async (t) => {
    for (const name of ['x', 'y']) fs.mkdirSync(join(setup.share, name));
    for (const name of ['x/d1/in', 'y/d2/in']) fs.mkdirSync(join(setup.share, name), { recursive: true });
    for (const name of ['x/f1', 'y/f2', 'x/d1/in/f', 'y/d2/in/f']) fs.writeFileSync(join(setup.share, name), name);
    await setup.guest.run('ls -lR /mnt/x /mnt/y');
    const watcher = await watch(setup, t, 'x', 'y');
    const loop = (commands: string) =>
      new Promise<void>((resolve, reject) => {
        const child = spawn('sh', ['-ec', `for i in $(seq 40); do ${commands}; done`], { cwd: setup.share });
        child.on('exit', (code) => (code === 0 ? resolve() : reject(new Error(`status ${code}`))));
      });
    await Promise.all([
      loop('mv x/d1 y/d1; mv x/f1 y/f1; mv y/d1 x/d1; mv y/f1 x/f1'),
      loop('mv y/d2 x/d2; mv y/f2 x/f2; mv x/d2 y/d2; mv x/f2 y/f2'),
    ]);
    fs.renameSync(join(setup.share, 'x/d1'), join(setup.share, 'y/d1'));
    fs.renameSync(join(setup.share, 'y/d2'), join(setup.share, 'x/d2'));
    fs.mkdirSync(join(setup.share, 'y/end'));
    const lines = names(await watcher.until('y CREATE,ISDIR end'));
    for (const name of ['d1', 'f1', 'd2', 'f2']) {
      const of = lines.filter((line) => line.endsWith(` ${name}`));
      // Back and forth, each rename once: from one directory, to the other, with one cookie.
      assert.equal(of.length, 2 * (name.startsWith('d') ? 81 : 80), name);
      for (let i = 0; i < of.length; i += 2) {
        const [from, to] = [of[i], of[i + 1]].map((line) => /^(\w) (\S+?)(,ISDIR)? (#\d+)/.exec(line as string) as RegExpExecArray);
        assert.deepEqual([from?.[2], to?.[2]], ['MOVED_FROM', 'MOVED_TO']);
        assert.notEqual(from?.[1], to?.[1]);
      }
    }
    await sameTree('x', 'y');
    assert.equal((await setup.guest.run('cat /mnt/y/d1/in/f /mnt/x/d2/in/f')).stdout, 'x/d1/in/fy/d2/in/f');
  });
});

describe('what the agent is connected to goes and comes', () => {
  let setup: Setup;
  before(async () => {
    setup = await machine();
    fs.mkdirSync(join(setup.share, 'w'));
  });
  after(() => setup.end());
  const files = () => execFileSync('ls', ['-lAR', '--time-style=full-iso'], { cwd: setup.share, encoding: 'utf8' });

  for (const replace of [false, true]) {
    it(`the daemon's worker is ${replace ? 'replaced' : 'killed'} amid events: they go on`, { timeout: 90_000 }, async (t) => {
      const agent = setup.guest.spawn('exec virtiofsd-ts-agent /mnt 2>&1');
      await agent.waitForLine('connected');
      const watcher = await watch(setup, t, 'w');
      for (let turn = 0; turn < 2; turn++) {
        const child = spawn('sh', ['-c', `for i in $(seq 300); do echo $i >s$i; mv s$i t$i; rm t$i; done`], {
          cwd: join(setup.share, 'w'),
        });
        const done = new Promise((resolve) => child.on('exit', resolve));
        await sleep(100);
        const [worker] = workersOf(setup.daemon.pid);
        process.kill(replace ? setup.daemon.pid : (worker as number), replace ? 'SIGUSR2' : 'SIGKILL');
        await done;
        const before = files();
        const deadline = Date.now() + 20_000;
        while (workersOf(setup.daemon.pid)[0] === worker && Date.now() < deadline) await sleep(20);
        assert.notEqual(workersOf(setup.daemon.pid)[0], worker);
        watcher.lines.length = 0;
        await sleep(500);
        assert.equal(files(), before, 'nothing has changed on the host');
        await found(setup, watcher, 'w', 'w', `again${turn}`);
      }
      const lost = agent.lines.filter(({ text }) => text.includes('the connection is lost')).length;
      assert.ok(lost > 0, 'it says what is not heard');
      agent.kill('SIGTERM');
      await agent.ended;
      watcher.close();
    });
  }

  it('the guest mounts the share anew', { timeout: 60_000 }, async (t) => {
    for (let turn = 0; turn < 2; turn++) {
      const agent = setup.guest.spawn('exec virtiofsd-ts-agent /mnt 2>&1');
      await agent.waitForLine('connected');
      // It is in use as long as the agent is there.
      assert.notEqual((await setup.guest.run('umount /mnt')).status, 0);
      const watcher = await watch(setup, t, 'w');
      watcher.close();
      agent.kill('SIGTERM');
      await agent.ended;
      const { status, stderr } = await setup.guest.run(
        'for i in 1 2 3 4 5; do umount /mnt && break; sleep 1; done; mount -t virtiofs myfs /mnt',
      );
      assert.equal(status, 0, stderr);
    }
  });
});

it('a share that the guest may only read (--readonly)', { timeout: 60_000 }, async (t) => {
  const setup = await machine(['--readonly']);
  try {
    fs.mkdirSync(join(setup.share, 'w'));
    await startAgent(setup);
    const watcher = await watch(setup, t, 'w');
    execFileSync('sh', ['-c', 'echo x >a; mv a b; rm b; mkdir end'], { cwd: join(setup.share, 'w') });
    const lines = names(await watcher.until('w CREATE,ISDIR end')).map((line) => line.replace(/ #\d+/, ''));
    assert.deepEqual(lines, ['w CREATE a', 'w MOVED_FROM a', 'w MOVED_TO b', 'w DELETE b', 'w CREATE,ISDIR end']);
    assert.notEqual((await setup.guest.run('rmdir /mnt/w/end')).status, 0);
    watcher.close();
  } finally {
    await setup.end();
  }
});
