/** The thread that serves metrics over HTTP: GET /metrics, at a Unix socket or a TCP port. Started by `server.ts`. */
import { lstatSync, unlinkSync } from 'node:fs';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import { workerData } from 'node:worker_threads';
import type { MetricsAddress } from '../config.js';
import { REPORT_BYTES, Report, State, type ThreadData } from './server.js';

const { address, report, ...source } = workerData as ThreadData;

/** prom-client takes as long to load as the whole start of the daemon, so it comes after the socket. */
const registry = async () => (await import('./prometheus.js')).registryOf(source);
let loaded: ReturnType<typeof registry> | undefined;

const server = createServer((request, response) => {
  answer(request, response).catch((error) => {
    response.statusCode = 500;
    response.end(`${error}\n`);
  });
});
// Scrapers are few; whoever else finds the port cannot pile up connections.
server.maxConnections = 32;

server.on('listening', () => {
  const bound = server.address() as AddressInfo | string;
  tell(State.listening, typeof bound === 'string' ? 0 : bound.port);
  loaded = registry();
});

let cleaned = false;
server.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EADDRINUSE' && 'path' in address && !cleaned) {
    cleaned = true;
    replaceStale(address.path, error);
  } else {
    fail(error);
  }
});

listen();

function listen(): void {
  try {
    server.listen('path' in address ? { path: address.path } : { host: address.host, port: address.port });
  } catch (error) {
    fail(error as Error);
  }
}

/** A socket that nobody listens on is left from a daemon that was killed: it is replaced. Anything else stays. */
function replaceStale(path: string, reason: Error): void {
  if (!lstatSync(path, { throwIfNoEntry: false })?.isSocket()) {
    fail(reason);
    return;
  }
  const probe = connect(path);
  probe.on('connect', () => {
    probe.destroy();
    fail(reason);
  });
  probe.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'ECONNREFUSED') {
      fail(reason);
      return;
    }
    unlinkSync(path);
    listen();
  });
}

async function answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const path = request.url?.replace(/\?.*/s, '');
  if (path !== '/metrics') {
    response.statusCode = 404;
    response.end('not found: the metrics are at /metrics\n');
    return;
  }
  if (request.method !== 'GET' && request.method !== 'HEAD') {
    response.statusCode = 405;
    response.setHeader('Allow', 'GET, HEAD');
    response.end();
    return;
  }
  loaded ??= registry();
  const metrics = await loaded;
  const text = await metrics.metrics();
  response.setHeader('Content-Type', metrics.contentType);
  response.end(text);
}

function name(address: MetricsAddress): string {
  if ('path' in address) return `unix:${address.path}`;
  return address.host.includes(':') ? `[${address.host}]:${address.port}` : `${address.host}:${address.port}`;
}

function fail(error: NodeJS.ErrnoException): void {
  const reason = error.code === 'EADDRINUSE' ? 'it is in use already' : (error.code ?? error.message);
  tell(State.failed, 0, `metrics cannot be served at ${name(address)}: ${reason}`);
  server.close();
}

function tell(state: number, port: number, message = ''): void {
  const words = new Int32Array(report, 0, Report.words);
  const room = new Uint8Array(report, 4 * Report.words, REPORT_BYTES - 4 * Report.words);
  words[Report.port] = port;
  words[Report.length] = new TextEncoder().encodeInto(message, room).written;
  Atomics.store(words, Report.state, state);
  Atomics.notify(words, Report.state);
}
