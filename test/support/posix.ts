/** The POSIX transcript program (test/guest/posix.c): built once, run on the host as the reference. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const source = fileURLToPath(new URL('../../../../test/guest/posix.c', import.meta.url));

/** Compiles the program, statically, so that it runs in any guest. */
export function buildPosix(into: string, compiler = 'gcc'): string {
  const program = join(into, 'posix');
  execFileSync(compiler, ['-O1', '-static', '-Wall', '-Wno-unused-result', '-Wno-format-truncation', '-o', program, source]);
  return program;
}

/** A share for the program: an empty directory `work`, and `small`, a tmpfs of 8 MiB that it may fill. */
export function makeShare(directory: string): void {
  mkdirSync(join(directory, 'work'), { recursive: true });
  mkdirSync(join(directory, 'small'));
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=8m', 'small', join(directory, 'small')]);
}

export function removeShare(directory: string): void {
  execFileSync('umount', [join(directory, 'small')]);
  rmSync(directory, { recursive: true, force: true });
}

/** The transcript of the host's own file system at `directory` (made by {@link makeShare}), line by line. */
export function hostTranscript(program: string, directory: string): string[] {
  return execFileSync(program, [join(directory, 'work'), join(directory, 'small')], { encoding: 'utf8' }).split('\n');
}

/** Lines by step ("section.step"); a step that says several things keeps them in their order. */
function bySteps(lines: readonly string[]): Map<string, string> {
  const steps = new Map<string, string>();
  for (const line of lines) {
    const colon = line.indexOf(':');
    const step = line.slice(0, colon);
    const before = steps.get(step);
    const text = line.slice(colon + 2);
    steps.set(step, before === undefined ? text : `${before}; ${text}`);
  }
  return steps;
}

/**
 * Compares two transcripts.
 * @param except steps that are known to differ, each with what the guest says instead
 * @returns a line for each difference
 */
export function differences(host: readonly string[], guest: readonly string[], except: Readonly<Record<string, string>> = {}): string[] {
  const expected = bySteps(host);
  for (const [step, text] of Object.entries(except)) expected.set(step, text);
  const found = bySteps(guest);
  const steps = new Set([...expected.keys(), ...found.keys()]);
  return [...steps]
    .filter((step) => expected.get(step) !== found.get(step))
    .map((step) => `${step}: host ${expected.get(step) ?? '(nothing)'}, guest ${found.get(step) ?? '(nothing)'}`);
}
