/** `make fuzz`: see README.md. Exit status 1: something was found. */
import { parseArgs } from 'node:util';
import { campaign, child, describe, type Outcome, replay } from './campaign.js';
import { TARGETS } from './targets.js';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    time: { type: 'string', default: '60' },
    seed: { type: 'string' },
    only: { type: 'string' },
    from: { type: 'string', default: '0' },
    child: { type: 'boolean' },
    replay: { type: 'boolean' },
  },
});

/** A number of the command line. */
function number(name: string, text: string, least: number): number {
  const value = Number(text);
  if (text !== '' && Number.isInteger(value) && value >= least) return value;
  console.error(`${name}=${text}: give a whole number from ${least} on`);
  process.exit(2);
}

async function run(): Promise<number> {
  const time = number('TIME', values.time, 1);
  const seed = number('SEED', values.seed ?? String(Date.now() % 0x7fffffff), 0);
  const from = number('FROM', values.from, 0);
  const names = values.only === undefined ? Object.keys(TARGETS) : values.only.split(',');
  for (const name of names) {
    if (TARGETS[name] !== undefined) continue;
    console.error(`ONLY=${name}: there are ${Object.keys(TARGETS).join(', ')}`);
    return 2;
  }
  const weights = names.reduce((sum, name) => sum + (TARGETS[name]?.weight ?? 0), 0);
  const outcomes: Outcome[] = [];
  console.log(`seed ${seed}`);
  for (const name of names) {
    const outcome = await campaign(name, seed, Math.max(1, (time * (TARGETS[name]?.weight ?? 0)) / weights), from);
    outcomes.push(outcome);
    const { cases, requests, seconds, finding } = outcome;
    const rate = Math.round(requests / seconds);
    console.log(`${name}: ${requests} requests in ${cases} cases, ${rate}/s, ${finding === undefined ? 'nothing found' : 'a finding'}`);
    if (finding !== undefined) console.log(describe(outcome));
  }
  const found = outcomes.filter(({ finding }) => finding !== undefined).length;
  console.log(`${outcomes.reduce((sum, { requests }) => sum + requests, 0)} requests, ${found} findings`);
  return found > 0 ? 1 : 0;
}

let status = 0;
if (values.child === true) {
  const [name = '', progress = '', seed, seconds, from] = positionals;
  await child(name, progress, Number(seed), Number(seconds), Number(from));
} else if (values.replay === true) {
  const [name = '', file = ''] = positionals;
  const found = await replay(name, file);
  console.log(found ?? 'nothing found');
  if (found !== undefined) status = 1;
} else status = await run();
// The offload threads would keep the process.
process.exit(status);
