/** The README's example device and driver, taken from its page and run as they stand. */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { after, afterEach, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { VhostUserFrontend } from 'vhost-user-ts';
import { MockDriver, type QueueDriver } from 'vhost-user-ts/testing';

const here = dirname(fileURLToPath(import.meta.url));
const readme = fileURLToPath(import.meta.resolve('vhost-user-ts').replace('dist/index.js', 'README.md'));
const [blockSource, readSource] = [...readFileSync(readme, 'utf8').matchAll(/```js\n(.*?)```/gs)].map((match) => match[1]) as [
  string,
  string,
];

// Beside the compiled test, so that `vhost-user-ts` is found from there.
const folder = mkdtempSync(join(here, 'example-'));
const [blockScript, readScript, disk] = ['block.mjs', 'read.mjs', 'disk.img'].map((name) => join(folder, name)) as [string, string, string];
// A socket's path has 108 bytes at most: the device runs in the folder.
const socket = 'block.sock';

const IN = 0;
const OUT = 1;
const FLUSH = 4;

let device: ChildProcess;

before(() => {
  writeFileSync(blockScript, blockSource);
  writeFileSync(readScript, readSource);
});

after(() => rmSync(folder, { recursive: true, force: true }));

afterEach(async () => {
  if (device.exitCode === null && device.signalCode === null) {
    device.kill();
    await once(device, 'exit');
  }
});

async function startDevice(content: Buffer): Promise<void> {
  writeFileSync(disk, content);
  rmSync(join(folder, socket), { force: true });
  device = spawn(process.execPath, [blockScript, socket, disk], { cwd: folder, stdio: ['ignore', 'inherit', 'inherit'] });
  for (let i = 0; i < 500 && !existsSync(join(folder, socket)); i++) await sleep(10);
  await sleep(20); // it exists from bind(2) on; listen(2) follows
}

/** A request of struct virtio_blk_req; returns its status and the data read. */
function request(driver: MockDriver, type: number, sector: number, data: Buffer | number): { status: number; used: number; data: Buffer } {
  const queue = driver.queues[0] as QueueDriver;
  const { memory } = driver;
  const header = memory.allocate(16);
  memory.view(header, 16).writeUInt32LE(type, 0);
  memory.view(header, 16).writeBigUInt64LE(BigInt(sector), 8);
  const length = typeof data === 'number' ? data : data.length;
  const buffer = memory.allocate(Math.max(1, length));
  if (typeof data !== 'number') memory.write(buffer, data);
  const status = memory.allocate(1);
  memory.write(status, Buffer.of(0xff));
  const segments = length === 0 ? [] : [{ address: buffer, length }];
  const readable = [{ address: header, length: 16 }, ...(typeof data === 'number' ? [] : segments)];
  const writable = [...(typeof data === 'number' ? segments : []), { address: status, length: 1 }];
  queue.send(readable, writable, true);
  const [used] = queue.collectAll(1);
  return { status: memory.read(status, 1)[0] as number, used: used?.length ?? 0, data: memory.read(buffer, length) };
}

describe('the README’s block device', () => {
  it('reads, writes and flushes, and refuses what it cannot do', async () => {
    await startDevice(Buffer.alloc(64 * 512, 'sectors '));
    process.chdir(folder);
    const driver = new MockDriver(VhostUserFrontend.connect(socket), { queues: 1, order: 'qemu' }).start();
    assert.equal(Buffer.from(driver.frontend.getConfig(0, 60)).readBigUInt64LE(), 64n);

    const read = request(driver, IN, 1, 1024);
    assert.deepEqual([read.status, read.used, read.data.toString('latin1', 0, 16)], [0, 1025, 'sectors sectors ']);

    const text = Buffer.alloc(4096, 'written ');
    assert.equal(request(driver, OUT, 8, text).status, 0);
    assert.equal(request(driver, FLUSH, 0, 0).status, 0);
    assert.deepEqual(request(driver, IN, 8, 4096).data, text);
    assert.deepEqual(readFileSync(disk).subarray(8 * 512, 16 * 512), text);

    assert.equal(request(driver, IN, 64, 512).status, 1, 'beyond the end');
    assert.equal(request(driver, OUT, 63, Buffer.alloc(1024)).status, 1);
    assert.equal(request(driver, IN, 2 ** 50, 512).status, 1);
    assert.equal(request(driver, 99, 0, 0).status, 2, 'unknown');

    driver.close();
    const [code] = await once(device, 'exit');
    assert.equal(code, 0);
  });

  it('stops its queue for a hostile driver, and lives on', async () => {
    await startDevice(Buffer.alloc(512, 'x'));
    process.chdir(folder);
    const driver = new MockDriver(VhostUserFrontend.connect(socket), { queues: 1 }).start();
    const queue = driver.queues[0] as QueueDriver;
    queue.setDescriptor(0, { address: 2n ** 63n, length: 16 });
    queue.sendRaw(0);
    for (let i = 0; i < 200 && queue.takeErrors() === 0; i++) await sleep(10);
    driver.stop();
    queue.reset();
    driver.placeQueue(queue, 0);
    driver.frontend.setVringKick(0, queue.kickFd);
    driver.frontend.setVringEnable(0, true);
    assert.equal(request(driver, IN, 0, 512).data.toString(), 'x'.repeat(512));
    driver.close();
  });

  it('is read by the README’s driver', async () => {
    await startDevice(Buffer.concat([Buffer.from('first line\nsecond line\n'), Buffer.alloc(512)]));
    const output = execFileSync(process.execPath, [readScript, socket], { cwd: folder, encoding: 'utf8' });
    assert.equal(output, '513 0\nfirst line\n');
  });
});
