/** The POSIX transcript program (test/guest/posix.c): built once, run on the host as the reference. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const source = fileURLToPath(new URL('../../../../test/guest/posix.c', import.meta.url));

/** Compiles the program, statically, so that it runs in any guest. */
export function buildPosix(into: string): string {
  const program = join(into, 'posix');
  execFileSync('gcc', ['-O1', '-static', '-Wall', '-Wno-unused-result', '-Wno-format-truncation', '-o', program, source]);
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

/**
 * Compares two transcripts.
 * @param except steps that are known to differ, each with what the guest says instead
 */
export function differences(host: readonly string[], guest: readonly string[], except: Readonly<Record<string, string>> = {}): string[] {
  const step = (line: string) => line.slice(0, line.indexOf(':'));
  const expected = host.map((line) => {
    const instead = except[step(line)];
    return instead === undefined ? line : `${step(line)}: ${instead}`;
  });
  const found: string[] = [];
  for (let i = 0; i < Math.max(expected.length, guest.length); i++) {
    if (expected[i] !== guest[i]) found.push(`host: ${expected[i] ?? '(nothing)'}   guest: ${guest[i] ?? '(nothing)'}`);
  }
  return found;
}
