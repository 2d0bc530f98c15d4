/** Tables and plots of what was measured. */
import { mkdirSync, readFileSync, statfsSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { cacheFolder } from '../../qemu/guest.js';
import type { DaemonKind, DaemonName } from './daemons.js';
import { eventGoals, type Goal, goalsOf, guestGoals, guestRatio, ratiosOf } from './goals.js';
import type { Cell, LevelA, Row } from './levela.js';
import type { LevelB } from './levelb.js';
import type { LevelC } from './levelc.js';
import { barChart } from './plot.js';
import type { Spread } from './statistics.js';

export interface Machine {
  date: string;
  processor: string;
  processors: number;
  memoryGiB: number;
  kernel: string;
  fileSystem: string;
  loadAtStart: number;
  daemons: { name: string; label: string; version: string; options: string }[];
  settings: Record<string, string>;
}

/** What the numbers depend on. Nothing of it names the machine. */
export function describeMachine(kinds: readonly DaemonKind[], settings: Record<string, string>): Machine {
  const model = /^model name\s*:\s*(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1];
  return {
    date: new Date().toISOString().slice(0, 16).replace('T', ' '),
    processor: model ?? os.arch(),
    processors: os.cpus().length,
    memoryGiB: Math.round(os.totalmem() / 2 ** 30),
    kernel: `${os.type()} ${os.release().split('-')[0]}`,
    fileSystem: fileSystemOf(cacheFolder),
    loadAtStart: os.loadavg()[0] ?? 0,
    daemons: kinds.map((kind) => ({
      name: kind.name,
      label: kind.label,
      version: kind.version,
      options: kind.arguments({ shareDir: 'DIR', socketPath: 'SOCKET', cache: 'auto', tag: undefined, sandboxed: false }).join(' '),
    })),
    settings,
  };
}

function fileSystemOf(folder: string): string {
  const { type } = statfsSync(folder);
  const known: Record<number, string> = {
    61267: 'ext4',
    1481003842: 'XFS',
    2435016766: 'btrfs',
    16914836: 'tmpfs',
    2035054128: 'overlayfs',
  };
  return known[type] ?? `file system type 0x${type.toString(16)}`;
}

/** Writes level-a.json, level-a.md and the plots. */
export function reportLevelA(folder: string, machine: Machine, result: LevelA, kinds: readonly DaemonKind[]): Goal[] {
  const goals = goalsOf(result);
  write(folder, 'level-a.json', `${JSON.stringify({ machine, goals, ...result }, null, 1)}\n`);
  const labels = new Map(kinds.map(({ name, label }) => [name, label]));
  const sections = [
    '# Level a: requests through a front end of ours',
    machineText(machine),
    `The front end is one thread of C++ (\`client.cc\`) on a processor of its own. It sends what Linux would send and checks every reply.
All daemons run at once and are measured in turn, round by round; the numbers are medians, ± half of the distance between the least and the greatest.
An operation is a whole cycle where the row names several requests. CPU is that of all the daemon's threads. \`poll\`: the client polls instead of waiting for interrupts;
\`noidx\`: without VIRTIO_F_EVENT_IDX; \`qN\`: N request queues. Kicks, interrupts and system calls are per operation; system calls were counted with strace at depth 1, in runs of their own.`,
    ...(goals.length > 0 ? ['## Goals', goalTable(goals)] : []),
    '## Against the best peer',
    summaryTable(result.rows, labels),
    ...(result.notes.length > 0 ? ['## Not measured', result.notes.map((note) => `* ${note}`).join('\n')] : []),
    ...(result.bodies.ours ? ['## Apart from requests', bodyTable(result, labels)] : []),
    ...(Object.keys(result.bare).length > 0 ? ['## What the system call alone takes', bareText, bareTable(result, labels)] : []),
    ...(result.nothing.length > 0 ? ['## What the front end itself costs', nothingTable(result.nothing)] : []),
    '## All numbers',
    fullTable(result.rows, labels),
  ];
  for (const plot of plots(result.rows, kinds)) {
    write(folder, plot.file, plot.svg);
    sections.splice(-2, 0, `![${plot.title}](${plot.file})`);
  }
  write(folder, 'level-a.md', `${sections.join('\n\n')}\n`);
  return goals;
}

/** Writes level-b.json, level-b.md and a plot. */
export function reportLevelB(folder: string, machine: Machine, result: LevelB, kinds: readonly DaemonKind[]): Goal[] {
  const goals = guestGoals(result);
  write(folder, 'level-b.json', `${JSON.stringify({ machine, goals, ...result }, null, 1)}\n`);
  const measured = kinds.filter(({ name }) => result.rows.some((row) => row.cells[name] !== undefined));
  const groups = result.rows
    .filter(({ cache }) => cache === 'auto')
    .map((row) => {
      const best = measured.flatMap(({ name }) => (name === 'ours' ? [] : (row.cells[name]?.value.median ?? [])));
      const speed = (value: number): number => (row.unit === 's' ? Math.min(...best) / value : value / Math.max(...best));
      return {
        label: row.title,
        values: measured.map(({ name }) => (row.cells[name] === undefined ? undefined : speed(row.cells[name].value.median))),
      };
    });
  const title = 'Speed in a guest, cache auto';
  write(
    folder,
    'level-b-speed.svg',
    barChart({
      title,
      unit: 'relative to the best peer (1); more is better',
      series: measured.map(({ label }) => label),
      groups,
      mark: 1,
      limit: 5,
    }),
  );
  const sections = [
    '# Level b: programs in a guest',
    machineText(machine),
    `In ${result.kernel}, which has one processor and runs without hardware support: system calls of the guest are slow, so daemons differ less than they would under KVM.
Each run has a fresh daemon and a fresh guest; medians, ± half of the distance between the least and the greatest. CPU is the daemon's, in seconds.`,
    ...(goals.length > 0 ? ['## Goals', goalTable(goals)] : []),
    ...(result.notes.length > 0 ? ['## Not measured', result.notes.map((note) => `* ${note}`).join('\n')] : []),
    `![${title}](level-b-speed.svg)`,
    table(
      ['work', 'cache', 'unit', ...measured.flatMap(({ label }) => [label, 'CPU s']), 'ours against the best peer'],
      result.rows.map((row) => [
        row.title,
        row.cache,
        row.unit,
        ...measured.flatMap(({ name }) => {
          const cell = row.cells[name];
          return cell === undefined ? ['', ''] : [spreadText(cell.value), cell.daemonCpu.median.toFixed(2)];
        }),
        guestRatio(row) === undefined ? '' : `${guestRatio(row)?.toFixed(2)}×`,
      ]),
    ),
  ];
  write(folder, 'level-b.md', `${sections.join('\n\n')}\n`);
  return goals;
}

/** Writes level-c.json and level-c.md. */
export function reportLevelC(folder: string, machine: Machine, result: LevelC): Goal[] {
  const goals = eventGoals(result);
  write(folder, 'level-c.json', `${JSON.stringify({ machine, goals, ...result }, null, 1)}\n`);
  const { idle, loaded, rate, drain, watches, hostWrites, inotifywait, agent, notes } = result;
  const percentiles = ({ p50, p99 }: LevelC['idle']): string[] => [spreadText(p50), spreadText(p99)];
  const sections = [
    '# Level c: events of the host',
    machineText(machine),
    'The front end of level a lends four buffers, writes on the host and takes the time until the record is in guest memory.',
    '## Goals',
    goalTable(goals),
    '## From a write on the host to the record in guest memory',
    table(
      ['situation', 'p50 µs', 'p99 µs'],
      [
        ['idle', ...percentiles(idle)],
        ['beside 16 GETATTRs at a time', ...percentiles(loaded)],
        ...watches.map((row) => [`${row.watches.toLocaleString('en')} watches`, ...percentiles(row.latency)]),
      ],
    ),
    ...(inotifywait
      ? [
          `In a guest, from the write to the line of inotifywait as we read it: p50 ${inotifywait.p50.toFixed(2)} ms, p99 ${inotifywait.p99.toFixed(2)} ms.`,
        ]
      : []),
    ...(agent
      ? [
          `By the replay agent, on a kernel without our patch: p50 ${agent.p50.toFixed(2)} ms, p99 ${agent.p99.toFixed(2)} ms; ${Math.round(agent.perSecond)} new files per second; a look at what all processes watch takes ${agent.discovery.map(({ processes, ms }) => `${ms} ms with ${processes} more processes`).join(', ')}, at most 1/200 of the time.`,
        ]
      : []),
    '## How many',
    `${spreadText(rate.perSecond)} events per second reached guest memory while a program of the host made and removed files; ${rate.received} of ${rate.made} came, ${rate.overflows} overflows were told. Of events that wait already the daemon delivers ${spreadText(drain.perSecond)} per second, at ${spreadText(drain.cpu)} ns of CPU each.`,
    '## What watches cost',
    table(
      ['watches', 'set per second', 'bytes of the daemon each'],
      watches.map((row) => [
        row.watches.toLocaleString('en'),
        Math.round(row.perSecond).toLocaleString('en'),
        row.bytesPerWatch.toFixed(0),
      ]),
    ),
    table(
      ['a write of 8 bytes on the host', 'ns'],
      hostWrites.map(({ situation, ns }) => [situation, spreadText(ns)]),
    ),
    ...(notes.length > 0 ? ['## Not measured', notes.map((note) => `* ${note}`).join('\n')] : []),
  ];
  write(folder, 'level-c.md', `${sections.join('\n\n')}\n`);
  return goals;
}

function write(folder: string, name: string, content: string): void {
  mkdirSync(folder, { recursive: true });
  writeFileSync(path.join(folder, name), content);
}

export function machineText(machine: Machine): string {
  const { date, processor, processors, memoryGiB, kernel, fileSystem, loadAtStart, daemons, settings } = machine;
  return [
    `${date} UTC; ${processors} processors (${processor}), ${memoryGiB} GiB, ${kernel}, ${fileSystem}; load ${loadAtStart.toFixed(1)} at the start.`,
    `Settings: ${Object.entries(settings)
      .map(([name, value]) => `${name} ${value}`)
      .join(', ')}.`,
    '',
    ...daemons.map(({ label, version, options }) => `* **${label}** ${version}: \`${options}\``),
  ].join('\n');
}

export function goalTable(goals: Goal[]): string {
  return table(
    ['goal', 'measured', 'met'],
    goals.map(({ goal, measured, met, missed }) => [
      goal,
      measured + (missed.length > 1 ? `; missed: ${missed.slice(0, 8).join(', ')}` : ''),
      met ? 'yes' : '**no**',
    ]),
  );
}

function summaryTable(rows: Row[], labels: Map<DaemonName, string>): string {
  const lines = rows.flatMap((row) => {
    const ratios = ratiosOf(row);
    if (ratios === undefined) return [];
    const { ours, best, speed, cpu, p99 } = ratios;
    return [
      [
        title(row),
        perSecond(ours),
        perSecond(best.cell),
        labels.get(best.name) ?? '',
        `${speed.toFixed(2)}×`,
        `${cpu.toFixed(2)}×`,
        `${p99.toFixed(2)}×`,
      ],
    ];
  });
  return table(['row', 'ours, op/s', 'best peer, op/s', 'which', 'op/s', 'CPU', 'p99'], lines);
}

function bodyTable({ bodies }: LevelA, labels: Map<DaemonName, string>): string {
  const lines = Object.entries(bodies).map(([name, body]) => [
    labels.get(name as DaemonName) ?? name,
    `${body.readyMs.toFixed(0)} ms`,
    `${(body.idleRssBytes / 2 ** 20).toFixed(1)} MiB`,
    body.idleWakeups.toFixed(1),
    body.inodes.toLocaleString('en'),
    Math.round(body.learntPerSecond).toLocaleString('en'),
    body.bytesPerInode.toFixed(0),
    body.openFilesPerInode.toFixed(2),
  ]);
  return table(
    ['daemon', 'start to socket', 'idle RSS', 'wake-ups/s idle', 'inodes', 'new look-ups/s', 'bytes per inode', 'descriptors per inode'],
    lines,
  );
}

const bareText = `CPU time of the system call that serves a request, made by the front end itself: what no daemon with one thread can save.
The last column is how much faster than the best peer a daemon could be at most that had no costs but this one.`;

function bareTable({ rows, bare }: LevelA, labels: Map<DaemonName, string>): string {
  const lines = Object.entries(bare).flatMap(([operation, cost]) => {
    const row = rows.find(({ id }) => id === `${operation} d16`);
    const ratios = row && ratiosOf(row);
    if (row === undefined || ratios === undefined) return [];
    const { ours, best } = ratios;
    const cpu = best.cell.cpu.median;
    return [
      [
        title(row),
        cost.median.toFixed(2),
        ours.cpu.median.toFixed(2),
        `${cpu.toFixed(2)} (${labels.get(best.name) ?? ''})`,
        `${(cpu / cost.median).toFixed(2)}×`,
      ],
    ];
  });
  return table(['row', 'system call µs', 'ours, CPU µs', 'best peer, CPU µs', 'at most'], lines);
}

function nothingTable(rows: Row[]): string {
  const lines = rows.flatMap((row) => {
    const cell = row.cells.nothing;
    return cell
      ? [
          [
            row.id,
            perSecond(cell),
            us(cell.p50),
            cell.clientCpu.toFixed(2),
            cell.cpu.median.toFixed(2),
            cell.kicks.toFixed(3),
            cell.interrupts.toFixed(3),
          ],
        ]
      : [];
  });
  return table(['row', 'requests/s', 'p50 µs', 'client CPU µs', 'back end CPU µs', 'kicks', 'interrupts'], lines);
}

function fullTable(rows: Row[], labels: Map<DaemonName, string>): string {
  const lines = rows.flatMap((row) =>
    Object.entries(row.cells).map(([name, cell]) => [
      title(row),
      labels.get(name as DaemonName) ?? name,
      perSecond(cell),
      us(cell.p50),
      us(cell.p99),
      us(cell.p999),
      `${cell.cpu.median.toFixed(2)}`,
      cell.clientCpu.toFixed(2),
      cell.kicks.toFixed(2),
      cell.interrupts.toFixed(2),
      cell.systemCalls ? systemCalls(cell.systemCalls) : '',
      cell.errors > 0 ? `${cell.errors}: ${cell.firstError}` : '0',
    ]),
  );
  return table(
    ['row', 'daemon', 'op/s', 'p50 µs', 'p99 µs', 'p99.9 µs', 'CPU µs', 'client CPU µs', 'kicks', 'interrupts', 'system calls', 'wrong'],
    lines,
  );
}

function systemCalls(calls: Record<string, number>): string {
  const total = Object.values(calls).reduce((sum, count) => sum + count, 0);
  return total.toFixed(total < 20 ? 1 : 0);
}

function plots(rows: Row[], kinds: readonly DaemonKind[]): { file: string; title: string; svg: string }[] {
  const chart = (file: string, title: string, depth: number, unit: string, value: (row: Row, cell: Cell) => number | undefined) => {
    const usual = rows.filter((row) => row.depth === depth && row.waits && row.eventIdx && row.queues === 1);
    const groups = usual.map((row) => ({
      label: row.title,
      values: kinds.map(({ name }) => {
        const cell = row.cells[name];
        return cell === undefined ? undefined : value(row, cell);
      }),
    }));
    return groups.length === 0
      ? []
      : [{ file, title, svg: barChart({ title, unit, series: kinds.map(({ label }) => label), groups, mark: 1, limit: 5 }) }];
  };
  const best = (row: Row, of: (cell: Cell) => number, choose: (...values: number[]) => number): number => {
    const peers = Object.entries(row.cells).filter(([name]) => name !== 'ours');
    return choose(...peers.map(([, cell]) => of(cell)));
  };
  const speed = (row: Row, cell: Cell) => cell.perSecond.median / best(row, (c) => c.perSecond.median, Math.max);
  const cpu = (row: Row, cell: Cell) => cell.cpu.median / best(row, (c) => c.cpu.median, Math.min);
  return [1, 16].flatMap((depth) => [
    ...chart(
      `level-a-speed-d${depth}.svg`,
      `Operations per second, depth ${depth}`,
      depth,
      'relative to the best peer (1); more is better',
      speed,
    ),
    ...chart(`level-a-cpu-d${depth}.svg`, `CPU per operation, depth ${depth}`, depth, 'relative to the best peer (1); less is better', cpu),
  ]);
}

// --- text ---

export function table(head: string[], lines: string[][]): string {
  const row = (cells: string[]): string => `| ${cells.join(' | ')} |`;
  return [row(head), row(head.map(() => '---')), ...lines.map(row)].join('\n');
}

function title({ title, depth, queues, eventIdx, waits }: Row): string {
  return `${title}, depth ${depth}${queues > 1 ? `, q${queues}` : ''}${eventIdx ? '' : ', noidx'}${waits ? '' : ', poll'}`;
}

const perSecond = ({ perSecond }: Cell): string => spreadText(perSecond);

function spreadText({ median, spread }: Spread): string {
  const value = median >= 100 ? Math.round(median).toLocaleString('en') : median.toPrecision(3);
  return `${value} ± ${(spread * 100).toFixed(0)} %`;
}

function us({ median }: Spread): string {
  return median >= 100 ? Math.round(median).toLocaleString('en') : median.toFixed(1);
}
