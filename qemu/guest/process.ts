/** Child processes that never outlive their parent. */
import { type ChildProcess, type StdioOptions, spawn } from 'node:child_process';

/** How a process ended. */
export interface ProcessEnd {
  status: number | null;
  signal: NodeJS.Signals | null;
}

export interface Child {
  readonly process: ChildProcess;
  readonly pid: number;
  /** Resolves when it has ended; a program that cannot be started ends with status 127. */
  readonly exited: Promise<ProcessEnd>;
  /** The last lines of its stderr (and of its stdout, if that is a pipe and `onLine` is given). */
  readonly log: string[];
  /** SIGTERM, after `graceMs` SIGKILL, to all its processes. Resolves when it has ended. */
  stop(graceMs?: number): Promise<ProcessEnd>;
}

const running = new Set<ChildProcess>();
process.on('exit', () => {
  for (const child of running) signalGroup(child, 'SIGKILL');
});

export interface ChildOptions {
  stdio: StdioOptions;
  /** A folder to remove if we are killed. */
  folder?: string | undefined;
  env?: NodeJS.ProcessEnv;
  onLine?: ((line: string, stream: 'stdout' | 'stderr') => void) | undefined;
}

/**
 * Starts a program in a process group of its own, so that a terminal's ^C reaches only us. If we are killed, the group is
 * killed too: a shell waits for the end of a pipe that only we hold. (A parent-death signal would reach just the first of
 * the processes that User Mode Linux consists of.)
 */
export function startChild(program: string, args: string[], { stdio, folder = '', env, onLine }: ChildOptions): Child {
  const child = spawn(program, args, { stdio, detached: true, ...(env ? { env } : {}) });
  running.add(child);
  const watch = spawn('sh', ['-c', 'read -r _; kill -KILL "-$0"; rm -rf "$1"', String(child.pid), folder], {
    stdio: ['pipe', 'ignore', 'ignore'],
    detached: true,
  });
  child.on('exit', () => {
    watch.kill('SIGKILL');
    killGroup(child.pid, 'SIGKILL'); // what it left behind
  });
  const log: string[] = [];
  for (const stream of ['stdout', 'stderr'] as const) {
    let partial = '';
    child[stream]?.setEncoding('utf8').on('data', (text: string) => {
      const parts = (partial + text).split(/\r*\n/);
      partial = parts.pop() ?? '';
      for (const line of parts) {
        log.push(line);
        if (log.length > 4000) log.splice(0, 1000);
        onLine?.(line, stream);
      }
    });
  }
  const exited = new Promise<ProcessEnd>((resolve) => {
    // 'close' comes after the last output.
    child.on('close', (status, signal) => {
      running.delete(child);
      resolve({ status, signal });
    });
    child.on('error', (error) => {
      log.push(error.message);
      watch.kill('SIGKILL');
      running.delete(child);
      resolve({ status: 127, signal: null });
    });
  });
  return {
    process: child,
    pid: child.pid ?? 0,
    exited,
    log,
    async stop(graceMs = 5000) {
      signalGroup(child, 'SIGTERM');
      const timer = setTimeout(() => signalGroup(child, 'SIGKILL'), graceMs);
      const end = await exited;
      clearTimeout(timer);
      return end;
    },
  };
}

function signalGroup(child: ChildProcess, signal: NodeJS.Signals): void {
  if (child.exitCode === null && child.signalCode === null) killGroup(child.pid, signal);
}

function killGroup(leader: number | undefined, signal: NodeJS.Signals): void {
  if (leader === undefined) return; // it could not be started
  try {
    process.kill(-leader, signal);
  } catch {
    // all of it has ended
  }
}

/** For messages: "status 1" or "SIGSEGV". */
export function describeEnd({ status, signal }: ProcessEnd): string {
  return signal ?? `status ${status}`;
}

/** For messages: the last line of a log, as an addition to a sentence; of an uncaught exception, the line that names it. */
export function lastWords(log: string[]): string {
  const line = log.slice(-20).findLast((text) => /^\w*Error\b.*:/.test(text)) ?? log.findLast((text) => text.trim() !== '');
  return line ? `; its last line: ${line.trim()}` : '; it said nothing';
}

/** Rejects with `error()` if `promise` is not settled in time. */
export async function withTimeout<T>(promise: Promise<T>, timeoutMs: number, error: () => Error): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  try {
    return await Promise.race([
      promise,
      new Promise<never>((_, reject) => {
        timer = setTimeout(() => reject(error()), timeoutMs);
      }),
    ]);
  } finally {
    clearTimeout(timer);
  }
}
