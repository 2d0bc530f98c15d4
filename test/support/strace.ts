/** Exact counts of system calls: a program of ours runs under strace, with markers between its steps. */
import { execFileSync, spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import * as os from 'node:os';
import * as path from 'node:path';
import { native } from 'vhost-user-ts/native';

export const hasStrace = spawnSync('strace', ['-V']).status === 0;

/** Calls of the runtime that can fall between: garbage collection and timers. */
const NOISE = /^(mmap|munmap|mprotect|madvise|futex|brk|sched_yield|clock_|gettimeofday|getpid|rt_sig)/;
const STEP = -1000;
const PAUSE = -999;

/** In the program: what follows is step `number` (1, 2, 3 ...); a call to close(2) of no descriptor says so. */
export function stepBegins(number: number): void {
  native.close(STEP - number);
}

/** In the program: what follows belongs to no step. */
export function stepEnds(): void {
  native.close(PAUSE);
}

/**
 * Runs a compiled program under strace.
 * @param others calls that also count in other threads than the first one; the runtime's threads have their own
 * @returns what it has printed, and the calls of each step in strace's words, the first step's at index 1
 */
export function traceSteps(program: string, args: string[], others?: RegExp): { stdout: string; steps: string[][] } {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'strace-'));
  try {
    const trace = path.join(folder, 'trace');
    const command = [...(others === undefined ? [] : ['-f']), '-o', trace, process.execPath, program, ...args];
    const stdout = execFileSync('strace', command, { encoding: 'utf8' });
    let main: string | undefined;
    const steps: string[][] = [];
    let current: string[] | undefined;
    for (const text of fs.readFileSync(trace, 'utf8').split('\n')) {
      const [, thread = '', line = ''] = /^(\d*) *(.*)/.exec(text) ?? [];
      main ??= thread;
      if (thread !== main && !others?.test(line)) continue;
      // Not up to its result: another thread's call can come between ("<unfinished ...>").
      const marker = /^close\((-?\d+)/.exec(line);
      const number = marker ? Number(marker[1]) | 0 : 0;
      if (number === PAUSE) current = undefined;
      else if (number < STEP) {
        current = [];
        steps[STEP - number] = current;
      } else if (current && line !== '' && !NOISE.test(line) && !/^(---|\+\+\+|<\.\.\.)/.test(line)) current.push(line);
    }
    return { stdout, steps };
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
