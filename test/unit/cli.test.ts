import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { capabilities, errorLine, help, parse } from '../../src/cli.js';
import type { Config } from '../../src/config.js';
import { OPTIONS, PROGRAM, UsageError, VERSION } from '../../src/options.js';

const SHARE = ['--shared-dir', '/usr'];
const BASE = [...SHARE, '--fd=3'];

/** The configuration that a command line gives. */
function config(...argv: string[]): Config {
  const command = parse(argv);
  assert.equal(command.action, 'run');
  return (command as { config: Config }).config;
}

/** The line that a command line is refused with, without the program's name. */
function refusal(...argv: string[]): string {
  try {
    parse(argv);
  } catch (error) {
    assert.ok(error instanceof UsageError, String(error));
    const line = errorLine(error);
    assert.ok(!line.includes('\n'));
    assert.ok(line.startsWith(`${PROGRAM}: `));
    return line.slice(PROGRAM.length + 2);
  }
  assert.fail(`accepted: ${argv.join(' ')}`);
}

test('defaults', () => {
  assert.deepEqual(config('--shared-dir=/usr', '--socket-path=/tmp/s'), {
    sharedDir: '/usr',
    listenOn: { kind: 'path', path: '/tmp/s', group: undefined },
    tag: undefined,
    requestQueues: 1,
    readonly: false,
    announceSubmounts: true,
    inodeFileHandles: 'prefer',
    posixLock: false,
    flock: false,
    exportSupport: false,
    preserveNoatime: false,
    cache: 'auto',
    timeouts: { entryTimeout: 1, attrTimeout: 1, negativeTimeout: 0 },
    notifiedTimeouts: { entryTimeout: 1, attrTimeout: 1, negativeTimeout: 0 },
    cacheSymlinks: true,
    allowMmap: false,
    writeback: false,
    readdirplus: true,
    allowDirectIo: false,
    xattr: false,
    xattrmap: undefined,
    posixAcl: 'never',
    securityLabel: 'never',
    killprivV2: false,
    translateUid: [],
    translateGid: [],
    fsnotify: 'auto',
    fsnotifyLimit: 131072,
    agentToken: undefined,
    migrationMode: 'find-paths',
    migrationOnError: 'abort',
    migrationVerifyHandles: false,
    migrationConfirmPaths: false,
    sandbox: 'namespace',
    seccomp: 'kill',
    modcaps: undefined,
    uidMap: [],
    gidMap: [],
    threadPoolSize: undefined,
    busyPoll: 20,
    rlimitNofile: undefined,
    logLevel: 'info',
    logFormat: 'text',
    syslog: false,
    metrics: undefined,
    warnings: [],
  });
});

test('the configuration cannot be changed', () => {
  const made = config(...BASE, '--translate-uid=map:0:0:1', '--metrics=unix:/tmp/m');
  for (const part of [made, made.listenOn, made.translateUid, made.warnings, made.metrics]) assert.ok(Object.isFrozen(part));
});

// --- each option: what is accepted, and what it does ---

const EFFECTS: readonly (readonly [argv: string, effect: Partial<Config>])[] = [
  ['--shared-dir /etc', { sharedDir: '/etc' }],
  ['--shared-dir=/etc', { sharedDir: '/etc' }],
  ['--shared-dir /etc/../etc/', { sharedDir: '/etc' }],
  ['--tag myfs', { tag: 'myfs' }],
  ['--tag=ä234567890123456789012345678901234.', { tag: 'ä234567890123456789012345678901234.' }],
  ['--num-request-queues=8', { requestQueues: 8 }],
  ['--readonly', { readonly: true }],
  ['--announce-submounts', { announceSubmounts: true }],
  ['--no-announce-submounts', { announceSubmounts: false }],
  ['--announce-submounts --no-announce-submounts', { announceSubmounts: false }],
  ['--no-announce-submounts --announce-submounts', { announceSubmounts: true }],
  ['--inode-file-handles=never', { inodeFileHandles: 'never' }],
  ['--inode-file-handles=prefer', { inodeFileHandles: 'prefer' }],
  ['--inode-file-handles=mandatory', { inodeFileHandles: 'mandatory' }],
  [
    '--inode-file-handles=fallback',
    { inodeFileHandles: 'prefer', warnings: ['--inode-file-handles=fallback is deprecated: use --inode-file-handles=prefer'] },
  ],
  ['--posix-lock', { posixLock: true, flock: false }],
  ['--flock', { posixLock: false, flock: true }],
  ['--export-support', { exportSupport: true }],
  ['--preserve-noatime', { preserveNoatime: true }],
  ['--migration-mode=file-handles', { migrationMode: 'file-handles' }],
  ['--migration-on-error=guest-error', { migrationOnError: 'guest-error' }],
  ['--migration-verify-handles', { migrationVerifyHandles: true }],
  ['--migration-confirm-paths', { migrationConfirmPaths: true }],
  ['--fd 7', { listenOn: { kind: 'fd', fd: 7 } }],
  ['--cache auto', { cache: 'auto', timeouts: { entryTimeout: 1, attrTimeout: 1, negativeTimeout: 0 }, readdirplus: true }],
  ['--cache=always', { cache: 'always', timeouts: { entryTimeout: 86400, attrTimeout: 86400, negativeTimeout: 0 }, readdirplus: true }],
  ['--cache=metadata', { cache: 'metadata', timeouts: { entryTimeout: 86400, attrTimeout: 86400, negativeTimeout: 0 }, readdirplus: true }],
  ['--cache=never', { cache: 'never', timeouts: { entryTimeout: 0, attrTimeout: 0, negativeTimeout: 0 }, readdirplus: false }],
  ['--cache=NEVER', { cache: 'never' }],
  [
    '--cache=notify',
    {
      timeouts: { entryTimeout: 1, attrTimeout: 1, negativeTimeout: 0 },
      notifiedTimeouts: { entryTimeout: 86400, attrTimeout: 86400, negativeTimeout: 86400, linkedAttrTimeout: 1 },
    },
  ],
  ['--entry-timeout=2.5', { timeouts: { entryTimeout: 2.5, attrTimeout: 1, negativeTimeout: 0 } }],
  ['--cache=always --attr-timeout .25', { timeouts: { entryTimeout: 86400, attrTimeout: 0.25, negativeTimeout: 0 } }],
  ['--cache=never --negative-timeout=10', { timeouts: { entryTimeout: 0, attrTimeout: 0, negativeTimeout: 10 } }],
  [
    '--cache=notify --entry-timeout=3 --attr-timeout=4 --negative-timeout=0',
    {
      timeouts: { entryTimeout: 3, attrTimeout: 4, negativeTimeout: 0 },
      notifiedTimeouts: { entryTimeout: 3, attrTimeout: 4, negativeTimeout: 0, linkedAttrTimeout: 4 },
    },
  ],
  ['--cache=never', { cacheSymlinks: false }],
  ['--cache=never --cache=always', { cache: 'always' }],
  ['--allow-mmap', { allowMmap: true }],
  ['--writeback', { writeback: true }],
  ['--writeback --cache=never', { writeback: true, cache: 'never' }],
  ['--no-readdirplus', { readdirplus: false }],
  ['--allow-direct-io', { allowDirectIo: true }],
  ['--xattr', { xattr: true }],
  ['--xattr --xattr', { xattr: true }],
  ['--xattrmap=:map::user.virtiofs.:', { xattrmap: ':map::user.virtiofs.:', xattr: true }],
  ['--posix-acl', { posixAcl: 'always', xattr: true }],
  ['--posix-acl=always', { posixAcl: 'always', xattr: true }],
  ['--posix-acl=auto', { posixAcl: 'auto', xattr: true }],
  ['--posix-acl=never', { posixAcl: 'never', xattr: false }],
  ['--security-label', { securityLabel: 'always', xattr: true }],
  ['--security-label=auto', { securityLabel: 'auto', xattr: true }],
  ['--security-label=never', { securityLabel: 'never', xattr: false }],
  ['--killpriv-v2', { killprivV2: true }],
  ['--no-killpriv-v2', { killprivV2: false }],
  ['--killpriv-v2 --no-killpriv-v2', { killprivV2: false }],
  ['--no-killpriv-v2 --killpriv-v2', { killprivV2: true }],
  ['--translate-uid map:0:1000:1 --translate-uid=guest:5:6:7', { translateUid: ['map:0:1000:1', 'guest:5:6:7'], translateGid: [] }],
  ['--translate-gid=squash-host:0:1:2 --posix-acl=never', { translateGid: ['squash-host:0:1:2'] }],
  ['--fsnotify=auto', { fsnotify: 'auto' }],
  ['--fsnotify fanotify', { fsnotify: 'fanotify' }],
  ['--fsnotify=inotify', { fsnotify: 'inotify' }],
  ['--fsnotify=off', { fsnotify: 'off' }],
  ['--fsnotify-limit=10', { fsnotifyLimit: 10 }],
  ['--cache=notify', { cache: 'notify', timeouts: { entryTimeout: 1, attrTimeout: 1, negativeTimeout: 0 }, readdirplus: true }],
  ['--sandbox=none', { sandbox: 'none' }],
  ['--sandbox None', { sandbox: 'none' }],
  ['--sandbox=NAMESPACE', { sandbox: 'namespace' }],
  ['--sandbox=chroot', { sandbox: 'chroot' }],
  ['--seccomp=none', { seccomp: 'none' }],
  ['--seccomp=trap', { seccomp: 'trap' }],
  ['--modcaps=+CAP_SYS_ADMIN:-chown', { modcaps: '+CAP_SYS_ADMIN:-chown' }],
  [
    '--uid-map=:0:1000:1: --uid-map=/1/100000/65535/',
    {
      uidMap: [
        { inside: 0, outside: 1000, count: 1 },
        { inside: 1, outside: 100000, count: 65535 },
      ],
    },
  ],
  ['--gid-map ,0,5,1,', { gidMap: [{ inside: 0, outside: 5, count: 1 }] }],
  ['--thread-pool-size=0', { threadPoolSize: 0 }],
  ['--thread-pool-size 16', { threadPoolSize: 16 }],
  ['--busy-poll=0', { busyPoll: 0 }],
  ['--busy-poll 200', { busyPoll: 200 }],
  ['--rlimit-nofile=0', { rlimitNofile: 0 }],
  ['--rlimit-nofile=4096', { rlimitNofile: 4096 }],
  ['--log-level=error', { logLevel: 'error' }],
  ['--log-level=warn', { logLevel: 'warn' }],
  ['--log-level info', { logLevel: 'info' }],
  ['--log-level=DEBUG', { logLevel: 'debug' }],
  ['--log-level=trace', { logLevel: 'trace' }],
  ['--log-level=off', { logLevel: 'off' }],
  ['--log-format=json', { logFormat: 'json' }],
  ['--log-format text', { logFormat: 'text' }],
  ['--syslog', { syslog: true }],
  ['--metrics=unix:/tmp/m.sock', { metrics: { path: '/tmp/m.sock' } }],
  ['--metrics=127.0.0.1:9100', { metrics: { host: '127.0.0.1', port: 9100 } }],
  ['--metrics=localhost:0', { metrics: { host: 'localhost', port: 0 } }],
  ['--metrics=[::1]:9100', { metrics: { host: '::1', port: 9100 } }],
  ['-d', { logLevel: 'debug', warnings: ['-d is deprecated: use --log-level=debug'] }],
  ['-d --log-level=error', { logLevel: 'debug' }],
  ['-f', { warnings: ['-f is deprecated: leave it out, it has no effect'] }],
  ['-fd', { logLevel: 'debug' }],
];

for (const [argv, effect] of EFFECTS) {
  test(argv, () => {
    const made = config(...BASE, ...argv.split(' '));
    for (const [field, value] of Object.entries(effect)) assert.deepEqual(made[field as keyof Config], value, field);
  });
}

test('every option of the table is tried here', () => {
  const source = readFileSync(new URL('../../../../test/unit/cli.test.ts', import.meta.url), 'utf8');
  for (const { name } of OPTIONS) assert.ok(new RegExp(`['" ]--?${name}\\b`).test(source), name);
});

test('--agent reads the token', () => {
  const folder = mkdtempSync(join(tmpdir(), 'cli-'));
  const file = (name: string, content: string, mode = 0o600) => {
    writeFileSync(join(folder, name), content, { mode });
    return join(folder, name);
  };
  const good = file('good', ' 0123456789abcdef\n');
  assert.equal(config(...BASE, `--agent=${good}`).agentToken, '0123456789abcdef');
  assert.equal(config(...BASE, '--agent=off').agentToken, undefined);
  const said = (path: string, ...more: string[]) => refusal(...BASE, `--agent=${path}`, ...more).replaceAll(folder, 'F');
  assert.equal(said(`${folder}/none`), '--agent: F/none cannot be read (ENOENT): name a file with a token, or off');
  assert.equal(said(file('open', 'x'.repeat(20), 0o640)), '--agent: others may read or change F/open: chmod 600 it');
  assert.equal(said(file('short', 'x\n')), '--agent: the token in F/short has 1 bytes: it must have 16 to 256');
  assert.equal(said(file('long', 'x'.repeat(257))), '--agent: the token in F/long has 257 bytes: it must have 16 to 256');
  assert.equal(said(good, '--fsnotify=off'), '--agent brings file events to the guest: leave out --fsnotify=off');
  assert.match(said(good, '--writeback'), /^--agent does not work with --writeback/);
  rmSync(folder, { recursive: true });
});

test('--socket-path, --socket-group and the old --socket', () => {
  assert.deepEqual(config(...SHARE, '--socket-path', '/tmp/s').listenOn, { kind: 'path', path: '/tmp/s', group: undefined });
  assert.deepEqual(config(...SHARE, '--socket-path=s', '--socket-group=kvm').listenOn, { kind: 'path', path: 's', group: 'kvm' });
  const old = config(...SHARE, '--socket=/tmp/s');
  assert.deepEqual(old.listenOn, { kind: 'path', path: '/tmp/s', group: undefined });
  assert.deepEqual(old.warnings, ['--socket is deprecated: use --socket-path']);
});

test('values are taken as they are', () => {
  assert.equal(config(...BASE, '--tag="x"').tag, '"x"');
  assert.equal(config(...BASE, '--tag', "'x'").tag, "'x'");
  assert.equal(config(...BASE, '--tag=a=b').tag, 'a=b');
  assert.equal(config(...BASE, '--tag', '007').tag, '007');
  assert.equal(config(...BASE, '--tag=-x').tag, '-x');
  assert.equal(config(...BASE, '--xattrmap', ':map::a b, c=d.:').xattrmap, ':map::a b, c=d.:');
});

// --- refused: the exact line ---

const REFUSED: readonly (readonly [argv: readonly string[], line: string])[] = [
  [[], 'no directory to share: give --shared-dir=DIR'],
  [SHARE, 'no socket to listen on: give --socket-path=PATH or --fd=FD'],
  [['--socket-path=/tmp/s'], 'no directory to share: give --shared-dir=DIR'],
  [['--shared-dir=', '--fd=3'], '--shared-dir is empty: name a directory'],
  [['--shared-dir=/nowhere', '--fd=3'], '--shared-dir: /nowhere does not exist: name an existing directory'],
  [['--shared-dir=/etc/passwd', '--fd=3'], '--shared-dir: /etc/passwd is not a directory: name one'],
  [['--shared-dir=/etc/passwd/x', '--fd=3'], '--shared-dir: /etc/passwd/x cannot be reached (ENOTDIR): name an existing directory'],
  [['--shared-dir', '/a\nb\u001b[1m', '--fd=3'], '--shared-dir: /a\\nb\\x1b[1m does not exist: name an existing directory'],
  [['--shared-dir'], '--shared-dir needs a value: --shared-dir DIR'],
  [['--shared-dir', '--xattr'], '--shared-dir needs a value: --shared-dir DIR'],
  [['-o'], '-o needs a value: -o OPTIONS'],
  [[...BASE, '--nope'], 'unknown option --nope: see --help'],
  [[...BASE, '--nope=1'], 'unknown option --nope: see --help'],
  [[...BASE, '--share-dir=/x'], 'unknown option --share-dir: did you mean --shared-dir?'],
  [[...BASE, '--sharedDir=/x'], 'unknown option --sharedDir: did you mean --shared-dir?'],
  [[...BASE, '--no-xattr'], 'unknown option --no-xattr: see --help'],
  [[...BASE, '--xattr.x=1'], 'unknown option --xattr.x: did you mean --xattr?'],
  [[...BASE, '--__proto__=1'], 'unknown option --__proto__: see --help'],
  [[...BASE, '-x'], 'unknown option -x: see --help'],
  [[...BASE, '-xattr'], 'unknown option -xattr: did you mean --xattr?'],
  [[...BASE, 'extra'], "unexpected argument 'extra': every option starts with --, see --help"],
  [[...BASE, '--posix-acl', 'auto'], "unexpected argument 'auto': every option starts with --, see --help"],
  [[...BASE, '--xattr', 'true'], "unexpected argument 'true': every option starts with --, see --help"],
  [[...BASE, '--', '/x'], "unexpected argument '/x': every option starts with --, see --help"],
  [[...BASE, ''], "unexpected argument '': every option starts with --, see --help"],
  [[...BASE, '--readonly=1'], '--readonly takes no value: give it alone'],
  [[...BASE, '--xattr=true'], '--xattr takes no value: give it alone'],
  [[...BASE, '-d=1'], '-d takes no value: give it alone'],

  [[...BASE, '--socket-path=/tmp/s'], '--fd and --socket-path exclude each other: give one of them'],
  [[...BASE, '--socket=/tmp/s'], '--fd and --socket-path exclude each other: give one of them'],
  [[...SHARE, '--socket=/tmp/s', '--socket-path=/tmp/s'], '--socket is the old name of --socket-path: give only --socket-path'],
  [[...BASE, '--socket-group=kvm'], '--socket-group is for --socket-path: the socket of --fd has its owner already'],
  [[...SHARE, '--socket-path=s', '--socket-group='], '--socket-group is empty: name a group'],
  [[...SHARE, '--socket-path='], '--socket-path is empty: name a socket'],
  [[...SHARE, '--socket-path=/nowhere/s'], '--socket-path: /nowhere does not exist: name an existing directory'],
  [[...SHARE, `--socket-path=/tmp/${'x'.repeat(103)}`], '--socket-path has 108 bytes: the path of a socket has at most 107'],
  [[...BASE, '--fd=-1'], '--fd=-1 is no number from 0 to 2147483647'],
  [[...BASE, '--fd=x'], '--fd=x is no number from 0 to 2147483647'],
  [[...BASE, '--fd='], '--fd= is no number from 0 to 2147483647'],
  [[...BASE, '--fd=2147483648'], '--fd=2147483648 is no number from 0 to 2147483647'],

  [[...BASE, '--tag='], '--tag has 0 bytes: it must have 1 to 36'],
  [[...BASE, '--tag=1234567890123456789012345678901234567'], '--tag has 37 bytes: it must have 1 to 36'],
  [[...BASE, '--tag=ä23456789012345678901234567890123456'], '--tag has 37 bytes: it must have 1 to 36'],
  [[...BASE, '--entry-timeout=-1'], '--entry-timeout=-1 is no number of seconds from 0 to 2147483647'],
  [[...BASE, '--attr-timeout=1e3'], '--attr-timeout=1e3 is no number of seconds from 0 to 2147483647'],
  [[...BASE, '--negative-timeout=.'], '--negative-timeout=. is no number of seconds from 0 to 2147483647'],
  [[...BASE, '--negative-timeout=2147483648'], '--negative-timeout=2147483648 is no number of seconds from 0 to 2147483647'],
  [[...BASE, '--num-request-queues=0'], '--num-request-queues=0 is no number from 1 to 1023'],
  [[...BASE, '--inode-file-handles=Never'], '--inode-file-handles=Never is not known: give one of never, prefer, mandatory'],
  [[...BASE, '--cache=none'], '--cache=none is not known: give one of auto, always, never, metadata, notify'],
  [[...BASE, '--cache='], '--cache= is not known: give one of auto, always, never, metadata, notify'],
  [[...BASE, '--cache=notify', '--fsnotify=off'], '--cache=notify needs to know of changes: leave out --fsnotify=off'],
  [[...BASE, '--fsnotify=on'], '--fsnotify=on is not known: give one of auto, fanotify, inotify, off'],
  [[...BASE, '--fsnotify-limit=0'], '--fsnotify-limit=0 is no number from 1 to 16777216'],
  [[...BASE, '--xattrmap=bad'], "--xattrmap: rule 1: 'bad' has not 4 fields that each end in 'b'"],
  [[...BASE, '--translate-uid=map:1:2'], '--translate-uid: map:1:2: map takes 3 numbers, not 2'],
  [[...BASE, '--translate-gid=guest:0:0:x'], "--translate-gid: guest:0:0:x: 'x' is not a number below 2^32"],
  [[...BASE, '--posix-acl='], '--posix-acl= is not known: give one of never, auto, always'],
  [[...BASE, '--security-label=on'], '--security-label=on is not known: give one of never, auto, always'],
  [
    [...BASE, '--posix-acl', '--translate-uid=map:0:0:1'],
    '--translate-uid and --translate-gid would break access control lists: leave out --posix-acl=always',
  ],
  [
    [...BASE, '--posix-acl=auto', '--translate-gid=map:0:0:1'],
    '--translate-uid and --translate-gid would break access control lists: leave out --posix-acl=auto',
  ],
  [[...BASE, '--thread-pool-size=1e3'], '--thread-pool-size=1e3 is no number from 0 to 1024'],
  [[...BASE, '--busy-poll=1000001'], '--busy-poll=1000001 is no number from 0 to 1000000'],
  [[...BASE, '--thread-pool-size=0x10'], '--thread-pool-size=0x10 is no number from 0 to 1024'],
  [[...BASE, '--rlimit-nofile=many'], '--rlimit-nofile=many is no number from 0 to 9007199254740991'],
  [[...BASE, '--log-level=err'], '--log-level=err is not known: give one of error, warn, info, debug, trace, off'],
  [[...BASE, '--metrics=9100'], '--metrics=9100 is no address: give unix:PATH or HOST:PORT'],
  [[...BASE, '--metrics=:9100'], '--metrics=:9100 is no address: give unix:PATH or HOST:PORT'],
  [[...BASE, '--metrics=localhost:65536'], '--metrics=localhost:65536 is no address: give unix:PATH or HOST:PORT'],
  [[...BASE, '--metrics=::1:80'], '--metrics=::1:80 is no address: give unix:PATH or HOST:PORT'],
  [[...BASE, '--metrics=unix:'], '--metrics is empty: name a socket'],
  [[...BASE, '--metrics=unix:/nowhere/m'], '--metrics: /nowhere does not exist: name an existing directory'],

  [[...BASE, '--sandbox=jail'], '--sandbox=jail is not known: give one of namespace, chroot, none'],
  [[...BASE, '--seccomp=ask'], '--seccomp=ask is not known: give one of none, kill, log, trap'],
  [[...BASE, '--modcaps=sys_admin'], "--modcaps: 'sys_admin' has neither + nor -: give for example +sys_admin:-chown"],
  [[...BASE, '--modcaps=+chown:'], "--modcaps: '' has neither + nor -: give for example +sys_admin:-chown"],
  [[...BASE, '--modcaps=+sysadmin'], "--modcaps: 'sysadmin' is no capability: see capabilities(7)"],
  [[...BASE, '--uid-map=0:1:2'], '--uid-map: 0:1:2 is no map: give :INSIDE:OUTSIDE:COUNT:'],
  [[...BASE, '--uid-map=:0:1:'], '--uid-map: :0:1: is no map: give :INSIDE:OUTSIDE:COUNT:'],
  [[...BASE, '--gid-map=:0:-1:2:'], '--gid-map: :0:-1:2: is no map: give :INSIDE:OUTSIDE:COUNT:'],
  [[...BASE, '--gid-map=:0:1:0:'], '--gid-map: :0:1:0:: ids end at 4294967294'],
  [[...BASE, '--gid-map', ':0:4294967290:9:'], '--gid-map: :0:4294967290:9:: ids end at 4294967294'],
  [[...BASE, '--sandbox=none', '--uid-map=:0:1:2:'], '--uid-map needs a user namespace: use --sandbox=namespace'],
];

for (const [argv, line] of REFUSED) test(`refused: ${JSON.stringify(argv.join(' '))}`, () => assert.equal(refusal(...argv), line));

// --- the old form ---

const COMPAT: readonly (readonly [text: string, effect: Partial<Config>])[] = [
  ['source=/etc', { sharedDir: '/etc' }],
  ['cache=none', { cache: 'never', readdirplus: false }],
  ['cache=auto', { cache: 'auto' }],
  ['cache=always', { cache: 'always' }],
  ['cache=metadata', { cache: 'metadata' }],
  ['loglevel=err', { logLevel: 'error' }],
  ['loglevel=debug', { logLevel: 'debug' }],
  ['xattrmap=:map::a=b.:', { xattrmap: ':map::a=b.:', xattr: true }],
  ['xattrmap=:map::a,,b.:', { xattrmap: ':map::a,b.:' }],
  ['xattr', { xattr: true }],
  ['xattr,no_xattr', { xattr: false }],
  ['readdirplus', { readdirplus: true }],
  ['no_readdirplus', { readdirplus: false }],
  ['no_readdirplus,readdirplus', { readdirplus: true }],
  ['writeback', { writeback: true }],
  ['writeback,no_writeback', { writeback: false }],
  ['allow_direct_io', { allowDirectIo: true }],
  ['allow_direct_io,no_allow_direct_io', { allowDirectIo: false }],
  ['announce_submounts', { announceSubmounts: true }],
  ['killpriv_v2', { killprivV2: true }],
  ['killpriv_v2,no_killpriv_v2', { killprivV2: false }],
  ['posix_acl', { posixAcl: 'always', xattr: true }],
  ['posix_acl,no_posix_acl', { posixAcl: 'never', xattr: false }],
  ['security_label', { securityLabel: 'always', xattr: true }],
  ['security_label,no_security_label', { securityLabel: 'never' }],
  ['sandbox=none', { sandbox: 'none' }],
  ['sandbox=chroot', { sandbox: 'chroot' }],
  ['modcaps=+sys_admin:-chown', { modcaps: '+sys_admin:-chown' }],
  ['timeout=1.5', { timeouts: { entryTimeout: 1.5, attrTimeout: 1.5, negativeTimeout: 0 } }],
  ['flock,posix_lock', { flock: true, posixLock: true }],
  ['flock,posix_lock,no_flock,no_posix_lock', { flock: false, posixLock: false }],
];

for (const [text, effect] of COMPAT) {
  test(`-o ${text}`, () => {
    for (const argv of [['-o', text], [`-o${text}`], [`-o=${text}`]]) {
      const made = config(...BASE, ...argv);
      for (const [field, value] of Object.entries(effect)) assert.deepEqual(made[field as keyof Config], value, field);
      assert.deepEqual(made.warnings, ['-o is deprecated: use the separate options (--cache=auto for -o cache=auto)']);
    }
  });
}

test('-o counts more than separate options, several times and wherever it stands', () => {
  assert.equal(config('-o', 'cache=always', ...BASE, '--cache=never').cache, 'always');
  const twice = config('--fd=3', '-o', 'source=/usr,xattr', '-o', 'cache=none,no_xattr');
  assert.deepEqual([twice.sharedDir, twice.cache, twice.xattr], ['/usr', 'never', false]);
});

test('as libvirt 9.0 calls', () => {
  const made = config('--fd=21', '-o', 'source=/usr,cache=always,xattr,no_flock,no_posix_lock', '-d', '--thread-pool-size=4');
  assert.deepEqual(
    [made.listenOn, made.sharedDir, made.cache, made.xattr, made.logLevel, made.threadPoolSize],
    [{ kind: 'fd', fd: 21 }, '/usr', 'always', true, 'debug', 4],
  );
  assert.equal(refusal('--fd=21', '-o', 'source=/a,,b,,,cache=none'), '--shared-dir: /a,b, does not exist: name an existing directory');
});

test('as libvirt 11 calls', () => {
  const argv = '--fd=21 --shared-dir /usr --cache never --xattr --sandbox none --thread-pool-size=4 --rlimit-nofile=4096 --readonly';
  const made = config(...argv.split(' '), '--log-level', 'debug');
  assert.deepEqual([made.sharedDir, made.cache, made.xattr, made.readonly, made.rlimitNofile], ['/usr', 'never', true, true, 4096]);
  assert.deepEqual(made.warnings, []);
});

for (const [text, line] of [
  ['sandbox=jail', '--sandbox=jail is not known: give one of namespace, chroot, none'],
  ['cache=sometimes', '--cache=sometimes is not known: give one of auto, always, never, metadata, notify'],
  ['timeout=soon', '--entry-timeout=soon is no number of seconds from 0 to 2147483647'],
  ['debug', '-o debug is not known: use the separate options, see --help'],
  ['__proto__', '-o __proto__ is not known: use the separate options, see --help'],
  ['constructor=1', '-o constructor=1 is not known: use the separate options, see --help'],
  ['', '-o  is not known: use the separate options, see --help'],
  ['xattr,', '-o  is not known: use the separate options, see --help'],
] as const) {
  test(`refused: -o ${JSON.stringify(text)}`, () => assert.equal(refusal(...BASE, '-o', text), line));
}

// --- help, version, capabilities ---

test('--help, --version and --print-capabilities need nothing else', () => {
  for (const word of ['--help', '-h']) assert.deepEqual(parse([word, '--nope']), { action: 'help' });
  for (const word of ['--version', '-V']) assert.deepEqual(parse([word]), { action: 'version' });
  assert.deepEqual(parse(['--print-capabilities']), { action: 'print-capabilities' });
  assert.equal(refusal('--print-capabilities', '--cache=x'), '--cache=x is not known: give one of auto, always, never, metadata, notify');
});

test('--help has every option with its default and choices, and fits its width', async () => {
  const text = await help(100);
  for (const line of text.split('\n')) assert.ok(line.length <= 100, line);
  const flat = text.replace(/\s+/g, ' ');
  for (const spec of OPTIONS) {
    assert.ok(text.includes(`${spec.name.length === 1 ? '-' : '--'}${spec.name} `), spec.name);
    assert.ok(flat.includes(('value' in spec ? `<${spec.value}> ` : '') + spec.summary), `${spec.name}: ${spec.summary}`);
    if ('default' in spec) assert.ok(flat.includes(`[default: ${JSON.stringify(spec.default)}]`), spec.name);
    if ('defaultText' in spec) assert.ok(flat.includes(`[default: ${spec.defaultText}]`), spec.name);
  }
});

test('capabilities are JSON of vhost-user.json, with live migration', () => {
  const { type, features } = JSON.parse(capabilities());
  assert.equal(type, 'fs');
  assert.ok(features.includes('separate-options'));
  assert.ok(features.includes('migrate-precopy'));
});

test('the version is that of package.json', () => {
  const { name, version } = JSON.parse(readFileSync(new URL('../../../../package.json', import.meta.url), 'utf8'));
  assert.deepEqual([PROGRAM, VERSION], [name, version]);
});

test('the process: one line and status 2 for wrong use, status 0 for what prints', () => {
  const script = `
    import { commandLine } from '${new URL('../../src/cli.js', import.meta.url).href}';
    console.log('run', (await commandLine(process.argv.slice(1))).sharedDir);
  `;
  const run = (...argv: string[]) => {
    const { status, stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', script, '--', ...argv], {
      encoding: 'utf8',
    });
    return { status, stdout, stderr };
  };
  assert.deepEqual(run('--nope'), { status: 2, stdout: '', stderr: 'virtiofsd-ts: unknown option --nope: see --help\n' });
  assert.deepEqual(run('--version'), { status: 0, stdout: `virtiofsd-ts ${VERSION}\n`, stderr: '' });
  assert.deepEqual(run('--print-capabilities'), { status: 0, stdout: capabilities(), stderr: '' });
  assert.deepEqual(run('--shared-dir=/usr', '--fd=3'), { status: 0, stdout: 'run /usr\n', stderr: '' });
  const asked = run('--help');
  assert.equal(asked.status, 0);
  assert.match(asked.stdout, /^virtiofsd-ts --shared-dir=DIR --socket-path=PATH/);
});
