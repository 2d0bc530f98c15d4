/**
 * `virtiofsd-ts doctor`: what this host can do for a guest and what it cannot, by trying it where that is possible. Whatever is
 * found is said with what to do about it.
 */
import { spawn, spawnSync } from 'node:child_process';
import {
  accessSync,
  closeSync,
  existsSync,
  constants as fsConstants,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
} from 'node:fs';
import { release, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { arena, arenaAlloc, cString, native } from 'vhost-user-ts/native';
import { escapeText } from '../log.js';
import { type CommandSpec, UsageError } from '../options.js';
import { fanotifyAbility } from '../watch/fanotify.js';
import { commandArguments } from './command.js';

/** ok: works; limited: the daemon serves guests, but something is missing or slower; failed: it cannot serve. */
type Verdict = 'ok' | 'limited' | 'failed';

interface Finding {
  readonly subject: string;
  readonly verdict: Verdict;
  readonly found: string;
  /** What to do. */
  readonly advice?: string;
}

const MAIN = fileURLToPath(new URL('../main.js', import.meta.url));
const TRIAL_TIMEOUT_MS = 20_000;
const AT_EMPTY_PATH = 0x1000;

/** @returns the exit status: 1 when something failed */
export async function doctor(command: CommandSpec, argv: readonly string[]): Promise<number> {
  const given = commandArguments(command, argv);
  if (given === undefined) return 0;
  const dir = given.options['shared-dir'] as string | undefined;
  if (dir !== undefined && !statSync(dir, { throwIfNoEntry: false })?.isDirectory())
    throw new UsageError(`doctor: --shared-dir: ${dir} is no directory: name one`);
  // Nearly everything is asked of it, by the daemon, too.
  if (!existsSync('/proc/self/fd')) {
    const advice = 'mount -t proc proc /proc';
    print([{ subject: 'proc', verdict: 'failed', found: '/proc is not mounted', advice }], given.options['json'] === true);
    return 1;
  }
  const folder = mkdtempSync(join(tmpdir(), 'virtiofsd-ts-doctor-'));
  let findings: Finding[];
  try {
    const share = dir ?? folder;
    findings = [
      kernel(),
      ...(await trial(share, join(folder, 'sock'))),
      userNamespaces(),
      seccomp(),
      ...(dir === undefined ? [] : [fileSystem(dir)]),
      fanotify(share),
      inotify(),
      handles(share),
      openFiles(),
      qemu(),
      kvm(),
      ...libvirt(),
    ];
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  print(findings, given.options['json'] === true);
  return findings.some(({ verdict }) => verdict === 'failed') ? 1 : 0;
}

function print(findings: readonly Finding[], json: boolean): void {
  process.stdout.write(json ? `${JSON.stringify(findings, null, 2)}\n` : findings.map(line).join(''));
}

/** `ok       kernel         6.1.0` and what to do in a line of its own. */
function line({ subject, verdict, found, advice }: Finding): string {
  const text = `${verdict.padEnd(8)} ${subject.padEnd(16)} ${escapeText(found)}\n`;
  return advice === undefined ? text : `${text}${' '.repeat(26)}→ ${escapeText(advice)}\n`;
}

/** The contents of a file without the newline at its end; undefined when it cannot be read. */
function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trimEnd();
  } catch {
    return undefined;
  }
}

/** What a program prints; undefined when there is none or it fails. */
function output(program: string, ...args: readonly string[]): string | undefined {
  const { status, stdout } = spawnSync(program, args, { encoding: 'utf8', timeout: 10_000 });
  return status === 0 ? stdout : undefined;
}

/** Whether version `text` is at least `major.minor`. */
function atLeast(text: string, major: number, minor: number): boolean {
  const [a = 0, b = 0] = text.split('.').map((part) => Number.parseInt(part, 10));
  return a > major || (a === major && b >= minor);
}

function kernel(): Finding {
  const subject = 'kernel';
  const found = `Linux ${release()}`;
  // statx with mount ids (5.8) and fanotify with names (5.9) are relied on.
  if (!atLeast(release(), 5, 9)) return { subject, verdict: 'failed', found, advice: 'Linux 5.10 or newer is needed' };
  if (!atLeast(release(), 5, 17))
    return { subject, verdict: 'limited', found, advice: 'before Linux 5.17 renames reach the guest as two events that nothing joins' };
  return { subject, verdict: 'ok', found };
}

/** Starts the daemon with its defaults; what it complains of is the finding. */
async function trial(share: string, socket: string): Promise<Finding[]> {
  const subject = 'daemon';
  const args = [...process.execArgv, MAIN, '--shared-dir', share, '--socket-path', socket, '--log-format=json'];
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'ignore', 'pipe'] });
  let text = '';
  let ready = false;
  child.stderr.setEncoding('utf8').on('data', (part) => {
    text += part;
    if (!ready && text.includes('"msg":"sharing ')) {
      ready = true;
      child.kill('SIGTERM');
    }
  });
  const late = setTimeout(() => child.kill('SIGKILL'), TRIAL_TIMEOUT_MS);
  await new Promise((done) => child.once('close', done));
  clearTimeout(late);
  const complaints = text
    .split('\n')
    .filter((each) => each !== '' && !each.includes('"level":"info"'))
    .map(message);
  if (!ready) {
    const found = `does not start: ${complaints.at(-1) ?? 'it says nothing'}`;
    return [{ subject, verdict: 'failed', found, advice: 'see the options that it names in virtiofsd-ts --help' }];
  }
  const works: Finding = { subject, verdict: 'ok', found: 'starts in its sandbox (--sandbox=namespace, --seccomp=kill)' };
  return [works, ...complaints.map((found): Finding => ({ subject, verdict: 'limited', found }))];
}

/** The message of a log line, whichever form it has. */
function message(text: string): string {
  try {
    return (JSON.parse(text) as { msg: string }).msg;
  } catch {
    return text;
  }
}

function userNamespaces(): Finding {
  const subject = 'user namespaces';
  const forbidden = [
    ['user.max_user_namespaces', '0'],
    ['kernel.unprivileged_userns_clone', '0'],
    ['kernel.apparmor_restrict_unprivileged_userns', '1'],
  ].filter(([name, value]) => read(`/proc/sys/${(name as string).replace('.', '/')}`) === value);
  if (forbidden.length > 0) {
    const found = `not for ordinary users (${forbidden.map(([name, value]) => `${name} is ${value}`).join(', ')})`;
    return { subject, verdict: 'limited', found, advice: 'start the daemon as root, or allow them with sysctl' };
  }
  if (output('newuidmap') === undefined && !onPath('newuidmap'))
    return {
      subject,
      verdict: 'limited',
      found: 'an ordinary user can map the own id only',
      advice: 'for subordinate ids (/etc/subuid) install newuidmap (Debian: package uidmap)',
    };
  return { subject, verdict: 'ok', found: 'ordinary users can start the daemon' };
}

function onPath(program: string): boolean {
  return (process.env['PATH'] ?? '').split(':').some((folder) => {
    try {
      accessSync(join(folder, program), fsConstants.X_OK);
      return folder !== '';
    } catch {
      return false;
    }
  });
}

function seccomp(): Finding {
  const subject = 'seccomp';
  const actions = read('/proc/sys/kernel/seccomp/actions_avail') ?? '';
  if (actions.includes('kill_process')) return { subject, verdict: 'ok', found: 'filters of system calls are available' };
  return { subject, verdict: 'limited', found: 'this kernel has no filters of system calls', advice: 'give --seccomp=none' };
}

const FILE_SYSTEMS: Readonly<Record<string, readonly [found: string, advice: string]>> = {
  overlay: [
    'has no file handles that can be opened',
    'each file that the guest knows costs an open descriptor: share a directory below it, or raise --rlimit-nofile',
  ],
  nfs: ['is changed by others that this kernel does not hear of', 'file events come only for changes on this host'],
  nfs4: ['is changed by others that this kernel does not hear of', 'file events come only for changes on this host'],
  cifs: ['is changed by others that this kernel does not hear of', 'file events come only for changes on this host'],
  '9p': ['is changed by others that this kernel does not hear of', 'file events come only for changes on this host'],
  fuse: ['is a FUSE file system itself', 'what changes below it may not be heard of'],
  virtiofs: ['is a virtio-fs share itself', 'file events need the kernel patch here, too'],
};

/** The type of the file system that a directory is on, as /proc/self/mountinfo has it. */
function fileSystem(dir: string): Finding {
  const subject = 'share';
  const { dev } = statSync(dir, { bigint: true });
  const major = ((dev >> 8n) & 0xfffn) | ((dev >> 32n) & ~0xfffn);
  const minor = (dev & 0xffn) | ((dev >> 12n) & ~0xffn);
  const mount = (read('/proc/self/mountinfo') ?? '').split('\n').find((text) => text.split(' ')[2] === `${major}:${minor}`);
  const type = mount?.split(' - ')[1]?.split(' ')[0];
  // Subvolumes of btrfs have device numbers of their own.
  if (type === undefined) return { subject, verdict: 'ok', found: `${dir} is on a file system with several device numbers (btrfs)` };
  const known = FILE_SYSTEMS[type] ?? FILE_SYSTEMS[type.replace(/\..*/, '')];
  if (known !== undefined) return { subject, verdict: 'limited', found: `${dir} is on ${type}, which ${known[0]}`, advice: known[1] };
  return { subject, verdict: 'ok', found: `${dir} is on ${type}` };
}

/** Runs `use` with descriptors of a directory and of /proc/self/fd. */
function withDirectory<T>(dir: string, use: (fd: number, procfd: number) => T): T {
  const fd = openSync(dir, fsConstants.O_RDONLY | fsConstants.O_DIRECTORY);
  const procfd = openSync('/proc/self/fd', fsConstants.O_RDONLY | fsConstants.O_DIRECTORY);
  try {
    return use(fd, procfd);
  } finally {
    closeSync(fd);
    closeSync(procfd);
  }
}

function fanotify(share: string): Finding {
  const subject = 'fanotify';
  const ability = withDirectory(share, fanotifyAbility);
  if (typeof ability === 'number')
    return {
      subject,
      verdict: 'limited',
      found: `not to be had here (errno ${-ability})`,
      advice: 'files are watched by inotify: the guest gets no events of accesses, and its own changes in the background come back to it',
    };
  if (!ability.rename)
    return {
      subject,
      verdict: 'limited',
      found: 'without renames',
      advice: 'renames reach the guest as two events; Linux 5.17 or newer has them as one',
    };
  return { subject, verdict: 'ok', found: 'reports changes with names, and renames as one' };
}

/** As many as --fsnotify-limit permits by default. */
const WATCHES = 131_072;

function inotify(): Finding {
  const subject = 'inotify';
  const watches = Number(read('/proc/sys/fs/inotify/max_user_watches') ?? 0);
  const instances = Number(read('/proc/sys/fs/inotify/max_user_instances') ?? 0);
  const found = `${watches} watches in ${instances} instances a user`;
  if (watches >= WATCHES && instances >= 128) return { subject, verdict: 'ok', found };
  const advice = `only where fanotify is not to be had: sysctl fs.inotify.max_user_watches=${WATCHES} fs.inotify.max_user_instances=128`;
  return { subject, verdict: 'limited', found, advice };
}

function handles(share: string): Finding {
  const subject = 'file handles';
  const none = 'each file that the guest knows costs an open descriptor (as with --inode-file-handles=never)';
  return withDirectory(share, (fd) => {
    const handle = arenaAlloc(256);
    arena.i32[handle >> 2] = 128;
    const error = native.nameToHandle(fd, cString(''), AT_EMPTY_PATH, handle);
    if (error < 0) return { subject, verdict: 'limited', found: `this file system has none (errno ${-error})`, advice: none };
    const opened = native.openByHandle(fd, handle, fsConstants.O_RDONLY);
    if (opened < 0)
      return {
        subject,
        verdict: 'limited',
        found: `cannot be opened (errno ${-opened})`,
        advice: process.geteuid?.() === 0 ? none : `that takes root (CAP_DAC_READ_SEARCH): ${none}`,
      };
    native.close(opened);
    return { subject, verdict: 'ok', found: 'can be opened: known files need no descriptors' };
  });
}

const OPEN_FILES = 1_000_000;
const ENOUGH_FILES = 65_536;

function openFiles(): Finding {
  const subject = 'open files';
  const text = /^Max open files\s+\S+\s+(\S+)/m.exec(read('/proc/self/limits') ?? '')?.[1] ?? '0';
  const limit = text === 'unlimited' ? Number.POSITIVE_INFINITY : Number(text);
  const kernels = Number(read('/proc/sys/fs/nr_open') ?? 0);
  const reached = process.geteuid?.() === 0 ? Math.min(OPEN_FILES, kernels) : Math.min(limit, kernels);
  const found = `at most ${reached}`;
  if (reached >= ENOUGH_FILES) return { subject, verdict: 'ok', found };
  return { subject, verdict: 'limited', found, advice: 'raise the hard limit (limits.conf, LimitNOFILE=) before a guest opens more files' };
}

function qemu(): Finding {
  const subject = 'QEMU';
  const program = 'qemu-system-x86_64';
  const version = /version (\d+\.\d+\.\d+)/.exec(output(program, '--version') ?? '')?.[1];
  if (version === undefined)
    return {
      subject,
      verdict: 'limited',
      found: `${program} is not here`,
      advice: 'install it (Debian: package qemu-system-x86), unless another VMM is used',
    };
  if (!(output(program, '-device', 'help') ?? '').includes('vhost-user-fs-pci'))
    return {
      subject,
      verdict: 'limited',
      found: `${version} without the device vhost-user-fs-pci`,
      advice: 'use a build with vhost-user support',
    };
  if (atLeast(version, 7, 1) && !atLeast(version, 8, 1))
    return { subject, verdict: 'ok', found: `${version}; a daemon with --tag crashes this version, which has no use for it` };
  return { subject, verdict: 'ok', found: version };
}

function kvm(): Finding {
  const subject = 'KVM';
  try {
    accessSync('/dev/kvm', fsConstants.R_OK | fsConstants.W_OK);
    return { subject, verdict: 'ok', found: '/dev/kvm can be opened' };
  } catch (error) {
    const missing = (error as NodeJS.ErrnoException).code === 'ENOENT';
    return {
      subject,
      verdict: 'limited',
      found: missing ? 'there is no /dev/kvm: guests are slow' : '/dev/kvm may not be opened: guests are slow',
      advice: missing ? 'turn virtualization on in the firmware, or nested virtualization in the host above' : 'join the group kvm',
    };
  }
}

interface Found {
  /** The file that says so. */
  readonly file: string;
  readonly binary: string;
}

/** The program that libvirt starts for a <filesystem> without <binary>: of the first file by name that describes one for file systems. */
function chosenByLibvirt(): Found | undefined {
  const files = new Map<string, string>();
  // A file of the same name in a later folder takes the place of one in an earlier.
  for (const folder of ['/usr/share/qemu/vhost-user', '/etc/qemu/vhost-user']) {
    try {
      for (const name of readdirSync(folder)) if (name.endsWith('.json')) files.set(name, join(folder, name));
    } catch {
      // There is none.
    }
  }
  for (const [, file] of [...files].sort(([a], [b]) => (a < b ? -1 : 1))) {
    try {
      const { type, binary } = JSON.parse(read(file) ?? '') as { type?: string; binary?: string };
      if (type === 'fs' && binary !== undefined) return { file, binary };
    } catch {
      // libvirt leaves out what it cannot read, too.
    }
  }
  return undefined;
}

function libvirt(): Finding[] {
  const subject = 'libvirt';
  const version = /(\d+\.\d+\.\d+)/.exec(output('libvirtd', '--version') ?? output('virtqemud', '--version') ?? '')?.[1];
  if (version === undefined) return [{ subject, verdict: 'ok', found: 'is not here; nothing else needs it' }];
  const findings: Finding[] = [];
  const chosen = chosenByLibvirt();
  if (chosen === undefined || !chosen.binary.endsWith('/virtiofsd-ts')) {
    const found = chosen === undefined ? 'finds no program for file systems' : `starts ${chosen.binary} for file systems (${chosen.file})`;
    const advice =
      'name ours in the <binary> of each <filesystem>, or install /usr/share/qemu/vhost-user/50-virtiofsd-ts.json (make install PREFIX=/usr)';
    findings.push({ subject, verdict: 'limited', found: `${version} ${found}`, advice });
  } else {
    findings.push({ subject, verdict: 'ok', found: `${version} starts ${chosen.binary} for file systems` });
  }
  findings.push(appArmor(chosen?.binary ?? '/usr/local/bin/virtiofsd-ts'));
  return findings;
}

/** What libvirt's own profile lets it start. */
const PERMITTED = /^(\/usr)?\/s?bin\/|^\/usr\/libexec\/virtiofsd$/;

function appArmor(binary: string): Finding {
  const subject = 'AppArmor';
  if (read('/sys/module/apparmor/parameters/enabled') !== 'Y') return { subject, verdict: 'ok', found: 'is not in use' };
  const profiles = read('/sys/kernel/security/apparmor/profiles');
  if (profiles === undefined)
    return { subject, verdict: 'limited', found: 'is in use; its profiles may be read by root only', advice: 'run this as root' };
  const confined = /^(libvirtd|virtqemud|\/usr\/sbin\/libvirtd|\/usr\/sbin\/virtqemud) \(enforce\)$/m.exec(profiles)?.[1];
  if (confined === undefined) return { subject, verdict: 'ok', found: 'does not confine libvirt' };
  if (PERMITTED.test(binary)) return { subject, verdict: 'ok', found: `lets ${confined} start ${binary}` };
  return {
    subject,
    verdict: 'limited',
    found: `does not let ${confined} start ${binary}`,
    advice: `install to /usr (make install PREFIX=/usr), or add '${binary} PUx,' to /etc/apparmor.d/local/usr.sbin.libvirtd and load the profile anew`,
  };
}
