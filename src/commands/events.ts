/** `virtiofsd-ts events`: shows live what a guest watches and which file events it was sent, from a daemon's metrics address. */
import { createInterface } from 'node:readline';
import { escapeText } from '../log.js';
import { type CommandSpec, UsageError } from '../options.js';
import { commandArguments, get } from './command.js';

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
export async function events(command: CommandSpec, argv: readonly string[]): Promise<number> {
  const given = commandArguments(command, argv);
  if (given === undefined) return 0;
  const response = await get(command, given.argument as string, '/events');
  if (response.statusCode !== 200)
    throw new UsageError('events: no virtiofsd-ts with file events answers there (is it run with --fsnotify=off?)');
  process.stdout.on('error', () => process.exit(0));
  for await (const line of createInterface({ input: response })) {
    process.stdout.write(`${given.options['json'] ? line : human(JSON.parse(line) as FeedLine)}\n`);
  }
  return 0;
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
