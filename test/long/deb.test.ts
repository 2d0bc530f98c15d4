/** The Debian package on Debian 13, with that one's systemd and Node.js. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { copyFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { repository } from '../../qemu/guest/daemon.js';
import { VERSION } from '../../src/options.js';
import { needsRoot } from '../support/daemon.js';
import { installedAndServing } from '../support/deb.js';
import { Machine } from '../support/machine.js';

test('Debian 13: installed, serving a share under systemd, removed; what the doctor says', {
  ...needsRoot,
  timeout: 600_000,
}, async (t) => {
  const script = join(repository, 'test/support/debian13.sh');
  const root = execFileSync(script, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] }).trim();
  execFileSync('make', ['-s', '-C', repository, 'deb'], { stdio: 'pipe' });
  const debs = join(repository, 'build/deb');
  const file = join(debs, readdirSync(debs).find((name) => name.startsWith(`virtiofsd-ts_${VERSION}_`)) as string);
  await using machine = await Machine.start([], root);
  assert.match(machine.must('cat', '/etc/debian_version'), /^13/);
  const node = machine.must('node', '--version').trim();
  assert.match(node, /^v20\.19\./);
  await installedAndServing(machine, file);

  copyFileSync(file, join(machine.root, 'tmp/package.deb'));
  machine.must('dpkg', '-i', '/tmp/package.deb');
  const { status, stdout, stderr } = machine.run('virtiofsd-ts', 'doctor');
  assert.deepEqual([status, stderr], [0, ''], stdout);
  assert.match(stdout, /^ok +daemon /m);
  t.diagnostic(`Node.js ${node}; the doctor:\n${stdout}`);
});
