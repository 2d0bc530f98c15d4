/** Mounts below the share; what is mounted is seen by the test's process alone. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';

const script = fileURLToPath(new URL('../support/watch-mounts.js', import.meta.url));

test('sub-mounts, bind mounts, symbolic links, file systems without an id', {
  skip: process.getuid?.() !== 0 && 'mounting needs root',
}, () => {
  const run = spawnSync('unshare', ['--mount', '--propagation', 'private', process.execPath, script, '/var/tmp'], { encoding: 'utf8' });
  assert.equal(run.stderr, '');
  assert.equal(run.stdout, 'done\n');
});
