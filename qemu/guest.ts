/**
 * Guests to run commands in, for `make run` and for tests: QEMU with a stock kernel, or User Mode Linux.
 *
 * ```ts
 * const daemon = await startDaemon({ shareDir: '/srv/data' });
 * const guest = await bootGuest({ kind: 'qemu', shares: [{ socket: daemon }] });
 * const { stdout, status } = await guest.run('ls -l /mnt');
 * const watcher = guest.spawn('inotifywait -m /mnt');
 * await watcher.waitForLine('Watches established');
 * await guest.poweroff();
 * await daemon.stop();
 * ```
 *
 * What is missing on the machine is fetched first (`setup.sh`, `guest/kernel/kernel.sh`). Nothing started here outlives
 * this process. Failures of the guest or its daemon are `GuestError`s with a message of one line.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { accessSync, constants, existsSync, mkdtempSync, readFileSync, rmSync, statfsSync, writeFileSync } from 'node:fs';
import { homedir, tmpdir } from 'node:os';
import path from 'node:path';
import type { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { Agent, type Command, type CommandEnd, type CommandOptions, GuestError } from './guest/agent.js';
import { type Daemon, repository, startDaemon } from './guest/daemon.js';
import { buildInitrd } from './guest/initrd.js';
import { type Child, type ChildOptions, describeEnd, lastWords, type ProcessEnd, startChild, withTimeout } from './guest/process.js';
import { Qmp } from './guest/qmp.js';

export { Command, type CommandEnd, type CommandOptions, GuestError, type OutputLine } from './guest/agent.js';
export { type Daemon, type DaemonOptions, startDaemon } from './guest/daemon.js';
export { describeEnd, type ProcessEnd } from './guest/process.js';

/** Where everything fetched and built for guests is kept. */
export const cacheFolder = path.join(process.env['XDG_CACHE_HOME'] || path.join(homedir(), '.cache'), 'virtiofsd-ts');

/** A device of the guest. */
export interface Share {
  /** The daemon, or the path of its socket. Given the daemon, the guest fails with a clear message when it dies. */
  socket: Daemon | string;
  /** `myfs` by default. In User Mode Linux it must be the daemon's own `--tag`. */
  tag?: string;
  /** Where it is mounted once the guest is up: `/mnt` for the first share; null leaves it alone. */
  mount?: string | null;
  /** Mount options. */
  mountOptions?: string;
  /** Request queues (QEMU; User Mode Linux asks the daemon). */
  queues?: number;
  /** Further properties of QEMU's vhost-user-fs, such as `notification=on` of the patched one. */
  properties?: string;
  /**
   * QEMU's device for any vhost-user back end (10.2 and newer) instead of vhost-user-fs: it lets all features and queues
   * through and asks the daemon for the configuration space, so the tag must be the daemon's own.
   */
  generic?: boolean;
}

/** A kernel to boot. */
export interface Kernel {
  /** bzImage for QEMU, the `linux` program for User Mode Linux. */
  image: string;
  /** Its `lib/modules/VERSION`; without it, all that is needed must be built in. */
  modulesDir?: string;
  /** .ko files that take the place of stock modules. */
  modules?: string[];
  /** It is one for arm64 (QEMU): the guest's busybox, static. */
  arm64Busybox?: string;
}

export interface GuestOptions {
  kind: 'qemu' | 'uml';
  /**
   * `debian` (default): Debian 12's stock kernel. For QEMU it is the cloud kernel with the modules that guest/kernel builds for it,
   * which bring the host's file events; `debian-plain` leaves them out. For User Mode Linux it is the prebuilt one, without events; what
   * guest/kernel builds has them: `6.12`, `7.2`, with a variant `6.12-plain`, `7.2-core`. `debian-5.10`: Debian 11's; `debian-arm64`:
   * Debian 12's for arm64, in QEMU's translator; both without events. Else the path of an image.
   */
  kernel?: string | Kernel;
  shares?: Share[];
  /**
   * The host's / as the guest's root, read-only, with fresh /tmp, /run, /mnt, /var/tmp and /dev: the host's programs run
   * in the guest. Without it the guest is a small busybox system.
   */
  hostRoot?: boolean;
  /** The daemon that serves the host's root to QEMU; by default the one that `startDaemon` starts by default. */
  hostRootDaemon?: string;
  /** 512 for QEMU, 256 for User Mode Linux. */
  memoryMiB?: number;
  /** Processors, 1 by default; User Mode Linux has 1. */
  cpus?: number;
  /** Instead of the stock ones: see `InitrdOptions.modules`. Names or .ko files, loaded after those that guests need. */
  modules?: string[];
  /** Further files in the busybox system: path in the guest to path on the host. */
  files?: Record<string, string>;
  /** Further words of the kernel's command line. */
  kernelArgs?: string[];
  extraQemuArgs?: string[];
  /** QEMU's program: $QEMU, else qemu-system-x86_64. */
  qemu?: string;
  /** QEMU waits for a guest that comes from elsewhere, which {@link Guest.takeOver} waits for. */
  incoming?: boolean;
  /** `kvm` or `tcg`: $ACCEL, else KVM where it works. */
  accel?: string;
  /** How long the start may take; 60 s by default. */
  timeoutMs?: number;
  /** Called with each line of the guest's console. */
  onConsole?: (line: string) => void;
  /** Called with each line that QEMU or User Mode Linux itself has to say. */
  onMachine?: (line: string) => void;
}

/** What a command wrote and how it ended. */
export interface RunResult extends CommandEnd {
  stdout: string;
  stderr: string;
  /** stdout as it came, for what is not text. */
  stdoutBytes: Buffer;
}

export interface RunOptions extends CommandOptions {
  stdin?: string | Buffer;
  /** The command is killed and a GuestError thrown after this time; 60 s by default, 0 for none. */
  timeoutMs?: number;
}

/** Boots a guest; resolves when it takes commands and its shares are mounted. */
export async function bootGuest(options: GuestOptions): Promise<Guest> {
  const folder = mkdtempSync(path.join(tmpdir(), 'virtiofsd-ts-'));
  let rootDaemon: Daemon | undefined;
  let guest: Guest | undefined;
  try {
    const { kernel, initrd } = prepareBoot(options, folder);
    if (options.hostRoot && options.kind === 'qemu') {
      rootDaemon = await startDaemon({
        shareDir: '/',
        readOnly: true,
        // The host's programs do not change under the guest, and running them is slow without it.
        options: ['-o', 'cache=always', ...(options.incoming ? ['--migration-on-error=guest-error'] : [])],
        ...(options.hostRootDaemon ? { daemon: options.hostRootDaemon } : {}),
      });
    }
    const nonce = randomBytes(8).toString('hex');
    const machine = { folder, kernel, initrd, nonce, rootDaemon };
    const onLine = (line: string, stream: string): void => {
      if (stream === 'stdout') guest?.consoleLine(line);
      else options.onMachine?.(line);
    };
    const start = options.kind === 'qemu' ? startQemu : startUml;
    guest = new Guest(options, start(options, machine, onLine), machine);
    if (!options.incoming) await guest.ready();
    return guest;
  } catch (error) {
    await guest?.kill();
    await rootDaemon?.stop();
    rmSync(folder, { recursive: true, force: true });
    throw error;
  }
}

/** What a guest boots: its kernel, and a RAM disk made in `folder`. */
export function prepareBoot(options: GuestOptions, folder: string): { kernel: Kernel; initrd: string } {
  const supplies = setUp(options.kind);
  const kernel = findKernel(options, supplies);
  const initrd = path.join(folder, 'initrd');
  writeFileSync(
    initrd,
    buildInitrd({
      sources: path.join(repository, 'qemu/guest'),
      cache: path.join(cacheFolder, 'guest'),
      busybox: supplies['busybox'] as string,
      arm64Busybox: kernel.arm64Busybox,
      modulesDir: kernel.modulesDir,
      modules: [
        ...(options.kind === 'qemu' ? ['virtio_pci', 'virtio_console'] : []),
        'fuse',
        'virtiofs',
        ...(kernel.modules ?? []),
        ...(options.modules ?? []),
      ],
      files: options.files,
    }),
  );
  return { kernel, initrd };
}

interface Machine {
  folder: string;
  kernel: Kernel;
  initrd: string;
  nonce: string;
  rootDaemon: Daemon | undefined;
}

const HOST_ROOT_TAG = 'hostroot';

/** A running guest; made by {@link bootGuest}. */
export class Guest {
  /** Resolves when the guest is off, for whatever reason. */
  readonly exited: Promise<ProcessEnd>;
  /** Lines of the guest's console so far. */
  readonly console: string[] = [];
  readonly pid: number;
  readonly kind: GuestOptions['kind'];
  readonly #options: GuestOptions;
  readonly #child: Child;
  #agent: Agent;
  readonly #qmp: Qmp | undefined;
  #failure: GuestError | undefined;

  /** @internal */
  constructor(options: GuestOptions, child: Child, machine: Machine) {
    this.#options = options;
    this.#child = child;
    this.pid = child.pid;
    this.kind = options.kind;
    this.#agent = new Agent(child.process.stdio[3] as unknown as Duplex, machine.nonce, {
      PATH: '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
      HOME: options.hostRoot ? '/tmp' : '/root',
      TMPDIR: '/tmp',
      USER: 'root',
      LANG: 'C.UTF-8',
    });
    if (options.kind === 'qemu') this.#qmp = new Qmp(child.process.stdio[4] as unknown as Duplex);
    const daemons = (options.shares ?? []).map(({ socket }) => socket).filter((socket) => typeof socket !== 'string');
    if (machine.rootDaemon) daemons.push(machine.rootDaemon);
    for (const daemon of daemons) {
      void daemon.exited.then(async (end) => {
        // A daemon that ends properly may do so because its guest has ended: let that be noticed first.
        if (end.status === 0) await sleep(300);
        this.#fail(`the daemon ended with ${describeEnd(end)}${lastWords(daemon.log)}`);
      });
    }
    this.exited = child.exited.then(async (end) => {
      // A machine that cannot reach its daemon gives up at once, maybe before the daemon's end is noticed.
      if (end.status !== 0 && !this.#failure) await Promise.race([sleep(300), ...daemons.map((daemon) => daemon.exited)]);
      this.#fail(end.status === 0 ? 'the guest is off' : `the guest's machine ended with ${describeEnd(end)}${lastWords(child.log)}`);
      await machine.rootDaemon?.stop();
      rmSync(machine.folder, { recursive: true, force: true });
      return end;
    });
  }

  /** Waits until the guest is up and mounts its shares; for use after a restart that the guest did itself. */
  async ready(): Promise<void> {
    const timeoutMs = this.#options.timeoutMs ?? 60_000;
    await withTimeout(this.#agent.connected(), timeoutMs, () => {
      return new GuestError(`the guest did not start within ${timeoutMs / 1000} s${lastWords(this.console)}`);
    });
    for (const [index, share] of (this.#options.shares ?? []).entries()) {
      const directory = share.mount === undefined && index === 0 ? '/mnt' : share.mount;
      if (directory) await this.mount(share.tag ?? 'myfs', directory, share.mountOptions);
    }
  }

  /** @internal A line of the guest's console. */
  consoleLine(line: string): void {
    this.console.push(line);
    if (this.console.length > 20_000) this.console.splice(0, 5000);
    this.#options.onConsole?.(line);
    const panic = /Kernel panic - not syncing: (.*)/.exec(line)?.[1];
    const reason = panic ? `the guest's kernel panicked: ${panic}` : /^init: (.*)/.exec(line)?.[1];
    if (!reason) return;
    this.#fail(panic ? reason : `the guest did not start: ${reason}`);
    void this.kill();
  }

  /** Starts a command with /bin/sh in the guest. Any number may run at a time. */
  spawn(command: string, options?: CommandOptions): Command {
    return this.#agent.spawn(command, options);
  }

  /** Runs a command with /bin/sh in the guest and waits for its end. */
  async run(command: string, { stdin, timeoutMs = 60_000, ...options }: RunOptions = {}): Promise<RunResult> {
    const running = this.spawn(command, { lines: false, ...options });
    const output: { stdout: Buffer[]; stderr: Buffer[] } = { stdout: [], stderr: [] };
    running.on('stdout', (data) => output.stdout.push(data));
    running.on('stderr', (data) => output.stderr.push(data));
    if (stdin !== undefined) void running.write(stdin);
    running.endInput();
    const end = await (timeoutMs === 0
      ? running.ended
      : withTimeout(running.ended, timeoutMs, () => {
          running.kill('SIGKILL');
          return new GuestError(`not ended after ${timeoutMs / 1000} s in the guest: ${command}`);
        }));
    const stdoutBytes = Buffer.concat(output.stdout);
    return { ...end, stdout: stdoutBytes.toString(), stderr: Buffer.concat(output.stderr).toString(), stdoutBytes };
  }

  /** Mounts a share; the directory is made if it is missing. */
  async mount(tag: string, directory: string, mountOptions?: string): Promise<void> {
    const options = mountOptions ? `-o ${quote(mountOptions)}` : '';
    const at = quote(directory);
    const { status, stderr } = await this.run(`mkdir -p ${at} && mount -t virtiofs ${options} ${quote(tag)} ${at}`);
    if (status !== 0) throw new GuestError(`cannot mount ${tag} at ${directory} in the guest: ${stderr.trim().split('\n')[0]}`);
  }

  async unmount(directory: string): Promise<void> {
    const { status, stderr } = await this.run(`umount ${quote(directory)}`);
    if (status !== 0) throw new GuestError(`cannot unmount ${directory} in the guest: ${stderr.trim().split('\n')[0]}`);
  }

  /** The guest kernel's messages; of a guest that is gone, its console. */
  async dmesg(): Promise<string> {
    if (this.#failure) return this.console.join('\n');
    return (await this.run('dmesg')).stdout;
  }

  /**
   * Restarts the guest and mounts the shares again: after an orderly unmount, or `hard`, as by the reset button (QEMU).
   */
  async reboot({ hard = false } = {}): Promise<void> {
    if (!hard) await this.#unmountAll();
    this.#agent.expectRestart();
    if (hard) await this.qmp('system_reset');
    else this.#agent.power('restart');
    await this.ready();
  }

  /** Unmounts and turns the guest off; kills it if that takes more than 10 s. */
  async poweroff(): Promise<ProcessEnd> {
    if (!this.#failure) {
      await this.#unmountAll();
      this.#agent.power('off');
      const timer = setTimeout(() => void this.kill(), 10_000);
      await this.exited;
      clearTimeout(timer);
    }
    return this.exited;
  }

  /** Ends the guest at once, as by pulling the plug. */
  async kill(): Promise<ProcessEnd> {
    // User Mode Linux tidies up on SIGTERM; QEMU would wait for a daemon that hangs.
    void this.#child.stop(this.#options.kind === 'uml' ? 500 : 0);
    return this.exited;
  }

  /** A command to QEMU's monitor: `stop`, `cont`, `system_reset` and so on. */
  async qmp(command: string, args?: Record<string, unknown>): Promise<unknown> {
    if (!this.#qmp) throw new GuestError('User Mode Linux has no monitor');
    return this.#qmp.execute(command, args);
  }

  /**
   * Live migration, from QEMU to QEMU: the guest of `from` goes on here, and so do its commands. A guest that cannot go
   * goes on where it was.
   * @param uri where the two meet, such as `unix:PATH`; `file:PATH` writes the guest there first, and its machine ends before it is read
   * @throws GuestError with what QEMU says
   */
  async takeOver(from: Guest, uri: string): Promise<void> {
    const file = uri.startsWith('file:');
    // The one hears from the other how it went.
    for (const end of [this, from]) {
      await end.qmp('migrate-set-capabilities', { capabilities: [{ capability: 'return-path', state: !file }] });
    }
    if (!file) await this.qmp('migrate-incoming', { uri });
    await from.qmp('migrate', { uri });
    await from.#migrated();
    if (!file) await this.#migrated();
    // It was started with -S: nothing that the guest has to say goes to the wrong place.
    this.#agent.exchange(from.#agent);
    [this.#agent, from.#agent] = [from.#agent, this.#agent];
    if (file) {
      await from.kill();
      await this.qmp('migrate-incoming', { uri });
      await this.#migrated();
    }
    await this.qmp('cont');
  }

  async #migrated(): Promise<void> {
    for (const end = Date.now() + 240_000; Date.now() < end; await sleep(50)) {
      const { status, 'error-desc': reason } = (await this.qmp('query-migrate')) as { status?: string; 'error-desc'?: string };
      if (status === 'completed') return;
      if (status === 'failed') throw new GuestError(`QEMU: the migration failed: ${reason ?? 'without a reason'}`);
    }
    throw new GuestError('the migration does not end');
  }

  /** Makes the guest's output wait in the guest, or lets it flow. */
  setFlow(flows: boolean): void {
    if (flows) this.#agent.resume();
    else this.#agent.pause();
  }

  async #unmountAll(): Promise<void> {
    // With a share that hangs this must not hang: the guest is turned off all the same.
    await this.run('umount -a -t virtiofs', { timeoutMs: 3000 }).catch(() => {});
  }

  #fail(reason: string): void {
    this.#failure ??= new GuestError(reason);
    this.#agent.fail(this.#failure);
  }
}

/** Runs setup.sh or guest/kernel/stock.sh; returns the paths that it names. */
function setUp(what: string, script = 'setup.sh'): Record<string, string> {
  const { status, stdout } = spawnSync(path.join(repository, 'qemu', script), [what], {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  if (status !== 0) throw new GuestError(`the set-up of the ${what} guest failed`);
  return Object.fromEntries(
    stdout
      .trim()
      .split('\n')
      .map((line) => line.split('=') as [string, string]),
  );
}

function findKernel({ kind, kernel = 'debian' }: GuestOptions, supplies: Record<string, string>): Kernel {
  if (typeof kernel !== 'string') return kernel;
  if (kernel === 'debian' || kernel === 'debian-plain') {
    const stock = { image: supplies['kernel'] as string, modulesDir: supplies['modules'] as string };
    return kind === 'qemu' && kernel === 'debian' ? { ...stock, modules: buildModules(stock.modulesDir) } : stock;
  }
  if (kernel === 'debian-5.10' || (kernel === 'debian-arm64' && kind === 'qemu')) {
    const what = kernel === 'debian-arm64' ? '6.1-arm64' : kind === 'uml' ? '5.10-uml' : '5.10-cloud';
    const { kernel: image, modules, busybox } = setUp(what, 'guest/kernel/stock.sh') as Record<'kernel' | 'modules' | 'busybox', string>;
    return { image, modulesDir: modules, ...(kernel === 'debian-arm64' ? { arm64Busybox: busybox } : {}) };
  }
  const built = /^(\d+\.\d+)(?:-(\w+))?$/.exec(kernel);
  if (built && kind === 'uml') {
    const script = path.join(repository, 'qemu/guest/kernel/kernel.sh');
    const args = ['uml', built[1] as string, ...(built[2] ? ['--variant', built[2]] : [])];
    try {
      return { image: execFileSync(script, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] }).trim() };
    } catch {
      throw new GuestError(`the User Mode Linux kernel ${kernel} could not be built`);
    }
  }
  if (!existsSync(kernel)) {
    throw new GuestError(`no kernel ${kernel}: debian, ${kind === 'uml' ? 'a series such as 6.12, ' : ''}or the path of an image`);
  }
  return { image: kernel };
}

/** fuse and virtiofs with remote fsnotify for Debian's stock kernel 6.1; built once for each of its versions. */
function buildModules(modulesDir: string): string[] {
  const script = path.join(repository, 'qemu/guest/kernel/modules.sh');
  try {
    const paths = execFileSync(script, ['6.1', path.basename(modulesDir)], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] });
    return paths.trim().split('\n');
  } catch {
    throw new GuestError("the modules for the guest's file events could not be built: debian-plain is the kernel without them");
  }
}

const kernelArguments = (options: GuestOptions, { nonce }: Machine, channel: string): string[] => [
  'quiet',
  'rdinit=/init',
  `nonce=${nonce}`,
  `channel=${channel}`,
  `hostroot=${options.hostRoot ? (options.kind === 'qemu' ? HOST_ROOT_TAG : 'hostfs') : ''}`,
  ...(options.kernelArgs ?? []),
];

/** Commas separate the properties of a QEMU option and are doubled inside one. */
const property = (value: string): string => value.replaceAll(',', ',,');

const socketOf = ({ socket }: Share): string => (typeof socket === 'string' ? socket : socket.socketPath);

function fsDevice({ tag = 'myfs', queues, properties }: Share): string {
  const device = `vhost-user-fs-pci,tag=${property(tag)},queue-size=1024`;
  return device + (queues ? `,num-request-queues=${queues}` : '') + (properties ? `,${properties}` : '');
}

/** A virtio-fs device (26) with high priority, notification and request queues, and a configuration space of 44 bytes. */
function genericDevice({ queues = 1 }: Share): string {
  return `vhost-user-test-device-pci,virtio-id=26,num_vqs=${2 + queues},vq_size=1024,config_size=44`;
}

/** File descriptors 3 and 4 are the agent's channel and the monitor. */
function startQemu(options: GuestOptions, machine: Machine, onLine: ChildOptions['onLine']): Child {
  const arm64 = machine.kernel.arm64Busybox !== undefined;
  const qemu = options.qemu ?? (arm64 ? 'qemu-system-aarch64' : process.env['QEMU'] || 'qemu-system-x86_64');
  const accel = options.accel ?? (arm64 ? 'tcg' : process.env['ACCEL'] || bestAccelerator(qemu));
  const memory = options.memoryMiB ?? 512;
  const shares = [...(options.shares ?? [])];
  if (machine.rootDaemon) shares.push({ socket: machine.rootDaemon, tag: HOST_ROOT_TAG });
  const args = [
    ['-nodefaults', '-no-user-config', '-display', 'none', '-serial', 'stdio'],
    ['-machine', `${arm64 ? 'virt' : 'q35'},memory-backend=mem`, '-accel', accel],
    // Signed pointers cost much in the translator.
    ['-cpu', arm64 ? 'max,pauth-impdef=on' : 'max', '-smp', String(options.cpus ?? 1), '-m', `${memory}M`],
    ['-object', `memory-backend-memfd,id=mem,size=${memory}M,share=on`],
    ['-kernel', machine.kernel.image, '-initrd', machine.initrd],
    ['-append', [`console=${arm64 ? 'ttyAMA0' : 'ttyS0'}`, ...kernelArguments(options, machine, '/dev/vport*p*')].join(' ')],
    ['-device', 'virtio-serial-pci', '-chardev', 'socket,id=agent,fd=3', '-device', 'virtserialport,chardev=agent'],
    ['-chardev', 'socket,id=monitor,fd=4', '-mon', 'chardev=monitor,mode=control'],
    ...shares.map((share, index) => [
      '-chardev',
      `socket,id=fs${index},path=${property(socketOf(share))}`,
      '-device',
      `${share.generic ? genericDevice(share) : fsDevice(share)},chardev=fs${index}`,
    ]),
    options.incoming ? ['-incoming', 'defer', '-S'] : [],
    options.extraQemuArgs ?? [],
  ].flat();
  return startChild(qemu, args, { stdio: ['ignore', 'pipe', 'pipe', 'pipe', 'pipe'], folder: machine.folder, onLine });
}

/** File descriptor 3 is the agent's channel, the second console. */
function startUml(options: GuestOptions, machine: Machine, onLine: ChildOptions['onLine']): Child {
  const memory = options.memoryMiB ?? 256;
  const args = [
    `mem=${memory}M`,
    `initrd=${machine.initrd}`,
    `uml_dir=${machine.folder}/`,
    'con=null con0=null,fd:1 con1=fd:3 ssl=null seccomp=auto'.split(' '),
    (options.shares ?? []).map((share) => `virtio_uml.device=${socketOf(share)}:26`),
    kernelArguments(options, machine, '/dev/tty1'),
  ].flat();
  // The guest's memory is a file; it is not to be on a small /dev/shm, as containers have it.
  const { bavail, bsize } = statfsSync('/dev/shm');
  const env = { ...process.env, TMPDIR: bavail * bsize > memory * 2 ** 20 ? '/dev/shm' : machine.folder };
  return startChild(machine.kernel.image, args, { stdio: ['ignore', 'pipe', 'pipe', 'pipe'], folder: machine.folder, env, onLine });
}

/** KVM only where the processor has it, we may use it, and a machine can be made with it; else QEMU's own translator. */
function bestAccelerator(qemu: string): 'kvm' | 'tcg' {
  if (!/^flags.*\b(vmx|svm)\b/m.test(readFileSync('/proc/cpuinfo', 'utf8'))) return 'tcg';
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK);
  } catch {
    return 'tcg';
  }
  const probe = [
    '-accel',
    'kvm',
    '-machine',
    'q35',
    '-cpu',
    'max',
    '-nodefaults',
    '-no-user-config',
    '-display',
    'none',
    '-S',
    '-qmp',
    'stdio',
  ];
  const input = '{"execute":"qmp_capabilities"}{"execute":"quit"}';
  return spawnSync(qemu, probe, { input, timeout: 5000, stdio: ['pipe', 'ignore', 'ignore'] }).status === 0 ? 'kvm' : 'tcg';
}

/** For the guest's shell. */
const quote = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;
