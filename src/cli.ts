/**
 * The command line: options by the table of `options.ts`, virtiofsd's compatibility forms, and what is said when something is wrong.
 *
 * The socket must be there soon after the start, so only yargs' parser is loaded here (5 ms); yargs itself takes ten times as
 * long to load and is only needed to lay out `--help`.
 */
import { writeSync } from 'node:fs';
import parser from 'yargs-parser';
import { type Config, configFrom } from './config.js';
import { escapeText } from './log.js';
import { COMMANDS, DESCRIPTION, GROUPS, OPTIONS, type OptionSpec, PROGRAM, UsageError, type Values, VERSION } from './options.js';
import { passedSocket } from './systemd.js';

/** What a command line asks for. */
export type Command = { readonly action: 'run'; readonly config: Config } | { readonly action: 'help' | 'version' | 'print-capabilities' };

const SPECS: readonly OptionSpec[] = OPTIONS;
const SPEC = new Map(SPECS.map((spec) => [spec.name, spec]));
const USAGE_STATUS = 2;

/**
 * Parses the arguments (without node and script).
 * @param env where systemd says what it has passed
 * @throws UsageError for anything that is unknown, not available or contradictory.
 */
export function parse(argv: readonly string[], env: NodeJS.ProcessEnv = {}): Command {
  const { given, unexpected, error } = tokenize(argv);
  if (given['help'] || given['h']) return { action: 'help' };
  if (given['version'] || given['V']) return { action: 'version' };
  if (error !== undefined) throw new UsageError(error);
  if (unexpected !== undefined) throw new UsageError(unexpected);
  const warnings: string[] = [];
  const values = defaults();
  for (const spec of SPECS) {
    const all = given[spec.name];
    if (all !== undefined) setOption(values, spec, all, warnings);
  }
  for (const spec of SPECS) if (spec.undoes !== undefined) settle(values, argv, spec.name as keyof Values, spec.undoes as keyof Values);
  for (const text of values.o) applyCompat(values, text);
  if (values['print-capabilities']) return { action: 'print-capabilities' };
  return { action: 'run', config: configFrom(values, warnings, passedSocket(env)) };
}

/** For `main.ts`: the configuration to run with; help, version, capabilities and wrong use end the process here. */
export async function commandLine(argv: readonly string[]): Promise<Config> {
  let command: Command;
  try {
    command = parse(argv, process.env);
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    usageExit(error);
  }
  switch (command.action) {
    case 'run':
      return command.config;
    case 'help':
      writeSync(1, `${await help()}\n`);
      break;
    case 'version':
      writeSync(1, `${PROGRAM} ${VERSION}\n`);
      break;
    case 'print-capabilities':
      writeSync(1, capabilities());
      break;
  }
  process.exit(0);
}

/** Ends the process as wrong use of the command line does: one line on standard error, status 2. Also for what shows only at the start. */
export function usageExit(error: UsageError): never {
  writeSync(2, `${errorLine(error)}\n`);
  process.exit(USAGE_STATUS);
}

/** The line that is printed for an error: one line, whatever the arguments contained. */
export function errorLine(error: UsageError): string {
  return `${PROGRAM}: ${escapeText(error.message)}`;
}

/**
 * What `--print-capabilities` prints (QEMU's vhost-user.json). libvirt passes separate options instead of `-o` when it finds
 * "separate-options", and migrates guests with such a share when it finds "migrate-precopy".
 */
export function capabilities(): string {
  const features = ['migrate-precopy', 'posix-acl-negotiation-mode', 'security-label-negotiation-mode', 'separate-options'];
  return `${JSON.stringify({ type: 'fs', features }, null, 2)}\n`;
}

/** The text of `--help`. */
export async function help(width: number = Math.min(process.stdout.columns ?? 100, 100)): Promise<string> {
  const { default: yargs } = await import('yargs');
  const commands = COMMANDS.map(({ name, summary }) => `  $0 ${name.padEnd(8)} ${summary}`);
  const page = yargs([])
    .scriptName(PROGRAM)
    .usage(`$0 --shared-dir=DIR --socket-path=PATH [OPTIONS]\n\n${DESCRIPTION}.\n\nAlso, each with its own --help:\n${commands.join('\n')}`)
    .wrap(width)
    .locale('en')
    .help('help', 'Show this text')
    .version('version', 'Show the version', VERSION)
    .alias({ help: 'h', version: 'V' });
  for (const group of GROUPS) {
    for (const spec of SPECS) {
      if (spec.group !== group) continue;
      page.option(spec.name, {
        group,
        describe: describe(spec),
        ...(spec.default !== undefined && { default: spec.default }),
        ...(spec.defaultText !== undefined && { defaultDescription: spec.defaultText }),
        ...(spec.choices !== undefined && { choices: spec.choices }),
      });
    }
  }
  page.group(['help', 'version'], 'Running');
  return page.getHelp();
}

/** An option's text in `--help`: the name of its value, then the sentences. */
function describe(spec: OptionSpec): string {
  const value = spec.value === undefined ? '' : `<${spec.value}> `;
  const parts = [spec.summary, spec.details, spec.deprecated && `Deprecated: ${spec.deprecated}`];
  return value + parts.filter(Boolean).join('. ');
}

// --- from arguments to values ---

interface Tokens {
  /** Per option what was given: strings, `true` for flags, an array when it came more than once. */
  given: Readonly<Record<string, unknown>>;
  /** Complaint about an argument that is no option of ours. */
  unexpected: string | undefined;
  /** Complaint about a missing or needless value. */
  error: string | undefined;
}

const EXITS = ['help', 'h', 'version', 'V'];

function tokenize(argv: readonly string[]): Tokens {
  const flags = [...EXITS, ...SPECS.filter((spec) => spec.type === 'flag').map((spec) => spec.name)];
  const strings = SPECS.filter((spec) => spec.type !== 'flag').map((spec) => spec.name);
  const { argv: parsed, error } = parser.detailed(normalize(argv), {
    boolean: flags,
    string: strings,
    // With a count of 0 or 1 the parser takes no "true" after a flag, leaves quotes in values alone, and says what is missing.
    narg: Object.fromEntries([...flags.map((name) => [name, 0]), ...strings.map((name) => [name, 1])]),
    configuration: {
      'boolean-negation': false,
      'camel-case-expansion': false,
      'dot-notation': false,
      'duplicate-arguments-array': true,
      'flatten-duplicate-arrays': false,
      'greedy-arrays': false,
      'parse-numbers': false,
      'parse-positional-numbers': false,
      'unknown-options-as-args': true,
    },
  });
  const { _: rest, ...given } = parsed;
  return {
    given,
    unexpected: unexpectedArgument(argv, rest[0], Object.keys(given)),
    error: error ? parserComplaint(error.message) : undefined,
  };
}

/** Rewrites the two forms that the parser does not know: a value attached to `-o`, and an option with an optional value left out. */
function normalize(argv: readonly string[]): string[] {
  return argv.flatMap((word) => {
    if (/^-o[^=]/.test(word)) return ['-o', word.slice(2)];
    const spec = word.startsWith('--') ? SPEC.get(word.slice(2)) : undefined;
    return spec?.bare === undefined ? [word] : [`${word}=${spec.bare}`];
  });
}

function unexpectedArgument(argv: readonly string[], rest: string | number | undefined, names: readonly string[]): string | undefined {
  // Letters after a single dash become options of their own; the complaint is about the whole word.
  const stray = names.find((name) => !SPEC.has(name) && !EXITS.includes(name));
  const word =
    stray === undefined ? rest : argv.find((word) => word.startsWith(`--${stray}`) || (/^-[^-]/.test(word) && word.includes(stray)));
  if (word === undefined) return stray === undefined ? undefined : `unknown option ${dashed(stray)}: see --help`;
  const name = /^--?([^=]+)/.exec(String(word))?.[1];
  if (name === undefined) return `unexpected argument '${word}': every option starts with --, see --help`;
  const similar = closest(name);
  return `unknown option ${String(word).replace(/=.*/s, '')}: ${similar === undefined ? 'see --help' : `did you mean --${similar}?`}`;
}

function parserComplaint(message: string): string {
  const name = message.slice(message.lastIndexOf(':') + 2);
  if (message.startsWith('Not enough arguments'))
    return `${dashed(name)} needs a value: ${dashed(name)} ${SPEC.get(name)?.value ?? 'VALUE'}`;
  if (message.startsWith('Argument unexpected')) return `${dashed(name)} takes no value: give it alone`;
  return message;
}

/** The option with the most similar name, if one is similar at all. */
function closest(name: string): string | undefined {
  let best: string | undefined;
  let least = 1 + Math.floor(name.length / 3);
  for (const { name: candidate } of SPECS) {
    const distance = editDistance(name, candidate);
    if (distance >= least || candidate.length === 1) continue;
    least = distance;
    best = candidate;
  }
  return best;
}

/** Levenshtein's distance, row by row. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const replace = (row[j - 1] as number) + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(replace, (row[j] as number) + 1, (next[j - 1] as number) + 1));
    }
    row = next;
  }
  return row[b.length] as number;
}

function dashed(name: string): string {
  return name.length === 1 ? `-${name}` : `--${name}`;
}

function defaults(): Values {
  return Object.fromEntries(
    SPECS.map((spec) => [spec.name, spec.type === 'flag' ? false : spec.repeat ? [] : spec.default]),
  ) as unknown as Values;
}

/** Checks what was given for one option and stores it. */
function setOption(values: Values, spec: OptionSpec, given: unknown, warnings: string[]): void {
  const name = dashed(spec.name);
  if (spec.deprecated !== undefined) warnings.push(`${name} is deprecated: ${spec.deprecated}`);
  if (spec.type === 'flag') {
    store(values, spec, true);
    return;
  }
  const texts = (Array.isArray(given) ? given : [given]).map(String);
  const checked = texts.map((text) => checkedValue(spec, text, warnings));
  store(values, spec, spec.repeat ? checked : checked.at(-1));
}

function store(values: Values, spec: OptionSpec, value: unknown): void {
  (values as Record<string, unknown>)[spec.name] = value;
}

function checkedValue(spec: OptionSpec, text: string, warnings: string[]): string | number {
  const name = dashed(spec.name);
  if (spec.type === 'integer') {
    const [least, most] = spec.range ?? [0, Number.MAX_SAFE_INTEGER];
    const number = /^\+?\d+$/.test(text) ? Number(text) : Number.NaN;
    if (!(number >= least && number <= most)) throw new UsageError(`${name}=${text} is no number from ${least} to ${most}`);
    return number;
  }
  if (spec.type === 'seconds') {
    const [least, most] = spec.range ?? [0, Number.MAX_SAFE_INTEGER];
    const number = /^\+?(\d+(\.\d*)?|\.\d+)$/.test(text) ? Number(text) : Number.NaN;
    if (!(number >= least && number <= most)) throw new UsageError(`${name}=${text} is no number of seconds from ${least} to ${most}`);
    return number;
  }
  let value = spec.anyCase ? text.toLowerCase() : text;
  const current = spec.oldChoices?.[value];
  if (current !== undefined) {
    warnings.push(`${name}=${value} is deprecated: use ${name}=${current}`);
    value = current;
  }
  if (spec.choices !== undefined && !spec.choices.includes(value))
    throw new UsageError(`${name}=${text} is not known: give one of ${spec.choices.join(', ')}`);
  return value;
}

/** Of a flag and the one that undoes it the last one given counts. */
function settle(values: Values, argv: readonly string[], name: keyof Values, opposite: keyof Values): void {
  if (argv.lastIndexOf(`--${name}`) < argv.lastIndexOf(`--${opposite}`)) (values as Record<string, unknown>)[name] = false;
}

// --- the old form: -o source=DIR,cache=none,xattr,… ---

/** Words of `-o` without a value: the flag that each sets, or clears. */
const COMPAT_FLAGS: Readonly<Record<string, readonly [keyof Values, string | boolean] | undefined>> = {
  xattr: ['xattr', true],
  no_xattr: ['xattr', false],
  readdirplus: ['no-readdirplus', false],
  no_readdirplus: ['no-readdirplus', true],
  writeback: ['writeback', true],
  no_writeback: ['writeback', false],
  allow_direct_io: ['allow-direct-io', true],
  no_allow_direct_io: ['allow-direct-io', false],
  announce_submounts: ['no-announce-submounts', false],
  killpriv_v2: ['killpriv-v2', true],
  no_killpriv_v2: ['killpriv-v2', false],
  posix_acl: ['posix-acl', 'always'],
  no_posix_acl: ['posix-acl', 'never'],
  posix_lock: ['posix-lock', true],
  no_posix_lock: ['posix-lock', false],
  flock: ['flock', true],
  no_flock: ['flock', false],
  security_label: ['security-label', 'always'],
  no_security_label: ['security-label', 'never'],
};

/** Words of `-o` with a value: the option that each sets, and values that were called otherwise. */
const COMPAT_VALUES: Readonly<Record<string, readonly [keyof Values, Readonly<Record<string, string>>] | undefined>> = {
  source: ['shared-dir', {}],
  cache: ['cache', { none: 'never' }],
  loglevel: ['log-level', { err: 'error' }],
  sandbox: ['sandbox', {}],
  modcaps: ['modcaps', {}],
  xattrmap: ['xattrmap', {}],
};

/** Applies one `-o` argument; it counts more than a separate option wherever it stands, as with virtiofsd. */
function applyCompat(values: Values, text: string): void {
  // libvirt doubles the commas of a path; NUL cannot occur in an argument.
  for (const item of text.replaceAll(',,', '\0').split(',')) {
    const word = item.replaceAll('\0', ',');
    const equals = word.indexOf('=');
    if (equals < 0) applyCompatFlag(values, word);
    else applyCompatValue(values, word, word.slice(0, equals), word.slice(equals + 1));
  }
}

function applyCompatFlag(values: Values, word: string): void {
  const flag = Object.hasOwn(COMPAT_FLAGS, word) ? COMPAT_FLAGS[word] : undefined;
  if (flag === undefined) throw new UsageError(`-o ${word} is not known: use the separate options, see --help`);
  (values as Record<string, unknown>)[flag[0]] = flag[1];
}

function applyCompatValue(values: Values, word: string, key: string, value: string): void {
  // What the C daemon called the timeout was that of names and attributes.
  if (key === 'timeout') {
    for (const name of ['entry-timeout', 'attr-timeout']) {
      const spec = SPEC.get(name) as OptionSpec;
      store(values, spec, checkedValue(spec, value, []));
    }
    return;
  }
  const target = Object.hasOwn(COMPAT_VALUES, key) ? COMPAT_VALUES[key] : undefined;
  if (target === undefined) throw new UsageError(`-o ${word} is not known: use the separate options, see --help`);
  const [name, renamed] = target;
  const spec = SPEC.get(name) as OptionSpec;
  store(values, spec, checkedValue(spec, renamed[value] ?? value, []));
}
