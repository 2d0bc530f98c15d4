/** The add-on's lifetimes, each in a process of its own: buffers, threads, signals, descriptors, and ends at bad moments. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';

const child = fileURLToPath(new URL('../support/native-child.js', import.meta.url));

/**
 * Under the address sanitizer (make asan) what the add-on does not give back is an error, too. V8 leaves things behind at
 * process.exit(), so only what the add-on asked for itself counts.
 */
const asan = process.env['ASAN_OPTIONS'];
const env = asan === undefined ? process.env : { ...process.env, ASAN_OPTIONS: `${asan}:detect_leaks=1`, LSAN_OPTIONS: 'exitcode=0' };
const OUR_LEAK = /#[0-3] .*addon\.node/;

function run(scenario: string, status = 0): void {
  const { stdout, stderr, ...end } = spawnSync(process.execPath, ['--no-warnings', '--expose-gc', child, scenario], {
    encoding: 'utf8',
    timeout: 60_000,
    cwd: '/',
    env,
  });
  assert.deepEqual({ status: end.status, signal: end.signal }, { status, signal: null }, `${scenario}: ${stdout}${stderr}`);
  if (status === 0) assert.match(stdout, new RegExp(`${scenario}: done`));
  assert.doesNotMatch(stderr, /ERROR: AddressSanitizer/);
  assert.doesNotMatch(stderr, OUR_LEAK);
}

const SCENARIOS: readonly (readonly [name: string, what: string, status?: number])[] = [
  ['detached', 'a buffer used after regionUnmap is detached'],
  ['collected', 'buffers without holders are collected before and after their region'],
  ['bounds', 'nothing outside a region or its file'],
  ['exit', 'process.exit() with jobs in flight', 3],
  ['end', 'the end of the program with jobs in flight'],
  ['exception', 'an uncaught exception with jobs in flight', 4],
  ['stop', 'the pool is stopped with jobs in flight, and another started'],
  ['threads', 'threads end with a pool running'],
  ['environments', 'several environments at a time'],
  ['sigbus', 'a truncated file under a mapping is survived and reported'],
  ['sigbusInJob', 'a job into lost memory ends with EFAULT'],
  ['signals', 'signals arrive in an eventfd'],
  ['descriptors', 'recvmsg closes surplus descriptors'],
];

for (const [name, what, status] of SCENARIOS) test(what, () => run(name, status));

test('the sanitizer is there when it is asked for', { skip: asan === undefined }, () => run('sanitized'));
