/** A second process that changes files: its events are no echo. Each change is a JSON line on its standard input, and answered. */
import { type ChildProcess, spawn } from 'node:child_process';
import * as fs from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { arenaAlloc, cString, native } from 'vhost-user-ts/native';

/** What it can do; paths are relative to its working directory. */
export type Change =
  | { op: 'write' | 'append' | 'mkfifo'; path: string; data?: string }
  | { op: 'touch' | 'mkdir' | 'rmdir' | 'unlink' | 'list' | 'read' | 'tmpfile' | 'rmtree'; path: string }
  | { op: 'chmod'; path: string; mode: number }
  | { op: 'truncate'; path: string; size: number }
  | { op: 'setxattr'; path: string; name: string; value: string }
  | { op: 'link' | 'symlink' | 'rename' | 'exchange'; path: string; to: string }
  | { op: 'storm'; path: string; files: number; directories: number }
  | { op: 'appendMany'; path: string; count: number };

export class Changer {
  readonly #child: ChildProcess;
  readonly #waiting: ((line: string) => void)[] = [];

  constructor(cwd: string, options: { uid?: number; gid?: number } = {}) {
    this.#child = spawn(process.execPath, ['--no-warnings', fileURLToPath(import.meta.url), 'serve'], {
      cwd,
      stdio: ['pipe', 'pipe', 'inherit'],
      ...options,
    });
    createInterface({ input: this.#child.stdout as NodeJS.ReadableStream }).on('line', (line) => this.#waiting.shift()?.(line));
  }

  get pid(): number {
    return this.#child.pid ?? 0;
  }

  async do(change: Change): Promise<void> {
    const answer = await new Promise<string>((resolve) => {
      this.#waiting.push(resolve);
      this.#child.stdin?.write(`${JSON.stringify(change)}\n`);
    });
    if (answer !== 'ok') throw new Error(`${JSON.stringify(change)}: ${answer}`);
  }

  close(): void {
    this.#child.stdin?.end();
  }
}

function must(result: number): void {
  if (result < 0) throw new Error(`errno ${-result}`);
}

/** Makes a change; also called in the test's own process, to make an echo. */
export function change(c: Change): void {
  const a = () => cString(c.path, FIRST);
  switch (c.op) {
    case 'write':
      fs.writeFileSync(c.path, c.data ?? 'x');
      break;
    case 'append':
      fs.appendFileSync(c.path, c.data ?? 'x');
      break;
    case 'appendMany': {
      const fd = fs.openSync(c.path, 'a');
      for (let i = 0; i < c.count; i++) fs.writeSync(fd, 'x');
      fs.closeSync(fd);
      break;
    }
    case 'touch':
      fs.utimesSync(c.path, 1, 2);
      break;
    case 'chmod':
      fs.chmodSync(c.path, c.mode);
      break;
    case 'truncate':
      fs.truncateSync(c.path, c.size);
      break;
    case 'mkdir':
      fs.mkdirSync(c.path);
      break;
    case 'rmdir':
      fs.rmdirSync(c.path);
      break;
    case 'unlink':
      fs.unlinkSync(c.path);
      break;
    case 'rmtree':
      fs.rmSync(c.path, { recursive: true });
      break;
    case 'list':
      fs.readdirSync(c.path);
      break;
    case 'read':
      fs.readFileSync(c.path);
      break;
    case 'link':
      fs.linkSync(c.path, c.to);
      break;
    case 'symlink':
      fs.symlinkSync(c.path, c.to);
      break;
    case 'rename':
      fs.renameSync(c.path, c.to);
      break;
    case 'exchange':
      must(native.renameat2(-100, a(), -100, cString(c.to, SECOND), 2));
      break;
    case 'mkfifo':
      must(native.mknodat(-100, a(), 0x1000 | 0o600, 0));
      break;
    case 'setxattr': {
      const fd = fs.openSync(c.path, 0x200000); // O_PATH: opening it is no event
      const procfd = fs.openSync('/proc/self/fd', fs.constants.O_RDONLY | fs.constants.O_DIRECTORY);
      const value = cString(c.value, SECOND);
      const cwd = process.cwd();
      const error = native.setxattr(procfd, fd, cString(c.name, FIRST), value, c.value.length, 0);
      process.chdir(cwd);
      fs.closeSync(fd);
      fs.closeSync(procfd);
      must(error);
      break;
    }
    case 'tmpfile': {
      const slash = c.path.lastIndexOf('/');
      const fd = native.openat(-100, cString(c.path.slice(0, slash), FIRST), 0x410000 | fs.constants.O_RDWR, 0o600);
      must(fd);
      fs.writeSync(fd, 'x');
      const procfd = fs.openSync('/proc/self/fd', fs.constants.O_RDONLY | fs.constants.O_DIRECTORY);
      const error = native.linkProc(procfd, fd, -100, a());
      fs.closeSync(procfd);
      fs.closeSync(fd);
      must(error);
      break;
    }
    case 'storm':
      for (let i = 0; i < c.files; i++) {
        const path = `${c.path}/${i % c.directories}/f${i}`;
        fs.closeSync(fs.openSync(path, 'w'));
      }
      break;
  }
}

const FIRST = arenaAlloc(8192);
const SECOND = arenaAlloc(8192);

if (process.argv[1] === fileURLToPath(import.meta.url) && process.argv[2] === 'serve') {
  for await (const line of createInterface({ input: process.stdin })) {
    let answer = 'ok';
    try {
      change(JSON.parse(line) as Change);
    } catch (error) {
      answer = String(error).replaceAll('\n', ' ');
    }
    fs.writeSync(1, `${answer}\n`);
  }
}
