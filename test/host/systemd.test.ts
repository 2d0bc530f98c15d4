/** The units, and what the daemon says to systemd: by a stand-in for systemd, and by systemd itself in a machine of its own. */
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readFileSync, realpathSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { cString, native } from 'vhost-user-ts/native';
import { repository } from '../../qemu/guest/daemon.js';
import { listens, needsRoot, runDaemon, TestDaemon } from '../support/daemon.js';
import { FuseClient } from '../support/fuse-client.js';
import { Machine } from '../support/machine.js';

const folder = realpathSync(mkdtempSync(join(tmpdir(), 'systemd-')));
after(() => rmSync(folder, { recursive: true, force: true }));

/** Where systemd would listen: a Unix datagram socket, whose name may be abstract ('@…'). */
class NotifySocket {
  readonly name: string;
  readonly messages: string[] = [];
  readonly #process: ChildProcess;

  private constructor(name: string) {
    this.name = name;
    const code =
      'import json,socket,sys; s=socket.socket(socket.AF_UNIX,socket.SOCK_DGRAM); s.bind(sys.argv[1].replace("@","\\0",1)); print("null")\nwhile True: print(json.dumps(s.recv(9999).decode()))';
    this.#process = spawn('python3', ['-uc', code, name], { stdio: ['ignore', 'pipe', 'inherit'], cwd: '/' });
    let rest = '';
    this.#process.stdout?.setEncoding('utf8').on('data', (text) => {
      const lines = (rest + text).split('\n');
      rest = lines.pop() as string;
      this.messages.push(...lines.map((line) => JSON.parse(line)).filter((message) => message !== null));
    });
  }

  static async listen(name: string): Promise<NotifySocket> {
    const socket = new NotifySocket(name);
    await once(socket.#process.stdout as NodeJS.ReadableStream, 'data');
    return socket;
  }

  async has(count: number): Promise<string[]> {
    for (const end = performance.now() + 20_000; this.messages.length < count; await sleep(5))
      if (performance.now() > end) assert.fail(`only ${JSON.stringify(this.messages)}`);
    return this.messages;
  }

  [Symbol.dispose](): void {
    this.#process.kill('SIGKILL');
  }
}

describe('sd_notify', () => {
  for (const [what, options, name] of [
    ['in the sandbox', [], join(folder, 'notify')],
    ['without a sandbox, to an abstract name', ['--sandbox=none', '--seccomp=none'], `@virtiofsd-ts-test-${process.pid}`],
  ] as const) {
    test(`READY, STATUS and STOPPING ${what}`, async () => {
      using manager = await NotifySocket.listen(name);
      await using daemon = await TestDaemon.start(options, { env: { NOTIFY_SOCKET: name } });
      assert.deepEqual(await manager.has(1), ['READY=1\nSTATUS=waiting for a guest']);
      assert.ok(listens(daemon.socket));
      const client = daemon.session();
      await manager.has(2);
      daemon.close(client);
      await manager.has(3);
      await daemon.stop();
      assert.deepEqual((await manager.has(4)).slice(1), [
        'STATUS=serving a guest',
        'STATUS=waiting for a guest',
        'STOPPING=1\nSTATUS=ending',
      ]);
      assert.doesNotMatch(readFileSync(join(daemon.folder, 'log'), 'utf8'), /WARN|ERROR/);
    });
  }

  test('nobody listens there: the daemon runs as without', async () => {
    await using daemon = await TestDaemon.start([], { env: { NOTIFY_SOCKET: join(folder, 'nobody') } });
    daemon.close(daemon.session());
  });
});

describe('a socket that systemd passes', () => {
  /** Becomes its arguments, as the process that LISTEN_PID names. */
  const passing = ['sh', '-c', 'export LISTEN_PID=$$; exec "$@"', 'sh'];

  test('the daemon serves one client after the other, and leaves its file', async () => {
    const path = join(folder, 'passed');
    const fd = native.unixListen(cString(path), 8);
    await using daemon = await TestDaemon.start([`--socket-path=${folder}/not-made`], {
      listen: [],
      inherit: [fd],
      wrapper: passing,
      env: { LISTEN_FDS: '1' },
    });
    native.close(fd);
    for (let i = 0; i < 2; i++) {
      const client = FuseClient.connect(path);
      client.init();
      client.getattr(1);
      client.close();
    }
    assert.ok(!listens(`${folder}/not-made`));
    const environment = daemon.proc('environ');
    for (const name of ['LISTEN_PID', 'LISTEN_FDS', 'NOTIFY_SOCKET']) assert.ok(!environment.includes(name), name);
    await daemon.stop();
    assert.equal(spawnSync('test', ['-S', path]).status, 0);
  });

  test('what is for another process is not taken; wrong ones are refused', async () => {
    await using daemon = await TestDaemon.start([], { env: { LISTEN_FDS: '1', LISTEN_PID: '1' } });
    daemon.close(daemon.session());
    const share = ['--shared-dir', folder];
    const refused = (fds: string) =>
      spawnSync(passing[0] as string, [...passing.slice(1), join(repository, 'build/virtiofsd-ts'), ...share], {
        encoding: 'utf8',
        stdio: ['ignore', 'pipe', 'pipe', 'ignore'],
        env: { ...process.env, LISTEN_FDS: fds },
        cwd: '/',
      });
    const two = refused('2');
    assert.deepEqual(
      [two.status, two.stderr],
      [2, 'virtiofsd-ts: systemd passes 2 sockets, one is needed: leave one ListenStream= in the .socket unit\n'],
    );
    const none = refused('1');
    assert.equal(none.status, 1);
    assert.match(none.stderr, /ERROR descriptor 3 from systemd is not a socket: pass a listening Unix socket\n$/);
    assert.equal(runDaemon(share).status, 2);
  });
});

describe('units', () => {
  const units = join(folder, 'units');
  const prefix = join(folder, 'prefix');
  before(() => {
    execFileSync('make', ['-s', '-C', repository, 'install', `PREFIX=${prefix}`], { stdio: 'pipe' });
    mkdirSync(units);
    for (const type of ['service', 'socket'])
      symlinkSync(join(prefix, `lib/systemd/system/virtiofsd-ts@.${type}`), join(units, `virtiofsd-ts@.${type}`));
  });

  const analyze = (...args: string[]) =>
    spawnSync('systemd-analyze', args, { encoding: 'utf8', cwd: units, env: { ...process.env, MANPATH: join(prefix, 'share/man') } });

  test('systemd-analyze verify', () => {
    const { status, stdout, stderr } = analyze('verify', './virtiofsd-ts@x.service', './virtiofsd-ts@x.socket');
    assert.deepEqual([status, stdout, stderr], [0, '', '']);
  });

  test('systemd-analyze security: what can be taken is taken', () => {
    const { stdout } = analyze('security', '--offline=yes', '--no-pager', './virtiofsd-ts@x.service');
    const exposure = Number(/Overall exposure level for \S+: ([\d.]+)/.exec(stdout)?.[1]);
    // Shares may be anywhere, and the sandbox is made by root: the whole of it is not to be had.
    assert.ok(exposure <= 6.5, stdout);
    for (const name of ['NoNewPrivileges', 'RestrictRealtime', 'LockPersonality', 'CapabilityBoundingSet=~CAP_SYS_MODULE'])
      assert.match(stdout, new RegExp(`✓ ${name}`));
  });

  test('systemd starts and ends them: as a service, and by its socket', { ...needsRoot, timeout: 180_000 }, async () => {
    await using machine = await Machine.start();
    execFileSync('make', ['-s', '-C', repository, 'install', `DESTDIR=${folder}/installed`, 'PREFIX=/usr'], { stdio: 'pipe' });
    execFileSync('cp', ['-a', `${folder}/installed/.`, machine.root]);
    machine.must('sh', '-c', 'groupadd -f -r kvm; mount -t tmpfs none /srv; mkdir -p /etc/virtiofsd-ts /srv/service /srv/socket');
    for (const name of ['service', 'socket']) {
      const text = readFileSync(join(machine.root, 'usr/share/doc/virtiofsd-ts/example.conf'), 'utf8').replace(
        '/srv/share',
        `/srv/${name}`,
      );
      writeFileSync(join(machine.root, `etc/virtiofsd-ts/${name}.conf`), text);
      writeFileSync(join(machine.root, `srv/${name}/file`), name);
    }
    machine.must('systemctl', 'daemon-reload');
    const property = (unit: string, name: string) => machine.must('systemctl', 'show', '-P', name, unit).trim();

    const use = (name: string, time = 1) => {
      const client = FuseClient.connect(join(machine.root, `run/virtiofsd-ts/${name}.sock`));
      try {
        client.init();
        const { nodeid } = client.lookup(1, 'file');
        const { fh } = client.open(nodeid);
        assert.equal(client.read(nodeid, fh, 0, 100).toString(), name);
        // What the hardening must not take from the guest.
        client.mknod(1, `device${time}`, 0o020666, 0x0103);
        client.setattr(client.create(1, `program${time}`, 1).entry.nodeid, { mode: 0o104755 });
        assert.equal(
          machine.must('stat', '-c', '%a %F', `/srv/${name}/device${time}`, `/srv/${name}/program${time}`),
          '666 character special file\n4755 regular empty file\n',
        );
      } finally {
        client.close();
      }
    };

    machine.must('systemctl', 'start', 'virtiofsd-ts@service.service');
    assert.equal(property('virtiofsd-ts@service.service', 'ActiveState'), 'active');
    assert.equal(property('virtiofsd-ts@service.service', 'StatusText'), 'waiting for a guest');
    assert.equal(machine.must('stat', '-c', '%a %G', '/run/virtiofsd-ts/service.sock'), '660 kvm\n');
    use('service');

    machine.must('systemctl', 'start', 'virtiofsd-ts@socket.socket');
    assert.equal(property('virtiofsd-ts@socket.service', 'ActiveState'), 'inactive');
    use('socket');
    assert.equal(property('virtiofsd-ts@socket.service', 'ActiveState'), 'active');
    use('socket', 2);

    machine.must('systemctl', 'stop', 'virtiofsd-ts@service.service', 'virtiofsd-ts@socket.socket', 'virtiofsd-ts@socket.service');
    for (const name of ['service', 'socket']) {
      assert.equal(property(`virtiofsd-ts@${name}.service`, 'ActiveState'), 'inactive');
      assert.equal(property(`virtiofsd-ts@${name}.service`, 'Result'), 'success');
    }
    assert.equal(machine.must('ls', '/run/virtiofsd-ts'), '');
    const journal = machine.must('journalctl', '--no-pager', '-t', 'virtiofsd-ts');
    assert.match(journal, /INFO {2}sharing \/srv\/service/);
    assert.doesNotMatch(journal, /WARN|ERROR/);

    assert.notEqual(machine.run('systemctl', 'start', 'virtiofsd-ts@unknown.service').status, 0);
  });
});
