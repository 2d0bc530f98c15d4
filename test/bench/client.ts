/** The native front end (client.cc): one process per daemon, commands in, lines of JSON out. */
import path from 'node:path';
import { repository } from '../../qemu/guest/daemon.js';
import { type Child, describeEnd, lastWords, startChild } from '../../qemu/guest/process.js';

export const clientProgram = path.join(repository, 'build/bench-client');

/** What one run measured; times in ns. */
export interface Sample {
  /** Whole operations: a cycle is one of them, of several requests. */
  operations: number;
  requests: number;
  /** Wall time. */
  ns: number;
  p50: number;
  p99: number;
  p999: number;
  max: number;
  /** CPU time of all threads of the daemon. */
  daemonCpu: number;
  clientCpu: number;
  kicks: number;
  interrupts: number;
  /** Directory entries, or cold reads. */
  entries: number;
  /** Replies that were wrong. */
  errors: number;
  firstError: string;
}

export interface ClientOptions {
  socketPath: string;
  shareDir: string;
  pids: number[];
  queues: number;
  eventIdx: boolean;
  /** Against the back end that does nothing: no FUSE session. */
  nothing?: boolean;
  /** The session agrees on remote fsnotify. */
  events?: boolean;
}

type Values = Record<string, string | number>;
const words = (values: Values): string =>
  Object.entries(values)
    .map(([name, value]) => `${name}=${value}`)
    .join(' ');

export class Client {
  readonly #child: Child;
  /** Takes the answer to the command that is under way. */
  #answered: ((line: string) => void) | undefined;

  private constructor(args: string[]) {
    this.#child = startChild(clientProgram, args, {
      stdio: ['pipe', 'pipe', 'pipe'],
      onLine: (line, stream) => {
        if (stream === 'stdout') this.#answered?.(line);
      },
    });
  }

  /** Connects to a daemon and mounts, so to speak: INIT is done. */
  static async connect(options: ClientOptions): Promise<Client> {
    const values = {
      share: options.shareDir,
      pids: options.pids.join(','),
      queues: options.queues,
      'event-idx': Number(options.eventIdx),
      // On a processor of its own, as a guest's vCPU is: the daemon then has the others.
      cpu: 1,
      null: Number(options.nothing ?? false),
      fsnotify: Number(options.events ?? false),
    };
    const client = new Client([options.socketPath, ...words(values).split(' ')]);
    await client.#answer('connect');
    return client;
  }

  /** Runs an operation. */
  async run(operation: string, values: Values = {}): Promise<Sample> {
    return JSON.parse(await this.#ask(`run ${operation} ${words(values)}`)) as Sample;
  }

  /** Measures events of the host. Buffers stay lent afterwards: only `events host` may follow. */
  async events(what: 'latency' | 'rate' | 'drain' | 'host', values: Values): Promise<Record<string, number>> {
    return JSON.parse(await this.#ask(`events ${what} ${words(values)}`)) as Record<string, number>;
  }

  /** CPU time of the host's system call that serves a request, in ns, without any daemon. */
  async bare(call: string, values: Values): Promise<number> {
    return (JSON.parse(await this.#ask(`bare ${call} ${words(values)}`)) as { ns: number }).ns;
  }

  /** Makes the host forget a file's cached pages. */
  async drop(file: string): Promise<void> {
    await this.#ask(`drop ${file}`);
  }

  /** Makes the host cache all of a file. */
  async warm(file: string): Promise<void> {
    await this.#ask(`warm ${file}`);
  }

  async close(): Promise<void> {
    this.#child.process.stdin?.end();
    await this.#child.exited;
  }

  async #ask(line: string): Promise<string> {
    const answer = this.#answer(line);
    this.#child.process.stdin?.write(`${line}\n`);
    return answer;
  }

  #answer(question: string): Promise<string> {
    return new Promise((resolve, reject) => {
      this.#answered = resolve;
      void this.#child.exited.then((end) => {
        reject(new Error(`${question}: the client ended with ${describeEnd(end)}${lastWords(this.#child.log)}`));
      });
    });
  }
}
