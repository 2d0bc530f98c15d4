/** What would wait for a disk goes to offload threads, and handles in use outlive their release. */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { test } from 'node:test';
import { native } from 'vhost-user-ts/native';
import { PENDING } from '../../src/fs/filesystem.js';
import { Offload } from '../../src/queue/offload.js';
import { openFds, root, TestFs } from '../support/fs.js';

const EBADF = -9;
const O_WRONLY = 1;
const O_DSYNC = 0o10000;

/** As when a write had just waited for the disk: long ones are jobs. */
function holdUp(t: TestFs): void {
  t.fs.share.waryUntil = native.monotonic() + 60e9;
}

/** Waits for jobs; their results by number. */
function finish(t: TestFs, offload: Offload, count: number): Map<number, number> {
  const results = new Map<number, number>();
  while (results.size < count) {
    native.poll(offload.eventfd, 1, 1000);
    native.eventfdRead(offload.eventfd);
    offload.reap((job, result) => {
      t.fs.completed(job);
      results.set(job, result);
    });
  }
  return results;
}

test('long writes while the disk holds them up, writes that wait for it, fsync, fallocate, copies and syncfs are jobs', () => {
  const offload = new Offload(2);
  const t = new TestFs({ offload });
  t.create(1, 'f');
  const { nodeid, fh } = t;
  const run = (result: number): number => {
    assert.equal(result, PENDING);
    return finish(t, offload, 1).get(offload.lastJob) as number;
  };
  const long = Buffer.alloc(1 << 20, 'w');
  t.fs.share.waryUntil = 0;
  assert.equal(t.write(nodeid, fh, 0, long, 0, 4096), 1 << 20);
  holdUp(t);
  assert.equal(run(t.write(nodeid, fh, 0, long, 0, 4096)), 1 << 20);
  assert.equal(t.write(nodeid, fh, 1 << 20, 'small'), 5);
  assert.equal(run(t.fs.fsync(nodeid, fh, false)), 0);
  assert.equal(run(t.fs.fallocate(nodeid, fh, 2 << 20, 4096, 0)), 0);
  t.create(1, 'g');
  assert.equal(run(t.fs.copyFileRange(fh, 0, t.nodeid, t.fh, 0, 1 << 20)), 1 << 20);
  assert.ok(fs.readFileSync(t.path('g')).equals(fs.readFileSync(t.path('f')).subarray(0, 1 << 20)));
  assert.equal(run(t.fs.syncfs(1)), 0);
  assert.equal(run(t.fs.syncfs(nodeid)), 0);
  t.fs.opendir(1, 0);
  assert.equal(run(t.fs.fsyncdir(1, t.fh, true)), 0);
  t.open(nodeid, 0);
  assert.equal(run(t.write(nodeid, t.fh, 0, Buffer.alloc(200_000))), EBADF, 'errors come with the job');
  t.open(nodeid, O_WRONLY | O_DSYNC);
  assert.equal(run(t.write(nodeid, t.fh, 0, 'small')), 5);
  offload.stop();
  t.close();
});

test('reads: cached ones in place, cold ones by a job, with the whole result', { skip: root ? false : 'needs root to drop caches' }, () => {
  const offload = new Offload(2);
  const t = new TestFs({ offload });
  const text = Buffer.alloc(3 << 20, 'a page of text, ');
  fs.writeFileSync(t.path('f'), text);
  const nodeid = t.lookup('f');
  t.open(nodeid);
  const fh = t.fh;
  assert.equal(t.read(nodeid, fh, 4096, 65536, 4096), text.toString('utf8', 0, 65536));
  let jobs = 0;
  for (let i = 0; i < 20; i++) {
    const fd = fs.openSync(t.path('f'), 'r+');
    fs.fsyncSync(fd);
    fs.closeSync(fd);
    try {
      fs.writeFileSync('/proc/sys/vm/drop_caches', '1');
    } catch {
      return offload.stop();
    }
    const n = t.readRaw(nodeid, fh, i * 131072, 131072, 4096);
    if (n === PENDING) {
      jobs++;
      assert.equal(finish(t, offload, 1).get(offload.lastJob), 131072);
    } else {
      assert.equal(n, 131072);
    }
    assert.equal(t.data(131072), text.toString('utf8', 0, 131072));
  }
  assert.ok(jobs > 0, 'some were cold');
  assert.equal(t.readRaw(nodeid, fh, 3 << 20, 4096), 0);
  offload.stop();
  t.close();
});

test('a handle released while its job runs is closed after it', () => {
  const offload = new Offload(1);
  const t = new TestFs({ offload });
  holdUp(t);
  const before = openFds();
  t.create(1, 'f');
  const { nodeid, fh } = t;
  const count = 20;
  for (let i = 0; i < count; i++) assert.equal(t.write(nodeid, fh, i << 20, Buffer.alloc(1 << 20, 'x')), PENDING);
  assert.equal(t.fs.release(nodeid, fh), 0);
  assert.equal(t.write(nodeid, fh, 0, 'x'), EBADF);
  assert.equal(t.fs.release(nodeid, fh), EBADF);
  for (const result of finish(t, offload, count).values()) assert.equal(result, 1 << 20);
  assert.equal(openFds(), before);
  assert.equal(fs.statSync(t.path('f')).size, count << 20);
  t.create(1, 'g');
  assert.equal(t.write(t.nodeid, t.fh, 0, Buffer.alloc(1 << 20)), PENDING);
  t.fs.destroy();
  finish(t, offload, 1);
  assert.equal(t.fs.share.handles.open, 0);
  assert.equal(openFds(), before);
  offload.stop();
  t.close();
});

test('no job number left: the call is made in place', () => {
  const offload = new Offload(1, 2);
  const t = new TestFs({ offload });
  holdUp(t);
  t.create(1, 'f');
  const { nodeid, fh } = t;
  const size = 1 << 20;
  assert.equal(t.write(nodeid, fh, 0, Buffer.alloc(size)), PENDING);
  assert.equal(t.write(nodeid, fh, 0, Buffer.alloc(size)), PENDING);
  assert.equal(t.write(nodeid, fh, 0, Buffer.alloc(size)), size);
  assert.equal(t.fs.fsync(nodeid, fh, false), 0);
  finish(t, offload, 2);
  offload.stop();
  t.close();
});

test("jobs run under the daemon's ids, though the thread has a guest user's", { skip: root ? false : 'needs root' }, () => {
  const offload = new Offload(1);
  const t = new TestFs({ offload });
  t.as(1000).create(1, 'f');
  assert.equal(t.fs.share.credentials.switched, true);
  assert.equal(t.fs.fsync(t.nodeid, t.fh, false), PENDING);
  assert.equal(t.fs.share.credentials.switched, false);
  finish(t, offload, 1);
  offload.stop();
  t.close();
});
