/**
 * Level c: events of the host. No peer has them, so there is nothing to compare with, only goals.
 *
 * The native front end lends READ_NOTIFY buffers as a guest's kernel does, writes on the host itself and takes the time until
 * the record lies in guest memory. In a real guest the end of the way is a line of inotifywait.
 */
import { closeSync, mkdirSync, mkdtempSync, openSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { bootGuest, type Guest, startDaemon as startGuestDaemon } from '../../qemu/guest.js';
import { agentOfHost } from '../support/agent.js';
import { Client } from './client.js';
import { type DaemonKind, footprint, type RunningDaemon, startDaemon } from './daemons.js';
import type { Options } from './levela.js';
import { makeShare } from './share.js';
import { median, type Spread, spreadOf } from './statistics.js';

export interface LevelC {
  /** From a host's write to the record in guest memory, in µs: with an idle daemon, and beside 16 GETATTRs. */
  idle: Latency;
  loaded: Latency;
  /** While a program of the host makes events as fast as it can. */
  rate: { perSecond: Spread; made: number; received: number; overflows: number };
  /** Of events that wait already: the daemon's own speed, and its CPU time per event in ns. */
  drain: { perSecond: Spread; cpu: Spread };
  watches: { watches: number; perSecond: number; bytesPerWatch: number; latency: Latency }[];
  /** What a host's write of 8 bytes to a file costs, in ns of its own CPU time. */
  hostWrites: { situation: string; ns: Spread }[];
  /** From a host's write to the line of inotifywait in the guest, in ms. */
  inotifywait: { p50: number; p99: number } | undefined;
  /** The same by the replay agent on an unpatched kernel; files made on the host and heard of per second; ms of a look at so many processes. */
  agent: { p50: number; p99: number; perSecond: number; discovery: { processes: number; ms: number }[] } | undefined;
  notes: string[];
}

interface Latency {
  p50: Spread;
  p99: Spread;
}

/** Below what fanotify queues (fs.fanotify.max_queued_events). */
const BURST = 10_000;
/** Empty files: level a minds what is in the others. */
const DIRECTORY = { dir: 'list-1k' };

export async function levelC(ours: DaemonKind, options: Options): Promise<LevelC> {
  const share = makeShare(options.quick).root;
  const rounds = options.rounds ?? (options.quick ? 2 : 5);
  const count = options.quick ? 200 : 1000;
  const notes: string[] = [];

  /** Each measurement has a daemon and a session of its own: what was lent cannot be taken back. */
  async function session<T>(body: (client: Client, daemon: RunningDaemon) => Promise<T>): Promise<T> {
    const daemon = await startDaemon(ours, { shareDir: share });
    try {
      const client = await Client.connect({
        socketPath: daemon.socketPath,
        shareDir: share,
        pids: daemon.pids,
        queues: 1,
        eventIdx: true,
        events: true,
      });
      await client.run('learn', { ...DIRECTORY, names: 1000, depth: 16 });
      // Compiled code, as in a daemon that has been up for a while.
      await client.run('getattr', { ...DIRECTORY, depth: 16, ms: 200 });
      const result = await body(client, daemon);
      await client.close();
      return result;
    } finally {
      await daemon.stop();
    }
  }

  async function repeat<T>(body: (client: Client, daemon: RunningDaemon) => Promise<T>): Promise<T[]> {
    const results: T[] = [];
    for (let round = 0; round < rounds; round++) results.push(await session(body));
    return results;
  }

  const latencyOf = (samples: Record<string, number>[]): Latency => ({
    p50: spreadOf(samples.map((s) => (s['p50'] as number) / 1000)),
    p99: spreadOf(samples.map((s) => (s['p99'] as number) / 1000)),
  });

  const idle = latencyOf(await repeat((client) => client.events('latency', { ...DIRECTORY, count })));
  options.say(`host write to record, idle: ${latencyText(idle)}`);
  const loaded = latencyOf(await repeat((client) => client.events('latency', { ...DIRECTORY, count, depth: 16 })));
  options.say(`host write to record, beside 16 GETATTRs: ${latencyText(loaded)}`);

  const rates = await repeat((client) => client.events('rate', { dir: 'made', ms: options.quick ? 200 : 1000 }));
  const sum = (name: string): number => rates.reduce((total, sample) => total + (sample[name] as number), 0);
  const rate = {
    perSecond: spreadOf(rates.map((s) => s['perSecond'] as number)),
    made: sum('made'),
    received: sum('received'),
    overflows: sum('overflows'),
  };
  options.say(`events: ${Math.round(rate.perSecond.median)}/s; ${rate.received} of ${rate.made} came, ${rate.overflows} overflows`);

  const drains = await repeat((client) => client.events('drain', { dir: 'made', count: BURST }));
  const drain = {
    perSecond: spreadOf(drains.map((s) => s['perSecond'] as number)),
    cpu: spreadOf(drains.map((s) => s['daemonCpu'] as number)),
  };
  options.say(`${BURST} events that wait: ${Math.round(drain.perSecond.median)}/s, ${drain.cpu.median.toFixed(0)} ns of CPU each`);

  const watches: LevelC['watches'] = [];
  for (const number of options.quick ? [1, 1000] : [1, 1000, 100_000]) {
    const dir = number > 1000 ? 'list-100k' : 'list-1k';
    watches.push(
      await session(async (client, daemon) => {
        await client.run('learn', { dir, names: number, depth: 16 });
        const before = footprint(daemon);
        const set = await client.run('watch', { dir, names: number, depth: 16 });
        if (set.errors > 0) notes.push(`${number} watches: ${set.errors} refused: ${set.firstError}`);
        const bytesPerWatch = (footprint(daemon).rssBytes - before.rssBytes) / number;
        const latency = latencyOf([await client.events('latency', { ...DIRECTORY, count })]);
        return { watches: number, perSecond: (set.operations / set.ns) * 1e9, bytesPerWatch, latency };
      }),
    );
    const { perSecond, bytesPerWatch, latency } = watches.at(-1) as LevelC['watches'][number];
    options.say(
      `${number} watches: ${Math.round(perSecond)} set per second, ${bytesPerWatch.toFixed(0)} bytes each, then ${latencyText(latency)}`,
    );
  }

  const hostWrites = await measureHostWrites(ours, share, rounds, session);
  for (const { situation, ns } of hostWrites) options.say(`host write of 8 bytes, ${situation}: ${ns.median.toFixed(0)} ns`);

  const inotifywait = await measureGuest(ours, share, options).catch((error: Error) => {
    notes.push(`inotifywait in the guest: ${error.message.split('\n')[0]}`);
    return undefined;
  });
  if (inotifywait)
    options.say(`host write to a line of inotifywait: p50 ${inotifywait.p50.toFixed(2)} ms, p99 ${inotifywait.p99.toFixed(2)} ms`);
  const agent = await measureAgent(share, options).catch((error: Error) => {
    notes.push(`the replay agent in the guest: ${error.message.split('\n')[0]}`);
    return undefined;
  });
  if (agent) {
    const { p50, p99, perSecond, discovery } = agent;
    const looks = discovery.map(({ processes, ms }) => `${ms} ms for ${processes} processes`).join(', ');
    options.say(
      `by the replay agent: p50 ${p50.toFixed(2)} ms, p99 ${p99.toFixed(2)} ms; ${Math.round(perSecond)} files/s; a look at everything ${looks}`,
    );
  }
  for (const note of notes) options.say(note);
  return { idle, loaded, rate, drain, watches, hostWrites, inotifywait, agent, notes };
}

export function latencyText({ p50, p99 }: Latency): string {
  return `p50 ${p50.median.toFixed(0)} µs, p99 ${p99.median.toFixed(0)} µs`;
}

type Session = <T>(body: (client: Client, daemon: RunningDaemon) => Promise<T>) => Promise<T>;

/** Writers of the host, without a daemon, beside one whose guest watches something else, and to what it watches; in turn. */
async function measureHostWrites(ours: DaemonKind, share: string, rounds: number, session: Session): Promise<LevelC['hostWrites']> {
  const write = async (client: Client, file: string): Promise<number> =>
    (await client.events('host', { file, count: 50_000 }))['ns'] as number;
  const samples = new Map<string, number[]>();
  const add = (situation: string, ns: number): void => void samples.set(situation, [...(samples.get(situation) ?? []), ns]);
  for (let round = 0; round < rounds; round++) {
    // Any client can write; this one's daemon watches nothing, because its session has no events.
    const daemon = await startDaemon(ours, { shareDir: share });
    const client = await Client.connect({ socketPath: daemon.socketPath, shareDir: share, pids: daemon.pids, queues: 1, eventIdx: true });
    add('no events', await write(client, 'write'));
    await client.close();
    await daemon.stop();
    await session(async (watching) => {
      await watching.run('watch', { ...DIRECTORY, names: 1000, depth: 16 });
      add('to a file that is not watched, 1 000 others are', await write(watching, 'write'));
      add('to a watched file', await write(watching, 'list-1k/f0000001'));
    });
  }
  return [...samples].map(([situation, values]) => ({ situation, ns: spreadOf(values) }));
}

async function measureGuest(ours: DaemonKind, share: string, options: Options): Promise<{ p50: number; p99: number }> {
  const daemon = await startDaemon(ours, { shareDir: share, tag: 'myfs' });
  const guest = await bootGuest({
    kind: 'uml',
    kernel: process.env['KERNEL'] || '7.2',
    hostRoot: true,
    shares: [{ socket: daemon.socketPath }],
  });
  try {
    return await writesToLines(guest, share, options);
  } finally {
    await guest.poweroff();
    await daemon.stop();
  }
}

/** Writes on the host, each to be heard of by inotifywait in the guest before the next. */
async function writesToLines(guest: Guest, share: string, options: Options): Promise<{ p50: number; p99: number }> {
  const watcher = guest.spawn('inotifywait -m -e modify /mnt/list-1k');
  await watcher.waitForLine('Watches established');
  const fd = openSync(path.join(share, 'list-1k/f0000002'), 'r+');
  const times: number[] = [];
  for (let i = 0; i < (options.quick ? 30 : 200); i++) {
    const line = new Promise<void>((resolve) => watcher.once('line', () => resolve()));
    const from = performance.now();
    writeSync(fd, 'modified', 16);
    await line;
    times.push(performance.now() - from);
  }
  closeSync(fd);
  watcher.kill();
  const sorted = times.sort((a, b) => a - b);
  return { p50: median(sorted), p99: sorted[Math.floor(sorted.length * 0.99)] as number };
}

/** The replay agent in User Mode Linux without our patch. */
async function measureAgent(share: string, options: Options): Promise<NonNullable<LevelC['agent']>> {
  const folder = mkdtempSync(path.join(tmpdir(), 'bench-agent-'));
  const token = path.join(folder, 'token');
  writeFileSync(token, 'the token of the benchmark', { mode: 0o600 });
  const daemon = await startGuestDaemon({ shareDir: share, tag: 'myfs', options: [`--agent=${token}`] });
  const guest = await bootGuest({ kind: 'uml', kernel: '7.2-plain', hostRoot: true, shares: [{ socket: daemon }] });
  try {
    const agent = guest.spawn(`${agentOfHost('the token of the benchmark')} -v /mnt 2>&1`);
    await agent.waitForLine('connected');
    const latency = await writesToLines(guest, share, options);

    const made = path.join(share, 'agent-made');
    mkdirSync(made, { recursive: true });
    const watcher = guest.spawn('inotifywait -m -q -e create /mnt/agent-made');
    const count = options.quick ? 500 : 5000;
    let heard = 0;
    const all = new Promise<void>((resolve) => {
      watcher.on('line', () => {
        if (++heard === count + 1) resolve();
      });
    });
    // It says nothing when it begins.
    while (heard === 0) {
      closeSync(openSync(path.join(made, 'first'), 'w'));
      await sleep(100);
      rmSync(path.join(made, 'first'));
      await sleep(100);
    }
    heard = 1;
    const from = performance.now();
    for (let i = 0; i < count; i++) closeSync(openSync(path.join(made, `f${i}`), 'w'));
    await all;
    const perSecond = (count / (performance.now() - from)) * 1000;
    watcher.kill();
    rmSync(made, { recursive: true });

    const discovery: NonNullable<LevelC['agent']>['discovery'] = [];
    for (const processes of [50, 500]) {
      const others = guest.spawn(`for i in $(seq ${processes}); do sleep 1000 & done; echo started; wait`);
      await others.waitForLine('started');
      agent.lines.length = 0;
      // Seldom, when it takes long.
      const { text } = await agent.waitForLine('all processes', { timeoutMs: 240_000 });
      discovery.push({ processes, ms: Number(/in ([\d.]+) ms/.exec(text)?.[1]) });
      await guest.run('killall sleep');
    }
    agent.kill('SIGTERM');
    await agent.ended;
    return { ...latency, perSecond, discovery };
  } finally {
    await guest.poweroff();
    await daemon.stop();
    rmSync(folder, { recursive: true, force: true });
  }
}
