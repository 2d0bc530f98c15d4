/** A real guest at work while the daemon's workers are killed and replaced: no program notices. */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { workersOf } from '../support/daemon.js';
import { type Setup, setUp } from '../support/guests.js';

/** How much longer than in `make test`. */
const TIMES = Number(process.env['RESTART_TIMES'] ?? 1);

const FIO = [
  'fio --name=rand --directory=/mnt --size=16m --rw=randwrite --bs=4k --ioengine=psync --verify=crc32c --do_verify=1 --end_fsync=1',
  'fio --name=direct --directory=/mnt --size=8m --rw=randwrite --bs=16k --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --do_verify=1',
  'fio --name=jobs --directory=/mnt --size=6m --numjobs=4 --rw=randrw --bs=8k --ioengine=psync --fsync=32 --verify=crc32c --do_verify=1',
];
/** Names made, changed and removed, each step looked at; and the end of a file, to which every line must have come once. */
const NAMES = `set -e; cd /mnt; : > log; exec 9>>log; i=0; end=$(($(date +%s) + 10))
while [ $(date +%s) -lt $end ]; do i=$((i + 1))
  mkdir d$i; echo one > d$i/f; echo two >> d$i/f; mv d$i/f d$i/g; ln d$i/g d$i/h; ln -s g d$i/s
  [ "$(cat d$i/s)" = "one
two" ]; rm d$i/g; [ -f d$i/h ]; rm d$i/h d$i/s; rmdir d$i; echo $i >&9
done
[ "$(cat log)" = "$(seq $i)" ]; echo $i rounds`;

/** Kills a worker a second after it has begun to serve, or has it replaced, until it is stopped. */
class Trouble {
  readonly pauses: number[] = [];
  #running = true;
  readonly #done: Promise<void>;

  constructor({ daemon }: Setup, replace: boolean) {
    this.#done = this.#make(daemon, replace);
  }

  async #make(daemon: Setup['daemon'], replace: boolean): Promise<void> {
    for (let last = ''; this.#running; await sleep(1000)) {
      const [worker] = workersOf(daemon.pid);
      if (worker === undefined) continue;
      process.kill(replace ? daemon.pid : worker, replace ? 'SIGUSR2' : 'SIGKILL');
      for (const end = performance.now() + 30_000; ; await sleep(10)) {
        assert.ok(performance.now() < end, daemon.log.join('\n'));
        const line = daemon.log.findLast((text) => text.includes('the guest goes on after'));
        if (line === undefined || line === last) continue;
        last = line;
        this.pauses.push(Number(/after (\d+) ms/.exec(line)?.[1]));
        break;
      }
    }
  }

  async stop(): Promise<void> {
    this.#running = false;
    await this.#done;
    this.pauses.sort((a, b) => a - b);
  }
}

describe('workers end under a guest', () => {
  for (const [name, daemonOptions, replace] of [
    ['killed', [], false],
    ['killed: writeback, direct I/O', ['--cache=always', '--writeback', '--allow-direct-io'], false],
    ['replaced', ['--allow-direct-io'], true],
  ] as const) {
    it(name, { timeout: 600_000 * TIMES }, async (t) => {
      const setup = await setUp({ kind: 'uml', kernel: '6.12', hostRoot: true, memoryMiB: 256, daemonOptions: [...daemonOptions] });
      try {
        for (let round = 0; round < TIMES; round++) {
          const trouble = new Trouble(setup, replace);
          for (const command of [...FIO, NAMES]) {
            const { status, stdout, stderr } = await setup.guest.run(command, { timeoutMs: 300_000 });
            assert.equal(status, 0, `${command}\n${stdout}\n${stderr}\n${setup.daemon.log.join('\n')}`);
          }
          await trouble.stop();
          const { pauses } = trouble;
          t.diagnostic(`${pauses.length} times, median pause ${pauses[pauses.length >> 1]} ms, longest ${pauses.at(-1)} ms`);
          assert.ok(pauses.length > 3);
          // Nothing but the machine's other work makes a pause long.
          assert.ok((pauses[0] as number) < 2000, String(pauses));
        }
        // All of it again, with nothing in the guest's cache.
        await setup.guest.unmount('/mnt');
        await setup.guest.mount('myfs', '/mnt');
        for (const command of FIO) {
          const { status, stdout } = await setup.guest.run(`${command} --verify_only`, { timeoutMs: 300_000 });
          assert.equal(status, 0, `${command}\n${stdout}`);
        }
      } finally {
        await setup.end();
      }
    });
  }
});
