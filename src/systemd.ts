/** What systemd hands over at the start (sd_listen_fds(3)), and what it is told meanwhile (sd_notify(3)). */
import { writeSync } from 'node:fs';
import { cString, native } from 'vhost-user-ts/native';
import { UsageError } from './options.js';

const FIRST_PASSED = 3;

/** Environment variables that are for this process alone. */
export const SYSTEMD_VARIABLES = ['LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES', 'NOTIFY_SOCKET'];

/**
 * The socket that a .socket unit passed; undefined when none did.
 * @throws UsageError when there are several
 */
export function passedSocket(env: NodeJS.ProcessEnv, pid: number = process.pid): number | undefined {
  if (env['LISTEN_PID'] !== String(pid)) return undefined;
  const count = Number(env['LISTEN_FDS'] ?? 0);
  if (count > 1) throw new UsageError(`systemd passes ${count} sockets, one is needed: leave one ListenStream= in the .socket unit`);
  return count === 1 ? FIRST_PASSED : undefined;
}

/** A connection to the service manager that started us; -1 when none asked for it. */
export function openNotify(env: NodeJS.ProcessEnv): number {
  const path = env['NOTIFY_SOCKET'];
  if (path === undefined || path === '') return -1;
  const fd = native.unixDatagram(cString(path));
  return fd < 0 ? -1 : fd;
}

/** Tells the service manager how things are: `READY=1`, `STATUS=…`; without one nothing happens. */
export class ServiceManager {
  readonly #fd: number;

  /** @param fd of {@link openNotify} */
  constructor(fd: number) {
    this.#fd = fd;
  }

  tell(...assignments: readonly string[]): void {
    if (this.#fd < 0) return;
    try {
      writeSync(this.#fd, assignments.join('\n'));
    } catch {
      // It was started anew or takes no more: the next word may arrive.
    }
  }
}
