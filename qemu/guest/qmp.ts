/** A client of QEMU's machine protocol, as far as guests need it. */
import type { Duplex } from 'node:stream';
import { GuestError } from './agent.js';

interface Reply {
  id?: number;
  return?: unknown;
  error?: { desc: string };
}

export class Qmp {
  readonly #stream: Duplex;
  readonly #pending = new Map<number, { resolve: (value: unknown) => void; reject: (error: Error) => void }>();
  readonly #ready: Promise<unknown>;
  #nextId = 1;
  #partial = '';

  constructor(stream: Duplex) {
    this.#stream = stream;
    stream.setEncoding('utf8');
    stream.on('data', (text: string) => this.#take(text));
    stream.on('error', () => {});
    stream.on('close', () => {
      for (const { reject } of this.#pending.values()) reject(new GuestError('QEMU is gone'));
      this.#pending.clear();
    });
    this.#ready = this.#send('qmp_capabilities');
    this.#ready.catch(() => {});
  }

  /** Runs one command, such as `stop`, and returns what it returns. */
  async execute(command: string, args?: Record<string, unknown>): Promise<unknown> {
    await this.#ready;
    return this.#send(command, args);
  }

  #send(command: string, args?: Record<string, unknown>): Promise<unknown> {
    return new Promise((resolve, reject) => {
      if (this.#stream.destroyed) return reject(new GuestError('QEMU is gone'));
      const id = this.#nextId++;
      this.#pending.set(id, { resolve, reject });
      this.#stream.write(`${JSON.stringify({ execute: command, ...(args ? { arguments: args } : {}), id })}\n`);
    });
  }

  #take(text: string): void {
    const lines = (this.#partial + text).split('\n');
    this.#partial = lines.pop() ?? '';
    for (const line of lines) {
      if (!line.trim()) continue;
      const reply = JSON.parse(line) as Reply;
      const pending = reply.id === undefined ? undefined : this.#pending.get(reply.id);
      if (reply.id === undefined || !pending) continue; // the greeting, an event
      this.#pending.delete(reply.id);
      if (reply.error) pending.reject(new GuestError(`QEMU: ${reply.error.desc}`));
      else pending.resolve(reply.return);
    }
  }
}
