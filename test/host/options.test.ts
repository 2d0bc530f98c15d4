/** What every option does to the real daemon: seen by its guest, on the host, or in what it prints. */
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import * as fs from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { features, ProtocolFeature } from 'vhost-user-ts';
import { cString, native } from 'vhost-user-ts/native';
import { AttrFlag, InitFlag, InitFlag2, OpenOutFlag, WriteFlag } from '../../src/fuse/abi.js';
import { OPTIONS } from '../../src/options.js';
import { needsRoot, root, runDaemon, TestDaemon } from '../support/daemon.js';
import { errnoOf, type FuseClient, LINUX_INIT_FLAGS, LINUX_INIT_FLAGS2, securityContextExtension } from '../support/fuse-client.js';
import { submitFsync } from '../support/hostile.js';

const { EROFS, ENOSYS, ENODATA, EOPNOTSUPP, EPROTO, EPERM, EINVAL, ENOENT } = constants.errno;
const { O_RDONLY, O_WRONLY, O_RDWR, O_TRUNC, O_NOATIME, O_DIRECT, O_CREAT } = fs.constants;
const DAY = 86_400;

const folder = fs.mkdtempSync(join(tmpdir(), 'options-'));
after(() => fs.rmSync(folder, { recursive: true, force: true }));

/** An extended attribute as the host has it; undefined when it has none. */
function hostAttribute(path: string, name: string): string | undefined {
  const code = 'import os,sys; sys.stdout.buffer.write(os.getxattr(sys.argv[1], sys.argv[2], follow_symlinks=False))';
  const { status, stdout } = spawnSync('python3', ['-c', code, path, name], { encoding: 'latin1', cwd: '/' });
  return status === 0 ? stdout : undefined;
}

/** A file in the share, its nodeid. */
function file(daemon: TestDaemon, client: FuseClient, name = 'file', text = 'hello'): number {
  fs.writeFileSync(join(daemon.share, name), text);
  return client.lookup(1, name).nodeid;
}

describe('share', () => {
  test('--readonly: nothing changes', async () => {
    await using daemon = await TestDaemon.start(['--readonly', '--xattr']);
    const client = daemon.session();
    fs.mkdirSync(join(daemon.share, 'dir'));
    const nodeid = file(daemon, client);
    const { fh } = client.open(nodeid);
    const before = fs.statSync(join(daemon.share, 'file'), { bigint: true });
    const changes: readonly (() => unknown)[] = [
      () => client.setattr(nodeid, { mode: 0 }),
      () => client.setattr(nodeid, { size: 0 }),
      () => client.symlink(1, 'x', 'y'),
      () => client.mknod(1, 'x', 0o100644),
      () => client.mkdir(1, 'x'),
      () => client.unlink(1, 'file'),
      () => client.rmdir(1, 'dir'),
      () => client.rename(1, 'file', 1, 'x'),
      () => client.rename2(1, 'file', 1, 'dir', 2),
      () => client.link(nodeid, 1, 'x'),
      () => client.open(nodeid, O_WRONLY),
      () => client.open(nodeid, O_RDWR),
      () => client.create(1, 'x', O_WRONLY),
      () => client.create(1, 'x', O_RDONLY | O_CREAT),
      () => client.tmpfile(1, O_RDWR),
      () => client.write(nodeid, fh, 0, 'x'),
      () => client.setxattr(nodeid, 'user.x', 'x'),
      () => client.removexattr(nodeid, 'user.x'),
      () => client.fallocate(nodeid, fh, 0, 10),
      () => client.copyFileRange({ nodeid, fh, offset: 0 }, { nodeid, fh, offset: 100 }, 5),
      () => client.access(nodeid, 2),
    ];
    for (const change of changes) assert.equal(errnoOf(change), EROFS, String(change));
    assert.ok([EROFS, EINVAL].includes(errnoOf(() => client.open(nodeid, O_RDONLY | O_TRUNC))));
    assert.equal(client.read(nodeid, fh, 0, 100).toString(), 'hello');
    assert.deepEqual(
      client
        .list(1)
        .map(({ name }) => name)
        .sort(),
      ['.', '..', 'dir', 'file'],
    );
    const now = fs.statSync(join(daemon.share, 'file'), { bigint: true });
    assert.deepEqual([now.size, now.mode, now.mtimeNs, now.ctimeNs], [before.size, before.mode, before.mtimeNs, before.ctimeNs]);
  });

  test('--tag and --num-request-queues: the configuration space', async () => {
    await using daemon = await TestDaemon.start(['--tag=über-share', '--num-request-queues=3']);
    const client = daemon.session({}, { queues: 4 });
    const config = Buffer.from(client.driver.frontend.getConfig(0, 40));
    assert.equal(config.subarray(0, 36).toString().replaceAll('\0', ''), 'über-share');
    assert.equal(config.readUInt32LE(36), 3);
    for (client.requestQueue = 0; client.requestQueue < 3; client.requestQueue++) client.getattr(1);
    daemon.close(client);
    await using plain = await TestDaemon.start();
    assert.equal(plain.connect().driver.offeredProtocol & features(ProtocolFeature.CONFIG), 0n);
  });

  test('--announce-submounts and --no-announce-submounts', needsRoot, async () => {
    // A mount namespace of its own, so that nothing is left behind.
    const wrapper = ['unshare', '-m', 'sh', '-c', 'mkdir -p "$0/share/sub" && mount -t tmpfs none "$0/share/sub" && exec "$@"', '{folder}'];
    for (const [options, init, flags] of [
      [[], {}, AttrFlag.SUBMOUNT],
      [['--announce-submounts'], {}, AttrFlag.SUBMOUNT],
      [['--no-announce-submounts'], {}, 0],
      [['--no-announce-submounts', '--announce-submounts'], {}, AttrFlag.SUBMOUNT],
      [[], { flags: LINUX_INIT_FLAGS & ~InitFlag.SUBMOUNTS }, 0],
    ] as const) {
      await using daemon = await TestDaemon.start(options, { wrapper });
      const client = daemon.session(init);
      assert.equal((client.session?.flags ?? 0) & InitFlag.SUBMOUNTS, flags === 0 ? 0 : InitFlag.SUBMOUNTS);
      assert.equal(client.lookup(1, 'sub').attr.flags, flags);
      const { fh } = client.opendir(1);
      assert.equal(client.readdirplus(1, fh).find(({ name }) => name === 'sub')?.entry?.attr.flags, flags);
      assert.equal(client.mkdir(1, 'other').attr.flags, 0);
      assert.equal(client.mkdir(client.lookup(1, 'sub').nodeid, 'below').attr.flags, 0);
    }
  });

  test('--inode-file-handles: what known inodes cost in descriptors', needsRoot, async () => {
    for (const [mode, each] of [
      ['never', 1],
      ['prefer', 0],
      ['mandatory', 0],
    ] as const) {
      await using daemon = await TestDaemon.start([`--inode-file-handles=${mode}`]);
      const client = daemon.session();
      for (let i = 0; i < 300; i++) fs.writeFileSync(join(daemon.share, `f${i}`), '');
      const first = client.lookup(1, 'f0').nodeid;
      const before = daemon.descriptors().length;
      for (let i = 1; i < 300; i++) client.lookup(1, `f${i}`);
      assert.equal(daemon.descriptors().length - before, 299 * each, mode);
      // An inode that is known by a descriptor outlives its name, one known by a handle does not.
      fs.unlinkSync(join(daemon.share, 'f0'));
      assert.equal(
        errnoOf(() => client.getattr(first)),
        each === 1 ? 0 : constants.errno.ESTALE,
        mode,
      );
      await daemon.disconnect(client);
      assert.ok(daemon.descriptors().length <= before);
    }
  });

  test('--inode-file-handles=mandatory refuses a file system without them, prefer shares it', needsRoot, async () => {
    const socket = join(folder, 'mandatory.sock');
    const { status, stderr } = runDaemon(['--shared-dir=/proc', '--socket-path', socket, '--inode-file-handles=mandatory']);
    assert.equal(status, 1);
    assert.match(stderr, /ERROR \/proc: its file system has no file handles that can be opened/);
    assert.ok(!fs.existsSync(socket));
    await using daemon = await TestDaemon.start([], { share: '/proc' });
    assert.ok(daemon.session().lookup(1, 'version').nodeid > 1);
    assert.match(daemon.log, /WARN {2}mount \d+: no file handles that can be opened/);
  });

  test('--preserve-noatime and --allow-direct-io: flags that reach the host', needsRoot, async () => {
    for (const [options, flags] of [
      [[], 0],
      [['--preserve-noatime'], O_NOATIME],
      [['--allow-direct-io'], O_DIRECT],
      [['--preserve-noatime', '--allow-direct-io'], O_NOATIME | O_DIRECT],
    ] as const) {
      await using daemon = await TestDaemon.start(options);
      const client = daemon.session();
      const nodeid = file(daemon, client, 'file', 'x'.repeat(8192));
      const { fh } = client.open(nodeid, O_RDONLY | O_NOATIME | O_DIRECT);
      const [host = 0] = daemon.openFlags(join(daemon.share, 'file')).filter((f) => (f & 0x200000) === 0);
      assert.equal(host & (O_NOATIME | O_DIRECT), flags, options.join(' '));
      // O_DIRECT wants aligned memory: the reply's header shifts the guest's buffer, so this is for real guests to give in pages.
      if ((flags & O_DIRECT) === 0) assert.equal(client.read(nodeid, fh, 0, 4096).length, 4096);
    }
  });

  test('--export-support: the guest finds inodes by their nodeids', needsRoot, async () => {
    await using plain = await TestDaemon.start();
    assert.equal((plain.session().session?.flags ?? 0) & InitFlag.EXPORT_SUPPORT, 0);
    await using daemon = await TestDaemon.start(['--export-support']);
    const client = daemon.session();
    assert.ok((client.session?.flags ?? 0) & InitFlag.EXPORT_SUPPORT);
    const nodeid = file(daemon, client);
    client.forget(nodeid);
    fs.renameSync(join(daemon.share, 'file'), join(daemon.share, 'renamed'));
    assert.equal(client.lookup(nodeid, '.').nodeid, nodeid);
    await using without = await TestDaemon.start(['--export-support', '--inode-file-handles=never']);
    await without.until(() => /WARN {2}--export-support: without file handles/.test(without.log));
  });
});

describe('caching', () => {
  for (const [cache, timeout, open, opendir] of [
    ['auto', 1, 0, 0],
    ['always', DAY, OpenOutFlag.KEEP_CACHE, OpenOutFlag.CACHE_DIR | OpenOutFlag.KEEP_CACHE],
    ['never', 0, OpenOutFlag.DIRECT_IO, 0],
    ['metadata', DAY, OpenOutFlag.DIRECT_IO, OpenOutFlag.CACHE_DIR | OpenOutFlag.KEEP_CACHE],
  ] as const) {
    test(`--cache=${cache}`, async () => {
      await using daemon = await TestDaemon.start([`--cache=${cache}`]);
      const client = daemon.session();
      const nodeid = file(daemon, client);
      const entry = client.lookup(1, 'file');
      assert.deepEqual([entry.entryValid, entry.attrValid], [timeout, timeout]);
      assert.equal(client.getattr(nodeid).attrValid, timeout);
      assert.equal(client.setattr(nodeid, { mode: 0o600 }).attrValid, timeout);
      const made = client.create(1, 'made', O_RDWR);
      assert.deepEqual([made.entry.entryValid, made.entry.attrValid], [timeout, timeout]);
      assert.equal(made.open.openFlags, open);
      assert.equal(client.open(nodeid).openFlags, open);
      const directory = client.opendir(1);
      assert.equal(directory.openFlags, opendir);
      assert.deepEqual(
        client.readdirplus(1, directory.fh).flatMap(({ name, entry }) => (name === 'file' ? [entry?.entryValid, entry?.attrValid] : [])),
        [timeout, timeout],
      );
      // A name that is not there is never remembered: the host may make it at any time.
      assert.equal(
        errnoOf(() => client.lookup(1, 'none')),
        ENOENT,
      );
      const readdirplus = InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO;
      assert.equal((client.session?.flags ?? 0) & readdirplus, cache === 'never' ? 0 : readdirplus);
      const symlinks = (client.session?.flags ?? 0) & InitFlag.CACHE_SYMLINKS;
      assert.equal(symlinks, cache === 'never' ? 0 : InitFlag.CACHE_SYMLINKS);
    });
  }

  for (const [options, entryTimeout, attrTimeout, negativeTimeout] of [
    [['--entry-timeout=2.5'], 2.5, 1, undefined],
    [['--attr-timeout=0', '--cache=always'], DAY, 0, undefined],
    [['--negative-timeout=7.25', '--cache=never'], 0, 0, 7.25],
    [['--negative-timeout=0', '--entry-timeout=0.000000001', '--attr-timeout=2147483647'], 1e-9, 2147483647, undefined],
    [['-o', 'timeout=3'], 3, 3, undefined],
    // Until the guest is told of changes.
    [['--cache=notify', '--entry-timeout=30'], 30, 1, undefined],
  ] as const) {
    test(options.join(' '), async () => {
      await using daemon = await TestDaemon.start(options);
      const client = daemon.session();
      const nodeid = file(daemon, client);
      const entry = client.lookup(1, 'file');
      assert.deepEqual([entry.entryValid, entry.attrValid], [entryTimeout, attrTimeout]);
      assert.equal(client.getattr(nodeid).attrValid, attrTimeout);
      if (negativeTimeout === undefined) {
        assert.equal(
          errnoOf(() => client.lookup(1, 'none')),
          ENOENT,
        );
      } else {
        const none = client.lookup(1, 'none');
        assert.deepEqual([none.nodeid, none.entryValid], [0, negativeTimeout]);
      }
    });
  }

  test('--cache=notify: the timeouts given count also while the guest is told', async () => {
    for (const [options, expected] of [
      [[], [DAY, DAY, DAY]],
      [
        ['--entry-timeout=30', '--attr-timeout=20.5', '--negative-timeout=10'],
        [30, 20.5, 10],
      ],
    ] as const) {
      await using daemon = await TestDaemon.start(['--cache=notify', ...options]);
      const client = daemon.session({ flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY });
      file(daemon, client);
      client.submitReadNotify();
      const entry = client.lookup(1, 'file');
      assert.deepEqual([entry.entryValid, entry.attrValid, client.lookup(1, 'none').entryValid], expected);
    }
  });

  for (const [option, without, flag] of [
    ['--allow-mmap', 0, InitFlag2.DIRECT_IO_ALLOW_MMAP],
    ['--writeback', 0, InitFlag.WRITEBACK_CACHE],
    ['--no-readdirplus', InitFlag.DO_READDIRPLUS, InitFlag.DO_READDIRPLUS],
    ['--killpriv-v2', 0, InitFlag.HANDLE_KILLPRIV_V2],
  ] as const) {
    test(`${option}: negotiated when the guest can`, async () => {
      const second = option === '--allow-mmap';
      const flags = (client: FuseClient): number => ((second ? client.session?.flags2 : client.session?.flags) ?? 0) & flag;
      await using plain = await TestDaemon.start();
      assert.equal(flags(plain.session()), without);
      await using daemon = await TestDaemon.start([option]);
      const able = daemon.session();
      assert.equal(flags(able), flag & ~without);
      await daemon.disconnect(able);
      const unable = daemon.session(second ? { flags2: LINUX_INIT_FLAGS2 & ~flag } : { flags: LINUX_INIT_FLAGS & ~flag });
      assert.equal(flags(unable), 0);
      if (without === 0) assert.match(daemon.log, new RegExp(`WARN {2}${option} has no effect: the guest's kernel does not support it`));
    });
  }

  test('--writeback: a file open for writing can be read, as the guest fills its pages', async () => {
    for (const [options, readable] of [
      [[], false],
      [['--writeback'], true],
    ] as const) {
      await using daemon = await TestDaemon.start(options);
      const client = daemon.session();
      const nodeid = file(daemon, client);
      const { fh } = client.open(nodeid, O_WRONLY);
      assert.equal(errnoOf(() => client.read(nodeid, fh, 0, 5)) === 0, readable);
    }
  });
});

describe('attributes and identities', () => {
  test('--xattr, and without it', async () => {
    await using off = await TestDaemon.start();
    const without = off.session();
    const plain = file(off, without);
    for (const call of [
      () => without.getxattr(plain, 'user.x'),
      () => without.setxattr(plain, 'user.x', 'x'),
      () => without.listxattr(plain),
      () => without.removexattr(plain, 'user.x'),
    ])
      assert.equal(errnoOf(call), ENOSYS);
    await using on = await TestDaemon.start(['--xattr']);
    const client = on.session();
    const nodeid = file(on, client);
    client.setxattr(nodeid, 'user.x', 'value');
    assert.equal(hostAttribute(join(on.share, 'file'), 'user.x'), 'value');
    assert.deepEqual(client.listxattr(nodeid), ['user.x']);
    client.removexattr(nodeid, 'user.x');
    assert.equal(hostAttribute(join(on.share, 'file'), 'user.x'), undefined);
  });

  test('--xattrmap: names differ on both sides, and some are hidden', async () => {
    await using daemon = await TestDaemon.start([
      '--xattrmap=:prefix:all:trusted.:user.guest.::bad:all:user.secret:user.secret::ok:all:::',
    ]);
    const client = daemon.session();
    const nodeid = file(daemon, client);
    const path = join(daemon.share, 'file');
    client.setxattr(nodeid, 'trusted.x', 'mapped');
    client.setxattr(nodeid, 'user.y', 'as it is');
    assert.equal(hostAttribute(path, 'user.guest.trusted.x'), 'mapped');
    assert.equal(hostAttribute(path, 'user.y'), 'as it is');
    assert.equal(
      errnoOf(() => client.setxattr(nodeid, 'user.secret', 'x')),
      EPERM,
    );
    assert.equal(
      errnoOf(() => client.getxattr(nodeid, 'user.secret')),
      ENODATA,
    );
    assert.deepEqual(client.listxattr(nodeid).sort(), ['trusted.x', 'user.y']);
    assert.equal(client.getxattr(nodeid, 'trusted.x').toString(), 'mapped');
  });

  test('--posix-acl: never, auto, always', async () => {
    const wanted = InitFlag.POSIX_ACL | InitFlag.DONT_MASK | InitFlag.SETXATTR_EXT;
    const acl = Buffer.from('0200000001000600ffffffff02000400e803000004000400ffffffff10000400ffffffff20000400ffffffff', 'hex');
    const unable = { flags: LINUX_INIT_FLAGS & ~InitFlag.POSIX_ACL };
    for (const [options, able, other] of [
      [['--xattr'], 0, 0],
      [['--posix-acl=never', '--xattr'], 0, 0],
      [['--posix-acl=auto'], wanted, 0],
      [['--posix-acl'], wanted, EPROTO],
      [['--posix-acl=always'], wanted, EPROTO],
    ] as const) {
      await using daemon = await TestDaemon.start(options);
      const client = daemon.session();
      const nodeid = file(daemon, client);
      assert.equal((client.session?.flags ?? 0) & wanted, able);
      const path = join(daemon.share, 'file');
      const error = errnoOf(() => client.setxattr(nodeid, 'system.posix_acl_access', acl));
      assert.equal(error, able === 0 ? EOPNOTSUPP : 0);
      if (able !== 0) {
        assert.equal(hostAttribute(path, 'system.posix_acl_access'), acl.toString('latin1'));
        assert.deepEqual(client.listxattr(nodeid), ['system.posix_acl_access']);
        // The umask comes with the request now.
        assert.equal(client.mkdir(1, 'dir', 0o777, 0o027).attr.mode & 0o777, 0o750);
      }
      await daemon.disconnect(client);
      const old = daemon.connect();
      assert.equal(
        errnoOf(() => old.init(unable)),
        other,
      );
      if (other !== 0) assert.match(daemon.log, /WARN {2}--posix-acl=always: the guest's kernel does not support it, its mount is refused/);
    }
  });

  test('--security-label: never, auto, always', needsRoot, async () => {
    const unable = { flags2: LINUX_INIT_FLAGS2 & ~InitFlag2.SECURITY_CTX };
    for (const [options, able, other] of [
      [['--xattr'], 0, 0],
      // The kernel wants CAP_SYS_ADMIN for labels of no security module.
      [['--security-label=auto', '--modcaps=+sys_admin'], InitFlag2.SECURITY_CTX, 0],
      [['--security-label', '--modcaps=+sys_admin'], InitFlag2.SECURITY_CTX, EPROTO],
    ] as const) {
      await using daemon = await TestDaemon.start(options);
      const client = daemon.session();
      assert.equal((client.session?.flags2 ?? 0) & InitFlag2.SECURITY_CTX, able);
      client.extensions = securityContextExtension([{ name: 'security.label-of-test', value: Buffer.from('system_u:object_r:x') }]);
      const error = errnoOf(() => client.mkdir(1, 'labelled'));
      if (able !== 0) {
        assert.equal(error, 0);
        assert.equal(hostAttribute(join(daemon.share, 'labelled'), 'security.label-of-test'), 'system_u:object_r:x');
      }
      client.extensions = Buffer.alloc(0);
      await daemon.disconnect(client);
      const old = daemon.connect();
      assert.equal(
        errnoOf(() => old.init(unable)),
        other,
      );
    }
  });

  test('--killpriv-v2: set-user-id bits go with a truncation that says so', needsRoot, async () => {
    for (const [options, mode] of [
      [[], 0o6777],
      [['--killpriv-v2'], 0o777],
      [['--killpriv-v2', '--no-killpriv-v2'], 0o6777],
      [['--no-killpriv-v2', '--killpriv-v2'], 0o777],
    ] as const) {
      await using daemon = await TestDaemon.start(options);
      const client = daemon.session();
      const nodeid = file(daemon, client);
      const path = join(daemon.share, 'file');
      const { fh } = client.open(nodeid, O_RDWR);
      fs.chmodSync(path, 0o6777);
      client.write(nodeid, fh, 0, 'x', { writeFlags: WriteFlag.KILL_SUIDGID });
      // Linux says so with direct writes whatever was negotiated.
      assert.equal(fs.statSync(path).mode & 0o7777, 0o777);
      fs.chmodSync(path, 0o6777);
      client.setattr(nodeid, { size: 1, killSuidgid: true });
      assert.equal(fs.statSync(path).mode & 0o7777, mode, options.join(' '));
    }
  });

  test('--translate-uid and --translate-gid', needsRoot, async () => {
    const rules = ['--translate-uid=map:1000:2000:10', '--translate-uid=forbid-guest:5000:1', '--translate-uid=squash-host:9000:9:5'];
    await using daemon = await TestDaemon.start([...rules, '--translate-gid=guest:1000:3000:1', '--translate-gid=host:3000:4000:1']);
    const client = daemon.session();
    const made = client.as(1003, 1000, () => client.create(1, 'made', O_RDWR));
    const path = join(daemon.share, 'made');
    assert.deepEqual([made.entry.attr.uid, made.entry.attr.gid], [1003, 4000]);
    assert.deepEqual([fs.statSync(path).uid, fs.statSync(path).gid], [2003, 3000]);
    client.setattr(made.entry.nodeid, { uid: 1009 });
    assert.equal(fs.statSync(path).uid, 2009);
    assert.equal(
      errnoOf(() => client.setattr(made.entry.nodeid, { uid: 5000 })),
      EPERM,
    );
    assert.equal(
      errnoOf(() => client.as(5000, 0, () => client.mkdir(1, 'forbidden'))),
      EPERM,
    );
    fs.chownSync(path, 9004, 1234);
    const { attr } = client.getattr(made.entry.nodeid);
    assert.deepEqual([attr.uid, attr.gid], [9, 1234]);
  });
});

describe('connection', () => {
  test('--socket-group: who may connect', needsRoot, async () => {
    await using plain = await TestDaemon.start();
    assert.equal(fs.statSync(plain.socket).mode & 0o777, 0o600);
    const [name = 'daemon', , gid = '1'] = fs.readFileSync('/etc/group', 'utf8').split('\n')[1]?.split(':') ?? [];
    await using daemon = await TestDaemon.start([`--socket-group=${name}`]);
    const { mode, gid: group } = fs.statSync(daemon.socket);
    assert.deepEqual([mode & 0o777, group], [0o660, Number(gid)]);
  });

  test('--fd: serves one client on an inherited socket and ends with status 0', async () => {
    const path = join(folder, 'inherited.sock');
    const fd = native.unixListen(cString(path), 1);
    await using daemon = await TestDaemon.start([], { listen: ['--fd=3'], inherit: [fd] });
    const { FuseClient } = await import('../support/fuse-client.js');
    const client = FuseClient.connect(path, { features: ~features(0) });
    client.init();
    assert.equal(client.getattr(1).attr.ino, fs.statSync(daemon.share, { bigint: true }).ino);
    client.close();
    assert.deepEqual(await daemon.ended, { status: 0, signal: null });
    assert.ok(fs.existsSync(path), "the socket's file is not the daemon's");
    native.close(fd);
  });

  test('--fd: a pid file that libvirt has locked stays locked', async () => {
    const [socket, pidFile] = [join(folder, 'libvirt.sock'), join(folder, 'pid')];
    const fd = native.unixListen(cString(socket), 1);
    // What virCommand does: the lock is taken after the fork and goes through the exec.
    const lock =
      'import fcntl,os,sys; fd=os.open(sys.argv[1],os.O_RDWR|os.O_CREAT); fcntl.lockf(fd,fcntl.LOCK_EX); os.set_inheritable(fd,True); os.execv(sys.argv[2],sys.argv[2:])';
    await using daemon = await TestDaemon.start(['-o', 'xattr'], {
      listen: ['--fd=3'],
      inherit: [fd],
      wrapper: ['python3', '-c', lock, pidFile],
    });
    await daemon.until(() => daemon.log.includes('sharing'));
    const { ino } = fs.statSync(pidFile);
    const holders = (): string[] =>
      fs
        .readFileSync('/proc/locks', 'utf8')
        .split('\n')
        .filter((line) => line.includes(`:${ino} `));
    assert.match(holders().join('\n'), new RegExp(`POSIX +ADVISORY +WRITE ${daemon.pid} `));
    const { FuseClient } = await import('../support/fuse-client.js');
    const client = FuseClient.connect(socket, { features: ~features(0) });
    client.init();
    client.list(1);
    assert.equal(holders().length, 1);
    client.close();
    await daemon.ended;
    assert.equal(holders().length, 0);
    native.close(fd);
  });
});

describe('running', () => {
  test('--rlimit-nofile', needsRoot, async () => {
    const limit = (daemon: TestDaemon): number => Number(/^Max open files\s+(\d+)/m.exec(daemon.proc('limits'))?.[1]);
    const ours = Number(/^Max open files\s+(\d+)/m.exec(fs.readFileSync('/proc/self/limits', 'utf8'))?.[1]);
    await using left = await TestDaemon.start(['--rlimit-nofile=0']);
    await left.until(() => left.log.includes('sharing'));
    assert.equal(limit(left), ours);
    await using set = await TestDaemon.start(['--rlimit-nofile=700', '--inode-file-handles=never']);
    await set.until(() => set.log.includes('sharing'));
    assert.equal(limit(set), 700);
    const client = set.session();
    for (let i = 0; i < 1000; i++) fs.writeFileSync(join(set.share, `f${i}`), '');
    const failed = Array.from({ length: 1000 }, (_, i) => errnoOf(() => client.lookup(1, `f${i}`))).filter((error) => error !== 0);
    assert.ok(failed.length > 300 && failed.every((error) => error === constants.errno.ENFILE), 'a full table is an error of the request');
    assert.equal(
      errnoOf(() => client.getattr(1)),
      0,
    );
    await set.disconnect(client);
    set.session().lookup(1, 'f999');
  });

  test('--thread-pool-size', async () => {
    for (const [size, most] of [
      [0, 0],
      [1, 1],
      [3, 3],
    ] as const) {
      await using daemon = await TestDaemon.start([`--thread-pool-size=${size}`]);
      const client = daemon.session();
      const before = daemon.threads;
      const nodeid = file(daemon, client);
      const { fh } = client.open(nodeid, O_RDWR);
      const pending = Array.from({ length: 20 }, () => submitFsync(client, nodeid, fh));
      for (const one of pending) assert.equal(client.wait(one).error, 0);
      // Whatever can be a job.
      const other = client.create(1, 'other', O_RDWR);
      assert.equal(client.write(nodeid, fh, 0, Buffer.alloc(300_000, 1)), 300_000);
      client.fsync(nodeid, fh);
      spawnSync('dd', ['if=/dev/null', `of=${join(daemon.share, 'file')}`, 'oflag=nocache', 'conv=notrunc', 'status=none']);
      assert.equal(client.read(nodeid, fh, 0, 100_000).length, 100_000);
      client.fallocate(nodeid, fh, 0, 400_000);
      assert.equal(
        client.copyFileRange({ nodeid, fh, offset: 0 }, { nodeid: other.entry.nodeid, fh: other.open.fh, offset: 0 }, 100_000),
        100_000,
      );
      const started = daemon.threads - before;
      assert.ok(started <= most && (most === 0 || started > 0), `${started} threads with --thread-pool-size=${size}`);
    }
  });

  test('--busy-poll', async () => {
    for (const microseconds of [1_000_000, 0]) {
      await using daemon = await TestDaemon.start([`--busy-poll=${microseconds}`]);
      const client = daemon.session();
      const queue = client.driver.queues[1];
      assert.ok(queue);
      const { kicks, kicksSaved } = queue;
      // It sleeps at once and has to be kicked, or still looks after some time: as soon as it has the processor.
      const isSeen = () => (microseconds === 0 ? queue.kicks > kicks : queue.kicksSaved > kicksSaved);
      for (const end = performance.now() + 60_000; !isSeen() && performance.now() < end; ) {
        client.getattr(1);
        await sleep(20);
      }
      assert.ok(isSeen(), `${queue.kicks - kicks} kicks, ${queue.kicksSaved - kicksSaved} saved`);
    }
  });

  test('--log-level', async () => {
    const seen: Record<string, string[]> = {};
    for (const level of ['off', 'error', 'warn', 'info', 'debug', 'trace']) {
      await using daemon = await TestDaemon.start([`--log-level=${level}`, '--writeback']);
      const client = daemon.session({ flags: LINUX_INIT_FLAGS & ~InitFlag.WRITEBACK_CACHE });
      client.getattr(1);
      await daemon.stop();
      seen[level] = [...new Set(daemon.lines.map((line) => line.split(/ +/)[1] as string))].sort();
    }
    assert.deepEqual(seen, {
      off: [],
      error: [],
      warn: ['WARN'],
      info: ['INFO', 'WARN'],
      debug: ['DEBUG', 'INFO', 'WARN'],
      trace: ['DEBUG', 'INFO', 'TRACE', 'WARN'],
    });
  });

  test('--log-format=json: each line is an object, from outside and inside the sandbox', async () => {
    await using daemon = await TestDaemon.start(['--log-format=json', '--log-level=debug', '-f']);
    daemon.close(daemon.session());
    await daemon.until(() => daemon.log.includes('the client is gone'));
    await daemon.stop();
    const records = daemon.lines.map((line) => JSON.parse(line) as Record<string, unknown>);
    for (const { time, level, pid, msg } of records) {
      assert.ok(Math.abs(Date.parse(time as string) - Date.now()) < 60_000);
      assert.ok(['debug', 'info', 'warn'].includes(level as string));
      assert.equal(pid, daemon.pid, 'the pid that the host knows');
      assert.equal(typeof msg, 'string');
    }
    assert.ok(records.some(({ level, msg }) => level === 'warn' && msg === '-f is deprecated: leave it out, it has no effect'));
    const sharing = records.find(({ msg }) => msg === `sharing ${daemon.share}`);
    assert.equal(sharing?.['socket'], daemon.socket);
    const { status, stderr } = runDaemon([`--shared-dir=${folder}`, '--fd=77', '--log-format=json']);
    assert.equal(status, 1);
    assert.equal(JSON.parse(stderr).msg, '--fd=77 is not open: pass a listening Unix socket');
  });

  test('--syslog', needsRoot, async () => {
    const receiver = spawn(
      'python3',
      [
        '-uc',
        'import socket,sys; s=socket.socket(socket.AF_UNIX,socket.SOCK_DGRAM); s.bind(sys.argv[1]); print("ready")\nwhile True: print(s.recv(9999).decode())',
        join(folder, 'syslog'),
      ],
      { stdio: ['ignore', 'pipe', 'inherit'], cwd: '/' },
    );
    let text = '';
    receiver.stdout.setEncoding('utf8').on('data', (part) => {
      text += part;
    });
    try {
      await once(receiver.stdout, 'data');
      // A /dev of its own with nothing but what node needs, and our socket as /dev/log.
      const dev =
        'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9 && ln -s "$0" /dev/log && exec "$@"';
      await using daemon = await TestDaemon.start(['--syslog', '--log-level=debug'], {
        wrapper: ['unshare', '-m', 'sh', '-c', dev, join(folder, 'syslog')],
      });
      daemon.close(daemon.session());
      await daemon.until(() => text.includes('the client is gone'));
      assert.equal(daemon.log, '');
      const lines = text.split('\n').slice(1, -1);
      for (const line of lines) assert.match(line, new RegExp(`^<\\d+>virtiofsd-ts\\[${daemon.pid}\\]: \\S`));
      assert.ok(lines.some((line) => line.startsWith('<14>') && line.includes(`sharing ${daemon.share}`)));
      assert.ok(lines.some((line) => line.startsWith('<15>')));
    } finally {
      receiver.kill();
    }
    const { status, stderr } = runDaemonIn('umount -l /dev 2>/dev/null; mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3');
    assert.equal(status, 1);
    assert.match(stderr, /ERROR --syslog: no system log listens at \/dev\/log: start one or leave the option out\n$/);
  });

  test('--print-capabilities, --version, --help', () => {
    const { status, stdout, stderr } = runDaemon(['--print-capabilities']);
    assert.deepEqual([status, stderr], [0, '']);
    assert.deepEqual(JSON.parse(stdout), {
      type: 'fs',
      features: ['migrate-precopy', 'posix-acl-negotiation-mode', 'security-label-negotiation-mode', 'separate-options'],
    });
    assert.match(runDaemon(['--version']).stdout, /^virtiofsd-ts \d+\.\d+\.\d+\n$/);
    const help = runDaemon(['--help']);
    assert.equal(help.status, 0);
    for (const { name } of OPTIONS) assert.match(help.stdout, new RegExp(`(^|\\s)--?${name}\\b`), name);
  });
});

describe('the old form', () => {
  test('-o source=…,cache=…,xattr…', async () => {
    const share = join(folder, 'with, comma');
    fs.mkdirSync(share);
    await using daemon = await TestDaemon.start([
      '-o',
      `source=${share.replaceAll(',', ',,')},cache=none,xattr,no_posix_lock`,
      '-o',
      'writeback',
      '-f',
    ]);
    const client = daemon.session();
    fs.writeFileSync(join(share, 'file'), 'from there');
    const entry = client.lookup(1, 'file');
    assert.deepEqual([entry.entryValid, entry.attrValid], [0, 0]);
    client.setxattr(entry.nodeid, 'user.x', 'x');
    assert.ok((client.session?.flags ?? 0) & InitFlag.WRITEBACK_CACHE);
    assert.equal(daemon.lines.filter((line) => /WARN .*deprecated/.test(line)).length, 2);
  });

  test('-d, -o loglevel=', async () => {
    await using daemon = await TestDaemon.start(['-d']);
    daemon.session();
    assert.match(daemon.log, /DEBUG/);
    await using quiet = await TestDaemon.start(['-o', 'loglevel=err']);
    quiet.session();
    assert.equal(quiet.log, '');
  });
});

/** Runs the program with --syslog after `prepare` in a mount namespace of its own. */
function runDaemonIn(prepare: string): { status: number | null; stderr: string } {
  const program = process.env['DAEMON'] ?? join(import.meta.dirname, '../../../virtiofsd-ts');
  return spawnSync(
    'unshare',
    ['-m', 'sh', '-c', `${prepare}; exec "$0" "$@"`, program, '--shared-dir=/usr', `--socket-path=${folder}/none.sock`, '--syslog'],
    { encoding: 'utf8', timeout: 20_000, cwd: '/' },
  );
}

describe('refused', () => {
  const socket = join(folder, 'refused.sock');
  const afile = join(folder, 'a-file');
  fs.writeFileSync(afile, 'kept');
  const base = ['--shared-dir=/usr', `--socket-path=${socket}`];

  const wrongUse: readonly (readonly [args: string[], line: string])[] = [
    [[], 'no directory to share: give --shared-dir=DIR'],
    [['--shared-dir=/usr'], 'no socket to listen on: give --socket-path=PATH or --fd=FD'],
    [[...base, '--frobnicate'], 'unknown option --frobnicate: see --help'],
    [[...base, '--shared-dirs=/x'], 'unknown option --shared-dirs: did you mean --shared-dir?'],
    [[...base, 'extra'], "unexpected argument 'extra': every option starts with --, see --help"],
    [[...base, '--modcaps=sys_admin'], "--modcaps: 'sys_admin' has neither + nor -: give for example +sys_admin:-chown"],
    [[...base, '--uid-map=0:1:1'], '--uid-map: 0:1:1 is no map: give :INSIDE:OUTSIDE:COUNT:'],
    [[...base, '-o', 'nonsense'], '-o nonsense is not known: use the separate options, see --help'],
    [[...base, '--log-level=loud'], '--log-level=loud is not known: give one of error, warn, info, debug, trace, off'],
    [[...base, '--fd=3'], '--fd and --socket-path exclude each other: give one of them'],
    [
      ['--shared-dir=/usr', '--fd=3', '--socket-group=root'],
      '--socket-group is for --socket-path: the socket of --fd has its owner already',
    ],
    [
      [...base, '--posix-acl', '--translate-uid=map:0:1:1'],
      '--translate-uid and --translate-gid would break access control lists: leave out --posix-acl=always',
    ],
    [[...base, '--thread-pool-size=-1'], '--thread-pool-size=-1 is no number from 0 to 1024'],
    [[...base, '--fd'], '--fd needs a value: --fd FD'],
    [[...base, '--readonly=yes'], '--readonly takes no value: give it alone'],
    [[...base, '--tag='], '--tag has 0 bytes: it must have 1 to 36'],
    [[`--socket-path=${socket}`, '--shared-dir=/no/such'], '--shared-dir: /no/such does not exist: name an existing directory'],
    [[`--socket-path=${socket}`, `--shared-dir=${afile}`], `--shared-dir: ${afile} is not a directory: name one`],
    [
      [`--socket-path=${socket}`, '--shared-dir=/no\nsuch\u001b[31m'],
      '--shared-dir: /no\\nsuch\\x1b[31m does not exist: name an existing directory',
    ],
    [['--shared-dir=/usr', '--socket-path=/no/such/x.sock'], '--socket-path: /no/such does not exist: name an existing directory'],
    [['--shared-dir=/usr', `--socket-path=/tmp/${'x'.repeat(120)}`], '--socket-path has 125 bytes: the path of a socket has at most 107'],
    [[...base, '--xattrmap=bad'], "--xattrmap: rule 1: 'bad' has not 4 fields that each end in 'b'"],
    [[...base, '--translate-uid=map:1:2'], '--translate-uid: map:1:2: map takes 3 numbers, not 2'],
    [
      [...base, '--translate-gid=map:0:1:2', '--translate-gid=guest:1:5:1'],
      '--translate-gid: guest:1:5:1: meets another rule for the same guest ids',
    ],
    [[...base, '--metrics=nowhere'], '--metrics=nowhere is no address: give unix:PATH or HOST:PORT'],
    [[...base, `--socket=${socket}`], '--socket is the old name of --socket-path: give only --socket-path'],
  ];
  test('wrong use ends with one line that says what to do, and status 2', () => {
    for (const [args, line] of wrongUse) {
      const { status, stdout, stderr } = runDaemon(args);
      assert.deepEqual({ status, stdout, stderr }, { status: 2, stdout: '', stderr: `virtiofsd-ts: ${line}\n` }, args.join(' '));
    }
    assert.ok(!fs.existsSync(socket));
  });

  test('what shows only at the start ends with one line and status 1, and leaves no socket', () => {
    const failures: readonly (readonly [args: string[], line: string])[] = [
      [[...base, '--socket-group=no-such-group'], '--socket-group=no-such-group: there is no such group'],
      [['--shared-dir=/usr', '--fd=99'], '--fd=99 is not open: pass a listening Unix socket'],
      [['--shared-dir=/usr', '--fd=0'], '--fd=0 is not a socket: pass a listening Unix socket'],
      [[...base, `--metrics=unix:${afile}`], `metrics cannot be served at unix:${afile}: it is in use already`],
      ...(root
        ? [
            [
              [...base, '--rlimit-nofile=99999999999'],
              /^--rlimit-nofile=99999999999: only \d+ are allowed here: choose a smaller limit$/,
            ] as never,
          ]
        : []),
    ];
    for (const [args, line] of failures) {
      const { status, stdout, stderr } = runDaemon(args);
      assert.deepEqual([status, stdout], [1, ''], args.join(' '));
      const [, said = ''] = /^\S+Z ERROR (.*)\n$/.exec(stderr) ?? [];
      if (typeof line === 'string') assert.equal(said, line);
      else assert.match(said, line);
      assert.ok(!fs.existsSync(socket), args.join(' '));
    }
    assert.equal(fs.readFileSync(afile, 'utf8'), 'kept');
  });
});
