/** Programs that people watch trees with, in a guest that has the host's: chokidar (Vite, webpack), Node's fs.watch, inotifywait -r. */
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, renameSync, rmSync, unlinkSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { repository } from '../../qemu/guest/daemon.js';
import { Watcher } from './fsnotify.js';
import type { Setup } from './guests.js';

/** The host's node and this repository's node_modules, lent by hostfs. */
const NODE_WATCHER = `${process.execPath} /run/repository/build/js/test/support/guest-watch.js`;
const SOURCES = 8;
/** Directories of the large tree: 100 with 99 each. */
const WIDTH = 100;

/** A project: src/0 to src/7, each with a few files. */
function makeProject(share: string): string {
  const root = mkdtempSync(join(share, 'project-'));
  for (let i = 0; i < SOURCES; i++) {
    mkdirSync(join(root, `src/${i}/lib`), { recursive: true });
    writeFileSync(join(root, `src/${i}/index.ts`), `export const n = ${i};\n`);
    writeFileSync(join(root, `src/${i}/lib/a.ts`), 'export {};\n');
  }
  return root;
}

/** What a test of programs may need beside a guest. */
export interface Programs {
  /** Waits until a program that says that it watches will hear of everything. */
  settled?: (setup: Setup, watches: number) => Promise<void>;
}

/** The programs, in a guest made with `hostRoot`. */
export function watchWithPrograms(title: string, machine: () => Promise<Setup>, { settled = async () => undefined }: Programs = {}): void {
  describe(title, () => {
    let setup: Setup;
    before(async () => {
      setup = await machine();
      const commands = [
        'echo 100000 > /proc/sys/fs/inotify/max_user_watches',
        `mkdir /run/repository`,
        `mount -t hostfs -o ro,${repository} none /run/repository`,
      ];
      const { status, stderr } = await setup.guest.run(commands.join(' && '));
      assert.equal(status, 0, stderr);
    });
    after(() => setup.end());

    /** Each edit with the lines that it must bring, in any order. Both programs pass over what comes within 50 ms of the last, also on a local disk. */
    async function edit(watcher: Watcher, change: () => void, ...expected: string[]): Promise<void> {
      await sleep(60);
      change();
      const missing = new Set(expected);
      const seen: string[] = [];
      while (missing.size > 0) {
        const lines = await watcher.until(/./).catch(() => assert.fail(`${[...missing]} not heard, but ${seen.join(', ') || 'nothing'}`));
        const line = lines.at(-1) as string;
        assert.doesNotMatch(line, /^error/);
        seen.push(line);
        missing.delete(line);
      }
    }

    it('chokidar: every edit on the host', { timeout: 120_000 }, async (t) => {
      const root = makeProject(setup.share);
      const watcher = Watcher.inGuest(setup.guest, `${NODE_WATCHER} chokidar /mnt/${basename(root)}`);
      t.after(() => watcher.close());
      await watcher.ready(60_000);
      await settled(setup, 2 * SOURCES + 2);
      const at = (path: string) => join(root, path);
      for (let i = 0; i < SOURCES; i++) {
        const src = `src/${i}`;
        await edit(watcher, () => writeFileSync(at(`${src}/index.ts`), `export const changed = ${i};\n`), `change ${src}/index.ts`);
        await edit(watcher, () => writeFileSync(at(`${src}/lib/new.ts`), 'new'), `add ${src}/lib/new.ts`);
        // As editors save: a file beside it, renamed over it.
        await edit(
          watcher,
          () => {
            writeFileSync(at(`${src}/index.ts.tmp`), 'export const saved = true;\n');
            renameSync(at(`${src}/index.ts.tmp`), at(`${src}/index.ts`));
          },
          `change ${src}/index.ts`,
        );
        await edit(
          watcher,
          () => renameSync(at(`${src}/lib/new.ts`), at(`${src}/lib/renamed.ts`)),
          `unlink ${src}/lib/new.ts`,
          `add ${src}/lib/renamed.ts`,
        );
        await edit(watcher, () => unlinkSync(at(`${src}/lib/renamed.ts`)), `unlink ${src}/lib/renamed.ts`);
        // A directory made after the watch, and what is made in it at once.
        await edit(
          watcher,
          () => {
            mkdirSync(at(`${src}/more/deep`), { recursive: true });
            writeFileSync(at(`${src}/more/deep/file.ts`), 'x');
          },
          `addDir ${src}/more`,
          `addDir ${src}/more/deep`,
          `add ${src}/more/deep/file.ts`,
        );
        await edit(watcher, () => writeFileSync(at(`${src}/more/deep/file.ts`), 'longer'), `change ${src}/more/deep/file.ts`);
        await edit(
          watcher,
          () => rmSync(at(`${src}/more`), { recursive: true }),
          `unlink ${src}/more/deep/file.ts`,
          `unlinkDir ${src}/more/deep`,
          `unlinkDir ${src}/more`,
        );
      }
    });

    it('fs.watch, recursive', { timeout: 120_000 }, async (t) => {
      const root = makeProject(setup.share);
      const watcher = Watcher.inGuest(setup.guest, `${NODE_WATCHER} recursive /mnt/${basename(root)}`);
      t.after(() => watcher.close());
      await watcher.ready(60_000);
      // It goes through the tree after it has said so.
      for (let turn = 0; watcher.lines.every((line) => !line.includes(`src/${SOURCES - 1}/lib/a.ts`)); turn++) {
        writeFileSync(join(root, `src/${SOURCES - 1}/lib/a.ts`), `${turn}`);
        await sleep(50);
      }
      await settled(setup, 2 * SOURCES + 2);
      for (let i = 0; i < SOURCES; i++) {
        await edit(watcher, () => writeFileSync(join(root, `src/${i}/index.ts`), `edit ${i}`), `change src/${i}/index.ts`);
        await edit(watcher, () => writeFileSync(join(root, `src/${i}/lib/new.ts`), ''), `rename src/${i}/lib/new.ts`);
        await edit(watcher, () => unlinkSync(join(root, `src/${i}/lib/new.ts`)), `rename src/${i}/lib/new.ts`);
      }
    });

    it('inotifywait -m -r on 10 000 directories', { timeout: 240_000 }, async (t) => {
      const root = mkdtempSync(join(setup.share, 'tree-'));
      for (let i = 0; i < WIDTH; i++) for (let j = 1; j < WIDTH; j++) mkdirSync(join(root, `${i}/${j}`), { recursive: true });
      const watcher = Watcher.inGuest(
        setup.guest,
        `inotifywait -m -r -e create,close_write,move,delete --format '%e %w%f' /mnt/${basename(root)} 2>&1`,
      );
      t.after(() => watcher.close());
      const begun = Date.now();
      await watcher.until('Watches established.', 200_000);
      t.diagnostic(`${WIDTH * WIDTH} directories watched after ${Date.now() - begun} ms`);
      await settled(setup, WIDTH * WIDTH);
      for (let i = 0; i < WIDTH * WIDTH; i += 37) {
        const directory = `${Math.floor(i / WIDTH)}/${Math.max(i % WIDTH, 1)}`;
        const file = join(root, directory, `file${i}`);
        writeFileSync(file, 'x');
        const seen = `/mnt/${basename(root)}/${directory}/file${i}`;
        assert.deepEqual(await watcher.until(`CLOSE_WRITE,CLOSE ${seen}`), [`CREATE ${seen}`, `CLOSE_WRITE,CLOSE ${seen}`]);
        unlinkSync(file);
        await watcher.until(`DELETE ${seen}`);
      }
      // A directory made meanwhile is watched as soon as inotifywait has heard of it.
      mkdirSync(join(root, '0/1/made'));
      await watcher.until(`CREATE,ISDIR /mnt/${basename(root)}/0/1/made`);
      for (let turn = 0; watcher.lines.every((line) => !line.includes('/made/in')); turn++) {
        writeFileSync(join(root, `0/1/made/in${turn}`), '');
        await sleep(50);
      }
    });
  });
}
