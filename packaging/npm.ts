/**
 * Stages the npm packages in build/npm/: what `npm pack` is run on. Each holds what it was built to and the C or C++ source of that,
 * which is compiled at the installation where the built one does not run.
 */
import { chmodSync, cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const TO = 'build/npm';
const SHEBANG = '#!/usr/bin/env -S node --no-warnings --max-semi-space-size=4\n';

interface Package {
  readonly version: string;
  readonly license: string;
  readonly engines: object;
  readonly dependencies: Readonly<Record<string, string>>;
  readonly devDependencies: Readonly<Record<string, string>>;
  readonly [field: string]: unknown;
}

const program = json('package.json');
const library = json('src/vhost-user-ts/package.json');
/** What both have. */
const common = { os: ['linux'], repository: undefined, workspaces: undefined, private: undefined, devDependencies: undefined };

function json(path: string): Package {
  return JSON.parse(readFileSync(path, 'utf8')) as Package;
}

/** Begins a package's folder with what every package has. */
function stage(name: string, description: Record<string, unknown>, readme: string): string {
  const folder = join(TO, name);
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(join(folder, 'native'), { recursive: true });
  // The field order is kept; undefined takes a field away.
  writeFileSync(join(folder, 'package.json'), `${JSON.stringify(description, null, 2)}\n`);
  cpSync(readme, join(folder, 'README.md'));
  cpSync('LICENSE', join(folder, 'LICENSE'));
  cpSync('CHANGELOG.md', join(folder, 'CHANGELOG.md'));
  return folder;
}

function copy(from: string, to: string, without: RegExp): void {
  cpSync(from, to, { recursive: true, filter: (path) => !without.test(path) });
}

function stageLibrary(): void {
  const folder = stage(
    'vhost-user-ts',
    {
      ...library,
      ...common,
      scripts: { install: 'node native/install.js' },
      dependencies: { 'node-addon-api': program.devDependencies['node-addon-api'] },
      files: ['dist', 'native'],
    },
    'src/vhost-user-ts/README.md',
  );
  copy('src/vhost-user-ts/dist', join(folder, 'dist'), /\.map$|\.tsbuildinfo$/);
  for (const name of ['binding.gyp', ...sources(readFileSync('native/binding.gyp', 'utf8'))])
    cpSync(join('native', name), join(folder, 'native', name));
  cpSync('packaging/npm/addon.js', join(folder, 'native/install.js'));
}

/** The C++ files of binding.gyp, and the header that they share. */
function sources(gyp: string): string[] {
  return [...gyp.matchAll(/"(\w+\.cc)"/g)].map(([, name]) => name as string).concat('addon.h');
}

function stageProgram(): void {
  const { dependencies } = program;
  const folder = stage(
    'virtiofsd-ts',
    {
      ...program,
      ...common,
      bin: { 'virtiofsd-ts': 'js/src/main.js' },
      man: 'virtiofsd-ts.1',
      scripts: { install: 'node native/install.js' },
      dependencies,
      files: ['js', 'native', 'virtiofsd-ts-sandbox', 'virtiofsd-ts.1'],
    },
    'README.md',
  );
  copy('build/js/src', join(folder, 'js/src'), /\.map$|\.d\.ts$/);
  const main = join(folder, 'js/src/main.js');
  writeFileSync(main, SHEBANG + readFileSync(main, 'utf8'));
  chmodSync(main, 0o755);
  cpSync('build/virtiofsd-ts-sandbox', join(folder, 'virtiofsd-ts-sandbox'));
  cpSync('build/man/virtiofsd-ts.1', join(folder, 'virtiofsd-ts.1'));
  for (const name of ['sandbox.c', 'filter.c', 'sandbox.h']) cpSync(join('native', name), join(folder, 'native', name));
  cpSync('packaging/npm/sandbox.js', join(folder, 'native/install.js'));
}

stageLibrary();
stageProgram();
