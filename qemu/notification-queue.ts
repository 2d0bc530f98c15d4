/**
 * `make test-notification-queue`: events over the notification queue of the virtio specification in QEMU. Stock QEMU has no
 * such queue, so this builds one that has (build-qemu.sh) and fetches another (newest-qemu.sh); a stock QEMU, whose guest
 * lends buffers instead, is the control. Prints what was seen; status 1 if anything is not as it must be.
 *
 *   node build/js/qemu/notification-queue.js [patched|generic|lent|unused|unoffered...]
 */
import { execFileSync, spawn } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, renameSync, rmdirSync, rmSync, unlinkSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { check, conclude, script } from './checks.js';
import { bootGuest, type Command, type Guest, type Share, startDaemon } from './guest.js';

const TAG = 'myfs';
/** What a guest's kernel log must not have. */
const COMPLAINTS = /\bBUG\b|WARNING|Oops|Call Trace|malformed|hung task/;
const LATENCY_SAMPLES = 100;

interface Machine {
  what: string;
  qemu: () => string;
  share?: Omit<Share, 'socket'>;
  /** Options of the daemon. */
  options?: string[];
  /** Stock modules in the guest instead of ours. */
  stockGuest?: boolean;
  /** How notifications go to the guest. */
  carrier: 'queue' | 'lent buffers' | 'none';
  /** What QEMU must say when it starts. */
  warning?: string;
}

const machines: Record<string, Machine> = {
  patched: {
    what: 'patched QEMU 10.0, notification=on, two request queues',
    qemu: () => script('build-qemu.sh'),
    share: { properties: 'notification=on', queues: 2 },
    carrier: 'queue',
  },
  generic: {
    what: "Debian's newest QEMU, vhost-user-test-device-pci",
    qemu: () => script('newest-qemu.sh'),
    share: { generic: true },
    carrier: 'queue',
  },
  lent: { what: 'stock QEMU (control)', qemu: () => 'qemu-system-x86_64', carrier: 'lent buffers' },
  unused: {
    what: 'patched QEMU 10.0, notification=on, a guest that does not know the queue',
    qemu: () => script('build-qemu.sh'),
    share: { properties: 'notification=on' },
    stockGuest: true,
    carrier: 'none',
  },
  unoffered: {
    what: 'patched QEMU 10.0, notification=on, a daemon without events',
    qemu: () => script('build-qemu.sh'),
    share: { properties: 'notification=on' },
    options: ['--fsnotify=off'],
    carrier: 'none',
    warning: 'does not offer the notification queue',
  },
};

async function run({ what, qemu, share, options = [], stockGuest = false, carrier, warning }: Machine): Promise<void> {
  const program = qemu();
  const version = execFileSync(program, ['--version'], { encoding: 'utf8' }).split('\n')[0] as string;
  console.log(`${what}\n  ${version}`);

  const directory = mkdtempSync(path.join(tmpdir(), 'virtiofsd-ts-share-'));
  const requests = new Map<string, number>();
  const daemon = await startDaemon({
    shareDir: directory,
    options: ['--log-level=trace', ...options],
    ...(share?.generic ? { tag: TAG } : {}),
    onLog: (line) => {
      const name = /\b([A-Z][A-Z_]+[A-Z]) unique \d/.exec(line)?.[1];
      if (name) requests.set(name, (requests.get(name) ?? 0) + 1);
    },
  });
  let guest: Guest | undefined;
  try {
    const machineLog: string[] = [];
    const began = performance.now();
    guest = await bootGuest({
      kind: 'qemu',
      qemu: program,
      kernel: stockGuest ? 'debian-plain' : 'debian',
      shares: [{ socket: daemon, tag: TAG, ...share }],
      onMachine: (line) => {
        if (!line.includes('deprecated')) machineLog.push(line);
      },
    });
    const boot = performance.now() - began;
    check('mounted', true, `${(boot / 1000).toFixed(1)} s after the start, kernel ${(await guest.run('uname -r')).stdout.trim()}`);
    if (warning)
      check(
        'warning',
        machineLog.some((line) => line.includes(warning)),
        machineLog.join('; ') || 'none',
      );
    else check('QEMU is silent', machineLog.length === 0, machineLog.join('; ') || 'yes');

    const features = (await guest.run('cat /sys/bus/virtio/drivers/virtiofs/virtio*/features')).stdout.trim();
    check('VIRTIO_FS_F_NOTIFICATION', (features[0] === '1') === (carrier === 'queue'), `bit 0 is ${features[0]}`);
    await guest.run('echo from the guest > /mnt/hello && cat /mnt/hello && ls -l /mnt');

    if (carrier === 'none') {
      const { stdout } = await guest.run('cd /mnt && dd if=/dev/urandom of=data bs=1M count=8 2>&1 && md5sum data && rm data && ls');
      check('a share as before', /hello/.test(stdout), 'a file written, read, removed');
    } else {
      await events(guest, directory, 'events');
      await guest.unmount('/mnt');
      await guest.mount(TAG, '/mnt');
      await events(guest, directory, 'events after unmount and mount');
      await stopped(guest, directory);
      await guest.reboot();
      await events(guest, directory, 'events after a reboot');
      await guest.reboot({ hard: true });
      await events(guest, directory, 'events after a reset');
      await latency(guest, directory);
    }
    const { stdout: interrupts } = await guest.run("grep -E 'virtio[0-9]+-(notification|requests)|IO-APIC.*virtio' /proc/interrupts");
    for (const line of interrupts.trim().split('\n')) console.log(`       ${line.trim().replaceAll(/\s+/g, ' ')}`);
    const lent = requests.get('READ_NOTIFY') ?? 0;
    check(
      'FUSE_READ_NOTIFY',
      lent > 0 === (carrier === 'lent buffers'),
      `${lent} of ${total(requests)} requests, FSNOTIFY ${requests.get('FSNOTIFY') ?? 0}`,
    );
    const complaint = (await guest.dmesg()).split('\n').find((line) => COMPLAINTS.test(line));
    check('kernel log', complaint === undefined, complaint ?? 'no complaints');
  } finally {
    await guest?.poweroff();
    const end = await daemon.stop();
    check('the daemon', end.status === 0, `ended with status ${end.status}`);
    rmSync(directory, { recursive: true, force: true });
  }
}

const total = (counts: Map<string, number>): number => [...counts.values()].reduce((sum, n) => sum + n, 0);

const INOTIFYWAIT = "inotifywait -m --format '%e %f' -e modify,attrib,close_write,move,create,delete";
const LONG = `\u00e4${'n'.repeat(253)}`;

/** Changes, and the line by which the guest has seen all of each: the host's kernel merges events that nobody has read yet. */
const changes: [change: (at: (name: string) => string) => void, line: string][] = [
  [(at) => writeFileSync(at('new'), 'x'), 'CLOSE_WRITE,CLOSE new'],
  [(at) => chmodSync(at('new'), 0o600), 'ATTRIB new'],
  [(at) => utimesSync(at('new'), 1, 1), 'ATTRIB new'],
  [(at) => renameSync(at('new'), at('moved')), 'MOVED_TO moved'],
  [(at) => mkdirSync(at('dir')), 'CREATE,ISDIR dir'],
  [(at) => renameSync(at('moved'), at('dir/inside')), 'MOVED_FROM moved'],
  [(at) => renameSync(at('dir/inside'), at('back')), 'MOVED_TO back'],
  [(at) => rmdirSync(at('dir')), 'DELETE,ISDIR dir'],
  [(at) => unlinkSync(at('back')), 'DELETE back'],
  [(at) => writeFileSync(at(LONG), ''), `CLOSE_WRITE,CLOSE ${LONG}`],
  [(at) => unlinkSync(at(LONG)), `DELETE ${LONG}`],
];

/** The same changes seen by inotifywait in the guest and on the host. */
async function events(guest: Guest, directory: string, what: string): Promise<void> {
  const host = spawn('sh', ['-c', `exec ${INOTIFYWAIT} "$0"`, directory], { stdio: ['ignore', 'pipe', 'pipe'] });
  const onHost: string[] = [];
  createInterface(host.stdout).on('line', (line) => onHost.push(line));
  await new Promise<void>((resolve) => createInterface(host.stderr).on('line', (line) => line.includes('established') && resolve()));
  const watcher = await watch(guest);
  const inGuest: string[] = [];
  watcher.on('line', ({ text }) => inGuest.push(text));
  try {
    for (const [change, line] of changes) {
      const before = inGuest.length;
      change((name) => path.join(directory, name));
      for (const deadline = Date.now() + 10_000; !inGuest.includes(line, before) && Date.now() < deadline; ) await sleep(2);
    }
    await sleep(100);
  } finally {
    host.kill();
    watcher.kill();
  }
  const short = (lines: string[]): string => lines.join(', ').replaceAll(LONG, '\u00e4nnn\u2026');
  const same = inGuest.join('\n') === onHost.join('\n');
  check(what, same, same ? `${inGuest.length}, as on the host` : `\n    guest: ${short(inGuest)}\n    host:  ${short(onHost)}`);
  if (what === 'events') console.log(`       ${short(inGuest)}`);
}

async function watch(guest: Guest): Promise<Command> {
  const watcher = guest.spawn(`${INOTIFYWAIT} /mnt`);
  await watcher.waitForLine('Watches established');
  return watcher;
}

/** QEMU's stop takes the queues from the daemon, cont gives them back. */
async function stopped(guest: Guest, directory: string): Promise<void> {
  const watcher = await watch(guest);
  await guest.qmp('stop');
  writeFileSync(path.join(directory, 'meanwhile'), '');
  await sleep(200);
  await guest.qmp('cont');
  await watcher.waitForLine('CREATE meanwhile');
  watcher.kill();
  unlinkSync(path.join(directory, 'meanwhile'));
  check('events after stop and cont', true, 'what happened in between arrived');
}

/** From a change on the host to the line that inotifywait in the guest wrote, and that came to us. */
async function latency(guest: Guest, directory: string): Promise<void> {
  const watcher = await watch(guest);
  const times: number[] = [];
  for (let i = 0; i < LATENCY_SAMPLES; i++) {
    const arrived = watcher.waitForLine(new RegExp(`^CREATE,ISDIR dir${i}$`));
    const began = performance.now();
    mkdirSync(path.join(directory, `dir${i}`));
    await arrived;
    times.push(performance.now() - began);
    rmdirSync(path.join(directory, `dir${i}`));
  }
  watcher.kill();
  times.sort((a, b) => a - b);
  const at = (quantile: number): string => `${(times[Math.floor(quantile * (times.length - 1))] as number).toFixed(1)} ms`;
  check('from change to line', true, `median ${at(0.5)}, 95 % within ${at(0.95)}`);
}

const names = process.argv.slice(2);
const unknown = names.filter((name) => !machines[name]);
if (unknown.length) {
  console.error(`no machine ${unknown.join(', ')}; there are ${Object.keys(machines).join(', ')}`);
  process.exit(2);
}
for (const [name, machine] of Object.entries(machines)) {
  if (names.length && !names.includes(name)) continue;
  try {
    await run(machine);
  } catch (error) {
    check(name, false, (error as Error).message);
  }
}
conclude();
