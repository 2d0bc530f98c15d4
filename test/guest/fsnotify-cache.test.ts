/** `--cache=notify` in a real guest: what it keeps is right as soon as the event is there, and it asks for nothing that did not change. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { buildFsnotify, PROGRAM, Watcher } from '../support/fsnotify.js';
import { pause, type Setup, setUp } from '../support/guests.js';
import { readMetrics } from '../support/metrics.js';
import { change, DIRECTORIES, random, SEED, truth } from '../support/random-changes.js';

const folder = fs.mkdtempSync(join(tmpdir(), 'cache-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => fs.rmSync(folder, { recursive: true, force: true }));

for (const { kind, kernel, changes } of [
  { kind: 'uml', kernel: '6.12', changes: 10_000 },
  { kind: 'qemu', kernel: 'debian', changes: 2000 },
] as const) {
  describe(`--cache=notify: ${kind} ${kernel}`, () => {
    let setup: Setup;
    before(async () => {
      setup = await setUp({ kind, kernel, files: { [PROGRAM]: program }, daemonOptions: ['--cache=notify'] });
    });
    after(() => setup.end());

    it(`${changes} random changes: never stale after the event`, { timeout: 300_000 }, async (t) => {
      const root = join(setup.share, 'random');
      for (let i = 0; i < DIRECTORIES; i++) fs.mkdirSync(join(root, String(i)), { recursive: true });
      const pick = random(SEED);
      for (let i = 0; i < 40; i++) change(root, pick, -i - 1);
      const follower = Watcher.inGuest(setup.guest, 'fsnotify follow /mnt/random');
      t.after(() => follower.close());
      await follower.ready();
      const begun = Date.now();
      for (let turn = 1; turn <= changes; turn++) {
        const { what, events } = change(root, pick, turn);
        for (const [directory, mask, name] of events) {
          const line = (await follower.until(new RegExp(`^${directory} ${mask} ${name} `))).at(-1);
          assert.equal(line, `${directory} ${mask} ${name} ${truth(root, directory, name)}`, `turn ${turn} (SEED=${SEED}): ${what}`);
        }
      }
      t.diagnostic(`${Math.round(((Date.now() - begun) / changes) * 1000)} µs from a change to the guest's look at it, and back`);
      // And all of it together.
      await assertSameTree(root);
    });

    it('nothing is stale after an overflow', { timeout: 120_000 }, async () => {
      const root = join(setup.share, 'lost');
      for (let i = 0; i < DIRECTORIES; i++) fs.mkdirSync(join(root, String(i)), { recursive: true });
      fs.mkdirSync(join(setup.share, 'noise'));
      const pick = random(SEED + 1);
      for (let i = 0; i < 100; i++) change(root, pick, -i - 1);
      await assertSameTree(root);
      const watcher = Watcher.inGuest(setup.guest, 'fsnotify inotify 0=/mnt/lost/0 noise=/mnt/noise');
      await watcher.ready();
      // Names and files that are in use are not simply dropped.
      const busy = setup.guest.spawn('cd /mnt/lost/1; exec 3<. ; echo in; sleep 1000');
      await busy.waitForLine('in');
      await setup.guest.run('cat /mnt/lost/2/none');
      await pause(setup, true);
      // More than the queue holds; what comes after it is lost.
      for (let i = 0; i < 60_000; i++) fs.closeSync(fs.openSync(join(setup.share, 'noise', `f${i}`), 'w'));
      for (let turn = 1; turn <= 100; turn++) change(root, pick, turn);
      fs.writeFileSync(join(root, '2/none'), 'here');
      await pause(setup, false);
      await watcher.until('- Q_OVERFLOW', 60_000);
      await assertSameTree(root);
      assert.equal((await setup.guest.run('cat /mnt/lost/2/none')).stdout, 'here');
      watcher.close();
      busy.kill();
    });

    /** Everything below a directory of the share is for the guest as it is. */
    async function assertSameTree(root: string): Promise<void> {
      const all = "find . -type f | sort | xargs stat -c '%n %s %Y %a %h'; find . -type f | sort | xargs cat | md5sum";
      const { stdout } = await setup.guest.run(`cd /mnt/${basename(root)}; ${all}`);
      assert.equal(stdout, execFileSync('sh', ['-c', all], { cwd: root, encoding: 'utf8', env: { ...process.env, LC_ALL: 'C' } }));
    }
  });
}

describe('--cache=notify: what did not change is not asked for again', () => {
  it('find, ls and git status in User Mode Linux with the host’s programs', { timeout: 120_000 }, async (t) => {
    const socket = join(folder, 'again.metrics');
    const setup = await setUp({
      kind: 'uml',
      kernel: '6.12',
      hostRoot: true,
      memoryMiB: 512,
      daemonOptions: ['--cache=notify', `--metrics=unix:${socket}`],
    });
    try {
      const root = join(setup.share, 'repository');
      for (let i = 0; i < 40; i++) {
        fs.mkdirSync(join(root, `d${i}`), { recursive: true });
        for (let j = 0; j < 25; j++) fs.writeFileSync(join(root, `d${i}/f${j}`), `${i} ${j}\n`);
      }
      for (const command of ['init -q', 'add .', '-c user.name=t -c user.email=t@localhost commit -qm one']) {
        execFileSync('git', ['-C', root, ...command.split(' ')], { stdio: 'pipe' });
      }

      const requests = async () => {
        const samples = await readMetrics(socket);
        return ['LOOKUP', 'GETATTR', 'STATX', 'READLINK', 'GETXATTR'].map(
          (name) => `${name} ${samples.get(`virtiofsd_requests_total{opcode="${name}"}`) ?? 0}`,
        );
      };
      const run = async (command: string) => {
        const { status, stdout, stderr } = await setup.guest.run(command);
        assert.equal(status, 0, stderr);
        return stdout;
      };
      const gitStatus = "cd /mnt/repository && git --no-optional-locks -c safe.directory='*' status --porcelain";
      for (const command of [
        "find /mnt/repository -printf '%p %s %T@ %m\\n' | sort | md5sum",
        'ls -lR /mnt/repository | md5sum',
        gitStatus,
      ]) {
        const first = await run(command);
        // What the guest has read itself has an access time that it does not know: Linux asks for it once, by GETATTR.
        const [lookups] = await requests();
        assert.equal(await run(command), first);
        const before = await requests();
        assert.equal(before[0], lookups, command);
        assert.equal(await run(command), first);
        assert.deepEqual(await requests(), before, command);
        // With auto it is asked for again after a second.
        await sleep(1100);
        assert.equal(await run(command), first);
        assert.deepEqual(await requests(), before, `${command}, later`);
      }
      t.diagnostic(`40 directories with 1000 files: ${(await requests()).join(', ')} in all`);

      // And what did change is seen.
      fs.writeFileSync(join(root, 'd7/f7'), 'changed\n');
      fs.renameSync(join(root, 'd8/f8'), join(root, 'd8/new'));
      const expected = ' M d7/f7\n D d8/f8\n?? d8/new\n';
      while ((await run(gitStatus)) !== expected) await sleep(20);
      await run(gitStatus);
      const before = await requests();
      assert.equal(await run(gitStatus), expected);
      assert.deepEqual(await requests(), before);
    } finally {
      await setup.end();
    }
  });

  for (const [kind, kernel] of [
    ['uml', '6.12-plain'],
    ['qemu', 'debian-plain'],
  ] as const) {
    it(`a guest that cannot be told, ${kind} ${kernel}, caches as with auto, and the log says so`, { timeout: 120_000 }, async () => {
      const setup = await setUp({ kind, kernel, daemonOptions: ['--cache=notify'] });
      try {
        const said = () => setup.daemon.log.some((line) => /WARN .*--cache=notify: this guest cannot be told/.test(line));
        for (const deadline = Date.now() + 5000; !said(); await sleep(20)) assert.ok(Date.now() < deadline, setup.daemon.log.join('\n'));
        const file = join(setup.share, 'file');
        fs.writeFileSync(file, 'one');
        const read = async () => (await setup.guest.run('stat -c %s /mnt/file; cat /mnt/file')).stdout;
        assert.equal(await read(), '3\none');
        fs.writeFileSync(file, 'and more');
        await sleep(1100); // auto: attributes for a second
        assert.equal(await read(), '8\nand more');
        fs.rmSync(file);
        await sleep(1100);
        assert.equal((await setup.guest.run('cat /mnt/file')).status, 1);
      } finally {
        await setup.end();
      }
    });
  }
});
