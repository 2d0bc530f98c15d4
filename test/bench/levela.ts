/**
 * Level a: requests through a front end of ours, straight into each daemon's virtqueues.
 *
 * All daemons run at the same time, each with a client that sleeps until it is told to run; a round of a row measures one
 * daemon after the other (B C D A, C D A B, ...), so that whatever else the machine does reaches all of them alike.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Child, startChild } from '../../qemu/guest/process.js';
import { Client, type Sample } from './client.js';
import { type DaemonKind, type DaemonName, footprint, type RunningDaemon, startDaemon } from './daemons.js';
import { makeShare, type Share } from './share.js';
import { type Spread, spreadOf } from './statistics.js';

export interface Options {
  quick: boolean;
  /** Only rows whose name matches. */
  only: RegExp | undefined;
  rounds: number | undefined;
  say(line: string): void;
}

/** What one row says of one daemon. */
export interface Cell {
  perSecond: Spread;
  /** Microseconds. */
  p50: Spread;
  p99: Spread;
  p999: Spread;
  /** Microseconds of all the daemon's threads per operation. */
  cpu: Spread;
  /** Microseconds of the front end per operation: that much is not the daemon's. */
  clientCpu: number;
  requests: number;
  kicks: number;
  interrupts: number;
  entriesPerSecond: number;
  /** By name, per operation: from a run of its own under strace. */
  systemCalls?: Record<string, number>;
  errors: number;
  firstError: string;
}

export interface Row {
  /** Operation, depth and what is not as usual: `getattr d16 q4 noidx poll`. */
  id: string;
  operation: string;
  /** For tables. */
  title: string;
  depth: number;
  queues: number;
  eventIdx: boolean;
  /** The client sleeps until it is interrupted, instead of polling. */
  waits: boolean;
  cells: Partial<Record<DaemonName, Cell>>;
}

/** What each daemon is apart from requests. */
export interface Body {
  /** From the start to the socket, with the sandbox that it has by default. */
  readyMs: number;
  idleRssBytes: number;
  /** Threads woken per second while nothing was asked. */
  idleWakeups: number;
  /** How many inodes were made known, at which rate, and what memory and descriptors each took. */
  inodes: number;
  learntPerSecond: number;
  bytesPerInode: number;
  openFilesPerInode: number;
}

export interface LevelA {
  rows: Row[];
  bodies: Partial<Record<DaemonName, Body>>;
  /** The client against a back end that does nothing. */
  nothing: Row[];
  /** By operation: CPU time of the host's system call alone, in µs, for requests that are served by one. */
  bare: Record<string, Spread>;
  /** What could not be measured, and why. */
  notes: string[];
}

interface Operation {
  name: string;
  title: string;
  /** What client.cc calls it, and its arguments. */
  run: string;
  values: (share: Share) => Record<string, string | number>;
  depths: number[];
  /** Milliseconds of one sample, if not the usual time. */
  ms?: number;
  /** Before each sample. */
  prepare?: (client: Client) => Promise<void>;
  /** A file whose pages are to be cached by the host. */
  cached?: string;
  /** Measured in all configurations, not only in the usual one. */
  everywhere?: boolean;
  /** Needs so many known inodes that a daemon may run out of descriptors: measured last, and a daemon that fails is left out. */
  large?: boolean;
  /** The daemon knows the inodes of the large directory. */
  knowsMany?: boolean;
}

const KIB = 1 << 10;
const names = { dir: 'names-1k', names: 1000 };
const overNames = () => names;
const onFile =
  (file: string, size: number): Operation['values'] =>
  () => ({ file, size });
const inList =
  (dir: string, files: number, more = {}) =>
  (): Record<string, string | number> => ({ dir, names: files, ...more });
const inMany: Operation['values'] = (share) => ({ dir: share.many.name, names: share.many.files });
const made = () => ({ dir: 'made' });

const all = [1, 16, 64];

const operations: Operation[] = [
  { name: 'getattr', title: 'GETATTR', run: 'getattr', values: overNames, depths: all, everywhere: true },
  { name: 'lookup', title: 'LOOKUP, 1 000 known names', run: 'lookup', values: overNames, depths: all, everywhere: true },
  { name: 'lookup-many', title: 'LOOKUP, many known names', run: 'lookup', values: inMany, depths: all, large: true, knowsMany: true },
  {
    name: 'lookup-beside-many',
    title: 'LOOKUP, 1 000 of many known names',
    run: 'lookup',
    values: overNames,
    depths: [16],
    large: true,
    knowsMany: true,
  },
  { name: 'missing', title: 'LOOKUP of a missing name', run: 'missing', values: overNames, depths: all },
  { name: 'lookup-forget', title: 'LOOKUP, FORGET', run: 'lookup-forget', values: inList('forget-1k', 1000), depths: all },
  { name: 'statfs', title: 'STATFS', run: 'statfs', values: () => ({}), depths: all },
  { name: 'getxattr', title: 'GETXATTR', run: 'getxattr', values: overNames, depths: all },
  { name: 'open-read-release', title: 'OPEN, READ 4k, RELEASE', run: 'open-read-release', values: overNames, depths: all },
  { name: 'create-cycle', title: 'CREATE, WRITE 4k, RELEASE, UNLINK, FORGET', run: 'create-cycle', values: made, depths: all },
  {
    name: 'create-cycle-user',
    title: 'the CREATE cycle as another user',
    run: 'create-cycle',
    values: () => ({ dir: 'made', user: 1000 }),
    depths: [1, 16],
  },
  {
    name: 'read-4k',
    title: 'READ 4k, random',
    run: 'read',
    values: onFile('read', 4 * KIB),
    cached: 'read',
    depths: all,
    everywhere: true,
  },
  { name: 'read-128k', title: 'READ 128k', run: 'read', values: onFile('read', 128 * KIB), cached: 'read', depths: all },
  { name: 'read-1m', title: 'READ 1M', run: 'read', values: onFile('read', 1024 * KIB), cached: 'read', depths: all },
  {
    name: 'write-4k',
    title: 'WRITE 4k, random',
    run: 'write',
    values: onFile('write', 4 * KIB),
    cached: 'write',
    depths: all,
    everywhere: true,
  },
  { name: 'write-128k', title: 'WRITE 128k', run: 'write', values: onFile('write', 128 * KIB), cached: 'write', depths: all },
  { name: 'write-1m', title: 'WRITE 1M', run: 'write', values: onFile('write', 1024 * KIB), cached: 'write', depths: all },
  { name: 'write-fsync', title: 'WRITE 4k, FSYNC', run: 'write-fsync', values: () => ({ dir: 'fsync' }), depths: [1, 16] },
  { name: 'readdir-1k', title: 'READDIR of 1 000', run: 'readdir', values: inList('list-1k', 1000), depths: [1, 16] },
  { name: 'readdirplus-1k', title: 'READDIRPLUS of 1 000, known', run: 'readdirplus', values: inList('list-1k', 1000), depths: [1, 16] },
  {
    name: 'readdirplus-1k-new',
    title: 'READDIRPLUS of 1 000, BATCH_FORGET',
    run: 'readdirplus',
    values: inList('forget-1k', 1000, { forget: 1 }),
    depths: [1],
  },
  { name: 'readdir-100k', title: 'READDIR of 100 000', run: 'readdir', values: inList('list-100k', 100_000), depths: [1], large: true },
  {
    name: 'readdirplus-100k',
    title: 'READDIRPLUS of 100 000',
    run: 'readdirplus',
    values: inList('list-100k', 100_000),
    depths: [1],
    large: true,
  },
  {
    name: 'cold-mix',
    title: 'GETATTR beside 16 cold READs of 4k',
    run: 'cold-mix',
    values: () => ({ ...names, file: 'cold', size: 4 * KIB }),
    depths: [17],
    prepare: (client) => client.drop('cold'),
  },
];

/** How the device is set up, and how the client learns of replies. */
interface Configuration {
  queues: number;
  eventIdx: boolean;
  waits: boolean;
}

const usual: Configuration = { queues: 1, eventIdx: true, waits: true };
/** Daemons are started anew for each of these; the client polls or waits as it is told. */
const devices: Omit<Configuration, 'waits'>[] = [
  { queues: 1, eventIdx: true },
  { queues: 1, eventIdx: false },
  { queues: 4, eventIdx: true },
];

function rowId(operation: string, depth: number, { queues, eventIdx, waits }: Configuration): string {
  return `${operation} d${depth}${queues > 1 ? ` q${queues}` : ''}${eventIdx ? '' : ' noidx'}${waits ? '' : ' poll'}`;
}

function emptyRow(operation: { name: string; title: string }, depth: number, configuration: Configuration): Row {
  return {
    id: rowId(operation.name, depth, configuration),
    operation: operation.name,
    title: operation.title,
    depth,
    ...configuration,
    cells: {},
  };
}

interface Station {
  kind: DaemonKind;
  daemon: RunningDaemon;
  client: Client;
  knowsMany: boolean;
}

export async function levelA(kinds: readonly DaemonKind[], nothing: DaemonKind, options: Options): Promise<LevelA> {
  const share = makeShare(options.quick);
  const result: LevelA = { rows: [], bodies: {}, nothing: [], bare: {}, notes: [] };
  if (options.only === undefined) {
    for (const kind of kinds) result.bodies[kind.name] = await measureBody(kind, share, options);
    result.nothing = await measureNothing(nothing, options);
    result.bare = await measureBare(nothing, share);
  }
  if (devices.every((device) => plannedRows(device, options).length === 0))
    throw new Error(`no row matches ONLY=${options.only?.source}: the rows are ${operations.map(({ name }) => name).join(', ')}`);
  for (const device of devices) {
    const rows = plannedRows(device, options);
    for (const large of [false, true]) {
      const some = rows.filter(({ operation }) => (operation.large ?? false) === large);
      if (some.length > 0) await measureRows(kinds, device, some, share, options, result.notes);
      result.rows.push(...some.map(({ row }) => row));
    }
  }
  return result;
}

interface PlannedRow {
  row: Row;
  operation: Operation;
}

function plannedRows(device: Omit<Configuration, 'waits'>, { quick, only }: Options): PlannedRow[] {
  const rows: PlannedRow[] = [];
  for (const waits of [true, false]) {
    const configuration = { ...device, waits };
    const isUsual = waits && device.queues === usual.queues && device.eventIdx === usual.eventIdx;
    for (const operation of operations) {
      if (!isUsual && !operation.everywhere) continue;
      for (const depth of operation.depths) {
        if (quick && depth === 64) continue;
        const row = emptyRow(operation, depth, configuration);
        if (only === undefined || only.test(row.id)) rows.push({ row, operation });
      }
    }
  }
  return rows;
}

async function measureRows(
  kinds: readonly DaemonKind[],
  device: Omit<Configuration, 'waits'>,
  rows: PlannedRow[],
  share: Share,
  options: Options,
  notes: string[],
): Promise<void> {
  const stations: Station[] = [];
  try {
    for (const kind of kinds) {
      const station = await openStation(kind, device, share).catch((error: Error) => {
        // Not every daemon has several queues.
        if (device.queues === 1) throw error;
        notes.push(`${kind.label}, ${device.queues} queues: ${error.message}`);
      });
      if (station) stations.push(station);
    }
    for (const { client } of stations) await client.run('learn', { ...names, depth: 16 });
    for (const row of rows) await measureRow(stations, row, share, options, notes);
    for (const { row, operation } of rows) {
      if (row.depth !== operation.depths[0] || !row.waits) continue;
      for (const station of stations) {
        const cell = row.cells[station.kind.name];
        if (cell !== undefined) cell.systemCalls = await countSystemCalls(station, operation, share);
      }
    }
  } finally {
    for (const station of stations) await closeStation(station);
  }
}

async function openStation(kind: DaemonKind, { queues, eventIdx }: Omit<Configuration, 'waits'>, share: Share): Promise<Station> {
  const daemon = await startDaemon(kind, { shareDir: share.root });
  try {
    const client = await Client.connect({ socketPath: daemon.socketPath, shareDir: share.root, pids: daemon.pids, queues, eventIdx });
    return { kind, daemon, client, knowsMany: false };
  } catch (error) {
    await daemon.stop();
    throw error;
  }
}

async function closeStation({ client, daemon }: Station): Promise<void> {
  await client.close();
  await daemon.stop();
}

async function measureRow(
  stations: Station[],
  { row, operation }: PlannedRow,
  share: Share,
  options: Options,
  notes: string[],
): Promise<void> {
  const rounds = options.rounds ?? (options.quick ? 3 : 5);
  // All rows of all daemons in a quarter of an hour.
  const ms = options.quick ? 60 : 150;
  const samples = new Map<Station, Sample[]>();
  if (operation.cached !== undefined) await stations[0]?.client.warm(operation.cached);
  for (const station of [...stations]) {
    // Round 0, which does not count, warms up: compiler, caches, disk. And it tells who cannot do this at all.
    const problem = await warmUp(station, { row, operation }, share, ms);
    if (problem === undefined) {
      samples.set(station, []);
      continue;
    }
    notes.push(`${station.kind.label}, ${row.id}: ${problem}`);
    options.say(`${row.id}: ${station.kind.name} is left out: ${problem}`);
    stations.splice(stations.indexOf(station), 1);
    await closeStation(station);
  }
  const order = [...samples.keys()];
  for (let round = 1; round <= rounds; round++) {
    // Nobody is always the first: who comes first may find caches as others left them.
    order.push(order.shift() as Station);
    for (const station of order) samples.get(station)?.push(await sampleOf(station, { row, operation }, share, ms, round));
  }
  for (const [{ kind }, of] of samples) row.cells[kind.name] = cellOf(of);
  const said = Object.entries(row.cells).map(([name, { perSecond, p99, cpu, errors, firstError }]) => {
    const wrong = errors > 0 ? ` WRONG: ${firstError}` : '';
    return `${name} ${Math.round(perSecond.median)}/s p99 ${p99.median.toFixed(0)} cpu ${cpu.median.toFixed(2)}${wrong}`;
  });
  options.say(`${row.id}: ${said.join(', ')}`);
}

async function warmUp(station: Station, { row, operation }: PlannedRow, share: Share, ms: number): Promise<string | undefined> {
  if (operation.knowsMany && !station.knowsMany) {
    const { name, files } = share.many;
    const { errors, firstError } = await station.client.run('learn', { dir: name, names: files, depth: 16 });
    if (errors > 0) return firstError;
    station.knowsMany = true;
  }
  // Enough requests for code to be compiled, also where one at a time is slow.
  const depth = operation.depths.includes(16) ? Math.max(row.depth, 16) : row.depth;
  const { errors, firstError } = await sampleOf(station, { row: { ...row, depth }, operation }, share, Math.max(ms, 250), 0);
  return operation.large && errors > 0 ? firstError : undefined;
}

async function sampleOf({ client }: Station, { row, operation }: PlannedRow, share: Share, ms: number, seed: number): Promise<Sample> {
  await operation.prepare?.(client);
  const values = operation.values(share);
  return client.run(operation.run, { ...values, depth: row.depth, ms, warm: ms / 10, wait: Number(row.waits), seed });
}

function cellOf(samples: Sample[]): Cell {
  const spread = (value: (sample: Sample) => number) => spreadOf(samples.map(value));
  return {
    perSecond: spread((s) => (s.operations / s.ns) * 1e9),
    p50: spread((s) => s.p50 / 1000),
    p99: spread((s) => s.p99 / 1000),
    p999: spread((s) => s.p999 / 1000),
    cpu: spread((s) => s.daemonCpu / s.operations / 1000),
    clientCpu: spread((s) => s.clientCpu / s.operations / 1000).median,
    requests: spread((s) => s.requests / s.operations).median,
    kicks: spread((s) => s.kicks / s.operations).median,
    interrupts: spread((s) => s.interrupts / s.operations).median,
    entriesPerSecond: spread((s) => (s.entries / s.ns) * 1e9).median,
    errors: samples.reduce((sum, s) => sum + s.errors, 0),
    firstError: samples.find((s) => s.errors > 0)?.firstError ?? '',
  };
}

// --- system calls ---

/** Attaches strace to all threads for a fixed number of operations. Timed runs are never traced. */
async function countSystemCalls({ daemon, client }: Station, operation: Operation, share: Share): Promise<Record<string, number>> {
  const folder = mkdtempSync(path.join(tmpdir(), 'virtiofsd-ts-bench-'));
  const output = path.join(folder, 'calls');
  const long = operation.name.endsWith('100k');
  const count = long ? 1 : operation.name.includes('readdir') ? 10 : 200;
  try {
    await operation.prepare?.(client);
    const tracer = startChild('strace', ['-c', '-f', '-o', output, ...daemon.pids.flatMap((pid) => ['-p', String(pid)])], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    await attached(tracer);
    const sample = await client.run(operation.run, { ...operation.values(share), depth: operation.depths[0] ?? 1, count });
    // Detaches and writes the table.
    tracer.process.kill('SIGINT');
    await tracer.exited;
    const calls: Record<string, number> = {};
    for (const line of readFileSync(output, 'utf8').split('\n')) {
      // % time, seconds, usecs/call, calls, [errors,] syscall
      const words = line.trim().split(/\s+/);
      const name = words.at(-1);
      if (!/^\d/.test(words[0] ?? '') || name === undefined || name === 'total') continue;
      calls[name] = Number(words[3]) / sample.operations;
    }
    return calls;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

async function attached(tracer: Child): Promise<void> {
  for (let tries = 0; tries < 500; tries++) {
    if (tracer.log.some((line) => line.includes('attached'))) {
      // Its other threads follow at once.
      await sleep(100);
      return;
    }
    await sleep(10);
  }
  throw new Error(`strace cannot attach to the daemon: ${tracer.log.join(' ')}`);
}

// --- what is not a request ---

/** For a daemon that has not the descriptors for many. */
const FEW_INODES = 10_000;

async function measureBody(kind: DaemonKind, share: Share, options: Options, inodes = share.many.files): Promise<Body> {
  const ready: number[] = [];
  for (let i = 0; i < (options.quick ? 3 : 9); i++) {
    const daemon = await startDaemon(kind, { shareDir: share.root, sandboxed: true });
    ready.push(daemon.readyMs);
    await daemon.stop();
  }
  const daemon = await startDaemon(kind, { shareDir: share.root });
  try {
    const client = await Client.connect({ socketPath: daemon.socketPath, shareDir: share.root, pids: daemon.pids, ...usual });
    await client.run('statfs', { count: 1 });
    await sleep(1000);
    const idle = footprint(daemon);
    await sleep(2000);
    const idleWakeups = (footprint(daemon).switches - idle.switches) / 2;
    // Half of them first: what memory the second half takes has no part of what is taken once.
    const { name } = share.many;
    const first = await client.run('learn', { dir: name, names: inodes / 2, depth: 16 });
    if (first.errors > 0 && inodes > FEW_INODES) {
      await client.close();
      return measureBody(kind, share, options, FEW_INODES);
    }
    const half = footprint(daemon);
    const learn = await client.run('learn', { dir: name, first: inodes / 2, names: inodes, depth: 16 });
    const full = footprint(daemon);
    await client.close();
    const body = {
      readyMs: spreadOf(ready).median,
      idleRssBytes: idle.rssBytes,
      idleWakeups,
      inodes,
      learntPerSecond: (learn.operations / learn.ns) * 1e9,
      bytesPerInode: (full.rssBytes - half.rssBytes) / (inodes / 2),
      openFilesPerInode: (full.openFiles - idle.openFiles) / inodes,
    };
    options.say(
      `${kind.name}: ready in ${body.readyMs.toFixed(0)} ms, ${(body.idleRssBytes / 2 ** 20).toFixed(1)} MiB idle, ` +
        `${body.idleWakeups} wake-ups/s idle, ${body.bytesPerInode.toFixed(0)} bytes and ${body.openFilesPerInode.toFixed(2)} descriptors per inode`,
    );
    return body;
  } finally {
    await daemon.stop();
  }
}

/** What the client itself costs, in each way of waiting. */
async function measureNothing(kind: DaemonKind, options: Options): Promise<Row[]> {
  const operation = { name: 'nothing', title: 'request and reply, nothing done' };
  const rows: Row[] = [];
  for (const device of devices) {
    const daemon = await startDaemon(kind, { shareDir: '/' });
    try {
      const client = await Client.connect({ socketPath: daemon.socketPath, shareDir: '/', pids: daemon.pids, ...device, nothing: true });
      for (const waits of [true, false]) {
        for (const depth of all) {
          const row = emptyRow(operation, depth, { ...device, waits });
          const samples: Sample[] = [];
          for (let round = 0; round < 3; round++)
            samples.push(await client.run('nothing', { depth, ms: 100, warm: 10, wait: Number(waits) }));
          row.cells[kind.name] = cellOf(samples);
          rows.push(row);
        }
      }
      await client.close();
    } finally {
      await daemon.stop();
    }
  }
  options.say(`the client alone: ${rows.map(({ id, cells }) => `${id} ${Math.round(cells.nothing?.perSecond.median ?? 0)}/s`).join(', ')}`);
  return rows;
}

/** Operations that one system call serves; as in {@link operations}, what client.cc calls them. */
const BARE = [
  'getattr',
  'lookup',
  'missing',
  'statfs',
  'getxattr',
  'read-4k',
  'read-128k',
  'read-1m',
  'write-4k',
  'write-128k',
  'write-1m',
];

/** What no daemon can save: the system call of a request, on the client's processor. */
async function measureBare(kind: DaemonKind, share: Share): Promise<Record<string, Spread>> {
  const result: Record<string, Spread> = {};
  const daemon = await startDaemon(kind, { shareDir: share.root });
  try {
    const client = await Client.connect({
      socketPath: daemon.socketPath,
      shareDir: share.root,
      pids: daemon.pids,
      ...usual,
      nothing: true,
    });
    for (const { name, run, values, cached } of operations.filter((operation) => BARE.includes(operation.name))) {
      if (cached !== undefined) await client.warm(cached);
      const samples: number[] = [];
      for (let round = 0; round < 5; round++) samples.push((await client.bare(run, values(share))) / 1000);
      result[name] = spreadOf(samples);
    }
    await client.close();
    return result;
  } finally {
    await daemon.stop();
  }
}
