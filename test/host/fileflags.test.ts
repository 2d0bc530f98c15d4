/** Flags of files by FUSE_IOCTL, as chattr and lsattr in a guest have them sent: the host's lsattr is the witness. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { needsRoot, TestDaemon } from '../support/daemon.js';
import { errnoOf, type FuseClient } from '../support/fuse-client.js';

const { EPERM, EINVAL, ENOTTY, EOPNOTSUPP, EROFS, EBADF } = constants.errno;

const GETFLAGS = 0x80086601;
const SETFLAGS = 0x40086602;
const FSGETXATTR = 0x801c581f;
const FSSETXATTR = 0x401c5820;

const SYNC = 0x8;
const IMMUTABLE = 0x10;
const NODUMP = 0x40;
const NOATIME = 0x80;
const JOURNAL_DATA = 0x4000;
const PROJINHERIT = 0x20000000;
const XFLAG_SYNC = 0x20;
const XFLAG_NODUMP = 0x80;
const XFLAG_PROJINHERIT = 0x200;

/** Letters of lsattr. */
function hostFlags(path: string): string {
  return execFileSync('lsattr', ['-d', path], { encoding: 'utf8' }).split(' ')[0]?.replaceAll('-', '') as string;
}

const words = (...values: number[]): Uint8Array => {
  const bytes = Buffer.alloc(values.length * 4);
  values.forEach((value, i) => {
    bytes.writeUInt32LE(value >>> 0, i * 4);
  });
  return bytes;
};

/** A file or directory that is open. */
class Open {
  readonly #client: FuseClient;
  readonly nodeid: number;
  readonly fh: number;
  constructor(client: FuseClient, name: string, directory = false) {
    this.#client = client;
    this.nodeid = client.lookup(1, name).nodeid;
    this.fh = (directory ? client.opendir(this.nodeid) : client.open(this.nodeid)).fh;
  }
  call(command: number, input: Uint8Array, output: number): Buffer {
    return this.#client.ioctl(this.nodeid, this.fh, command, input, output).data;
  }
  get flags(): number {
    return this.call(GETFLAGS, new Uint8Array(0), 4).readUInt32LE(0);
  }
  set(flags: number): number {
    return errnoOf(() => this.call(SETFLAGS, words(flags), 0));
  }
  get attributes(): Buffer {
    return this.call(FSGETXATTR, new Uint8Array(0), 28);
  }
  setAttributes(bytes: Uint8Array): number {
    return errnoOf(() => this.call(FSSETXATTR, bytes, 0));
  }
}

describe('file flags', needsRoot, () => {
  test('read and changed, for files and directories', async () => {
    await using daemon = await TestDaemon.start();
    const client = daemon.session();
    for (const [name, directory] of [
      ['file', false],
      ['directory', true],
    ] as const) {
      const path = join(daemon.share, name);
      if (directory) mkdirSync(path);
      else writeFileSync(path, 'text');
      const open = new Open(client, name, directory);
      const first = open.flags;
      assert.equal(open.set(first | NODUMP | NOATIME | SYNC), 0);
      assert.match(hostFlags(path), /S.*d.*A/);
      assert.equal(open.flags, first | NODUMP | NOATIME | SYNC);
      execFileSync('chattr', ['-d', path]);
      assert.equal(open.flags, first | NOATIME | SYNC);
      // As older kernels transfer it: a long, of which an int is used.
      assert.deepEqual([...open.call(GETFLAGS, new Uint8Array(0), 8)], [...words(first | NOATIME | SYNC, 0)]);
      assert.equal(
        errnoOf(() => open.call(SETFLAGS, words(first, 0), 0)),
        0,
      );
      assert.equal(open.flags, first);

      const attributes = open.attributes;
      const changed = Buffer.from(attributes);
      changed.writeUInt32LE(attributes.readUInt32LE(0) | XFLAG_SYNC | XFLAG_NODUMP, 0);
      assert.equal(open.setAttributes(changed), 0);
      assert.match(hostFlags(path), /S.*d/);
      assert.deepEqual(open.attributes.subarray(0, 4), changed.subarray(0, 4));
    }
  });

  test('what concerns the host is not changed', async () => {
    await using daemon = await TestDaemon.start();
    const path = join(daemon.share, 'file');
    writeFileSync(path, 'text');
    const open = new Open(daemon.session(), 'file');
    const before = hostFlags(path);
    const { flags, attributes } = open;
    for (const flag of [JOURNAL_DATA, PROJINHERIT, 0x02000000, 1 << 31]) assert.equal(open.set(flags ^ flag), EOPNOTSUPP, `${flag}`);
    const project = Buffer.from(attributes);
    project.writeUInt32LE(attributes.readUInt32LE(12) + 1, 12);
    const extent = Buffer.from(attributes);
    extent.writeUInt32LE(4096, 4);
    const inherit = Buffer.from(attributes);
    inherit.writeUInt32LE(attributes.readUInt32LE(0) | XFLAG_PROJINHERIT, 0);
    for (const bytes of [project, extent, inherit]) assert.equal(open.setAttributes(bytes), EOPNOTSUPP);
    assert.equal(open.set(flags | IMMUTABLE), EPERM, 'without the capability');
    assert.equal(open.set(flags), 0, 'no change at all');
    assert.equal(hostFlags(path), before);
  });

  test('immutable with --modcaps=+linux_immutable', async () => {
    await using daemon = await TestDaemon.start(['--modcaps=+linux_immutable']);
    const path = join(daemon.share, 'file');
    writeFileSync(path, 'text');
    const open = new Open(daemon.session(), 'file');
    const flags = open.flags;
    assert.equal(open.set(flags | IMMUTABLE), 0);
    assert.match(hostFlags(path), /i/);
    assert.throws(() => writeFileSync(path, 'other'), /EPERM/);
    assert.equal(open.set(flags), 0);
    writeFileSync(path, 'other');
  });

  test('other commands, sizes and handles; --readonly', async () => {
    await using daemon = await TestDaemon.start(['--readonly']);
    const client = daemon.session();
    const path = join(daemon.share, 'file');
    writeFileSync(path, 'text');
    const open = new Open(client, 'file');
    const before = open.flags;
    assert.equal(open.set(before | NODUMP), EROFS);
    assert.equal(open.setAttributes(open.attributes), EROFS);
    assert.equal(open.flags, before);
    const none = new Uint8Array(0);
    // FIBMAP, FS_IOC_FIEMAP, FICLONE, FITRIM, FS_IOC_ENABLE_VERITY, TIOCSTI, BLKDISCARD.
    for (const command of [1, 0xc020660b, 0x40049409, 0xc0185879, 0x40806685, 0x5412, 0x1277])
      assert.equal(
        errnoOf(() => open.call(command, new Uint8Array(64), 64)),
        ENOTTY,
      );
    for (const [command, input, output] of [
      [GETFLAGS, none, 0],
      [GETFLAGS, none, 28],
      [GETFLAGS, words(1), 4],
      [FSGETXATTR, none, 24],
      [FSGETXATTR, words(1), 28],
    ] as const)
      assert.equal(
        errnoOf(() => open.call(command, input, output)),
        EINVAL,
      );
    assert.equal(
      errnoOf(() => client.ioctl(open.nodeid, open.fh + 1, GETFLAGS, none, 4)),
      EBADF,
    );
    assert.equal(readFileSync(path, 'utf8'), 'text');
  });
});
