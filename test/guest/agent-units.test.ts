/** The agent's systemd unit and OpenRC script, in guests that these start: with the mount, again after a crash, and until the mount ends. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { repository } from '../../qemu/guest/daemon.js';
import type { Command } from '../../qemu/guest.js';
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

/** Of Alpine and Gentoo it mounts what is in /etc/fstab; Debian has none. */
const LOCALMOUNT = `#!/sbin/openrc-run
start() { ebegin "Mounting"; mount -t virtiofs myfs /srv; eend $?; }
stop() { umount /srv; }
`;

describe('the agent is started at boot', () => {
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

  /** Changes of the host come to inotifywait. */
  const heard = async (watcher: Command, name: string) => {
    const line = watcher.waitForLine(`CREATE,ISDIR ${name}`, { timeoutMs: 60_000 });
    let made = 0;
    const timer = setInterval(() => fs.mkdirSync(join(setup.share, `${name}${made++}`)), 100);
    await line.finally(() => clearInterval(timer));
  };

  before(async () => {
    const agent = withAgent(folder);
    setup = await setUp({ kind: 'uml', kernel: '6.12-plain', hostRoot: true, memoryMiB: 512, daemonOptions: agent.daemonOptions });
  });
  after(async () => {
    await setup.end();
  });

  it('by systemd: it starts, restarts, says what it does, stops', { timeout: 180_000 }, async (t) => {
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
    await watcher.waitForLine('Watches established', { timeoutMs: 60_000 });
    await heard(watcher, 'first');
    await within(`systemctl kill -s KILL ${UNIT}`);
    await until('it was started again', async () => (await property('NRestarts')) === '1' && (await property('ActiveState')) === 'active');
    await heard(watcher, 'second');
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

  it('by OpenRC: the same', { timeout: 180_000 }, async (t) => {
    await setup.guest.run('umount /mnt');
    const parts = execFileSync(join(repository, 'qemu/setup.sh'), ['openrc'], { encoding: 'utf8' }).trim().split('\n');
    // Debian's / has lib and sbin in usr.
    const merged = ['--transform', 's,^\\./\\(lib\\|sbin\\|bin\\)/,./usr/\\1/,'];
    const folders = parts.flatMap((line) => ['-C', line.slice(line.indexOf('=') + 1), '.']);
    const files = execFileSync('tar', ['-c', '--exclude=./usr/share', ...merged, ...folders], { maxBuffer: 1 << 26 });
    await must('mkdir -p /run/rc/files /run/rc/root && mount -t tmpfs rc /run/rc/files && tar -x -C /run/rc/files', files);
    // tar leaves the empty folders that these names were.
    await must(
      'cd /run/rc/files && rmdir lib/x86_64-linux-gnu lib sbin bin 2>/dev/null; mkdir -p usr/local/sbin etc/conf.d etc/init.d etc/runlevels/default srv',
    );
    const put = (path: string, content: string | Buffer, mode = 755) =>
      must(`cat >/run/rc/files/${path} && chmod ${mode} /run/rc/files/${path}`, Buffer.from(content));
    await put('usr/local/sbin/virtiofsd-ts-agent', fs.readFileSync(join(repository, 'build/virtiofsd-ts-agent')));
    await put('etc/virtiofsd-ts-agent.token', fs.readFileSync(join(folder, 'token')), 600);
    await put('etc/init.d/virtiofsd-ts-agent', fs.readFileSync(join(repository, 'qemu/guest/agent/virtiofsd-ts-agent.openrc')));
    await put('etc/init.d/localmount', LOCALMOUNT);
    await put('etc/insserv.conf', '', 644);
    await put('etc/conf.d/virtiofsd-ts-agent', 'mount_point="/srv"\n', 644);
    // Of the host's own scripts none is looked at.
    await must(
      `mkdir -p /run/rc/t && mount -t tmpfs t /run/rc/t && mkdir /run/rc/t/up /run/rc/t/work &&
       mount -t overlay -o lowerdir=/run/rc/files:/,upperdir=/run/rc/t/up,workdir=/run/rc/t/work rc /run/rc/root && cd /run/rc/root &&
       mount -t proc proc proc && mount -t sysfs sys sys && mount -t tmpfs run run && mount -t tmpfs tmp tmp && mount --rbind /dev dev &&
       mount -t tmpfs none etc/init.d && cp -p /run/rc/files/etc/init.d/virtiofsd-ts-agent /run/rc/files/etc/init.d/localmount etc/init.d`,
    );
    const rc = (command: string) => setup.guest.run(`chroot /run/rc/root env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin ${command} 2>&1`);
    const ok = async (command: string) => {
      const { status, stdout } = await rc(command);
      assert.equal(status, 0, `${command}: ${stdout}`);
      return stdout;
    };
    t.after(() => rc('rc-service localmount stop'));

    await ok('rc-update add virtiofsd-ts-agent default');
    for (const level of ['sysinit', 'boot', 'default']) await ok(`openrc ${level}`);
    const started = async () => /status: started/.test((await rc('rc-service virtiofsd-ts-agent status')).stdout);
    await until('the service is started', started);
    assert.match(await ok('rc-status default'), /virtiofsd-ts-agent +\[ +started /);
    const watcher = setup.guest.spawn('exec chroot /run/rc/root inotifywait -m /srv');
    t.after(() => watcher.kill());
    await watcher.waitForLine('Watches established', { timeoutMs: 60_000 });
    await heard(watcher, 'third');
    const pid = () => must('pidof virtiofsd-ts-agent || true');
    const before = await pid();
    await must(`kill -KILL ${before}`);
    await until('it was started again', async () => ((await pid()) || before) !== before);
    await heard(watcher, 'fourth');
    watcher.kill();
    await watcher.ended;
    await ok('rc-service virtiofsd-ts-agent stop');
    assert.equal(await pid(), '');
    assert.match((await rc('rc-service virtiofsd-ts-agent status')).stdout, /status: stopped/);
    await ok('rc-service localmount stop');
  });
});
