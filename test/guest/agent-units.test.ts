/** The agent's systemd unit in a guest that systemd has started: with the mount, again after a crash, and until the mount ends. */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { repository } from '../../qemu/guest/daemon.js';
import { withAgent } from '../support/agent.js';
import { type Setup, setUp } from '../support/guests.js';

const folder = fs.mkdtempSync(join(tmpdir(), 'agent-units-'));
after(() => fs.rmSync(folder, { recursive: true, force: true }));

const UNIT = 'virtiofsd-ts-agent@srv.service';
/** What is installed in the machine, besides the agent: as `systemctl enable` does it, below /usr. */
const MOUNT = `[Unit]
Description=The share
[Mount]
What=myfs
Where=/srv
Type=virtiofs
`;

describe('the systemd unit, started at boot', () => {
  let setup: Setup;
  const must = async (command: string, stdin?: Buffer): Promise<string> => {
    const { status, stdout, stderr } = await setup.guest.run(command, stdin ? { stdin } : {});
    assert.equal(status, 0, `${command}: ${stdout}${stderr}`);
    return stdout.trim();
  };
  /** In the machine of systemd. */
  const enter = 'nsenter -t $(pgrep -o -f "^/lib/systemd/systemd --unit") -m -p -C -u -i -r -w env LC_ALL=C.UTF-8 ';
  const within = (command: string) => must(enter + command);
  const until = async (what: string, done: () => Promise<boolean>) => {
    for (const end = Date.now() + 60_000; !(await done()); await sleep(100)) assert.ok(Date.now() < end, what);
  };
  const property = (name: string) => within(`systemctl show -P ${name} ${UNIT}`);

  before(async () => {
    const agent = withAgent(folder);
    setup = await setUp({ kind: 'uml', kernel: '6.12-plain', hostRoot: true, memoryMiB: 512, daemonOptions: agent.daemonOptions });
  });
  after(async () => {
    await setup.end();
  });

  it('starts, restarts, says what it does, stops', { timeout: 180_000 }, async (t) => {
    await must('umount /mnt; mkdir -p /run/units/usr/local/sbin /run/units/etc');
    const system = '/run/units/usr/lib/systemd/system';
    await must(`mkdir -p ${system}/srv.mount.wants ${system}/basic.target.wants /run/units/srv`);
    const put = (path: string, host: string) => must(`cat >${path}`, fs.readFileSync(host));
    await put('/run/units/usr/local/sbin/virtiofsd-ts-agent', join(repository, 'build/virtiofsd-ts-agent'));
    await put('/run/units/etc/virtiofsd-ts-agent.token', join(folder, 'token'));
    await put(`${system}/virtiofsd-ts-agent@.service`, join(repository, 'qemu/guest/agent/virtiofsd-ts-agent@.service'));
    await put('/run/machine.sh', join(repository, 'test/support/machine.sh'));
    await must(`cat >${system}/srv.mount`, Buffer.from(MOUNT));
    await must(
      `chmod 755 /run/units/usr/local/sbin/virtiofsd-ts-agent; chmod 600 /run/units/etc/virtiofsd-ts-agent.token
       ln -s ../virtiofsd-ts-agent@.service ${system}/srv.mount.wants/${UNIT}; ln -s ../srv.mount ${system}/basic.target.wants/
       mkdir -p /run/tree; mount -t overlay -o lowerdir=/run/units:/ tree /run/tree`,
    );
    const machine = setup.guest.spawn('ROOT=/run/tree exec bash /run/machine.sh 2>&1');
    t.after(() => machine.kill('SIGTERM'));
    await until('systemd has started', async () => (await setup.guest.run(`${enter} systemctl is-system-running`)).stdout === 'running\n');

    // At boot, with the mount.
    await until('the unit is active', async () => (await property('ActiveState')) === 'active');
    const status = await within(`systemctl status ${UNIT}`);
    assert.match(status, /File events of the host for the virtio-fs share at \/srv/);
    assert.match(status, /Active: active \(running\)/);
    assert.match(status, /virtiofsd-ts-agent: connected: file events of the host come to \/srv/);

    // Events, and again after it was killed.
    const watcher = setup.guest.spawn(`${enter} inotifywait -m /srv`);
    t.after(() => watcher.kill());
    const heard = async (name: string) => {
      const line = watcher.waitForLine(`CREATE,ISDIR ${name}`, { timeoutMs: 60_000 });
      let made = 0;
      const timer = setInterval(() => fs.mkdirSync(join(setup.share, `${name}${made++}`)), 100);
      await line.finally(() => clearInterval(timer));
    };
    await watcher.waitForLine('Watches established', { timeoutMs: 60_000 });
    await heard('first');
    await within(`systemctl kill -s KILL ${UNIT}`);
    await until('it was started again', async () => (await property('NRestarts')) === '1' && (await property('ActiveState')) === 'active');
    await heard('second');
    watcher.kill();
    await watcher.ended;

    // It ends with the mount, and cleanly.
    await within('systemctl stop srv.mount');
    assert.equal(await property('ActiveState'), 'inactive');
    assert.equal(await property('Result'), 'success');
    assert.match(await within(`journalctl -u ${UNIT}`), /changes replayed, \d+ could not be/);
    assert.doesNotMatch(await within('cat /proc/self/mountinfo'), / \/srv /);

    // What `enable` makes is what was there at boot.
    await within('rm -f /usr/lib/systemd/system/srv.mount.wants/*');
    await within(`systemctl enable ${UNIT}`);
    assert.match(await within('ls /etc/systemd/system/srv.mount.wants'), /virtiofsd-ts-agent@srv.service/);
  });
});
