import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { escapeBytes, escapeText, type Level, Log, type LogFormat, type LogLevel, type Sink, syslogSink } from '../../src/log.js';

const directory = mkdtempSync(join(tmpdir(), 'log-'));
after(() => rmSync(directory, { recursive: true }));

const LOG_MODULE = new URL('../../src/log.js', import.meta.url).href;

function logTo(level: LogLevel, format: LogFormat = 'bare') {
  const lines: string[] = [];
  const levels: Level[] = [];
  const sink: Sink = (line, level) => {
    lines.push(line);
    levels.push(level);
  };
  return { log: new Log({ level, format, sink }), lines, levels, sink };
}

/** Runs code with the log in a process of its own; standard error as it came. */
function stderrOf(code: string): string {
  const script = `import { log, stderrSink } from '${LOG_MODULE}';\n${code}`;
  return spawnSync(process.execPath, ['--input-type=module', '-e', script], { encoding: 'utf8' }).stderr;
}

test('a line has time, level, message and values', () => {
  const { log, lines, levels } = logTo('info', 'human');
  log.warn('queue stopped', { queue: 1, reason: 'bad index', empty: '', peer: 'a=b', quoted: 'say "x"', none: null });
  assert.equal(lines.length, 1);
  assert.match(
    lines[0] as string,
    /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARN {2}queue stopped queue=1 reason="bad index" empty="" peer="a=b" quoted="say \\"x\\"" none=null$/,
  );
  assert.deepEqual(levels, ['warn']);
});

test('bare lines have neither time nor level; JSON lines are records', () => {
  const bare = logTo('info');
  bare.log.info('hello', { n: 1 });
  assert.deepEqual(bare.lines, ['hello n=1']);
  const json = logTo('info', 'json');
  json.log.error('hello', { name: 'a\nb' });
  const record = JSON.parse(json.lines[0] as string);
  assert.ok(!(json.lines[0] as string).includes('\n'));
  assert.equal(record.level, 'error');
  assert.equal(record.msg, 'hello');
  assert.equal(record.name, 'a\nb');
  assert.equal(record.pid, process.pid);
  assert.ok(Math.abs(Date.parse(record.time) - Date.now()) < 60_000);
});

test('a JSON line rules no terminal and ends where it ends; the pid can be given', () => {
  const lines: string[] = [];
  const log = new Log({ level: 'info', format: 'json', sink: (line) => void lines.push(line), pid: 4242 });
  const nasty = 'a\u001bb\u2028c\u009bd\u202ee\u007f\ud800';
  log.info(nasty, { nasty });
  assert.match(lines[0] as string, /^[\x20-\x7e]+$/);
  const { msg, nasty: value, pid } = JSON.parse(lines[0] as string);
  assert.deepEqual([msg, value, pid], [nasty, nasty, 4242]);
});

for (const [level, written] of [
  ['off', []],
  ['error', ['error']],
  ['warn', ['error', 'warn']],
  ['info', ['error', 'warn', 'info']],
  ['debug', ['error', 'warn', 'info', 'debug']],
  ['trace', ['error', 'warn', 'info', 'debug', 'trace']],
] as const) {
  test(`level ${level} writes ${written.join(', ') || 'nothing'}`, () => {
    const { log, levels } = logTo(level);
    for (const each of ['error', 'warn', 'info', 'debug', 'trace'] as const) {
      log[each]('x');
      assert.equal(log.enabled(each), (written as readonly string[]).includes(each));
    }
    assert.deepEqual(levels, written);
  });
}

test('the level goes round: configured, debug, trace; each change is told', () => {
  const { log, lines } = logTo('warn');
  assert.deepEqual([log.cycleLevel(), log.cycleLevel(), log.cycleLevel(), log.cycleLevel()], ['debug', 'trace', 'warn', 'debug']);
  assert.deepEqual(
    lines,
    ['debug', 'trace', 'warn', 'debug'].map((level) => `log level is now ${level}`),
  );
  assert.equal(log.level, 'debug');
  const detailed = logTo('debug').log;
  assert.deepEqual([detailed.cycleLevel(), detailed.cycleLevel()], ['trace', 'debug']);
  const quiet = logTo('off').log;
  assert.deepEqual([quiet.cycleLevel(), quiet.cycleLevel(), quiet.cycleLevel()], ['debug', 'trace', 'off']);
});

test('setLevel and configure take effect at once', () => {
  const { log, lines, sink } = logTo('error');
  log.info('no');
  log.setLevel('info');
  log.info('yes');
  log.configure({ level: 'error', format: 'json', sink });
  log.info('no');
  log.error('last');
  assert.equal(lines.length, 2);
  assert.equal(lines[0], 'yes');
  assert.equal(JSON.parse(lines[1] as string).msg, 'last');
});

test('a message or value cannot end its line', () => {
  const { log, lines } = logTo('info');
  log.info('two\nlines\r\u001b[31mred\u0000', { name: 'a\nb\u2028c\u009bd' });
  assert.deepEqual(lines, ['two\\nlines\\r\\x1b[31mred\\x00 name=a\\nb\\u{2028}c\\u{9b}d']);
});

test('escapeText leaves printable text alone', () => {
  assert.equal(escapeText('plain "text" \\ with ünïcödé 日本 🙂'), 'plain "text" \\ with ünïcödé 日本 🙂');
  assert.equal(escapeText('\t\u007f\u0085\u202e\u2066\ufeff\ud800'), '\\t\\x7f\\u{85}\\u{202e}\\u{2066}\\u{feff}\\u{d800}');
});

test('escapeBytes shows each byte of a name', () => {
  const text = (...bytes: number[]) => escapeBytes(Uint8Array.from(bytes));
  assert.equal(escapeBytes(Buffer.from('naïve 日本.txt')), 'naïve 日本.txt');
  assert.equal(text(0x61, 0xff, 0x62), 'a\\xffb');
  assert.equal(text(0xc3), '\\xc3', 'cut character');
  assert.equal(text(0xc3, 0xa4, 0xe6, 0x97), 'ä\\xe6\\x97');
  assert.equal(text(0xc0, 0xaf), '\\xc0\\xaf', 'overlong');
  assert.equal(text(0xed, 0xa0, 0x80), '\\xed\\xa0\\x80', 'surrogate');
  assert.equal(text(0x80, 0xbf), '\\x80\\xbf', 'no lead byte');
  assert.equal(text(0x1b, 0x5b, 0x0a, 0xff, 0x0a), '\\x1b[\\n\\xff\\n');
  assert.equal(text(0x5c, 0x6e), '\\\\n', 'a backslash is not taken for an escape');
  assert.equal(text(0x5c, 0xff), '\\\\\\xff');
  assert.equal(escapeBytes(Buffer.from('\ufffd')), '\ufffd', 'the replacement character itself is valid');
  assert.equal(escapeBytes(Buffer.alloc(1000, 'x'), 4), 'xxxx…');
});

test('different names look different, whatever their bytes', () => {
  const seen = new Map<string, string>();
  for (let a = 1; a < 256; a++) {
    for (const b of [0x0a, 0x41, 0x5c, 0x6e, 0x78, 0x80, 0xa4, 0xff]) {
      const name = Buffer.from([a, b]);
      const shown = escapeBytes(name);
      assert.ok(!/[\u0000-\u001f\u007f-\u009f]/.test(shown));
      assert.equal(seen.get(shown), undefined, `${name.toString('hex')} and ${seen.get(shown)} are both shown as ${shown}`);
      seen.set(shown, name.toString('hex'));
    }
  }
});

test('of a kind of line ten a minute are written, and the others counted', () => {
  const { log, lines } = logTo('info');
  for (let i = 0; i < 25; i++) log.limited('warn', 'bad request', `bad request ${i}`, undefined, 1000 + i);
  log.limited('warn', 'other', 'another kind is not affected', undefined, 1030);
  assert.equal(lines.length, 11);
  assert.equal(lines[9], 'bad request 9');
  log.limited('warn', 'bad request', 'bad request again', { opcode: 3 }, 61_001);
  assert.equal(lines.at(-1), 'bad request again opcode=3 suppressed=15');
  log.limited('warn', 'bad request', 'and again', undefined, 61_002);
  assert.equal(lines.at(-1), 'and again', 'the count is told once');
});

test('kinds without number do not make lines without number', () => {
  const { log, lines } = logTo('info');
  for (let i = 0; i < 10_000; i++) log.limited('warn', `kind ${i}`, 'x', undefined, 5);
  assert.equal(lines.length, 256 + 10);
});

test('what was suppressed is told at the end', () => {
  const { log, lines } = logTo('info');
  for (let i = 0; i < 12; i++) log.limited('warn', 'bad request', 'bad request', undefined, 5);
  log.flushSuppressed();
  log.flushSuppressed();
  assert.equal(lines.length, 11);
  assert.equal(lines.at(-1), 'lines of one kind were suppressed kind="bad request" suppressed=2');
});

test('lines below the level are not counted as suppressed', () => {
  const { log, lines } = logTo('error');
  for (let i = 0; i < 30; i++) log.limited('warn', 'k', 'x');
  log.flushSuppressed();
  assert.deepEqual(lines, []);
});

test('lines are on standard error before the call returns', () => {
  const text = stderrOf("log.info('one'); log.error('two'); process.kill(process.pid, 'SIGKILL');");
  assert.match(text, /^\S+ INFO {2}one\n\S+ ERROR two\n$/);
});

test('pino is loaded by the first line that is written', () => {
  const loaded = "Object.keys((await import('node:module')).default._cache).some((path) => path.includes('/pino/'))";
  assert.equal(stderrOf(`log.debug('no'); if (${loaded}) console.error('loaded');`), '');
  assert.match(stderrOf(`log.info('yes'); if (${loaded}) console.error('loaded');`), /yes\nloaded\n$/);
});

test('a reader that is gone does not end the process', () => {
  const script = `
    import { log } from '${LOG_MODULE}';
    for (let i = 0; i < 50; i++) log.info('line');
    console.log('alive');
  `;
  const file = join(directory, 'gone.mjs');
  writeFileSync(file, script);
  const out = execFileSync('sh', ['-c', `{ "$0" "$1" 2>&1 >&3 | true; } 3>&1`, process.execPath, file], { encoding: 'utf8' });
  assert.equal(out, 'alive\n');
});

test('system log: one datagram a line with facility and severity; connects anew; falls back to standard error', () => {
  const path = join(directory, 'datagrams');
  writeFileSync(path, '');
  const opened: number[] = [];
  const sink = syslogSink('virtiofsd-ts', () => {
    const fd = openSync(path, 'a');
    opened.push(fd);
    return fd;
  });
  assert.ok(typeof sink !== 'number');
  const log = new Log({ level: 'trace', format: 'bare', sink });
  log.error('e');
  log.warn('w');
  log.info('i', { name: 'x y' });
  log.debug('d');
  const tag = `virtiofsd-ts[${process.pid}]:`;
  assert.equal(readFileSync(path, 'utf8'), `<11>${tag} e<12>${tag} w<14>${tag} i name="x y"<15>${tag} d`);
  assert.equal(opened.length, 1);
});

test('system log: a lost connection is made again, and without one the line goes to standard error', () => {
  const text = stderrOf(`
    import { openSync } from 'node:fs';
    import { Log, syslogSink } from '${LOG_MODULE}';
    const logTo = (...fds) => new Log({ level: 'info', format: 'bare', sink: syslogSink('x', () => fds.shift() ?? -111) });
    const refuses = () => openSync('/dev/full', 'w');
    logTo(refuses(), openSync('/dev/null', 'w')).info('taken by the second connection');
    logTo(refuses(), refuses()).info('refused twice');
    logTo(refuses()).info('no second connection');
  `);
  assert.equal(text, 'refused twice\nno second connection\n');
});

test('system log: no system log is told by errno', () => {
  assert.equal(
    syslogSink('x', () => -2),
    -2,
  );
});
