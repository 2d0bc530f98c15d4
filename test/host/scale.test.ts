/** Many inodes in the real daemon: what they cost while they are known, and that nothing stays when they are forgotten. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Opcode } from '../../src/fuse/abi.js';
import { needsRoot, sanitized, TestDaemon } from '../support/daemon.js';
import { decodeEntry, type FuseClient, type Pending } from '../support/fuse-client.js';
import { cpuSeconds } from '../support/hostile.js';

/** A share on a tmpfs of its own, filled by a line of Python before the daemon starts. */
function filled(script: string): string[] {
  const run = 'mount -t tmpfs -o nr_inodes=0 none "$0/share" && cd "$0/share" && python3 -c "$1" && cd / && shift && exec "$@"';
  return ['unshare', '-m', 'sh', '-c', run, '{folder}', script];
}

/** Looks names up, many requests at a time; returns the nodeids. */
function lookups(client: FuseClient, names: readonly (readonly [parent: number, name: string])[]): number[] {
  const nodeids: number[] = [];
  for (let at = 0; at < names.length; at += 100) {
    const pending: Pending[] = names
      .slice(at, at + 100)
      .map(([parent, name]) => client.submit(Opcode.LOOKUP, parent, [Buffer.from(`${name}\0`)], 128));
    for (const one of pending) {
      const { error, body } = client.wait(one);
      assert.equal(error, 0);
      nodeids.push(decodeEntry(body).nodeid);
    }
  }
  return nodeids;
}

function forget(client: FuseClient, nodeids: readonly number[], nlookup = 1): void {
  for (let at = 0; at < nodeids.length; at += 500) client.batchForget(nodeids.slice(at, at + 500).map((nodeid) => ({ nodeid, nlookup })));
}

const mebibytes = (bytes: number): string => (bytes / 2 ** 20).toFixed(1);

for (const mode of ['prefer', 'never'] as const) {
  test(`100 000 inodes looked up and forgotten leave no descriptor and no memory (${mode})`, {
    ...needsRoot,
    timeout: 120_000,
  }, async () => {
    const script =
      'import os\nfor d in range(100):\n os.mkdir(f"d{d}")\n for i in range(1000): os.close(os.open(f"d{d}/f{i}", os.O_CREAT))';
    await using daemon = await TestDaemon.start([`--inode-file-handles=${mode}`], { wrapper: filled(script) });
    const client = daemon.session();
    const directories = lookups(
      client,
      Array.from({ length: 100 }, (_, d) => [1, `d${d}`]),
    );
    // What a process may open at most can be less than 100 000: then they are looked up and forgotten in parts.
    const part = mode === 'never' ? 10 : 100;
    const round = (): number => {
      let peak = 0;
      for (let d = 0; d < 100; d += part) {
        const nodeids = directories.slice(d, d + part).flatMap((parent) =>
          lookups(
            client,
            Array.from({ length: 1000 }, (_, i) => [parent, `f${i}`]),
          ),
        );
        assert.equal(new Set(nodeids).size, part * 1000);
        assert.equal(daemon.descriptors().length - descriptors, mode === 'never' ? nodeids.length : 0);
        peak = Math.max(peak, daemon.memory);
        forget(client, nodeids);
        assert.equal(daemon.descriptors().length, descriptors);
      }
      return peak;
    };
    // Before the first round, what the daemon needs once: a descriptor of each directory, memory.
    for (const parent of directories) forget(client, lookups(client, [[parent, 'f0']]));
    const descriptors = daemon.descriptors().length;
    const before = daemon.memory;
    const peak = round();
    const after = daemon.memory;
    const again = round();
    console.log(
      `${mode}: ${mebibytes(before)} MiB before, ${mebibytes(peak)} with ${part * 1000} inodes, ${mebibytes(after)} after; again ${mebibytes(again)} and ${mebibytes(daemon.memory)}`,
    );
    if (sanitized) return;
    assert.ok(peak - before < 60 << 20, 'an inode costs too much');
    assert.ok(after - before < 12 << 20, 'memory stays');
    assert.ok(daemon.memory - after < 4 << 20, 'memory grows from round to round');
  });
}

test('a million known inodes: what each costs, and a look-up as fast as before', { ...needsRoot, timeout: 240_000 }, async () => {
  // One inode by two mounts is two for the guest: 10 000 files seen through 100 mounts.
  const script = `import os,subprocess
os.mkdir("base")
for i in range(10000): os.close(os.open(f"base/f{i}", os.O_CREAT))
for m in range(100):
 os.mkdir(f"m{m}")
 subprocess.check_call(["mount", "--bind", "base", f"m{m}"])`;
  await using daemon = await TestDaemon.start([], { wrapper: filled(script) });
  const client = daemon.session({}, { timeout: 20_000 });
  const mounts = lookups(
    client,
    Array.from({ length: 100 }, (_, m) => [1, `m${m}`]),
  );
  /** Knows every file of a mount, by READDIRPLUS. */
  const learn = (parent: number): number => {
    const { fh } = client.opendir(parent);
    let known = 0;
    let offset = 0n;
    for (;;) {
      const part = client.readdirplus(parent, fh, offset, 65_536);
      if (part.length === 0) break;
      known += part.filter(({ entry }) => entry !== undefined && entry.nodeid !== 0).length;
      offset = part.at(-1)?.offset ?? 0n;
    }
    client.releasedir(parent, fh);
    return known;
  };
  let seed = 1;
  const random = (n: number): number => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return seed % n;
  };
  /** Microseconds of a look-up of any known name in the first `count` mounts, the best of some rounds. */
  const lookupTime = (count: number): number => {
    let best = Number.POSITIVE_INFINITY;
    for (let round = 0; round < 5; round++) {
      const names = Array.from({ length: 4000 }, () => [mounts[random(count)] as number, `f${random(10_000)}`] as const);
      const began = performance.now();
      lookups(client, names);
      best = Math.min(best, ((performance.now() - began) * 1000) / names.length);
    }
    return best;
  };
  assert.equal(learn(mounts[0] as number), 10_000);
  lookupTime(1);
  const few = lookupTime(1);
  const before = daemon.memory;
  for (const mount of mounts.slice(1)) assert.equal(learn(mount), 10_000);
  const each = (daemon.memory - before) / 990_000;
  const many = lookupTime(100);
  console.log(
    `a million inodes: ${mebibytes(daemon.memory)} MiB, ${each.toFixed(0)} bytes each (goal 300); LOOKUP through the queue ${few.toFixed(1)} µs among 10^4, ${many.toFixed(1)} µs among 10^6 known inodes`,
  );
  assert.ok(sanitized || each < 300, `${each} bytes an inode`);
  assert.ok(many < 5 * few + 20, `${few} and ${many} µs`);
  // A session that ends forgets all of them, at once: whoever comes next waits for that.
  const used = cpuSeconds(daemon);
  const began = performance.now();
  client.destroy();
  client.init();
  const pause = performance.now() - began;
  const seconds = cpuSeconds(daemon) - used;
  console.log(`letting go of a million inodes: ${pause.toFixed(0)} ms, ${seconds.toFixed(2)} s of the processor`);
  assert.ok(sanitized || seconds < 1, `${seconds} s`);
  assert.ok(sanitized || daemon.memory - before < 12 << 20, 'memory stays');
  assert.equal(client.lookup(1, 'm0').attr.mode & 0o170000, 0o040000);
});
