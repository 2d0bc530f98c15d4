/** A daemon that takes no agent: a replay that comes all the same, from a guest that was connected to one that did, changes nothing. */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { AGENT_UID } from '../../src/replay/replay.js';
import { TestDaemon } from '../support/daemon.js';
import { errnoOf, type FuseClient } from '../support/fuse-client.js';

const { EPERM } = constants.errno;
const { O_RDWR, O_TRUNC, O_CREAT, O_RDONLY } = fs.constants;

/** All that an agent replays, and what would change something besides. */
const CHANGES: Record<string, (client: FuseClient, node: number) => unknown> = {
  mknod: (client) => client.mknod(1, 'new', 0o100644),
  mkdir: (client) => client.mkdir(1, 'new'),
  symlink: (client) => client.symlink(1, 'new', 'x'),
  link: (client, node) => client.link(node, 1, 'new'),
  unlink: (client) => client.unlink(1, 'file'),
  rmdir: (client) => client.rmdir(1, 'directory'),
  rename: (client) => client.rename(1, 'file', 1, 'new'),
  rename2: (client) => client.rename2(1, 'file', 1, 'directory', 2),
  setattr: (client, node) => client.setattr(node, { mode: 0o600 }),
  open: (client, node) => client.open(node, O_RDWR),
  truncate: (client, node) => client.open(node, O_RDONLY | O_TRUNC),
  create: (client) => client.create(1, 'new', O_RDWR | O_CREAT),
  tmpfile: (client) => client.tmpfile(1, O_RDWR),
  setxattr: (client, node) => client.setxattr(node, 'user.x', Buffer.from('x')),
  removexattr: (client, node) => client.removexattr(node, 'user.y'),
};

for (const options of [[], ['--fsnotify=off']]) {
  test(`without --agent its user id changes nothing ${options.join(' ')}`, async () => {
    await using daemon = await TestDaemon.start(['--xattr', ...options]);
    fs.chmodSync(daemon.share, 0o777);
    fs.writeFileSync(join(daemon.share, 'file'), 'text');
    fs.chmodSync(join(daemon.share, 'file'), 0o666);
    fs.mkdirSync(join(daemon.share, 'directory'));
    fs.chmodSync(join(daemon.share, 'directory'), 0o777);
    const client = daemon.session();
    const node = client.lookup(1, 'file').nodeid;
    const open = client.open(node, O_RDWR);
    for (const [what, change] of Object.entries(CHANGES)) {
      assert.equal(
        errnoOf(() => client.as(AGENT_UID, 0, () => change(client, node))),
        EPERM,
        what,
      );
    }
    assert.equal(
      errnoOf(() => client.as(AGENT_UID, 0, () => client.write(node, open.fh, 0, Buffer.from('x')))),
      EPERM,
    );
    assert.deepEqual(fs.readdirSync(daemon.share).sort(), ['directory', 'file']);
    assert.equal(fs.readFileSync(join(daemon.share, 'file'), 'utf8'), 'text');
    assert.equal(fs.statSync(join(daemon.share, 'file')).mode & 0o777, 0o666);
    // Anybody else's are made; and it may look.
    client.as(AGENT_UID - 1, 0, () => client.rename(1, 'file', 1, 'renamed'));
    client.as(AGENT_UID, 0, () => client.open(client.lookup(1, 'renamed').nodeid));
    assert.deepEqual(fs.readdirSync(daemon.share).sort(), ['directory', 'renamed']);
  });
}
