/**
 * Faults of a host that cannot be had on the machine that the tests run on: its clock set, its sleep, its disks failing, full, with
 * quotas. Here the host is virtual, and has no guest but the tests' mock one: User Mode Linux, Debian's ready-made one with device
 * mapper and quotas, whose files are this machine's. The daemon runs in it as on any other host, in its default sandbox; so do the tests
 * of test/machine.
 */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { bootGuest, type Guest } from '../../qemu/guest.js';
import { RESUMED, SUSPENDS } from '../support/virtual-host-sleep.js';

const repository = fileURLToPath(new URL('../../../../', import.meta.url));

/** Processor time that a process has used. */
const cpuTime = (pid: number) => readFileSync(`/proc/${pid}/stat`, 'utf8').split(' ').slice(13, 15).join();

describe('faults of a virtual host', () => {
  let host: Guest;
  let asleep = false;

  /** Wakes it two seconds after it has come to rest, and again if that was too soon. */
  async function wake(): Promise<void> {
    for (let still = 0, last = ''; asleep; await sleep(250)) {
      const now = cpuTime(host.pid);
      still = now === last ? still + 1 : 0;
      last = now;
      if (still > 0 && still % 8 === 0) process.kill(host.pid, 'SIGUSR1');
    }
  }

  before(async () => {
    execFileSync(`${repository}qemu/setup.sh`, ['packages', "for the virtual host's disks", 'dmsetup', 'e2fsprogs', 'quota'], {
      stdio: ['ignore', 2, 2],
    });
    host = await bootGuest({
      kind: 'uml',
      kernel: 'debian',
      hostRoot: true,
      memoryMiB: 768,
      modules: ['loop', 'dm_mod', 'quota_v2'],
      onConsole(line) {
        if (line.includes(RESUMED)) asleep = false;
        else if (line.includes(SUSPENDS) && !asleep) {
          asleep = true;
          void wake();
        }
      },
    });
    // Its /tmp is its own, and hides this tree when that is below the machine's.
    const tree = repository.slice(0, -1);
    const { status, stderr } = await host.run(
      `[ -e '${tree}/build' ] || { mkdir -p '${tree}' && mount -t hostfs -o '${tree}' none '${tree}'; }`,
    );
    assert.equal(status, 0, stderr);
    // As systemd has it: what is mounted is seen by all.
    assert.equal((await host.run('mount --make-rshared /')).status, 0);
  });
  after(() => host?.kill());

  for (const name of ['disks', 'suspend', 'clock']) {
    test(name, async (t) => {
      const command = [process.execPath, '--no-warnings', '--test-reporter=tap', `${repository}build/js/test/machine/${name}.test.js`];
      const { status, stdout, stderr } = await host.run(command.map((word) => `'${word}'`).join(' '), { timeoutMs: 300_000 });
      const output = `${stdout}${stderr}\n${host.console.slice(-30).join('\n')}`;
      assert.equal(status, 0, output);
      assert.match(stdout, /^# pass [1-9]/m, output);
      assert.match(stdout, /^# skipped 0$/m, output);
      for (const [, line] of stdout.matchAll(/^ *# (.*\d ms.*)$/gm)) t.diagnostic(line as string);
    });
  }
});
