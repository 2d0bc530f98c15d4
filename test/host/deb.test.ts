/** `make deb`: the package in a machine of its own: installed, started by systemd, removed. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { before, test } from 'node:test';
import { repository } from '../../qemu/guest/daemon.js';
import { VERSION } from '../../src/options.js';
import { needsRoot } from '../support/daemon.js';
import { installedAndServing } from '../support/deb.js';
import { Machine } from '../support/machine.js';

const DEBS = join(repository, 'build/deb');
let file = '';
before(() => {
  execFileSync('make', ['-s', '-C', repository, 'deb'], { stdio: 'pipe' });
  file = join(DEBS, readdirSync(DEBS).find((name) => name.startsWith(`virtiofsd-ts_${VERSION}_`)) as string);
});

test('lintian has nothing to say', () => {
  const { status, stdout } = spawnSync(
    'lintian',
    ['--allow-root', '--display-info', '--pedantic', '--fail-on', 'error,warning,info,pedantic', file],
    { encoding: 'utf8' },
  );
  assert.deepEqual([status, stdout], [0, '']);
});

test('the same again is the same package', () => {
  const sum = () => execFileSync('sha256sum', [file], { encoding: 'utf8' });
  const first = sum();
  execFileSync('make', ['-s', '-C', repository, 'deb'], { stdio: 'pipe' });
  assert.equal(sum(), first);
});

test('installed, serving a share under systemd, removed', { ...needsRoot, timeout: 240_000 }, async () => {
  await using machine = await Machine.start([repository]);
  assert.equal(machine.must('ls', repository), '', 'the repository is not there');
  await installedAndServing(machine, file);
});
