/**
 * Live migration as libvirt does it: two libvirtds of Debian 13 (11.3, with QEMU 10.0), each with files of its own, and a guest that goes from
 * the one to the other by `virsh migrate`, and to a file and back by `virsh save` and `virsh restore`. What it cannot do, and what it says then.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { script } from '../../qemu/checks.js';
import { Agent, type Command } from '../../qemu/guest/agent.js';
import { repository } from '../../qemu/guest/daemon.js';
import { type Child, startChild } from '../../qemu/guest/process.js';
import { cacheFolder, prepareBoot } from '../../qemu/guest.js';
import { needsRoot } from '../support/daemon.js';

const NONCE = '0123456789abcdef';
const folder = mkdtempSync(join(tmpdir(), 'migration-libvirt-'));
const share = join(folder, 'share');
const hosts: { name: string; child: Child }[] = [];
after(async () => {
  for (const { child } of hosts) await child.stop();
  rmSync(folder, { recursive: true, force: true });
});

/** Runs virsh at a host. */
function virsh(host: string, ...args: string[]): { status: number | null; text: string } {
  const at = ['-q', '-c', uri(host), ...args];
  const { status, stdout, stderr } = spawnSync('virsh', at, { encoding: 'utf8', timeout: 240_000 });
  return { status, text: (stdout + stderr).trim() };
}

const uri = (host: string): string => `qemu+unix:///system?socket=${folder}/${host}/run/libvirt/libvirt-sock`;

function must(host: string, ...args: string[]): string {
  const { status, text } = virsh(host, ...args);
  assert.equal(status, 0, `virsh ${args.join(' ')}: ${text}\n${logs()}`);
  return text;
}

/** What the daemons have to say. */
function logs(): string {
  return hosts
    .map(({ name }) => `${folder}/${name}/var/log/libvirt/qemu/plain-fs0-virtiofsd.log`)
    .map((file) => `${file}\n${existsSync(file) ? readFileSync(file, 'utf8').slice(-2000) : ''}`)
    .join('\n');
}

/** plain.xml with a kernel, our daemon, and a channel for commands. */
function domain(): string {
  const { kernel, initrd } = prepareBoot({ kind: 'qemu' }, folder);
  const words = `console=ttyS0 quiet panic=-1 rdinit=/init nonce=${NONCE} channel=/dev/vport*p*`;
  return readFileSync(join(repository, 'qemu/libvirt/plain.xml'), 'utf8')
    .replace("type='kvm'", "type='qemu'")
    .replace('/usr/bin/virtiofsd-ts', join(folder, 'daemon'))
    .replace('/srv/share', share)
    .replace('</os>', `<kernel>${kernel.image}</kernel><initrd>${initrd}</initrd><cmdline>${words}</cmdline></os>`)
    .replace('<devices>', "<cpu mode='maximum'/><devices><emulator>/usr/bin/qemu-system-x86_64</emulator>")
    .replace(
      '</devices>',
      `<channel type='unix'><source mode='bind' path='/run/agent'/><target type='virtio' name='agent'/></channel>
       <controller type='usb' model='none'/><memballoon model='none'/></devices>`,
    );
}

describe('live migration by libvirt', { ...needsRoot, timeout: 1_200_000 }, () => {
  let agent: Agent;
  let at = 'one';
  let deleted: Command;
  let watcher: Command;

  /** The guest's channel at a host. */
  const channel = (host: string): Agent =>
    new Agent(createConnection(`${folder}/${host}/run/agent`), NONCE, { PATH: '/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' });

  /** The guest, which stands still, has arrived at a host: it goes on there. */
  async function arrived(host: string): Promise<void> {
    const there = channel(host);
    agent.exchange(there);
    // The channel is open at both ends before anything is said.
    await sleep(500);
    must(host, 'resume', 'plain');
    at = host;
  }

  /** A shell with two files open, one of which is deleted. */
  async function holdDeleted(): Promise<Command> {
    const shell = agent.spawn(
      'exec 3<>/mnt/gone 4</mnt/file && echo "the contents" >&3 && rm /mnt/gone && echo ready && while read x; do cat /proc/self/fd/3; echo "and $x"; cat <&4; done',
    );
    await shell.waitForLine('ready', { timeoutMs: 60_000 });
    return shell;
  }

  /** It still has them. */
  async function holds(): Promise<void> {
    void deleted.write('x\n');
    for (const line of ['the contents', 'and x', 'on the host']) await deleted.waitForLine(line, { timeoutMs: 60_000 });
  }

  /** How long a guest stood still, as libvirt says where it arrived; without the pause that we make. */
  const downtime = (host: string): string =>
    /^Total downtime:.*$/m.exec(virsh(host, 'domjobinfo', '--completed', 'plain').text)?.[0] ?? 'downtime unknown';

  const lastLine = (host: string, pattern: RegExp): string =>
    readFileSync(`${folder}/${host}/var/log/libvirt/qemu/plain-fs0-virtiofsd.log`, 'utf8')
      .split('\n')
      .findLast((line) => pattern.test(line)) ?? '';

  async function output(command: string): Promise<string> {
    const running = agent.spawn(command);
    const lines: string[] = [];
    running.on('line', ({ text }) => lines.push(text));
    await running.ended;
    return lines.join('\n');
  }

  /** The options with which a daemon is started from now on. */
  function daemonOptions(...options: string[]): void {
    const program = `#!/bin/sh\nexec /usr/bin/node --no-warnings ${repository}/build/js/src/main.js ${options.join(' ')} "$@"\n`;
    writeFileSync(join(folder, 'daemon'), program);
    chmodSync(join(folder, 'daemon'), 0o755);
  }

  const migrate = (to: string, ...options: string[]) =>
    virsh(at, 'migrate', '--live', '--suspend', ...options, 'plain', uri(to), '--migrateuri', `unix://${folder}/migration`);

  before(async () => {
    script('setup.sh', 'packages', 'to talk to libvirt', 'libvirt-clients');
    const root = script('libvirt/newer.sh');
    mkdirSync(share);
    daemonOptions();
    for (const name of ['one', 'two']) {
      mkdirSync(join(folder, name));
      const child = startChild(join(repository, 'qemu/libvirt/libvirtd.sh'), [join(folder, name), root], {
        stdio: ['ignore', 'pipe', 'pipe'],
        env: { ...process.env, SHARED: cacheFolder },
        onLine: () => {},
      });
      hosts.push({ name, child });
    }
    for (const { name, child } of hosts) {
      for (let tries = 0; !existsSync(`${folder}/${name}/run/libvirt/libvirt-sock`) && tries < 600; tries++) await sleep(50);
      assert.equal(virsh(name, 'version', '--daemon').status, 0, child.log.join('\n'));
    }
    writeFileSync(join(folder, 'plain.xml'), domain());
  });

  it('a guest with an open file, one that was deleted while open, and a watch', async (t) => {
    t.diagnostic(must('one', 'version', '--daemon').replaceAll('\n', '; '));
    must('one', 'create', join(folder, 'plain.xml'));
    agent = channel('one');
    await agent.connected();
    writeFileSync(join(share, 'file'), 'on the host\n');
    assert.equal(await output('mount -t virtiofs myfs /mnt && cat /mnt/file'), 'on the host');
    watcher = agent.spawn('inotifywait -m /mnt 2>&1');
    await watcher.waitForLine('Watches established', { timeoutMs: 60_000 });
    deleted = await holdDeleted();
  });

  it('by paths: a deleted file has none, the destination refuses, the guest goes on', async (t) => {
    const { status, text } = migrate('two');
    t.diagnostic(text);
    assert.equal(status, 1);
    // As docs/sharing.md says.
    assert.match(text, /operation failed: job 'migration in' failed: load of migration failed: Input\/output error/);
    assert.match(logs(), /it was deleted and is still open, so it has no path: with --migration-mode=file-handles/);
    assert.equal(must('one', 'domstate', 'plain'), 'running');
    assert.equal(await output('cat /mnt/file'), 'on the host');
  });

  it('post-copy', (t) => {
    const { status, text } = virsh(
      at,
      'migrate',
      '--live',
      '--postcopy',
      'plain',
      uri('two'),
      '--migrateuri',
      `unix://${folder}/migration`,
    );
    t.diagnostic(`${status}: ${text}`);
    assert.equal(status, 1);
    assert.match(text, /'migrate-set-capabilities': Postcopy is not supported: vhost-user backend not capable of postcopy/);
    assert.equal(must('one', 'domstate', 'plain'), 'running');
  });

  it('a snapshot with memory', (t) => {
    const { status, text } = virsh(at, 'snapshot-create-as', 'plain', 'one', '--live', '--memspec', `${folder}/snapshot,snapshot=external`);
    t.diagnostic(`${status}: ${text}`);
    assert.equal(status, 0, text);
  });

  /** A change on the host is heard by the watch that was set before the guest left. */
  async function heard(name: string): Promise<void> {
    writeFileSync(join(share, name), '');
    await watcher.waitForLine(`CREATE ${name}`, { timeoutMs: 60_000 });
  }

  it('virsh save, virsh restore', async (t) => {
    await holds();
    deleted.kill();
    await deleted.ended;
    assert.equal(await output('cat /mnt/file'), 'on the host');
    // The next ones take deleted files along.
    daemonOptions('--migration-mode=file-handles');
    const began = performance.now();
    must('one', 'save', 'plain', `${folder}/saved`);
    const saved = performance.now();
    must('one', 'restore', '--paused', `${folder}/saved`);
    t.diagnostic(`saved in ${Math.round(saved - began)} ms, restored in ${Math.round(performance.now() - saved)} ms`);
    await arrived('one');
    assert.equal(await output('cat /mnt/file'), 'on the host');
    await heard('after-restore');
  });

  for (const to of ['two', 'one']) {
    it(`virsh migrate to host ${to}, by file handles, with a deleted file open`, async (t) => {
      deleted = await holdDeleted();
      const from = at;
      const { status, text } = migrate(to);
      assert.equal(status, 0, `${text}\n${logs()}`);
      await arrived(to);
      t.diagnostic(`${downtime(to)}; ${lastLine(to, /took over/)}`);
      assert.notEqual(virsh(from, 'domstate', 'plain').status, 0, 'it is gone there');
      await holds();
      deleted.kill();
      await heard(`after-migration-to-${to}`);
      assert.equal(await output('echo written > /mnt/file && cat /mnt/file'), 'written');
      assert.equal(readFileSync(join(share, 'file'), 'utf8'), 'written\n');
      writeFileSync(join(share, 'file'), 'on the host\n');
    });
  }

  it('virsh destroy', () => {
    must(at, 'destroy', 'plain');
  });
});
