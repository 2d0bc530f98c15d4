/** `virtiofsd-ts top`: what a daemon does, live, from its metrics address: two scrapes and what has changed between them. */
import { setTimeout as sleep } from 'node:timers/promises';
import { escapeText } from '../log.js';
import { type CommandSpec, UsageError } from '../options.js';
import { commandArguments, get } from './command.js';

const DEFAULT_INTERVAL = 2;
const INTERVALS = [0.1, 3600] as const;

/** One scrape. */
interface Sample {
  /** Seconds, of a clock that only goes on. */
  readonly time: number;
  /** By name and labels, as in the text. */
  readonly values: ReadonlyMap<string, number>;
}

/** @returns the exit status */
export async function top(command: CommandSpec, argv: readonly string[]): Promise<number> {
  const given = commandArguments(command, argv);
  if (given === undefined) return 0;
  const interval = number('--interval', given.options['interval'], DEFAULT_INTERVAL, ...INTERVALS);
  const count = number('--count', given.options['count'], Number.POSITIVE_INFINITY, 1, 1e9);
  const address = given.argument as string;
  let before = await scrape(command, address);
  const screen = new Screen(process.stdout.isTTY === true);
  try {
    for (let views = 0; views < count && !screen.ended; views++) {
      await Promise.race([sleep(interval * 1000), screen.end]);
      if (screen.ended) break;
      const now = await scrape(command, address);
      screen.show(view(address, before, now));
      before = now;
    }
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    throw new UsageError(`top: the daemon at ${address} has ended`);
  } finally {
    screen.close();
  }
  return 0;
}

function number(option: string, text: string | boolean | undefined, otherwise: number, least: number, most: number): number {
  if (text === undefined) return otherwise;
  const value = Number(text);
  if (text === '' || !(value >= least && value <= most))
    throw new UsageError(`top: ${option}=${text} is no number from ${least} to ${most}`);
  return value;
}

async function scrape(command: CommandSpec, address: string): Promise<Sample> {
  const response = await get(command, address, '/metrics');
  let text = '';
  for await (const part of response.setEncoding('utf8')) text += part;
  const time = performance.now() / 1000;
  const values = new Map<string, number>();
  for (const line of text.split('\n')) {
    const space = line.lastIndexOf(' ');
    if (space > 0 && !line.startsWith('#')) values.set(line.slice(0, space), Number(line.slice(space + 1)));
  }
  if (!values.has('virtiofsd_connected'))
    throw new UsageError(`top: no virtiofsd-ts answers at ${address}: give the daemon's --metrics address`);
  return { time, values };
}

// --- what is shown ---

/** The lines of a view. */
export function view(address: string, before: Sample, now: Sample): string[] {
  const seconds = now.time - before.time;
  const value = (name: string) => now.values.get(`virtiofsd_${name}`) ?? 0;
  const grown = (name: string) => Math.max(0, (now.values.get(name) ?? 0) - (before.values.get(name) ?? 0));
  const rate = (name: string) => grown(`virtiofsd_${name}`) / seconds;
  const rows = opcodes(before, now, seconds);
  const requests = rows.reduce((total, row) => total + row.rate, 0);
  const batches = rate('batches_total');
  const interrupts = rate('interrupts_sent_total');
  const saved = rate('interrupts_saved_total');
  const build = [...now.values.keys()].find((key) => key.startsWith('virtiofsd_build_info{')) ?? '';
  const version = /\bversion="([^"]*)"/.exec(build)?.[1] ?? '';
  const up = Date.now() / 1000 - (now.values.get('process_start_time_seconds') ?? 0);
  const cpu = (100 * grown('process_cpu_seconds_total')) / seconds;
  const lines = [
    `virtiofsd-ts ${version} at ${escapeText(address)}: up ${duration(up)}, ${value('connected') ? 'a guest is connected' : 'no guest'}`,
    `process     ${cpu.toFixed(0)} % of a processor, ${bytes(now.values.get('process_resident_memory_bytes') ?? 0)} of memory, ${count(value('file_descriptors'))} descriptors for the guest`,
    `requests    ${count(requests)}/s, read ${bytes(rate('read_bytes_total'))}/s, written ${bytes(rate('written_bytes_total'))}/s`,
    `queues      ${count(value('queue_depth'))} taken and not answered, ${count(value('offload_jobs_pending'))} of them with a thread; ${batches > 0 ? (requests / batches).toFixed(1) : 0} a batch, ${count(rate('kicks_total'))} kicks/s, ${count(interrupts)} interrupts/s (${interrupts + saved > 0 ? ((100 * saved) / (interrupts + saved)).toFixed(0) : 0} % saved)`,
    `cache       ${count(value('inodes'))} inodes that the guest knows, ${count(value('open_files'))} open files`,
  ];
  if (now.values.has('virtiofsd_fsnotify_watches')) {
    const latency = histogram('virtiofsd_fsnotify_latency_seconds', '', before, now);
    const lost = value('fsnotify_lost_total') + value('fsnotify_host_overflows_total');
    lines.push(
      `events      ${count(value('fsnotify_watches'))} watches; ${count(rate('fsnotify_host_events_total'))}/s from the host, ${count(rate('fsnotify_echoes_total'))}/s the guest's own, ${count(rate('fsnotify_records_total'))}/s sent in ${time(quantile(latency, 0.5))} (99 %: ${time(quantile(latency, 0.99))}); ${count(lost)} lost in all`,
    );
  }
  lines.push('', 'OPCODE                  /s      %      mean       50 %       99 %  errors/s        total');
  for (const row of rows) {
    lines.push(
      `${row.opcode.padEnd(16)} ${count(row.rate).padStart(9)} ${((100 * row.rate) / (requests || 1)).toFixed(0).padStart(6)} ${time(row.mean).padStart(9)}  ${time(row.median).padStart(9)}  ${time(row.slow).padStart(9)} ${count(row.errors).padStart(9)} ${row.total.toLocaleString('en').padStart(12)}`,
    );
  }
  return lines;
}

interface Row {
  readonly opcode: string;
  readonly rate: number;
  readonly errors: number;
  readonly total: number;
  /** Seconds; NaN without a request. */
  readonly mean: number;
  readonly median: number;
  readonly slow: number;
}

/** Busiest first, those without a request in between last. */
function opcodes(before: Sample, now: Sample, seconds: number): Row[] {
  const rows: Row[] = [];
  for (const [key, total] of now.values) {
    const opcode = /^virtiofsd_requests_total\{opcode="([^"]*)"\}$/.exec(key)?.[1];
    if (opcode === undefined) continue;
    const label = `opcode="${opcode}"`;
    const name = 'virtiofsd_request_duration_seconds';
    const requests = total - (before.values.get(key) ?? 0);
    const sum = `${name}_sum{${label}}`;
    const spent = (now.values.get(sum) ?? 0) - (before.values.get(sum) ?? 0);
    const times = histogram(name, label, before, now);
    let errors = 0;
    for (const [other, amount] of now.values)
      if (other.startsWith(`virtiofsd_request_errors_total{${label},`)) errors += amount - (before.values.get(other) ?? 0);
    rows.push({
      opcode,
      rate: requests / seconds,
      errors: errors / seconds,
      total,
      mean: spent / requests,
      median: quantile(times, 0.5),
      slow: quantile(times, 0.99),
    });
  }
  return rows.sort((a, b) => b.rate - a.rate || b.total - a.total);
}

/** Upper bounds in seconds, and how many were below each (cumulative), of what came between two scrapes. */
type Histogram = readonly (readonly [bound: number, below: number])[];

function histogram(name: string, label: string, before: Sample, now: Sample): Histogram {
  const buckets: [number, number][] = [];
  for (const [key, amount] of now.values) {
    if (!key.startsWith(`${name}_bucket{`) || !key.includes(label)) continue;
    const bound = /\ble="([^"]*)"/.exec(key)?.[1] ?? '';
    buckets.push([bound === '+Inf' ? Number.POSITIVE_INFINITY : Number(bound), amount - (before.values.get(key) ?? 0)]);
  }
  return buckets.sort(([a], [b]) => a - b);
}

/** The bound below which this part of them was, evenly spread within a bucket as Prometheus takes them to be; NaN when there were none. */
function quantile(buckets: Histogram, part: number): number {
  const wanted = part * (buckets.at(-1)?.[1] ?? 0);
  if (wanted === 0) return Number.NaN;
  let low = 0;
  let passed = 0;
  for (const [bound, below] of buckets) {
    if (below >= wanted) return Number.isFinite(bound) ? low + ((bound - low) * (wanted - passed)) / (below - passed) : low;
    low = bound;
    passed = below;
  }
  return low;
}

function count(value: number): string {
  return value >= 1e6
    ? `${(value / 1e6).toFixed(1)}M`
    : value >= 1e4
      ? `${(value / 1e3).toFixed(1)}k`
      : value.toFixed(value > 0 && value < 10 && value % 1 !== 0 ? 1 : 0);
}

function bytes(value: number): string {
  if (value >= 2 ** 30) return `${(value / 2 ** 30).toFixed(1)} GiB`;
  return value >= 2 ** 20 ? `${(value / 2 ** 20).toFixed(1)} MiB` : `${(value / 2 ** 10).toFixed(value >= 10240 ? 0 : 1)} KiB`;
}

function time(seconds: number): string {
  if (Number.isNaN(seconds)) return '-';
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  return seconds >= 1e-3 ? `${(seconds * 1e3).toFixed(2)} ms` : `${(seconds * 1e6).toFixed(1)} µs`;
}

function duration(seconds: number): string {
  const [days, rest] = [Math.floor(seconds / 86_400), Math.floor(seconds % 86_400)];
  const clock = [rest / 3600, (rest / 60) % 60, rest % 60].map((part) => String(Math.floor(part)).padStart(2, '0')).join(':');
  return days > 0 ? `${days} d ${clock}` : clock;
}

// --- where it is shown ---

const ENTER = '\u001b[?1049h\u001b[?25l';
const LEAVE = '\u001b[?25h\u001b[?1049l';
const CTRL_C = '\u0003';

/** Standard output: a terminal of which nothing is changed in the end, or anything else, to which one view after the other is written. */
class Screen {
  /** The reader wants no more. */
  ended = false;
  readonly end: Promise<void>;
  /** It is one, and ours for now. */
  #terminal: boolean;
  #leave = (): void => {};

  constructor(terminal: boolean) {
    this.#terminal = terminal;
    this.end = new Promise((resolve) => {
      this.#leave = () => {
        this.ended = true;
        resolve();
      };
    });
    process.stdout.on('error', this.#leave);
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, this.#leave);
    if (!terminal) return;
    process.stdout.write(ENTER);
    process.on('exit', () => this.close());
    const { stdin } = process;
    if (!stdin.isTTY) return;
    stdin.setRawMode(true);
    stdin.on('data', (keys) => {
      if (/[qQ]/.test(keys.toString()) || keys.toString().includes(CTRL_C)) this.#leave();
    });
  }

  show(lines: readonly string[]): void {
    if (!this.#terminal) {
      process.stdout.write(`${lines.join('\n')}\n\n`);
      return;
    }
    // A terminal that does not know its size says 0.
    const columns = process.stdout.columns || 80;
    const rows = process.stdout.rows || 24;
    const fitting = lines.slice(0, rows - 1).map((line) => `${line.slice(0, columns)}\u001b[K\n`);
    process.stdout.write(`\u001b[H${fitting.join('')}\u001b[J`);
  }

  close(): void {
    this.#leave();
    if (!this.#terminal) return;
    this.#terminal = false;
    if (process.stdin.isTTY) process.stdin.setRawMode(false);
    process.stdout.write(LEAVE);
  }
}
