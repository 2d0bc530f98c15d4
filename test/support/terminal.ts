/** A program at a terminal of its own (script(1)), for tests that type and look at what comes. */
import assert from 'node:assert/strict';
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { setTimeout as sleep } from 'node:timers/promises';

export class Terminal {
  readonly process: ChildProcessWithoutNullStreams;
  /** Everything that came, control sequences and all. */
  output = '';
  status: number | null | undefined;

  /** @param command for the shell */
  constructor(command: string, env: NodeJS.ProcessEnv = {}) {
    this.process = spawn('script', ['-qefc', command, '/dev/null'], { env: { ...process.env, ...env }, cwd: '/' });
    this.process.stdout.setEncoding('utf8').on('data', (text) => {
      this.output += text;
    });
    this.process.on('close', (status) => {
      this.status = status;
    });
    this.process.stdin.on('error', () => {}); // the program has ended
  }

  type(text: string): void {
    this.process.stdin.write(text);
  }

  /** Waits for text that comes after the first `from` characters; the match. */
  async until(pattern: RegExp, from = 0, timeout = 20_000): Promise<RegExpExecArray> {
    for (const end = performance.now() + timeout; ; await sleep(5)) {
      const match = pattern.exec(this.output.slice(from));
      if (match !== null) return match;
      if (performance.now() > end || this.status !== undefined)
        assert.fail(`${pattern} does not come: ${JSON.stringify(this.output.slice(-2000))}`);
    }
  }

  /** Waits for its end; the exit status. */
  async end(timeout = 20_000): Promise<number | null> {
    for (const end = performance.now() + timeout; this.status === undefined; await sleep(5)) {
      if (performance.now() > end) assert.fail(`does not end: ${JSON.stringify(this.output.slice(-2000))}`);
    }
    return this.status;
  }

  [Symbol.dispose](): void {
    this.process.kill('SIGKILL');
  }
}
