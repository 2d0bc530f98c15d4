/**
 * What the daemon has before the rest of the program is loaded (which takes as long again): log, signals and the socket that
 * whoever starts us waits for. A client that comes early waits in the socket's queue, a signal in its eventfd.
 */
import { constants } from 'node:os';
import { cString, native } from 'vhost-user-ts/native';
import type { Config } from './config.js';
import { ListeningSocket } from './listen.js';
import { log, syslogSink } from './log.js';
import { PROGRAM } from './options.js';
import { StartError } from './starterror.js';

const { SIGHUP, SIGINT, SIGTERM, SIGUSR1 } = constants.signals;

export interface Started {
  readonly socket: ListeningSocket;
  /** Eventfd that SIGTERM, SIGINT and SIGHUP write to: the daemon ends. */
  readonly end: number;
  /** Eventfd of SIGUSR1: the next log level. */
  readonly level: number;
}

/** @throws StartError for what the user can put right */
export function start(config: Config): Started {
  openLog(config);
  const end = native.eventfd(0);
  for (const signal of [SIGTERM, SIGINT, SIGHUP]) native.signalToEventfd(signal, end);
  const level = native.eventfd(0);
  native.signalToEventfd(SIGUSR1, level);
  const socket = new ListeningSocket(config.listenOn);
  process.once('exit', () => socket.close()); // also when the rest of the start fails
  return { socket, end, level };
}

function openLog({ logLevel, syslog }: Config): void {
  if (!syslog) {
    log.configure({ level: logLevel });
    return;
  }
  const sink = syslogSink(PROGRAM, () => native.unixDatagram(cString('/dev/log')));
  if (typeof sink === 'number') throw new StartError('--syslog: no system log listens at /dev/log: start one or leave the option out');
  log.configure({ level: logLevel, format: 'bare', sink });
}
