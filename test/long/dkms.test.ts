/** `make deb-dkms`: DKMS builds the modules of the package for Debian's kernels, and a guest has events with those for its kernel. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { copyFileSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { homedir, tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { after, before, type TestContext, test } from 'node:test';
import { repository } from '../../qemu/guest/daemon.js';
import { VERSION } from '../../src/options.js';
import { needsRoot } from '../support/daemon.js';
import { Watcher } from '../support/fsnotify.js';
import { type SetupOptions, setUp } from '../support/guests.js';
import { Machine } from '../support/machine.js';

const NAME = 'virtiofs-fsnotify';
const CACHE = join(process.env['XDG_CACHE_HOME'] ?? join(homedir(), '.cache'), 'virtiofsd-ts');
const file = join(repository, 'build/deb', `${NAME}-dkms_${VERSION}_all.deb`);
const folder = mkdtempSync(join(tmpdir(), 'dkms-'));
after(() => rmSync(folder, { recursive: true, force: true }));

before(() => {
  execFileSync(join(repository, 'qemu/setup.sh'), ['packages', 'to build and check the package of modules', 'dkms', 'lintian'], {
    stdio: ['ignore', 'inherit', 'inherit'],
  });
  execFileSync('make', ['-s', '-C', repository, 'deb-dkms'], { stdio: ['ignore', 'ignore', 'inherit'] });
});

test('lintian has nothing to say', () => {
  const { status, stdout } = spawnSync(
    'lintian',
    ['--allow-root', '--display-info', '--pedantic', '--fail-on', 'error,warning,info,pedantic', file],
    { encoding: 'utf8' },
  );
  assert.deepEqual([status, stdout], [0, '']);
});

/** What uname says in the guest with the kernel of the backports. */
let release612 = '';

for (const [series, modules] of [
  ['6.1', ['fuse', 'virtiofs']],
  ['6.12', ['vfuse']],
] as const) {
  test(`Linux ${series}: installed, built by DKMS for Debian's kernel, removed again`, {
    ...needsRoot,
    timeout: 600_000,
  }, async () => {
    // Headers of a kernel that this machine does not run, as modules.sh has them.
    const built = execFileSync(join(repository, 'qemu/guest/kernel/modules.sh'), [series], { encoding: 'utf8' });
    const release = readdirSync(join(CACHE, 'headers')).find((name) =>
      basename(dirname(built.split('\n')[0] as string)).startsWith(`${name}-`),
    );
    assert.ok(release !== undefined, built);
    assert.ok(release.startsWith(`${series}.`), built);
    if (series === '6.12') release612 = release;
    await using machine = await Machine.start();
    const at = `/lib/modules/${release}`;
    const builtin = modules.length === 1 ? 'kernel/fs/fuse/fuse.ko' : '';
    machine.must(
      'sh',
      '-c',
      `mkdir -p ${at} && ln -s ${CACHE}/headers/${release}/usr/src/linux-headers-${release} ${at}/build && touch ${at}/modules.order && echo ${builtin} > ${at}/modules.builtin`,
    );
    copyFileSync(file, join(machine.root, 'tmp/package.deb'));
    machine.must('dpkg', '-i', '/tmp/package.deb');
    assert.match(machine.must('dkms', 'status', NAME), new RegExp(`${NAME}/${VERSION}[^]*(added|installed)`));
    machine.must('dkms', 'install', `${NAME}/${VERSION}`, '-k', release);
    assert.match(machine.must('dkms', 'status', NAME, '-k', release), /: installed/);
    for (const module of modules) {
      const path = machine.must('find', `${at}/updates/dkms`, '-name', `${module}.ko*`).trim();
      assert.match(machine.must('modinfo', '-F', 'vermagic', path), new RegExp(`^${release.replaceAll(/[.+]/g, '\\$&')} `));
      copyFileSync(join(machine.root, path), join(folder, basename(path)));
      if (path.endsWith('.xz')) execFileSync('unxz', ['-f', join(folder, basename(path))]);
    }
    machine.must('dpkg', '--purge', `${NAME}-dkms`);
    assert.equal(
      machine.must('find', at, '/usr/src', '/var/lib/dkms', '-name', `*fuse*`),
      machine.must('find', '/usr/src', '-name', '*fuse*'),
    );
    assert.equal(machine.run('ls', `/usr/src/${NAME}-${VERSION}`).status, 2);
  });
}

/** Waits in a guest for an event of the host. */
async function hearsOfTheHost(options: SetupOptions, t: TestContext): Promise<void> {
  const setup = await setUp(options);
  try {
    const watcher = Watcher.inGuest(setup.guest, "inotifywait -m --format '%e %f' /mnt 2>&1");
    t.after(() => watcher.close());
    await watcher.until('Watches established.');
    execFileSync('mkdir', [join(setup.share, 'made-on-the-host')]);
    await watcher.until('CREATE,ISDIR made-on-the-host');
  } finally {
    await setup.end();
  }
}

test('a guest with Debian 12 and these modules has events', { ...needsRoot, timeout: 180_000 }, async (t) => {
  const modules = ['fuse', 'virtiofs'].map((name) => join(folder, `${name}.ko`));
  await hearsOfTheHost({ kind: 'qemu', kernel: 'debian-plain', modules }, t);
});

test("a guest with the backports' kernel, started as boot.sh has it, and vfuse has events", {
  ...needsRoot,
  timeout: 600_000,
}, async (t) => {
  const script = (...args: [string, ...string[]]) =>
    execFileSync(join(repository, args[0]), args.slice(1), { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] }).trim();
  const stock = script('qemu/guest/kernel/stock.sh', release612);
  const [image, modulesDir] = ['kernel', 'modules'].map((name) => new RegExp(`^${name}=(.*)$`, 'm').exec(stock)?.[1]) as [string, string];
  const kernel = { image, modulesDir, modules: [join(folder, 'vfuse.ko')] };
  const words = /GRUB_CMDLINE_LINUX (initcall_blacklist=\S+)"/.exec(
    readFileSync(join(repository, 'qemu/guest/kernel/dkms/boot.sh'), 'utf8'),
  )?.[1];
  assert.ok(words !== undefined);
  // Without KVM this kernel oopses in QEMU 7.2, each time elsewhere.
  await hearsOfTheHost({ kind: 'qemu', qemu: script('qemu/newest-qemu.sh'), kernel, kernelArgs: [words], timeoutMs: 180_000 }, t);
});
