/** The man page and the shells' completions: read by man and mandoc, used in real shells. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { optionsPage } from '../../packaging/optionspage.js';
import { repository } from '../../qemu/guest/daemon.js';
import { COMMANDS, OPTIONS, type OptionSpec, VERSION } from '../../src/options.js';
import { Terminal } from '../support/terminal.js';

const folder = mkdtempSync(join(tmpdir(), 'pages-'));
after(() => rmSync(folder, { recursive: true, force: true }));

const PAGE = join(repository, 'build/man/virtiofsd-ts.1');
const COMPLETIONS = join(repository, 'build/completions');
const SPECS: readonly OptionSpec[] = OPTIONS;

before(() => {
  execFileSync('make', ['-s', '-C', repository, 'man', 'completions'], { stdio: 'pipe' });
  mkdirSync(join(folder, 'shared'));
  mkdirSync(join(folder, 'other'));
  writeFileSync(join(folder, 'metrics.sock'), '');
});

describe('man page', () => {
  test('mandoc and man find nothing wrong', () => {
    const lint = spawnSync('mandoc', ['-Tlint', PAGE], { encoding: 'utf8' });
    assert.deepEqual([lint.status, lint.stdout, lint.stderr], [0, '', '']);
    const { status, stderr } = spawnSync('man', ['--warnings', '-l', PAGE], {
      encoding: 'utf8',
      env: { ...process.env, LC_ALL: 'C.UTF-8' },
    });
    assert.deepEqual([status, stderr], [0, '']);
  });

  test('it has every option and command, and the version with its day', () => {
    const text = execFileSync('man', ['-l', PAGE], {
      encoding: 'utf8',
      env: { ...process.env, LC_ALL: 'C.UTF-8', MANWIDTH: '300', MAN_KEEP_FORMATTING: '' },
    });
    for (const { name, value, summary } of SPECS) {
      assert.match(text, new RegExp(`^ +--?${name}(\\[?[= ]|$)`, 'm'), name);
      assert.ok(text.replaceAll(/\s+/g, ' ').includes(summary.replaceAll('…', '...').replaceAll(/\s+/g, ' ')), summary);
      if (value !== undefined) assert.ok(text.includes(value), value);
    }
    for (const { name } of COMMANDS) assert.match(text, new RegExp(`^ +virtiofsd-ts ${name}\\b`, 'm'));
    assert.match(text, new RegExp(`virtiofsd-ts ${VERSION.replaceAll('.', '\\.')} +\\d{4}-\\d\\d-\\d\\d`));
  });
});

test('CHANGELOG.md: its first version is that of package.json', () => {
  const [, version] = /^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$/m.exec(readFileSync(join(repository, 'CHANGELOG.md'), 'utf8')) ?? [];
  assert.equal(version, JSON.parse(readFileSync(join(repository, 'package.json'), 'utf8')).version);
});

test('docs/options.md is what the table says: make docs/options.md', () => {
  assert.equal(readFileSync(join(repository, 'docs/options.md'), 'utf8'), optionsPage());
});

test('what pages link to is there', () => {
  const pages = execFileSync('git', ['-C', repository, 'ls-files', '*.md'], { encoding: 'utf8' }).trim().split('\n');
  assert.ok(pages.length > 5);
  const broken = pages.flatMap((page) =>
    [...readFileSync(join(repository, page), 'utf8').matchAll(/\]\(([^)#\s]+)(?:#[^)]*)?\)/g)]
      .map(([, target]) => target as string)
      .filter((target) => !/^[a-z]+:/.test(target) && !existsSync(join(repository, dirname(page), target)))
      .map((target) => `${page}: ${target}`),
  );
  assert.deepEqual(broken, []);
});

/** What a shell made of a line after the key for completion: the words that the program would have got. */
async function typed(shell: Terminal, line: string, key = '\t'): Promise<string[]> {
  const from = shell.output.length;
  shell.type(`${line}${key}`);
  // The next line is not to be taken for an answer to "show all?".
  await new Promise((resolve) => setTimeout(resolve, 150));
  shell.type('\n');
  const [, words] = (await shell.until(/\[\[((?:<[^>]*>)*)\]\]/, from)) as unknown as [string, string];
  return [...words.matchAll(/<([^>]*)>/g)].map(([, word]) => word as string);
}

// Where the program would be: its words, so that nothing is started.
const STAND_IN = `virtiofsd-ts() { printf '[''['; printf '<%s>' "$@"; printf ']]\\n'; }`;

/** What every shell must make of these lines; each has one answer. */
const ANSWERS: readonly (readonly [line: string, words: readonly string[]])[] = [
  ['virtiofsd-ts --inode', ['--inode-file-handles=']],
  ['virtiofsd-ts --reado', ['--readonly']],
  ['virtiofsd-ts --cache=not', ['--cache=notify']],
  ['virtiofsd-ts --readonly --cache=alw', ['--readonly', '--cache=always']],
  ['virtiofsd-ts --sandbox=chr', ['--sandbox=chroot']],
  [`virtiofsd-ts --shared-dir=${folder}/sha`, [`--shared-dir=${folder}/shared/`]],
  [`virtiofsd-ts --socket-path=${folder}/met`, [`--socket-path=${folder}/metrics.sock`]],
  ['virtiofsd-ts eve', ['events']],
  ['virtiofsd-ts events --js', ['events', '--json']],
  [`virtiofsd-ts events unix:${folder}/met`, ['events', `unix:${folder}/metrics.sock`]],
  [`virtiofsd-ts --metrics=unix:${folder}/met`, [`--metrics=unix:${folder}/metrics.sock`]],
];

test('bash', async () => {
  using shell = new Terminal('bash --norc --noprofile -i', { TERM: 'dumb', INPUTRC: '/dev/null', PS1: '$ ', HISTFILE: '' });
  shell.type(`bind 'set enable-bracketed-paste off'; ${STAND_IN}; source ${COMPLETIONS}/virtiofsd-ts; echo ready-$((1+1))\n`);
  await shell.until(/ready-2/);
  for (const [line, words] of ANSWERS) assert.deepEqual(await typed(shell, line), words, line);
  // M-* inserts all that is possible.
  assert.deepEqual(await typed(shell, 'virtiofsd-ts --cache=', '\u001b*'), ['--cache=always', 'auto', 'metadata', 'never', 'notify']);
  const all = await typed(shell, 'virtiofsd-ts -', '\u001b*');
  const expected = SPECS.filter(({ deprecated }) => deprecated === undefined).map(({ name }) => `--${name}`);
  assert.deepEqual([...new Set(all.map((word) => word.replace(/[=/]$/, '')))].sort(), [...expected, '--help', '--version'].sort());
  assert.deepEqual((await typed(shell, 'virtiofsd-ts --cache ne')).slice(-2), ['--cache', 'never'], 'the value as a word of its own');
});

test('zsh', async () => {
  using shell = new Terminal('zsh -f -i', { TERM: 'dumb', PS1: '$ ', ZDOTDIR: folder });
  shell.type(
    `fpath=(${COMPLETIONS} $fpath); autoload -Uz compinit; compinit -u -d ${folder}/zcompdump; unsetopt beep; ${STAND_IN}; print ready-$((1+1))\n`,
  );
  await shell.until(/ready-2/);
  // zsh takes = and / away again when nothing follows.
  for (const [line, words] of ANSWERS)
    assert.deepEqual(
      await typed(shell, line),
      words.map((word) => word.replace(/[=/]$/, '')),
      line,
    );
});

test('fish', () => {
  for (const [line, words] of ANSWERS) {
    const code = `source ${COMPLETIONS}/virtiofsd-ts.fish; complete -C '${line}'`;
    const { stdout, stderr } = spawnSync('fish', ['--no-config', '-c', code], {
      encoding: 'utf8',
      cwd: '/',
      env: { ...process.env, HOME: folder },
    });
    assert.equal(stderr, '');
    const found = stdout
      .split('\n')
      .slice(0, -1)
      .map((each) => each.split('\t')[0] as string);
    // fish puts the = itself.
    assert.deepEqual(found, [(words.at(-1) as string).replace(/=$/, '')], line);
  }
});
