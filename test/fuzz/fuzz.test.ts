/** Every case that ever failed, and a short run of each target with a new seed. The long runs are `make fuzz`. */
import assert from 'node:assert/strict';
import { suite, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { campaign, describe } from './campaign.js';
import { corpus, failure } from './engine.js';
import { TARGETS } from './targets.js';

const FOLDER = fileURLToPath(new URL('../../../../test/fuzz/corpus', import.meta.url));
/** Seconds of random cases, for all targets together. */
const SECONDS = 20;

const names = Object.keys(TARGETS);
const weights = names.reduce((sum, name) => sum + (TARGETS[name]?.weight ?? 0), 0);
const seed = Number(process.env['SEED'] ?? Date.now() % 0x7fffffff);

for (const name of names) {
  const row = TARGETS[name] as (typeof TARGETS)[string];
  suite(name, () => {
    test('the corpus', async () => {
      const target = await row.open();
      // What was found in the device is shown to the real program, too.
      const kept = name === 'daemon' ? [...corpus(FOLDER, name), ...corpus(FOLDER, 'fuse')] : corpus(FOLDER, name);
      for (const { file, test } of kept) assert.equal(failure(target, test), undefined, file);
      target.close();
    });

    test(`random cases, seed ${seed}`, async (t) => {
      const outcome = await campaign(name, seed, Math.max(1, (SECONDS * row.weight) / weights));
      t.diagnostic(`${outcome.requests} requests in ${outcome.cases} cases, seed ${seed}`);
      assert.equal(describe(outcome), '');
      assert.ok(outcome.requests > 0);
    });
  });
}
