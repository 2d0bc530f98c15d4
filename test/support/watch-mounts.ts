/** Sub-mounts, bind mounts, symbolic links and a file system without handles; runs in a mount namespace of its own (see watch-mounts.test.ts). */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdirSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { FS_EVENT_ON_CHILD } from '../../src/watch/mask.js';
import { IN_ALL, Share } from './watch-bench.js';

const ALL = ((IN_ALL & ~0x31) | FS_EVENT_ON_CHILD) >>> 0;

const share = new Share(process.argv[2] as string, { mode: 'auto' });
const { root, changer, fsnotify } = share;
const lines = () => share.seen().guest;
const mount = (...args: string[]) => execFileSync('mount', args);

try {
  for (const name of ['tmp', 'real', 'real/in', 'bound', 'ram']) mkdirSync(join(root, name));

  // A file system of its own below the share.
  mount('-t', 'tmpfs', 'none', join(root, 'tmp'));
  mkdirSync(join(root, 'tmp/d'));
  share.watch('tmp', ALL);
  share.watch('.', ALL);
  await changer.do({ op: 'write', path: 'tmp/x' });
  assert.deepEqual(lines(), ['tmp x CREATE', 'tmp x MODIFY', 'tmp x CLOSE_WRITE']);
  await changer.do({ op: 'chmod', path: 'tmp/d', mode: 0o700 });
  assert.deepEqual(lines(), ['tmp d ATTRIB,ISDIR']);
  // The root of a mount is no child for the kernel's events.
  await changer.do({ op: 'chmod', path: 'tmp', mode: 0o755 });
  const { guest, local } = share.seen();
  assert.deepEqual(guest, ['tmp  ATTRIB,ISDIR']);
  assert.deepEqual(guest, local);

  // One directory through two mounts: two nodes for the guest, one mark on the host.
  mount('--bind', join(root, 'real'), join(root, 'bound'));
  const real = share.watch('real', ALL);
  await changer.do({ op: 'write', path: 'bound/a' });
  assert.deepEqual(lines(), ['real a CREATE', 'real a MODIFY', 'real a CLOSE_WRITE']);
  const bound = share.watch('bound', (0x300 | FS_EVENT_ON_CHILD) >>> 0);
  assert.notEqual(bound, real);
  await changer.do({ op: 'write', path: 'real/b' });
  assert.deepEqual(lines().sort(), ['bound b CREATE', 'real b CLOSE_WRITE', 'real b CREATE', 'real b MODIFY']);
  const a = share.watch('bound/a', IN_ALL & ~0x31);
  await changer.do({ op: 'append', path: 'real/a' });
  assert.deepEqual(lines().sort(), ['bound/a  CLOSE_WRITE', 'bound/a  MODIFY', 'real a CLOSE_WRITE', 'real a MODIFY']);
  await changer.do({ op: 'rename', path: 'real/b', to: 'real/c' });
  assert.deepEqual(lines(), ['real b MOVED_FROM →', 'real c MOVED_TO ←']);
  share.watch('real', 0);
  await changer.do({ op: 'write', path: 'real/d' });
  assert.deepEqual(lines(), ['bound d CREATE']);
  fsnotify.forget(bound);
  share.watches.delete(bound);
  await changer.do({ op: 'write', path: 'real/e' });
  assert.deepEqual(lines(), []);
  assert.ok(a > 0);

  // A symbolic link leads to the object that is watched.
  symlinkSync('real/in', join(root, 'link'));
  share.watch('real/in', ALL);
  share.seen();
  await changer.do({ op: 'write', path: 'link/x' });
  assert.deepEqual(lines(), ['real/in x CREATE', 'real/in x MODIFY', 'real/in x CLOSE_WRITE']);

  // A file system whose handles nobody can open (AT_HANDLE_FID, Linux 6.5), or inotify's part before that.
  mount('-t', 'ramfs', 'none', join(root, 'ram'));
  mkdirSync(join(root, 'ram/d'));
  share.watch('ram', ALL);
  await changer.do({ op: 'write', path: 'ram/x' });
  assert.deepEqual(lines(), ['ram x CREATE', 'ram x MODIFY', 'ram x CLOSE_WRITE']);
  await changer.do({ op: 'write', path: 'tmp/y' });
  assert.ok(lines().includes('tmp y CREATE'));
  process.stdout.write('done\n');
} catch (error) {
  process.stdout.write(`${String(error)}\n`);
} finally {
  for (const name of ['tmp', 'bound', 'ram']) spawnSync('umount', ['--lazy', join(root, name)], { stdio: 'ignore' });
  share.close();
}
