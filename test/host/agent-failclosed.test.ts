/** The replay agent fails closed: nothing that is sent in its name changes the host, and nothing of anybody else is swallowed. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { it } from 'node:test';
import { InitFlag } from '../../src/fuse/abi.js';
import { Campaign } from '../support/agent-campaign.js';

/** `make test-long` has 150 000. */
const ROUNDS = Number(process.env['AGENT_ROUNDS'] ?? 6000);

it(`${ROUNDS} rounds of replays that are dropped, delayed, repeated, forged, and cut off`, { timeout: 3_600_000 }, () => {
  const folder = mkdtempSync(join(tmpdir(), 'failclosed-'));
  const seed = Number(process.env['SEED'] ?? Date.now() % 2 ** 31);
  process.umask(0);
  const campaign = new Campaign(folder, seed);
  let round = 0;
  try {
    for (; round < ROUNDS; round++) campaign.round();
  } catch (error) {
    throw new Error(`round ${round} of SEED=${seed}: ${(error as Error).message}`, { cause: error });
  } finally {
    campaign.close();
    rmSync(folder, { recursive: true, force: true });
  }
  const { replays, refused, realDone, kills } = campaign.tally;
  console.log(`${replays} replays, ${refused} refused, ${realDone} real changes, ${kills} kills`);
  for (const [what, count] of Object.entries(campaign.tally)) assert.ok(count > ROUNDS / 100, `${what}: ${count}`);
});

it('a guest that cannot have replays is told so', () => {
  const EOPNOTSUPP = 95;
  for (const flags of [0, InitFlag.AUTO_INVAL_DATA, InitFlag.EXPORT_SUPPORT]) {
    const folder = mkdtempSync(join(tmpdir(), 'failclosed-'));
    const campaign = new Campaign(folder, 1, flags);
    try {
      assert.equal(campaign.connect(), EOPNOTSUPP);
    } finally {
      campaign.close();
      rmSync(folder, { recursive: true, force: true });
    }
  }
});
