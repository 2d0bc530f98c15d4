/**
 * `make run`: a shell, or one command, in a guest that has a host directory mounted at /mnt.
 * Its stdout, stderr and status are the command's; what is wrong with the guest itself is one line and status 125.
 */
import { mkdirSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import {
  bootGuest,
  type Command,
  cacheFolder,
  type Daemon,
  type DaemonOptions,
  type Guest,
  GuestError,
  type GuestOptions,
  startDaemon,
} from './guest.js';

const FAILED = 125;
const TAG = 'myfs';

const usage = `usage: run.js [options] [--] [command...]
Runs a command in a guest (joined with spaces, by the guest's shell), or a shell without one.
Each option can also be given as the variable in brackets.
  --share DIR     the directory to be seen at /mnt; by default one made for it [SHARE]
  --guest KIND    qemu or uml; qemu by default [GUEST]
  --kernel K      the path of an image, or for qemu: debian (default; it has file events), debian-plain (it has none),
                  debian-5.10 and debian-arm64 (neither have they);
                  for uml: 6.12 (default), 7.2, 6.12-plain..., debian and debian-5.10 (ready-made, without file events) [KERNEL]
  --events HOW    1: what happens to files below /mnt, on the host or in the guest, is a line on stderr beside the command;
                  only: a line on stdout, and no command [EVENTS]
  --modules LIST  .ko files or names of modules to load besides, or instead of stock ones of that name [MODULES]
  --options LIST  options for the daemon [OPTS]
  --daemon FILE   another daemon; build/virtiofsd-ts by default [DAEMON]
  --hostroot      the host's programs, read-only, as the guest's root [HOSTROOT=1]
  --memory MIB    [MEM]     --cpus N  [CPUS]     --accel kvm|tcg  [ACCEL]
  --timeout S     give up on the command after S seconds; by default never [TIMEOUT]
  --verbose       show the guest's console and the daemon's log on stderr [VERBOSE=1]`;

/** Option and the environment variable that stands for it. */
const variables = {
  share: 'SHARE',
  guest: 'GUEST',
  kernel: 'KERNEL',
  events: 'EVENTS',
  modules: 'MODULES',
  options: 'OPTS',
  daemon: 'DAEMON',
  memory: 'MEM',
  cpus: 'CPUS',
  accel: 'ACCEL',
  timeout: 'TIMEOUT',
  hostroot: 'HOSTROOT',
  verbose: 'VERBOSE',
} as const;
const switches = ['hostroot', 'verbose', 'help'];

interface Settings {
  /** The command, or undefined for a shell. */
  command: string | undefined;
  timeoutMs: number;
  verbose: boolean;
  /** Lines for file events: beside the command, or instead of one. */
  events: 'beside' | 'only' | undefined;
  daemon: Omit<DaemonOptions, 'onLog'>;
  guest: Omit<GuestOptions, 'shares' | 'onConsole'>;
}

class UsageError extends GuestError {}

/** Options first, then the environment; an empty variable is no variable. */
function readSettings(): Settings {
  const { values, positionals } = parseCommandLine();
  if (values['help']) {
    console.log(usage);
    process.exit(0);
  }
  const text = (name: keyof typeof variables): string | undefined => {
    const value = values[name] ?? process.env[variables[name]];
    return value ? String(value) : undefined;
  };
  const number = (name: keyof typeof variables): number | undefined => {
    const value = text(name);
    if (value !== undefined && !/^[1-9]\d*$/.test(value)) throw new UsageError(`${name} must be a number above 0, not ${value}`);
    return value === undefined ? undefined : Number(value);
  };
  const flag = (name: keyof typeof variables): boolean => !['0', 'no', undefined].includes(text(name));

  const kind = text('guest') ?? 'qemu';
  if (kind !== 'qemu' && kind !== 'uml') throw new UsageError(`there is no guest ${kind}: choose qemu or uml`);
  const program = text('daemon');
  const command = positionals.length ? positionals.join(' ') : process.env['CMD'] || undefined;
  const events = text('events') === 'only' ? 'only' : flag('events') ? 'beside' : undefined;
  if (events === 'only' && command !== undefined) throw new UsageError('events can be all there is, or beside a command: choose one');
  return {
    command,
    events,
    timeoutMs: (number('timeout') ?? 0) * 1000,
    verbose: flag('verbose'),
    daemon: {
      shareDir: path.resolve(text('share') ?? ownShare()),
      options: splitWords(text('options') ?? ''),
      ...(program ? { daemon: program } : {}),
      ...(kind === 'uml' ? { tag: TAG } : {}),
    },
    guest: defined({
      kind,
      hostRoot: flag('hostroot'),
      hostRootDaemon: program,
      // A guest without file events is there for who asks for it.
      kernel: text('kernel') ?? (kind === 'uml' ? '6.12' : 'debian'),
      modules: splitWords(text('modules') ?? ''),
      memoryMiB: number('memory'),
      cpus: number('cpus'),
      accel: text('accel'),
    }),
  };
}

function parseCommandLine(): { values: Record<string, string | boolean | undefined>; positionals: string[] } {
  const option = (name: string): [string, { type: 'string' | 'boolean' }] => [
    name,
    { type: switches.includes(name) ? 'boolean' : 'string' },
  ];
  try {
    const options = Object.fromEntries([...Object.keys(variables), 'help'].map(option));
    const { values, positionals } = parseArgs({ allowPositionals: true, options });
    return { values: values as Record<string, string | boolean | undefined>, positionals };
  } catch (error) {
    throw new UsageError((error as Error).message.split('. ')[0]);
  }
}

type Defined<T> = { [K in keyof T]: Exclude<T[K], undefined> };

/** Without the properties that are undefined: "not given" and "given as undefined" are different types. */
function defined<T extends object>(object: T): Defined<T> {
  return Object.fromEntries(Object.entries(object).filter(([, value]) => value !== undefined)) as Defined<T>;
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
  const { verbose } = settings;
  const terminal = settings.command === undefined && settings.events !== 'only' && process.stdin.isTTY && process.stdout.isTTY;
  const say = (line: string): void => {
    if (terminal || verbose) process.stderr.write(`${line}\n`);
  };
  for (const [signal, status] of Object.entries({ SIGINT: 130, SIGTERM: 143, SIGHUP: 129 })) {
    process.on(signal, () => void tidyUp().finally(() => process.exit(status)));
  }

  const machine = settings.guest.kind === 'qemu' ? 'QEMU' : 'User Mode Linux';
  say(`starting a ${machine} guest with ${settings.daemon.shareDir}`);
  daemon = await startDaemon({ ...settings.daemon, ...(verbose ? { onLog: (line) => say(`daemon: ${line}`) } : {}) });
  guest = await bootGuest({
    ...settings.guest,
    shares: [{ socket: daemon, tag: TAG }],
    ...(verbose ? { onConsole: (line) => say(`guest: ${line}`) } : {}),
  });
  if (settings.events !== 'only') say('it is mounted at /mnt; exit or ^D ends the guest');
  const events = settings.events === undefined ? undefined : await showEvents(guest, settings, terminal);

  const status =
    settings.events === 'only' ? await only(events as Command) : terminal ? await shell(guest) : await command(guest, settings);
  await guest.poweroff();
  await daemon.stop();
  return status;
}

/** inotifywait in the guest, a line for each event. */
async function showEvents(guest: Guest, { events }: Settings, terminal: boolean): Promise<Command> {
  const what = 'modify,attrib,close_write,move,create,delete';
  const running = guest.spawn(`exec inotifywait -m -r -e ${what} --format '%e %w%f' /mnt`);
  const established = running.waitForLine('Watches established', { timeoutMs: 600_000 });
  established.catch(() => {});
  running.on('line', ({ stream, text }) => {
    if (stream === 'stderr') {
      if (!/^(Setting up watches|Watches established)/.test(text)) process.stderr.write(`events: ${text}\n`);
    } else if (events === 'only') process.stdout.write(`${text}\n`);
    else process.stderr.write(terminal ? `\r\x1b[2m# ${text}\x1b[0m\x1b[K\r\n` : `# ${text}\n`);
  });
  await established;
  return running;
}

/** Events are all there is, until a signal. */
async function only(events: Command): Promise<number> {
  process.stderr.write('what happens to files below /mnt is a line here; ^C ends the guest\n');
  process.stdout.on('error', () => events.kill());
  return (await events.ended).status;
}

/** The start-up files of a lent bash are about the host. */
const SHELL = 'if [ -x /bin/bash ]; then exec bash --norc; else exec sh; fi';

/** A shell on this terminal. */
async function shell(guest: Guest): Promise<number> {
  const { stdin, stdout } = process;
  const env = { TERM: process.env['TERM'] ?? 'linux', PS1: 'guest:\\w# ' };
  const size = { rows: stdout.rows, columns: stdout.columns };
  const running = guest.spawn(SHELL, { cwd: '/mnt', pty: size, env, lines: false });
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
    const help = error instanceof UsageError ? ' (--help lists the options)' : '';
    process.stderr.write(`run: ${error instanceof GuestError ? error.message.trim() + help : (error as Error).stack}\n`);
    process.exitCode = FAILED;
  },
);
