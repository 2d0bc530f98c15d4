/** `make npm`: the packages, installed by npm where nothing of this repository is to be seen, with types and exports that work. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, realpathSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { after, before, test } from 'node:test';
import { repository, startDaemon } from '../../qemu/guest/daemon.js';
import { VERSION } from '../../src/options.js';
import { needsRoot } from '../support/daemon.js';
import { FuseClient } from '../support/fuse-client.js';

const folder = realpathSync(mkdtempSync(join(tmpdir(), 'npm-')));
after(() => rmSync(folder, { recursive: true, force: true }));
const project = join(folder, 'project');
const NPM = join(repository, 'build/npm');
/** Without a compiler. */
const bin = join(folder, 'bin');
const bare = `PATH=${bin}`;

/** Runs a command in the project; as root the repository is hidden from it. */
function run(command: string, ...args: string[]) {
  const hidden =
    process.geteuid?.() === 0 ? ['unshare', '-m', 'sh', '-c', 'mount -t tmpfs none "$0" && exec "$@"', repository.replace(/\/$/, '')] : [];
  const [program, ...rest] = [...hidden, command, ...args];
  return spawnSync(program as string, rest, { cwd: project, encoding: 'utf8', timeout: 300_000 });
}

function must(command: string, ...args: string[]): string {
  const { status, stdout, stderr } = run(command, ...args);
  assert.equal(status, 0, `${command} ${args.join(' ')}\n${stdout}${stderr}`);
  return stdout;
}

before(() => {
  execFileSync('make', ['-s', '-C', repository, 'npm'], { stdio: 'pipe' });
  mkdirSync(project);
  for (const name of ['vhost-user-ts', 'virtiofsd-ts']) execFileSync('cp', [join(NPM, `${name}-${VERSION}.tgz`), folder]);
  writeFileSync(join(project, 'package.json'), '{ "name": "project", "type": "module" }');
  mkdirSync(bin);
  const npm = execFileSync('sh', ['-c', 'command -v npm'], { encoding: 'utf8' }).trim();
  for (const program of [process.execPath, npm, '/bin/sh', '/usr/bin/env'])
    symlinkSync(realpathSync(program), join(bin, basename(program)));
  must(
    'env',
    bare,
    'npm',
    'install',
    '--prefer-offline',
    `${folder}/vhost-user-ts-${VERSION}.tgz`,
    `${folder}/virtiofsd-ts-${VERSION}.tgz`,
  );
});

test('the program: version, help, a share served from its sandbox', async () => {
  const program = join(project, 'node_modules/.bin/virtiofsd-ts');
  assert.equal(must(program, '--version'), `virtiofsd-ts ${VERSION}\n`);
  assert.match(must(program, '--help'), /--shared-dir/);
  const share = join(folder, 'share');
  mkdirSync(share);
  writeFileSync(join(share, 'file'), 'by npm');
  const daemon = await startDaemon({ shareDir: share, daemon: program });
  const client = FuseClient.connect(daemon.socketPath);
  try {
    client.init();
    const { nodeid } = client.lookup(1, 'file');
    const { fh } = client.open(nodeid);
    assert.equal(client.read(nodeid, fh, 0, 100).toString(), 'by npm');
  } finally {
    client.close();
    await daemon.stop();
  }
});

test('packages beside and above the program', () => {
  // A project that has another version of a library: npm puts ours below our own folder.
  const nested = join(project, 'node_modules/virtiofsd-ts/node_modules');
  mkdirSync(nested);
  execFileSync('mv', [join(project, 'node_modules/yargs-parser'), nested]);
  const socket = join(folder, 'nested.sock');
  const script = `"$0" --shared-dir=/usr --socket-path=${socket} & pid=$!; for i in $(seq 300); do [ -S ${socket} ] && break; sleep 0.02; done; sleep 1; kill $pid; wait $pid`;
  const { status, stderr } = run('sh', '-c', script, join(project, 'node_modules/.bin/virtiofsd-ts'));
  execFileSync('mv', [join(nested, 'yargs-parser'), join(project, 'node_modules')]);
  assert.equal(status, 0, stderr);
  assert.match(stderr, /INFO {2}sharing \/usr/);
});

test('the library: each export with its types, for a strict TypeScript', () => {
  writeFileSync(
    join(project, 'use.ts'),
    `import { Feature, features, VhostUserBackend, WaitLoop } from 'vhost-user-ts';
import { native } from 'vhost-user-ts/native';
import { MockDriver } from 'vhost-user-ts/testing';
const bits: bigint = features(Feature.VERSION_1);
// @ts-expect-error it is no string
const wrong: string = bits;
console.log(typeof VhostUserBackend, typeof WaitLoop, typeof MockDriver, bits, native.getpid() === process.pid, wrong !== '');
`,
  );
  const compiler = [
    join(repository, 'node_modules/typescript/bin/tsc'),
    '--strict',
    '--target',
    'es2023',
    '--lib',
    'es2023,es2024.sharedmemory,esnext.disposable',
  ];
  const types = ['--module', 'nodenext', '--types', 'node', '--typeRoots', join(repository, 'node_modules/@types'), 'use.ts'];
  execFileSync(process.execPath, [...compiler, ...types], { cwd: project, stdio: 'inherit' });
  assert.equal(must('node', 'use.js'), 'function function function 4294967296n true true\n');
});

test('no add-on that runs: npm builds it from the source in the package', needsRoot, () => {
  const addon = join(project, 'node_modules/vhost-user-ts/dist/addon.node');
  writeFileSync(addon, 'for another processor');
  must('npm', 'rebuild', 'vhost-user-ts');
  assert.ok(statSync(addon).size > 20_000);
  assert.match(must('node', 'use.js'), /true true/);
});

test('nothing that runs and no compiler: the add-on says what to install, the launcher when it is needed', needsRoot, () => {
  const addon = join(project, 'node_modules/vhost-user-ts/dist/addon.node');
  const built = readFileSync(addon);
  writeFileSync(addon, 'for another processor');
  const { status, stderr } = run('env', bare, 'npm', 'rebuild', 'vhost-user-ts');
  assert.notEqual(status, 0);
  assert.match(stderr, /vhost-user-ts: the add-on cannot be built: .*apt-get install g\+\+ make python3/);
  writeFileSync(addon, built);

  const launcher = join(project, 'node_modules/virtiofsd-ts/virtiofsd-ts-sandbox');
  const program = join(project, 'node_modules/.bin/virtiofsd-ts');
  writeFileSync(launcher, 'for another processor');
  must('env', bare, 'npm', 'rebuild', 'virtiofsd-ts');
  const start = run(program, '--shared-dir=/usr', `--socket-path=${folder}/none.sock`);
  assert.equal(start.status, 1, start.stderr);
  assert.match(start.stderr, /virtiofsd-ts-sandbox is missing: .*libseccomp-dev, then npm rebuild virtiofsd-ts.*--sandbox=none/);
  must('npm', 'rebuild', 'virtiofsd-ts');
  assert.ok(statSync(launcher).size > 20_000);
  assert.match(must('sh', '-c', `"${launcher}" 2>&1 || true`), /usage|--/);
});

test('what is in them: nothing but what is needed, no path of this repository', () => {
  for (const name of ['vhost-user-ts', 'virtiofsd-ts']) {
    const at = join(NPM, name);
    const files = readdirSync(at, { recursive: true, encoding: 'utf8' });
    assert.deepEqual(
      files.filter((file) => /\.map$|tsbuildinfo|\.ts$/.test(file) && !file.endsWith('.d.ts')),
      [],
    );
    const { stdout } = spawnSync('grep', ['-rlF', '--', repository.replace(/\/$/, ''), at], { encoding: 'utf8' });
    assert.equal(stdout, '', name);
    const { private: secret, engines } = JSON.parse(readFileSync(join(at, 'package.json'), 'utf8'));
    assert.deepEqual([secret, engines], [undefined, { node: '>=20.19' }]);
  }
});

test('make sbom: every library that is installed', () => {
  execFileSync('make', ['-s', '-C', repository, 'sbom'], { stdio: 'pipe' });
  const { components } = JSON.parse(readFileSync(join(repository, 'build/sbom.json'), 'utf8')) as {
    components: { name: string; version: string }[];
  };
  // Versions may be newer ones at another time.
  const listed = new Map(components.map(({ name, version }) => [name, version]));
  const modules = join(project, 'node_modules');
  const names = readdirSync(modules).flatMap((name) =>
    name.startsWith('.') ? [] : name.startsWith('@') ? readdirSync(join(modules, name)).map((inner) => `${name}/${inner}`) : [name],
  );
  // The daemon itself is what the list is about; the header library is needed for building alone.
  for (const name of names.filter((each) => each !== 'virtiofsd-ts' && each !== 'node-addon-api'))
    assert.match(listed.get(name) ?? '', /^\d+\.\d+\.\d+/, name);
});
