/** For programs that try something out in guests and say how it went. */
import { execFileSync } from 'node:child_process';
import path from 'node:path';
import { repository } from './guest/daemon.js';

let failures = 0;

/** Says whether something is as it must be. */
export function check(what: string, good: boolean, seen: string): void {
  if (!good) failures++;
  console.log(`  ${good ? 'ok  ' : 'FAIL'} ${what}: ${seen}`);
}

/** The last line, and the status of this process. */
export function conclude(): void {
  console.log(failures ? `${failures} failed` : 'all as it must be');
  process.exitCode = failures ? 1 : 0;
}

/** Runs one of the scripts of this folder; returns the line that it prints. */
export function script(name: string, ...args: string[]): string {
  return execFileSync(path.join(repository, 'qemu', name), args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] }).trim();
}
