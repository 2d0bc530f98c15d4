/**
 * Ways out of the sandbox, tried from inside: a small program (test/support/escape.c) takes the daemon's place, with its flags, and none
 * of its attempts may get through. With --seccomp each of them ends it; without, what the namespaces and the capabilities leave is seen.
 */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import { createServer, type Server } from 'node:net';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { arena, arenaAlloc, cString, native } from 'vhost-user-ts/native';
import { parse } from '../../src/cli.js';
import { LAUNCHER, prepare } from '../../src/sandbox.js';
import { needsRoot, root } from '../support/daemon.js';

const folder = fs.mkdtempSync(join(tmpdir(), 'escape-'));
const share = join(folder, 'share');
const program = join(folder, 'escape');
const hostSocket = join(folder, 'host.sock');
const abstractName = `escape-${process.pid}`;
const servers: Server[] = [];
let port = 0;

before(async () => {
  fs.chmodSync(folder, 0o755);
  fs.mkdirSync(share);
  const source = fileURLToPath(new URL('../../../../test/support/escape.c', import.meta.url));
  execFileSync('gcc', ['-std=gnu17', '-O1', '-Wall', '-Wextra', '-Werror', '-static', '-o', program, source], { cwd: '/' });
  for (const where of [{ port: 0, host: '127.0.0.1' }, { path: hostSocket }, { path: `\0${abstractName}` }]) {
    const server = createServer((client) => client.destroy());
    await new Promise<void>((done) => server.listen(where, done));
    servers.push(server);
  }
  port = ((servers[0] as Server).address() as { port: number }).port;
});
after(() => {
  for (const server of servers) server.close();
  fs.rmSync(folder, { recursive: true, force: true });
});

interface Setting {
  options: string[];
  /** Attempts; all of them without any. */
  attempts?: string[];
  handle?: string;
  /** Runs the launcher as another user. */
  user?: number;
}

/** Runs attempts where the daemon would run. */
function tryOut({ options, attempts = [], handle = '-', user }: Setting) {
  const command = parse(['--shared-dir', share, '--fd=0', ...options]);
  if (command.action !== 'run') throw new Error('not a command to run');
  const listen = fs.openSync('/dev/null', 'r');
  const { flags, handover } = prepare(command.config, { fd: listen, file: undefined });
  for (const fd of [listen, handover.seccomp]) if (fd !== undefined) native.setInheritable(fd, 1);
  const changesRoot = command.config.sandbox === 'chroot' ? handover.root : '-';
  const words = [
    ...[...flags, '--bind-exec', program, '--', program],
    ...[handover.root, String(handover.seccomp ?? -1), changesRoot, String(process.pid), handle, ...attempts],
  ];
  const as = user === undefined ? [] : ['setpriv', '--reuid', String(user), '--regid', String(user), '--clear-groups'];
  const [file, ...args] = [...as, LAUNCHER, ...words] as [string, ...string[]];
  const { status, signal, stdout, stderr } = spawnSync(file, args, {
    cwd: '/',
    encoding: 'utf8',
    timeout: 20_000,
    env: { HOST_PORT: String(port), HOST_SOCKET: hostSocket, HOST_ABSTRACT: abstractName },
  });
  for (const fd of [listen, handover.seccomp]) if (fd !== undefined) native.close(fd);
  const results = new Map(stdout.split('\n').flatMap((line) => (line === '' ? [] : [line.split(' ') as [string, string]])));
  return { status, signal, stderr, results };
}

const ERRNO = new Map(Object.entries(constants.errno).map(([name, number]) => [number, name]));
const named = (results: Map<string, string>) => [...results].map(([name, errno]) => `${name}: ${ERRNO.get(Number(errno)) ?? errno}`);

/** A struct file_handle of the host's /etc/passwd, which is on the share's file system if the folder is. */
function handleOfPasswd(): string {
  const at = arenaAlloc(192);
  assert.equal(native.nameToHandle(-100, cString('/etc/passwd'), 0, at), 0);
  return arena.buffer.subarray(at, at + 8 + (arena.u32[at >> 2] as number)).toString('hex');
}

// Every attempt that needs a system call which the filter lacks.
const FORBIDDEN = [
  ...['host_tcp', 'host_abstract', 'host_unix', 'packets', 'run_shell', 'run_in_place', 'kill_host', 'kill_launcher', 'kill_all'],
  ...['trace_host', 'trace_launcher', 'read_host', 'pidfd_of_host', 'mount_something', 'mount_proc', 'make_writable', 'unmount_root'],
  ...['new_namespace', 'user_namespace', 'chroot_out', 'load_module', 'load_module_file', 'ports', 'restart', 'swap', 'host_name'],
  ...['host_clock', 'type_in_terminal', 'more_rights', 'bpf'],
];
const FILES = [
  ...['host_file', 'host_directory', 'above_the_share', 'above_a_descriptor', 'root_of_another', 'other_processes', 'kernel_settings'],
  ...['kernel_memory', 'device_in_the_share', 'file_in_the_root', 'own_code'],
];

function assertInside(results: Map<string, string>): void {
  const out = [...results].filter(([, errno]) => errno === '0').map(([name]) => name);
  assert.deepEqual(out, [], `got out: ${out.join(', ')}; ${named(results).join(', ')}`);
}

describe('--sandbox=namespace', () => {
  for (const user of root ? [undefined, 1234] : [undefined]) {
    describe(user === undefined ? 'as it is started' : 'by an ordinary user', () => {
      if (user !== undefined) before(() => fs.chownSync(share, user, user));
      if (user !== undefined) after(() => fs.chownSync(share, 0, 0));

      // The maps of prepare() are this process's own: an ordinary user needs others.
      const maps = user === undefined ? [] : ['--uid-map', `:${user}:${user}:1:`, '--gid-map', `:${user}:${user}:1:`];

      test('namespaces and capabilities alone', () => {
        // No process is ended: all can be tried in one. With a filter beside them `new user namespace` would not even begin.
        const { status, stderr, results } = tryOut({ options: ['--seccomp=none', '--inode-file-handles=never', ...maps], ...as(user) });
        assert.equal(status, 0, stderr);
        assert.ok(results.size >= FORBIDDEN.length + FILES.length, `only ${results.size} attempts: ${stderr}`);
        // These are no way out: the program itself may be run again, and a ring is a queue of the same system calls.
        for (const name of ['ring', 'bpf']) results.delete(name);
        assertInside(results);
      });

      test('--seccomp=kill: each forbidden system call ends the process', () => {
        const { results } = tryOut({ options: [...maps], attempts: [...FILES, 'ring'], ...as(user) });
        assertInside(results);
        assert.equal(results.size, FILES.length + 1);
        for (const name of FORBIDDEN) {
          const end = tryOut({ options: [...maps], attempts: [name], ...as(user) });
          assert.deepEqual([name, end.signal, end.results.size], [name, 'SIGSYS', 0]);
          assert.match(
            end.stderr,
            /^virtiofsd-ts: --sandbox=namespace: the daemon was ended for a system call that --seccomp=kill does not allow \(.*\)\n$/,
          );
        }
      });
    });
  }

  test('--seccomp=trap sends SIGSYS, log lets pass', needsRoot, () => {
    assert.equal(tryOut({ options: ['--seccomp=trap'], attempts: ['packets'] }).signal, 'SIGSYS');
    const logged = tryOut({ options: ['--seccomp=log'], attempts: ['mount_something'] });
    assert.equal(logged.status, 0);
    assert.equal(logged.results.get('mount_something'), String(constants.errno.EPERM));
  });

  test('file handles: CAP_DAC_READ_SEARCH is there only where they are used', needsRoot, () => {
    const attempts = ['by_handle'];
    const handle = handleOfPasswd();
    const never = tryOut({ options: ['--inode-file-handles=never'], attempts, handle });
    assert.equal(never.results.get('by_handle'), String(constants.errno.EPERM));
    const dropped = tryOut({ options: ['--modcaps=-dac_read_search'], attempts, handle });
    assert.equal(dropped.results.get('by_handle'), String(constants.errno.EPERM));
  });
});

describe('--sandbox=chroot', () => {
  test('paths stay inside, and no other root can be taken', needsRoot, () => {
    // Other processes and the network are not hidden in this mode: that is the filter's part.
    const { status, stderr, results } = tryOut({
      options: ['--sandbox=chroot', '--seccomp=none', '--inode-file-handles=never'],
      attempts: [
        'host_file',
        'host_directory',
        'above_the_share',
        'root_of_another',
        'kernel_settings',
        'kernel_memory',
        'chroot_out',
      ].concat(
        [
          'host_unix',
          'run_shell',
          'mount_something',
          'unmount_root',
          'new_namespace',
          'load_module',
          'load_module_file',
          'ports',
          'restart',
        ],
        ['swap', 'host_name', 'host_clock', 'trace_host', 'more_rights'],
      ),
    });
    assert.equal(status, 0, stderr);
    assertInside(results);
  });

  test('--seccomp=kill: each forbidden system call ends the process', needsRoot, () => {
    for (const name of FORBIDDEN) {
      const { signal, results } = tryOut({ options: ['--sandbox=chroot'], attempts: [name] });
      assert.deepEqual([name, signal, results.size], [name, 'SIGSYS', 0]);
    }
  });
});

describe('--sandbox=none', () => {
  test('--seccomp=kill: each forbidden system call ends the process', needsRoot, () => {
    for (const name of FORBIDDEN) {
      const { signal, results } = tryOut({ options: ['--sandbox=none'], attempts: [name] });
      assert.deepEqual([name, signal, results.size], [name, 'SIGSYS', 0]);
    }
  });

  test('capabilities are dropped all the same', needsRoot, () => {
    const { results } = tryOut({
      options: ['--sandbox=none', '--seccomp=log'],
      attempts: ['mount_something', 'new_namespace', 'load_module', 'ports', 'restart', 'swap', 'host_name', 'host_clock', 'more_rights'],
    });
    assertInside(results);
  });
});

function as(user: number | undefined): { user?: number } {
  return user === undefined ? {} : { user };
}
