/** A machine inside this one with systemd as its first process (machine.sh): for what is installed and started as on a real one. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

/** This file is compiled to build/js/test/support. */
const SCRIPT = fileURLToPath(new URL('../../../../test/support/machine.sh', import.meta.url));

export class Machine {
  readonly process: ChildProcess;
  #log = '';
  #pid = 0;

  private constructor(hidden: readonly string[], root: string, changed: boolean) {
    this.process = spawn(SCRIPT, hidden, {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ROOT: root, CHANGED: changed ? '1' : '' },
    });
    for (const stream of [this.process.stdout, this.process.stderr])
      stream?.setEncoding('utf8').on('data', (text) => {
        this.#log += text;
      });
  }

  /**
   * Starts one and waits until systemd has started what it starts.
   *
   * @param hidden folders of the host that are empty in it
   * @param root a folder with the files of another Debian, which stay as they are
   * @param changed unless it is its own folder, which is changed
   */
  static async start(hidden: readonly string[] = [], root = '/', changed = false): Promise<Machine> {
    const machine = new Machine(hidden, root, changed);
    const end = performance.now() + 60_000;
    while (machine.#pid === 0 || machine.run('systemctl', 'is-system-running').stdout !== 'running\n') {
      if (performance.now() > end || machine.process.exitCode !== null) throw new Error(`the machine does not start: ${machine.#log}`);
      machine.#pid ||= firstProcess(machine.process.pid as number);
      await sleep(50);
    }
    return machine;
  }

  /** Where its files are, seen from outside. */
  get root(): string {
    return `/proc/${this.#pid}/root`;
  }

  /** The arguments of nsenter(1) for a program in it, whose environment is as after booting. */
  enter(...command: readonly string[]): string[] {
    const into = `-t ${this.#pid} -m -p -C -u -i -r -w env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8`;
    return [...into.split(' '), ...command];
  }

  /** Runs a program in it. */
  run(program: string, ...args: readonly string[]) {
    return spawnSync('nsenter', this.enter(program, ...args), { encoding: 'utf8', cwd: '/', timeout: 120_000 });
  }

  /** The same, and it must succeed; what it wrote. */
  must(program: string, ...args: readonly string[]): string {
    const { status, stdout, stderr } = this.run(program, ...args);
    if (status !== 0)
      throw new Error(`${program} ${args.join(' ')}: ${status}\n${stdout}${stderr}\n${this.run('journalctl', '-n', '30').stdout}`);
    return stdout;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.process.kill('SIGTERM');
    if (this.process.exitCode === null) await new Promise((done) => this.process.once('exit', done));
  }
}

/** The systemd below a process; 0 as long as there is none. */
function firstProcess(pid: number): number {
  for (let at = pid; ; ) {
    try {
      if (readFileSync(`/proc/${at}/cmdline`, 'utf8').startsWith('/lib/systemd/systemd\0')) return at;
      const [child] = readFileSync(`/proc/${at}/task/${at}/children`, 'utf8').split(' ');
      if (child === undefined || child === '') return 0;
      at = Number(child);
    } catch {
      return 0;
    }
  }
}
