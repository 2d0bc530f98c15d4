/** Starts a vhost-user-fs daemon for a guest. */
import { accessSync, constants, mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { GuestError } from './agent.js';
import { type Child, describeEnd, lastWords, type ProcessEnd, startChild } from './process.js';

/** The clone; this file is compiled to build/js/qemu/guest. */
export const repository = fileURLToPath(new URL('../../../..', import.meta.url));

export interface DaemonOptions {
  /** The directory it serves. */
  shareDir: string;
  /** Where it listens; by default a socket in a folder made for it, removed by `stop`. */
  socketPath?: string;
  /** Further command-line options. */
  options?: string[];
  /** Refuses all changes (the C daemon cannot). */
  readOnly?: boolean;
  /** Has it tell its tag to the front end: User Mode Linux needs that, QEMU has its own and must not get it. */
  tag?: string;
  /** The program; by default $DAEMON, else build/virtiofsd-ts. QEMU's old C daemon (`.../qemu/virtiofsd`) also works. */
  daemon?: string;
  env?: NodeJS.ProcessEnv;
  /** Called with each line it logs. */
  onLog?: (line: string) => void;
}

export interface Daemon {
  readonly socketPath: string;
  readonly pid: number;
  /** The last lines it logged. */
  readonly log: string[];
  readonly exited: Promise<ProcessEnd>;
  /** Ends it with SIGTERM (SIGKILL if that does not help within 5 s) and removes what was made for it. */
  stop(): Promise<ProcessEnd>;
}

/** Starts a daemon; resolves when its socket takes connections. */
export async function startDaemon(options: DaemonOptions): Promise<Daemon> {
  const program = options.daemon ?? (process.env['DAEMON'] || path.join(repository, 'build/virtiofsd-ts'));
  try {
    accessSync(program, constants.X_OK);
  } catch {
    throw new GuestError(`no daemon at ${program}: run make first, or set DAEMON to another one`);
  }
  if (!statSync(options.shareDir, { throwIfNoEntry: false })?.isDirectory()) {
    throw new GuestError(`${options.shareDir} is not a directory`);
  }
  const folder = options.socketPath ? undefined : mkdtempSync(path.join(tmpdir(), 'virtiofsd-ts-'));
  const socketPath = options.socketPath ?? path.join(folder as string, 'fs.sock');
  const child = startChild(program, [...daemonArguments(program, options, socketPath), ...(options.options ?? [])], {
    stdio: ['ignore', 'pipe', 'pipe'],
    folder,
    ...(options.env ? { env: options.env } : {}),
    ...(options.onLog ? { onLine: options.onLog } : {}),
  });
  const stop = async (): Promise<ProcessEnd> => {
    const end = await child.stop();
    if (folder) rmSync(folder, { recursive: true, force: true });
    return end;
  };
  try {
    await listening(child, socketPath);
  } catch (error) {
    await stop();
    throw error;
  }
  return { socketPath, pid: child.pid, log: child.log, exited: child.exited, stop };
}

function daemonArguments(program: string, { shareDir, tag, readOnly }: DaemonOptions, socketPath: string): string[] {
  if (program.endsWith('/qemu/virtiofsd')) {
    return [`--socket-path=${socketPath}`, '-o', `source=${shareDir.replaceAll(',', ',,')}`, '-o', 'sandbox=chroot'];
  }
  return [...['--socket-path', socketPath, '--shared-dir', shareDir], ...(tag ? ['--tag', tag] : []), ...(readOnly ? ['--readonly'] : [])];
}

/** Waits until the daemon listens. Reads the kernel's list: a trial connection would be its first client. */
async function listening(child: Child, socketPath: string): Promise<void> {
  let end: ProcessEnd | undefined;
  void child.exited.then((value) => {
    end = value;
  });
  for (const deadline = Date.now() + 10_000; Date.now() < deadline; await sleep(5)) {
    if (end) {
      throw new GuestError(`the daemon ended with ${describeEnd(end)}${lastWords(child.log)}`);
    }
    for (const line of readFileSync('/proc/net/unix', 'utf8').split('\n')) {
      const fields = line.split(' '); // Num RefCount Protocol Flags Type St Inode Path
      const acceptsConnections = (Number.parseInt(fields[3] ?? '0', 16) & 0x10000) !== 0;
      if (acceptsConnections && line.endsWith(` ${socketPath}`)) return;
    }
  }
  throw new GuestError(`the daemon does not listen at ${socketPath} after 10 s${lastWords(child.log)}`);
}
