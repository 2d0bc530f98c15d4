/** The thread that serves metrics (GET /metrics) and file events (GET /events) over HTTP, at a Unix socket or a TCP port. Started by `server.ts`. */
import { lstatSync, unlinkSync, writeSync } from 'node:fs';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import { workerData } from 'node:worker_threads';
import type { MetricsAddress } from '../config.js';
import { FeedReader } from '../watch/feed.js';
import { type FeedEnd, REPORT_BYTES, Report, State, type ThreadData } from './server.js';

const { address, report, feed, socket, ...source } = workerData as ThreadData;

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
  const bound = server.address() as AddressInfo | string | null;
  const port = typeof bound === 'string' ? 0 : (bound?.port ?? 0);
  tell(State.listening, port);
  loaded = registry();
  loaded.then(
    () => tell(State.loaded, port),
    () => {}, // told to who asks for metrics
  );
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
    if (socket !== undefined) server.listen({ fd: socket });
    else server.listen('path' in address ? { path: address.path } : { host: address.host, port: address.port });
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
  if (path === '/events' && feed !== undefined) {
    await stream(response, feed);
    return;
  }
  if (path !== '/metrics') {
    response.statusCode = 404;
    response.end('not found: the metrics are at /metrics, file events (unless --fsnotify=off) at /events\n');
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

/** Lines of JSON for as long as the reader listens. */
async function stream(response: ServerResponse, { buffer, wake }: FeedEnd): Promise<void> {
  const reader = new FeedReader(buffer);
  response.on('close', () => reader.close());
  response.setHeader('Content-Type', 'application/x-ndjson');
  response.flushHeaders();
  writeSync(wake, new BigUint64Array([1n]));
  for (let lines = await reader.next(); lines !== undefined; lines = await reader.next()) {
    // A reader that stops reading stops here too, and is told what it lost when it goes on.
    if (!response.write(lines)) await new Promise((resolve) => response.once('drain', resolve).once('close', resolve));
  }
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
