/**
 * The boundary of the share: while a host process swaps directories and links, and moves directories out and in, a guest looks up,
 * opens, reads, writes, creates, renames and removes through the names and nodeids that it has. Nothing outside is ever read or changed.
 * HOSTILE_SECONDS: how long in each mode (2).
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { root } from '../support/daemon.js';
import { errnoOf, type FuseClient, FuseError } from '../support/fuse-client.js';
import { assertServes, SECRET, snapshot, Target } from '../support/hostile.js';

const { O_RDWR, O_RDONLY, O_CREAT, O_TRUNC } = fs.constants;
const { ENOTDIR, ENOENT, ESTALE, EROFS } = constants.errno;
const SECONDS = Number(process.env['HOSTILE_SECONDS'] ?? 2);
const EVIL = 'written by the guest';

/** Names of the share whose meaning changes, and what is behind them at one time or the other. */
function furnish(target: Target): { swaps: [string, string][]; moves: [string, string][] } {
  const { share } = target.daemon;
  const at = (name: string) => join(share, name);
  for (const name of ['swap', 'deep/swap', 'moved', 'deep/moved']) {
    fs.mkdirSync(at(name), { recursive: true });
    fs.mkdirSync(join(at(name), 'sub'));
    fs.writeFileSync(join(at(name), 'secret'), 'harmless');
    fs.writeFileSync(join(at(name), 'sub', 'secret'), 'harmless');
  }
  fs.writeFileSync(at('swap-file'), 'harmless');
  fs.symlinkSync('../outside', at('out'));
  fs.symlinkSync(target.outside, at('deep/out'));
  fs.symlinkSync('../outside/secret', at('out-file'));
  fs.symlinkSync('/proc/self/root', at('magic'));
  fs.symlinkSync('/proc/self/cwd', at('magic-cwd'));
  fs.symlinkSync('/proc/self/fd/0', at('magic-fd'));
  // Where directories are moved to, beside the share and what is outside.
  const elsewhere = join(target.daemon.folder, 'log.d');
  fs.mkdirSync(elsewhere);
  return {
    swaps: [
      [at('swap'), at('out')],
      [at('deep/swap'), at('deep/out')],
      [at('swap-file'), at('out-file')],
      [at('magic'), at('swap')],
      [at('magic-cwd'), at('deep')],
    ],
    moves: [
      [at('moved'), join(elsewhere, 'moved')],
      [at('deep/moved'), join(elsewhere, 'deep-moved')],
    ],
  };
}

const NAMES = [
  'swap',
  'out',
  'deep',
  'moved',
  'swap-file',
  'out-file',
  'magic',
  'magic-cwd',
  'magic-fd',
  'secret',
  'sub',
  'made',
  'etc',
  'outside',
  'proc',
];

/** One guest, which takes what comes: errors are fine, secrets are not. */
class Guest {
  readonly client: FuseClient;
  /** Nodeids of directories and of anything, some of them stale by now. */
  readonly nodes: number[] = [1];
  requests = 0;
  succeeded = 0;
  #state = 0x2545f491;

  constructor(client: FuseClient) {
    this.client = client;
  }

  #random(below: number): number {
    this.#state ^= this.#state << 13;
    this.#state ^= this.#state >>> 17;
    this.#state ^= this.#state << 5;
    return (this.#state >>> 0) % below;
  }

  #pick<T>(list: readonly T[]): T {
    return list[this.#random(list.length)] as T;
  }

  #attempt<T>(request: () => T): T | undefined {
    this.requests++;
    try {
      const result = request();
      this.succeeded++;
      return result;
    } catch (error) {
      if (error instanceof FuseError) return undefined;
      throw error;
    }
  }

  #keep(nodeid: number): void {
    if (this.nodes.length < 400) this.nodes.push(nodeid);
    else this.nodes[1 + this.#random(399)] = nodeid;
  }

  /** One step: some nodeid, some name, some request. */
  step(): void {
    const { client } = this;
    const node = this.#pick(this.nodes);
    const name = this.#pick(NAMES);
    switch (this.#random(16)) {
      case 0:
      case 1:
      case 2:
      case 3: {
        const entry = this.#attempt(() => client.lookup(node, name));
        if (entry !== undefined) this.#keep(entry.nodeid);
        return;
      }
      case 4: {
        const entry = this.#attempt(() => client.lookup(node, '..'));
        if (entry !== undefined) this.#keep(entry.nodeid);
        return;
      }
      case 5:
      case 6: {
        const open = this.#attempt(() => client.open(node, this.#pick([O_RDONLY, O_RDWR, O_RDWR | O_TRUNC])));
        if (open === undefined) return;
        const text = this.#attempt(() => client.read(node, open.fh, 0, 4096))?.toString('latin1') ?? '';
        assert.ok(!text.includes(SECRET) && !text.includes('root:'), `read from outside: ${text.slice(0, 80)}`);
        this.#attempt(() => client.write(node, open.fh, 0, EVIL));
        this.#attempt(() => client.release(node, open.fh));
        return;
      }
      case 7: {
        const made = this.#attempt(() => client.create(node, this.#pick(['made', 'secret', 'swap-file']), O_RDWR | O_CREAT));
        if (made === undefined) return;
        const text = this.#attempt(() => client.read(made.entry.nodeid, made.open.fh, 0, 4096))?.toString('latin1') ?? '';
        assert.ok(!text.includes(SECRET), 'read from outside by CREATE');
        this.#attempt(() => client.write(made.entry.nodeid, made.open.fh, 0, EVIL));
        this.#attempt(() => client.release(made.entry.nodeid, made.open.fh));
        return;
      }
      case 8: {
        const { fh } = this.#attempt(() => client.opendir(node)) ?? { fh: -1 };
        if (fh < 0) return;
        for (const { entry, name: found } of this.#attempt(() => client.readdirplus(node, fh)) ?? []) {
          assert.ok(!['fs.sock', 'outside', 'log.d', 'passwd'].includes(found), `${found} is listed, which is outside`);
          if (entry !== undefined && entry.nodeid !== 0) this.#keep(entry.nodeid);
        }
        this.#attempt(() => client.releasedir(node, fh));
        return;
      }
      case 9:
        this.#attempt(() => client.setattr(node, { mode: 0o777 }));
        return;
      case 10:
        this.#attempt(() => client.mkdir(node, 'made'));
        this.#attempt(() => client.rmdir(node, 'made'));
        return;
      case 11:
        this.#attempt(() => client.unlink(node, this.#pick(['made', 'linked', 'renamed'])));
        return;
      case 12:
        this.#attempt(() => client.rename(node, 'made', this.#pick(this.nodes), this.#pick(['renamed', 'secret'])));
        return;
      case 13:
        this.#attempt(() => client.link(node, this.#pick(this.nodes), 'linked'));
        return;
      case 14:
        this.#attempt(() => client.setattr(node, { size: 0 }));
        return;
      default: {
        const target = this.#attempt(() => client.readlink(node));
        assert.ok(target === undefined || !target.includes(SECRET));
      }
    }
  }
}

async function race(options: readonly string[], seconds: number): Promise<void> {
  await using target = await Target.start(options);
  const { daemon } = target;
  const readonly = options.includes('--readonly');
  const { swaps, moves } = furnish(target);
  const files = readonly ? contents(daemon.share) : undefined;
  const stop = new Int32Array(new SharedArrayBuffer(4));
  const worker = new Worker(fileURLToPath(new URL('../support/racer-thread.js', import.meta.url)), { workerData: { swaps, moves, stop } });
  const swapped = new Promise<number>((done) => worker.on('message', done));
  await new Promise((online) => worker.on('online', online));
  const client = daemon.session();
  const guest = new Guest(client);
  for (const end = performance.now() + seconds * 1000; performance.now() < end; ) for (let i = 0; i < 100; i++) guest.step();
  Atomics.store(stop, 0, 1);
  const count = await swapped;
  await worker.terminate();
  assertServes(client, [0, 1]);
  console.log(
    `${options.join(' ')}: ${guest.requests} requests in ${seconds} s, ${guest.succeeded} of them succeeded, ${count} swaps and moves meanwhile`,
  );
  assert.ok(guest.succeeded > 100 && count > 100);
  if (files !== undefined) assert.deepEqual(contents(daemon.share), files);
  const elsewhere = join(daemon.folder, 'log.d');
  assert.deepEqual(fs.readdirSync(elsewhere), []);
  fs.rmdirSync(elsewhere);
}

/** What files say, whatever they are called at the moment. */
function contents(folder: string): string[] {
  return Object.values(snapshot(folder))
    .map((line) => line.split(' ').slice(5).join(' '))
    .filter((text) => text !== '')
    .sort();
}

describe('a host process that swaps and moves', () => {
  for (const options of [
    ['--sandbox=namespace'],
    ['--sandbox=namespace', '--inode-file-handles=never'],
    ['--sandbox=namespace', '--readonly'],
    ['--sandbox=chroot'],
    ['--sandbox=none'],
    ['--sandbox=none', '--readonly'],
  ]) {
    const skip = options.includes('--sandbox=chroot') && !root ? 'needs root' : false;
    test(options.join(' '), { skip, timeout: 60_000 + SECONDS * 1000 }, () => race(options, SECONDS));
  }
});

describe('mounts in the share that are taken away or moved out', () => {
  for (const [options, propagation] of [
    [['--sandbox=namespace'], 'shared'],
    [['--sandbox=chroot'], 'private'],
    [['--sandbox=none'], 'private'],
    [['--sandbox=none', '--inode-file-handles=never'], 'private'],
  ] as const) {
    test(`lead nowhere else (${options.join(' ')})`, { skip: root ? false : 'needs root' }, async () => {
      await using target = await Target.start(options, { wrapper: ['unshare', '-m', '--propagation', propagation, '--'] });
      const { daemon, outside } = target;
      const at = (name: string) => join(daemon.share, name);
      const around = join(outside, 'around');
      fs.mkdirSync(join(around, 'tree', 'sub'), { recursive: true });
      fs.writeFileSync(join(around, 'secret'), SECRET);
      for (const name of ['bound', 'mounted', 'swap']) fs.mkdirSync(at(name));
      target.settle();
      /** Where the daemon's mounts are. */
      const there = (...words: string[]) =>
        execFileSync('nsenter', ['-t', String(daemon.pid), '-m', ...words], { stdio: 'ignore', cwd: '/' });
      there('mount', '--bind', join(around, 'tree'), at('bound'));
      there('mount', '-t', 'tmpfs', 'none', at('mounted'));
      there('mkdir', at('mounted/sub'));
      const client = daemon.session();
      const bound = client.lookup(1, 'bound').nodeid;
      const mounted = client.lookup(1, 'mounted').nodeid;
      const nodes = [bound, mounted, client.lookup(bound, 'sub').nodeid, client.lookup(mounted, 'sub').nodeid];
      for (const node of [bound, mounted]) assert.equal(client.lookup(node, '..').nodeid, 1);
      there('umount', '-l', at('bound'));
      // Mounts that others are told of cannot be moved.
      if (propagation === 'private') there('mount', '--move', at('mounted'), join(outside, 'sub'));
      else there('umount', '-l', at('mounted'));
      // Something else takes their places.
      there('mount', '--bind', at('swap'), at('bound'));
      for (const node of nodes) {
        assert.ok([ESTALE, ENOENT].includes(errnoOf(() => client.lookup(node, '..'))));
        for (const name of ['secret', 'tree', 'outside', 'fs.sock'])
          assert.ok([ESTALE, ENOENT].includes(errnoOf(() => client.lookup(node, name))));
      }
      assert.equal(client.lookup(client.lookup(1, 'bound').nodeid, '..').nodeid, 1);
      assertServes(client, [0, 1]);
    });
  }
});

describe('a directory that is moved out of the share', () => {
  for (const options of [[], ['--inode-file-handles=never'], ['--sandbox=none']]) {
    test(`stays what its nodeid says, and leads nowhere else (${options.join(' ') || 'defaults'})`, async () => {
      await using target = await Target.start(options);
      const { daemon, outside } = target;
      fs.mkdirSync(join(daemon.share, 'top', 'below'), { recursive: true });
      fs.writeFileSync(join(daemon.share, 'top', 'below', 'file'), 'known');
      const client = daemon.session();
      const top = client.lookup(1, 'top').nodeid;
      const below = client.lookup(top, 'below').nodeid;
      const file = client.lookup(below, 'file').nodeid;
      const { fh } = client.open(file, O_RDONLY);
      fs.renameSync(join(daemon.share, 'top'), join(outside, 'sub', 'top'));
      // As with virtiofsd and NFS: what the guest has, it has.
      assert.equal(client.read(file, fh, 0, 10).toString(), 'known');
      assert.equal(client.getattr(below).attr.mode & 0o170000, 0o040000);
      assert.equal(client.lookup(below, 'file').nodeid, file);
      assert.equal(
        errnoOf(() => client.lookup(1, 'top')),
        ENOENT,
      );
      // But no way up from there: its parent is not in the share.
      assert.ok([ESTALE, ENOENT].includes(errnoOf(() => client.lookup(top, '..'))));
      assert.ok([0, ESTALE, ENOENT].includes(errnoOf(() => client.lookup(below, '..'))));
      for (const name of ['secret', 'sub'])
        assert.equal(
          errnoOf(() => client.lookup(top, name)),
          ENOENT,
        );
      fs.renameSync(join(outside, 'sub', 'top'), join(daemon.share, 'back'));
      fs.utimesSync(join(outside, 'sub'), 0, 0);
      assert.equal(client.lookup(1, 'back').nodeid, top);
      assert.equal(client.lookup(top, '..').nodeid, 1);
      target.settle();
    });
  }

  test('links that lead out are links, whatever they say', async () => {
    await using target = await Target.start();
    const client = target.daemon.session();
    for (const to of ['/', '/etc', '../outside', '/proc/self/root', '/proc/self/fd/1', '.', '..']) {
      const { nodeid, attr } = client.symlink(1, 'made', to);
      assert.equal(attr.mode & 0o170000, 0o120000);
      assert.equal(client.readlink(nodeid), to);
      assert.equal(
        errnoOf(() => client.lookup(nodeid, 'secret')),
        ENOTDIR,
      );
      assert.notEqual(
        errnoOf(() => client.open(nodeid, O_RDONLY)),
        0,
      );
      // The link changes, not what it leads to.
      client.setattr(nodeid, { uid: process.getuid?.() ?? 0 });
      assert.notEqual(
        errnoOf(() => client.setattr(nodeid, { size: 0 })),
        0,
      );
      client.unlink(1, 'made');
    }
  });

  test('--readonly: nothing of the share changes by anything', async () => {
    await using target = await Target.start(['--readonly']);
    const { daemon } = target;
    const before = snapshot(daemon.share);
    const client = daemon.session();
    const file = client.lookup(1, 'file').nodeid;
    const attempts: [what: string, errno: number][] = [
      ['write', errnoOf(() => client.open(file, O_RDWR))],
      ['truncate', errnoOf(() => client.setattr(file, { size: 0 }))],
      ['chmod', errnoOf(() => client.setattr(file, { mode: 0o777 }))],
      ['times', errnoOf(() => client.setattr(file, { mtime: 'now' }))],
      ['create', errnoOf(() => client.create(1, 'made', O_RDWR))],
      ['mkdir', errnoOf(() => client.mkdir(1, 'made'))],
      ['mknod', errnoOf(() => client.mknod(1, 'made', 0o100644))],
      ['symlink', errnoOf(() => client.symlink(1, 'made', 'to'))],
      ['link', errnoOf(() => client.link(file, 1, 'made'))],
      ['rename', errnoOf(() => client.rename(1, 'file', 1, 'made'))],
      ['unlink', errnoOf(() => client.unlink(1, 'file'))],
      ['rmdir', errnoOf(() => client.rmdir(1, 'dir'))],
      ['tmpfile', errnoOf(() => client.tmpfile(1, O_RDWR))],
    ];
    for (const [what, errno] of attempts) assert.equal(errno, EROFS, what);
    assert.deepEqual(snapshot(daemon.share), before);
  });
});
