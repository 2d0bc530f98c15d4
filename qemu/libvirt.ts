/**
 * `make test-libvirt`: the domains of libvirt/*.xml in Debian 12's libvirt, which starts the daemon itself, from `virsh create`
 * to an event in the guest and `virsh destroy`. libvirtd runs apart from the machine's own (libvirt/libvirtd.sh).
 * Prints what was seen; status 1 if anything is not as it must be.
 *
 *   node build/js/qemu/libvirt.js [events|notification-queue|generic-device...]
 */
import { execFile } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
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

interface Domain {
  qemu: () => string;
  /** VIRTIO_FS_F_NOTIFICATION in the guest. */
  queue: boolean;
  /** Started by us, not by libvirt. */
  ownDaemon?: boolean;
}

const domains: Record<string, Domain> = {
  events: { qemu: () => '/usr/bin/qemu-system-x86_64', queue: false },
  'notification-queue': { qemu: () => script('build-qemu.sh'), queue: true },
  'generic-device': { qemu: () => script('newest-qemu.sh'), queue: true, ownDaemon: true },
};

const daemonProgram = path.join(repository, 'build/virtiofsd-ts');
let folder = '';

async function virsh(...args: string[]): Promise<string> {
  const { stdout } = await run('virsh', ['-q', '-c', `qemu+unix:///system?socket=${folder}/run/libvirt/libvirt-sock`, ...args]);
  return stdout.trim();
}

/** The domain as it is in the folder, with our paths, and with a kernel, a console and a channel for the guest's agent. */
function domainXml(name: string, emulator: string, share: string, socket: string, boot: { kernel: Kernel; initrd: string }): string {
  const words = `console=ttyS0 quiet panic=-1 rdinit=/init nonce=${NONCE} channel=/dev/vport*p*`;
  const text = readFileSync(path.join(repository, 'qemu/libvirt', `${name}.xml`), 'utf8');
  return text
    .replace("type='kvm'", "type='qemu'")
    .replace(/ *<emulator>.*\n/, '')
    .replaceAll('/usr/local/bin/virtiofsd-ts', daemonProgram)
    .replaceAll('/srv/share', share)
    .replaceAll('/run/virtiofsd-ts.sock', socket)
    .replace('</os>', `<kernel>${boot.kernel.image}</kernel><initrd>${boot.initrd}</initrd><cmdline>${words}</cmdline></os>`)
    .replace('<devices>', `<cpu mode='maximum'/><devices><emulator>${emulator}</emulator>`)
    .replace(
      '</devices>',
      `<serial type='file'><source path='${folder}/${name}.console'/></serial>
       <channel type='unix'><source mode='bind' path='${folder}/${name}.agent'/><target type='virtio' name='agent'/></channel>
       <controller type='usb' model='none'/><memballoon model='none'/></devices>`,
    );
}

async function tryDomain(name: string, { qemu, queue, ownDaemon = false }: Domain): Promise<void> {
  const share = path.join(folder, `share of ${name}, shared`);
  mkdirSync(share);
  const socket = path.join(folder, `${name}.sock`);
  const emulator = qemu();
  const xml = path.join(folder, `${name}.xml`);
  writeFileSync(xml, domainXml(name, emulator, share, socket, prepareBoot({ kind: 'qemu' }, folder)));
  console.log(`${name}\n  ${(await run(emulator, ['--version'])).stdout.split('\n')[0]}`);

  let daemon: Daemon | undefined;
  let channel: Socket | undefined;
  try {
    if (ownDaemon) daemon = await startDaemon({ shareDir: share, socketPath: socket, tag: 'myfs' });
    const began = performance.now();
    await virsh('create', xml);
    channel = createConnection(path.join(folder, `${name}.agent`));
    const agent = new Agent(channel, NONCE, { PATH: '/bin:/usr/bin' });
    await Promise.race([agent.connected(), sleep(60_000).then(() => Promise.reject(new Error('the guest does not call')))]);
    check('virsh create', true, `the guest was up ${((performance.now() - began) / 1000).toFixed(1)} s later`);
    if (!ownDaemon) check('the daemon', processes(share).length > 0, processes(share).join('; '));

    const output = async (command: string): Promise<string> => {
      const running: Command = agent.spawn(command);
      const lines: string[] = [];
      running.on('line', ({ text }) => lines.push(text));
      await running.ended;
      return lines.join('\n');
    };
    const mounted = await output('mount -t virtiofs myfs /mnt && echo from the guest > /mnt/hello && cat /mnt/hello');
    check('mounted', mounted === 'from the guest', mounted);
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
  } finally {
    channel?.destroy();
    await virsh('destroy', name).catch(() => {});
    await daemon?.stop();
    for (let tries = 0; processes(share).length > 0 && tries < 100; tries++) await sleep(50);
    check('virsh destroy', processes(share).length === 0, processes(share).join('; ') || 'no domain, no daemon left');
  }
}

/** Command lines that have `text`. */
function processes(text: string): string[] {
  const found: string[] = [];
  for (const pid of readdirSync('/proc').filter((entry) => /^\d+$/.test(entry))) {
    try {
      const line = readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ').trim();
      if (line.replaceAll(',,', ',').includes(text)) found.push(line);
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
const libvirtd = startChild(path.join(repository, 'qemu/libvirt/libvirtd.sh'), [folder], { stdio: ['ignore', 'pipe', 'pipe'], folder });
try {
  for (let tries = 0; !existsSync(`${folder}/run/libvirt/libvirt-sock`) && tries < 200; tries++) await sleep(50);
  console.log(`libvirt ${await virsh('version', '--daemon').then((text) => /daemon: (\S+)/.exec(text)?.[1] ?? text)}`);
  for (const [name, domain] of Object.entries(domains)) {
    if (names.length && !names.includes(name)) continue;
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
