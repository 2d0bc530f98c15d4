/** Many events: races between a watch and a change, storms, watches that come and go; nothing is lost silently. */
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { buildFsnotify, PROGRAM, Watcher } from '../support/fsnotify.js';
import { pause, type Setup, setUp } from '../support/guests.js';
import { readMetrics } from '../support/metrics.js';
import { Changer } from '../support/watch-changer.js';

const folder = mkdtempSync(join(tmpdir(), 'load-'));
let program: string;
before(() => {
  program = buildFsnotify(folder);
});
after(() => rmSync(folder, { recursive: true, force: true }));

const TURNS = 1000;
const FILES = 100_000;

/** The storm of a guest that runs: QEMU without KVM takes 1 ms a request. */
const MACHINES = [
  { kind: 'uml', kernel: '6.12', directories: 10_000, files: FILES, queued: FILES },
  { kind: 'qemu', kernel: 'debian', directories: 1000, files: 10_000, queued: 60_000 },
] as const;

/** Of the line that `storm` ends with: files that were heard of, and overflows. */
function counts(result: string): [number, number] {
  const found = /^= delivered (\d+) twice 0 overflows (\d+)/.exec(result);
  assert.ok(found, result);
  return [Number(found[1]), Number(found[2])];
}

for (const { kind, kernel, directories, files, queued } of MACHINES) {
  describe(`load of events: ${kind} ${kernel}`, () => {
    let setup: Setup;
    const socket = join(folder, `${kind}.metrics`);
    before(async () => {
      setup = await setUp({ kind, kernel, files: { [PROGRAM]: program }, daemonOptions: [`--metrics=unix:${socket}`] });
      // What the guest's own queue would lose is none of ours.
      await setup.guest.run('cd /proc/sys/fs/inotify; echo 100000 > max_user_watches; echo 1000000 > max_queued_events');
    });
    after(() => setup.end());

    const metric = async (name: string) => (await readMetrics(socket)).get(`virtiofsd_fsnotify_${name}`) as number;
    /** MiB of the daemon, with the processes that its sandbox consists of. */
    const memory = (what: 'VmRSS' | 'VmHWM', pid = setup.daemon.pid): number => {
      const kib = new RegExp(`${what}:\\s+(\\d+) kB`).exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
      const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').split(' ').filter(Boolean);
      return children.reduce((sum, child) => sum + memory(what, Number(child)), Math.round(Number(kib) / 1024));
    };

    /** A directory of the share with directories 0, 1... */
    function makeDirectories(count: number): string {
      const root = mkdtempSync(join(setup.share, 'd-'));
      for (let i = 0; i < count; i++) mkdirSync(join(root, String(i)));
      writeFileSync(join(root, 'probe'), 'x');
      return root;
    }

    /** `storm` in the guest; `make` changes files. */
    async function storm(root: string, make: () => Promise<void>): Promise<{ watching: string; result: string; requests: string }> {
      const watcher = Watcher.inGuest(setup.guest, `fsnotify storm ${FILES} /mnt/${basename(root)}`);
      try {
        const watching = await watcher.ready(120_000);
        await make();
        // It ends with this file; the event can be among those that are lost.
        const result = watcher.until(/^= delivered/, 120_000);
        let over = false;
        const stop = () => {
          over = true;
        };
        result.then(stop, stop);
        for (let i = 0; !over; i++) {
          writeFileSync(join(root, `END${i}`), '');
          await sleep(100);
        }
        return { watching, result: (await result).at(-1) as string, requests: (await watcher.until(/^= requests/)).at(-1) as string };
      } finally {
        watcher.close();
      }
    }

    it(`a change right after inotify_add_watch(), ${TURNS} times`, { timeout: 120_000 }, async () => {
      const root = makeDirectories(100);
      const race = setup.guest.spawn(`fsnotify race ${TURNS} /mnt/${basename(root)}`);
      race.on('line', ({ text }) => {
        if (/^\d+$/.test(text)) writeFileSync(join(root, String(Number(text) % 100), `f${text}`), '');
      });
      const { text } = await race.waitForLine('= seen', { timeoutMs: 100_000 });
      assert.equal(text, `= seen ${TURNS} missed 0 extra 0`);
    });

    it('watches that come and go meanwhile harm no other', { timeout: 120_000 }, async () => {
      const root = makeDirectories(100);
      const paths = Array.from({ length: 100 }, (_, i) => `/mnt/${basename(root)}/${i}`);
      const before = await metric('watches');
      const churn = Watcher.inGuest(setup.guest, `fsnotify churn ${paths.join(' ')}`);
      await churn.ready();
      const changer = new Changer(root);
      try {
        const { result } = await storm(root, () => changer.do({ op: 'storm', path: '.', files: 5000, directories: 100 }));
        assert.match(result, /^= delivered 5000 twice 0 overflows 0/);
      } finally {
        changer.close();
        churn.close();
      }
      // The guest's kernel tells the daemon of what is no longer watched, in its own time.
      while ((await metric('watches')) > before) await sleep(100);
    });

    it(`a storm of ${files} changes in ${directories} directories`, { timeout: 240_000 }, async (t) => {
      const root = makeDirectories(directories);
      const changer = new Changer(root);
      const overflows = await metric('overflows_sent_total');
      let madeIn = 0;
      try {
        const { watching, result, requests } = await storm(root, async () => {
          const begun = Date.now();
          await changer.do({ op: 'storm', path: '.', files, directories });
          madeIn = Date.now() - begun;
        });
        const said = (await metric('overflows_sent_total')) - overflows;
        t.diagnostic(`${watching}; made in ${madeIn} ms; ${result}; ${requests}; daemon at most ${memory('VmHWM')} MiB`);
        const [delivered, seen] = counts(result);
        assert.equal(seen, said, 'each overflow that was said is seen');
        if (said === 0) assert.equal(delivered, files);
        assert.ok(memory('VmHWM') < 200);
      } finally {
        changer.close();
      }
    });

    it(`${queued} changes while the guest stands still: one overflow`, { timeout: 240_000 }, async (t) => {
      const root = makeDirectories(1000);
      const changer = new Changer(root);
      const overflows = await metric('overflows_sent_total');
      let full = 0;
      try {
        const { result, requests } = await storm(root, async () => {
          await pause(setup, true);
          await changer.do({ op: 'storm', path: '.', files: queued, directories: 1000 });
          full = memory('VmRSS');
          await pause(setup, false);
        });
        t.diagnostic(`${result}; ${requests}; daemon ${full} MiB with a full queue, at most ${memory('VmHWM')} MiB`);
        const [delivered, seen] = counts(result);
        assert.equal(seen, 1);
        assert.equal(await metric('overflows_sent_total'), overflows + 1);
        assert.ok(delivered < queued);
        assert.ok(memory('VmHWM') < 200);
        // And then it goes on: nothing is lost any more.
        const again = makeDirectories(10);
        const next = await storm(again, () => changer.do({ op: 'storm', path: `../${basename(again)}`, files: 1000, directories: 10 }));
        assert.match(next.result, /^= delivered 1000 twice 0 overflows 0/);
      } finally {
        changer.close();
      }
    });
  });
}
