/** Host changes against what a local inotify watcher sees of them. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { native } from 'vhost-user-ts/native';
import { FS_EVENT_ON_CHILD, FS_RENAME } from '../../src/watch/mask.js';
import { BASES, IN_ALL, Share } from '../support/watch-bench.js';
import { compare } from '../support/watch-changes.js';
import { DELETE, INVAL_ENTRY, INVAL_INODE } from '../support/watch-guest.js';

const ALL = (IN_ALL | FS_EVENT_ON_CHILD) >>> 0;
for (const [name, base] of BASES) {
  describe(name, () => {
    test('the same events as a local watcher', () => compare(base, true));
    test('without handles in the store', () => compare(base, false));
    test('as another user, without privileges', { skip: process.getuid?.() !== 0 && 'needs root to become another user' }, () => {
      const directory = mkdtempSync(join(base, 'watch-user-'));
      chmodSync(directory, 0o777);
      const script = fileURLToPath(new URL('../support/watch-changes.js', import.meta.url));
      const run = spawnSync(process.execPath, [script, directory, 'none'], { uid: 65534, gid: 65534, encoding: 'utf8', cwd: '/' });
      rmSync(directory, { recursive: true });
      assert.equal(run.stdout + run.stderr, 'uid 65534: the same\n');
    });
  });
}

/** What Linux before 5.17 cannot do: name the child of an entry that changed, and FAN_RENAME. */
async function asBefore517(run: () => Promise<void>): Promise<void> {
  const { fanotifyInit, fanotifyMark } = native;
  native.fanotifyInit = (flags, eventFlags) => ((flags & 0x1000) !== 0 ? -22 : fanotifyInit(flags, eventFlags));
  native.fanotifyMark = (fd, flags, low, high, dirfd, name) =>
    (low & FS_RENAME) !== 0 ? -22 : fanotifyMark(fd, flags, low, high, dirfd, name);
  try {
    await run();
  } finally {
    Object.assign(native, { fanotifyInit, fanotifyMark });
  }
}

test('as before Linux 5.17: the same events, renames in halves', () => asBefore517(() => compare('/var/tmp', true, false)));

test('as before Linux 5.17: removed and made anew in one event', () =>
  asBefore517(async () => {
    const share = new Share('/var/tmp');
    try {
      mkdirSync(join(share.root, 'd'));
      share.watch('d', (0x300 | FS_EVENT_ON_CHILD) >>> 0);
      await share.changer.do({ op: 'write', path: 'd/f' });
      assert.deepEqual(share.seen().guest, ['d f CREATE']);
      await share.changer.do({ op: 'unlink', path: 'd/f' });
      await share.changer.do({ op: 'write', path: 'd/f' });
      assert.deepEqual(share.seen().guest, ['d f DELETE', 'd f CREATE']);
      await share.changer.do({ op: 'write', path: 'd/g' });
      await share.changer.do({ op: 'unlink', path: 'd/g' });
      assert.deepEqual(share.seen().guest, ['d g CREATE', 'd g DELETE']);
    } finally {
      share.close();
    }
  }));

test('a directory that nobody knows, after the first of the watches has ended', async () => {
  const share = new Share('/var/tmp');
  try {
    for (const name of ['first', 'd', 'd/sub']) mkdirSync(join(share.root, name));
    const first = share.watch('first', ALL);
    share.watch('d', ALL);
    share.watch('first', 0);
    share.fsnotify.forget(first);
    share.nodes.forget(first);
    await share.changer.do({ op: 'chmod', path: 'd/sub', mode: 0o700 });
    assert.deepEqual(share.seen().guest, ['d sub ATTRIB,ISDIR']);
  } finally {
    share.close();
  }
});

test('a file that is watched alone: events on itself', async () => {
  const share = new Share('/var/tmp');
  try {
    mkdirSync(join(share.root, 'd'));
    writeFileSync(join(share.root, 'd/f'), 'f');
    const f = share.watch('d/f', IN_ALL);
    await share.changer.do({ op: 'append', path: 'd/f' });
    const messages = share.messages();
    assert.deepEqual(
      messages.flatMap((message) => message.records).map(({ nodeid, child, name }) => ({ nodeid, child, name })),
      Array(3).fill({ nodeid: f, child: 0, name: '' }),
    );
    assert.deepEqual(messages[0]?.code, INVAL_INODE);
    assert.equal(messages[0]?.nodeid, f);
    share.local.take();
    await share.changer.do({ op: 'rename', path: 'd/f', to: 'd/g' });
    const { guest, local } = share.seen();
    assert.deepEqual(guest, ['d/f  MOVE_SELF']);
    assert.deepEqual(guest, local);
  } finally {
    share.close();
  }
});

test('a watched directory and a watched file in it: one record for both', async () => {
  const share = new Share('/var/tmp');
  try {
    mkdirSync(join(share.root, 'd'));
    writeFileSync(join(share.root, 'd/f'), 'f');
    const d = share.watch('d', ALL);
    const f = share.watch('d/f', IN_ALL);
    await share.changer.do({ op: 'chmod', path: 'd/f', mode: 0o600 });
    const records = share.messages().flatMap((message) => message.records);
    assert.deepEqual(records, [
      { flags: 0, nodeid: d, child: f, mask: 0x0800_0004, generation: 7000 + d, childGeneration: 7000 + f, cookie: 0, name: 'f' },
    ]);
  } finally {
    share.close();
  }
});

test('a rename is two records in one message, and invalidations come first', async () => {
  const share = new Share('/var/tmp');
  try {
    mkdirSync(join(share.root, 'd'));
    writeFileSync(join(share.root, 'd/f'), 'f');
    const d = share.watch('d', (FS_RENAME | FS_EVENT_ON_CHILD) >>> 0);
    const f = share.nodes.look(join(share.root, 'd/f'));
    await share.changer.do({ op: 'rename', path: 'd/f', to: 'd/g' });
    const messages = share.messages();
    assert.deepEqual(
      messages.map(({ code, nodeid, name, offset }) => [code, nodeid, name, offset]),
      [
        [INVAL_ENTRY, d, 'f', 0],
        [INVAL_ENTRY, d, 'g', 0],
        [INVAL_INODE, d, '', 0],
        [INVAL_INODE, f, '', -1],
        [128, 0, '', 0],
      ],
    );
    const [source, target] = messages[4]?.records ?? [];
    assert.deepEqual([source?.flags, source?.mask, source?.name, source?.child], [2, 0x40, 'f', f]);
    assert.deepEqual([target?.flags, target?.mask, target?.name, target?.child], [0, 0x80, 'g', f]);
  } finally {
    share.close();
  }
});

test('our own changes are echoes, a second process of ours is not', async () => {
  const share = new Share('/var/tmp');
  try {
    mkdirSync(join(share.root, 'd'));
    share.watch('d', ALL);
    writeFileSync(join(share.root, 'd/own'), 'x');
    // Not only this thread's: libuv's threads do it, too.
    await import('node:fs/promises').then((fs) => fs.writeFile(join(share.root, 'd/own2'), 'x'));
    assert.deepEqual(share.seen().guest, []);
    assert.ok(share.counters.values[1] !== 0);
    await share.changer.do({ op: 'unlink', path: 'd/own' });
    assert.deepEqual(share.seen().guest, ['d own DELETE']);
  } finally {
    share.close();
  }
});

test('the end of a watched directory and file: the guest is told by DELETE with the child', async () => {
  const share = new Share('/var/tmp');
  try {
    mkdirSync(join(share.root, 'a'));
    mkdirSync(join(share.root, 'a/b'));
    mkdirSync(join(share.root, 'c'));
    writeFileSync(join(share.root, 'c/f'), 'x');
    const a = share.nodes.look(join(share.root, 'a'));
    const b = share.watch('a/b', ALL);
    await share.changer.do({ op: 'rmdir', path: 'a/b' });
    const messages = share.messages();
    assert.deepEqual(
      messages.map(({ code, nodeid, child, name }) => [code, nodeid, child, name]),
      [[DELETE, a, b, 'b']],
    );
    // Moved to another directory before: that one guards it.
    mkdirSync(join(share.root, 'a/m'));
    const c = share.nodes.look(join(share.root, 'c'));
    const m = share.watch('a/m', ALL);
    await share.changer.do({ op: 'rename', path: 'a/m', to: 'c/m2' });
    share.messages();
    await share.changer.do({ op: 'rmdir', path: 'c/m2' });
    assert.deepEqual(
      share
        .messages()
        .filter((message) => message.code === DELETE)
        .map(({ nodeid, child, name }) => [nodeid, child, name]),
      [[c, m, 'm2']],
    );
    // A file with another name is not gone.
    share.watch('c', ALL);
    const f = share.watch('c/f', IN_ALL);
    await share.changer.do({ op: 'link', path: 'c/f', to: 'c/g' });
    await share.changer.do({ op: 'unlink', path: 'c/f' });
    assert.equal(
      share.messages().some((message) => message.code === DELETE),
      false,
    );
    await share.changer.do({ op: 'unlink', path: 'c/g' });
    assert.deepEqual(
      share
        .messages()
        .filter((message) => message.code === DELETE)
        .map(({ child, name }) => [child, name]),
      // That its links have come to an end, and that this was one.
      [
        [f, '.'],
        [f, 'g'],
      ],
    );
    // One that is replaced, or in a directory that nobody watches: by what name it was known is not known.
    writeFileSync(join(share.root, 'a/old'), 'x');
    writeFileSync(join(share.root, 'a/new'), 'x');
    const old = share.watch('a/old', IN_ALL);
    await share.changer.do({ op: 'rename', path: 'a/new', to: 'a/old' });
    assert.deepEqual(
      share
        .messages()
        .filter((message) => message.code === DELETE)
        .map(({ nodeid, child, name }) => [nodeid, child, name]),
      [[1, old, '.']],
    );
  } finally {
    share.close();
  }
});

test('errors and limits of watch requests', () => {
  const share = new Share('/var/tmp', { limit: 2 });
  try {
    const { fsnotify, nodes } = share;
    for (const name of ['a', 'b', 'c']) mkdirSync(join(share.root, name));
    const [a, b, c] = ['a', 'b', 'c'].map((name) => nodes.look(join(share.root, name))) as [number, number, number];
    assert.equal(fsnotify.watch(999, 0, 2, 0, 0), -2);
    assert.equal(fsnotify.watch(a, 1, 2, 0, 0), -116);
    assert.equal(fsnotify.watch(a, nodes.generation(a), 0x10000, 0, 0), -95);
    assert.equal(fsnotify.watch(a, nodes.generation(a), 2, 1, 0), -95);
    assert.equal(fsnotify.watch(a, nodes.generation(a), 2, 0, 4), -22);
    assert.equal(fsnotify.watch(a, nodes.generation(a), ALL, 0, 0), 0);
    assert.equal(fsnotify.watch(b, nodes.generation(b), ALL, 0, 0), 0);
    assert.equal(fsnotify.watch(a, nodes.generation(a), 2, 0, 0), 0);
    assert.equal(fsnotify.watch(c, nodes.generation(c), ALL, 0, 0), -28);
    assert.equal(fsnotify.watches, 2);
    assert.equal(fsnotify.watch(a, nodes.generation(a), 0, 0, 0), 0);
    assert.equal(fsnotify.watch(a, nodes.generation(a), 0, 0, 0), 0);
    assert.equal(fsnotify.watch(c, nodes.generation(c), ALL, 0, 0), 0);
    fsnotify.forget(c);
    assert.equal(fsnotify.watches, 1);
    assert.deepEqual(
      [...fsnotify.list()].map(({ nodeid }) => nodeid),
      [b],
    );
    fsnotify.end();
    assert.equal(fsnotify.watches, 0);
  } finally {
    share.close();
  }
});

test('a narrowed mask and an ended watch are silent at once', async () => {
  const share = new Share('/var/tmp');
  try {
    mkdirSync(join(share.root, 'd'));
    share.watch('d', ALL);
    share.watch('d', (0x200 | FS_EVENT_ON_CHILD) >>> 0);
    await share.changer.do({ op: 'write', path: 'd/x' });
    assert.deepEqual(share.seen().guest, []);
    assert.equal(share.counters.values[0], 0, 'the mark itself was narrowed');
    await share.changer.do({ op: 'unlink', path: 'd/x' });
    assert.deepEqual(share.seen().guest, ['d x DELETE']);
    const nodeid = share.nodes.look(join(share.root, 'd'));
    share.fsnotify.watch(nodeid, share.nodes.generation(nodeid), 0, 0, 0);
    await share.changer.do({ op: 'write', path: 'd/x' });
    assert.deepEqual(share.messages(), []);
  } finally {
    share.close();
  }
});

test('every object (FUSE_FSNOTIFY_ALL): directories known before and after', async () => {
  const share = new Share('/var/tmp');
  try {
    mkdirSync(join(share.root, 'a'));
    mkdirSync(join(share.root, 'b'));
    const { fsnotify, nodes } = share;
    const a = nodes.look(join(share.root, 'a'));
    assert.equal(fsnotify.watch(1, nodes.generation(1), 0x3ca, 0, 1), 0);
    const b = nodes.look(join(share.root, 'b'));
    fsnotify.known(b);
    await share.changer.do({ op: 'write', path: 'a/x' });
    await share.changer.do({ op: 'write', path: 'b/y' });
    await share.changer.do({ op: 'write', path: 'z' });
    const creates = share
      .messages()
      .flatMap((message) => message.records)
      .filter((record) => record.mask === 0x100);
    assert.deepEqual(
      creates.map(({ nodeid, name }) => [nodeid, name]),
      [
        [a, 'x'],
        [b, 'y'],
        [1, 'z'],
      ],
    );
  } finally {
    share.close();
  }
});

for (const handles of [true, false]) {
  test(`coherence: invalidations without events for what the guest does not watch, handles ${handles}`, async () => {
    const share = new Share('/var/tmp', { handles });
    try {
      mkdirSync(join(share.root, 'a'));
      writeFileSync(join(share.root, 'a/f'), 'f');
      const { fsnotify, nodes } = share;
      const a = nodes.look(join(share.root, 'a'));
      const f = nodes.look(join(share.root, 'a/f'));
      fsnotify.begin(undefined, true);
      await share.changer.do({ op: 'append', path: 'a/f' });
      await share.changer.do({ op: 'write', path: 'a/new' });
      const messages = share.messages();
      assert.deepEqual(
        messages.map(({ code, nodeid, name }) => [code, nodeid, name]),
        [
          [INVAL_INODE, f, ''],
          [INVAL_INODE, a, ''],
          [INVAL_ENTRY, a, 'new'],
        ],
      );
    } finally {
      share.close();
    }
  });
}
