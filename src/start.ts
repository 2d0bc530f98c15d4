/**
 * What the daemon has before the rest of the program is loaded (which takes as long again): log, signals and the socket that
 * whoever starts us waits for. A client that comes early waits in the socket's queue, a signal in its eventfd.
 */
import { constants } from 'node:os';
import { cString, native } from 'vhost-user-ts/native';
import { type Config, needsSandbox } from './config.js';
import { ListeningSocket } from './listen.js';
import { log, syslogSink } from './log.js';
import { PROGRAM, UsageError } from './options.js';
import type { Handover } from './sandbox.js';
import { StartError } from './starterror.js';
import { openNotify } from './systemd.js';

const { ENOTCONN } = constants.errno;
const { SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2 } = constants.signals;

export interface Started {
  readonly socket: ListeningSocket;
  /** Eventfd that SIGTERM, SIGINT and SIGHUP write to: the daemon ends. */
  readonly end: number;
  /** Eventfd of SIGUSR1: the next log level. */
  readonly level: number;
  /** Connection to systemd, -1 when it does not wait for word. */
  readonly notify: number;
  /** Socket of the system log, -1 when the log goes elsewhere. */
  readonly syslog: number;
}

/**
 * @param sandbox what was made outside the sandbox that we are in
 * @throws StartError, UsageError for what the user can put right
 */
export function start(config: Config, sandbox?: Handover): Started {
  if (sandbox === undefined && config.sandbox === 'chroot' && process.geteuid?.() !== 0)
    throw new UsageError('--sandbox=chroot is for root: use --sandbox=namespace, which needs no privileges, or none');
  const syslog = openLog(config, sandbox);
  const end = native.eventfd(0);
  for (const signal of [SIGTERM, SIGINT, SIGHUP]) native.signalToEventfd(signal, end);
  const level = native.eventfd(0);
  native.signalToEventfd(SIGUSR1, level);
  // Without the launcher nobody starts another worker.
  if (!needsSandbox(config)) native.signalToEventfd(SIGUSR2, native.eventfd(0));
  const socket = new ListeningSocket(config.listenOn, sandbox?.listen);
  process.once('exit', () => socket.close()); // also when the rest of the start fails
  return { socket, end, level, syslog, notify: sandbox === undefined ? openNotify(process.env) : (sandbox.notify ?? -1) };
}

function openLog({ logLevel, logFormat, syslog }: Config, sandbox: Handover | undefined): number {
  const pid = sandbox?.pid ?? process.pid;
  if (!syslog) {
    log.configure({ level: logLevel, format: logFormat === 'json' ? 'json' : 'human', pid });
    return -1;
  }
  const first = sandbox?.syslog ?? native.unixDatagram(cString('/dev/log'));
  let fd = first;
  const connect = () => {
    const result = fd;
    // In the sandbox there is no way to another one, when the log daemon is started anew.
    fd = -ENOTCONN;
    return result === -ENOTCONN && sandbox === undefined ? native.unixDatagram(cString('/dev/log')) : result;
  };
  const sink = syslogSink(PROGRAM, connect, pid);
  if (typeof sink === 'number') throw new StartError('--syslog: no system log listens at /dev/log: start one or leave the option out');
  log.configure({ level: logLevel, format: logFormat === 'json' ? 'json' : 'bare', sink, pid });
  return first;
}
