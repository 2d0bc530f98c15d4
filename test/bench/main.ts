/** `make bench`: measures what the variables of the environment name (see bench.mk), and writes tables and plots. */
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { repository } from '../../qemu/guest/daemon.js';
import { findDaemons } from './daemons.js';
import { levelA } from './levela.js';
import { levelB } from './levelb.js';
import { levelC } from './levelc.js';
import { describeMachine, goalTable, reportLevelA, reportLevelB, reportLevelC } from './report.js';

const variable = (name: string): string | undefined => process.env[name] || undefined;
const say = (line: string): void => void process.stderr.write(`bench: ${line}\n`);

async function main(): Promise<void> {
  const level = variable('LEVEL') ?? 'a';
  const quick = !['0', undefined].includes(variable('QUICK'));
  const only = variable('ONLY');
  const rounds = variable('ROUNDS');
  const daemons = variable('DAEMONS');
  const whole = !quick && only === undefined && daemons === undefined && rounds === undefined;
  const results = path.resolve(repository, variable('RESULTS') ?? (whole ? 'test/bench/results' : 'build/bench'));
  const kinds = findDaemons((daemons ?? 'ours,rust,rust-never,c').split(','));
  const settings = Object.fromEntries(
    Object.entries({ level, quick: quick ? 'yes' : 'no', only, rounds }).filter(([, value]) => value !== undefined),
  );
  const machine = describeMachine(kinds, settings as Record<string, string>);
  const options = {
    quick,
    only: only === undefined ? undefined : new RegExp(only, 'i'),
    rounds: rounds === undefined ? undefined : Number(rounds),
    say,
  };

  // Of some rows one wants to see the numbers, not the goals.
  const show = (goals: string): void => {
    console.log(only === undefined ? goals : readFileSync(path.join(results, `level-${level}.md`), 'utf8'));
  };
  if (machine.loadAtStart > machine.processors / 2)
    say(`the machine is busy (load ${machine.loadAtStart.toFixed(1)}): the numbers will be noisy`);
  const started = Date.now();
  if (level === 'a') {
    const [nothing] = findDaemons(['nothing']);
    const result = await levelA(kinds, nothing as NonNullable<typeof nothing>, options);
    show(goalTable(reportLevelA(results, machine, result, kinds)));
  } else if (level === 'b') {
    const result = await levelB(
      kinds.filter(({ name }) => name !== 'c'),
      options,
    );
    show(goalTable(reportLevelB(results, machine, result, kinds)));
  } else if (level === 'c') {
    const ours = kinds.find(({ name }) => name === 'ours');
    if (ours === undefined) throw new Error('level c is about ours');
    show(goalTable(reportLevelC(results, { ...machine, daemons: machine.daemons.slice(0, 1) }, await levelC(ours, options))));
  } else {
    throw new Error(`there is no level ${level}: a, b or c`);
  }
  say(`${Math.round((Date.now() - started) / 1000)} s; the results are in ${path.relative(process.cwd(), results)}`);
}

main().catch((error: unknown) => {
  process.stderr.write(`bench: ${error instanceof Error ? error.message : error}\n`);
  process.exitCode = 1;
});
