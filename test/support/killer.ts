/** Kills the daemon's workers again and again, from a process of its own: a test that waits for replies cannot. */
import { type ChildProcess, spawn } from 'node:child_process';
import type { TestDaemon } from './daemon.js';

/**
 * $1: the workers' parent; $2: the daemon's log; $3: most milliseconds that a worker serves. Four of five are killed after they have
 * begun to serve, one while it starts. One line for each.
 */
const SCRIPT = `
exec 2>/dev/null
begun() { grep -c 'goes on after\\|sharing' "$2"; }
last=0
while [ -e "/proc/$1" ]; do
  if [ $((RANDOM % 5)) != 0 ]; then until [ "$(begun "$@")" -gt "$last" ]; do sleep 0.02; done; fi
  last=$(begun "$@")
  sleep "$((RANDOM * $3 / 32768))e-3"
  for pid in $(cat "/proc/$1/task/$1/children"); do
    if tr '\\0' '\\n' < "/proc/$pid/cmdline" | grep -q '/main\\.js$'; then kill -9 "$pid" && echo "$pid"; fi
  done
done`;

/** Kills until it is stopped. */
export class Killer {
  readonly #process: ChildProcess;
  #kills = 0;

  /** @param most milliseconds that a worker serves */
  constructor(daemon: TestDaemon, most: number) {
    const parent = String(daemon.launchers.at(-1));
    this.#process = spawn('bash', ['-c', SCRIPT, 'killer', parent, `${daemon.folder}/log`, String(most)], {
      stdio: ['ignore', 'pipe', 'inherit'],
      cwd: '/',
    });
    this.#process.stdout?.on('data', (text: Buffer) => {
      this.#kills += text.toString().split('\n').length - 1;
    });
  }

  /** Ends it. @returns how many it has killed */
  async stop(): Promise<number> {
    const ended = new Promise((done) => this.#process.once('close', done));
    this.#process.kill('SIGKILL');
    await ended;
    return this.#kills;
  }
}
