/**
 * The counters as Prometheus metrics. Nothing is kept here: each scrape reads the blocks of `hot.ts` and adds them up.
 *
 * | metric | type | labels | meaning |
 * |---|---|---|---|
 * | virtiofsd_requests_total | counter | opcode | FUSE requests answered |
 * | virtiofsd_request_errors_total | counter | opcode, errno | FUSE requests answered with an error (ENOENT of LOOKUP is everyday life) |
 * | virtiofsd_request_duration_seconds | histogram | opcode | time from taking a request off its queue to answering it |
 * | virtiofsd_fsnotify_… | counter, gauge, histogram | | file events, one for each row of FSNOTIFY below; watches; latency |
 * | virtiofsd_… | counter, gauge | | one for each row of SCALARS in `hot.ts` |
 * | virtiofsd_build_info | gauge | version, node_version | always 1 |
 * | process_cpu_seconds_total, process_resident_memory_bytes, process_virtual_memory_bytes, process_start_time_seconds, process_max_fds | | | as every Prometheus client has them |
 *
 * An opcode appears with its first request, an errno with its first error. prom-client's own default metrics are left out: they
 * would describe this thread's event loop and heap, which nobody asks about, wake it up a hundred times a second, and list every
 * descriptor of the process at each scrape.
 */
import { readFileSync } from 'node:fs';
import { constants, uptime } from 'node:os';
import { Gauge, type Metric, Counter as PromCounter, Registry } from 'prom-client';
import { Counter, Counters, LATENCY_BUCKETS } from '../watch/counters.js';
import { BUCKET_BOUNDS, HotMetrics, SCALARS } from './hot.js';

export interface MetricsSource {
  /** One block for each device thread. */
  readonly buffers: readonly SharedArrayBuffer[];
  /** Label of each opcode index. */
  readonly opcodes: readonly string[];
  /** The block of `watch/counters.ts`; undefined without remote fsnotify. */
  readonly fsnotify?: SharedArrayBuffer | undefined;
  readonly version: string;
}

const PREFIX = 'virtiofsd_';
const ERRNO_NAMES = new Map<number, string>(Object.entries(constants.errno).map(([name, errno]) => [errno, name]));

/** A registry whose metrics show what is in the blocks at the moment of the scrape. */
export function registryOf(source: MetricsSource): Registry {
  const { opcodes, version } = source;
  const blocks = source.buffers.map((buffer) => new HotMetrics(opcodes.length, buffer));
  const registry = new Registry();
  const registers = [registry];

  new PromCounter({
    name: `${PREFIX}requests_total`,
    help: 'FUSE requests answered',
    labelNames: ['opcode'],
    registers,
    collect() {
      this.reset();
      opcodes.forEach((opcode, index) => {
        const count = sum(blocks, (block) => block.buckets(index).reduce((total, n) => total + n, 0));
        if (count > 0) this.inc({ opcode }, count);
      });
    },
  });

  new PromCounter({
    name: `${PREFIX}request_errors_total`,
    help: 'FUSE requests answered with an error',
    labelNames: ['opcode', 'errno'],
    registers,
    collect() {
      this.reset();
      opcodes.forEach((opcode, index) => {
        for (const block of blocks)
          block.errors(index, (errno, count) => this.inc({ opcode, errno: ERRNO_NAMES.get(errno) ?? 'other' }, count));
      });
    },
  });

  registry.registerMetric(requestDuration(blocks, opcodes) as unknown as Metric);

  SCALARS.forEach(({ type, name, help }, slot) => {
    const value = () => sum(blocks, (block) => block.values[slot] as number);
    const configuration = { name: PREFIX + name, help, registers };
    if (type === 'gauge') gauge(configuration, value);
    else counter(configuration, value);
  });

  new Gauge({
    name: `${PREFIX}build_info`,
    help: 'Always 1; the labels tell the versions',
    labelNames: ['version', 'node_version'],
    registers,
  }).set({ version, node_version: process.version }, 1);
  if (source.fsnotify !== undefined) addFsnotifyMetrics(registry, new Counters(source.fsnotify));
  addProcessMetrics(registers);
  return registry;
}

/** One line of a metric, as prom-client formats it. */
interface Sample {
  metricName: string;
  labels: Record<string, string | number>;
  value: number;
}

/** A series of a histogram: its labels, the counts of its buckets (the last one for what is above all bounds), and the sum. */
interface Series {
  labels: Record<string, string>;
  counts: readonly number[];
  sum: number;
}

/**
 * A histogram from buckets that are counted already: prom-client's own class could only be told of each observation. A registry
 * asks nothing of a metric but these fields.
 */
class CountedHistogram {
  readonly name: string;
  readonly help: string;
  readonly type = 'histogram';
  readonly aggregator = 'sum';
  readonly #bounds: readonly number[];
  readonly #read: () => Series[];

  constructor(name: string, help: string, bounds: readonly number[], read: () => Series[]) {
    this.name = name;
    this.help = help;
    this.#bounds = bounds;
    this.#read = read;
  }

  async get() {
    const { name, help, type, aggregator } = this;
    return { name, help, type, aggregator, values: this.#read().flatMap((series) => this.#samples(series)) };
  }

  #samples({ labels, counts, sum: total }: Series): Sample[] {
    let count = 0;
    const samples = counts.map((n, bucket): Sample => {
      count += n;
      return { metricName: `${this.name}_bucket`, labels: { ...labels, le: this.#bounds[bucket] ?? '+Inf' }, value: count };
    });
    if (count === 0) return [];
    samples.push({ metricName: `${this.name}_sum`, labels, value: total });
    samples.push({ metricName: `${this.name}_count`, labels, value: count });
    return samples;
  }
}

function requestDuration(blocks: readonly HotMetrics[], opcodes: readonly string[]): CountedHistogram {
  const buckets = Array.from({ length: BUCKET_BOUNDS.length + 1 }, (_, bucket) => bucket);
  return new CountedHistogram(
    `${PREFIX}request_duration_seconds`,
    'Time from taking a FUSE request off its queue to answering it',
    BUCKET_BOUNDS,
    () =>
      opcodes.map((opcode, index) => ({
        labels: { opcode },
        counts: buckets.map((bucket) => sum(blocks, (block) => block.buckets(index)[bucket] as number)),
        sum: sum(blocks, (block) => block.seconds(index)),
      })),
  );
}

/** Remote fsnotify: [name, help] of each counter. */
const FSNOTIFY: readonly (readonly [counter: number, name: string, help: string])[] = [
  [Counter.events, 'host_events_total', 'File events read from the host'],
  [Counter.echoes, 'echoes_total', 'File events of the host that were changes of this guest itself, and dropped'],
  [Counter.records, 'records_total', 'Event records queued for the guest'],
  [Counter.coalesced, 'coalesced_total', 'Event records left out because the one before was the same'],
  [Counter.invalidations, 'invalidations_total', 'Cache invalidations queued for the guest'],
  [Counter.invalidationsSaved, 'invalidations_saved_total', 'Cache invalidations left out because the same one was under way'],
  [Counter.hostOverflows, 'host_overflows_total', "Times that the host's event queue overflowed"],
  [
    Counter.queueOverflows,
    'queue_overflows_total',
    'Times that the queue for the guest overflowed or the guest gave no buffers for too long',
  ],
  [Counter.overflowsSent, 'overflows_sent_total', 'Times that the guest was told that events were lost'],
  [Counter.lost, 'lost_total', 'Records and invalidations lost in overflows of the queue for the guest'],
  [Counter.messages, 'messages_total', 'Messages handed to the guest'],
  [Counter.bytes, 'message_bytes_total', 'Bytes of these messages'],
  [Counter.refused, 'refused_watches_total', 'Watch requests of the guest that were refused'],
];

function addFsnotifyMetrics(registry: Registry, counters: Counters): void {
  const registers = [registry];
  for (const [index, name, help] of FSNOTIFY) counter({ name: `${PREFIX}fsnotify_${name}`, help, registers }, () => counters.get(index));
  gauge({ name: `${PREFIX}fsnotify_watches`, help: 'Files and directories that the guest watches', registers }, () =>
    counters.get(Counter.watches),
  );
  const bounds = Array.from({ length: LATENCY_BUCKETS - 1 }, (_, bucket) => 2 ** bucket / 1e6);
  registry.registerMetric(
    new CountedHistogram(
      `${PREFIX}fsnotify_latency_seconds`,
      "Time from reading the first event of a message from the host to having it in the guest's buffer",
      bounds,
      () => [{ labels: {}, counts: [...counters.latency], sum: counters.latencySum / 1e9 }],
    ) as unknown as Metric,
  );
}

function addProcessMetrics(registers: Registry[]): void {
  counter({ name: 'process_cpu_seconds_total', help: 'Processor time of the process, in seconds', registers }, () => {
    const { user, system } = process.cpuUsage();
    return (user + system) / 1e6;
  });
  gauge(
    { name: 'process_resident_memory_bytes', help: 'Resident memory of the process, in bytes', registers },
    () => status('VmRSS') * 1024,
  );
  gauge(
    { name: 'process_virtual_memory_bytes', help: 'Virtual memory of the process, in bytes', registers },
    () => status('VmSize') * 1024,
  );
  gauge({ name: 'process_max_fds', help: 'Most descriptors that the process may have open', registers }, openFilesLimit);
  gauge({ name: 'process_start_time_seconds', help: 'When the process started, in seconds since the epoch', registers }, startTime());
}

/**
 * When the process started, by the clock as it is set now: the same as before unless it was set, or the host slept, since a change
 * means another process to those who look at it.
 */
function startTime(): () => number {
  // os.uptime() goes on while the host sleeps, process.uptime() does not.
  const before = uptime() - process.uptime();
  let started = Date.now() / 1000 - process.uptime();
  return () => {
    const now = Date.now() / 1000 - (uptime() - before);
    if (Math.abs(now - started) > 1) started = now;
    return started;
  };
}

interface ScalarConfiguration {
  name: string;
  help: string;
  registers: Registry[];
}

function counter(configuration: ScalarConfiguration, value: () => number): void {
  new PromCounter({
    ...configuration,
    collect() {
      this.reset();
      this.inc(value());
    },
  });
}

function gauge(configuration: ScalarConfiguration, value: () => number): void {
  new Gauge({
    ...configuration,
    collect() {
      this.set(value());
    },
  });
}

/** A number of /proc/self/status; 0 where /proc is out of reach. */
function status(field: string): number {
  return procNumber('/proc/self/status', new RegExp(`^${field}:\\s+(\\d+)`, 'm'));
}

function openFilesLimit(): number {
  return procNumber('/proc/self/limits', /^Max open files\s+(\d+)/m);
}

function procNumber(path: string, pattern: RegExp): number {
  try {
    return Number(pattern.exec(readFileSync(path, 'latin1'))?.[1] ?? 0);
  } catch {
    return 0;
  }
}

function sum<T>(items: readonly T[], of: (item: T) => number): number {
  return items.reduce((total, item) => total + of(item), 0);
}
