/** Live migration copies pages that the log names: every page of guest memory that the daemon writes to must be in it. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { type DirtyLog, MockMemory } from 'vhost-user-ts/testing';
import { InitFlag2 } from '../../src/fuse/abi.js';
import { FS_CREATE } from '../../src/watch/mask.js';
import { TestDaemon } from '../support/daemon.js';
import { type FuseClient, LINUX_INIT_FLAGS2 } from '../support/fuse-client.js';

const PAGE = 4096;
/** What the client fills its buffers with. */
const FILLED = 0xee;
const SIZE = 32 << 20;

/** What `action` changes of used rings and reply buffers is in the log; returns how many pages the log has. */
function changes(fuse: FuseClient, log: DirtyLog, action: () => void): number {
  const { memory, queues } = fuse.driver;
  const before = memory.read(0, SIZE);
  log.take();
  action();
  const after = memory.view(0, SIZE);
  const logged = new Set(log.take());
  const rings = queues.map((queue) => ({ address: queue.used, length: 6 + 8 * queue.size }));
  let changed = 0;
  for (const { address, length } of [...replies.splice(0), ...rings]) {
    for (let at = address; at < address + length; ) {
      const end = Math.min(address + length, (Math.floor(at / PAGE) + 1) * PAGE);
      if (before.compare(after, at, end, at, end) !== 0 && after.subarray(at, end).some((byte) => byte !== FILLED)) {
        changed++;
        assert.ok(logged.has(Math.floor(at / PAGE)), `${end - at} bytes at ${at} were written and are not in the log`);
      }
      at = end;
    }
  }
  assert.ok(changed > 0);
  return logged.size;
}

const replies: { address: number; length: number }[] = [];

/** Notes where the replies of a client go. */
function spy(fuse: FuseClient): void {
  for (const queue of fuse.driver.queues) {
    const add = queue.add.bind(queue);
    queue.add = (readable, writable = [], indirect = false) => {
      for (const { address, length } of writable) replies.push({ address: Number(address), length });
      return add(readable, writable, indirect);
    };
  }
}

test('replies, jobs, the used ring and lent buffers', async () => {
  await using daemon = await TestDaemon.start();
  const data = Buffer.alloc(1 << 20, 'data');
  writeFileSync(join(daemon.share, 'file'), data);
  for (let i = 0; i < 200; i++) writeFileSync(join(daemon.share, `${'name'.repeat(30)}${i}`), '');
  mkdirSync(join(daemon.share, 'dir'));
  execFileSync('sync', [join(daemon.share, 'file')]);
  const memory = new MockMemory([{ guestAddress: 0, size: SIZE }]);
  const fuse = daemon.session({ flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY }, { memory });
  spy(fuse);
  const { nodeid } = fuse.lookup(1, 'file');
  const { fh } = fuse.open(nodeid, 2);
  fuse.fsnotify(1, FS_CREATE);
  // Lent before anything is logged: where they lie was noted by nobody then.
  const lent = fuse.submitReadNotify(4096 + 16);
  const lentAt = replies.at(-1);
  replies.length = 0;

  const log = fuse.driver.startLogging();
  assert.ok(changes(fuse, log, () => fuse.getattr(nodeid)) <= 4);
  for (let offset = 0; offset < data.length; offset += 256 << 10) {
    const logged = changes(fuse, log, () => assert.equal(fuse.read(nodeid, fh, offset, 256 << 10).length, 256 << 10));
    assert.ok(logged >= 64, `${logged} pages for 64 of data`);
  }
  const { fh: directory } = fuse.opendir(1);
  changes(fuse, log, () => assert.ok(fuse.readdirplus(1, directory, 0, 60_000).length > 10));
  changes(fuse, log, () => fuse.fsync(nodeid, fh));
  changes(fuse, log, () => assert.equal(fuse.write(nodeid, fh, 0, data.subarray(0, 100_000)), 100_000));
  // Cold reads are jobs, which end later.
  execFileSync('sh', ['-c', 'sync; echo 1 > /proc/sys/vm/drop_caches || true'], { stdio: 'ignore' });
  changes(fuse, log, () => assert.equal(fuse.read(nodeid, fh, 0, 1 << 20).length, 1 << 20));

  assert.ok(lentAt);
  replies.push(lentAt);
  changes(fuse, log, () => {
    execFileSync('touch', [join(daemon.share, 'new')]);
    assert.ok(fuse.wait(lent).body.length > 0);
  });
  // Given back when the queue stops: one that no message is left for.
  let kept = fuse.submitReadNotify(4096 + 16);
  while (fuse.settled(kept, 300)) kept = fuse.submitReadNotify(4096 + 16);
  replies.splice(0, replies.length - 2);
  changes(fuse, log, () => fuse.driver.stop());
  fuse.driver.stopLogging(log);
});
