/** Disks of the host that fail, fill up or have quotas: ext4 on device mapper. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { TestDaemon } from '../support/daemon.js';
import { errnoOf, type FuseClient } from '../support/fuse-client.js';
import { assertServes } from '../support/hostile.js';
import { Disk, eventSession, makesEvent, watch } from '../support/virtual-host.js';

const { EDQUOT, EIO, ENOSPC, EROFS } = constants.errno;
const { O_RDONLY, O_RDWR } = fs.constants;

function folder(): string {
  return fs.mkdtempSync(join(tmpdir(), 'disks-'));
}

/** Writes 64 KiB at a time until that fails. @returns how many bytes could be written, and the errno */
function fill(client: FuseClient, nodeid: number, fh: number, most = 64 << 20): { bytes: number; errno: number } {
  for (let bytes = 0; bytes < most; ) {
    let wrote = 0;
    const errno = errnoOf(() => {
      wrote = client.write(nodeid, fh, bytes, Buffer.alloc(65_536, bytes >> 16));
    });
    if (errno !== 0) return { bytes, errno };
    bytes += wrote;
  }
  assert.fail(`${most} bytes could be written`);
}

test('a disk below the share that fails: EIO for its files, all else goes on, and it serves again', async () => {
  const image = join(folder(), 'image');
  using disk = new Disk(image, 'failing');
  const share = folder();
  fs.chmodSync(share, 0o755);
  disk.mount(join(share, 'disk'));
  const content = Buffer.alloc(1 << 20, 'content');
  for (const name of ['kept', 'other']) fs.writeFileSync(join(share, 'disk', name), content);
  fs.writeFileSync(join(share, 'file'), 'text');
  execFileSync('sync');
  await using daemon = await TestDaemon.start([], { share });
  const client = eventSession(daemon);
  watch(client, 1);
  const file = client.lookup(1, 'file').nodeid;
  const fileFh = client.open(file, O_RDWR).fh;
  let events = 0;
  const elsewhere = () => {
    assert.equal(client.read(file, fileFh, 0, 10).toString(), 'text');
    assert.equal(client.write(file, fileFh, 0, 'text'), 4);
    client.fsync(file, fileFh);
    makesEvent(client, share, `event-${events++}`);
    assertServes(client, [0]);
  };
  /** What the guest knows of the disk, and how often it was told of it. */
  const known = new Map<number, number>();
  const opened: { nodeid: number; fh: number }[] = [];
  const met = ({ nodeid }: { nodeid: number }) => {
    known.set(nodeid, (known.get(nodeid) ?? 0) + 1);
    return nodeid;
  };
  const open = (name: string, flags = O_RDWR) => {
    const nodeid = met(client.lookup(met(client.lookup(1, 'disk')), name));
    const one = { nodeid, fh: client.open(nodeid, flags).fh };
    opened.push(one);
    return one;
  };
  const kept = open('kept');
  watch(client, met(client.lookup(1, 'disk')));
  elsewhere();

  // Reads alone: nothing is lost, and it goes on as if nothing had been.
  disk.works = false;
  for (const offset of [0, 500_000, (1 << 20) - 4096])
    assert.equal(
      errnoOf(() => client.read(kept.nodeid, kept.fh, offset, 4096)),
      EIO,
    );
  elsewhere();
  disk.works = true;
  assert.ok(client.read(kept.nodeid, kept.fh, 0, 65_536).equals(content.subarray(0, 65_536)));
  const other = open('other', O_RDONLY);
  assert.ok(client.read(other.nodeid, other.fh, 1 << 19, 65_536).equals(content.subarray(1 << 19, (1 << 19) + 65_536)));

  // Writes: ext4 gives its journal up and is read-only from then on.
  disk.works = false;
  // A whole page, which need not be read before.
  assert.equal(client.write(kept.nodeid, kept.fh, 0, Buffer.alloc(4096)), 4096);
  assert.equal(
    errnoOf(() => client.fsync(kept.nodeid, kept.fh)),
    EIO,
  );
  const directory = met(client.lookup(1, 'disk'));
  const make = (name: string) =>
    errnoOf(() => {
      const { entry, open } = client.create(directory, name, O_RDWR);
      opened.push({ nodeid: met(entry), fh: open.fh });
      client.fsync(entry.nodeid, open.fh);
    });
  for (const name of ['made', 'later']) assert.ok([EIO, EROFS].includes(make(name)));
  assert.ok([EIO, EROFS].includes(errnoOf(() => client.unlink(directory, 'other'))));
  elsewhere();
  assert.equal(
    errnoOf(() => client.read(other.nodeid, other.fh, 0, 4096)),
    EIO,
  );

  // Mended by the administrator, who can unmount it once the guest has nothing of it any more, and found again by the guest.
  disk.works = true;
  assert.throws(() => disk.unmount(), /busy/);
  // What is in use outlives the worker.
  process.kill(daemon.inside, 'SIGKILL');
  assertServes(client, [0]);
  assert.throws(() => disk.unmount(), /busy/);
  for (const { nodeid, fh } of opened) client.release(nodeid, fh);
  client.batchForget([...known].map(([nodeid, nlookup]) => ({ nodeid, nlookup })));
  disk.unmount();
  elsewhere();
  assert.match(disk.check(), /recovering journal/);
  disk.mount(join(share, 'disk'));
  const again = open('kept');
  assert.ok(client.read(again.nodeid, again.fh, 1 << 19, 65_536).equals(content.subarray(1 << 19, (1 << 19) + 65_536)));
  assert.equal(client.write(again.nodeid, again.fh, 0, 'on disk'), 7);
  client.fsync(again.nodeid, again.fh);
  assert.equal(fs.readFileSync(join(share, 'disk', 'kept')).toString('latin1', 0, 7), 'on disk');
  assertServes(client, [0]);
});

test('the share itself on such a disk: EIO, through a restart of the worker too, and it serves again', async () => {
  using disk = new Disk(join(folder(), 'image'), 'failing');
  const share = join(folder(), 'share');
  disk.mount(share);
  const content = Buffer.alloc(1 << 20, 'content');
  for (const name of ['open', 'other']) fs.writeFileSync(join(share, name), content);
  execFileSync('sync');
  await using daemon = await TestDaemon.start([], { share });
  const client = eventSession(daemon);
  const { nodeid } = client.lookup(1, 'open');
  const { fh } = client.open(nodeid, O_RDONLY);
  disk.works = false;
  const fails = () => {
    assert.equal(
      errnoOf(() => client.read(nodeid, fh, 1 << 19, 4096)),
      EIO,
    );
    // What the kernel has of names and attributes it still gives.
    assertServes(client, [0]);
  };
  fails();
  process.kill(daemon.inside, 'SIGKILL');
  fails();
  assert.match(daemon.log, /the worker before this one was ended by signal 9/);
  disk.works = true;
  assert.ok(client.read(nodeid, fh, 1 << 19, 65_536).equals(content.subarray(1 << 19, (1 << 19) + 65_536)));
  const other = client.lookup(1, 'other').nodeid;
  assert.equal(client.read(other, client.open(other).fh, 0, 4096).length, 4096);
});

test('quotas: EDQUOT for the user or the project, and only for those', async () => {
  const image = join(folder(), 'image');
  using disk = new Disk(image, 'quota', '-O', 'quota,project', '-E', 'quotatype=usrquota:prjquota');
  const share = join(folder(), 'share');
  disk.mount(share, 'usrquota,prjquota');
  fs.chmodSync(share, 0o777);
  fs.mkdirSync(join(share, 'project'), { mode: 0o777 });
  execFileSync('chattr', ['-p', '77', '+P', join(share, 'project')]);
  // 1 MiB, five files.
  execFileSync('setquota', ['-u', '1234', '0', '1024', '0', '5', share]);
  execFileSync('setquota', ['-P', '77', '0', '1024', '0', '5', share]);
  await using daemon = await TestDaemon.start([], { share });
  const client = eventSession(daemon);
  const project = client.lookup(1, 'project').nodeid;
  const limited = [
    { of: 'user', uid: 1234, directory: 1 },
    { of: 'project', uid: 0, directory: project },
  ];
  for (const { of, uid, directory } of limited) {
    client.as(uid, uid, () => {
      const { entry, open } = client.create(directory, `${of}-0`, O_RDWR);
      const { bytes, errno } = fill(client, entry.nodeid, open.fh);
      assert.equal(errno, EDQUOT, of);
      assert.ok(bytes >= 900 << 10 && bytes <= 1 << 20, `${bytes} bytes`);
      assert.equal(
        errnoOf(() => client.fallocate(entry.nodeid, open.fh, bytes, 1 << 20)),
        EDQUOT,
      );
      // As many files as there may be, a directory among them.
      const makers = [
        (name: string) => client.mkdir(directory, name),
        (name: string) => client.symlink(directory, name, 'target'),
        (name: string) => client.create(directory, name, O_RDWR),
        (name: string) => client.mknod(directory, name, 0o100644),
      ];
      let made = 1;
      let failed = 0;
      for (let round = 0; failed < makers.length; round++) {
        failed = 0;
        for (const [i, make] of makers.entries()) {
          const end = errnoOf(() => make(`${of}-${round}-${i}`));
          if (end === 0) made++;
          else {
            assert.equal(end, EDQUOT);
            failed++;
          }
        }
      }
      assert.ok(made <= 5 && made >= 3, `${made} files`);
      // What there is can be read, changed in place, made smaller, and then written again.
      assert.equal(client.read(entry.nodeid, open.fh, 65_536, 1)[0], 1);
      assert.equal(client.write(entry.nodeid, open.fh, 0, 'in place'), 8);
      client.setattr(entry.nodeid, { size: 4096 });
      assert.equal(client.write(entry.nodeid, open.fh, 8192, 'again'), 5);
      client.fsync(entry.nodeid, open.fh);
    });
    // Nobody else is held up.
    client.as(4321, 4321, () => {
      const { entry, open } = client.create(1, `${of}-of-another`, O_RDWR);
      for (let at = 0; at < 2 << 20; at += 65_536) assert.equal(client.write(entry.nodeid, open.fh, at, Buffer.alloc(65_536)), 65_536);
    });
  }
  // A file that is given to somebody who has no room for it.
  const { entry, open } = client.create(1, 'gift', O_RDWR);
  for (let at = 0; at < 2 << 20; at += 65_536) client.write(entry.nodeid, open.fh, at, Buffer.alloc(65_536, 1));
  client.fsync(entry.nodeid, open.fh);
  assert.equal(
    errnoOf(() => client.setattr(entry.nodeid, { uid: 1234 })),
    EDQUOT,
  );
  // The directory of a project is as large as its quota.
  const { blocks, frsize } = client.statfs(project);
  assert.equal(blocks * BigInt(frsize), 1n << 20n);
  assert.deepEqual(
    daemon.lines.filter((line) => / (WARN|ERROR) /.test(line)),
    [],
  );
});

test('a full ext4: ENOSPC, nothing lost, and room again', async () => {
  const image = join(folder(), 'image');
  using disk = new Disk(image, 'full', '-N', '64');
  const share = join(folder(), 'share');
  disk.mount(share);
  await using daemon = await TestDaemon.start(['--xattr'], { share });
  const client = eventSession(daemon);
  const { entry, open } = client.create(1, 'big', O_RDWR);
  const small = client.create(1, 'small', O_RDWR);
  const { bytes, errno } = fill(client, entry.nodeid, open.fh);
  assert.equal(errno, ENOSPC);
  assert.ok(bytes > 16 << 20, `${bytes} bytes`);
  // What was taken is on the disk.
  client.fsync(entry.nodeid, open.fh);
  for (let at = 0; at < bytes; at += 1 << 20) assert.equal(client.read(entry.nodeid, open.fh, at, 1)[0], (at >> 16) & 0xff);
  assert.equal(
    errnoOf(() => client.fallocate(entry.nodeid, open.fh, bytes, 8 << 20)),
    ENOSPC,
  );
  assert.equal(
    errnoOf(() => client.setxattr(small.entry.nodeid, 'user.large', Buffer.alloc(3000, 1))),
    ENOSPC,
  );
  const before = daemon.descriptors().length;
  let failed = 0;
  for (let i = 0; i < 100; i++) {
    const end = errnoOf(() => client.mknod(1, `file-${i}`, 0o100644));
    if (end === 0) continue;
    assert.equal(end, ENOSPC);
    failed++;
  }
  assert.ok(failed >= 30, `${failed} of 100 failed`);
  for (const make of [
    () => client.mkdir(1, 'directory'),
    () => client.create(1, 'created', O_RDWR),
    () => client.tmpfile(1, O_RDWR),
    () => client.symlink(1, 'link', 'x'.repeat(200)),
  ])
    assert.equal(errnoOf(make), ENOSPC);
  assert.equal(daemon.descriptors().length, before);
  assert.equal(client.statfs().bavail, 0n);
  client.setattr(entry.nodeid, { size: 0 });
  client.fsync(entry.nodeid, open.fh);
  client.unlink(1, 'file-0');
  client.mkdir(1, 'directory');
  assert.equal(client.write(small.entry.nodeid, small.open.fh, 0, Buffer.alloc(1 << 16)), 1 << 16);
  client.fsync(small.entry.nodeid, small.open.fh);
  client.setxattr(small.entry.nodeid, 'user.large', Buffer.alloc(3000, 1));
  assert.deepEqual(
    daemon.lines.filter((line) => / (WARN|ERROR) /.test(line)),
    [],
  );
});
