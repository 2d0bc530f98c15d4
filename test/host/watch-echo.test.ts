/** The guest's own changes through the real file system are no events, by either watcher; the same by another process are. */
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { arena, arenaAlloc, cString, native } from 'vhost-user-ts/native';
import { NO_FH, PENDING, type SetAttr } from '../../src/fs/filesystem.js';
import { openPassthrough } from '../../src/fs/passthrough.js';
import { Offload } from '../../src/queue/offload.js';
import { Counters } from '../../src/watch/counters.js';
import { withEchoes } from '../../src/watch/echofs.js';
import { Fsnotify } from '../../src/watch/fsnotify.js';
import { maskText } from '../../src/watch/mask.js';
import { ShareNodes } from '../../src/watch/sharenodes.js';
import { SESSION } from '../support/fs.js';
import { type Change, Changer } from '../support/watch-changer.js';
import { TestGuest } from '../support/watch-guest.js';

const CHANGES = 0x0800_0bce;
const FIRST = arenaAlloc(512);
const SECOND = arenaAlloc(512);
const DATA = arenaAlloc(64);
const IOV = arenaAlloc(64);

for (const mode of ['fanotify', 'inotify'] as const) {
  describe(mode, () => {
    test('what the guest does itself, and what others do', async () => {
      const root = mkdtempSync('/var/tmp/watch-echo-');
      mkdirSync(join(root, 'd'));
      writeFileSync(join(root, 'd/f'), 'f');
      writeFileSync(join(root, 'd/g'), 'g');
      const offload = new Offload(1);
      const inner = openPassthrough({ root, offload, xattr: true });
      const nodes = new ShareNodes(inner.share);
      const guest = new TestGuest();
      const counters = new Counters();
      const fsnotify = new Fsnotify(nodes, inner.share.fd(1), inner.share.procfd, { mode }, counters);
      const fs = withEchoes(inner, fsnotify, nodes, offload);
      const changer = new Changer(root);
      const ok = (result: number) => {
        assert.ok(result >= 0, `errno ${-result}`);
        return result;
      };
      const name = (text: string, at = FIRST) => cString(text, at);
      const look = (parent: number, text: string) => {
        ok(fs.lookup(parent, name(text), text.length));
        return fs.entry.nodeid;
      };
      const finish = async (result: number) => {
        if (result !== PENDING) return ok(result);
        const job = offload.lastJob;
        let got = -1;
        while (got < 0) {
          native.poll(offload.eventfd, 1, 1_000);
          native.eventfdRead(offload.eventfd);
          offload.reap((done, n) => {
            fs.completed(done);
            if (done === job) got = n;
          });
        }
        return ok(got);
      };
      try {
        fs.init(SESSION);
        fsnotify.begin();
        fsnotify.attach(guest);
        const d = look(1, 'd');
        const f = look(d, 'f');
        const g = look(d, 'g');
        for (const nodeid of [d, f, g])
          assert.equal(fsnotify.watch(nodeid, 0, nodeid === d ? CHANGES : CHANGES & ~0x0800_0340 & 0xfff & ~0x3c0, 0, 0), 0);
        const seen = () => {
          while (fsnotify.drain());
          return guest
            .take()
            .flatMap((message) => message.records)
            .map((record) => `${maskText(record.mask & 0xfff)} ${record.name}`);
        };
        seen();

        /** The change of the guest, through the file system. */
        const own: readonly (readonly [string, () => unknown])[] = [
          [
            'write',
            async () => {
              ok(fs.open(f, 1, false));
              const { fh } = fs.opened;
              arena.u32[IOV >> 2] = (native.arenaAddress() + DATA) >>> 0;
              arena.u32[(IOV >> 2) + 1] = Math.floor((native.arenaAddress() + DATA) / 2 ** 32);
              arena.u32[(IOV >> 2) + 2] = 10;
              arena.u32[(IOV >> 2) + 3] = 0;
              await finish(fs.write(f, fh, 0, 10, 0, IOV, 1, 0));
              await finish(fs.fallocate(f, fh, 0, 4096, 0));
              ok(fs.release(f, fh));
            },
          ],
          [
            'truncate',
            () => {
              const change: SetAttr = {
                valid: 8,
                fh: NO_FH,
                mode: 0,
                uid: 0,
                gid: 0,
                size: 1,
                atime: 0,
                atimeNsec: 0,
                mtime: 0,
                mtimeNsec: 0,
                ctime: 0,
                ctimeNsec: 0,
              };
              ok(fs.setattr(f, change));
              ok(fs.setattr(f, { ...change, valid: 1, mode: 0o600 }));
            },
          ],
          ['setxattr', () => ok(fs.setxattr(f, name('user.x'), DATA, 1, 0, 0))],
          [
            'create',
            () => {
              ok(fs.create(d, name('c'), 2, 0o644, 0, false));
              ok(fs.release(fs.entry.nodeid, fs.opened.fh));
            },
          ],
          [
            'open with O_TRUNC',
            () => {
              ok(fs.open(look(d, 'c'), 1 | 0x200, false));
              ok(fs.release(look(d, 'c'), fs.opened.fh));
            },
          ],
          ['mkdir', () => ok(fs.mkdir(d, name('m'), 0o755, 0))],
          ['symlink', () => ok(fs.symlink(d, name('s'), name('target', SECOND)))],
          ['link', () => ok(fs.link(f, d, name('l')))],
          ['rename', () => ok(fs.rename(d, name('l'), d, name('l2', SECOND), 0))],
          ['rename over a watched file', () => ok(fs.rename(d, name('c'), d, name('g', SECOND), 0))],
          ['exchange', () => ok(fs.rename(d, name('s'), d, name('m', SECOND), 2))],
          ['unlink', () => ok(fs.unlink(d, name('l2')))],
          ['unlink of a watched file', () => ok(fs.unlink(d, name('f')))],
          ['rmdir', () => ok(fs.rmdir(d, name('s')))],
        ];
        for (const [what, make] of own) {
          await make();
          assert.deepEqual(seen(), [], what);
        }
        // Nothing of it is remembered longer.
        const others: readonly (readonly [Change, readonly string[]])[] = [
          [{ op: 'write', path: 'd/l2' }, ['CREATE l2', 'MODIFY l2', 'CLOSE_WRITE l2']],
          [{ op: 'append', path: 'd/g' }, ['MODIFY g', 'CLOSE_WRITE g']],
          [{ op: 'mkdir', path: 'd/s' }, ['CREATE s']],
          [{ op: 'rename', path: 'd/l2', to: 'd/l' }, ['MOVED_FROM l2', 'MOVED_TO l']],
          [{ op: 'rmdir', path: 'd/s' }, ['DELETE s']],
        ];
        for (const [change, records] of others) {
          await changer.do(change);
          assert.deepEqual(seen(), records);
        }
      } finally {
        changer.close();
        fsnotify.close();
        offload.stop();
        inner.close();
        rmSync(root, { recursive: true });
      }
    });
  });
}
