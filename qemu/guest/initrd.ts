/** The guest's initial RAM disk: a cpio archive of busybox, the agent, kernel modules and inotifywait. */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync } from 'node:fs';
import path from 'node:path';
import { GuestError } from './agent.js';

/** What goes into the archive, by path in the guest without the first slash. */
type Entry = { mode: number; data?: Buffer; device?: [major: number, minor: number] };

export interface InitrdOptions {
  /** Folder with `init` and `agent.c`. */
  sources: string;
  /** Folder where the compiled agent is kept. */
  cache: string;
  /** A static busybox. */
  busybox: string;
  /** The guest is arm64, and this its busybox, of the same version. inotifywait is the host's and left out. */
  arm64Busybox?: string | undefined;
  /** `lib/modules/VERSION` of the kernel; without it everything is taken to be built in. */
  modulesDir?: string | undefined;
  /**
   * Modules to load, in this order, each after those it depends on: a name, looked up in `modulesDir` (nothing is loaded for
   * one that is built in), or the path of a .ko file, which also takes the place of the stock module of that name.
   */
  modules: string[];
  /** Further files: path in the guest to path on the host. */
  files?: Record<string, string> | undefined;
}

/** Builds the archive. It is not compressed: loading it takes less time than unpacking it would. */
export function buildInitrd(options: InitrdOptions): Buffer {
  const entries = new Map<string, Entry>();
  const file = (name: string, data: Buffer | string, mode = 0o100755): void => {
    const relative = name.replace(/^\/+/, '');
    const parts = relative.split('/');
    for (let depth = 1; depth < parts.length; depth++) {
      const folder = parts.slice(0, depth).join('/');
      if (!entries.has(folder)) entries.set(folder, { mode: 0o40755 });
    }
    entries.set(relative, { mode, data: Buffer.from(data) });
  };

  for (const folder of ['proc', 'sys', 'dev', 'tmp', 'run', 'mnt', 'newroot', 'var', 'root', 'home']) {
    entries.set(folder, { mode: 0o40755 });
  }
  // The first program's stdout, before /dev is mounted.
  entries.set('dev/console', { mode: 0o20600, device: [5, 1] });
  file('init', readFileSync(path.join(options.sources, 'init')));
  file('bin/agent', readFileSync(compileAgent(path.join(options.sources, 'agent.c'), options.cache, options.arm64Busybox !== undefined)));
  file('bin/busybox', readFileSync(options.arm64Busybox ?? options.busybox));
  for (const applet of execFileSync(options.busybox, ['--list'], { encoding: 'utf8' }).trim().split('\n')) {
    if (applet !== 'busybox') file(`bin/${applet}`, 'busybox', 0o120777);
  }
  file('etc/passwd', 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n', 0o100644);
  file('etc/group', 'root:x:0:\nnogroup:x:65534:\n', 0o100644);

  const modules = orderModules(options.modules, options.modulesDir);
  file('lib/modules/order', modules.map(({ name }) => `${name}\n`).join(''), 0o100644);
  for (const { name, data } of modules) file(`lib/modules/${name}.ko`, data, 0o100644);

  for (const program of ['inotifywait', 'inotifywatch', 'fsnotifywait', 'fsnotifywatch']) {
    const host = `/usr/bin/${program}`;
    if (options.arm64Busybox || !existsSync(host)) continue;
    file(`bin/${program}`, readFileSync(host));
    for (const [library] of execFileSync('ldd', [host], { encoding: 'utf8' }).matchAll(/\/[^\s()]+/g)) {
      file(library, readFileSync(library));
    }
  }
  for (const [guest, host] of Object.entries(options.files ?? {})) file(guest, readFileSync(host));
  return cpio(entries);
}

/** Compiles the agent once for each text of its source. */
function compileAgent(source: string, cache: string, arm64: boolean): string {
  const hash = createHash('sha256').update(readFileSync(source)).digest('hex').slice(0, 16);
  const binary = path.join(cache, `agent-${arm64 ? 'arm64-' : ''}${hash}`);
  if (!existsSync(binary)) {
    mkdirSync(cache, { recursive: true });
    const partial = `${binary}.${process.pid}`;
    try {
      execFileSync(arm64 ? 'aarch64-linux-gnu-gcc' : 'gcc', ['-static', '-O2', '-s', '-Wall', '-Wextra', '-o', partial, source], {
        stdio: ['ignore', 2, 2],
      });
    } catch {
      throw new GuestError(`cannot compile ${source}`);
    }
    renameSync(partial, binary);
  }
  return binary;
}

interface Module {
  name: string;
  data: Buffer;
}

function orderModules(wanted: string[], modulesDir: string | undefined): Module[] {
  const stock = new Map<string, string>();
  if (modulesDir) {
    for (const relative of readdirSync(modulesDir, { recursive: true, encoding: 'utf8' })) {
      const match = /([^/]+)\.ko(\.xz)?$/.exec(relative);
      if (match?.[1]) stock.set(moduleName(match[1]), path.join(modulesDir, relative));
    }
  }
  for (const item of wanted.filter((name) => name.includes('/'))) {
    if (!existsSync(item)) throw new GuestError(`no such kernel module: ${item}`);
    stock.set(moduleName(path.basename(item, '.ko')), item);
  }

  const builtIn = new Set(
    (modulesDir ? readFileSync(path.join(modulesDir, 'modules.builtin'), 'utf8') : '')
      .split('\n')
      .map((line) => moduleName(path.basename(line, '.ko'))),
  );

  const ordered = new Map<string, Module>();
  const add = (name: string): void => {
    const file = stock.get(name);
    if (!file && modulesDir && !builtIn.has(name)) throw new GuestError(`the guest's kernel has no module ${name}`);
    if (!file || ordered.has(name)) return;
    const data = file.endsWith('.xz') ? execFileSync('xz', ['-dc', file], { maxBuffer: 1 << 28 }) : readFileSync(file);
    for (const dependency of moduleDependencies(data)) add(dependency);
    ordered.set(name, { name, data });
  };
  for (const item of wanted) add(moduleName(path.basename(item, '.ko')));
  return [...ordered.values()];
}

const moduleName = (name: string): string => name.replaceAll('-', '_');

/** The `depends=` entry of a module's .modinfo section, so that no depmod has to be run. */
function moduleDependencies(module: Buffer): string[] {
  const at = module.indexOf('\0depends=');
  if (at < 0) return [];
  const start = at + '\0depends='.length;
  return module.toString('latin1', start, module.indexOf(0, start)).split(',').filter(Boolean).map(moduleName);
}

/** The "newc" format that the kernel unpacks. */
function cpio(entries: Map<string, Entry>): Buffer {
  const chunks: Buffer[] = [];
  const pad = (length: number): Buffer => Buffer.alloc((4 - (length % 4)) % 4);
  let inode = 1;
  const write = (name: string, { mode, data = Buffer.alloc(0), device = [0, 0] }: Entry): void => {
    const nameLength = Buffer.byteLength(name) + 1;
    const fields = [inode++, mode, 0, 0, 1, 0, data.length, 0, 0, device[0], device[1], nameLength, 0];
    const header = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}${name}\0`;
    chunks.push(Buffer.from(header), pad(header.length), data, pad(data.length));
  };
  for (const [name, entry] of entries) write(name, entry);
  write('TRAILER!!!', { mode: 0 });
  return Buffer.concat(chunks);
}
