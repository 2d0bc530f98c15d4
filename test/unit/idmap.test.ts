import assert from 'node:assert/strict';
import { test } from 'node:test';
import { IdMap } from '../../src/fs/idmap.js';

test('no rules: every id is itself', () => {
  const map = new IdMap();
  assert.equal(map.identity, true);
  assert.equal(map.toHost(4294967295), 4294967295);
  assert.equal(map.toGuest(0), 0);
});

test('guest and host rules are independent directions, map is both', () => {
  const guest = new IdMap(['guest:0:100000:65536']);
  assert.equal(guest.toHost(0), 100000);
  assert.equal(guest.toHost(65535), 165535);
  assert.equal(guest.toHost(65536), 65536);
  assert.equal(guest.toGuest(100000), 100000);
  const host = new IdMap(['host:1001:1000:1']);
  assert.equal(host.toGuest(1001), 1000);
  assert.equal(host.toHost(1000), 1000);
  const both = new IdMap(['map:1000:2000:10']);
  assert.equal(both.toHost(1009), 2009);
  assert.equal(both.toGuest(2009), 1009);
});

test('squash: a whole range becomes one id', () => {
  const map = new IdMap(['squash-guest:0:1001:4294967295', 'squash-host:0:65534:1000']);
  assert.equal(map.toHost(0), 1001);
  assert.equal(map.toHost(4294967294), 1001);
  assert.equal(map.toGuest(999), 65534);
  assert.equal(map.toGuest(1000), 1000);
});

test('forbid-guest: EPERM for the range', () => {
  const map = new IdMap(['forbid-guest:0:1000', 'map:1000:1000:1', 'forbid-guest:1001:4294966294']);
  assert.equal(map.toHost(0), -1);
  assert.equal(map.toHost(999), -1);
  assert.equal(map.toHost(1000), 1000);
  assert.equal(map.toHost(1001), -1);
  assert.equal(map.toHost(4294967294), -1);
});

test('wrong rules are refused with their text', () => {
  for (const rule of [
    '',
    'map',
    'map:1:2',
    'map:1:2:3:4',
    'both:1:2:3',
    'map:a:2:3',
    'map:-1:2:3',
    'map:1:2:4294967296',
    'forbid-guest:1:2:3',
    'map:4294967295:0:1',
    'guest:0:4294967290:10',
  ]) {
    assert.throws(
      () => new IdMap([rule]),
      (error: Error) => error.message.startsWith(`${rule}: `),
      rule,
    );
  }
  assert.throws(() => new IdMap(['map:0:0:10', 'guest:9:0:1']), /^Error: guest:9:0:1: meets another rule for the same guest ids/);
  assert.doesNotThrow(() => new IdMap(['map:0:0:10', 'guest:10:10:1', 'host:10:11:1']));
});
