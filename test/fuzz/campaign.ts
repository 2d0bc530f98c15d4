/**
 * Runs targets, each in a process of its own: a crash, a sanitizer's complaint or an endless loop ends that process only, and
 * which case it was is known from a file.
 */
import { spawn, spawnSync } from 'node:child_process';
import {
  closeSync,
  ftruncateSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type Case, caseOf, failure, kindOf, shrink, type Target, text } from './engine.js';
import { folder } from './share.js';
import { TARGETS } from './targets.js';

const MAIN = fileURLToPath(new URL('main.js', import.meta.url));
const ROOT = fileURLToPath(new URL('../../../..', import.meta.url));
/** A case that takes more of the processor, or longer, never ends. Most take some milliseconds; but the machine may be busy. */
const LOOPS_MS = 30_000;
const HANGS_MS = 240_000;
const REPLAY_MS = 60_000;
const SHRINK_MS = 60_000;

/** What became of a target's run. */
export interface Outcome {
  target: string;
  seed: number;
  cases: number;
  requests: number;
  seconds: number;
  finding?: { index: number; what: string; file: string };
}

/** What the child says on its standard output. */
type Report = { cases: number; requests: number; seconds: number; finding?: { index: number; what: string; test: Case } };

/** One target for some seconds, from case `from` of a seed on. */
export async function campaign(name: string, seed: number, seconds: number, from = 0): Promise<Outcome> {
  // Also what a child leaves that is ended by force is removed.
  const temporary = mkdtempSync(join(folder(), 'fuzz-'));
  const progress = join(temporary, 'progress');
  writeFileSync(progress, '');
  const began = performance.now();
  const child = spawn(process.execPath, ['--no-warnings', MAIN, '--child', name, progress, String(seed), String(seconds), String(from)], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, FUZZ_DIR: temporary },
  });
  let out = '';
  let errors = '';
  child.stdout.on('data', (chunk) => {
    out += chunk;
  });
  child.stderr.on('data', (chunk) => {
    errors = (errors + chunk).slice(-20_000);
  });
  let last = '';
  let since = performance.now();
  let used = 0;
  let hung = '';
  const watch = setInterval(() => {
    const now = readFileSync(progress, 'latin1');
    if (now !== last) {
      last = now;
      since = performance.now();
      used = processorTime(child.pid);
      return;
    }
    const busy = processorTime(child.pid) - used;
    if (busy < LOOPS_MS && performance.now() - since < HANGS_MS) return;
    hung ||= `no end within ${Math.round((performance.now() - since) / 1000)} s, ${Math.round(busy / 1000)} s of the processor: ${waits(child.pid)}`;
    child.kill('SIGKILL');
  }, 500);
  const status = await new Promise<string>((done) => child.on('close', (code, signal) => done(signal ?? String(code))));
  clearInterval(watch);
  const [index = from, requests = 0] = readFileSync(progress, 'latin1').trim().split(' ').map(Number);
  rmSync(temporary, { recursive: true, force: true });
  const outcome: Outcome = { target: name, seed, cases: index - from, requests, seconds: (performance.now() - began) / 1000 };
  if (out.endsWith('}\n')) {
    const { finding, ...report } = JSON.parse(out) as Report;
    Object.assign(outcome, report);
    if (finding !== undefined)
      outcome.finding = { index: finding.index, what: finding.what, file: keep(name, seed, finding.index, finding.test) };
    return outcome;
  }
  const what = hung || `the process ended with ${status}:\n${errors}`;
  const test = await shrinkApart(name, seed, index);
  outcome.finding = { index, what, file: keep(name, seed, index, test) };
  return outcome;
}

/** Milliseconds of the processor that a process has had. */
function processorTime(pid: number | undefined): number {
  try {
    const fields = readFileSync(`/proc/${pid}/stat`, 'latin1')
      .replace(/^.*\) /s, '')
      .split(' ');
    return (Number(fields[11]) + Number(fields[12])) * 10;
  } catch {
    return 0;
  }
}

/** What the threads of a process wait in. */
function waits(pid: number | undefined): string {
  try {
    return readdirSync(`/proc/${pid}/task`)
      .map((thread) => readFileSync(`/proc/${pid}/task/${thread}/wchan`, 'latin1'))
      .join(' ');
  } catch {
    return '';
  }
}

/** Shrinks a case that ends its process, each try in a new one. */
async function shrinkApart(name: string, seed: number, index: number): Promise<Case> {
  const target = await (TARGETS[name] as { open(): Target | Promise<Target> }).open();
  const test = caseOf(target, seed, index);
  target.close();
  const file = join(mkdtempSync(join(tmpdir(), 'campaign-')), 'case.json');
  const result = shrink(
    test,
    (smaller) => {
      writeFileSync(file, JSON.stringify(smaller));
      const { status, signal } = spawnSync(process.execPath, ['--no-warnings', MAIN, '--replay', name, file], { timeout: REPLAY_MS });
      return signal !== null || (status !== 0 && status !== 1);
    },
    SHRINK_MS,
  );
  rmSync(file, { force: true });
  return result;
}

function keep(name: string, seed: number, index: number, test: Case): string {
  const folder = join(ROOT, 'build', 'fuzz', name);
  mkdirSync(folder, { recursive: true });
  const file = join(folder, `${seed}-${index}.json`);
  writeFileSync(file, text(test));
  return relative(ROOT, file);
}

/** What a person needs to know of a finding. */
export function describe({ target, seed, finding }: Outcome): string {
  if (finding === undefined) return '';
  return [
    `${target}: seed ${seed}, case ${finding.index}: ${finding.what.slice(0, 4000)}`,
    `The shrunk case is in ${finding.file}: make fuzz ONLY=${target} CASE=${finding.file}`,
    `The whole run: make fuzz ONLY=${target} SEED=${seed} (or FROM=${finding.index} for that case first)`,
  ].join('\n');
}

/** The child's side. */
export async function child(name: string, progress: string, seed: number, seconds: number, from: number): Promise<void> {
  const target = await (TARGETS[name] as { open(): Target | Promise<Target> }).open();
  const fd = openSync(progress, 'w');
  const began = performance.now();
  const report: Report = { cases: 0, requests: 0, seconds: 0 };
  let index = from;
  for (; performance.now() - began < seconds * 1000; index++) {
    ftruncateSync(fd);
    writeSync(fd, `${index} ${report.requests}`, 0);
    const test = caseOf(target, seed, index);
    try {
      report.requests += target.run(test);
    } catch (error) {
      const what = (error as Error).name === 'Finding' ? (error as Error).message : ((error as Error).stack ?? String(error));
      const kind = kindOf(failure(target, test) ?? '');
      const small =
        kind === kindOf(what) ? shrink(test, (smaller) => kindOf(failure(target, smaller) ?? '') === kind, SHRINK_MS / 2) : test;
      report.finding = { index, what: failure(target, small) ?? `${what}\n(not every time)`, test: small };
      break;
    }
  }
  report.cases = index - from;
  report.seconds = (performance.now() - began) / 1000;
  closeSync(fd);
  target.close();
  writeSync(1, `${JSON.stringify(report)}\n`);
}

/** Runs one case in this process. @returns what is wrong with it */
export async function replay(name: string, file: string): Promise<string | undefined> {
  const target = await (TARGETS[name] as { open(): Target | Promise<Target> }).open();
  const result = failure(target, JSON.parse(readFileSync(file, 'utf8')) as Case);
  target.close();
  return result;
}
