/** `virtiofsd-ts top`: what it shows of a daemon at work, in a pipe and at a terminal. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { PROGRAM_PATH, runDaemon, TestDaemon } from '../support/daemon.js';
import { errnoOf, type FuseClient } from '../support/fuse-client.js';
import { Terminal } from '../support/terminal.js';

const METRICS = '--metrics=unix:{folder}/metrics';

/** Some requests, over and over until the end. */
async function work(daemon: TestDaemon, client: FuseClient, until: Promise<unknown>): Promise<void> {
  writeFileSync(join(daemon.share, 'file'), 'x'.repeat(10_000));
  let ended = false;
  void until.finally(() => {
    ended = true;
  });
  while (!ended) {
    for (let i = 0; i < 20; i++) {
      client.getattr(1);
      assert.notEqual(
        errnoOf(() => client.lookup(1, 'missing')),
        0,
      );
      const { nodeid } = client.lookup(1, 'file');
      const { fh } = client.open(nodeid);
      client.read(nodeid, fh, 0, 10_000);
      client.release(nodeid, fh);
    }
    await sleep(1);
  }
}

test('in a pipe: as many views as asked for, with what was done in between', async () => {
  await using daemon = await TestDaemon.start([METRICS]);
  const client = daemon.session();
  const viewer = spawn(PROGRAM_PATH, ['top', `unix:${daemon.folder}/metrics`, '-n', '3', '--interval=0.4'], {
    stdio: ['ignore', 'pipe', 'inherit'],
    cwd: '/',
  });
  let text = '';
  viewer.stdout.setEncoding('utf8').on('data', (part) => {
    text += part;
  });
  const closed = new Promise<number | null>((done) => viewer.once('close', done));
  await work(daemon, client, closed);
  assert.equal(await closed, 0);
  assert.doesNotMatch(text, /\u001b/);
  const views = text.split('\n\nvirtiofsd-ts ');
  assert.equal(views.length, 3);
  const last = views[2] as string;
  assert.match(last, /a guest is connected$/m);
  assert.match(last, /^cache {7}2 inodes that the guest knows, [01] open files$/m);
  assert.match(last, /^requests +[\d.]+k?\/s, read [\d.]+ [KM]iB\/s, written 0\.0 KiB\/s$/m);
  assert.match(last, /^events +0 watches;/m);
  const rows = [
    ...last.matchAll(/^([A-Z]+) +(\S+) +(\d+) +([\d.]+ (?:µs|ms|s)) +([\d.]+ (?:µs|ms|s)) +([\d.]+ (?:µs|ms|s)) +(\S+) +([\d,]+)$/gm),
  ];
  const of = (opcode: string) => {
    const row = rows.find(([, name]) => name === opcode);
    assert.ok(row, `${opcode} in ${last}`);
    const rate = (cell: string) => (cell.endsWith('k') ? 1e3 : 1) * Number.parseFloat(cell);
    return { rate: rate(row[2] as string), errors: rate(row[7] as string), total: Number((row[8] as string).replaceAll(',', '')) };
  };
  assert.ok(of('GETATTR').rate > 0 && of('READ').rate > 0);
  // Half of the look-ups fail; no more requests at a time than were counted in all.
  const { rate, errors, total } = of('LOOKUP');
  assert.ok(Math.abs(errors / rate - 0.5) < 0.2, last);
  assert.ok(total > rate * 0.4 * 0.5, last);
  assert.ok(total > 2 * (of('GETATTR').total * 0.8), last);
});

for (const [how, leave] of [
  ['q', (terminal: Terminal) => terminal.type('q')],
  ['Ctrl-C', (terminal: Terminal) => terminal.type('\u0003')],
] as const) {
  test(`at a terminal: refreshed in place within its size; ${how} leaves it as it was`, async () => {
    await using daemon = await TestDaemon.start([METRICS]);
    daemon.session().getattr(1);
    const command = `${PROGRAM_PATH} top unix:${daemon.folder}/metrics -i 0.2`;
    using terminal = new Terminal(`stty rows 12 cols 60; stty -g; ${command}; echo status-$?; stty -g; echo over-$((1+1))`, {
      TERM: 'xterm',
    });
    await terminal.until(/OPCODE[\s\S]*OPCODE/);
    leave(terminal);
    await terminal.until(/over-2/);
    assert.equal(await terminal.end(), 0);
    assert.match(terminal.output, /status-0/);
    const settings = [...terminal.output.matchAll(/^[0-9a-f]+(?::[0-9a-f]+)+/gm)].map(([text]) => text);
    assert.equal(settings.length, 2);
    assert.equal(settings[0], settings[1], 'the settings of the terminal');
    const [, inside = ''] = /\u001b\[\?1049h\u001b\[\?25l([\s\S]*)\u001b\[\?25h\u001b\[\?1049l/.exec(terminal.output) ?? [];
    const views = inside.split('\u001b[H').slice(1);
    assert.ok(views.length >= 2);
    for (const view of views) {
      const lines = view.replace('\u001b[J', '').split('\r\n').slice(0, -1);
      assert.ok(lines.length <= 11, view);
      for (const line of lines) assert.ok(line.replace('\u001b[K', '').length <= 60, line);
    }
  });
}

test('the daemon ends: so does the view, and says so', async () => {
  await using daemon = await TestDaemon.start([METRICS]);
  using terminal = new Terminal(`${PROGRAM_PATH} top unix:${daemon.folder}/metrics -i 0.2`, { TERM: 'xterm' });
  await terminal.until(/no guest/);
  await daemon.stop();
  assert.equal(await terminal.end(), 2);
  assert.match(terminal.output, /\u001b\[\?1049l[\s\S]*top: the daemon at unix:\S+ has ended/);
});

test('wrong use', () => {
  for (const [args, message] of [
    [[], /METRICS-ADDRESS is missing/],
    [['unix:/nonexistent/x'], /--metrics: \/nonexistent does not exist/],
    [['unix:/tmp/nobody', '-n', '0'], /top: --count=0 is no number from 1/],
    [['unix:/tmp/nobody', '-i', 'soon'], /top: --interval=soon is no number from 0.1 to 3600/],
    [['unix:/tmp/nobody'], /top: nobody answers there \(ENOENT\)/],
  ] as const) {
    const { status, stderr } = runDaemon(['top', ...args]);
    assert.equal(status, 2);
    assert.match(stderr, message);
  }
});
