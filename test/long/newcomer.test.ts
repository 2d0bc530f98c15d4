/**
 * docs/newcomer.md, typed into a clean Debian 12 with a systemd of its own: what a newcomer does until a libvirt guest hears of changes on
 * the host. Only Debian's mirror and the npm registry are asked; nodejs.org's distributor is played by the Node.js of this machine.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { repository } from '../../qemu/guest/daemon.js';
import { cacheFolder } from '../../qemu/guest.js';
import { needsRoot } from '../support/daemon.js';
import { missingLine, type Step, stepsOf } from '../support/docs.js';
import { Machine } from '../support/machine.js';

const STEP_MS = 900_000;
const folder = mkdtempSync(join(tmpdir(), 'newcomer-'));
after(() => rmSync(folder, { recursive: true, force: true }));

/** A shell at the other end of a pipe. What it writes is added to the `log`, which shells share. */
class Shell {
  readonly process: ChildProcess;
  readonly #log: { text: string };

  constructor(log: { text: string }, program: string, args: readonly string[]) {
    this.#log = log;
    this.process = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'], cwd: '/' });
    for (const stream of [this.process.stdout, this.process.stderr]) {
      stream?.setEncoding('utf8').on('data', (text: string) => {
        log.text += text;
      });
    }
  }

  type(line: string): void {
    this.process.stdin?.write(`${line}\n`);
  }

  /** Waits for what is written from now on, or since `from`. */
  async until(pattern: RegExp, from = this.#log.text.length, again?: () => void): Promise<RegExpExecArray> {
    const end = performance.now() + STEP_MS;
    for (let turn = 1; ; turn++) {
      const found = pattern.exec(this.#log.text.slice(from));
      if (found) return found;
      assert.ok(performance.now() < end, `no ${pattern} in time:\n${this.#log.text.slice(-3000)}`);
      assert.equal(this.process.exitCode, null, `the shell ended:\n${this.#log.text.slice(-3000)}`);
      if (turn % 100 === 0) again?.();
      await sleep(20);
    }
  }

  /** Runs a command, which must succeed. */
  async run(command: string): Promise<void> {
    const from = this.#log.text.length;
    this.type(`${command}\necho "-- end of" "step ${from}" $?`);
    const [, status] = await this.until(new RegExp(`-- end of step ${from} (\\d+)\r?\n`), from);
    assert.equal(Number(status), 0, `${command}:\n${this.#log.text.slice(from).slice(-6000)}`);
  }
}

/** A Debian 12 as debootstrap makes it, kept for the next time. */
function cleanDebian(): string {
  const kept = join(cacheFolder, 'debian/bookworm');
  if (!existsSync(kept)) {
    execFileSync(join(repository, 'qemu/setup.sh'), ['packages', 'to make a clean Debian', 'debootstrap'], {
      stdio: ['ignore', 'inherit', 'inherit'],
    });
    mkdirSync(dirname(kept), { recursive: true });
    const made = mkdtempSync(`${kept}.`);
    const targets = execFileSync('apt-get', ['indextargets', '--format', '$(REPO_URI)|$(LABEL)', 'Created-By: Packages'], {
      encoding: 'utf8',
    });
    const [, mirror = 'http://deb.debian.org/debian'] = /^(.*)\|Debian$/m.exec(targets) ?? [];
    execFileSync('debootstrap', ['--include=ca-certificates,dbus', 'bookworm', made, mirror], { stdio: ['ignore', 'ignore', 'inherit'] });
    chmodSync(made, 0o755);
    renameSync(made, kept);
  }
  const root = join(folder, 'root');
  execFileSync('cp', ['-a', kept, root]);
  copyFileSync('/etc/resolv.conf', join(root, 'etc/resolv.conf'));
  return root;
}

/** A repository for apt with this machine's Node.js as the package `nodejs`, and a `curl` that prints the script which names it. */
function nodeSource(root: string): void {
  const at = join(root, 'srv/nodesource');
  const files = join(folder, 'nodejs');
  const prefix = dirname(dirname(process.execPath));
  for (const part of ['bin', 'include', 'lib/node_modules', 'DEBIAN'])
    mkdirSync(join(files, part === 'DEBIAN' ? part : `usr/${part}`), { recursive: true });
  for (const part of ['bin/node', 'bin/npm', 'bin/npx', 'include/node', 'lib/node_modules/npm'])
    execFileSync('cp', ['-a', join(prefix, part), join(files, 'usr', part)]);
  const control = `Package: nodejs\nVersion: ${process.versions.node}-1\nArchitecture: amd64\nMaintainer: nobody <nobody@invalid>\nDescription: Node.js\n`;
  writeFileSync(join(files, 'DEBIAN/control'), control);
  mkdirSync(at, { recursive: true });
  execFileSync('dpkg-deb', ['--root-owner-group', '-Zgzip', '-z1', '--build', files, join(at, 'nodejs.deb')], { stdio: 'ignore' });
  const deb = readFileSync(join(at, 'nodejs.deb'));
  writeFileSync(
    join(at, 'Packages'),
    `${control}Filename: ./nodejs.deb\nSize: ${deb.length}\nSHA256: ${createHash('sha256').update(deb).digest('hex')}\n`,
  );
  writeFileSync(
    join(root, 'usr/local/bin/curl'),
    `#!/bin/sh
[ "$*" = '-fsSL https://deb.nodesource.com/setup_20.x' ] || exec /usr/bin/curl "$@"
echo "echo 'deb [trusted=yes] file:/srv/nodesource ./' >/etc/apt/sources.list.d/nodesource.list && apt-get update"
`,
    { mode: 0o755 },
  );
}

/** What of this repository is the source. */
function clone(root: string): void {
  const to = join(root, 'root/virtiofsd-ts');
  mkdirSync(to, { recursive: true });
  const listed = execFileSync('git', ['-C', repository, 'ls-files', '-z', '--cached', '--others', '--exclude-standard']);
  execFileSync('rsync', ['-a', '--from0', '--files-from=-', `${repository}/`, to], { input: listed });
}

/** Whether a process of the machine's daemon has a watch on what the guest watches. */
function watched(): boolean {
  return readdirSync('/proc').some((pid) => {
    try {
      if (!readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('/etc/virtiofsd-ts/token')) return false;
      return readdirSync(`/proc/${pid}/fdinfo`).some((fd) =>
        /^(inotify wd|fanotify ino)/m.test(readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'utf8')),
      );
    } catch {
      return false;
    }
  });
}

test('docs/newcomer.md', { ...needsRoot, timeout: 3_600_000 }, async (t) => {
  execFileSync(join(repository, 'qemu/setup.sh'), ['packages', 'to copy the sources', 'rsync'], {
    stdio: ['ignore', 'inherit', 'inherit'],
  });
  const root = cleanDebian();
  nodeSource(root);
  clone(root);
  // What this machine needs for the registry.
  const certificates = process.env['NODE_EXTRA_CA_CERTS'];
  if (certificates !== undefined) copyFileSync(certificates, join(root, 'etc/extra-certificates'));

  const log = { text: '' };
  const shells: Shell[] = [];
  await using machine = await Machine.start([], root, true);
  try {
    const host = new Shell(log, 'nsenter', machine.enter('HOME=/root', 'bash', '--norc'));
    shells.push(host);
    await host.run(`cd /root/virtiofsd-ts${certificates === undefined ? '' : ' && export NODE_EXTRA_CA_CERTS=/etc/extra-certificates'}`);
    await host.run('! command -v node && ! command -v make');
    let guest: Shell | undefined;
    const began = performance.now();

    const take = async ({ where, command, output, line }: Step): Promise<void> => {
      const from = log.text.length;
      if (command.startsWith('virsh console')) {
        guest = new Shell(log, 'nsenter', machine.enter('TERM=dumb', 'script', '-qfc', command, '/dev/null'));
        shells.push(guest);
        const console = guest;
        await console.until(/Escape character/, from);
        await console.until(/login: /, from, () => console.type(''));
        console.type('root');
        await console.until(/root@[^\n]*# /, from);
        // A shell that does not repeat what is typed.
        console.type('exec bash --norc --noediting');
        console.type("PS1= PS2=; stty -echo; echo 'quiet''ly'");
        await console.until(/quietly/, from);
      } else if (where === 'guest') await guest?.run(command);
      else await host.run(command);
      if (command.startsWith('inotifywait')) while (!watched()) await sleep(100);
      const shown = () => missingLine(output, log.text.slice(from));
      for (const end = performance.now() + 60_000; shown() !== undefined && performance.now() < end; await sleep(20));
      assert.equal(shown(), undefined, `line ${line}: ${command}\nprinted\n${log.text.slice(from)}`);
    };

    for (const step of stepsOf(join(repository, 'docs/newcomer.md'))) {
      const from = performance.now();
      await take(step);
      t.diagnostic(
        `${((performance.now() - from) / 1000).toFixed(1).padStart(6)} s  ${step.where === 'guest' ? '#' : '$'} ${step.command}`,
      );
    }
    t.diagnostic(`${((performance.now() - began) / 1000).toFixed(0)} s in all`);
    assert.equal(machine.run('sh', '-c', 'ps -e -o args | grep -c "[v]irtiofsd-ts"').stdout, '0\n', 'no process is left');
    assert.ok(statSync(join(root, 'srv/share/newer')).isFile());
  } finally {
    for (const { process: child } of shells) child.kill('SIGKILL');
  }
});
