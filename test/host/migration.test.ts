/** Live migration without a VMM: a guest's memory and rings stay, and one daemon's state goes to another. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { Feature, features, VhostUserFrontend } from 'vhost-user-ts';
import { loadState, MockDriver, MockMemory, saveState } from 'vhost-user-ts/testing';
import { FsnotifyRecord, FsnotifyRecordFlag, InitFlag, InitFlag2, NotifyCode, Opcode, OutHeader } from '../../src/fuse/abi.js';
import { FS_CREATE, FS_EVENT_ON_CHILD, FS_MODIFY } from '../../src/watch/mask.js';
import { needsRoot, root, TestDaemon } from '../support/daemon.js';
import { errnoOf, type FuseClient, LINUX_INIT_FLAGS, LINUX_INIT_FLAGS2 } from '../support/fuse-client.js';
import { cpuSeconds } from '../support/hostile.js';

const { ENOENT, ESTALE, EBADF } = { ENOENT: 2, ESTALE: 116, EBADF: 9 };
const PLAIN = ~features(0, Feature.LOG_ALL);
const O_RDWR = 2;

const folder = fs.mkdtempSync(join(tmpdir(), 'migration-'));
after(() => fs.rmSync(folder, { recursive: true, force: true }));

/** Stops the guest and takes the state; the daemon keeps the session. */
function leave(fuse: FuseClient): { bases: number[]; state: Buffer } {
  const bases = fuse.driver.stop();
  return { bases, state: saveState(fuse.driver.frontend) };
}

/** A front end that is ready to take a guest over, as QEMU with -incoming. */
function destination(daemon: TestDaemon): VhostUserFrontend {
  const frontend = VhostUserFrontend.connect(daemon.socket);
  const memory = new MockMemory([{ guestAddress: 0, size: 1 << 20 }]);
  new MockDriver(frontend, { queues: 3, features: PLAIN, memory, queueSize: 2 }).initialise();
  memory.close();
  return frontend;
}

/** Moves a guest to another daemon, where all must go well. */
function migrate(fuse: FuseClient, to: TestDaemon): void {
  const { bases, state } = leave(fuse);
  const frontend = destination(to);
  assert.equal(loadState(frontend, state), 0, to.log);
  fuse.driver.moveTo(frontend, bases);
}

/** What CHECK_DEVICE_STATE says of a state, and what the daemon logs of it. */
async function refused(to: TestDaemon, state: Uint8Array): Promise<string> {
  const frontend = destination(to);
  const before = to.log.length;
  assert.equal(loadState(frontend, state), 1, to.log);
  frontend.close();
  await to.until(() => to.log.slice(before).includes('the client is gone'));
  return to.log.slice(before);
}

function tree(name: string): string {
  const share = join(folder, name);
  fs.mkdirSync(join(share, 'dir/deeper'), { recursive: true });
  fs.writeFileSync(join(share, 'file'), 'contents');
  fs.writeFileSync(join(share, 'dir/deeper/täglich\n'), 'deep');
  fs.symlinkSync('file', join(share, 'link'));
  execFileSync('mkfifo', [join(share, 'fifo')]);
  return share;
}

for (const mode of ['find-paths', 'file-handles'] as const) {
  for (const sandbox of ['namespace', 'chroot', 'none'] as const) {
    for (const handles of ['prefer', 'never'] as const) {
      test(`${mode}, --sandbox=${sandbox}, --inode-file-handles=${handles}: nodes and open files`, needsRoot, async () => {
        const share = tree(`${mode}-${sandbox}-${handles}`);
        const options = [`--migration-mode=${mode}`, `--sandbox=${sandbox}`, `--inode-file-handles=${handles}`];
        await using a = await TestDaemon.start(options, { share });
        await using b = await TestDaemon.start(options, { share });
        const fuse = a.session();
        const names = ['file', 'link', 'fifo', 'dir'].map((name) => fuse.lookup(1, name).nodeid);
        const [file = 0, link = 0, fifo = 0, dir = 0] = names;
        fuse.lookup(1, 'file'); // a second reference
        const deeper = fuse.lookup(dir, 'deeper').nodeid;
        const deep = fuse.lookup(deeper, 'täglich\n').nodeid;
        const open = fuse.open(file, O_RDWR).fh;
        const made = fuse.create(1, 'made', O_RDWR, 0o600);
        fuse.write(made.entry.nodeid, made.open.fh, 0, Buffer.from('before '));
        const list = fuse.opendir(1).fh;
        const [first] = fuse.readdir(1, list, 0, 100);
        const before = [file, link, fifo, dir, deeper, deep].map((nodeid) => fuse.getattr(nodeid).attr);

        migrate(fuse, b);
        assert.deepEqual(
          [file, link, fifo, dir, deeper, deep].map((nodeid) => fuse.getattr(nodeid).attr),
          before,
        );
        assert.equal(fuse.readlink(link).toString(), 'file');
        assert.equal(fuse.read(file, open, 0, 100).toString(), 'contents');
        fuse.write(file, open, 0, Buffer.from('CON'));
        assert.equal(fs.readFileSync(join(share, 'file'), 'utf8'), 'CONtents');
        fuse.write(made.entry.nodeid, made.open.fh, 7, Buffer.from('after'));
        assert.equal(fs.readFileSync(join(share, 'made'), 'utf8'), 'before after');
        assert.ok(first);
        const rest = fuse.readdir(1, list, first.offset).map((entry) => entry.name.toString());
        assert.ok(!rest.includes(first.name.toString()) && rest.length >= 5, rest.join());
        // The same inodes are the same nodeids, and new ones are new.
        assert.equal(fuse.lookup(1, 'file').nodeid, file);
        assert.equal(fuse.lookup(deeper, 'täglich\n').nodeid, deep);
        const other = fuse.create(1, 'other', O_RDWR, 0o600);
        assert.ok(![...names, deeper, deep, made.entry.nodeid].includes(other.entry.nodeid));
        assert.ok(![open, made.open.fh, list].includes(other.open.fh));
        // References came along: three of the file are held.
        fuse.release(file, open);
        fuse.forget(file, 2);
        fuse.getattr(file);
        fuse.forget(file, 1);
        assert.equal(
          errnoOf(() => fuse.getattr(file)),
          ENOENT,
        );
        fuse.releasedir(1, list);
        assert.equal(
          errnoOf(() => fuse.readdir(1, list)),
          EBADF,
        );
        assert.match(a.log, /live migration: sent \d+ inodes, 3 open files, 0 locks, 0 watches/);
        assert.match(b.log, /live migration: took over \d+ inodes, 3 open files, 0 locks, 0 watches/);
      });
    }
  }
}

test('an ordinary user migrates by paths', needsRoot, async () => {
  const share = tree('user');
  execFileSync('chown', ['-R', '1000:1000', share]);
  fs.chmodSync(folder, 0o755);
  const as = { share, wrapper: ['setpriv', '--reuid=1000', '--regid=1000', '--clear-groups'] };
  const socket = (name: string) => ['--socket-path', join(share, name)];
  await using a = await TestDaemon.start([], { ...as, listen: socket('a.sock') });
  await using b = await TestDaemon.start([], { ...as, listen: socket('b.sock') });
  await a.until(() => fs.existsSync(join(share, 'a.sock')) && fs.existsSync(join(share, 'b.sock')) && b.log.includes('sharing'));
  Object.assign(a, { socket: join(share, 'a.sock') });
  Object.assign(b, { socket: join(share, 'b.sock') });
  const fuse = a.session();
  const { nodeid } = fuse.lookup(1, 'file');
  const { fh } = fuse.open(nodeid, O_RDWR);
  migrate(fuse, b);
  assert.equal(fuse.read(nodeid, fh, 0, 100).toString(), 'contents');
});

describe('find-paths', needsRoot, () => {
  test('to a copy of the directory', async () => {
    const share = tree('original');
    await using a = await TestDaemon.start([], { share });
    const fuse = a.session();
    const dir = fuse.lookup(1, 'dir').nodeid;
    const deeper = fuse.lookup(dir, 'deeper').nodeid;
    const deep = fuse.lookup(deeper, 'täglich\n').nodeid;
    const { fh } = fuse.open(deep);
    const copy = join(folder, 'copy');
    execFileSync('cp', ['-a', share, copy]);
    await using b = await TestDaemon.start([], { share: copy });
    migrate(fuse, b);
    assert.equal(fuse.read(deep, fh, 0, 100).toString(), 'deep');
    assert.equal(fuse.getattr(deep).attr.ino, fs.statSync(join(copy, 'dir/deeper/täglich\n'), { bigint: true }).ino);
  });

  test('what was renamed, has two names, or was forgotten by the kernel is searched for', async () => {
    for (const confirm of [[], ['--migration-confirm-paths', '--migration-verify-handles']]) {
      const share = tree(`renamed${confirm.length}`);
      fs.linkSync(join(share, 'file'), join(share, 'dir/second name'));
      await using a = await TestDaemon.start(confirm, { share });
      await using b = await TestDaemon.start(confirm, { share });
      const fuse = a.session();
      const file = fuse.lookup(1, 'file').nodeid;
      const dir = fuse.lookup(1, 'dir').nodeid;
      const { fh } = fuse.open(file);
      // The name that the descriptor has for the kernel goes; the other one must be found.
      fs.unlinkSync(join(share, 'file'));
      fs.renameSync(join(share, 'dir'), join(share, 'moved'));
      execFileSync('sh', ['-c', 'sync; echo 2 > /proc/sys/vm/drop_caches || true'], { stdio: 'ignore' });
      migrate(fuse, b);
      assert.equal(fuse.read(file, fh, 0, 100).toString(), 'contents');
      assert.equal(fuse.lookup(dir, 'second name').nodeid, file);
    }
  });

  test('--migration-verify-handles: a copy has other inodes', async () => {
    const share = tree('verified');
    await using a = await TestDaemon.start(['--migration-verify-handles'], { share });
    const fuse = a.session();
    fuse.lookup(1, 'file');
    await using b = await TestDaemon.start([], { share });
    fs.copyFileSync(join(share, 'file'), join(share, 'new'));
    const { state } = leave(fuse);
    fs.renameSync(join(share, 'new'), join(share, 'file'));
    assert.match(await refused(b, state), /"file" is another inode here \(--migration-verify-handles\)/);
    await using elsewhere = await TestDaemon.start([], { share: tree('elsewhere') });
    assert.match(await refused(elsewhere, state), /this is another shared directory than that of the source/);
  });

  test('what is missing at the destination: --migration-on-error', async () => {
    const share = tree('complete');
    const incomplete = tree('incomplete');
    fs.rmSync(join(incomplete, 'file'));
    fs.rmSync(join(incomplete, 'link'));
    fs.mkdirSync(join(incomplete, 'link'));
    await using a = await TestDaemon.start([], { share });
    const fuse = a.session();
    const file = fuse.lookup(1, 'file').nodeid;
    const link = fuse.lookup(1, 'link').nodeid;
    const dir = fuse.lookup(1, 'dir').nodeid;
    const { fh } = fuse.open(file);
    const { bases, state } = leave(fuse);
    await using b = await TestDaemon.start([], { share: incomplete });
    assert.match(
      await refused(b, state),
      /"file" cannot be opened here \(errno 2\) \(--migration-on-error=guest-error would go on without it\)/,
    );
    // The guest goes on where it was, and can be sent elsewhere.
    fuse.driver.resume(bases);
    assert.equal(fuse.read(file, fh, 0, 100).toString(), 'contents');
    const again = leave(fuse);
    await using c = await TestDaemon.start(['--migration-on-error=guest-error'], { share: incomplete });
    const frontend = destination(c);
    assert.equal(loadState(frontend, again.state), 0, c.log);
    fuse.driver.moveTo(frontend, again.bases);
    for (const lost of [file, link]) {
      assert.equal(
        errnoOf(() => fuse.getattr(lost)),
        ESTALE,
      );
    }
    assert.equal(
      errnoOf(() => fuse.read(file, fh, 0, 10)),
      EBADF,
    );
    // What is lost stays lost, and is no obstacle any more.
    await using d = await TestDaemon.start([], { share: incomplete });
    migrate(fuse, d);
    assert.equal(
      errnoOf(() => fuse.read(file, fh, 0, 10)),
      EBADF,
    );
    fuse.release(file, fh);
    fuse.forget(file);
    fuse.getattr(dir);
    assert.match(c.log, /live migration: 3 inodes and open files are lost: "file" cannot be opened here/);
  });
});

test('file handles are taken by a daemon that was told to: they could be of files outside the share', needsRoot, async () => {
  const share = tree('untold');
  await using a = await TestDaemon.start(['--migration-mode=file-handles'], { share });
  await using b = await TestDaemon.start(['--migration-on-error=guest-error'], { share });
  const fuse = a.session();
  fuse.lookup(1, 'file');
  const { state } = leave(fuse);
  assert.match(
    await refused(b, state),
    /ERROR live migration: the source sends file handles, which could be of files outside the shared directory/,
  );
});

describe('deleted and still open', needsRoot, () => {
  for (const mode of ['find-paths', 'file-handles'] as const) {
    test(mode, async () => {
      const share = tree(`deleted-${mode}`);
      await using b = await TestDaemon.start([`--migration-mode=${mode}`], { share });
      const a = await TestDaemon.start([`--migration-mode=${mode}`], { share });
      const fuse = a.session();
      const file = fuse.lookup(1, 'file').nodeid;
      const link = fuse.lookup(1, 'link').nodeid;
      const { fh } = fuse.open(file, O_RDWR);
      fuse.unlink(1, 'file');
      // Not open: nobody misses it.
      fuse.unlink(1, 'link');
      if (mode === 'find-paths') {
        const { state } = leave(fuse);
        assert.match(a.log, /WARN .*the destination cannot have 1 inodes, as it was deleted and is still open/);
        assert.match(
          await refused(b, state),
          /ERROR .*it was deleted and is still open, so it has no path: with --migration-mode=file-handles/,
        );
        await a[Symbol.asyncDispose]();
        return;
      }
      migrate(fuse, b);
      assert.equal(fuse.read(file, fh, 0, 100).toString(), 'contents');
      fuse.write(file, fh, 0, Buffer.from('kept'));
      assert.equal(fuse.getattr(file, fh).attr.nlink, 0);
      await a.stop();
      assert.equal(fuse.read(file, fh, 0, 100).toString(), 'keptents', 'though the source is gone');
      assert.notEqual(
        errnoOf(() => fuse.getattr(link)),
        EBADF,
      );
      await a[Symbol.asyncDispose]();
    });
  }

  test('a state that is kept in a file outlives them not: a clear error', async () => {
    const share = tree('kept');
    const a = await TestDaemon.start(['--migration-mode=file-handles'], { share });
    const fuse = a.session();
    const file = fuse.lookup(1, 'file').nodeid;
    fuse.open(file, O_RDWR);
    fuse.unlink(1, 'file');
    const { state } = leave(fuse);
    await a[Symbol.asyncDispose]();
    await using b = await TestDaemon.start(['--migration-mode=file-handles'], { share });
    assert.match(await refused(b, state), /an inode cannot be opened here \(errno 116\)/);
  });
});

describe('file events', () => {
  const init = { flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY };
  const mask = FS_CREATE | FS_MODIFY | FS_EVENT_ON_CHILD;

  /** Takes notifications until one has a record that is wanted. */
  function expectRecord(fuse: FuseClient, wanted: (record: { overflow: boolean; mask: number; name: string }) => boolean): void {
    for (const end = performance.now() + 15_000; performance.now() < end; ) {
      const { body } = fuse.wait(fuse.submitReadNotify(4096 + OutHeader.bytes), 15_000);
      if (body.readInt32LE(OutHeader.error) !== NotifyCode.FSNOTIFY) continue;
      for (let at = OutHeader.bytes; at < body.length; at += body.readUInt32LE(at)) {
        const name = at + FsnotifyRecord.name;
        const record = {
          overflow: (body.readUInt32LE(at + FsnotifyRecord.flags) & FsnotifyRecordFlag.OVERFLOW) !== 0,
          mask: body.readUInt32LE(at + FsnotifyRecord.mask),
          name: body.toString('utf8', name, name + body.readUInt32LE(at + FsnotifyRecord.namelen)),
        };
        if (wanted(record)) return;
      }
    }
    assert.fail('it does not come');
  }

  test('watches are set again, and an overflow says that something may be lost', async () => {
    const share = tree('watched');
    await using a = await TestDaemon.start([], { share });
    await using b = await TestDaemon.start([], { share });
    const fuse = a.session(init);
    const dir = fuse.lookup(1, 'dir').nodeid;
    fuse.fsnotify(1, mask);
    fuse.fsnotify(dir, mask);
    const lent = fuse.submitReadNotify(4096 + 16);
    migrate(fuse, b);
    assert.deepEqual(fuse.wait(lent).body.length, 0, 'given back');
    expectRecord(fuse, (record) => record.overflow);
    execFileSync('touch', [join(share, 'dir/new')]);
    expectRecord(fuse, ({ mask, name }) => mask === FS_CREATE && name === 'new');
    assert.match(b.log, /took over \d+ inodes, 0 open files, 0 locks, 2 watches/);
  });

  test('a destination without them refuses', async () => {
    const share = tree('unwatched');
    await using a = await TestDaemon.start([], { share });
    await using b = await TestDaemon.start(['--fsnotify=off'], { share });
    const fuse = a.session(init);
    assert.match(await refused(b, leave(fuse).state), /the guest makes use of HAS_FSNOTIFY that this daemon's options do not give it/);
  });
});

describe('locks', () => {
  const F_WRLCK = 1;
  const whole = { start: 0n, end: 2n ** 63n - 1n };

  for (const sandbox of ['namespace', 'chroot', 'none'].filter((mode) => mode === 'namespace' || root)) {
    test(`go along: --sandbox=${sandbox}`, async () => {
      const share = tree(`locked-${sandbox}`);
      const options = ['--posix-lock', '--flock', `--sandbox=${sandbox}`];
      await using a = await TestDaemon.start(options, { share });
      await using b = await TestDaemon.start(options, { share });
      const fuse = a.session();
      const file = fuse.lookup(1, 'file').nodeid;
      const one = fuse.open(file, O_RDWR).fh;
      fuse.setlk(file, one, 71, { start: 0n, end: 9n, type: F_WRLCK, pid: 1234 });
      fuse.setlk(file, one, 72, { start: 100n, end: 2n ** 63n - 1n, type: 0, pid: 1235 });
      const made = fuse.create(1, 'by flock', O_RDWR, 0o600);
      fuse.setlk(made.entry.nodeid, made.open.fh, 73, { ...whole, type: F_WRLCK, pid: 1 }, 1);

      migrate(fuse, b);
      assert.match(a.log, /sent \d+ inodes, 2 open files, 3 locks/);
      assert.match(b.log, /took over \d+ inodes, 2 open files, 3 locks/);
      // The source lets go of them with its front end; then the destination has them.
      const taken = () => spawnSync('flock', ['-n', join(share, 'by flock'), 'true']).status === 1;
      await b.until(() => locksOf(b).length === 3);
      assert.ok(taken());
      // They are the owners' at the destination: another owner hears who has it, the owner itself can let it go.
      const found = fuse.getlk(file, one, 99, { start: 0n, end: 5n, type: F_WRLCK, pid: 9 });
      assert.deepEqual(found, { start: 0n, end: 9n, type: F_WRLCK, pid: 1234 });
      fuse.setlk(file, one, 71, { start: 0n, end: 9n, type: 2, pid: 1234 });
      fuse.setlk(file, one, 99, { start: 0n, end: 5n, type: F_WRLCK, pid: 9 });
      fuse.setlk(made.entry.nodeid, made.open.fh, 73, { ...whole, type: 2, pid: 1 }, 1);
      assert.ok(!taken());
    });
  }

  /** Lines about locks of a daemon's descriptors. */
  function locksOf(daemon: TestDaemon): string[] {
    return fs.readdirSync(`/proc/${daemon.inside}/fdinfo`).flatMap((fd) => {
      try {
        return daemon.proc(`fdinfo/${fd}`).match(/^lock:.*$/gm) ?? [];
      } catch {
        return [];
      }
    });
  }
});

test('what was negotiated goes on, or the migration is refused', async () => {
  const share = tree('negotiated');
  await using a = await TestDaemon.start(['--writeback', '--posix-acl'], { share });
  await using b = await TestDaemon.start(['--writeback', '--posix-acl'], { share });
  await using c = await TestDaemon.start(['--posix-acl'], { share });
  const fuse = a.session({ flags: LINUX_INIT_FLAGS | InitFlag.WRITEBACK_CACHE });
  fuse.lookup(1, 'file');
  const { bases, state } = leave(fuse);
  assert.match(await refused(c, state), /the guest makes use of WRITEBACK_CACHE that this daemon's options/);
  const frontend = destination(b);
  assert.equal(loadState(frontend, state), 0);
  fuse.driver.moveTo(frontend, bases);
  // SETXATTR in its long form, which only a session with POSIX_ACL has.
  const { nodeid } = fuse.lookup(1, 'file');
  fuse.setxattr(nodeid, 'user.a', Buffer.from('b'));
  assert.equal(fuse.getxattr(nodeid, 'user.a').toString(), 'b');
});

test('a guest that has not mounted anything', async () => {
  await using a = await TestDaemon.start();
  await using b = await TestDaemon.start([], { share: a.share });
  const fuse = a.connect();
  migrate(fuse, b);
  fuse.init();
  fuse.getattr(1);
});

test('requests wait for the destination, and none is lost', async () => {
  const share = tree('under-way');
  await using a = await TestDaemon.start([], { share });
  await using b = await TestDaemon.start([], { share });
  const fuse = a.session();
  const { nodeid } = fuse.lookup(1, 'file');
  const { fh } = fuse.open(nodeid, O_RDWR);
  const { bases, state } = leave(fuse);
  // The queue stands still: these lie in it.
  const pending = Array.from({ length: 20 }, () => fuse.submit(Opcode.GETATTR, nodeid, [Buffer.alloc(16)], 112));
  const frontend = destination(b);
  assert.equal(loadState(frontend, state), 0);
  fuse.driver.moveTo(frontend, bases);
  for (const one of pending) assert.equal(fuse.wait(one).error, 0);
  for (let i = 0; i < 50; i++) fuse.write(nodeid, fh, i * 8, Buffer.from('8 bytes.'));
  fuse.fsync(nodeid, fh);
  assert.equal(fs.readFileSync(join(share, 'file'), 'utf8'), '8 bytes.'.repeat(50));
});

describe('streams that are none', () => {
  test('cut anywhere, and with any byte changed: an error, or a session that is sound', async () => {
    const share = tree('damaged');
    await using a = await TestDaemon.start(['--migration-verify-handles', '--posix-lock'], { share });
    const fuse = a.session({ flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY });
    const file = fuse.lookup(1, 'file').nodeid;
    fuse.lookup(1, 'dir');
    fuse.setlk(file, fuse.open(file, O_RDWR).fh, 7, { start: 0n, end: 9n, type: 1, pid: 8 });
    fuse.fsnotify(1, FS_CREATE);
    const { state } = leave(fuse);
    await using b = await TestDaemon.start(['--migration-on-error=guest-error', '--posix-lock', '--log-level=off'], { share });
    // The front end stays: QEMU tries a migration as often as it likes.
    const frontend = destination(b);
    const seen = { good: 0, bad: 0 };
    const attempt = (bytes: Uint8Array) => (loadState(frontend, bytes) === 0 ? seen.good++ : seen.bad++);
    for (let cut = 0; cut < state.length; cut += 4) attempt(state.subarray(0, cut));
    assert.equal(seen.good, 0);
    for (let at = 0; at < state.length; at++) {
      for (const value of [0, 0xff]) {
        const bytes = Buffer.from(state);
        if (bytes[at] === value) continue;
        bytes[at] = value;
        attempt(bytes);
      }
    }
    assert.ok(seen.bad > state.length, JSON.stringify(seen));
    attempt(Buffer.concat([state, Buffer.alloc(8)]));
    attempt(Buffer.alloc(100_000, 'x'));
    attempt(Buffer.alloc(0));
    const { good } = seen;
    attempt(state);
    assert.equal(seen.good, good + 1, 'and the whole one is taken after all');
    frontend.close();
  });

  test('paths do not leave the share', async () => {
    const share = tree('inside');
    const secret = join(folder, 'secret');
    fs.writeFileSync(secret, 'secret');
    fs.symlinkSync('..', join(share, 'up'));
    await using a = await TestDaemon.start(['--sandbox=none', '--seccomp=none'], { share });
    const fuse = a.session();
    const { nodeid } = fuse.lookup(1, 'file');
    fuse.open(nodeid);
    const { state } = leave(fuse);
    await using b = await TestDaemon.start(['--sandbox=none', '--seccomp=none'], { share });
    for (const path of ['../secret', 'up/secret', '/tmp', 'dir/../file', './file', 'dir//deeper', 'dir/', 'file\0', secret]) {
      assert.match(await refused(b, withPath(state, 'file', path)), /cannot be opened here/, path);
    }
    const frontend = destination(b);
    assert.equal(loadState(frontend, withPath(state, 'file', 'fifo')), 1, 'of another type');
    frontend.close();
  });

  /** The state with another path in its one INODE that has `path`. */
  function withPath(state: Buffer, path: string, other: string): Buffer {
    const text = Buffer.from(`${path}\0\0\0\0`).subarray(0, (path.length + 7) & ~7);
    const at = state.indexOf(text);
    const body = at - 40;
    const bytes = Buffer.alloc((other.length + 7) & ~7);
    bytes.write(other);
    const head = Buffer.from(state.subarray(0, at));
    head.writeUInt32LE(40 + other.length, body - 4);
    head.writeUInt32LE(other.length, body + 36);
    return Buffer.concat([head, bytes, state.subarray(at + text.length)]);
  }
});

describe('the front end', () => {
  test('rings must stand still, and only two directions and one phase are known', async () => {
    await using a = await TestDaemon.start();
    const fuse = a.session();
    assert.throws(() => saveState(fuse.driver.frontend), /refused|answered with/);
    fuse.getattr(1);
    const bases = fuse.driver.stop();
    const fd = fs.openSync('/dev/null', 'r+');
    for (const state of [
      { direction: 2, phase: 0 },
      { direction: 0, phase: 1 },
    ]) {
      assert.throws(() => fuse.driver.frontend.setDeviceStateFd(state, fd), /answered with/);
    }
    fs.closeSync(fd);
    fuse.driver.resume(bases);
    fuse.getattr(1);
  });

  test('goes away in the middle: the daemon waits for the next one', async () => {
    const share = tree('in-the-middle');
    for (let i = 0; i < 3000; i++) fs.writeFileSync(join(share, `file with a longer name ${i}`), '');
    await using a = await TestDaemon.start([], { share });
    const fuse = a.session();
    const { fh } = fuse.opendir(1);
    for (let offset = 0n; ; ) {
      const entries = fuse.readdirplus(1, fh, offset);
      if (entries.length === 0) break;
      offset = entries.at(-1)?.offset ?? 0n;
    }
    fuse.driver.stop();
    const { read, write } = pipe();
    fuse.driver.frontend.setDeviceStateFd({ direction: 0, phase: 0 }, write);
    fs.closeSync(write);
    // The pipe is full and nobody reads.
    assert.equal(fuse.driver.frontend.checkDeviceState(), 1);
    await a.disconnect(fuse);
    fs.closeSync(read);
    const next = a.session();
    next.getattr(1);
  });

  /** Both ends of a FIFO. */
  function pipe(): { read: number; write: number } {
    const path = join(folder, `pipe-${process.hrtime.bigint()}`);
    execFileSync('mkfifo', [path]);
    const both = fs.openSync(path, 'r+');
    const ends = { read: fs.openSync(path, 'r'), write: fs.openSync(path, 'w') };
    fs.closeSync(both);
    return ends;
  }
});

test('20 000 inodes', needsRoot, async (t) => {
  const share = join(folder, 'many');
  fs.mkdirSync(share);
  for (let d = 0; d < 20; d++) {
    fs.mkdirSync(join(share, `directory ${d}`));
    for (let i = 0; i < 1000; i++) fs.writeFileSync(join(share, `directory ${d}`, `a file with a name ${i}`), '');
  }
  for (const mode of ['find-paths', 'file-handles']) {
    await using a = await TestDaemon.start([`--migration-mode=${mode}`], { share });
    await using b = await TestDaemon.start([`--migration-mode=${mode}`], { share });
    const fuse = a.session();
    for (let d = 0; d < 20; d++) {
      const { nodeid } = fuse.lookup(1, `directory ${d}`);
      const { fh } = fuse.opendir(nodeid);
      for (let offset = 0n; ; ) {
        const entries = fuse.readdirplus(nodeid, fh, offset, 200_000);
        if (entries.length === 0) break;
        offset = entries.at(-1)?.offset ?? 0n;
      }
      fuse.releasedir(nodeid, fh);
    }
    const memory = [a.memory, b.memory];
    const used = [cpuSeconds(a), cpuSeconds(b)];
    const began = performance.now();
    const { bases, state } = leave(fuse);
    const saved = performance.now();
    const frontend = destination(b);
    assert.equal(loadState(frontend, state), 0, b.log);
    const loaded = performance.now();
    // What does not depend on what else the machine does.
    const cpu = [a, b].map((daemon, i) => `${Math.round((cpuSeconds(daemon) - (used[i] as number)) * 1000)} ms`);
    fuse.driver.moveTo(frontend, bases);
    fuse.lookup(fuse.lookup(1, 'directory 7').nodeid, 'a file with a name 77');
    assert.match(b.log, /took over 20021 inodes/);
    const grown = [a.memory, b.memory].map((now, i) => `${((now - (memory[i] as number)) / 2 ** 20).toFixed(1)} MiB`);
    t.diagnostic(
      `${mode}: ${(state.length / 2 ** 20).toFixed(1)} MiB, saved in ${(saved - began).toFixed(0)} ms, loaded in ${(loaded - saved).toFixed(0)} ms; processor time ${cpu.join(' and ')}; memory grew by ${grown.join(' and ')}`,
    );
  }
});
