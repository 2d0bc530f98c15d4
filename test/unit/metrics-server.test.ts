import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { request } from 'node:http';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { BUCKET_BOUNDS, HotMetrics, SCALARS, Slot } from '../../src/metrics/hot.js';
import { registryOf } from '../../src/metrics/prometheus.js';
import { MetricsServer } from '../../src/metrics/server.js';

const OPCODES = ['LOOKUP', 'READ', 'WRITE'];
const directory = mkdtempSync(join(tmpdir(), 'metrics-'));
after(() => rmSync(directory, { recursive: true }));

function source(...blocks: HotMetrics[]) {
  return { buffers: blocks.map((block) => block.buffer), opcodes: OPCODES, version: '1.2.3' };
}

/** The samples of a text of metrics: `name{labels}` and the value. */
function samples(text: string): Map<string, number> {
  const lines = text.split('\n').filter((line) => line !== '' && !line.startsWith('#'));
  return new Map(lines.map((line) => [line.slice(0, line.lastIndexOf(' ')), Number(line.slice(line.lastIndexOf(' ') + 1))]));
}

interface Reply {
  status: number | undefined;
  type: string | undefined;
  body: string;
}

function get(where: { socketPath: string } | { port: number }, path = '/metrics', method = 'GET'): Promise<Reply> {
  return new Promise((resolve, reject) => {
    const call = request({ ...where, path, method, agent: false }, (response) => {
      let body = '';
      response.setEncoding('utf8');
      response.on('data', (chunk) => {
        body += chunk;
      });
      response.on('end', () => resolve({ status: response.statusCode, type: response.headers['content-type'], body }));
    });
    call.on('error', reject);
    call.end();
  });
}

test('requests, errors and times come by opcode', async () => {
  const hot = new HotMetrics(OPCODES.length);
  hot.record(0, 2, 300);
  hot.record(0, 0, 700);
  hot.record(1, 0, 5e9);
  const found = samples(await registryOf(source(hot)).metrics());
  assert.equal(found.get('virtiofsd_requests_total{opcode="LOOKUP"}'), 2);
  assert.equal(found.get('virtiofsd_requests_total{opcode="READ"}'), 1);
  assert.equal(found.has('virtiofsd_requests_total{opcode="WRITE"}'), false, 'what never came is not listed');
  assert.equal(found.get('virtiofsd_request_errors_total{opcode="LOOKUP",errno="ENOENT"}'), 1);
  const bucket = (opcode: string, le: number | string) =>
    found.get(`virtiofsd_request_duration_seconds_bucket{opcode="${opcode}",le="${le}"}`);
  assert.deepEqual(
    BUCKET_BOUNDS.slice(0, 4).map((bound) => bucket('LOOKUP', bound)),
    [0, 1, 2, 2],
    'buckets are cumulative',
  );
  assert.equal(bucket('READ', BUCKET_BOUNDS.at(-1) as number), 0);
  assert.equal(bucket('READ', '+Inf'), 1);
  assert.equal(found.get('virtiofsd_request_duration_seconds_sum{opcode="READ"}'), 5);
  assert.equal(found.get('virtiofsd_request_duration_seconds_count{opcode="LOOKUP"}'), 2);
});

test('every scalar has its metric, blocks are added up, and a second scrape counts nothing twice', async () => {
  const [one, two] = [new HotMetrics(OPCODES.length), new HotMetrics(OPCODES.length)];
  SCALARS.forEach((_, slot) => {
    one.values[slot] = 10 + slot;
    two.values[slot] = 1000;
  });
  one.record(0, 5, 1);
  two.record(0, 5, 1);
  const registry = registryOf(source(one, two));
  await registry.metrics();
  const text = await registry.metrics();
  const found = samples(text);
  SCALARS.forEach(({ name, type }, slot) => {
    assert.equal(found.get(`virtiofsd_${name}`), 1010 + slot, name);
    assert.match(text, new RegExp(`^# TYPE virtiofsd_${name} ${type}$`, 'm'));
    assert.equal(name.endsWith('_total'), type === 'counter', `${name}: counters, and only they, end in _total`);
  });
  assert.equal(found.get('virtiofsd_request_errors_total{opcode="LOOKUP",errno="EIO"}'), 2);
});

test('the process is described', async () => {
  const found = samples(await registryOf(source()).metrics());
  assert.equal(found.get(`virtiofsd_build_info{version="1.2.3",node_version="${process.version}"}`), 1);
  assert.ok((found.get('process_resident_memory_bytes') ?? 0) > 1e7);
  assert.ok((found.get('process_virtual_memory_bytes') ?? 0) > 1e7);
  assert.ok((found.get('process_cpu_seconds_total') ?? 0) > 0);
  assert.ok((found.get('process_max_fds') ?? 0) > 0);
  assert.ok(Math.abs((found.get('process_start_time_seconds') ?? 0) - Date.now() / 1000) < 600);
});

test('served at a Unix socket: /metrics, 404 for other paths, 405 for other methods; the socket goes at the end', async () => {
  const hot = new HotMetrics(OPCODES.length);
  const path = join(directory, 'a.sock');
  const server = new MetricsServer({ path }, source(hot));
  assert.equal(server.ready(), 0);
  hot.values[Slot.inodes] = 7;
  const reply = await get({ socketPath: path });
  assert.equal(reply.status, 200);
  assert.match(reply.type ?? '', /^text\/plain; version=0\.0\.4/);
  assert.equal(samples(reply.body).get('virtiofsd_inodes'), 7);
  hot.values[Slot.inodes] = 8;
  assert.equal(samples((await get({ socketPath: path }, '/metrics?x=1')).body).get('virtiofsd_inodes'), 8);
  assert.equal((await get({ socketPath: path }, '/')).status, 404);
  assert.equal((await get({ socketPath: path }, '/metrics', 'POST')).status, 405);
  assert.equal((await get({ socketPath: path }, '/metrics', 'HEAD')).body, '');
  server.close();
  assert.equal(existsSync(path), false);
});

test('served at a TCP port', async () => {
  const server = new MetricsServer({ host: '127.0.0.1', port: 0 }, source(new HotMetrics(OPCODES.length)));
  const port = server.ready();
  assert.ok(port > 0);
  assert.equal((await get({ port })).status, 200);
  server.close();
});

test('served while the thread that counts is blocked', () => {
  const hot = new HotMetrics(OPCODES.length);
  const path = join(directory, 'blocked.sock');
  const server = new MetricsServer({ path }, source(hot));
  server.ready();
  hot.values[Slot.kicks] = 42;
  const client = `
    require('node:http').get({ socketPath: ${JSON.stringify(path)}, path: '/metrics' }, (response) => response.pipe(process.stdout));
  `;
  // execFileSync blocks this thread until the client has its answer.
  const text = execFileSync(process.execPath, ['-e', client], { encoding: 'utf8', timeout: 20_000 });
  assert.equal(samples(text).get('virtiofsd_kicks_total'), 42);
  server.close();
});

test('an address that cannot be bound is told at the start', async () => {
  const failure = (address: ConstructorParameters<typeof MetricsServer>[0]) => {
    const server = new MetricsServer(address, source());
    try {
      server.ready();
      return undefined;
    } catch (error) {
      return (error as Error).message;
    } finally {
      server.close();
    }
  };
  const path = join(directory, 'taken.sock');
  const other = createServer();
  await new Promise<void>((resolve) => other.listen(path, resolve));
  assert.equal(failure({ path }), `metrics cannot be served at unix:${path}: it is in use already`);
  assert.ok(existsSync(path), "another's socket stays");
  other.close();
  const file = join(directory, 'file');
  writeFileSync(file, 'precious');
  assert.equal(failure({ path: file }), `metrics cannot be served at unix:${file}: it is in use already`);
  assert.ok(existsSync(file));
  assert.equal(failure({ path: join(directory, 'none', 'x') }), `metrics cannot be served at unix:${directory}/none/x: EACCES`);
  assert.equal(failure({ host: '192.0.2.1', port: 9 }), 'metrics cannot be served at 192.0.2.1:9: EADDRNOTAVAIL');
});

test('a socket left behind by a killed daemon is replaced', async () => {
  const path = join(directory, 'stale.sock');
  const leave = `require('node:net').createServer().listen(${JSON.stringify(path)}, () => process.kill(process.pid, 'SIGKILL'))`;
  assert.throws(() => execFileSync(process.execPath, ['-e', leave]));
  assert.ok(existsSync(path));
  const server = new MetricsServer({ path }, source());
  server.ready();
  assert.equal((await get({ socketPath: path })).status, 200);
  server.close();
});
