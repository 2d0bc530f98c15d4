/**
 * `make test-libvirt`: the domains of libvirt/*.xml, and plain.xml with each of libvirt/filesystem/*.xml, in Debian 12's libvirt,
 * which starts the daemon itself, from `virsh create` to `virsh destroy`; some of them up to an event in the guest, the others
 * with a guest that stands still, for what the daemon is given and leaves. libvirtd runs apart from the machine's own
 * (libvirt/libvirtd.sh). Prints what was seen; status 1 if anything is not as it must be.
 *
 *   node build/js/qemu/libvirt.js [NAME...]
 */
import { execFile } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createConnection, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { check, conclude, script } from './checks.js';
import { Agent, type Command } from './guest/agent.js';
import { type Daemon, repository } from './guest/daemon.js';
import { startChild } from './guest/process.js';
import { type Kernel, prepareBoot, startDaemon } from './guest.js';

const run = promisify(execFile);
const NONCE = '0123456789abcdef';
const DEBIAN_QEMU = '/usr/bin/qemu-system-x86_64';

interface Domain {
  /** What stands in plain.xml instead of its filesystem. */
  filesystem?: string;
  qemu?: () => string;
  /** VIRTIO_FS_F_NOTIFICATION in the guest. */
  queue?: boolean;
  /** Started by us, not by libvirt. */
  ownDaemon?: boolean;
  /** The guest stands still: what each daemon is told after `--fd=N`. {} is the domain's share, as libvirt writes it. */
  still?: readonly string[][];
  /** Tried only when it is named: it builds or fetches a QEMU first. */
  slow?: boolean;
}

const domains: Record<string, Domain> = {
  plain: {},
  several: { filesystem: 'several' },
  'notification-queue': { qemu: () => script('build-qemu.sh'), queue: true, slow: true },
  'generic-device': { qemu: () => script('newest-qemu.sh'), queue: true, ownDaemon: true, slow: true },
};

/** What libvirt 9.0 makes of libvirt/filesystem/*.xml; what later ones make of them is in test/host/libvirt.test.ts. */
const TOLD: Record<string, readonly string[][]> = {
  cache: [['-o', 'source={},cache=always']],
  xattr: [['-o', 'source={},xattr']],
  sandbox: [['-o', 'source={},sandbox=chroot']],
  lock: [['-o', 'source={},flock,posix_lock']],
  'no-lock': [['-o', 'source={},no_flock,no_posix_lock']],
  'thread-pool': [['-o', 'source={}', '--thread-pool-size=4']],
  'no-binary': [['-o', 'source={}']],
  'external-socket': [],
};
for (const [name, still] of Object.entries(TOLD)) domains[name] = { filesystem: name, still, ownDaemon: still.length === 0 };

const daemonProgram = path.join(repository, 'build/virtiofsd-ts');
let folder = '';

async function virsh(...args: string[]): Promise<string> {
  const { stdout } = await run('virsh', ['-q', '-c', `qemu+unix:///system?socket=${folder}/run/libvirt/libvirt-sock`, ...args]);
  return stdout.trim();
}

/** The domain as it is in the folder, with our paths, and with a kernel, a console and a channel for the guest's agent. */
function domainXml(name: string, share: string, socket: string, boot: { kernel: Kernel; initrd: string }): string {
  const { filesystem, qemu = () => DEBIAN_QEMU } = domains[name] as Domain;
  const words = `console=ttyS0 quiet panic=-1 rdinit=/init nonce=${NONCE} channel=/dev/vport*p*`;
  const read = (file: string): string => readFileSync(path.join(repository, 'qemu/libvirt', `${file}.xml`), 'utf8');
  let text = read(filesystem === undefined ? name : 'plain');
  if (filesystem !== undefined)
    text = text.replace(/<filesystem type.*<\/filesystem>/s, read(`filesystem/${filesystem}`)).replace('<name>plain<', `<name>${name}<`);
  return text
    .replace("type='kvm'", "type='qemu'")
    .replace(/ *<emulator>.*\n/, '')
    .replaceAll('/usr/bin/virtiofsd-ts', daemonProgram)
    .replaceAll('/srv/share', share)
    .replaceAll('/run/virtiofsd-ts.sock', socket)
    .replace('</os>', `<kernel>${boot.kernel.image}</kernel><initrd>${boot.initrd}</initrd><cmdline>${words}</cmdline></os>`)
    .replace('<devices>', `<cpu mode='maximum'/><devices><emulator>${qemu()}</emulator>`)
    .replace(
      '</devices>',
      `<serial type='file'><source path='${folder}/${name}.console'/></serial>
       <channel type='unix'><source mode='bind' path='${folder}/${name}.agent'/><target type='virtio' name='agent'/></channel>
       <controller type='usb' model='none'/><memballoon model='none'/></devices>`,
    );
}

async function tryDomain(name: string, domain: Domain): Promise<void> {
  const share = path.join(folder, `share of ${name}, shared`);
  mkdirSync(path.join(share, 'second'), { recursive: true });
  const socket = path.join(folder, `${name}.sock`);
  const xml = path.join(folder, `${name}.xml`);
  writeFileSync(xml, domainXml(name, share, socket, prepareBoot({ kind: 'qemu' }, folder)));
  console.log(name);
  let daemon: Daemon | undefined;
  try {
    if (domain.ownDaemon) daemon = await startDaemon({ shareDir: share, socketPath: socket, ...(domain.slow ? { tag: 'myfs' } : {}) });
    if (domain.still !== undefined) await standStill(name, xml, share, domain.still, daemon);
    else await inGuest(name, xml, share, domain);
  } finally {
    await virsh('destroy', name).catch(() => {});
    await daemon?.stop();
    const left = () => [...processes(share).map(({ line }) => line), ...stateFiles(name)];
    for (let tries = 0; left().length > 0 && tries < 200; tries++) await sleep(50);
    check('virsh destroy', left().length === 0, left().join('; ') || 'no domain, no process, no socket, no pid file left');
  }
}

/** What the daemons are told, their pid files' locks and their logs, in a domain that does not run. */
async function standStill(
  name: string,
  xml: string,
  share: string,
  told: readonly string[][],
  external: Daemon | undefined,
): Promise<void> {
  await virsh('create', '--paused', xml);
  if (external !== undefined) {
    for (let tries = 0; !external.log.some((line) => line.includes('connected')) && tries < 200; tries++) await sleep(50);
    check(
      'external socket',
      external.log.some((line) => line.includes('a client connected')),
      external.log.at(-1) ?? 'nothing logged',
    );
    return;
  }
  for (const [i, expected] of told.entries()) {
    const log = `${folder}/var/log/libvirt/qemu/${name}-fs${i}-virtiofsd.log`;
    const logged = () => (existsSync(log) ? readFileSync(log, 'utf8') : '');
    for (let tries = 0; !logged().includes('a client connected') && tries < 200; tries++) await sleep(50);
    check("libvirt's log", logged().includes('a client connected'), logged().trim().split('\n').at(-1) ?? log);

    const pidFile = stateFiles(name).find((file) => file.endsWith(`-fs${i}-fs.pid`)) ?? '';
    const lock =
      pidFile && readFileSync('/proc/locks', 'utf8').match(new RegExp(`POSIX +ADVISORY +WRITE (\\d+) \\S+:${statSync(pidFile).ino} `));
    const words = lock ? readFileSync(`/proc/${lock[1]}/cmdline`, 'utf8').split('\0').slice(0, -1) : [];
    check('pid file', words.length > 0, lock ? `locked by ${lock[1]}` : `${pidFile} not locked`);
    const at = words.findIndex((word) => word.startsWith('--fd='));
    const wanted = expected.map((word) => word.replace('{}', share.replaceAll(',', ',,')));
    check('the daemon', JSON.stringify(words.slice(at + 1)) === JSON.stringify(wanted), words.slice(at).join(' '));
  }
}

/** A guest that mounts the share and hears of changes. */
async function inGuest(name: string, xml: string, share: string, { ownDaemon = false, queue = false, filesystem }: Domain): Promise<void> {
  let channel: Socket | undefined;
  try {
    const began = performance.now();
    await virsh('create', xml);
    channel = createConnection(path.join(folder, `${name}.agent`));
    const agent = new Agent(channel, NONCE, { PATH: '/bin:/usr/bin' });
    await Promise.race([
      agent.connected(),
      sleep(240_000, undefined, { ref: false }).then(() => Promise.reject(new Error('the guest does not call'))),
    ]);
    check('virsh create', true, `the guest was up ${((performance.now() - began) / 1000).toFixed(1)} s later`);
    if (!ownDaemon) check('the daemon', processes(share).length > 0, processes(share)[0]?.line ?? 'none');

    const output = async (command: string): Promise<string> => {
      const running: Command = agent.spawn(command);
      const lines: string[] = [];
      running.on('line', ({ text }) => lines.push(text));
      await running.ended;
      return lines.join('\n');
    };
    const mounted = await output('mount -t virtiofs myfs /mnt && echo from the guest > /mnt/hello && cat /mnt/hello');
    check('mounted', mounted === 'from the guest', mounted);
    if (filesystem === 'several') {
      const second = await output('mkdir /tmp/2; mount -t virtiofs second /tmp/2 && echo 2 > /tmp/2/two && cat /mnt/second/two');
      check('the second one', second === '2', second);
    }
    const features = await output('cat /sys/bus/virtio/drivers/virtiofs/virtio*/features');
    check('VIRTIO_FS_F_NOTIFICATION', (features[0] === '1') === queue, `bit 0 is ${features[0]}`);

    const watcher = agent.spawn('inotifywait -m /mnt');
    await watcher.waitForLine('Watches established');
    writeFileSync(path.join(share, 'new'), 'x');
    check('event', true, (await watcher.waitForLine('CREATE new')).text);
    await virsh('suspend', name);
    writeFileSync(path.join(share, 'meanwhile'), 'x');
    await virsh('resume', name);
    check('event after suspend and resume', true, (await watcher.waitForLine('CREATE meanwhile')).text);
    // docs/sharing.md says so; newer ones can (test/long/migration-libvirt.test.ts).
    const refusal = await virsh('save', name, path.join(folder, 'saved')).then(
      () => 'saved',
      (error: Error) => error.message,
    );
    check(
      'virsh save',
      /operation is not valid: cannot migrate domain: non-migratable device: \S+\/vhost-user-fs/.test(refusal),
      refusal.split('\n').at(-2) ?? '',
    );
  } finally {
    channel?.destroy();
  }
}

/** Files of a domain below libvirt's folders: sockets and pid files. */
function stateFiles(name: string): string[] {
  const found: string[] = [];
  for (const top of ['run/libvirt/qemu', 'var/lib/libvirt/qemu']) {
    for (const file of readdirSync(path.join(folder, top), { recursive: true, encoding: 'utf8' })) {
      if (file.includes(`-${name}-fs`) || new RegExp(`domain-\\d+-${name}/`).test(file)) found.push(path.join(folder, top, file));
    }
  }
  return found;
}

/** Processes whose command line has `text`. */
function processes(text: string): { pid: number; line: string }[] {
  const found: { pid: number; line: string }[] = [];
  for (const pid of readdirSync('/proc').filter((entry) => /^\d+$/.test(entry))) {
    try {
      const line = readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ').trim();
      if (line.replaceAll(',,', ',').includes(text)) found.push({ pid: Number(pid), line });
    } catch {
      // it has ended
    }
  }
  return found;
}

const names = process.argv.slice(2);
const unknown = names.filter((name) => !domains[name]);
if (unknown.length) {
  console.error(`no domain ${unknown.join(', ')}; there are ${Object.keys(domains).join(', ')}`);
  process.exit(2);
}

script('setup.sh', 'packages', 'to try the domains', 'libvirt-daemon', 'libvirt-daemon-driver-qemu', 'libvirt-clients');
folder = mkdtempSync(path.join(tmpdir(), 'virtiofsd-ts-'));
// The only programs for shares that libvirt finds there.
mkdirSync(`${folder}/vhost-user`);
const json = readFileSync(path.join(repository, 'qemu/libvirt/50-virtiofsd-ts.json'), 'utf8');
writeFileSync(`${folder}/vhost-user/50-virtiofsd-ts.json`, json.replace('/usr/local/bin/virtiofsd-ts', daemonProgram));
const libvirtd = startChild(path.join(repository, 'qemu/libvirt/libvirtd.sh'), [folder], { stdio: ['ignore', 'pipe', 'pipe'], folder });
try {
  for (let tries = 0; !existsSync(`${folder}/run/libvirt/libvirt-sock`) && tries < 200; tries++) await sleep(50);
  console.log(`libvirt ${await virsh('version', '--daemon').then((text) => /daemon: (\S+)/.exec(text)?.[1] ?? text)}`);
  for (const [name, domain] of Object.entries(domains)) {
    if (names.length ? !names.includes(name) : domain.slow) continue;
    try {
      await tryDomain(name, domain);
    } catch (error) {
      check(name, false, `${(error as Error).message}\n${libvirtd.log.slice(-5).join('\n')}`);
    }
  }
} catch (error) {
  check('libvirtd', false, `${(error as Error).message}\n${libvirtd.log.slice(-5).join('\n')}`);
} finally {
  await libvirtd.stop();
  rmSync(folder, { recursive: true, force: true });
}
conclude();
