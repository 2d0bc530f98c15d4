/**
 * Level b: programs in a real kernel (User Mode Linux), on a share of each daemon, in each cache mode.
 *
 * A run boots a guest (0.2 s), does all the work and turns it off; daemons take turns, mode by mode and round by round.
 * QEMU's old C daemon is not among them: User Mode Linux must be told the tag, and it cannot tell it.
 */
import { execFileSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { repository } from '../../qemu/guest/daemon.js';
import { bootGuest, cacheFolder, type Guest } from '../../qemu/guest.js';
import { type DaemonKind, type DaemonName, type RunningDaemon, startDaemon } from './daemons.js';
import type { Options } from './levela.js';
import { complete, makeFile } from './share.js';
import { type Spread, spreadOf } from './statistics.js';

/** For all daemons the same, with our patches, which `--cache=notify` needs. */
const KERNEL = process.env['KERNEL'] || '7.2';
const MIB = 1 << 20;
const GIT_FILES = 50_000;

export interface GuestCell {
  /** Seconds, or operations per second where the row says so. */
  value: Spread;
  /** CPU seconds of the daemon. */
  daemonCpu: Spread;
}

export interface GuestRow {
  /** Of the work and the cache mode: `git-status-warm auto`. */
  id: string;
  work: string;
  title: string;
  cache: string;
  unit: 's' | 'op/s';
  cells: Partial<Record<DaemonName, GuestCell>>;
}

export interface LevelB {
  rows: GuestRow[];
  notes: string[];
  kernel: string;
}

interface Work {
  name: string;
  title: string;
  unit: 's' | 'op/s';
  /** Before the clock runs. */
  prepare?: string;
  command: string;
  /** Reads the result from the output instead of the clock. */
  read?: (stdout: string) => number;
  /** Left out of quick runs. */
  long?: boolean;
}

const forgetPages = 'sync; echo 3 > /proc/sys/vm/drop_caches';
/** Fails when git does, and when it finds a difference. */
const gitStatus = 'cd /mnt/tree && found=$(git -c safe.directory="*" --no-optional-locks status --porcelain) && test -z "$found"';

function fio(rw: string, size: string, engine: string): Work {
  // What is buffered goes through the guest's page cache, as most programs do; libaio needs O_DIRECT to be asynchronous.
  const direct = engine === 'libaio';
  const options = [
    ...['--name=bench', '--filename=/mnt/fio', '--size=64m', `--rw=${rw}`, `--bs=${size}`, `--ioengine=${engine}`],
    ...[direct ? '--direct=1 --iodepth=16' : '--iodepth=1', '--runtime=1', '--time_based', '--output-format=json'],
  ];
  return {
    name: `fio-${rw}-${size}-${engine}`,
    title: `fio ${rw} ${size}, ${direct ? 'libaio, 16 deep, direct' : 'psync, buffered'}`,
    unit: 'op/s',
    prepare: forgetPages,
    command: `fio ${options.join(' ')}`,
    read(stdout) {
      const { jobs } = JSON.parse(stdout.slice(stdout.indexOf('{'))) as { jobs: { read: { iops: number }; write: { iops: number } }[] };
      return (jobs[0]?.read.iops ?? 0) + (jobs[0]?.write.iops ?? 0);
    },
    long: size === '1m' || rw.startsWith('rand') !== direct,
  };
}

const works: Work[] = [
  ...['read', 'randread', 'write', 'randwrite'].flatMap((rw) =>
    ['4k', '1m'].flatMap((size) => ['psync', 'libaio'].map((engine) => fio(rw, size, engine))),
  ),
  {
    name: 'git-status-cold',
    title: `git status, ${GIT_FILES.toLocaleString('en')} files, cold`,
    unit: 's',
    prepare: 'umount /mnt && mount -t virtiofs myfs /mnt',
    command: gitStatus,
  },
  { name: 'git-status-warm', title: 'git status again', unit: 's', command: gitStatus },
  {
    name: 'untar',
    title: "untar Linux' fs/",
    unit: 's',
    prepare: forgetPages,
    command: 'mkdir /mnt/work/untar && tar -C /mnt/work/untar -xf /mnt/fs.tar',
  },
  { name: 'find', title: 'find -size in it', unit: 's', prepare: forgetPages, command: 'find /mnt/work/untar -size +1000k >/dev/null' },
  { name: 'rm', title: 'rm -rf of it', unit: 's', prepare: forgetPages, command: 'rm -rf /mnt/work/untar' },
  {
    name: 'npm-ci',
    title: 'npm ci',
    unit: 's',
    prepare: forgetPages,
    command: 'cd /mnt/work/app && npm ci --offline --cache /mnt/work/npm-cache --no-audit --no-fund --ignore-scripts --loglevel=error',
    long: true,
  },
  { name: 'build', title: 'a C build of 100 files', unit: 's', prepare: forgetPages, command: 'make -s -C /mnt/work/program', long: true },
];

export async function levelB(kinds: readonly DaemonKind[], options: Options): Promise<LevelB> {
  const share = makeShare();
  const result: LevelB = { rows: [], notes: [], kernel: `User Mode Linux ${KERNEL}` };
  const caches = options.quick ? ['auto'] : ['auto', 'always', 'never', 'metadata', 'notify'];
  // A guest takes about a minute, and there are 13 in a round.
  const rounds = options.rounds ?? (options.quick ? 1 : 2);
  const samples = new Map<string, { values: number[]; cpu: number[] }>();
  const failed = new Set<string>();
  for (let round = 0; round < rounds; round++) {
    for (const cache of caches) {
      const planned = works.filter((work) => !(options.quick && work.long) && (options.only?.test(rowId(work, cache)) ?? true));
      for (const kind of kinds) {
        if (!kind.caches.includes(cache)) continue;
        const able = planned.filter((work) => !failed.has(rowId(work, cache) + kind.name));
        if (able.length === 0) continue;
        const give = (work: Work, problem: string): void => {
          failed.add(rowId(work, cache) + kind.name);
          result.notes.push(`${kind.label}, ${rowId(work, cache)}: ${problem}`);
          options.say(`${rowId(work, cache)}: ${kind.name} is left out: ${problem}`);
        };
        try {
          await runGuest(kind, cache, share, able, give, (work, value, cpu) => {
            const key = `${rowId(work, cache)} ${kind.name}`;
            const of = samples.get(key) ?? { values: [], cpu: [] };
            of.values.push(value);
            of.cpu.push(cpu);
            samples.set(key, of);
            options.say(
              `${rowId(work, cache)}: ${kind.name} ${value.toFixed(value < 100 ? 2 : 0)} ${work.unit}, daemon ${cpu.toFixed(2)} s`,
            );
          });
        } catch (error) {
          for (const work of able) give(work, (error as Error).message.split('\n')[0] as string);
        }
      }
    }
  }
  for (const cache of caches) {
    for (const work of works) {
      const row: GuestRow = { id: rowId(work, cache), work: work.name, title: work.title, cache, unit: work.unit, cells: {} };
      for (const { name } of kinds) {
        const of = samples.get(`${row.id} ${name}`);
        if (of !== undefined) row.cells[name] = { value: spreadOf(of.values), daemonCpu: spreadOf(of.cpu) };
      }
      if (Object.keys(row.cells).length > 0) result.rows.push(row);
    }
  }
  return result;
}

const rowId = (work: Work, cache: string): string => `${work.name} ${cache}`;

async function runGuest(
  kind: DaemonKind,
  cache: string,
  share: string,
  planned: Work[],
  failed: (work: Work, problem: string) => void,
  report: (work: Work, value: number, cpu: number) => void,
): Promise<void> {
  freshWork(share);
  const daemon = await startDaemon(kind, { shareDir: share, cache, tag: 'myfs' });
  let guest: Guest | undefined;
  try {
    guest = await bootGuest({ kind: 'uml', kernel: KERNEL, hostRoot: true, memoryMiB: 1024, shares: [{ socket: daemon.socketPath }] });
    for (const work of planned) {
      try {
        if (work.prepare !== undefined) await run(guest, work.prepare);
        const cpu = cpuSeconds(daemon);
        const started = performance.now();
        const stdout = await run(guest, work.command);
        const seconds = (performance.now() - started) / 1000;
        report(work, work.read?.(stdout) ?? seconds, cpuSeconds(daemon) - cpu);
      } catch (error) {
        if (!(error instanceof WorkFailed)) throw error;
        failed(work, error.message);
      }
    }
    await guest.poweroff();
  } finally {
    await guest?.kill();
    await daemon.stop();
    rmSync(path.join(share, 'work'), { recursive: true, force: true });
  }
}

/** A command failed: other work may still be possible. */
class WorkFailed extends Error {}

async function run(guest: Guest, command: string): Promise<string> {
  const { status, stdout, stderr } = await guest.run(command, { timeoutMs: 300_000 });
  if (status !== 0) throw new WorkFailed(`status ${status}: ${stderr.trim().split('\n').at(-1)}`);
  return stdout;
}

/** User and system time of the daemon's processes. */
function cpuSeconds({ pids }: RunningDaemon): number {
  const ticks = pids.map((pid) => {
    const fields = readFileSync(`/proc/${pid}/stat`, 'utf8')
      .replace(/^.*\) /s, '')
      .split(' ');
    return Number(fields[11]) + Number(fields[12]);
  });
  return ticks.reduce((sum, value) => sum + value, 0) / 100;
}

// --- the share ---

/** What the guest works on; all but `work` is only read, and made once. */
function makeShare(): string {
  const root = path.join(cacheFolder, 'bench/guest-1');
  mkdirSync(root, { recursive: true });
  complete(path.join(root, 'fio'), (at) => makeFile(at, 64 * MIB));
  complete(path.join(root, 'tree'), makeTree);
  complete(path.join(root, 'fs.tar'), (at) => {
    const kernel = path.join(repository, 'qemu/guest/kernel/kernel.sh');
    const source = execFileSync(kernel, ['source', KERNEL.split('-')[0] as string], {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'inherit'],
    }).trim();
    execFileSync('tar', ['-C', source, '-cf', at, 'fs']);
  });
  complete(path.join(root, 'app'), makeApp);
  complete(path.join(root, 'program'), makeProgram);
  return root;
}

/** A directory of the share for what is written, as it is before each run. */
function freshWork(share: string): void {
  const work = path.join(share, 'work');
  rmSync(work, { recursive: true, force: true });
  mkdirSync(work);
  for (const name of ['app', 'program']) cpSync(path.join(share, name), path.join(work, name), { recursive: true });
  cpSync(path.join(share, 'app/npm-cache'), path.join(work, 'npm-cache'), { recursive: true });
}

function makeTree(at: string): void {
  for (let i = 0; i < GIT_FILES; i++) {
    const directory = path.join(at, `d${String(i % 50)}/e${String(i % 500)}`);
    if (i < 500) mkdirSync(directory, { recursive: true });
    writeFileSync(path.join(directory, `file-${i}.txt`), `file ${i}\n`);
  }
  const inTree = (...args: string[]) =>
    execFileSync('git', ['-C', at, '-c', 'user.name=bench', '-c', 'user.email=bench@localhost', ...args]);
  inTree('init', '-q');
  inTree('add', '.');
  inTree('commit', '-qm', 'all');
}

/** A package with the project's own dependencies, and npm's cache for it. */
function makeApp(at: string): void {
  const { dependencies } = JSON.parse(readFileSync(path.join(repository, 'package.json'), 'utf8')) as {
    dependencies: Record<string, string>;
  };
  mkdirSync(at);
  const others = Object.fromEntries(Object.entries(dependencies).filter(([name]) => !existsSync(path.join(repository, 'src', name))));
  writeFileSync(path.join(at, 'package.json'), JSON.stringify({ name: 'app', version: '1.0.0', dependencies: others }));
  // Twice: the second time as the guest does it, so that all it asks for is in the cache.
  for (const command of ['install', 'ci']) {
    execFileSync('npm', [command, '--cache', path.join(at, 'npm-cache'), '--no-audit', '--no-fund', '--ignore-scripts'], {
      cwd: at,
      stdio: 'pipe',
    });
  }
  rmSync(path.join(at, 'node_modules'), { recursive: true });
}

/** 100 sources that each include 20 of 50 headers. */
function makeProgram(at: string): void {
  mkdirSync(at);
  for (let i = 0; i < 50; i++) writeFileSync(path.join(at, `h${i}.h`), `extern int v${i};\n${`/* header ${i} */\n`.repeat(100)}`);
  for (let i = 0; i < 100; i++) {
    const includes = Array.from({ length: 20 }, (_, k) => `#include "h${(i * 7 + k) % 50}.h"\n`).join('');
    writeFileSync(path.join(at, `f${i}.c`), `${includes}int f${i}(void) { return v${(i * 7) % 50}; }\n`);
  }
  writeFileSync(path.join(at, 'Makefile'), 'SRC := $(wildcard *.c)\nall.a: $(SRC:.c=.o)\n\t$(AR) rc $@ $^\n');
}
