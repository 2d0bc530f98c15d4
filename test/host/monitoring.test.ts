/** monitoring/ in Debian's Prometheus, which scrapes a daemon at work: the alerts, and data for each query of the dashboard. */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Feature, features } from 'vhost-user-ts';
import { repository } from '../../qemu/guest/daemon.js';
import { InitFlag2 } from '../../src/fuse/abi.js';
import { FS_CREATE } from '../../src/watch/mask.js';
import { TestDaemon } from '../support/daemon.js';
import { errnoOf, FuseClient, LINUX_INIT_FLAGS2 } from '../support/fuse-client.js';
import { freePort } from '../support/port.js';

const MONITORING = join(repository, 'monitoring');
const folder = mkdtempSync(join(tmpdir(), 'monitoring-'));
after(() => rmSync(folder, { recursive: true, force: true }));

let prometheus = '';
let promtool = '';
before(() => {
  const paths = execFileSync(join(repository, 'qemu/setup.sh'), ['prometheus'], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] });
  prometheus = /^prometheus=(.*)$/m.exec(paths)?.[1] as string;
  promtool = /^promtool=(.*)$/m.exec(paths)?.[1] as string;
});

const check = (...args: string[]) => execFileSync(promtool, args, { encoding: 'utf8', cwd: MONITORING, stdio: 'pipe' });

test('promtool: rules and configuration are right, each alert comes and only when it should', () => {
  assert.match(check('check', 'rules', 'alerts.yml'), /SUCCESS: 9 rules found/);
  assert.match(check('check', 'config', 'prometheus.yml'), /SUCCESS/);
  assert.match(check('test', 'rules', 'alerts.test.yml'), /SUCCESS/);
  const rules = readFileSync(join(MONITORING, 'alerts.yml'), 'utf8');
  const tests = readFileSync(join(MONITORING, 'alerts.test.yml'), 'utf8');
  for (const [, name] of rules.matchAll(/- alert: (\w+)/g)) assert.match(tests, new RegExp(`- alertname: ${name}\\n`), name);
});

/** What TypeScript says about a dashboard by Grafana's types. */
function complaints(dashboard: string): string {
  const file = join(folder, 'dashboard.ts');
  const type = `import type { CheckedDashboard } from '${join(MONITORING, 'schema.ts')}';`;
  writeFileSync(file, `${type}\nexport const dashboard: CheckedDashboard = ${dashboard};\n`);
  const options = ['--ignoreConfig', '--noEmit', '--strict', '--skipLibCheck', '--module', 'nodenext', '--allowImportingTsExtensions'];
  const compiler = join(repository, 'node_modules/typescript/bin/tsc');
  return spawnSync(process.execPath, [compiler, ...options, '--types', '', file], { encoding: 'utf8' }).stdout;
}

test("the dashboard is right by Grafana's types", () => {
  const dashboard = readFileSync(join(MONITORING, 'dashboard.json'), 'utf8');
  assert.equal(complaints(dashboard), '');
  for (const [right, wrong, says] of [
    ['"lineWidth"', '"linewidth"', /"linewidth"' does not exist/],
    ['"drawStyle": "line"', '"drawStyle": "curve"', /"curve"/],
    ['"fillOpacity": 10', '"fillOpacity": "10"', /'string' is not assignable to type 'number'/],
    ['"placement": "bottom"', '"placement": "left"', /"left"/],
    ['"gridPos"', '"gridpos"', /"gridpos"' does not exist/],
    ['"refresh": 2', '"refresh": 7', /7/],
    ['"type": "timeseries"', '"type": "graph"', /"graph"/],
  ] as const) {
    assert.ok(dashboard.includes(right), right);
    assert.match(complaints(dashboard.replace(right, wrong)), says);
  }
});

const SECONDS = 12;

interface Panel {
  title: string;
  fieldConfig: { defaults: { unit: string } };
  targets: { expr: string; legendFormat: string }[];
}

interface Result {
  metric: Record<string, string>;
  value: [number, string];
}

test('each query of the dashboard has data about a daemon at work; the alerts are loaded', { timeout: 240_000 }, async () => {
  const port = await freePort();
  await using daemon = await TestDaemon.start([`--metrics=127.0.0.1:${port}`]);
  const web = await freePort();
  const config = readFileSync(join(MONITORING, 'prometheus.yml'), 'utf8')
    .replace('[alerts.yml]', `[${join(MONITORING, 'alerts.yml')}]`)
    .replace('localhost:9808', `127.0.0.1:${port}`);
  writeFileSync(join(folder, 'prometheus.yml'), `global: { scrape_interval: 500ms, evaluation_interval: 500ms }\n${config}`);
  const server: ChildProcess = spawn(
    prometheus,
    [`--config.file=${folder}/prometheus.yml`, `--storage.tsdb.path=${folder}/data`, `--web.listen-address=127.0.0.1:${web}`],
    { stdio: 'ignore', cwd: folder },
  );
  const api = async <T>(path: string): Promise<T> => {
    const response = await fetch(`http://127.0.0.1:${web}/api/v1/${path}`);
    const answer = (await response.json()) as { status: string; data: T; error?: string };
    assert.equal(answer.status, 'success', answer.error);
    return answer.data;
  };
  const query = (text: string) => api<{ result: Result[] }>(`query?query=${encodeURIComponent(text)}`).then(({ result }) => result);
  try {
    const client = FuseClient.connect(daemon.socket, { features: ~features(Feature.LOG_ALL), queues: 3 });
    client.init({ flags2: LINUX_INIT_FLAGS2 | InitFlag2.HAS_FSNOTIFY });
    let round = 0;
    /** Requests of many kinds, changes on the host that the guest is told of, an error. */
    const work = (): void => {
      const name = `file${round++}`;
      const { entry, open } = client.create(1, name, 2);
      client.write(entry.nodeid, open.fh, 0, Buffer.alloc(5000));
      client.read(entry.nodeid, open.fh, 0, 5000);
      client.release(entry.nodeid, open.fh);
      client.getattr(1);
      errnoOf(() => client.lookup(1, 'missing'));
      client.fsnotify(1, FS_CREATE);
      writeFileSync(join(daemon.share, `host${round}`), '');
      client.takeNotifications(1);
    };
    client.lendNotificationBuffers(64);
    const begin = performance.now();
    for (let now = begin; now < begin + SECONDS * 1000; now = performance.now()) {
      // More and less of it.
      for (let i = 0; i < 1 + 8 * Math.abs(Math.sin((now - begin) / 9000)); i++) work();
      await sleep(5);
    }
    const { panels } = JSON.parse(readFileSync(join(MONITORING, 'dashboard.json'), 'utf8')) as { panels: Panel[] };
    assert.ok(panels.length >= 10);
    for (const { title, targets } of panels) {
      for (const { expr, legendFormat } of targets) {
        const result = await query(expr.replaceAll('$instance', '.*').replaceAll('$__rate_interval', '5s'));
        assert.ok(result.length > 0, `${title}: ${expr}`);
        // An opcode without a request in between has no mean.
        assert.ok(
          result.some(({ value }) => Number.isFinite(Number(value[1]))),
          `${title}: ${expr}`,
        );
        for (const { metric } of result) {
          for (const [, label] of legendFormat.matchAll(/\{\{(\w+)\}\}/g)) assert.ok(metric[label as string], `${title}: ${legendFormat}`);
        }
      }
    }
    const [created] = await query('sum(rate(virtiofsd_requests_total{opcode="CREATE"}[5s]))');
    assert.ok(Number(created?.value[1]) > 0);
    const [sent] = await query('virtiofsd_fsnotify_records_total');
    assert.ok(Number(sent?.value[1]) > 0);
    const { groups } = await api<{ groups: { rules: { name: string; health: string; state: string }[] }[] }>('rules');
    const alerts = groups.flatMap(({ rules }) => rules);
    assert.equal(alerts.length, 9);
    assert.deepEqual(
      alerts.filter(({ health, state }) => health !== 'ok' || state !== 'inactive'),
      [],
    );
    client.close();
    await daemon.stop();
    for (const deadline = performance.now() + 20_000; ; await sleep(100)) {
      const now = (await api<{ groups: { rules: { name: string; state: string }[] }[] }>('rules')).groups[0]?.rules;
      if (now?.find(({ name }) => name === 'VirtiofsdDown')?.state === 'pending') break;
      assert.ok(performance.now() < deadline, 'the alert about a daemon that is gone');
    }
  } finally {
    server.kill();
    await new Promise((done) => server.once('exit', done));
  }
});
