/** What goes wrong on the host: full and failing disks, file systems that do not answer, no descriptors, a share that goes away, a log that nobody reads. */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import * as fs from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Feature, features, VhostUserFrontend } from 'vhost-user-ts';
import { Opcode } from '../../src/fuse/abi.js';
import { needsRoot, PROGRAM_PATH, root, TestDaemon } from '../support/daemon.js';
import { errnoOf, FuseClient, readIn, Struct } from '../support/fuse-client.js';
import { assertServes, cpuSeconds, submitFsync } from '../support/hostile.js';

const { EIO, ENOSPC, EDQUOT, ENOENT, ESTALE, ENFILE, EMFILE, EFBIG, EINTR } = constants.errno;
const { O_RDWR, O_RDONLY, O_NONBLOCK } = fs.constants;
const folder = fs.mkdtempSync(join(tmpdir(), 'faults-'));
const mounts: string[] = [];
after(() => {
  for (const at of mounts) execFileSync('umount', ['-l', at]);
  fs.rmSync(folder, { recursive: true, force: true });
});

function mounted(name: string, ...words: string[]): string {
  const at = join(folder, name);
  fs.mkdirSync(at);
  execFileSync('mount', [...words, 'none', at]);
  mounts.push(at);
  return at;
}

// --- a file system that fails on purpose ---

const source = fileURLToPath(new URL('../../../../test/support/faultfs.c', import.meta.url));
const program = join(folder, 'faultfs');
execFileSync('gcc', ['-O2', '-Wall', '-Wextra', '-Werror', '-o', program, source]);
const canFail = { skip: !root ? 'needs root' : fs.existsSync('/dev/fuse') ? false : 'this kernel has no /dev/fuse' };

/** A share with the failing file system at `slow`. */
class FaultShare implements AsyncDisposable {
  readonly share: string;
  readonly #server: ChildProcess;

  private constructor(share: string, server: ChildProcess) {
    this.share = share;
    this.#server = server;
  }

  static async start(): Promise<FaultShare> {
    const share = fs.mkdtempSync(join(folder, 'share-'));
    fs.writeFileSync(join(share, 'file'), 'quick');
    fs.mkdirSync(join(share, 'slow'));
    const server = spawn(program, [join(share, 'slow')], { stdio: ['pipe', 'pipe', 'inherit'] });
    await once(server.stdout as NonNullable<typeof server.stdout>, 'data');
    return new FaultShare(share, server);
  }

  /** From now on it takes no requests. */
  pause(): void {
    this.#server.kill('SIGSTOP');
  }

  /** Ends the file system: whatever hangs in it ends with an error. */
  async end(): Promise<void> {
    if (this.#server.exitCode !== null) return;
    const ended = once(this.#server, 'exit');
    this.#server.kill('SIGCONT');
    this.#server.stdin?.end();
    await ended;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end();
  }
}

/** Opens a file of the failing file system. */
function openSlow(client: FuseClient, name: string): { nodeid: number; fh: number } {
  const slow = client.lookup(1, 'slow').nodeid;
  const { nodeid } = client.lookup(slow, name);
  return { nodeid, fh: client.open(nodeid, O_RDWR).fh };
}

function submitRead(client: FuseClient, { nodeid, fh }: { nodeid: number; fh: number }) {
  return client.submit(Opcode.READ, nodeid, [readIn(fh, 0, 4096, {})], 4096);
}

function submitWrite(client: FuseClient, { nodeid, fh }: { nodeid: number; fh: number }) {
  const body = new Struct(40).u64(0, fh).u64(8, 0).u32(16, 4);
  return client.submit(Opcode.WRITE, nodeid, [body.bytes, Buffer.from('text')], 8);
}

describe('disks', () => {
  test('EIO, ENOSPC and EDQUOT reach the guest, and only that file', canFail, async () => {
    await using faults = await FaultShare.start();
    await using daemon = await TestDaemon.start([], { share: faults.share });
    const client = daemon.session();
    const write = (name: string) => {
      const { nodeid, fh } = openSlow(client, name);
      return errnoOf(() => client.write(nodeid, fh, 0, 'text'));
    };
    const bad = openSlow(client, 'read-eio');
    assert.equal(
      errnoOf(() => client.read(bad.nodeid, bad.fh, 0, 100)),
      EIO,
    );
    assert.equal(write('write-eio'), EIO);
    assert.equal(write('write-enospc'), ENOSPC);
    assert.equal(write('write-edquot'), EDQUOT);
    const unsynced = openSlow(client, 'fsync-eio');
    assert.equal(client.write(unsynced.nodeid, unsynced.fh, 0, 'text'), 4);
    assert.equal(
      errnoOf(() => client.fsync(unsynced.nodeid, unsynced.fh)),
      EIO,
    );
    const plain = openSlow(client, 'plain');
    assert.equal(client.read(plain.nodeid, plain.fh, 0, 4096).length, 4096);
    assert.equal(client.write(plain.nodeid, plain.fh, 0, 'text'), 4);
    client.fsync(plain.nodeid, plain.fh);
    assertServes(client, [0, 1]);
  });

  test('a full file system: ENOSPC, and room again', needsRoot, async () => {
    const share = mounted('full', '-t', 'tmpfs', '-o', 'size=1m,nr_inodes=20');
    await using daemon = await TestDaemon.start([], { share });
    const client = daemon.session();
    const { entry, open } = client.create(1, 'big', O_RDWR);
    let written = 0;
    let error = 0;
    for (; error === 0 && written < 4 << 20; written += 65536)
      error = errnoOf(() => client.write(entry.nodeid, open.fh, written, Buffer.alloc(65536, 1)));
    assert.equal(error, ENOSPC);
    assert.equal(
      errnoOf(() => client.fallocate(entry.nodeid, open.fh, 0, 2 << 20)),
      ENOSPC,
    );
    error = 0;
    for (let i = 0; error === 0 && i < 30; i++) error = errnoOf(() => client.mknod(1, `f${i}`, 0o100644));
    assert.equal(error, ENOSPC);
    const before = daemon.descriptors().length;
    for (const make of [
      () => client.mkdir(1, 'd'),
      () => client.symlink(1, 's', 't'),
      () => client.create(1, 'c', O_RDWR),
      () => client.tmpfile(1, O_RDWR),
    ])
      assert.equal(errnoOf(make), ENOSPC);
    assert.equal(daemon.descriptors().length, before);
    client.setattr(entry.nodeid, { size: 0 });
    assert.equal(client.write(entry.nodeid, open.fh, 0, 'again'), 5);
  });

  test('a file size limit is an error, not a signal', { skip: root ? false : 'needs root' }, async () => {
    await using daemon = await TestDaemon.start();
    const client = daemon.session();
    execFileSync('prlimit', ['--pid', String(daemon.inside), '--fsize=100000']);
    const { entry, open } = client.create(1, 'big', O_RDWR);
    assert.equal(
      errnoOf(() => client.write(entry.nodeid, open.fh, 200_000, 'text')),
      EFBIG,
    );
    assert.equal(
      errnoOf(() => client.write(entry.nodeid, open.fh, 1 << 20, Buffer.alloc(300_000))),
      EFBIG,
    );
    assert.equal(client.write(entry.nodeid, open.fh, 0, 'text'), 4);
  });
});

describe('a limit of file sizes from the start (ulimit -f)', () => {
  for (const options of [[], ['--sandbox=none', '--seccomp=none']])
    test(`the guest gets EFBIG beyond it, and nothing else is in its way ${options.join(' ')}`, async () => {
      // Not even a log line fits.
      await using daemon = await TestDaemon.start(options, { wrapper: ['prlimit', '--fsize=1:unlimited', '--'] });
      const client = daemon.session();
      const { entry, open } = client.create(1, 'file', O_RDWR);
      const { nodeid } = entry;
      assert.equal(client.write(nodeid, open.fh, 0, 'x'), 1);
      for (const bytes of [1, 1 << 20])
        assert.equal(
          errnoOf(() => client.write(nodeid, open.fh, 1, Buffer.alloc(bytes))),
          EFBIG,
        );
      assert.equal(
        errnoOf(() => client.fallocate(nodeid, open.fh, 0, 2)),
        EFBIG,
      );
      assert.equal(
        errnoOf(() => client.setattr(nodeid, { size: 2 })),
        EFBIG,
      );
      assert.equal(fs.readFileSync(join(daemon.share, 'file'), 'latin1'), 'x');
      for (let i = 0; i < 300; i++) client.mknod(1, `f${i}`, 0o100644);
      if (options.length > 0) return;
      // The next worker has it, too.
      const { inside } = daemon;
      process.kill(inside, 'SIGKILL');
      assert.equal(
        errnoOf(() => client.write(nodeid, open.fh, 1, 'x')),
        EFBIG,
      );
      assert.notEqual(daemon.inside, inside);
      assertServes(client, [0, 1]);
    });

  test('one that may not be lifted: one line, at once', () => {
    const share = fs.mkdtempSync(join(folder, 'limited-'));
    const words = [PROGRAM_PATH, '--shared-dir', share, '--socket-path', join(share, 'sock')];
    const drop = ['setpriv', '--bounding-set=-sys_resource', '--inh-caps=-sys_resource', '--'];
    const { status, stderr } = spawnSync('prlimit', ['--fsize=1000000', '--', ...(root ? drop : []), ...words], {
      encoding: 'utf8',
      timeout: 20_000,
    });
    assert.equal(status, 1);
    assert.match(stderr, /ERROR the limit of file sizes \(ulimit -H -f\) is 976 KiB: the daemon's own memory needs \d+ .*: raise it/);
    assert.equal(stderr.split('\n').length, 2);
    assert.ok(!fs.existsSync(join(share, 'sock')));
  });
});

// Each waits for its time-outs: together.
describe('a file system that does not answer', { concurrency: 5 }, () => {
  for (const what of ['read', 'write', 'fsync'] as const) {
    test(`a stuck ${what}: others go on, the guest's end and SIGTERM are not held up`, { ...canFail, timeout: 60_000 }, async () => {
      await using faults = await FaultShare.start();
      const daemon = await TestDaemon.start([], { share: faults.share });
      const client = daemon.session();
      const stuck = openSlow(client, `${what}-hang`);
      const plain = openSlow(client, 'plain');
      const file = client.lookup(1, 'file').nodeid;
      const { fh } = client.open(file, O_RDWR);
      const pending =
        what === 'read'
          ? submitRead(client, stuck)
          : what === 'write'
            ? submitWrite(client, stuck)
            : submitFsync(client, stuck.nodeid, stuck.fh);
      for (let i = 0; i < 50; i++) {
        assert.equal(client.read(file, fh, 0, 10).toString(), 'quick');
        assert.equal(client.read(plain.nodeid, plain.fh, 0, 4096).length, 4096);
        assert.equal(client.write(plain.nodeid, plain.fh, 0, 'text'), 4);
        client.fsync(file, fh);
        assertServes(client, [0, 1]);
      }
      assert.ok(!client.done(pending));
      // The guest goes: the next one is served at once, though a thread still hangs.
      await daemon.disconnect(client);
      const next = daemon.session();
      assert.equal(next.lookup(1, 'file').attr.size, 5);
      assertServes(next, [0, 1]);
      const { inside } = daemon;
      assert.deepEqual(await stopWithin(daemon, 15_000), { status: 1, signal: null });
      assert.match(daemon.log, /ERROR 1 requests are not waited for any longer/);
      assert.ok(!fs.existsSync(daemon.socket));
      // The kernel keeps a thread whose request a FUSE server has taken; it ends when that does.
      await faults.end();
      await gone(inside);
      fs.rmSync(daemon.folder, { recursive: true });
    });
  }

  test('INTERRUPT ends what waits for a thread, and what the file system lets go', { ...canFail, timeout: 60_000 }, async () => {
    await using faults = await FaultShare.start();
    await using daemon = await TestDaemon.start(['--thread-pool-size=1'], { share: faults.share });
    const client = daemon.session();
    const plain = openSlow(client, 'plain');
    const running = submitRead(client, openSlow(client, 'read-interruptible'));
    const waiting = [1, 2, 3].map(() => submitRead(client, plain));
    await sleep(100); // the system call is made
    assert.ok(![running, ...waiting].some((one) => client.done(one)));
    client.interrupt(987_654_321n);
    client.interrupt((waiting[1] as typeof running).unique);
    assert.equal(client.wait(waiting[1] as typeof running).error, -EINTR);
    assert.ok(!client.done(running));
    client.interrupt(running.unique);
    assert.equal(client.wait(running).error, -EINTR);
    for (const one of [waiting[0], waiting[2]]) assert.equal(client.wait(one as typeof running).body.length, 4096);
    client.interrupt(running.unique);
    assertServes(client, [0, 1]);
  });

  test('a stuck look-up holds up its guest, but not SIGTERM', { ...canFail, timeout: 60_000 }, async () => {
    await using faults = await FaultShare.start();
    const daemon = await TestDaemon.start([], { share: faults.share });
    const client = daemon.session();
    const slow = client.lookup(1, 'slow').nodeid;
    client.submit(Opcode.LOOKUP, slow, [Buffer.from('lookup-hang\0')], 128);
    await sleep(200);
    const inside = daemon.inside;
    assert.deepEqual(await stopWithin(daemon, 15_000), { status: 1, signal: null });
    assert.match(daemon.log, /the daemon has not ended within 8 seconds .*: killed/);
    assert.ok(!fs.existsSync(daemon.socket));
    await faults.end();
    await gone(inside);
    fs.rmSync(daemon.folder, { recursive: true });
  });

  test('kill -9: what hangs ends with the file system, and nothing is left', { ...canFail, timeout: 60_000 }, async () => {
    await using faults = await FaultShare.start();
    const daemon = await TestDaemon.start([], { share: faults.share });
    const client = daemon.session();
    const plain = openSlow(client, 'plain');
    faults.pause();
    submitRead(client, plain);
    assertServes(client, [0]);
    const { inside, launchers } = daemon;
    daemon.process.kill('SIGKILL');
    await daemon.ended;
    await faults.end();
    for (const pid of [inside, ...launchers]) await gone(pid);
    fs.rmSync(daemon.folder, { recursive: true });
  });
});

async function stopWithin(daemon: TestDaemon, timeout: number) {
  daemon.process.kill('SIGTERM');
  const late = setTimeout(() => daemon.process.kill('SIGKILL'), timeout);
  const end = await daemon.ended;
  clearTimeout(late);
  return end;
}

/** Waits until a process is no more. */
async function gone(pid: number): Promise<void> {
  for (const end = performance.now() + 5000; fs.existsSync(`/proc/${pid}/status`); await sleep(10)) {
    if (/^State:\s+Z/m.test(fs.readFileSync(`/proc/${pid}/status`, 'utf8'))) return;
    assert.ok(performance.now() < end, `process ${pid} goes on`);
  }
}

describe('descriptors', () => {
  test('a guest that opens more files than there may be: ENFILE, look-ups go on, and it recovers', async () => {
    await using daemon = await TestDaemon.start(['--rlimit-nofile=420']);
    const client = daemon.session();
    for (let i = 0; i < 300; i++) fs.writeFileSync(join(daemon.share, `f${i}`), 'text');
    const nodes = Array.from({ length: 300 }, (_, i) => client.lookup(1, `f${i}`).nodeid);
    const open: [nodeid: number, fh: number][] = [];
    let error = 0;
    for (const nodeid of nodes) {
      error = errnoOf(() => open.push([nodeid, client.open(nodeid, O_RDONLY).fh]));
      if (error !== 0) break;
    }
    assert.ok([ENFILE, EMFILE].includes(error), `errno ${error} after ${open.length}`);
    assert.ok(open.length >= 100);
    for (let i = 0; i < 300; i += 7) assert.equal(client.lookup(1, `f${i}`).attr.size, 4);
    const [first] = open;
    assert.equal(client.read(first?.[0] as number, first?.[1] as number, 0, 10).toString(), 'text');
    assert.notEqual(
      errnoOf(() => client.create(1, 'made', O_RDWR)),
      0,
    );
    for (const [nodeid, fh] of open) client.release(nodeid, fh);
    for (const nodeid of nodes.slice(0, 100)) client.open(nodeid, O_RDONLY);
    client.create(1, 'made', O_RDWR);
    assertServes(client, [0, 1]);
  });

  test('none left for a client: no spinning, one line, and it is served when there is one again', needsRoot, async () => {
    await using daemon = await TestDaemon.start();
    const first = daemon.session();
    await daemon.disconnect(first);
    const limit = (n: number | string) => execFileSync('prlimit', ['--pid', String(daemon.inside), `--nofile=${n}:`]);
    const highest = Math.max(...daemon.descriptors().map(({ fd }) => fd));
    // What is below is in use, or is taken by a descriptor that is opened and closed.
    limit(3);
    const before = cpuSeconds(daemon);
    const waiting = VhostUserFrontend.connect(daemon.socket);
    await sleep(2500);
    assert.ok(cpuSeconds(daemon) - before < 0.3, 'it spins');
    const lines = daemon.lines.filter((line) => line.includes('cannot be accepted'));
    assert.ok(lines.length >= 1 && lines.length < 6, `${lines.length} lines`);
    assert.match(lines[0] as string, /ERROR a client cannot be accepted \(errno 24\): raise --rlimit-nofile/);
    limit(highest + 500);
    assert.notEqual(waiting.getFeatures(), 0n);
    waiting.close();
    await daemon.until(() => daemon.log.split('the client is gone').length === 3);
    assertServes(daemon.session());
  });
});

describe('the shared directory', () => {
  test('deleted while in use: errors for what is gone, what is open goes on', async () => {
    const share = join(folder, 'deleted');
    fs.mkdirSync(join(share, 'dir'), { recursive: true });
    fs.writeFileSync(join(share, 'file'), 'text');
    await using daemon = await TestDaemon.start([], { share });
    const client = daemon.session();
    const { nodeid } = client.lookup(1, 'file');
    const dir = client.lookup(1, 'dir').nodeid;
    const { fh } = client.open(nodeid, O_RDWR);
    fs.rmSync(share, { recursive: true });
    assert.equal(client.read(nodeid, fh, 0, 10).toString(), 'text');
    assert.equal(client.write(nodeid, fh, 0, 'TEXT'), 4);
    assert.equal(client.getattr(1).attr.mode & 0o170000, 0o040000);
    for (const request of [
      () => client.lookup(1, 'file'),
      () => client.mkdir(1, 'made'),
      () => client.create(1, 'made', O_RDWR),
      () => client.mkdir(dir, 'made'),
    ])
      assert.ok([ENOENT, ESTALE].includes(errnoOf(request)));
    assert.ok([0, ENOENT].includes(errnoOf(() => client.list(1))));
    // Another directory of the same name is another directory.
    fs.mkdirSync(share);
    fs.writeFileSync(join(share, 'other'), 'text');
    assert.equal(
      errnoOf(() => client.lookup(1, 'other')),
      ENOENT,
    );
    assertServes(client, [0, 1]);
  });

  test('a file system below it that is unmounted while in use', needsRoot, async () => {
    const share = mounted('outer', '-t', 'tmpfs');
    const inner = join(share, 'inner');
    fs.mkdirSync(inner);
    execFileSync('mount', ['-t', 'tmpfs', 'none', inner]);
    fs.writeFileSync(join(inner, 'file'), 'text');
    await using daemon = await TestDaemon.start([], { share });
    const client = daemon.session();
    const dir = client.lookup(1, 'inner').nodeid;
    const { nodeid } = client.lookup(dir, 'file');
    const { fh } = client.open(nodeid, O_RDONLY);
    execFileSync('umount', ['-l', inner]);
    assert.equal(client.read(nodeid, fh, 0, 10).toString(), 'text');
    assert.ok(client.lookup(1, 'inner').nodeid > 1);
    client.release(nodeid, fh);
    assertServes(client, [0, 1]);
    errnoOf(() => client.getattr(nodeid));
    errnoOf(() => client.lookup(dir, 'file'));
    assertServes(client, [0, 1]);
  });
});

/** A memory control group of version 1 or 2 in which `pid` is from now on; undefined where none can be made. */
function limitMemory(pid: number, bytes: number): { kills(): number; remove(): void } | undefined {
  const second = !fs.existsSync('/sys/fs/cgroup/memory');
  const top = second ? '/sys/fs/cgroup' : '/sys/fs/cgroup/memory';
  const group = join(top, `virtiofsd-ts-${pid}`);
  try {
    if (second) fs.writeFileSync(join(top, 'cgroup.subtree_control'), '+memory');
    fs.mkdirSync(group);
    fs.writeFileSync(join(group, second ? 'memory.max' : 'memory.limit_in_bytes'), String(bytes));
    fs.writeFileSync(join(group, 'cgroup.procs'), String(pid));
  } catch {
    return undefined;
  }
  const events = join(group, second ? 'memory.events' : 'memory.oom_control');
  return {
    kills: () => Number(/^oom_kill (\d+)/m.exec(fs.readFileSync(events, 'utf8'))?.[1]),
    remove: () => fs.rmdirSync(group),
  };
}

describe('memory', () => {
  test('none left in a control group: the kernel ends the worker, the next one goes on', needsRoot, async (t) => {
    await using daemon = await TestDaemon.start();
    const client = daemon.session({}, { timeout: 30_000 });
    const { entry, open } = client.create(1, 'kept', O_RDWR);
    const group = limitMemory(daemon.inside, 2 << 20);
    if (group === undefined) {
      t.skip('THIS MACHINE HAS NO MEMORY CONTROL GROUPS: what happens when memory runs out is not tested');
      return;
    }
    for (let i = 0; group.kills() === 0; i++) {
      assert.ok(i < 40_000, daemon.log);
      fs.writeFileSync(join(daemon.share, `file with a long name ${i}`), '');
      client.lookup(1, `file with a long name ${i}`);
    }
    assert.equal(client.write(entry.nodeid, open.fh, 0, 'kept'), 4);
    assertServes(client, [0, 1]);
    assert.match(daemon.log, /the worker before this one was ended by signal 9/);
    group.remove();
  });
});

describe('address space', () => {
  const limit = (daemon: TestDaemon, bytes: number) => execFileSync('prlimit', ['--pid', String(daemon.inside), `--as=${bytes}:`]);
  const used = (daemon: TestDaemon) => Number(/^VmSize:\s+(\d+)/m.exec(daemon.proc('status'))?.[1]) * 1024;

  test('no room for a thread: what it would do is done in turn', needsRoot, async () => {
    await using daemon = await TestDaemon.start([], { wrapper: ['prlimit', `--stack=${8 << 20}`, '--'] });
    const client = daemon.session();
    const { entry, open } = client.create(1, 'file', O_RDWR);
    const { inside, threads } = daemon;
    limit(daemon, used(daemon) + (4 << 20)); // less than a stack
    for (let i = 0; i < 5; i++) client.fsync(entry.nodeid, open.fh);
    assert.deepEqual([daemon.inside, daemon.threads], [inside, threads]);
    limit(daemon, used(daemon) + (1 << 30));
    client.fsync(entry.nodeid, open.fh);
    assert.equal(daemon.threads, threads + 1);
  });

  test('none at all: SIGTERM is heeded in order, whether memory lasts until the end or not', needsRoot, async () => {
    for (const files of [100, 1000]) {
      const daemon = await TestDaemon.start();
      const client = daemon.session();
      for (let i = 0; i < files; i++) client.create(1, `f${i}`, O_RDWR);
      limit(daemon, 4096);
      assert.deepEqual(await daemon.stop(), { status: 0, signal: null }, daemon.log);
      assert.ok(!fs.existsSync(daemon.socket));
      daemon.close(client);
      fs.rmSync(daemon.folder, { recursive: true });
    }
  });

  test('a worker that fails after it was told to end: the next one answers what was under way, and ends in order', async () => {
    await using daemon = await TestDaemon.start();
    const client = daemon.session();
    const { inside } = daemon;
    process.kill(inside, 'SIGSTOP');
    // A thread that still runs could take the signal to end at once.
    await daemon.until(() =>
      fs.readdirSync(`/proc/${inside}/task`).every((thread) => /^State:\s+T/m.test(daemon.proc(`task/${thread}/status`))),
    );
    const pending = Array.from({ length: 20 }, () => client.submit(Opcode.GETATTR, 1, [Buffer.alloc(16)], 128));
    daemon.process.kill('SIGTERM');
    // It waits to be taken, or its handler is to run next.
    const told = () => /^(ShdPnd|SigPnd|SigBlk):\s+\d+4000$/m.test(daemon.proc('status'));
    await daemon.until(told);
    process.kill(inside, 'SIGABRT');
    process.kill(inside, 'SIGCONT');
    assert.deepEqual(await daemon.ended, { status: 0, signal: null });
    for (const one of pending) assert.equal(client.wait(one).error, 0);
    assert.match(daemon.log, /the worker before this one was ended by signal 6.*ending on signal/s);
  });
});

describe('time', () => {
  test('stopped for a while: what waited is served afterwards', async () => {
    await using daemon = await TestDaemon.start();
    const client = daemon.session();
    const seconds = Number(process.env['STOP_SECONDS'] ?? 2);
    const { inside } = daemon;
    process.kill(inside, 'SIGSTOP');
    const pending = Array.from({ length: 100 }, () => client.submit(Opcode.GETATTR, 1, [Buffer.alloc(16)], 128));
    await sleep(seconds * 1000);
    assert.ok(pending.every((one) => !client.done(one)));
    process.kill(inside, 'SIGCONT');
    for (const one of pending) assert.equal(client.wait(one, 10_000).error, 0);
    assertServes(client, [0, 1]);
  });

  test('a monotonic clock that began long ago', { skip: root ? false : 'needs root' }, async () => {
    await using daemon = await TestDaemon.start([], {
      wrapper: ['unshare', '--time', '--monotonic', '300000000', '--boottime', '300000000', '--'],
    });
    const client = daemon.session();
    const { entry, open } = client.create(1, 'file', O_RDWR);
    client.fsync(entry.nodeid, open.fh);
    assertServes(client, [0, 1]);
  });
});

describe('the log', () => {
  test('goes to a full disk: nobody is held up', async () => {
    await using daemon = await TestDaemon.start(['--log-level=trace'], { wrapper: ['sh', '-c', 'exec "$@" 2>/dev/full', 'sh'] });
    const client = daemon.session();
    const began = performance.now();
    for (let i = 0; i < 500; i++) assertServes(client);
    assert.ok(performance.now() - began < 5000);
  });

  test('is a pipe that nobody reads: the device goes on, and what was lost is told', async () => {
    const fifo = join(folder, 'fifo');
    execFileSync('mkfifo', [fifo]);
    const both = fs.openSync(fifo, O_RDWR | O_NONBLOCK);
    await using daemon = await TestDaemon.start(['--log-level=trace'], { wrapper: ['sh', '-c', `exec "$@" 2>${fifo}`, 'sh'] });
    const client = FuseClient.connect(daemon.socket, { features: ~features(0, Feature.LOG_ALL) });
    client.init();
    const began = performance.now();
    for (let i = 0; i < 3000; i++) client.getattr(1);
    assert.ok(performance.now() - began < 10_000, `${performance.now() - began} ms`);
    // Read a part of it: lines come again, and how many are missing.
    let text = '';
    const bytes = Buffer.alloc(65536);
    const drain = () => {
      try {
        for (;;) text += bytes.toString('latin1', 0, fs.readSync(both, bytes));
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error;
      }
    };
    drain();
    client.getattr(1);
    await sleep(50);
    drain();
    assert.match(text, /\d+ log lines were lost: standard error took no more/);
    client.close();
    const end = await daemon.stop();
    assert.deepEqual(end, { status: 0, signal: null });
    fs.closeSync(both);
  });
});
