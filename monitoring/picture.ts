/**
 * The picture in README.md (`make monitoring-picture`): a guest at work on a share, edits on the host, Debian's Prometheus that scrapes
 * the daemon, and the dashboard as Grafana's components draw it in Chromium (grafana/page.tsx).
 *
 *     node picture.js FOLDER FILE     FOLDER: page.js and page.css; FILE: the PNG
 */
import { execFileSync, spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { repository } from '../qemu/guest/daemon.js';
import { bootGuest, startDaemon } from '../qemu/guest.js';
import { freePort } from '../test/support/port.js';

const SECONDS = 180;
const SCRAPE = 1;

/** What a developer's guest does, again and again. */
const WORK = `cd /mnt
while :; do
  git clone -q repository copy && find copy -type f -exec cat {} + >/dev/null; ls -lR copy >/dev/null
  git -C copy status >/dev/null; rmdir repository 2>/dev/null; rm -rf copy; sleep 4
  dd if=/dev/zero of=large bs=128k count=300 conv=fsync 2>/dev/null; sync; cat large >/dev/null; rm large; sleep 6
done`;

/** Edits on the host: some at a time, more and less often. */
async function edit(share: string, signal: AbortSignal): Promise<void> {
  for (let i = 0; !signal.aborted; i++) {
    const path = join(share, 'repository', `edited${i % 20}`);
    writeFileSync(`${path}.new`, `${i}`);
    renameSync(`${path}.new`, path);
    await sleep(40 + 160 * Math.abs(Math.sin(i / 150)));
  }
}

/** Chromium without a window; `args` say what it does with the page. */
function chromium(url: string, ...args: string[]): string {
  const always = ['--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--virtual-time-budget=20000'];
  return execFileSync('chromium', [...always, ...args, url], {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'pipe'],
    timeout: 120_000,
    maxBuffer: 1e8,
  });
}

const [pages, file] = process.argv.slice(2) as [string, string];
const folder = mkdtempSync(join(tmpdir(), 'picture-'));
const share = join(folder, 'share');
const [metrics, web] = [await freePort(), await freePort()];
execFileSync('git', ['clone', '-q', '--no-hardlinks', repository, join(share, 'repository')], { stdio: 'inherit' });
const paths = execFileSync(join(repository, 'qemu/setup.sh'), ['prometheus'], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] });
const config = readFileSync(join(repository, 'monitoring/prometheus.yml'), 'utf8')
  .replace('[alerts.yml]', `[${join(repository, 'monitoring/alerts.yml')}]`)
  .replace('localhost:9808', `127.0.0.1:${metrics}`);
writeFileSync(join(folder, 'prometheus.yml'), `global: { scrape_interval: ${SCRAPE}s }\n${config}`);
const daemon = await startDaemon({ shareDir: share, tag: 'myfs', options: ['--cache=notify', `--metrics=127.0.0.1:${metrics}`] });
const prometheus = spawn(
  /^prometheus=(.*)$/m.exec(paths)?.[1] as string,
  [`--config.file=${folder}/prometheus.yml`, `--storage.tsdb.path=${folder}/data`, `--web.listen-address=127.0.0.1:${web}`],
  { stdio: 'ignore' },
);
try {
  const guest = await bootGuest({ kind: 'uml', kernel: '6.12', hostRoot: true, shares: [{ socket: daemon }] });
  const stop = new AbortController();
  const watcher = guest.spawn('exec inotifywait -m -r /mnt/repository >/dev/null');
  const work = guest.spawn(WORK);
  const edits = edit(share, stop.signal);
  await sleep(SECONDS * 1000);
  const to = Math.floor(Date.now() / 1000);
  const query = `prometheus=http://127.0.0.1:${web}&from=${to - SECONDS + 10}&to=${to}&scrape=${SCRAPE}`;
  stop.abort();
  await edits;
  work.kill();
  watcher.kill();
  await guest.poweroff();
  const url = `file://${pages}/page.html?${query}`;
  const dom = chromium(url, '--dump-dom', '--window-size=1200,2000');
  const said = /data-problems="([^"]*)"/.exec(dom)?.[1]?.replaceAll('&quot;', '"');
  if (said !== '[]') throw new Error(`the page says ${said ?? 'nothing'}`);
  const height = /data-height="(\d+)"/.exec(dom)?.[1];
  chromium(url, `--screenshot=${file}`, `--window-size=1200,${height}`);
} finally {
  prometheus.kill();
  await new Promise((done) => prometheus.once('exit', done));
  await daemon.stop();
  rmSync(folder, { recursive: true, force: true });
}
