/** The daemons that are measured, and how each is started. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { repository } from '../../qemu/guest/daemon.js';
import { type Child, describeEnd, lastWords, type ProcessEnd, startChild } from '../../qemu/guest/process.js';
import { clientProgram } from './client.js';

export type DaemonName = 'ours' | 'rust' | 'rust-never' | 'c' | 'nothing';

export interface DaemonKind {
  readonly name: DaemonName;
  /** For tables. */
  readonly label: string;
  readonly version: string;
  /** Cache modes it has. */
  readonly caches: readonly string[];
  readonly program: string;
  arguments(settings: Settings): string[];
}

interface Settings {
  shareDir: string;
  socketPath: string;
  /** `auto` by default, as in each of them. */
  cache: string;
  /** Announced to the front end: User Mode Linux needs it. */
  tag: string | undefined;
  /** With the sandbox and the filter that it has by default. */
  sandboxed: boolean;
}

/**
 * Some daemons hold a descriptor per known inode. As many as may be, but never so many that the whole machine runs out of
 * them (ENFILE), which containers do at a few times the limit of a process.
 */
const OPEN_FILES = Math.min(
  1 << 20,
  Number(/^Max open files\s+\d+\s+(\d+)/m.exec(readFileSync('/proc/self/limits', 'utf8'))?.[1] ?? 1024) * 0.75,
);

/** What the names of the command line stand for; peers are fetched here. */
export function findDaemons(names: readonly string[]): DaemonKind[] {
  return names.map((name) => {
    switch (name) {
      case 'ours':
        return {
          name,
          label: 'virtiofsd-ts',
          version: ourVersion(),
          caches: ['auto', 'always', 'never', 'metadata', 'notify'],
          program: path.join(repository, 'build/virtiofsd-ts'),
          arguments: rustArguments,
        };
      case 'rust':
      case 'rust-never': {
        const { program, version } = peer('rust');
        return {
          name,
          label: name === 'rust' ? 'virtiofsd (Rust)' : 'virtiofsd (Rust), never',
          version,
          caches: ['auto', 'always', 'never', 'metadata'],
          program,
          arguments: (settings) => [...rustArguments(settings), ...(name === 'rust' ? [] : ['--inode-file-handles=never'])],
        };
      }
      case 'c': {
        const { program, version } = peer('c');
        return {
          name,
          label: 'virtiofsd (C)',
          version,
          caches: ['auto', 'always', 'never'],
          program,
          arguments: cArguments,
        };
      }
      case 'nothing':
        return {
          name,
          label: 'a back end that does nothing',
          version: '',
          caches: [],
          program: clientProgram,
          arguments: ({ socketPath }) => ['null', socketPath],
        };
      default:
        throw new Error(`there is no daemon ${name}: ours, rust, rust-never, c`);
    }
  });
}

/**
 * Ours has the Rust daemon's command line. Requests are measured without sandbox and filter of system calls where these can be left out
 * (not in the C daemon): what a filter costs is the kernel's, the same for everybody who has one.
 */
function rustArguments({ shareDir, socketPath, cache, tag, sandboxed }: Settings): string[] {
  return [
    ...['--socket-path', socketPath, '--shared-dir', shareDir, '--cache', cache, '--xattr'],
    ...(sandboxed ? [] : ['--sandbox', 'none', '--seccomp', 'none']),
    ...['--log-level', 'error', '--rlimit-nofile', String(OPEN_FILES), ...(tag ? ['--tag', tag] : [])],
  ];
}

function cArguments({ shareDir, socketPath, cache }: Settings): string[] {
  return [
    ...['-f', `--socket-path=${socketPath}`, `--rlimit-nofile=${OPEN_FILES}`],
    ...['-o', `source=${shareDir},sandbox=chroot,xattr,log_level=err,cache=${cache === 'never' ? 'none' : cache}`],
  ];
}

function peer(name: string): { program: string; version: string } {
  const script = path.join(repository, 'test/bench/peers.sh');
  const [program, version] = execFileSync(script, [name], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] }).split('\n');
  return { program: program as string, version: version as string };
}

function ourVersion(): string {
  const { version } = JSON.parse(readFileSync(path.join(repository, 'package.json'), 'utf8')) as { version: string };
  const commit = execFileSync('git', ['-C', repository, 'describe', '--always', '--dirty'], { encoding: 'utf8' }).trim();
  return `${version} (${commit}), Node.js ${process.version}`;
}

/** A daemon that listens. */
export interface RunningDaemon {
  readonly kind: DaemonKind;
  readonly socketPath: string;
  /** It and what it started. */
  readonly pids: number[];
  /** From its start until it listened. */
  readonly readyMs: number;
  readonly exited: Promise<ProcessEnd>;
  stop(): Promise<void>;
}

export async function startDaemon(
  kind: DaemonKind,
  { shareDir, cache = 'auto', tag, sandboxed = false }: { shareDir: string; cache?: string; tag?: string; sandboxed?: boolean },
): Promise<RunningDaemon> {
  const folder = mkdtempSync(path.join(tmpdir(), 'virtiofsd-ts-bench-'));
  const socketPath = path.join(folder, 'fs.sock');
  const started = performance.now();
  const child = startChild(kind.program, kind.arguments({ shareDir, socketPath, cache, tag, sandboxed }), {
    stdio: ['ignore', 'ignore', 'pipe'],
    folder,
  });
  const stop = async (): Promise<void> => {
    await child.stop(2000);
    rmSync(folder, { recursive: true, force: true });
  };
  try {
    await listening(child, socketPath);
  } catch (error) {
    await stop();
    throw error;
  }
  const readyMs = performance.now() - started;
  return { kind, socketPath, pids: withDescendants(child.pid), readyMs, exited: child.exited, stop };
}

/** Reads the kernel's list of sockets: a trial connection would be the daemon's first and last client. */
async function listening(child: Child, socketPath: string): Promise<void> {
  let end: ProcessEnd | undefined;
  void child.exited.then((value) => {
    end = value;
  });
  for (const deadline = Date.now() + 10_000; Date.now() < deadline; await sleep(1)) {
    if (end) throw new Error(`${child.process.spawnfile} ended with ${describeEnd(end)}${lastWords(child.log)}`);
    // Num RefCount Protocol Flags Type St Inode Path; the flag is the one of a socket that takes connections
    const line = readFileSync('/proc/net/unix', 'utf8')
      .split('\n')
      .find((text) => text.endsWith(` ${socketPath}`));
    if (line !== undefined && (Number.parseInt(line.split(' ')[3] ?? '0', 16) & 0x10000) !== 0) return;
  }
  throw new Error(`${child.process.spawnfile} does not listen after 10 s${lastWords(child.log)}`);
}

function withDescendants(pid: number): number[] {
  const children = new Map<number, number[]>();
  for (const entry of readdirSync('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    try {
      const parent = Number(
        readFileSync(`/proc/${entry}/stat`, 'utf8')
          .replace(/^.*\) \S /s, '')
          .split(' ')[0],
      );
      children.set(parent, [...(children.get(parent) ?? []), Number(entry)]);
    } catch {
      // it has just ended
    }
  }
  const found = [pid];
  for (const each of found) found.push(...(children.get(each) ?? []));
  return found;
}

/** What the processes of a daemon hold. */
export interface Footprint {
  rssBytes: number;
  openFiles: number;
  /** Times that a thread went to sleep: how often an idle daemon woke up is the difference of two. */
  switches: number;
}

export function footprint({ pids }: RunningDaemon): Footprint {
  const result = { rssBytes: 0, openFiles: 0, switches: 0 };
  for (const pid of pids) {
    result.rssBytes += statusNumber(`/proc/${pid}/status`, 'VmRSS') * 1024;
    result.openFiles += readdirSync(`/proc/${pid}/fd`).length;
    for (const thread of readdirSync(`/proc/${pid}/task`)) {
      result.switches += statusNumber(`/proc/${pid}/task/${thread}/status`, 'voluntary_ctxt_switches');
    }
  }
  return result;
}

function statusNumber(file: string, field: string): number {
  try {
    return Number(new RegExp(`^${field}:\\s+(\\d+)`, 'm').exec(readFileSync(file, 'utf8'))?.[1] ?? 0);
  } catch {
    return 0; // a thread that has just ended
  }
}
