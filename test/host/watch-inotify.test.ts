/** The inotify fallback: the changes of the same list, echoes by what the daemon says it does, renames whose halves come apart. */
import assert from 'node:assert/strict';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { arenaAlloc, cString, native } from 'vhost-user-ts/native';
import { FS_EVENT_ON_CHILD, FS_MOVED_FROM, FS_MOVED_TO, FS_OPEN } from '../../src/watch/mask.js';
import { BASES, IN_ALL, Share } from '../support/watch-bench.js';
import { type Change, change } from '../support/watch-changer.js';
import { CHANGES } from '../support/watch-changes.js';
import { DELETE, OVERFLOW } from '../support/watch-guest.js';

const CHANGE_BITS = IN_ALL & ~0x31;
const ALL = (CHANGE_BITS | FS_EVENT_ON_CHILD) >>> 0;
const NAME = arenaAlloc(512);

describe('the same events as another local watcher', () => {
  for (const [name, base] of BASES) {
    test(name, async () => {
      const share = new Share(base, { mode: 'inotify' });
      try {
        assert.equal(share.fsnotify.kind, 'inotify');
        mkdirSync(join(share.root, 'w'));
        mkdirSync(join(share.root, 'w/s'));
        mkdirSync(join(share.root, 'o'));
        writeFileSync(join(share.root, 'w/f'), 'f');
        writeFileSync(join(share.root, 'o/other'), 'o');
        share.watch('w', ALL);
        share.watch('w/f', CHANGE_BITS);
        share.watch('w/s', ALL);
        share.seen();
        for (const c of CHANGES) {
          try {
            await share.changer.do(c);
          } catch (error) {
            if (c.op !== 'setxattr') throw error;
          }
          const { guest, local } = share.seen();
          assert.deepEqual(guest, local, JSON.stringify(c));
        }
      } finally {
        share.close();
      }
    });
  }
});

test('reads are not in what it can deliver', () => {
  const share = new Share('/var/tmp', { mode: 'inotify' });
  try {
    assert.equal(share.fsnotify.supportedLow & FS_OPEN, 0);
    assert.equal(share.fsnotify.watch(1, share.nodes.generation(1), FS_OPEN, 0, 0), -95);
  } finally {
    share.close();
  }
});

/** What the file system would say of a change by the guest. */
function expect(share: Share, c: Change, nodes: { d: number; f: number }): void {
  const echoes = share.fsnotify.echoes;
  assert.ok(echoes !== null);
  const entry = (mask: number, path: string) => {
    const name = path.slice(path.lastIndexOf('/') + 1);
    echoes.entry(nodes.d, mask, cString(name, NAME), Buffer.byteLength(name));
  };
  switch (c.op) {
    case 'append':
      echoes.object(nodes.f, 0x2 | 0x8);
      break;
    case 'chmod':
      echoes.object(nodes.f, 0x4);
      break;
    case 'mkdir':
      entry(0x100, c.path);
      break;
    case 'rmdir':
      entry(0x200, c.path);
      break;
    case 'rename':
      entry(FS_MOVED_FROM, c.path);
      entry(FS_MOVED_TO, c.to);
      break;
    default:
      throw new Error(c.op);
  }
}

test('what the daemon says that it does is an echo, the same by another is not', async () => {
  const share = new Share('/var/tmp', { mode: 'inotify' });
  try {
    mkdirSync(join(share.root, 'd'));
    writeFileSync(join(share.root, 'd/f'), 'f');
    const d = share.watch('d', ALL);
    const f = share.watch('d/f', CHANGE_BITS);
    const changes: Change[] = [
      { op: 'append', path: 'd/f' },
      { op: 'chmod', path: 'd/f', mode: 0o640 },
      { op: 'mkdir', path: 'd/x' },
      { op: 'rename', path: 'd/x', to: 'd/y' },
      { op: 'rmdir', path: 'd/y' },
    ];
    const cwd = process.cwd();
    process.chdir(share.root);
    for (const c of changes) {
      change(c);
      expect(share, c, { d, f });
      assert.deepEqual(share.seen().guest, [], JSON.stringify(c));
    }
    process.chdir(cwd);
    for (const c of changes) {
      await share.changer.do(c);
      const { guest, local } = share.seen();
      assert.ok(guest.length > 0);
      assert.deepEqual(guest, local);
    }
  } finally {
    share.close();
  }
});

test('the end of a watched directory is told', async () => {
  const share = new Share('/var/tmp', { mode: 'inotify' });
  try {
    mkdirSync(join(share.root, 'a'));
    mkdirSync(join(share.root, 'a/b'));
    const a = share.nodes.look(join(share.root, 'a'));
    const b = share.watch('a/b', ALL);
    await share.changer.do({ op: 'rmdir', path: 'a/b' });
    const told = share.messages().filter((message) => message.code === DELETE);
    assert.deepEqual(
      told.map(({ nodeid, child, name }) => [nodeid, child, name]),
      [[a, b, 'b']],
    );
  } finally {
    share.close();
  }
});

test('more events than the kernel keeps: the guest is told', async () => {
  const share = new Share('/dev/shm', { mode: 'inotify' });
  try {
    for (let i = 0; i < 100; i++) {
      mkdirSync(join(share.root, `${i}`));
      const nodeid = share.nodes.look(join(share.root, `${i}`));
      assert.equal(share.fsnotify.watch(nodeid, share.nodes.generation(nodeid), ALL, 0, 0), 0);
    }
    await share.changer.do({ op: 'storm', path: '.', files: 20_000, directories: 100 });
    const records = share.messages().flatMap((message) => message.records);
    assert.equal(records.filter((record) => record.flags === OVERFLOW).length, 1);
    // And goes on afterwards.
    await share.changer.do({ op: 'write', path: '5/after' });
    assert.ok(
      share
        .messages()
        .flatMap((message) => message.records)
        .some((record) => record.name === 'after'),
    );
  } finally {
    share.close();
  }
});

test('mode auto: inotify takes what fanotify cannot mark', async () => {
  const share = new Share('/var/tmp', { mode: 'auto' });
  const { fanotifyMark } = native;
  try {
    for (const name of ['a', 'b']) mkdirSync(join(share.root, name));
    share.watch('a', ALL);
    // As on a file system that Linux 6.1 cannot give handles of.
    native.fanotifyMark = () => -95;
    const b = share.watch('b', (IN_ALL | FS_EVENT_ON_CHILD) >>> 0);
    native.fanotifyMark = fanotifyMark;
    assert.equal(share.fsnotify.kind, 'both');
    assert.equal(share.fsnotify.watches, 2);
    await share.changer.do({ op: 'write', path: 'b/x' });
    assert.equal(native.poll(share.fsnotify.fd, 1, 0), 1);
    assert.deepEqual(share.seen().guest, ['b x CREATE', 'b x MODIFY', 'b x CLOSE_WRITE']);
    await share.changer.do({ op: 'rename', path: 'b/x', to: 'a/x' });
    // Each of the two knows one half.
    assert.deepEqual(share.seen().guest.sort(), ['a x MOVED_TO', 'b x MOVED_FROM']);
    assert.equal(share.fsnotify.watch(b, share.nodes.generation(b), 0, 0, 0), 0);
    assert.equal(share.fsnotify.watches, 1);
    await share.changer.do({ op: 'write', path: 'b/y' });
    assert.deepEqual(share.messages(), []);
    assert.equal(native.poll(share.fsnotify.fd, 1, 0), 0);
  } finally {
    native.fanotifyMark = fanotifyMark;
    share.close();
  }
});
