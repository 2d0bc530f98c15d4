/**
 * `make run`: a shell, or one command, in a guest that has a host directory mounted at /mnt.
 * Its stdout, stderr and status are the command's; what is wrong with the guest itself is one line and status 125.
 */
import { mkdirSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { bootGuest, cacheFolder, type Command, type Daemon, type Guest, GuestError, startDaemon } from './guest.js';

const FAILED = 125;

const usage = `usage: run.js [options] [--] [command...]
Runs a command in a guest (joined with spaces, by the guest's shell), or a shell without one.
Each option can also be given as the variable in brackets.
  --share DIR     the directory to be seen at /mnt; by default one made for it [SHARE]
  --guest KIND    qemu or uml; qemu by default [GUEST]
  --kernel K      debian; uml also: 6.12, 7.2, 6.12-plain...; or the path of an image; debian by default [KERNEL]
  --modules LIST  .ko files or names of modules to load besides, or instead of stock ones of that name [MODULES]
  --options LIST  options for the daemon [OPTS]
  --daemon FILE   another daemon; build/virtiofsd-ts by default [DAEMON]
  --hostroot      the host's programs, read-only, as the guest's root [HOSTROOT=1]
  --memory MIB    [MEM]     --cpus N  [CPUS]     --accel kvm|tcg  [ACCEL]
  --timeout S     give up on the command after S seconds; by default never [TIMEOUT]
  --verbose       show the guest's console and the daemon's log on stderr [VERBOSE=1]`;

interface Settings {
  share: string;
  kind: 'qemu' | 'uml';
  command: string | undefined;
  timeoutMs: number;
  hostRoot: boolean;
  verbose: boolean;
  options: string[];
  text: (name: string) => string | undefined;
  number: (name: string) => number | undefined;
}

class UsageError extends GuestError {}

/** Options first, then the environment; an empty variable is no variable. */
function readSettings(): Settings {
  const variables: Record<string, string> = {
    share: 'SHARE', guest: 'GUEST', kernel: 'KERNEL', modules: 'MODULES', options: 'OPTS', daemon: 'DAEMON',
    memory: 'MEM', cpus: 'CPUS', accel: 'ACCEL', timeout: 'TIMEOUT', hostroot: 'HOSTROOT', verbose: 'VERBOSE',
  };
  let values: Record<string, string | boolean | undefined>;
  let positionals: string[];
  try {
    const switches = ['hostroot', 'verbose', 'help'];
    const names = [...Object.keys(variables), 'help'];
    ({ values, positionals } = parseArgs({
      allowPositionals: true,
      options: Object.fromEntries(
        names.map((name) => [name, { type: switches.includes(name) ? ('boolean' as const) : ('string' as const) }]),
      ),
    }) as { values: typeof values; positionals: string[] });
  } catch (error) {
    throw new UsageError((error as Error).message.split('\n')[0]);
  }
  if (values['help']) {
    console.log(usage);
    process.exit(0);
  }
  const text = (name: string): string | undefined => {
    const value = values[name] ?? process.env[variables[name] as string];
    return value === '' || value === undefined || value === false ? undefined : String(value);
  };
  const number = (name: string): number | undefined => {
    const value = text(name);
    if (value !== undefined && !/^\d+$/.test(value)) throw new UsageError(`${name} must be a number, not ${value}`);
    return value === undefined ? undefined : Number(value);
  };
  const flag = (name: string): boolean => !['0', 'no', undefined].includes(text(name));
  const kind = text('guest') ?? 'qemu';
  if (kind !== 'qemu' && kind !== 'uml') throw new UsageError(`there is no guest ${kind}: choose qemu or uml`);
  return {
    share: path.resolve(text('share') ?? ownShare()),
    kind,
    command: positionals.length ? positionals.join(' ') : process.env['CMD'] || undefined,
    timeoutMs: (number('timeout') ?? 0) * 1000,
    hostRoot: flag('hostroot'),
    verbose: flag('verbose'),
    options: splitWords(text('options') ?? ''),
    text,
    number,
  };
}

/** A directory to try things in, for those who name none. */
function ownShare(): string {
  const share = path.join(cacheFolder, 'share');
  if (!statSync(share, { throwIfNoEntry: false })) {
    mkdirSync(share, { recursive: true });
    writeFileSync(path.join(share, 'hello.txt'), `This file is in ${share} on the host.\n`);
  }
  return share;
}

/** Words as a shell splits them, with quotes but without expansions. */
function splitWords(text: string): string[] {
  return [...text.matchAll(/(?:[^\s"']|"[^"]*"|'[^']*')+/g)].map(([word]) =>
    word.replace(/"([^"]*)"|'([^']*)'/g, (_, double?: string, single?: string) => double ?? single ?? ''),
  );
}

let guest: Guest | undefined;
let daemon: Daemon | undefined;

async function tidyUp(): Promise<void> {
  await guest?.kill();
  await daemon?.stop();
}

async function main(): Promise<number> {
  const settings = readSettings();
  const { kind, text, number, verbose } = settings;
  const terminal = settings.command === undefined && process.stdin.isTTY && process.stdout.isTTY;
  const say = (line: string): void => void (terminal || verbose ? process.stderr.write(`${line}\n`) : undefined);
  const show = verbose ? { onLog: (line: string) => say(`daemon: ${line}`) } : {};

  for (const [signal, status] of [['SIGINT', 130], ['SIGTERM', 143], ['SIGHUP', 129]] as const) {
    process.on(signal, () => void tidyUp().finally(() => process.exit(status)));
  }

  const daemonProgram = text('daemon');
  daemon = await startDaemon({
    shareDir: settings.share,
    options: settings.options,
    ...(kind === 'uml' ? { tag: 'myfs' } : {}),
    ...(daemonProgram ? { daemon: daemonProgram } : {}),
    ...show,
  });
  const memoryMiB = number('memory');
  const cpus = number('cpus');
  const accel = text('accel');
  const kernel = text('kernel');
  guest = await bootGuest({
    kind,
    shares: [{ socket: daemon }],
    hostRoot: settings.hostRoot,
    modules: splitWords(text('modules') ?? ''),
    ...(daemonProgram ? { hostRootDaemon: daemonProgram } : {}),
    ...(kernel ? { kernel } : {}),
    ...(memoryMiB ? { memoryMiB } : {}),
    ...(cpus ? { cpus } : {}),
    ...(accel ? { accel } : {}),
    ...(verbose ? { onConsole: (line: string) => say(`guest: ${line}`) } : {}),
  });
  say(`${settings.share} is mounted at /mnt; ^D or exit ends the guest`);

  const status = terminal ? await shell(guest, settings) : await command(guest, settings);
  await guest.poweroff();
  await daemon.stop();
  return status;
}

const SHELL = 'if [ -x /bin/bash ]; then exec bash; else exec sh; fi';

/** A shell on this terminal. */
async function shell(guest: Guest, { hostRoot }: Settings): Promise<number> {
  const { stdin, stdout } = process;
  const env = { TERM: process.env['TERM'] ?? 'linux', PS1: 'guest:\\w# ' };
  const size = { rows: stdout.rows, columns: stdout.columns };
  // The host's start-up files are about the host.
  const running = guest.spawn(hostRoot ? 'exec bash --norc' : SHELL, { cwd: '/mnt', pty: size, env, lines: false });
  connectOutput(guest, running);
  stdout.on('resize', () => running.resize(stdout.rows, stdout.columns));
  stdin.setRawMode(true);
  stdin.on('data', (data) => void running.write(data));
  try {
    return (await running.ended).status;
  } catch (error) {
    // "poweroff" in the shell is a proper end as well.
    const end = await Promise.race([guest.exited, sleep(500)]);
    if (end?.status === 0) return 0;
    throw error;
  } finally {
    stdin.setRawMode(false);
    stdin.pause();
  }
}

/** One command (or a script on stdin) with our stdin, stdout and stderr. */
async function command(guest: Guest, { command = SHELL, timeoutMs }: Settings): Promise<number> {
  const running = guest.spawn(command, { lines: false });
  connectOutput(guest, running);
  const { stdin } = process;
  stdin.on('data', (data) => {
    stdin.pause();
    void running.write(data).then(() => stdin.resume());
  });
  stdin.on('end', () => running.endInput());
  stdin.on('error', () => running.endInput());
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    if (timeoutMs) timer = setTimeout(() => reject(new GuestError(`the command did not end within ${timeoutMs / 1000} s`)), timeoutMs);
  });
  try {
    return (await Promise.race([running.ended, late])).status;
  } finally {
    clearTimeout(timer);
    stdin.destroy();
  }
}

/** Passes output on at the speed at which it is read. */
function connectOutput(guest: Guest, running: Command): void {
  let readers = true;
  const pass = (stream: NodeJS.WriteStream, data: Buffer): void => {
    if (!readers || stream.write(data)) return;
    guest.setFlow(false);
    if (stream.listenerCount('drain') === 0) stream.once('drain', () => guest.setFlow(true));
  };
  running.on('stdout', (data) => pass(process.stdout, data));
  running.on('stderr', (data) => pass(process.stderr, data));
  process.stdout.on('error', () => {
    // Nobody reads any more, as after `| head`.
    readers = false;
    guest.setFlow(true);
    running.kill('SIGPIPE');
  });
}

main().then(
  (status) => {
    process.exitCode = status;
  },
  async (error: unknown) => {
    await tidyUp();
    const known = error instanceof GuestError;
    process.stderr.write(`run: ${known ? error.message.trim() : (error as Error).stack}\n`);
    if (error instanceof UsageError) process.stderr.write('run: --help lists the options\n');
    process.exitCode = FAILED;
  },
);
