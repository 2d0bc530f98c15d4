/**
 * The command lines of libvirt 11 and 12 for qemu/libvirt/filesystem/*.xml: what their qemuVirtioFSBuildCommandLine() makes of them
 * for a daemon whose --print-capabilities lists "separate-options". (qemu/libvirt.ts runs Debian 12's libvirt 9.0 itself.)
 */
import assert from 'node:assert/strict';
import { chmodSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { cString, native } from 'vhost-user-ts/native';
import { repository } from '../../qemu/guest/daemon.js';
import { root, TestDaemon } from '../support/daemon.js';
import { errnoOf, FuseClient } from '../support/fuse-client.js';

const EROFS = 30;

/** After `--fd=N --shared-dir DIR`. */
const LATER: Record<string, readonly string[]> = {
  cache: ['--cache', 'always'],
  'no-binary': [],
  sandbox: ['--sandbox', 'chroot'],
  xattr: ['--xattr'],
  'thread-pool': ['--thread-pool-size=4'],
  openfiles: ['--rlimit-nofile=4096'],
  idmap: ['--uid-map=:0:100000:65536:', '--gid-map=:0:100000:65536:'],
  readonly: ['--readonly'],
};
/** Refused by libvirt itself, not started by it, or the same twice. */
const NOT_THERE = ['lock', 'no-lock', 'external-socket', 'several'];

describe('libvirt 11 and 12', { skip: root ? false : 'libvirt starts it as root' }, () => {
  const files = readdirSync(join(repository, 'qemu/libvirt/filesystem')).map((file) => file.replace('.xml', ''));

  test('every file of qemu/libvirt/filesystem is here', () => {
    assert.deepEqual([...Object.keys(LATER), ...NOT_THERE].sort(), files.sort());
  });

  for (const [name, words] of Object.entries(LATER)) {
    test(`${name}: ${words.join(' ')}`, async () => {
      const socket = join('/tmp', `libvirt-${process.pid}-${name}.sock`);
      const fd = native.unixListen(cString(socket), 1);
      // With a map it is the share of a user who comes from outside, who must get to it.
      const share = mkdtempSync('/tmp/libvirt-');
      chmodSync(share, 0o755);
      await using daemon = await TestDaemon.start([...words, '--log-level', 'debug'], { listen: ['--fd=3'], inherit: [fd], share });
      writeFileSync(join(daemon.share, 'file'), 'x');
      const client = FuseClient.connect(socket, { features: ~1n });
      client.init();
      const file = client.lookup(1, 'file');
      assert.equal(file.attr.ino, statSync(join(daemon.share, 'file'), { bigint: true }).ino);
      if (name === 'readonly')
        assert.equal(
          errnoOf(() => client.mkdir(1, 'new')),
          EROFS,
        );
      if (name === 'openfiles') assert.match(daemon.proc('limits'), /^Max open files +4096 /m);
      if (name === 'idmap') assert.match(readFileSync(`/proc/${daemon.inside}/uid_map`, 'utf8'), /^ *0 +100000 +65536$/m);
      client.close();
      assert.deepEqual(await daemon.ended, { status: 0, signal: null });
      native.close(fd);
      rmSync(share, { recursive: true });
      native.unlinkat(-100, cString(socket), 0);
    });
  }
});
