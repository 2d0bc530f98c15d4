/** The replay agent in a guest that has something mounted in the share, and processes that are in it: nothing is detached or lost. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { startAgent, withAgent } from '../support/agent.js';
import { buildFsnotify, PROGRAM, Watcher } from '../support/fsnotify.js';
import { type Setup, setUp } from '../support/guests.js';

const folder = fs.mkdtempSync(join(tmpdir(), 'agent-mounts-'));
let setup: Setup;
before(async () => {
  const agent = withAgent(folder);
  const files = { ...agent.files, [PROGRAM]: buildFsnotify(folder) };
  // What a guest's own look-ups detach is not the question: they are not made again.
  const daemonOptions = [...agent.daemonOptions, '--cache=always'];
  setup = await setUp({ kind: 'uml', kernel: '6.12-plain', files, daemonOptions });
  await startAgent(setup);
});
after(async () => {
  await setup.end();
  fs.rmSync(folder, { recursive: true, force: true });
});

async function ok(command: string): Promise<string> {
  const { status, stdout, stderr } = await setup.guest.run(command);
  assert.equal(status, 0, `${command}: ${stderr}`);
  return stdout.trim();
}

const inShare = (...path: string[]): string => join(setup.share, ...path);
/** The host does this in a directory of the share. */
const host = (directory: string, command: string) => execFileSync('sh', ['-c', command], { cwd: inShare(directory) });
const hostFiles = () => execFileSync('ls', ['-lAR', '--time-style=full-iso'], { cwd: setup.share, encoding: 'utf8' });

/** A watcher of /mnt/`directory` that the agent has found. */
async function watch(directory: string): Promise<Watcher> {
  const watcher = Watcher.inGuest(setup.guest, `fsnotify inotify w=/mnt/${directory}`);
  await watcher.ready();
  const probe = inShare(directory, 'probe');
  for (; !watcher.lines.some((line) => line === 'w CREATE,ISDIR probe'); await sleep(20)) {
    fs.mkdirSync(probe);
    fs.rmdirSync(probe);
  }
  fs.mkdirSync(inShare(directory, 'start'));
  await watcher.until('w CREATE,ISDIR start');
  return watcher;
}

/** What it has heard up to now. */
async function heard(watcher: Watcher, directory: string, end = 'end'): Promise<string[]> {
  fs.mkdirSync(inShare(directory, end));
  return (await watcher.until(`w CREATE,ISDIR ${end}`)).slice(0, -1).filter((line) => !/ (OPEN|ACCESS|CLOSE)/.test(line));
}

it('a name that is a mount point, in any namespace: it is not replayed, and nothing is detached', { timeout: 60_000 }, async (t) => {
  fs.mkdirSync(inShare('w'));
  for (const name of ['tmpfs', 'moved', 'left', 'over', 'own', 'above', 'above/below', 'source', 'with space', 'free'])
    fs.mkdirSync(inShare('w', name));
  for (const name of ['file', 'overfile', 'other', 'other2', 'data']) fs.writeFileSync(inShare('w', name), name);
  await ok('ls -lR /mnt/w');
  for (const name of ['tmpfs', 'left', 'over', 'above/below', 'with space'])
    await ok(`mount -t tmpfs none '/mnt/w/${name}' && echo inside >'/mnt/w/${name}/inside'`);
  await ok('mount --bind /mnt/w/source /mnt/w/moved');
  for (const name of ['file', 'overfile']) await ok(`mount --bind /mnt/w/data /mnt/w/${name}`);
  // One that only another process sees.
  const other = setup.guest.spawn('exec unshare -m sh -c "mount -t tmpfs none /mnt/w/own; echo mounted; read line"');
  t.after(() => other.endInput());
  await other.waitForLine('mounted');
  const pid = await ok('for p in /proc/[0-9]*; do grep -q " /mnt/w/own " $p/mountinfo && basename $p; done | head -n1');
  const mounted = async (of: string) =>
    (await ok(`grep -o ' /mnt/w/[^ ]*' /proc/${of}/mountinfo | sort`)).split('\n').map((line) => line.trim());
  const [before, beforeOther] = [await mounted('self'), await mounted(pid)];
  assert.equal(before.length, 8);
  assert.ok(beforeOther.includes('/mnt/w/own'));

  const watcher = await watch('w');
  t.after(() => watcher.close());
  const commands = ['rmdir tmpfs own "with space"', 'mv moved moved2', 'mv left ../left', 'chmod 700 over', 'rm file', 'mv other overfile'];
  commands.push('mv -T free over', 'rm -r above', 'mkdir tmpfs own', 'rm other2', 'echo x >data');
  for (const command of commands) host('w', command);
  const after = hostFiles();
  const seen = await heard(watcher, 'w');
  // The names that are none are heard of.
  assert.ok(seen.includes('w DELETE other2'), seen.join('\n'));
  assert.ok(seen.includes('w MODIFY data'), seen.join('\n'));
  const skipped = / (tmpfs|own|with space|moved2?|left|over|file|overfile|above)$/;
  assert.deepEqual(
    seen.filter((line) => skipped.test(line)),
    [],
  );
  assert.deepEqual(await mounted('self'), before);
  assert.deepEqual(await mounted(pid), beforeOther);
  fs.rmdirSync(inShare('w/end'));
  // The directory itself has had another one made in it.
  const others = (text: string) => text.replaceAll(/^d.* w$/gm, '');
  assert.equal(others(hostFiles()), others(after));

  // When it is unmounted elsewhere, the name is one as any other.
  other.endInput();
  await other.ended;
  assert.equal(await ok(`umount /mnt/w/file; grep -c ' /mnt/w/file ' /proc/self/mountinfo || true`), '0');
  fs.mkdirSync(inShare('w/plain'));
  await ok('mount -t tmpfs none /mnt/w/plain; umount /mnt/w/plain');
  fs.rmdirSync(inShare('w/plain'));
  assert.ok((await heard(watcher, 'w', 'end2')).includes('w DELETE,ISDIR plain'));
  for (const name of before)
    await ok(`umount '${name.replaceAll('\\040', ' ')}' 2>/dev/null || umount -l '${name.replaceAll('\\040', ' ')}' || true`);
});

it('mounts and working directories below what is renamed stay', { timeout: 60_000 }, async (t) => {
  fs.mkdirSync(inShare('v/a/b/mount'), { recursive: true });
  fs.mkdirSync(inShare('v/to'));
  fs.mkdirSync(inShare('v/source'));
  fs.writeFileSync(inShare('v/source/file'), 'bound');
  await ok('ls -R /mnt/v; mount --bind /mnt/v/source /mnt/v/a/b/mount');
  const inside = setup.guest.spawn('cd /mnt/v/a/b; echo there; while read line; do readlink /proc/self/cwd; cat mount/file; echo; done');
  t.after(() => inside.endInput());
  await inside.waitForLine('there');
  const watcher = await watch('v');
  t.after(() => watcher.close());
  host('v', 'mv a to/c; mv to/c d');
  const seen = await heard(watcher, 'v');
  assert.deepEqual(
    seen.map((line) => line.replace(/ #\d+/, '')),
    ['w MOVED_FROM,ISDIR a', 'w MOVED_TO,ISDIR d'],
  );
  await inside.write('\n');
  await inside.waitForLine('bound');
  assert.equal(await ok('cat /mnt/v/d/b/mount/file'), 'bound');
  assert.match(await ok('cat /proc/self/mountinfo'), / \/mnt\/v\/d\/b\/mount /);
  await ok('umount /mnt/v/d/b/mount');
});
