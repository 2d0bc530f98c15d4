/** The daemon at work in each sandbox, and what it costs; ordinary users; what is said when a host permits none. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { Feature, features } from 'vhost-user-ts';
import { FsnotifyRecord, InitFlag2 } from '../../src/fuse/abi.js';
import { insideOf, mapText, ownMap, parseRange } from '../../src/idranges.js';
import { FS_CREATE, FS_DELETE, FS_EVENT_ON_CHILD, FS_ISDIR, FS_MODIFY, maskText } from '../../src/watch/mask.js';
import { needsRoot, PROGRAM_PATH, root, scrape, TestDaemon } from '../support/daemon.js';
import { errnoOf, type FuseClient, LINUX_INIT_FLAGS2 } from '../support/fuse-client.js';

const { EACCES, EINVAL } = constants.errno;
const { O_RDWR } = fs.constants;
const WATCH = FS_CREATE | FS_DELETE | FS_MODIFY | FS_EVENT_ON_CHILD | FS_ISDIR;
const WITH_QUEUE = features(0, Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.PROTOCOL_FEATURES);
const USER = 1234;

/** Starts the daemon as an ordinary user whose folder it is. */
const asUser = [
  'sh',
  '-c',
  `chown -R ${USER}:${USER} "$0" && exec setpriv --reuid ${USER} --regid ${USER} --clear-groups "$@"`,
  '{folder}',
];

/** A session that has file events. */
function session(daemon: TestDaemon): FuseClient {
  const client = daemon.connect({ features: WITH_QUEUE, queues: 3 });
  client.init({ flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY });
  return client;
}

/** A little of everything that a guest does, with what the host then has. */
function work(client: FuseClient, share: string): void {
  const { entry, open } = client.create(1, 'file', O_RDWR, 0o640);
  assert.equal(client.write(entry.nodeid, open.fh, 0, 'hello'), 5);
  client.fsync(entry.nodeid, open.fh);
  assert.equal(client.read(entry.nodeid, open.fh, 0, 100).toString(), 'hello');
  client.setxattr(entry.nodeid, 'user.colour', Buffer.from('red'));
  assert.equal(client.getxattr(entry.nodeid, 'user.colour', 100).toString(), 'red');
  client.release(entry.nodeid, open.fh);
  const directory = client.mkdir(1, 'directory').nodeid;
  client.rename(1, 'file', directory, 'moved');
  client.symlink(1, 'link', '/etc/passwd');
  assert.deepEqual(
    client
      .list(1)
      .map(({ name }) => String(name))
      .filter((name) => !name.startsWith('.'))
      .sort(),
    ['directory', 'link'],
  );
  assert.equal(fs.readFileSync(join(share, 'directory/moved'), 'utf8'), 'hello');
  assert.equal(fs.statSync(join(share, 'directory/moved')).mode & 0o777, 0o640);
}

/** A change by another process reaches the guest; one of the guest's own does not. */
function events(client: FuseClient, share: string): void {
  client.lendNotificationBuffers(8);
  client.fsnotify(1, WATCH);
  client.mkdir(1, 'own');
  execFileSync('sh', ['-c', 'echo 1 > foreign; rm foreign'], { cwd: share });
  const got: string[] = [];
  for (const end = performance.now() + 5000; got.length < 3 && performance.now() < end; ) {
    for (const { body } of client.takeNotifications(200)) {
      for (let at = 0; at + FsnotifyRecord.name <= body.length; at += body.readUInt32LE(at + FsnotifyRecord.reclen)) {
        const name = body.toString(
          'utf8',
          at + FsnotifyRecord.name,
          at + FsnotifyRecord.name + body.readUInt32LE(at + FsnotifyRecord.namelen),
        );
        got.push(`${maskText(body.readUInt32LE(at + FsnotifyRecord.mask))} ${name}`);
      }
    }
  }
  assert.deepEqual(got, ['CREATE foreign', 'MODIFY,ON_CHILD foreign', 'DELETE foreign']);
}

const lines: string[] = [];
after(() => console.log(lines.join('\n')));

/** Median time until the socket takes connections and until a guest's first request is answered; memory. */
async function measure(name: string, options: string[]): Promise<void> {
  const ready: number[] = [];
  const first: number[] = [];
  let memory = '';
  for (let i = 0; i < 5; i++) {
    const began = performance.now();
    await using daemon = await TestDaemon.start(options);
    ready.push(daemon.ready);
    const client = daemon.session();
    first.push(performance.now() - began);
    const launchers = daemon.launchers.map((pid) => Number(/^VmRSS:\s+(\d+)/m.exec(fs.readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]));
    memory = `${(daemon.memory / 2 ** 20).toFixed(1)} MiB, launcher ${launchers.map((kib) => `${kib} KiB`).join(' + ') || 'none'}`;
    await daemon.disconnect(client);
  }
  const median = (values: number[]) => (values.sort((a, b) => a - b)[2] as number).toFixed(0);
  lines.push(`${name}: socket after ${median(ready)} ms, first answer after ${median(first)} ms, ${memory}`);
}

describe('each sandbox', () => {
  for (const [options, skip] of [
    [['--sandbox=namespace', '--seccomp=kill'], false],
    [['--sandbox=namespace', '--seccomp=trap', '--inode-file-handles=never'], false],
    [['--sandbox=namespace', '--seccomp=none', '--fsnotify=inotify'], false],
    [['--sandbox=chroot', '--seccomp=kill'], !root],
    [['--sandbox=chroot', '--seccomp=none', '--fsnotify=inotify'], !root],
    [['--sandbox=none', '--seccomp=kill'], false],
    [['--sandbox=none', '--seccomp=none'], false],
  ] as const) {
    test(options.join(' '), { skip: skip && 'needs root' }, async () => {
      await using daemon = await TestDaemon.start([...options, '--xattr', '--metrics=unix:{folder}/metrics']);
      const client = session(daemon);
      work(client, daemon.share);
      events(client, daemon.share);
      const metrics = await scrape({ socketPath: join(daemon.folder, 'metrics') });
      assert.equal(metrics.get('virtiofsd_connected'), 1);
      const status = daemon.proc('status');
      assert.match(
        status,
        new RegExp(`^Seccomp:\\s+${options[1] === '--seccomp=none' && options[0] !== '--sandbox=chroot' ? 0 : 2}$`, 'm'),
      );
      if (options[1] !== '--seccomp=none' || options[0] !== '--sandbox=none') assert.match(status, /^NoNewPrivs:\s+1$/m);
      daemon.process.kill('SIGUSR1');
      await daemon.until(() => daemon.log.includes('log level is now debug'));
      await daemon.stop();
      assert.ok(!fs.existsSync(daemon.socket) && !fs.existsSync(join(daemon.folder, 'metrics')), 'sockets are removed');
    });
  }

  test('start and memory', async () => {
    await measure('--sandbox=none --seccomp=none', ['--sandbox=none', '--seccomp=none']);
    await measure('--sandbox=namespace', []);
    if (root) await measure('--sandbox=chroot', ['--sandbox=chroot']);
  });

  test('nothing is left when the process that is known is killed', async () => {
    await using daemon = await TestDaemon.start([], { status: 0 });
    daemon.session();
    const inside = daemon.inside;
    daemon.process.kill('SIGKILL');
    await daemon.until(() => !fs.existsSync(`/proc/${inside}`));
    assert.deepEqual(await daemon.ended, { status: null, signal: 'SIGKILL' });
    daemon.end = { status: 0, signal: null };
  });

  test('capabilities: the usual ones, --modcaps', needsRoot, async () => {
    for (const [options, mask] of [
      [[], '00000000880000df'],
      [['--inode-file-handles=never'], '00000000880000db'],
      [['--modcaps=+sys_admin:-mknod'], '00000000802000df'],
    ] as const) {
      await using daemon = await TestDaemon.start(options);
      daemon.session();
      for (const set of ['CapPrm', 'CapEff', 'CapBnd']) assert.match(daemon.proc('status'), new RegExp(`^${set}:\\s+${mask}$`, 'm'));
      for (const set of ['CapInh', 'CapAmb']) assert.match(daemon.proc('status'), new RegExp(`^${set}:\\s+0+$`, 'm'));
    }
  });

  test('--readonly: the share is mounted so, too', needsRoot, async () => {
    await using daemon = await TestDaemon.start(['--readonly']);
    daemon.session();
    assert.match(daemon.proc('mountinfo'), / \/\.share ro,nosuid,nodev/);
  });

  test('mounts of the host below the share are there', needsRoot, async () => {
    const wrapper = [
      'unshare',
      '-m',
      'sh',
      '-c',
      'mkdir "$0/share/sub" && mount -t tmpfs none "$0/share/sub" && echo in > "$0/share/sub/file" && exec "$@"',
      '{folder}',
    ];
    await using daemon = await TestDaemon.start([], { wrapper });
    const client = daemon.session();
    assert.equal(client.lookup(client.lookup(1, 'sub').nodeid, 'file').attr.size, 3);
  });
});

describe('an ordinary user', () => {
  for (const options of [[], ['--fsnotify=inotify'], ['--sandbox=none'], ['--sandbox=none', '--seccomp=none']]) {
    test(`shares a directory, with events: ${options.join(' ') || 'defaults'}`, needsRoot, async () => {
      await using daemon = await TestDaemon.start(['--xattr', ...options], { wrapper: asUser });
      const client = session(daemon);
      work(client, daemon.share);
      events(client, daemon.share);
      const { uid, gid } = fs.statSync(join(daemon.share, 'directory'));
      assert.deepEqual([uid, gid], [USER, USER]);
      // What the user may not read, the guest may not either.
      fs.writeFileSync(join(daemon.share, 'secret'), 'x', { mode: 0o600 });
      const secret = client.lookup(1, 'secret');
      assert.equal(
        errnoOf(() => client.open(secret.nodeid)),
        EACCES,
      );
      assert.match(daemon.proc('status'), new RegExp(`^Uid:(\\s+${USER}){4}$`, 'm'));
    });
  }

  test('--uid-map and --gid-map of the own ids', needsRoot, async () => {
    const maps = [`--uid-map=:0:${USER}:1:`, `--gid-map=/0/${USER}/1/`];
    await using daemon = await TestDaemon.start(maps, { wrapper: asUser });
    const client = daemon.session();
    // The guest's root is the user, and sees the user's files as its own.
    assert.equal(client.mkdir(1, 'made').attr.uid, 0);
    assert.equal(fs.statSync(join(daemon.share, 'made')).uid, USER);
    client.caller = { uid: 5, gid: 5, pid: 1 };
    assert.equal(
      errnoOf(() => client.mkdir(1, 'nobody')),
      EINVAL,
    );
  });

  const helpers = spawnSync('newuidmap').error === undefined;
  test('subordinate ids, by newuidmap', { skip: !root ? 'needs root' : !helpers && 'newuidmap is not installed' }, async () => {
    // A name and ranges for this user in a mount namespace of its own: /etc of the host stays as it is.
    const etc = [
      `cp /etc/passwd /etc/group "$0" && echo "guestuser:x:${USER}:${USER}::/:/bin/sh" >> "$0/passwd" && echo "guestuser:x:${USER}:" >> "$0/group"`,
      'echo "guestuser:700000:65536" > "$0/subid" && for f in passwd group; do mount --bind "$0/$f" /etc/$f; done',
      'touch /etc/subuid /etc/subgid && mount --bind "$0/subid" /etc/subuid && mount --bind "$0/subid" /etc/subgid',
    ].join(' && ');
    const wrapper = ['unshare', '-m', 'sh', '-c', `${etc} && exec "$@"`, '{folder}', ...asUser];
    await using daemon = await TestDaemon.start(['--xattr'], { wrapper });
    const client = session(daemon);
    work(client, daemon.share);
    events(client, daemon.share);
    // The user's own id is the same in the guest; others are the user's subordinate ids.
    for (const [uid, outside] of [
      [USER, USER],
      [33, 700_033],
      [5000, 704_999],
    ] as const) {
      client.setattr(1, { mode: 0o777 });
      client.caller = { uid, gid: uid, pid: 1 };
      const made = client.mkdir(1, `by-${uid}`);
      assert.deepEqual([made.attr.uid, made.attr.gid], [uid, uid]);
      const { uid: hostUid, gid: hostGid } = fs.statSync(join(daemon.share, `by-${uid}`));
      assert.deepEqual([hostUid, hostGid], [outside, outside]);
    }
  });

  test('chroot is refused', needsRoot, () => {
    const end = spawnSync(
      'setpriv',
      [
        ...['--reuid', String(USER), '--regid', String(USER), '--clear-groups', PROGRAM_PATH],
        ...['--shared-dir=/usr', '--socket-path=/tmp/none.sock', '--sandbox=chroot'],
      ],
      { encoding: 'utf8', cwd: '/' },
    );
    assert.equal(end.status, 2);
    assert.equal(end.stderr, 'virtiofsd-ts: --sandbox=chroot is for root: use --sandbox=namespace, which needs no privileges, or none\n');
  });
});

describe('a host that forbids', () => {
  test('namespaces: one line that says what to do, and the socket is gone', needsRoot, () => {
    const run = (drop: string[]) => {
      const folder = fs.mkdtempSync('/tmp/forbids-');
      fs.chmodSync(folder, 0o777);
      const { status, stderr } = spawnSync('setpriv', [...drop, PROGRAM_PATH, '--shared-dir=/usr', `--socket-path=${folder}/fs.sock`], {
        encoding: 'utf8',
        cwd: '/',
      });
      assert.ok(!fs.existsSync(`${folder}/fs.sock`));
      fs.rmSync(folder, { recursive: true });
      return { status, stderr };
    };
    assert.deepEqual(run(['--bounding-set', '-sys_admin', '--inh-caps', '-sys_admin']), {
      status: 1,
      stderr:
        'virtiofsd-ts: --sandbox=namespace: no namespaces without CAP_SYS_ADMIN (Operation not permitted): grant it to the container, or use --sandbox=chroot or none\n',
    });
    // Enough for the kernel to refuse a user namespace: a root directory that is not the file system's.
    const chrooted = spawnSync(
      'unshare',
      [
        '-U',
        '--map-root-user',
        'sh',
        '-c',
        'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"',
        'sh',
        PROGRAM_PATH,
        '--shared-dir=/usr',
        '--socket-path=/tmp/forbids.sock',
        '--uid-map=:0:0:1:',
        '--gid-map=:0:0:1:',
      ],
      { encoding: 'utf8', cwd: '/' },
    );
    assert.equal(chrooted.status, 1);
    assert.match(
      chrooted.stderr,
      /^virtiofsd-ts: --sandbox=namespace: this host permits no user namespaces \(.*\): start as root, allow them .*or use --sandbox=none\n$/,
    );
    assert.ok(!fs.existsSync('/tmp/forbids.sock'));
  });
});

describe('maps of ids', () => {
  test('any delimiter', () => {
    assert.deepEqual(parseRange(':0:1000:5:'), { inside: 0, outside: 1000, count: 5 });
    assert.deepEqual(parseRange('/1/2/3/'), { inside: 1, outside: 2, count: 3 });
    for (const wrong of ['', ':', '0:1:2', ':0:1:', ':0:1:2', ':0:1:2:3:', ':a:1:2:', ':-1:1:2:', '1011121', ':0:1:0:', ':4294967295:0:1:'])
      assert.throws(() => parseRange(wrong), wrong);
  });

  test("the own id stays, others are the user's subordinate ids in order", () => {
    assert.deepEqual(ownMap(1000, undefined), [{ inside: 1000, outside: 1000, count: 1 }]);
    const map = ownMap(1000, { start: 100_000, count: 65_536 });
    assert.equal(mapText(map), '0 100000 1000\n1000 1000 1\n1001 101000 64536\n');
    assert.deepEqual([insideOf(map, 1000), insideOf(map, 100_005), insideOf(map, 101_000), insideOf(map, 5)], [1000, 5, 1001, undefined]);
    assert.equal(mapText(ownMap(70_000, { start: 100_000, count: 10 })), '0 100000 10\n70000 70000 1\n');
  });
});
