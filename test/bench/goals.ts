/** The project's goals of speed, each with what was measured: ratios to the best peer of the same run. */
import type { DaemonName } from './daemons.js';
import type { Body, Cell, LevelA, Row } from './levela.js';
import type { GuestRow, LevelB } from './levelb.js';
import type { LevelC } from './levelc.js';

const PEERS: readonly DaemonName[] = ['rust', 'rust-never', 'c'];

export interface Goal {
  goal: string;
  /** Worst case and which row that is. */
  measured: string;
  met: boolean;
  /** Rows that miss it. */
  missed: string[];
}

/** Ours against the best peer, in one row. */
export interface Ratios {
  row: Row;
  /** Above 1: we do more. */
  speed: number;
  /** Below 1: we take less CPU time, or less time. */
  cpu: number;
  p99: number;
  ours: Cell;
  best: { name: DaemonName; cell: Cell };
}

export function ratiosOf(row: Row): Ratios | undefined {
  const ours = row.cells.ours;
  const peers = PEERS.flatMap((name) => {
    const cell = row.cells[name];
    return cell === undefined ? [] : [{ name, cell }];
  });
  const fastest = peers.toSorted((a, b) => b.cell.perSecond.median - a.cell.perSecond.median)[0];
  if (ours === undefined || fastest === undefined) return undefined;
  return {
    row,
    speed: ours.perSecond.median / fastest.cell.perSecond.median,
    cpu: ours.cpu.median / Math.min(...peers.map(({ cell }) => cell.cpu.median)),
    p99: ours.p99.median / Math.min(...peers.map(({ cell }) => cell.p99.median)),
    ours,
    best: fastest,
  };
}

const SMALL = ['getattr', 'lookup', 'lookup-many', 'missing', 'statfs', 'getxattr', 'read-4k', 'write-4k'];
const LARGE = ['read-128k', 'read-1m', 'write-128k', 'write-1m'];
const CYCLES = ['open-read-release', 'create-cycle', 'lookup-forget'];

/** Goals of level a. A goal without measurements is left out. */
export function goalsOf({ rows, bodies }: LevelA): Goal[] {
  const all = rows.flatMap((row) => ratiosOf(row) ?? []);
  // The goals are for what guests do: EVENT_IDX, one queue, interrupts. The other configurations have lines of their own.
  const isUsual = ({ row }: Ratios): boolean => row.waits && row.eventIdx && row.queues === 1;
  const some = (operations: string[], depth?: number) =>
    all.filter(
      (ratios) => isUsual(ratios) && operations.includes(ratios.row.operation) && (depth === undefined || ratios.row.depth === depth),
    );
  const others = (depth: number) => all.filter((ratios) => !isUsual(ratios) && ratios.row.depth === depth);
  const listings = all.filter(({ row }) => row.operation.startsWith('readdirplus'));
  const [fewer, more, over] = ['lookup d16', 'lookup-beside-many d16', 'lookup-many d16'].map((id) => cellOf(rows, id));
  const [idle, busy] = [cellOf(rows, 'getattr d1'), cellOf(rows, 'cold-mix d17')];
  const goals = [
    atLeast('metadata and 4k, depth 16: op/s ≥ 2.0× the best peer', some(SMALL, 16), 2.0, speed),
    atMost('metadata and 4k, depth 16: CPU per request ≤ 0.6×', some(SMALL, 16), 0.6, cpu),
    atLeast('metadata and 4k, depth 1: op/s ≥ 1.0×', some(SMALL, 1), 1.0, speed),
    atMost('metadata and 4k, depth 1: CPU per request ≤ 1.0×', some(SMALL, 1), 1.0, cpu),
    atLeast('the same without EVENT_IDX or with a guest that polls, depth 16: op/s ≥ 2.0×', others(16), 2.0, speed),
    atLeast('the same without EVENT_IDX or with a guest that polls, depth 1: op/s ≥ 1.0×', others(1), 1.0, speed),
    atLeast('128k and 1M, depth 16: op/s ≥ 1.3×', some(LARGE, 16), 1.3, speed),
    atLeast('128k and 1M, depth 1: op/s ≥ 1.0×', some(LARGE, 1), 1.0, speed),
    atLeast('READDIRPLUS: op/s ≥ 1.5×', listings, 1.5, speed),
    atLeast('the three cycles: op/s ≥ 1.2×', some(CYCLES), 1.2, speed),
    atMost('p99 ≤ 1.0×, in every row', all, 1.0, (ratios) => ratios.p99),
    idle && busy && limit('p99 of GETATTR beside 16 cold reads ≤ 2× idle', busy.p99.median / idle.p99.median, 2, '×'),
    fewer && more && flat('look-ups of 1 000 names as fast (± 10 %) when many others are known, depth 16', fewer, more, over),
    ...(bodies.ours ? bodyGoals(bodies.ours) : []),
  ];
  return goals.filter((goal) => goal !== undefined);
}

/** Above 1: ours is faster than the best peer in the same cache mode. */
export function guestRatio(row: GuestRow): number | undefined {
  const ours = row.cells.ours?.value.median;
  const peers = PEERS.flatMap((name) => row.cells[name]?.value.median ?? []);
  if (ours === undefined || peers.length === 0) return undefined;
  return row.unit === 's' ? Math.min(...peers) / ours : ours / Math.max(...peers);
}

/** Goals of level b. */
export function guestGoals({ rows }: LevelB): Goal[] {
  const compared = rows.flatMap((row) => {
    const ratio = guestRatio(row);
    return ratio === undefined ? [] : [{ id: row.id, ratio }];
  });
  const sorted = compared.toSorted((a, b) => a.ratio - b.ratio);
  const worst = sorted[0];
  const missed = sorted.filter(({ ratio }) => ratio < 1).map(({ id, ratio }) => `${id} ${ratio.toFixed(2)}×`);
  const warm = (cache: string, names: readonly DaemonName[]): number[] =>
    names.flatMap((name) => rows.find((row) => row.id === `git-status-warm ${cache}`)?.cells[name]?.value.median ?? []);
  const [notify] = warm('notify', ['ours']);
  const auto = warm('auto', PEERS);
  return [
    ...(worst === undefined
      ? []
      : [
          {
            goal: 'in the guest: no row slower than the best peer',
            measured: `${worst.ratio.toFixed(2)}× at worst (${worst.id}); met in ${compared.length - missed.length} of ${compared.length} rows`,
            met: missed.length === 0,
            missed,
          },
        ]),
    ...(notify === undefined || auto.length === 0
      ? []
      : [atLeastNumber('warm git status with --cache=notify ≥ 3× as fast as virtiofsd with auto', Math.min(...auto) / notify, 3)]),
  ];
}

/** Goals of level c. */
export function eventGoals({ idle, rate, drain, hostWrites }: LevelC): Goal[] {
  const [without, beside] = hostWrites;
  return [
    limit('host write to record in the ring: p50 ≤ 50 µs', idle.p50.median, 50, ' µs'),
    {
      goal: '≥ 100 000 events per second',
      measured: `${Math.round(drain.perSecond.median).toLocaleString('en')} per second of a queue that is full`,
      met: drain.perSecond.median >= 100_000,
      missed: [],
    },
    {
      goal: 'no event lost unsaid',
      measured: `${rate.made - rate.received} of ${rate.made} missing, ${rate.overflows} overflows told`,
      met: rate.made === rate.received || rate.overflows > 0,
      missed: [],
    },
    ...(without && beside
      ? [limit('host writers ≤ 1.2× when the file is not watched', beside.ns.median / without.ns.median, 1.2, '×')]
      : []),
  ];
}

function atLeastNumber(goal: string, ratio: number, least: number): Goal {
  return { goal, measured: `${ratio.toFixed(2)}×`, met: ratio >= least, missed: [] };
}

function bodyGoals(body: Body): Goal[] {
  return [
    limit('socket ready ≤ 150 ms after the start', body.readyMs, 150, ' ms'),
    limit('idle RSS ≤ 60 MiB', body.idleRssBytes / 2 ** 20, 60, ' MiB'),
    limit(`≤ 300 bytes per known inode (of ${body.inodes})`, body.bytesPerInode, 300, ' bytes'),
    limit('no wake-ups when idle', body.idleWakeups, 0, ' per second'),
  ];
}

const speed = (ratios: Ratios): number => ratios.speed;
const cpu = (ratios: Ratios): number => ratios.cpu;

function cellOf(rows: Row[], id: string): Cell | undefined {
  return rows.find((row) => row.id === id)?.cells.ours;
}

function atLeast(goal: string, of: Ratios[], least: number, value: (ratios: Ratios) => number): Goal | undefined {
  return overRows(goal, of, value, (number) => number >= least, -1);
}

function atMost(goal: string, of: Ratios[], most: number, value: (ratios: Ratios) => number): Goal | undefined {
  return overRows(goal, of, value, (number) => number <= most, 1);
}

/** The worst row decides. */
function overRows(
  goal: string,
  of: Ratios[],
  value: (ratios: Ratios) => number,
  good: (number: number) => boolean,
  worst: 1 | -1,
): Goal | undefined {
  const sorted = of.toSorted((a, b) => worst * (value(b) - value(a)));
  const first = sorted[0];
  if (first === undefined) return undefined;
  const missed = sorted.filter((ratios) => !good(value(ratios))).map((ratios) => `${ratios.row.id} ${value(ratios).toFixed(2)}×`);
  const met = of.length - missed.length;
  return {
    goal,
    measured: `${value(first).toFixed(2)}× at worst (${first.row.id}); met in ${met} of ${of.length} rows`,
    met: missed.length === 0,
    missed,
  };
}

function limit(goal: string, value: number, most: number, unit: string): Goal {
  return { goal, measured: `${value.toFixed(value < 10 ? 2 : 0)}${unit}`, met: value <= most, missed: [] };
}

/** Names all over a large directory are slower for every daemon: their host's caches are. That number is only told. */
function flat(goal: string, fewer: Cell, more: Cell, over: Cell | undefined): Goal {
  const ratio = more.perSecond.median / fewer.perSecond.median;
  const all =
    over === undefined ? '' : `; ${(over.perSecond.median / fewer.perSecond.median).toFixed(2)}× when they are looked up all over`;
  return { goal, measured: `${ratio.toFixed(2)}×${all}`, met: ratio >= 0.9 && ratio <= 1.1, missed: [] };
}
