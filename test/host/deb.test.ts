/** `make deb`: the package in a machine of its own: installed, started by systemd, removed. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { before, test } from 'node:test';
import { repository } from '../../qemu/guest/daemon.js';
import { VERSION } from '../../src/options.js';
import { needsRoot } from '../support/daemon.js';
import { FuseClient } from '../support/fuse-client.js';
import { Machine } from '../support/machine.js';

const DEBS = join(repository, 'build/deb');
let file = '';
before(() => {
  execFileSync('make', ['-s', '-C', repository, 'deb'], { stdio: 'pipe' });
  file = join(DEBS, readdirSync(DEBS).find((name) => name.startsWith(`virtiofsd-ts_${VERSION}_`)) as string);
});

test('lintian has nothing to say', () => {
  const { status, stdout } = spawnSync('lintian', ['--allow-root', '--fail-on', 'error,warning', file], { encoding: 'utf8' });
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
  execFileSync('cp', [file, join(machine.root, 'tmp/package.deb')]);
  const before = machine.must('find', '/usr', '/etc', '-xdev', '-name', '*virtiofsd-ts*');
  machine.must('dpkg', '-i', '/tmp/package.deb');
  assert.match(machine.must('dpkg', '-s', 'virtiofsd-ts'), new RegExp(`^Status: install ok installed\n[^]*^Version: ${VERSION}$`, 'm'));
  assert.equal(machine.must('dpkg', '-V', 'virtiofsd-ts'), '');
  assert.equal(machine.must('virtiofsd-ts', '--version'), `virtiofsd-ts ${VERSION}\n`);
  assert.match(machine.must('man', 'virtiofsd-ts'), /virtio-fs daemon that tells the guest of file events/);
  assert.deepEqual(JSON.parse(machine.must('cat', '/usr/share/qemu/vhost-user/50-virtiofsd-ts.json')).binary, '/usr/bin/virtiofsd-ts');

  assert.match(machine.must('/usr/lib/virtiofsd-ts/agent/virtiofsd-ts-agent', '-h'), /^usage: /);

  machine.must(
    'sh',
    '-c',
    'mkdir /srv/share && echo -n packaged > /srv/share/file && cp /usr/share/doc/virtiofsd-ts/example.conf /etc/virtiofsd-ts/x.conf',
  );
  machine.must('sh', '-c', 'getent group kvm || groupadd -r kvm');
  machine.must('systemctl', 'start', 'virtiofsd-ts@x');
  const client = FuseClient.connect(join(machine.root, 'run/virtiofsd-ts/x.sock'));
  client.init();
  const { nodeid } = client.lookup(1, 'file');
  const { fh } = client.open(nodeid);
  assert.equal(client.read(nodeid, fh, 0, 100).toString(), 'packaged');
  client.close();
  machine.must('systemctl', 'stop', 'virtiofsd-ts@x');

  machine.must('rm', '/etc/virtiofsd-ts/x.conf');
  machine.must('dpkg', '--purge', 'virtiofsd-ts');
  assert.equal(machine.must('find', '/usr', '/etc', '-xdev', '-name', '*virtiofsd-ts*'), before, 'nothing is left');
});
