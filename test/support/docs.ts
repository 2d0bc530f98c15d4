/**
 * The commands of a page of documentation: what stands in its ```console blocks, run as a reader would run them, in order.
 *
 * `$ ` is a command for the host, `guest# ` one for the guest that a `qemu-system-x86_64` of the page has started; a line that ends with
 * a backslash goes on in the next. Other lines are output: each must be there, in this order (`…` stands for anything).
 */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { createConnection, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { Agent } from '../../qemu/guest/agent.js';

export interface Step {
  readonly where: 'host' | 'guest';
  /** Continued lines are one text. */
  readonly command: string;
  readonly output: readonly string[];
  /** Line of the page, from 1. */
  readonly line: number;
}

/** The steps of all console blocks of a page. @throws for a block that begins with output */
export function stepsOf(page: string): Step[] {
  const steps: { where: 'host' | 'guest'; command: string; output: string[]; line: number }[] = [];
  let inside = false;
  let open: { output: string[]; command: string } | undefined;
  for (const [index, text] of readFileSync(page, 'utf8').split('\n').entries()) {
    if (text.trim().startsWith('```')) {
      inside = !inside && text.trim() === '```console';
      open = undefined;
      continue;
    }
    if (!inside) continue;
    const prompt = /^(\$|guest#) (.*)$/.exec(text);
    if (open?.command.endsWith('\\')) open.command += `\n${text}`;
    else if (prompt) {
      open = { where: prompt[1] === '$' ? 'host' : 'guest', command: prompt[2] as string, output: [], line: index + 1 } as Step & {
        output: string[];
      };
      steps.push(open as (typeof steps)[number]);
    } else if (open) open.output.push(text);
    else throw new Error(`${page}:${index + 1}: output without a command`);
  }
  // A comment behind a command is for the reader.
  return steps.map((step) => ({
    ...step,
    command: step.command.replace(/\s+# .*$/, '').trimEnd(),
    output: step.output.filter((text) => text !== ''),
  }));
}

/** A shell on the host and one in the guest. Whatever they leave running is ended by {@link end}. */
export class Reader {
  readonly #shell: ChildProcess;
  readonly #agentPath: string;
  readonly #nonce: string;
  #output = '';
  #agent: Agent | undefined;
  #channel: Socket | undefined;

  /** @param agentPath socket at which the guest's agent appears once a command has started it */
  constructor(environment: NodeJS.ProcessEnv, cwd: string, agentPath: string, nonce: string) {
    this.#agentPath = agentPath;
    this.#nonce = nonce;
    this.#shell = spawn('bash', ['--norc'], { env: environment, cwd, stdio: ['pipe', 'pipe', 'pipe'], detached: true });
    for (const stream of [this.#shell.stdout, this.#shell.stderr]) {
      stream?.setEncoding('utf8').on('data', (text: string) => {
        this.#output += text;
      });
    }
  }

  /** Runs a step and checks its status and the output that the page shows below it, which may be that of a program in the background. */
  async run({ where, command, output, line }: Step, timeoutMs: number): Promise<void> {
    const deadline = performance.now() + timeoutMs;
    const from = this.#output.length;
    const background = /&$/.test(command);
    if (where === 'host') await this.#onHost(command, from, deadline);
    else await this.#inGuest(command, background, deadline);
    // A reader takes longer than this for the next command.
    if (background) await sleep(4000);
    let missing = missingLine(output, this.#output.slice(from));
    while (missing !== undefined && performance.now() < deadline) {
      await sleep(50);
      missing = missingLine(output, this.#output.slice(from));
    }
    assert.equal(missing, undefined, `line ${line}: ${command}\nprinted\n${this.#output.slice(from)}\nbut not: ${missing}`);
  }

  async #onHost(command: string, from: number, deadline: number): Promise<void> {
    const mark = `-- end of step ${from} --`;
    // A guest would read what is typed next.
    const typed = /^make run\b/.test(command) ? `{ ${command}\n} < /dev/null` : command;
    this.#shell.stdin?.write(`${typed}\necho "${mark} $?"\n`);
    const end = new RegExp(`${mark} (\\d+)\n`);
    while (!end.test(this.#output.slice(from))) {
      assert.ok(performance.now() < deadline, `not ended in time: ${command}\n${this.#output.slice(from)}`);
      assert.equal(this.#shell.exitCode, null, `the shell ended: ${command}\n${this.#output.slice(from)}`);
      await sleep(20);
    }
    const status = Number(end.exec(this.#output.slice(from))?.[1]);
    assert.equal(status, 0, `status ${status}: ${command}\n${this.#output.slice(from)}`);
  }

  async #inGuest(command: string, background: boolean, deadline: number): Promise<void> {
    this.#agent ??= await this.#connect(deadline);
    const running = this.#agent.spawn(command.replace(/&$/, ''));
    running.on('line', ({ text }) => {
      this.#output += `${text}\n`;
    });
    if (background) return;
    const timer = setTimeout(() => running.kill('SIGKILL'), Math.max(0, deadline - performance.now()));
    const { status } = await running.ended;
    clearTimeout(timer);
    assert.equal(status, 0, `status ${status} in the guest: ${command}\n${this.#output.slice(-2000)}`);
  }

  async #connect(deadline: number): Promise<Agent> {
    while (!existsSync(this.#agentPath)) {
      assert.ok(performance.now() < deadline, `no guest was started\n${this.#output}`);
      await sleep(50);
    }
    this.#channel = createConnection(this.#agentPath);
    const agent = new Agent(this.#channel, this.#nonce, { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', HOME: '/root' });
    await Promise.race([
      agent.connected(),
      sleep(Math.max(0, deadline - performance.now()), undefined, { ref: false }).then(() =>
        assert.fail(`the guest does not answer\n${this.#output}`),
      ),
    ]);
    return agent;
  }

  /** What the host's commands have printed so far. */
  get output(): string {
    return this.#output;
  }

  /** Ends everything that was started. */
  async end(): Promise<void> {
    this.#channel?.destroy();
    const { pid } = this.#shell;
    if (pid === undefined || this.#shell.exitCode !== null) return;
    const ended = new Promise((resolve) => this.#shell.once('exit', resolve));
    // The shell is the leader of a group that its jobs share.
    process.kill(-pid, 'SIGTERM');
    this.#shell.stdin?.end();
    await Promise.race([ended, sleep(5000, undefined, { ref: false })]);
    try {
      process.kill(-pid, 'SIGKILL');
    } catch {
      // all have ended
    }
  }
}

/** The first expected line that is not in the text, in order. */
export function missingLine(expected: readonly string[], text: string): string | undefined {
  const lines = text.split(/\r?\n/);
  let at = 0;
  for (const line of expected) {
    const pattern = new RegExp(`^${line.split('…').map(escapeRegExp).join('.*')}\\s*$`);
    while (at < lines.length && !pattern.test(lines[at] as string)) at++;
    if (at++ >= lines.length) return line;
  }
  return undefined;
}

const escapeRegExp = (text: string): string => text.trimEnd().replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
