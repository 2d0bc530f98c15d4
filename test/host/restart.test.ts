/** A worker that is killed, fails or is replaced: for the guest only a pause. The real daemon in its usual sandbox. */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import * as fs from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Feature, features } from 'vhost-user-ts';
import { cString, native } from 'vhost-user-ts/native';
import { FsnotifyRecord, InitFlag2, Opcode, OpenIn, OpenOut } from '../../src/fuse/abi.js';
import { FS_CREATE, FS_DELETE, FS_EVENT_ON_CHILD, FS_ISDIR, FS_MODIFY, maskText } from '../../src/watch/mask.js';
import { needsRoot, scrape, TestDaemon } from '../support/daemon.js';
import { errnoOf, type FuseClient, LINUX_INIT_FLAGS2, Struct } from '../support/fuse-client.js';
import { Killer } from '../support/killer.js';
import { ModelGuest } from '../support/model.js';

const { O_RDONLY, O_RDWR, O_CREAT, O_EXCL } = fs.constants;
const EIO = 5;
const EAGAIN = 11;
const F_WRLCK = 1;
const F_UNLCK = 2;
/** A guest waits for a reply as long as it takes. */
const PATIENCE = { timeout: 60_000 };
const WITH_QUEUE = features(0, Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.PROTOCOL_FEATURES);
const WATCH = FS_CREATE | FS_DELETE | FS_MODIFY | FS_EVENT_ON_CHILD | FS_ISDIR;

/** Seconds that the random tests take; with 60 and more the large one is large. */
const LONG = Number(process.env['LONG'] ?? 6);

function kill(daemon: TestDaemon, signal: NodeJS.Signals = 'SIGKILL'): void {
  process.kill(daemon.inside, signal);
}

/** Milliseconds of the pauses that the log tells of. */
function pauses(daemon: TestDaemon): number[] {
  return [...daemon.log.matchAll(/the guest goes on after (\d+) ms/g)].map(([, ms]) => Number(ms)).sort((a, b) => a - b);
}

function report(t: { diagnostic(text: string): void }, what: string, values: number[]): void {
  t.diagnostic(`${what}: ${values.length} pauses, median ${values[values.length >> 1]} ms, longest ${values.at(-1)} ms`);
}

/** Opening `path` blocks whoever does it, until the result is closed (fanotify permission events that nobody answers). */
function stall(path: string): { close(): void } {
  const FAN_CLASS_CONTENT = 4;
  const FAN_MARK_ADD = 1;
  const FAN_OPEN_PERM = 0x10000;
  const group = native.fanotifyInit(FAN_CLASS_CONTENT, O_RDONLY);
  assert.ok(group >= 0, `fanotify_init: errno ${-group}`);
  assert.equal(native.fanotifyMark(group, FAN_MARK_ADD, FAN_OPEN_PERM, 0, -100, cString(path)), 0);
  return { close: () => native.close(group) };
}

/** Waits until a worker sleeps in a stalled open(2). */
async function stalled(daemon: TestDaemon): Promise<void> {
  await daemon.until(() => fs.readFileSync(`/proc/${daemon.inside}/wchan`, 'utf8').includes('fanotify'));
}

describe('a killed worker', () => {
  test('files, a directory half read, an unlinked file: as before', async (t) => {
    await using daemon = await TestDaemon.start(['--metrics=unix:{folder}/metrics']);
    for (let i = 0; i < 500; i++) fs.writeFileSync(join(daemon.share, `file-with-a-long-name-${i}`), '');
    const client = daemon.session({}, PATIENCE);
    const { entry, open } = client.create(1, 'kept', O_RDWR);
    const gone = client.create(1, 'gone', O_RDWR);
    client.write(gone.entry.nodeid, gone.open.fh, 0, 'still here');
    client.unlink(1, 'gone');
    const directory = client.opendir(1);
    const first = client.readdir(1, directory.fh, 0, 4096);
    assert.ok(first.length > 10 && first.length < 400);
    for (let i = 1; i <= 3; i++) {
      kill(daemon);
      assert.equal(client.write(entry.nodeid, open.fh, 10 * i, 'something '), 10);
    }
    assert.equal(client.read(gone.entry.nodeid, gone.open.fh, 0, 100).toString(), 'still here');
    assert.equal(client.getattr(gone.entry.nodeid, gone.open.fh).attr.nlink, 0);
    const names = first.map(({ name }) => String(name));
    for (;;) {
      const more = client.readdir(1, directory.fh, (first.at(-1) as { offset: bigint }).offset, 4096);
      if (more.length === 0) break;
      names.push(...more.map(({ name }) => String(name)));
      first.push(...more);
      if (names.length < 200) kill(daemon);
    }
    assert.deepEqual(names.filter((name) => name.startsWith('file')).length, 500);
    assert.equal(new Set(names).size, names.length, 'no name twice');
    client.releasedir(1, directory.fh);
    client.release(gone.entry.nodeid, gone.open.fh);
    const metrics = await scrape({ socketPath: join(daemon.folder, 'metrics') });
    assert.ok((metrics.get('virtiofsd_worker_restarts_total') ?? 0) >= 3);
    assert.equal(metrics.get('virtiofsd_open_files'), 1);
    assert.deepEqual([daemon.workers.length, daemon.keepers.length], [1, 1]);
    report(t, 'idle', pauses(daemon));
  });

  for (const [options, root] of [
    [['--sandbox=none'], false],
    [['--sandbox=chroot'], true],
    [['--sandbox=namespace', '--seccomp=none', '--inode-file-handles=never'], false],
    [['--sandbox=namespace', '--cache=notify', '--fsnotify=inotify'], false],
  ] as const) {
    test(options.join(' '), root ? needsRoot : {}, async () => {
      await using daemon = await TestDaemon.start(options);
      const client = daemon.session({}, PATIENCE);
      const { entry, open } = client.create(1, 'kept', O_RDWR);
      const sub = client.mkdir(1, 'sub').nodeid;
      for (let i = 0; i < 3; i++) {
        kill(daemon);
        assert.equal(client.write(entry.nodeid, open.fh, i, `${i}`), 1);
        client.mkdir(sub, `${i}`);
      }
      assert.equal(fs.readFileSync(join(daemon.share, 'kept'), 'utf8'), '012');
      assert.deepEqual(fs.readdirSync(join(daemon.share, 'sub')), ['0', '1', '2']);
    });
  }

  test('many open files and inodes', async (t) => {
    // The second time every inode has a descriptor, of which an ordinary limit allows 20 000.
    for (const [options, files, open] of [
      [[], LONG >= 60 ? 100_000 : 10_000, LONG >= 60 ? 10_000 : 2_000],
      [['--inode-file-handles=never'], LONG >= 60 ? 10_000 : 2_000, LONG >= 60 ? 5_000 : 1_000],
    ] as const) {
      await using daemon = await TestDaemon.start(options);
      execFileSync('sh', ['-c', `seq ${files} | split -l 1 -a 4 - f`], { cwd: daemon.share });
      const client = daemon.session({}, { ...PATIENCE, queueSize: 1024 });
      const names = fs.readdirSync(daemon.share);
      const opened: [nodeid: number, fh: number, text: string][] = [];
      for (const [i, name] of names.entries()) {
        const { nodeid } = client.lookup(1, name);
        if (i < open) opened.push([nodeid, client.open(nodeid).fh, fs.readFileSync(join(daemon.share, name), 'utf8')]);
      }
      kill(daemon);
      for (const [nodeid, fh, text] of opened) assert.equal(client.read(nodeid, fh, 0, 100).toString(), text);
      for (const name of names.slice(-1000)) client.lookup(1, name);
      report(t, options.join(' ') || 'defaults', pauses(daemon));
      assert.ok((pauses(daemon)[0] as number) < 10_000, 'on a busy machine, too');
    }
  });

  test('locks are held, and who waits for one goes on to wait', async () => {
    await using daemon = await TestDaemon.start(['--posix-lock', '--flock']);
    fs.writeFileSync(join(daemon.share, 'locked'), '');
    const client = daemon.session({}, PATIENCE);
    const { nodeid } = client.lookup(1, 'locked');
    const [a, b] = [client.open(nodeid, O_RDWR).fh, client.open(nodeid, O_RDWR).fh];
    const all = { start: 0, end: (1n << 63n) - 1n, pid: 7 };
    const FLOCK = 1;
    client.setlk(nodeid, a, 1, { ...all, type: F_WRLCK });
    client.setlk(nodeid, a, 0, { ...all, type: F_WRLCK }, FLOCK);
    const waits = client.submitSetlkw(nodeid, b, 2, { ...all, type: F_WRLCK });
    const waitsToo = client.submitSetlkw(nodeid, b, 0, { ...all, type: F_WRLCK }, FLOCK);
    for (let i = 0; i < 2; i++) {
      kill(daemon);
      assert.equal(
        errnoOf(() => client.setlk(nodeid, b, 3, { ...all, type: F_WRLCK })),
        EAGAIN,
      );
      assert.equal(client.getlk(nodeid, b, 3, { ...all, type: F_WRLCK }).pid, 7);
    }
    assert.deepEqual([waits.reply, waitsToo.reply], [undefined, undefined]);
    client.setlk(nodeid, a, 1, { ...all, type: F_UNLCK });
    assert.equal(client.wait(waits).error, 0);
    client.setlk(nodeid, a, 0, { ...all, type: F_UNLCK }, FLOCK);
    assert.equal(client.wait(waitsToo).error, 0);
  });

  test('within a request: it is served again, whatever stalls it', needsRoot, async () => {
    await using daemon = await TestDaemon.start();
    fs.writeFileSync(join(daemon.share, 'slow'), 'slow');
    const client = daemon.session({}, PATIENCE);
    const { nodeid } = client.lookup(1, 'slow');
    const block = stall(join(daemon.share, 'slow'));
    const pending = client.submit(Opcode.OPEN, nodeid, [new Struct(OpenIn.bytes).bytes], OpenOut.bytes);
    for (let i = 0; i < 3; i++) {
      await stalled(daemon);
      kill(daemon);
    }
    await stalled(daemon);
    block.close();
    assert.equal(client.wait(pending).error, 0);
    assert.equal(client.lookup(1, 'slow').nodeid, nodeid);
  });

  test('a tree that is changed while workers are killed is what the guest has made of it', async (t) => {
    await using daemon = await TestDaemon.start();
    const client = daemon.session({}, PATIENCE);
    const guest = new ModelGuest(client, 4711);
    const killer = new Killer(daemon, 200);
    for (const end = performance.now() + LONG * 1000; performance.now() < end; ) {
      for (let i = 0; i < 100; i++) guest.step();
      await sleep(0);
    }
    const kills = await killer.stop();
    guest.check(daemon.share);
    t.diagnostic(`${guest.operations} operations, ${kills} kills`);
    report(t, 'changes', pauses(daemon));
    assert.ok(kills >= 3);
  });

  test('messages of the front end are answered once', async (t) => {
    await using daemon = await TestDaemon.start();
    const client = daemon.session({}, PATIENCE);
    const { frontend, memory } = client.driver;
    const file = native.memfdCreate(cString('region'), 1 << 20);
    const region = { guestAddress: 16n << 30n, size: 1n << 20n, userAddress: 1n << 46n, mmapOffset: 0n };
    const killer = new Killer(daemon, 100);
    let rounds = 0;
    for (const end = performance.now() + LONG * 500; performance.now() < end; await sleep(0)) {
      for (let i = 0; i < 20; i++, rounds++) {
        // A region added twice, or removed twice, is refused.
        frontend.addMemReg(region, file);
        assert.ok(frontend.getFeatures() !== 0n);
        frontend.remMemReg(region);
        assert.equal(frontend.getQueueNum(), 66);
      }
      frontend.setMemTable(memory.table(), memory.fds());
      client.lookup(1, '.');
    }
    native.close(file);
    t.diagnostic(`${rounds} rounds, ${await killer.stop()} kills`);
    frontend.getFeatures(); // of the worker that comes after the last kill
  });
});

describe('file events', () => {
  function session(daemon: TestDaemon): FuseClient {
    const client = daemon.connect({ ...PATIENCE, features: WITH_QUEUE, queues: 3 });
    client.init({ flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY });
    client.lendNotificationBuffers(16);
    return client;
  }

  function records(client: FuseClient, wanted: number): string[] {
    const got: string[] = [];
    for (const end = performance.now() + 20_000; got.length < wanted && performance.now() < end; ) {
      for (const { body } of client.takeNotifications(200)) {
        for (let at = 0; at + FsnotifyRecord.name <= body.length; at += body.readUInt32LE(at + FsnotifyRecord.reclen)) {
          const length = body.readUInt32LE(at + FsnotifyRecord.namelen);
          const name = body.toString('utf8', at + FsnotifyRecord.name, at + FsnotifyRecord.name + length);
          got.push(
            body.readUInt32LE(at + FsnotifyRecord.flags) & 1
              ? 'OVERFLOW'
              : `${maskText(body.readUInt32LE(at + FsnotifyRecord.mask))} ${name}`,
          );
        }
      }
    }
    return got;
  }

  test('by fanotify: those of the pause arrive, and those after it; not the own ones', needsRoot, async () => {
    await using daemon = await TestDaemon.start();
    const client = session(daemon);
    const sub = client.mkdir(1, 'sub').nodeid;
    client.fsnotify(1, WATCH);
    client.fsnotify(sub, WATCH);
    client.mkdir(1, 'own');
    await sleep(200); // an unprivileged group does not name other processes: what is not read yet could be anybody's
    process.kill(daemon.inside, 'SIGSTOP');
    execFileSync('sh', ['-c', 'mkdir before; mkdir sub/before'], { cwd: daemon.share });
    kill(daemon);
    client.mkdir(1, 'own2');
    execFileSync('sh', ['-c', 'mkdir after; rmdir sub/before'], { cwd: daemon.share });
    assert.deepEqual(records(client, 4), ['CREATE,ISDIR before', 'CREATE,ISDIR before', 'CREATE,ISDIR after', 'DELETE,ISDIR before']);
  });

  test('by inotify: an overflow is said, and events go on', async () => {
    await using daemon = await TestDaemon.start(['--fsnotify=inotify']);
    const client = session(daemon);
    client.fsnotify(1, WATCH);
    kill(daemon);
    client.mkdir(1, 'own');
    assert.deepEqual(records(client, 1), ['OVERFLOW']);
    execFileSync('mkdir', ['after'], { cwd: daemon.share });
    assert.deepEqual(records(client, 1), ['CREATE,ISDIR after']);
  });
});

describe('the launcher', () => {
  test('SIGUSR2: another worker, and nobody notices', async (t) => {
    await using daemon = await TestDaemon.start();
    const client = daemon.session({}, PATIENCE);
    const { entry, open } = client.create(1, 'kept', O_RDWR);
    for (let i = 0; i < 3; i++) {
      const before = daemon.inside;
      daemon.process.kill('SIGUSR2');
      for (let n = 0; daemon.workers.includes(before) || pauses(daemon).length <= i; n++) {
        client.write(entry.nodeid, open.fh, 0, `${n}`);
        await sleep(1);
      }
      await daemon.until(() => daemon.workers.length === 1 && daemon.keepers.length === 1);
    }
    assert.match(daemon.log, /the worker before this one was replaced/);
    report(t, 'replaced', pauses(daemon));
  });

  test('without a front end workers follow each other, too', async () => {
    await using daemon = await TestDaemon.start();
    await daemon.until(() => daemon.log.includes('sharing'));
    kill(daemon);
    await daemon.until(() => pauses(daemon).length === 1);
    daemon.session({}, PATIENCE).mkdir(1, 'made');
  });

  test('a keeper that is killed: a new one, by a new worker', async () => {
    await using daemon = await TestDaemon.start();
    const client = daemon.session({}, PATIENCE);
    const { entry, open } = client.create(1, 'kept', O_RDWR);
    const [keeper] = daemon.keepers;
    process.kill(keeper as number, 'SIGKILL');
    await daemon.until(() => pauses(daemon).length === 1 && daemon.keepers.length === 1 && daemon.keepers[0] !== keeper);
    kill(daemon);
    assert.equal(client.write(entry.nodeid, open.fh, 0, 'kept'), 4);
  });

  for (const which of ['outer', 'inner'] as const) {
    test(`${which} is killed: nothing is left`, async () => {
      await using daemon = await TestDaemon.start();
      daemon.session({}, PATIENCE);
      const all = [...daemon.launchers, ...daemon.workers, ...daemon.keepers];
      assert.equal(all.length, 4);
      process.kill(daemon.launchers[which === 'outer' ? 0 : 1] as number, 'SIGKILL');
      await daemon.ended;
      await daemon.until(() => !all.some((pid) => fs.existsSync(`/proc/${pid}`)));
      daemon.end = { status: 0, signal: null };
    });
  }

  test('a request that makes workers fail is answered with EIO the third time', needsRoot, async () => {
    await using daemon = await TestDaemon.start();
    fs.writeFileSync(join(daemon.share, 'poison'), '');
    const client = daemon.session({}, PATIENCE);
    const kept = client.create(1, 'kept', O_RDWR | O_CREAT | O_EXCL);
    const { nodeid } = client.lookup(1, 'poison');
    const block = stall(join(daemon.share, 'poison'));
    const pending = client.submit(Opcode.OPEN, nodeid, [new Struct(OpenIn.bytes).bytes], OpenOut.bytes);
    for (let i = 0; i < 2; i++) {
      await stalled(daemon);
      kill(daemon, 'SIGALRM');
    }
    assert.equal(-client.wait(pending).error, EIO);
    assert.match(daemon.log, /2 workers have failed within the same request: the guest gets EIO for it/);
    block.close();
    assert.equal(client.write(kept.entry.nodeid, kept.open.fh, 0, 'x'), 1);
    assert.equal(
      errnoOf(() => client.open(nodeid)),
      0,
    );
  });

  test('workers that fail one after the other are not started for ever', async () => {
    await using daemon = await TestDaemon.start([], { status: 0 });
    daemon.session({}, PATIENCE);
    const parent = daemon.launchers.at(-1) as number;
    const loop = `while kill -0 ${parent} 2>/dev/null; do for p in $(cat /proc/${parent}/task/${parent}/children); do tr '\\0' '\\n' < /proc/$p/cmdline | grep -q main.js && kill -ALRM $p; done; sleep 0.3; done`;
    const failing = spawn('bash', ['-c', loop], { stdio: 'ignore' });
    const end = await daemon.ended;
    failing.kill();
    assert.deepEqual(end, { status: null, signal: 'SIGALRM' });
    assert.match(daemon.log, /workers end one after the other: no more are started \(5 within 10 s/);
    daemon.end = { status: 0, signal: null };
  });
});
