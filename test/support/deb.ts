/** The Debian package in a machine. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { join } from 'node:path';
import { VERSION } from '../../src/options.js';
import { FuseClient } from './fuse-client.js';
import type { Machine } from './machine.js';

/** Installs it, has systemd serve a share by it, and removes it. */
export async function installedAndServing(machine: Machine, file: string): Promise<void> {
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
}
