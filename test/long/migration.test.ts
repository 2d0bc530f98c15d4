/**
 * A guest moves between QEMUs (Debian sid's or trixie's: vhost-user-fs migrates since QEMU 8.2) with fio at work, files open, deleted files open,
 * and watches; to a file and back; and stays where it is when it cannot go.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { script } from '../../qemu/checks.js';
import { bootGuest, type Command, type Daemon, type Guest, startDaemon } from '../../qemu/guest.js';
import { buildFsnotify, Watcher } from '../support/fsnotify.js';
import { COMPLAINTS } from '../support/guests.js';

/** The Debian whose QEMU it is. */
const RELEASE = process.env['QEMU_RELEASE'] ?? 'sid';

const FIO =
  'fio --name=moving --directory=/mnt/fio --size=16m --rw=randwrite --bs=8k --ioengine=psync --rate_iops=300 --verify=crc32c --verify_backlog=64 --end_fsync=1';

const folder = mkdtempSync(join(tmpdir(), 'migration-'));
after(() => rmSync(folder, { recursive: true, force: true }));

/** What was started, to be ended whatever happens. */
const started: { kill?: () => Promise<unknown>; stop?: () => Promise<unknown> }[] = [];
after(async () => {
  for (const one of started.reverse()) await (one.kill?.() ?? one.stop?.());
});

describe('live migration in QEMU', { timeout: 900_000 }, () => {
  const share = join(folder, 'share');
  for (const name of ['fio', 'watched']) mkdirSync(join(share, name), { recursive: true });
  let qemu = '';
  let daemon: Daemon;
  let guest: Guest;

  async function machine(options: string[], incoming: boolean): Promise<{ daemon: Daemon; guest: Guest }> {
    const made = await startDaemon({ shareDir: share, options: ['--migration-on-error=abort', '--posix-lock', '--flock', ...options] });
    started.push(made);
    const box = await bootGuest({
      kind: 'qemu',
      qemu,
      hostRoot: true,
      memoryMiB: 384,
      shares: [{ socket: made }],
      timeoutMs: 240_000,
      incoming,
    });
    started.push(box);
    return { daemon: made, guest: box };
  }

  /** Moves the guest to a new machine and a new daemon; the old ones end. Returns the milliseconds that it stood still. */
  async function move(options: string[], uri = `unix:${join(folder, 'socket')}`): Promise<number> {
    const to = await machine(options, true);
    const from = { daemon, guest };
    await to.guest.takeOver(from.guest, uri);
    const { downtime = -1 } = ((await from.guest.qmp('query-migrate').catch(() => ({}))) as { downtime?: number }) ?? {};
    ({ daemon, guest } = to);
    await from.guest.kill();
    await from.daemon.stop();
    return downtime;
  }

  async function output(command: string): Promise<string> {
    const { status, stdout, stderr } = await guest.run(command, { timeoutMs: 240_000 });
    assert.equal(status, 0, `${command}: ${stdout}${stderr}\n${daemon.log.join('\n')}`);
    return stdout.trim();
  }

  /** A shell in the guest with a file open that was deleted since. */
  async function holdDeleted(): Promise<Command> {
    const shell = guest.spawn(
      'exec 3<>/mnt/gone && echo "the contents" >&3 && rm /mnt/gone && echo ready && read x && cat /proc/self/fd/3 && echo end',
    );
    await shell.waitForLine('ready', { timeoutMs: 60_000 });
    return shell;
  }

  it('starts', async (t) => {
    qemu = script('newest-qemu.sh', RELEASE);
    ({ daemon, guest } = await machine([], false));
    const { qemu: version } = (await guest.qmp('query-version')) as { qemu: { major: number; minor: number; micro: number } };
    t.diagnostic(`QEMU ${version.major}.${version.minor}.${version.micro}`);
    writeFileSync(join(share, 'file'), 'on the host');
    buildFsnotify(share);
    assert.equal(await output('cat /mnt/file'), 'on the host');
  });

  it('a file that was deleted while open has no path: the destination refuses, and the guest goes on where it was', async () => {
    const shell = await holdDeleted();
    const to = await machine([], true);
    await assert.rejects(to.guest.takeOver(guest, `unix:${join(folder, 'refused')}`), /migration failed|QEMU/);
    assert.match(to.daemon.log.join('\n'), /it was deleted and is still open, so it has no path: with --migration-mode=file-handles/);
    await to.guest.kill();
    void shell.write('go on\n');
    await shell.waitForLine('the contents', { timeoutMs: 60_000 });
    assert.equal(await output('cat /mnt/file'), 'on the host');
  });

  it('by paths, with fio at work and a watch', async (t) => {
    const fio = guest.spawn(FIO);
    const watcher = Watcher.inGuest(guest, '/mnt/fsnotify inotify w=/mnt/watched');
    await watcher.ready();
    await fio.waitForLine('Starting', { timeoutMs: 60_000 });
    writeFileSync(join(share, 'watched/before'), '');
    await watcher.until('w CREATE before', 60_000);
    const downtime = await move(['--migration-mode=file-handles']);
    t.diagnostic(`stood still for ${downtime} ms; ${daemon.log.find((line) => line.includes('took over'))}`);
    await watcher.until('- Q_OVERFLOW', 60_000);
    writeFileSync(join(share, 'watched/after'), '');
    await watcher.until('w CREATE after', 60_000);
    assert.equal((await fio.ended).status, 0, fio.lines.map(({ text }) => text).join('\n'));
    assert.equal(await output('cat /mnt/file'), 'on the host');
    watcher.close();
  });

  it('by file handles, with a deleted file open, and a lock', async (t) => {
    const shell = await holdDeleted();
    const holder = guest.spawn('exec 4>/mnt/locked && flock 4 && echo locked && read x && exec 4>&- && echo free && read x');
    await holder.waitForLine('locked', { timeoutMs: 60_000 });
    const taken = () => spawnSync('flock', ['-n', join(share, 'locked'), 'true']).status === 1;
    assert.ok(taken());
    const fio = guest.spawn(FIO);
    await fio.waitForLine('Starting', { timeoutMs: 60_000 });
    const downtime = await move(['--migration-mode=file-handles']);
    t.diagnostic(`stood still for ${downtime} ms; ${daemon.log.find((line) => line.includes('took over'))}`);
    for (const end = Date.now() + 10_000; !taken() && Date.now() < end; await sleep(20));
    assert.ok(taken(), 'by the destination, since the source is gone');
    void holder.write('go on\n');
    await holder.waitForLine('free', { timeoutMs: 60_000 });
    assert.ok(!taken());
    holder.kill();
    void shell.write('go on\n');
    await shell.waitForLine('the contents', { timeoutMs: 60_000 });
    assert.equal((await fio.ended).status, 0, fio.lines.map(({ text }) => text).join('\n'));
  });

  it('to a file, and back when its QEMU is gone', async () => {
    const shell = guest.spawn('exec 3</mnt/file && echo ready && read x && cat /proc/self/fd/3 && echo end');
    await shell.waitForLine('ready', { timeoutMs: 60_000 });
    await move(['--migration-mode=file-handles'], `file:${join(folder, 'guest')}`);
    void shell.write('go on\n');
    await shell.waitForLine('on the host', { timeoutMs: 60_000 });
    assert.equal(await output('echo new > /mnt/new && cat /mnt/new'), 'new');
  });

  it('ends, and the kernel had nothing to complain about', async () => {
    assert.doesNotMatch(await guest.dmesg(), COMPLAINTS);
    await guest.poweroff();
    assert.equal((await daemon.stop()).status, 0);
  });
});
