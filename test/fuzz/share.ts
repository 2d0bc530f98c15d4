/** The directory that fuzzers share, and what lies beside it that must stay as it is. */
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { must } from './engine.js';

/** Names that are in a fresh share. */
export const NAMES = ['file', 'dir', 'sub', 'many', 'deep', 'out', 'abs', 'up', 'hard', 'fifo', 'loop', 'big'] as const;

/** Where shares are made: in memory, so that fsync costs nothing; FUZZ_DIR is for other file systems. */
export function folder(): string {
  const chosen = process.env['FUZZ_DIR'];
  if (chosen !== undefined) return chosen;
  return fs.existsSync('/dev/shm') ? '/dev/shm' : tmpdir();
}

export class FuzzShare {
  /** Holds `share` and `outside`. */
  readonly base: string;
  readonly path: string;
  readonly #outside: string;
  readonly #before: string;

  constructor() {
    this.base = fs.realpathSync(fs.mkdtempSync(join(folder(), 'fuzz-')));
    this.path = join(this.base, 'share');
    this.#outside = join(this.base, 'outside');
    fs.mkdirSync(this.path);
    fs.mkdirSync(join(this.#outside, 'dir'), { recursive: true });
    fs.writeFileSync(join(this.#outside, 'secret'), 'secret', { mode: 0o600 });
    fs.writeFileSync(join(this.#outside, 'dir', 'file'), 'file');
    fs.writeFileSync(join(this.#outside, 'file'), 'file');
    this.refill();
    this.#before = snapshot(this.#outside);
  }

  /** Empties the share and puts in what it begins with. */
  refill(): void {
    const at = (name: string) => join(this.path, name);
    fs.chownSync(this.path, 0, 0);
    fs.chmodSync(this.path, 0o755);
    for (const name of fs.readdirSync(this.path, { encoding: 'buffer' })) {
      fs.rmSync(Buffer.concat([Buffer.from(`${this.path}/`), name]), { recursive: true, force: true });
    }
    fs.writeFileSync(at('file'), 'some text');
    fs.mkdirSync(at('dir'));
    fs.mkdirSync(at('dir/sub'));
    fs.mkdirSync(at('many'));
    for (let i = 0; i < 40; i++) fs.writeFileSync(at(`many/${i}${'x'.repeat((i * 7) % 60)}`), '');
    fs.mkdirSync(at('deep/dir/dir/dir'), { recursive: true });
    fs.writeFileSync(at('deep/dir/file'), 'deep');
    fs.symlinkSync('../outside', at('out'));
    fs.symlinkSync(join(this.#outside, 'secret'), at('abs'));
    fs.symlinkSync('..', at('up'));
    fs.symlinkSync('loop', at('loop'));
    fs.linkSync(at('file'), at('hard'));
    fs.writeFileSync(at('big'), Buffer.alloc(300_000, 'b'));
  }

  /** Everything in the share but access times. */
  contents(): string {
    return snapshot(this.path);
  }

  /** @throws Finding when something outside the share is not what it was */
  checkOutside(): void {
    must(fs.readdirSync(this.base).length === 2, () => `new beside the share: ${fs.readdirSync(this.base)}`);
    const now = snapshot(this.#outside);
    must(now === this.#before, () => `something outside the share has changed:\n${this.#before}\n${now}`);
  }

  close(): void {
    fs.rmSync(this.base, { recursive: true, force: true });
  }
}

function snapshot(folder: string): string {
  const lines: string[] = [];
  const visit = (at: string): void => {
    const { ino, mode, uid, gid, nlink, size, mtimeMs, ctimeMs } = fs.lstatSync(at);
    lines.push([at, ino, mode.toString(8), uid, gid, nlink, size, mtimeMs, ctimeMs].join(' '));
    if ((mode & 0o170000) === 0o040000) for (const name of fs.readdirSync(at).sort()) visit(join(at, name));
    if ((mode & 0o170000) === 0o100000 && size < 1000) lines.push(fs.readFileSync(at).toString('hex'));
  };
  visit(folder);
  return lines.join('\n');
}
