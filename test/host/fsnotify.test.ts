/** Remote fsnotify on the wire: the real daemon, both carriers, watch errors, life cycle, and `virtiofsd-ts events`. */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, describe, it } from 'node:test';
import { Feature, features } from 'vhost-user-ts';
import { type Daemon, repository, startDaemon } from '../../qemu/guest/daemon.js';
import { FsnotifyRecord, InitFlag2, NotifyCode, OutHeader, READ_NOTIFY_STOP } from '../../src/fuse/abi.js';
import {
  FS_ATTRIB,
  FS_CREATE,
  FS_DELETE,
  FS_EVENT_ON_CHILD,
  FS_ISDIR,
  FS_MODIFY,
  FS_MOVED_FROM,
  FS_MOVED_TO,
  maskText,
} from '../../src/watch/mask.js';
import { errnoOf, FuseClient, LINUX_INIT_FLAGS2 } from '../support/fuse-client.js';

const folder = mkdtempSync(join(tmpdir(), 'fsnotify-'));
after(() => rmSync(folder, { recursive: true, force: true }));

const F_NOTIFICATION = 0;
const PLAIN = features(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.PROTOCOL_FEATURES);
const WATCH = FS_CREATE | FS_DELETE | FS_MODIFY | FS_ATTRIB | FS_MOVED_FROM | FS_MOVED_TO | FS_EVENT_ON_CHILD | FS_ISDIR;
const { ENOENT, ESTALE, EOPNOTSUPP, ENOSPC, ENODEV } = { ENOENT: 2, ESTALE: 116, EOPNOTSUPP: 95, ENOSPC: 28, ENODEV: 19 };

let daemon: Daemon | undefined;
let client: FuseClient | undefined;
afterEach(async () => {
  client?.close();
  await daemon?.stop();
  client = daemon = undefined;
});

async function session(queue: boolean, options: string[] = []): Promise<{ share: string; fuse: FuseClient }> {
  const share = mkdtempSync(join(folder, 'share-'));
  daemon = await startDaemon({ shareDir: share, options });
  client = FuseClient.connect(daemon.socketPath, { features: queue ? PLAIN | features(F_NOTIFICATION) : PLAIN, queues: 3 });
  client.init({ flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY });
  return { share, fuse: client };
}

/** Another process changes the share: our own changes would be echoes. */
function change(share: string, script: string): void {
  execFileSync('/bin/sh', ['-c', script], { cwd: share });
}

interface Message {
  code: number;
  records: { mask: string; nodeid: number; name: string; paired: boolean }[];
}

/** Decodes a notification without its header. */
function message(code: number, body: Buffer): Message {
  const records: Message['records'] = [];
  if (code === NotifyCode.FSNOTIFY) {
    for (let at = 0; at < body.length; at += body.readUInt32LE(at + FsnotifyRecord.reclen)) {
      const length = body.readUInt32LE(at + FsnotifyRecord.namelen);
      records.push({
        mask: maskText(body.readUInt32LE(at + FsnotifyRecord.mask)),
        nodeid: Number(body.readBigUInt64LE(at + FsnotifyRecord.nodeid)),
        name: body.toString('utf8', at + FsnotifyRecord.name, at + FsnotifyRecord.name + length),
        paired: (body.readUInt32LE(at + FsnotifyRecord.flags) & 2) !== 0,
      });
    }
  }
  return { code, records };
}

/** Names and masks of the records that arrive until `count` have. */
function take(fuse: FuseClient, count: number): string[] {
  const got: string[] = [];
  for (const deadline = Date.now() + 5000; got.length < count && Date.now() < deadline; ) {
    for (const { error, body } of fuse.takeNotifications(200)) {
      for (const { mask, name } of message(error, body).records) got.push(`${mask} ${name}`);
    }
  }
  return got;
}

const CHANGES = 'echo 1 > a; chmod 600 a; mkdir d; mv a b; rm b; rmdir d';
const EVENTS = [
  'CREATE a',
  'MODIFY,ON_CHILD a',
  'ATTRIB,ON_CHILD a',
  'CREATE,ISDIR d',
  'MOVED_FROM a',
  'MOVED_TO b',
  'DELETE b',
  'DELETE,ISDIR d',
];

describe('remote fsnotify on the wire', () => {
  it('the notification queue carries events, in order', async () => {
    const { share, fuse } = await session(true);
    assert.ok(fuse.hasNotificationQueue);
    fuse.lendNotificationBuffers(8);
    const { mask, supported } = fuse.fsnotify(1, WATCH);
    assert.equal(mask, BigInt(WATCH));
    assert.equal(supported & mask, mask);
    change(share, CHANGES);
    assert.deepEqual(take(fuse, EVENTS.length), EVENTS);
    // Once the watch is gone nothing comes.
    fuse.fsnotify(1, 0);
    change(share, 'echo 2 > later');
    fuse.fsnotify(1, WATCH);
    change(share, 'echo 3 > last');
    assert.deepEqual(take(fuse, 2), ['CREATE last', 'MODIFY,ON_CHILD last']);
  });

  it('lent buffers carry the same, each with its own header inside the reply', async () => {
    const { share, fuse } = await session(false);
    const pending = Array.from({ length: 40 }, () => fuse.submitReadNotify());
    fuse.fsnotify(1, WATCH);
    change(share, CHANGES);
    const got: string[] = [];
    for (const one of pending) {
      const { error, body } = fuse.wait(one);
      assert.equal(error, 0);
      assert.equal(body.readUInt32LE(OutHeader.len), body.length);
      assert.equal(body.readBigUInt64LE(OutHeader.unique), 0n);
      const { records } = message(body.readInt32LE(OutHeader.error), body.subarray(OutHeader.bytes));
      for (const { mask, name } of records) got.push(`${mask} ${name}`);
      if (got.length >= EVENTS.length) break;
    }
    assert.deepEqual(got, EVENTS);
    // Requests go on beside buffers that are kept.
    assert.ok(fuse.getattr(1).attr);
  });

  it('STOP, DESTROY and a new INIT give lent buffers back with ENODEV', async () => {
    const { fuse } = await session(false);
    for (const end of ['stop', 'destroy', 'init'] as const) {
      const kept = [fuse.submitReadNotify(), fuse.submitReadNotify()];
      assert.ok(kept.every((one) => !fuse.done(one)));
      if (end === 'stop') assert.equal(fuse.wait(fuse.submitReadNotify(0, READ_NOTIFY_STOP)).error, 0);
      if (end === 'destroy') fuse.destroy();
      if (end !== 'stop') fuse.init({ flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY });
      assert.deepEqual(
        kept.map((one) => fuse.wait(one).error),
        [-ENODEV, -ENODEV],
        end,
      );
    }
  });

  it('refuses what it cannot do', async () => {
    const { share, fuse } = await session(true, ['--fsnotify-limit=2']);
    change(share, 'mkdir d; echo > f');
    assert.equal(
      errnoOf(() => fuse.fsnotify(1, 0x10000)),
      EOPNOTSUPP,
    ); // FS_OPEN_PERM
    assert.equal(
      errnoOf(() => fuse.fsnotify(1, 1n << 40n)),
      EOPNOTSUPP,
    );
    assert.equal(
      errnoOf(() => fuse.fsnotify(12345, WATCH)),
      ENOENT,
    );
    assert.equal(
      errnoOf(() => fuse.fsnotify(1, WATCH, 7)),
      ESTALE,
    );
    const d = fuse.lookup(1, 'd').nodeid;
    const f = fuse.lookup(1, 'f').nodeid;
    fuse.fsnotify(1, WATCH);
    fuse.fsnotify(d, WATCH);
    assert.equal(
      errnoOf(() => fuse.fsnotify(f, FS_MODIFY)),
      ENOSPC,
    );
    // The limit is for watches that there are: one less makes room for another.
    fuse.fsnotify(d, 0);
    fuse.fsnotify(f, FS_MODIFY);
    fuse.forget(f);
    fuse.fsnotify(d, WATCH);
  });

  it('a guest that has not agreed gets ENOSYS, and --fsnotify=off offers nothing', async () => {
    const { fuse } = await session(false, ['--fsnotify=off']);
    assert.equal((fuse.session?.flags2 ?? 0) & InitFlag2.HAS_FSNOTIFY, 0);
    assert.equal(
      errnoOf(() => fuse.fsnotify(1, WATCH)),
      38,
    );
    assert.equal(fuse.wait(fuse.submitReadNotify()).error, -38);
  });

  it('a burst without buffers ends in one overflow when the queue is full', async () => {
    const { share, fuse } = await session(true);
    fuse.fsnotify(1, WATCH);
    mkdirSync(join(share, 'x'.repeat(200)));
    change(share, 'i=0; while [ $i -lt 30000 ]; do : > $i; i=$((i+1)); done');
    assert.ok(fuse.getattr(1).attr, 'requests go on');
    fuse.lendNotificationBuffers(64);
    let records = 0;
    let overflows = 0;
    for (let idle = 0; idle < 5; ) {
      const replies = fuse.takeNotifications(200);
      idle = replies.length === 0 ? idle + 1 : 0;
      for (const { error, body } of replies) {
        for (let at = 0; error === NotifyCode.FSNOTIFY && at < body.length; at += body.readUInt32LE(at + FsnotifyRecord.reclen)) {
          if ((body.readUInt32LE(at + FsnotifyRecord.flags) & 1) !== 0) overflows++;
          else records++;
        }
      }
    }
    // Either all are there, or one overflow says that some are not.
    assert.ok(overflows === 1 || (overflows === 0 && records >= 30000), `${records} records, ${overflows} overflows`);
    change(share, 'echo > after');
    assert.deepEqual(take(fuse, 2), ['CREATE after', 'MODIFY,ON_CHILD after']);
  });

  it('virtiofsd-ts events shows watches and events', async () => {
    const metrics = join(folder, 'metrics');
    const { share, fuse } = await session(true, [`--metrics=unix:${metrics}`]);
    fuse.lendNotificationBuffers(8);
    change(share, 'mkdir sub');
    const sub = fuse.lookup(1, 'sub').nodeid;
    fuse.fsnotify(1, FS_CREATE);
    const viewer = spawn(join(repository, 'build/virtiofsd-ts'), ['events', `unix:${metrics}`, '--json'], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const lines: Record<string, unknown>[] = [];
    let rest = '';
    viewer.stdout.on('data', (data: Buffer) => {
      const parts = (rest + data.toString()).split('\n');
      rest = parts.pop() as string;
      for (const line of parts) lines.push(JSON.parse(line) as Record<string, unknown>);
    });
    const seen = async (what: Record<string, string>): Promise<void> => {
      for (const deadline = Date.now() + 5000; Date.now() < deadline; ) {
        if (lines.some((line) => Object.entries(what).every(([key, value]) => line[key] === value))) return;
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      assert.fail(`not seen: ${JSON.stringify(what)} in ${JSON.stringify(lines)}`);
    };
    await seen({ watch: '.', mask: 'CREATE' }); // there before the viewer came
    fuse.fsnotify(sub, FS_DELETE | FS_CREATE);
    await seen({ watch: 'sub', mask: 'CREATE,DELETE' });
    change(share, 'echo > sub/file');
    await seen({ event: 'CREATE', path: 'sub/file' });
    viewer.kill();
    const text = execFileSync('node', [
      '-e',
      `require('http').get({socketPath: ${JSON.stringify(metrics)}, path: '/metrics'}, (r) => r.pipe(process.stdout))`,
    ]).toString();
    assert.match(text, /virtiofsd_fsnotify_records_total 1\n/);
    assert.match(text, /virtiofsd_fsnotify_watches 2\n/);
    assert.match(text, /virtiofsd_fsnotify_latency_seconds_count [1-9]/);
  });
});
