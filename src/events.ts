/** `virtiofsd-ts events`: shows live what a guest watches and which file events it was sent, from a daemon's metrics address. */
import { writeSync } from 'node:fs';
import { get, type IncomingMessage } from 'node:http';
import { createInterface } from 'node:readline';
import { type MetricsAddress, metricsAddress } from './config.js';
import { escapeText } from './log.js';
import { UsageError } from './options.js';

const USAGE = 'virtiofsd-ts events ADDRESS [--json]: ADDRESS is what the daemon was given as --metrics (unix:PATH or HOST:PORT)';

/** A line of the daemon's feed (watch/feed.ts). */
interface FeedLine {
  time?: string;
  watch?: string;
  mask?: string;
  errno?: number;
  event?: string;
  path?: string;
  sent?: string;
  lost?: string;
}

/**
 * Prints lines until the daemon ends or the reader of our output goes.
 * @returns the exit status
 * @throws UsageError
 */
export async function events(argv: readonly string[]): Promise<number> {
  let json = false;
  let address: MetricsAddress | undefined;
  for (const argument of argv) {
    if (argument === '--json') json = true;
    else if (argument === '--help' || argument === '-h') {
      writeSync(1, `${USAGE}\n`);
      return 0;
    } else if (argument.startsWith('-') && !argument.startsWith('--socket='))
      throw new UsageError(`events: ${argument} is no option: ${USAGE}`);
    else if (address !== undefined) throw new UsageError(`events: one address is enough: ${USAGE}`);
    else address = metricsAddress(argument.startsWith('--socket=') ? `unix:${argument.slice('--socket='.length)}` : argument);
  }
  if (address === undefined) throw new UsageError(USAGE);
  const response = await connect(address);
  if (response.statusCode !== 200)
    throw new UsageError('events: no virtiofsd-ts with file events answers there (is it run with --fsnotify=off?)');
  process.stdout.on('error', () => process.exit(0));
  for await (const line of createInterface({ input: response })) {
    process.stdout.write(`${json ? line : human(JSON.parse(line) as FeedLine)}\n`);
  }
  return 0;
}

function connect(address: MetricsAddress): Promise<IncomingMessage> {
  const where = 'path' in address ? { socketPath: address.path } : { host: address.host, port: address.port };
  return new Promise((resolve, reject) => {
    get({ ...where, path: '/events' }, resolve).on('error', (error: NodeJS.ErrnoException) =>
      reject(new UsageError(`events: nobody answers there (${error.code ?? error.message}): give the daemon's --metrics address`)),
    );
  });
}

/** `12:00:00.000  MODIFY            src/main.c` */
function human({ time, watch, mask, errno, event, path, sent, lost }: FeedLine): string {
  const clock = time === undefined ? '' : localTime(new Date(time));
  if (lost !== undefined) return `${clock}  ${lost}`;
  if (sent !== undefined) return `${clock}  cache    ${sent}`;
  if (event !== undefined) return `${clock}  event    ${event.padEnd(20)} ${escapeText(path ?? '')}`;
  const what = errno !== undefined ? `refused (errno ${errno})` : mask === '0' ? 'ends' : mask;
  return `${clock}  watch    ${escapeText(watch ?? '')}: ${what}`;
}

/** `12:00:00.000` */
function localTime(date: Date): string {
  return `${date.toTimeString().slice(0, 8)}.${String(date.getMilliseconds()).padStart(3, '0')}`;
}
