/** The replay agent in real guests: contents right after each event, its life, and what nobody else can do in its name. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { AGENT_UID } from '../../src/replay/replay.js';
import { startAgent, withAgent } from '../support/agent.js';
import { buildFsnotify, PROGRAM, Watcher } from '../support/fsnotify.js';
import { type Setup, setUp } from '../support/guests.js';
import { change, DIRECTORIES, random, SEED, truth } from '../support/random-changes.js';

const folder = fs.mkdtempSync(join(tmpdir(), 'agent-life-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => fs.rmSync(folder, { recursive: true, force: true }));

async function machine(kernel: string, daemonOptions: string[] = []): Promise<Setup> {
  const agent = withAgent(folder);
  return setUp({
    kind: 'uml',
    kernel,
    ...agent,
    files: { ...agent.files, [PROGRAM]: program },
    daemonOptions: [...agent.daemonOptions, ...daemonOptions],
  });
}

for (const cache of ['auto', 'always']) {
  it(`random changes, --cache=${cache}: never stale after the event`, { timeout: 120_000 }, async () => {
    const setup = await machine('7.2-plain', [`--cache=${cache}`]);
    try {
      await startAgent(setup);
      const root = join(setup.share, 'random');
      for (let i = 0; i < DIRECTORIES; i++) fs.mkdirSync(join(root, String(i)), { recursive: true });
      const pick = random(SEED);
      for (let i = 0; i < 40; i++) change(root, pick, -i - 1);
      const follower = Watcher.inGuest(setup.guest, 'fsnotify follow /mnt/random');
      await follower.ready();
      for (let turn = 1; turn <= 500; turn++) {
        const { what, events } = change(root, pick, turn);
        for (const [directory, closed, name] of events) {
          // CLOSE_WRITE of what can be run does not come: see qemu/guest/agent/README.md.
          const mode = fs.lstatSync(join(root, String(directory), name), { throwIfNoEntry: false })?.mode ?? 0;
          const mask = closed === 'CLOSE_WRITE' && (mode & 0o111) !== 0 ? 'MODIFY' : closed;
          const expected = `${directory} ${mask} ${name} ${truth(root, directory, name)}`;
          // Of several MODIFY the last one has it all.
          if (mask !== closed) await follower.until(expected);
          else
            assert.equal(
              (await follower.until(new RegExp(`^${directory} ${mask} ${name} `))).at(-1),
              expected,
              `turn ${turn} (SEED=${SEED}): ${what}`,
            );
        }
      }
      follower.close();
    } finally {
      await setup.end();
    }
  });
}

describe('the life of the agent', () => {
  let setup: Setup;
  before(async () => {
    setup = await machine('6.12-plain');
  });
  after(() => setup.end());

  const run = async (command: string) => setup.guest.run(command);
  const files = () => execFileSync('ls', ['-lAR', '--time-style=full-iso'], { cwd: setup.share, encoding: 'utf8' });

  it('the log says once that it is waited for; the control file is nobody else’s', async () => {
    const said = () => setup.daemon.log.filter((line) => line.includes('they wait for virtiofsd-ts-agent')).length;
    for (const deadline = Date.now() + 5000; said() === 0 && Date.now() < deadline; ) await sleep(20);
    assert.equal(said(), 1);
    const directory = '/mnt/.virtiofsd-ts-agent';
    const control = `${directory}/control`;
    assert.equal((await run('ls -A /mnt')).stdout, '');
    assert.equal((await run(`ls -l ${control}`)).stdout.slice(0, 10), '----------');
    assert.equal((await run(`ls -ld ${directory}`)).stdout.slice(0, 10), 'drwx------');
    for (const path of [directory, control]) assert.notEqual((await setup.guest.run(`ls -d ${path}`, { uid: 1000 })).status, 0);
    const refused = [`rm ${control}`, `mv ${control} /mnt/x`, `ln ${control} /mnt/x`, `echo x >${control}`];
    refused.push(`ls ${directory}`, `rmdir ${directory}`, `mv ${directory} /mnt/x`, `chmod 777 ${directory}`, `mkdir ${directory}/x`);
    refused.push(`echo x >${directory}/x`, `ln -s x ${directory}/x`, `mkdir ${directory}`);
    for (const command of refused) assert.notEqual((await run(command)).status, 0, command);
    assert.deepEqual(fs.readdirSync(setup.share), []);
    // Who opens it to read, as fanotify does for the watchers of a mount, gets nothing, and keeps no agent out.
    assert.match((await run(`dd if=${control}`)).stderr, /Bad file descriptor/);
    const open = setup.guest.spawn(`exec 3<${control}; echo open; read line`);
    await open.waitForLine('open');
    const agent = setup.guest.spawn('exec virtiofsd-ts-agent /mnt 2>&1');
    await agent.waitForLine('connected');
    assert.match((await run(`dd if=${control}`)).stderr, /Bad file descriptor/);
    open.endInput();
    await open.ended;
    assert.match((await run('virtiofsd-ts-agent /mnt')).stderr, /another agent/);
    agent.kill('SIGTERM');
    await agent.ended;
  });

  it('who watches the share’s root hears nothing of it', { timeout: 60_000 }, async () => {
    fs.mkdirSync(join(setup.share, 'below'));
    const own = Watcher.inGuest(setup.guest, 'fsnotify inotify root=/mnt');
    const below = Watcher.inGuest(setup.guest, 'fsnotify inotify below=/mnt/below');
    await Promise.all([own.ready(), below.ready()]);
    for (let turn = 0; turn < 2; turn++) {
      const agent = setup.guest.spawn('exec virtiofsd-ts-agent /mnt 2>&1');
      await agent.waitForLine('connected');
      // One change of each kind, below, and what the agent reports of a watch that comes and goes.
      for (let i = 0; !below.lines.some((line) => line.startsWith('below CREATE first')); i++) {
        fs.writeFileSync(join(setup.share, `below/first${turn}.${i}`), 'x');
        await sleep(20);
      }
      execFileSync('sh', ['-c', 'echo x >a; echo y >>a; chmod 600 a; mv a b; rm b; mkdir d; rmdir d; ln -s x l; rm l'], {
        cwd: fs.mkdtempSync(join(setup.share, 'below/t')),
      });
      const last = `last${turn}`;
      fs.mkdirSync(join(setup.share, last));
      await below.until(/^below CREATE,ISDIR/);
      const seen = await own.until(`root CREATE,ISDIR ${last}`);
      agent.kill('SIGTERM');
      await agent.ended;
      // One that comes later opens what the kernel has no name of any more: that reads the directory above (README.md of the agent).
      const reading = turn === 0 ? [] : ['root OPEN,ISDIR', 'root ACCESS,ISDIR', 'root CLOSE_NOWRITE,ISDIR'];
      assert.deepEqual(
        seen.filter((line) => !reading.includes(line)),
        [`root CREATE,ISDIR ${last}`],
      );
      below.lines.length = 0;
    }
    own.close();
    below.close();
  });

  it('what it says when it cannot work', async () => {
    const said = async (command: string) => {
      const { status, stderr } = await run(command);
      assert.notEqual(status, 0);
      return stderr;
    };
    assert.match(await said('echo wrong >/tmp/t; virtiofsd-ts-agent -t /tmp/t /mnt'), /has another token/);
    assert.match(await said('virtiofsd-ts-agent -t /tmp/none /mnt'), /cannot read \/tmp\/none/);
    assert.match(await said('virtiofsd-ts-agent /tmp'), /is no virtio-fs mount/);
    assert.match(await said('mkdir -p /ro; mount -t virtiofs -o ro myfs /ro; virtiofsd-ts-agent /ro'), /mounted read-only/);
    await run('umount /ro');
  });

  it('killed at any time, and started again: events go on, the host is as it was', { timeout: 60_000 }, async () => {
    fs.mkdirSync(join(setup.share, 'w'));
    for (let turn = 0; turn < 5; turn++) {
      const agent = setup.guest.spawn('exec virtiofsd-ts-agent /mnt 2>&1');
      await agent.waitForLine('connected');
      const watcher = Watcher.inGuest(setup.guest, 'fsnotify inotify w=/mnt/w');
      await watcher.ready();
      // The guest's kernel may know the name still: then the agent finds the watch only when it looks at all processes.
      for (let i = 0; !watcher.lines.some((line) => line.startsWith('w CREATE first')); i++) {
        fs.writeFileSync(join(setup.share, 'w', `first${turn}.${i}`), 'x');
        await sleep(20);
      }
      // In the middle of many.
      execFileSync('sh', ['-c', `for i in $(seq 200); do echo $i >w/s$i; mv w/s$i w/t$i; rm w/t$i; done; echo end >w/end${turn}`], {
        cwd: setup.share,
      });
      await sleep(20 * turn);
      const before = files();
      agent.kill('SIGKILL');
      await agent.ended;
      await sleep(100);
      assert.equal(files(), before);
      watcher.close();
    }
  });

  it('its user id is of no use to others', async () => {
    const agent = setup.guest.spawn('exec virtiofsd-ts-agent /mnt 2>&1');
    await agent.waitForLine('connected');
    fs.mkdirSync(join(setup.share, 'open'));
    fs.chmodSync(join(setup.share, 'open'), 0o777);
    fs.chmodSync(setup.share, 0o755);
    fs.writeFileSync(join(setup.share, 'open/file'), 'x');
    fs.chmodSync(join(setup.share, 'open/file'), 0o666);
    const before = files();
    for (const command of ['rm -f file', 'mkdir d', 'mv file g', 'ln file h', 'ln -s x l', 'echo y >file', 'echo y >new', 'touch file'])
      assert.notEqual((await setup.guest.run(`cd /mnt/open && ${command}`, { uid: AGENT_UID })).status, 0, command);
    assert.equal(files(), before);
    // And nobody else's changes are taken for the agent's.
    for (const command of ['mkdir d', 'mv file g', 'ln g h', 'rm h', 'echo y >new', 'rmdir d'])
      assert.equal((await run(`cd /mnt/open && ${command}`)).status, 0, command);
    assert.deepEqual(fs.readdirSync(join(setup.share, 'open')).sort(), ['g', 'new']);
    assert.match((await run('virtiofsd-ts-agent /mnt')).stderr, /another agent/);
    agent.kill('SIGTERM');
    await agent.ended;
  });
});

it('a guest whose kernel is told itself needs none', { timeout: 60_000 }, async () => {
  const setup = await machine('6.12');
  try {
    const { status, stderr } = await setup.guest.run('virtiofsd-ts-agent /mnt');
    assert.match(stderr, /no agent is needed/);
    assert.equal(status, 0);
  } finally {
    await setup.end();
  }
});

it('git checkout between branches on the host: the guest’s watcher ends with the right picture', { timeout: 120_000 }, async () => {
  const setup = await machine('7.2-plain');
  try {
    await startAgent(setup);
    const root = join(setup.share, 'repository');
    fs.mkdirSync(root);
    const git = (...args: string[]) =>
      execFileSync('git', ['-C', root, '-c', 'user.name=t', '-c', 'user.email=t@localhost', ...args], { stdio: 'pipe' });
    const fill = (mark: string, count: number) => {
      for (let i = 0; i < count; i++) {
        fs.mkdirSync(join(root, `d${i % 5}`), { recursive: true });
        fs.writeFileSync(join(root, `d${i % 5}/f${i}`), `${mark} ${i}`.repeat(1 + (i % 7)));
      }
    };
    git('init', '-q', '-b', 'one');
    fill('one', 60);
    git('add', '.');
    git('commit', '-qm', 'one');
    git('checkout', '-q', '-b', 'two');
    fs.rmSync(join(root, 'd1'), { recursive: true });
    fill('two', 40);
    fs.mkdirSync(join(root, 'new'));
    fs.writeFileSync(join(root, 'new/file'), 'new');
    git('add', '-A');
    git('commit', '-qm', 'two');
    const watcher = Watcher.inGuest(
      setup.guest,
      `inotifywait -m -e create,close_write,move,delete --format '%e %f' /mnt/${basename(root)} 2>&1`,
    );
    await watcher.until('Watches established.');
    const all =
      'find . -path ./.git -prune -o -type f -print | sort | xargs cat | md5sum; find . -path ./.git -prune -o -print | sort | md5sum';
    for (const branch of ['one', 'two', 'one', 'two']) {
      git('checkout', '-q', branch);
      fs.writeFileSync(join(root, `end-${branch}`), '');
      await watcher.until(new RegExp(`^(CREATE|CLOSE_WRITE,CLOSE) end-${branch}$`));
      fs.rmSync(join(root, `end-${branch}`));
      await watcher.until(`DELETE end-${branch}`);
      const { stdout } = await setup.guest.run(`cd /mnt/${basename(root)}; ${all}`);
      assert.equal(stdout, execFileSync('sh', ['-c', all], { cwd: root, encoding: 'utf8', env: { ...process.env, LC_ALL: 'C' } }));
    }
    watcher.close();
  } finally {
    await setup.end();
  }
});
