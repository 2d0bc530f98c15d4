/** Programs that watch files (test/guest/fsnotify.c) in a guest and on the host, side by side. */
import { execFileSync, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import type { Guest } from '../../qemu/guest.js';

const source = fileURLToPath(new URL('../../../../test/guest/fsnotify.c', import.meta.url));

/** Where guests get the program. */
export const PROGRAM = '/bin/fsnotify';

/** Compiles the program, statically, so that it runs in any guest. */
export function buildFsnotify(into: string, compiler = 'gcc'): string {
  const program = `${into}/fsnotify`;
  execFileSync(compiler, ['-O2', '-static', '-Wall', '-Wextra', '-Werror', '-o', program, source]);
  return program;
}

/** A running watcher: its lines, in order, and commands to it. */
export class Watcher {
  /** What no `until` has taken yet. */
  readonly lines: string[] = [];
  #wake: (() => void)[] = [];
  #ended: string | undefined;
  readonly #write: (text: string) => void;
  readonly #end: () => void;

  private constructor(write: (text: string) => void, end: () => void) {
    this.#write = write;
    this.#end = end;
  }

  /** `program` (of {@link buildFsnotify}) with these arguments, here. */
  static onHost(program: string, ...args: string[]): Watcher {
    const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'inherit'] });
    const watcher = new Watcher(
      (text) => child.stdin.write(text),
      () => child.kill(),
    );
    createInterface({ input: child.stdout }).on('line', (line) => watcher.#take(line));
    child.on('exit', (code, signal) => watcher.#over(`it ended (${signal ?? code})`));
    return watcher;
  }

  /** A command in a guest. */
  static inGuest(guest: Guest, command: string): Watcher {
    const running = guest.spawn(`exec ${command}`);
    const watcher = new Watcher(
      (text) => void running.write(text),
      () => running.kill(),
    );
    running.on('line', ({ text }) => {
      running.lines.length = 0;
      watcher.#take(text);
    });
    running.ended.then(
      ({ status }) => watcher.#over(`it ended (status ${status})`),
      (error: Error) => watcher.#over(error.message),
    );
    return watcher;
  }

  /** Takes the lines up to one that is or matches `last`; that one is taken, too, and is the last of the result. */
  async until(last: string | RegExp, timeoutMs = 20_000): Promise<string[]> {
    const is = (line: string) => (typeof last === 'string' ? line === last : last.test(line));
    const deadline = Date.now() + timeoutMs;
    let looked = 0;
    for (;;) {
      for (; looked < this.lines.length; looked++) if (is(this.lines[looked] as string)) return this.lines.splice(0, looked + 1);
      const left = deadline - Date.now();
      if (left <= 0 || this.#ended !== undefined) {
        throw new Error(`no line ${last} ${this.#ended ?? `in ${timeoutMs} ms`}; the last ones: ${JSON.stringify(this.lines.slice(-5))}`);
      }
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, left);
        this.#wake.push(() => {
          clearTimeout(timer);
          resolve();
        });
      });
    }
  }

  /** Waits for the first line of a program that says when it watches. */
  async ready(timeoutMs?: number): Promise<string> {
    const lines = await this.until(/^(= |cannot)/, timeoutMs);
    const line = lines.at(-1) as string;
    if (!line.startsWith('= ')) throw new Error(line);
    return line;
  }

  /** Gives it a command. @returns 0 or the errno; lines before the answer stay to be taken */
  async command(text: string): Promise<number> {
    this.#write(`${text}\n`);
    const before = await this.until(/^= \d+$/);
    const answer = before.pop() as string;
    this.lines.unshift(...before);
    return Number(answer.slice(2));
  }

  close(): void {
    this.#end();
  }

  #take(line: string): void {
    this.lines.push(line);
    for (const wake of this.#wake.splice(0)) wake();
  }

  #over(how: string): void {
    this.#ended = how;
    for (const wake of this.#wake.splice(0)) wake();
  }
}
