/**
 * The counters as Prometheus metrics. Nothing is kept here: each scrape reads the blocks of `hot.ts` and adds them up.
 *
 * | metric | type | labels | meaning |
 * |---|---|---|---|
 * | virtiofsd_requests_total | counter | opcode | FUSE requests answered |
 * | virtiofsd_request_errors_total | counter | opcode, errno | FUSE requests answered with an error (ENOENT of LOOKUP is everyday life) |
 * | virtiofsd_request_duration_seconds | histogram | opcode | time from taking a request off its queue to answering it |
 * | virtiofsd_… | counter, gauge | | one for each row of SCALARS in `hot.ts` |
 * | virtiofsd_build_info | gauge | version, node_version | always 1 |
 * | process_cpu_seconds_total, process_resident_memory_bytes, process_virtual_memory_bytes, process_start_time_seconds, process_max_fds | | | as every Prometheus client has them |
 *
 * An opcode appears with its first request, an errno with its first error. prom-client's own default metrics are left out: they
 * would describe this thread's event loop and heap, which nobody asks about, wake it up a hundred times a second, and list every
 * descriptor of the process at each scrape.
 */
import { readFileSync } from 'node:fs';
import { constants } from 'node:os';
import { Counter, Gauge, type Metric, Registry } from 'prom-client';
import { BUCKET_BOUNDS, HotMetrics, SCALARS } from './hot.js';

export interface MetricsSource {
  /** One block for each device thread. */
  readonly buffers: readonly SharedArrayBuffer[];
  /** Label of each opcode index. */
  readonly opcodes: readonly string[];
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

  new Counter({
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

  new Counter({
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

  registry.registerMetric(new RequestDuration(blocks, opcodes) as unknown as Metric);

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
  addProcessMetrics(registers);
  return registry;
}

/** One line of a metric, as prom-client formats it. */
interface Sample {
  metricName: string;
  labels: Record<string, string | number>;
  value: number;
}

/**
 * The histogram of request times, from buckets that are counted already: prom-client's own class could only be told of each
 * observation. A registry asks nothing of a metric but these fields.
 */
class RequestDuration {
  readonly name = `${PREFIX}request_duration_seconds`;
  readonly help = 'Time from taking a FUSE request off its queue to answering it';
  readonly type = 'histogram';
  readonly aggregator = 'sum';
  readonly #blocks: readonly HotMetrics[];
  readonly #opcodes: readonly string[];

  constructor(blocks: readonly HotMetrics[], opcodes: readonly string[]) {
    this.#blocks = blocks;
    this.#opcodes = opcodes;
  }

  async get() {
    const { name, help, type, aggregator } = this;
    return { name, help, type, aggregator, values: this.#opcodes.flatMap((opcode, index) => this.#series(opcode, index)) };
  }

  #series(opcode: string, index: number): Sample[] {
    const samples: Sample[] = [];
    let count = 0;
    for (let bucket = 0; bucket <= BUCKET_BOUNDS.length; bucket++) {
      count += sum(this.#blocks, (block) => block.buckets(index)[bucket] as number);
      samples.push({ metricName: `${this.name}_bucket`, labels: { opcode, le: BUCKET_BOUNDS[bucket] ?? '+Inf' }, value: count });
    }
    if (count === 0) return [];
    const seconds = sum(this.#blocks, (block) => block.seconds(index));
    samples.push({ metricName: `${this.name}_sum`, labels: { opcode }, value: seconds });
    samples.push({ metricName: `${this.name}_count`, labels: { opcode }, value: count });
    return samples;
  }
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
  const started = Date.now() / 1000 - process.uptime();
  gauge({ name: 'process_start_time_seconds', help: 'When the process started, in seconds since the epoch', registers }, () => started);
}

interface ScalarConfiguration {
  name: string;
  help: string;
  registers: Registry[];
}

function counter(configuration: ScalarConfiguration, value: () => number): void {
  new Counter({
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
