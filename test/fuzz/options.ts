/** Command lines: each gives a configuration, or a UsageError with a line that says something; never anything else. */
import fc from 'fast-check';
import { errorLine, parse } from '../../src/cli.js';
import { OPTIONS, type OptionSpec, UsageError } from '../../src/options.js';
import { type Case, must, type Target } from './engine.js';
import type { Random } from './random.js';

/** Command lines in a case. */
const BATCH = 100;

const SPECS: readonly OptionSpec[] = OPTIONS;
const names = fc.constantFrom(...SPECS.map(({ name }) => name), 'help', 'version', 'unknown', '', '__proto__', 'constructor', 'toString');

const numbers = fc.oneof(
  fc.integer().map(String),
  fc.constantFrom('0', '1', '64', '1023', '-1', '+1', '1e3', '0x10', '99999999999999999999', ' 1', '1.5', 'NaN'),
);
const ids = fc.oneof(
  fc
    .tuple(fc.constantFrom('guest', 'host', 'map', 'squash-guest', 'squash-host', 'forbid-guest', ''), fc.array(numbers, { maxLength: 4 }))
    .map(([kind, parts]) => [kind, ...parts].join(':')),
  fc.tuple(fc.constantFrom(':', '/', '|', ''), fc.array(numbers, { maxLength: 4 })).map(([d, parts]) => `${d}${parts.join(d)}${d}`),
);
const rules = fc
  .array(
    fc
      .tuple(
        fc.constantFrom(':', '/', '!'),
        fc.array(
          fc.constantFrom(
            'prefix',
            'ok',
            'bad',
            'map',
            'unsupported',
            'client',
            'server',
            'all',
            'user.',
            'trusted.',
            'security.capability',
            '',
          ),
          { maxLength: 5 },
        ),
      )
      .map(([d, parts]) => `${d}${parts.join(d)}${d}`),
    { maxLength: 4 },
  )
  .map((list) => list.join(' '));
const words = fc.constantFrom(
  'never',
  'auto',
  'always',
  'none',
  'namespace',
  'chroot',
  'kill',
  'prefer',
  'fallback',
  'debug',
  'AUTO',
  'Always',
  '/tmp',
  '/',
  'relative',
  '+sys_admin:-chown',
  '+',
  'unix:/m',
  '127.0.0.1:9',
  'unix:',
  ':',
  'true',
  'false',
  '"quoted"',
  "'",
);
const text = fc.oneof(
  words,
  numbers,
  ids,
  rules,
  fc.string({ maxLength: 12 }),
  fc.string({ unit: 'binary', maxLength: 40 }).filter((s) => !s.includes('\0')),
);

const COMPAT = [
  'source',
  'cache',
  'loglevel',
  'sandbox',
  'modcaps',
  'xattrmap',
  'xattr',
  'no_xattr',
  'writeback',
  'no_readdirplus',
  'posix_acl',
  'killpriv_v2',
  'announce_submounts',
  'flock',
  'timeout',
  'default',
  'allow_root',
  'rw',
  'constructor',
  '__proto__',
  '',
];
const item = fc.tuple(fc.constantFrom(...COMPAT), fc.option(text)).map(([name, value]) => (value === null ? name : `${name}=${value}`));
const compat = fc.array(item, { maxLength: 6 }).map((items) => items.join(','));

const argument = fc.oneof(
  { weight: 6, arbitrary: fc.tuple(names, text).map(([name, value]) => [`--${name}=${value}`]) },
  { weight: 4, arbitrary: fc.tuple(names, text).map(([name, value]) => [`--${name}`, value]) },
  { weight: 3, arbitrary: names.map((name) => [`--${name}`]) },
  { weight: 3, arbitrary: compat.map((value) => ['-o', value]) },
  { weight: 2, arbitrary: compat.map((value) => [`-o${value}`]) },
  { weight: 1, arbitrary: fc.constantFrom(['-d'], ['-f'], ['-o'], ['--'], ['-'], ['-oo'], ['-V'], ['-h'], ['-x=1'], ['--no-xattr']) },
  { weight: 1, arbitrary: text.map((value) => [value]) },
);
const usual = fc.constantFrom<string[]>(['--shared-dir=/tmp', '--socket-path=/tmp/s'], ['--shared-dir', '/', '--fd=3'], []);
const commandLine = fc.tuple(usual, fc.array(argument, { maxLength: 6 })).map(([first, rest]) => [...first, ...rest.flat()]);

export class OptionTarget implements Target<string[]> {
  readonly name = 'options';

  generate(random: Random): Case<string[]> {
    return { setup: 0, steps: fc.sample(commandLine, { seed: random.u32() | 0, numRuns: BATCH }) };
  }

  run({ steps }: Case<string[]>): number {
    for (const argv of steps) {
      try {
        const command = parse(argv);
        must(
          ['run', 'help', 'version', 'print-capabilities'].includes(command.action),
          `${JSON.stringify(argv)} asks for ${command.action}`,
        );
        if (command.action === 'run') must(command.config.sharedDir !== '', `${JSON.stringify(argv)} shares nothing`);
      } catch (error) {
        if (!(error instanceof UsageError)) throw error;
        const line = errorLine(error);
        const given = argv.join(' ');
        const odd = ['undefined', 'NaN', '[object'].filter((word) => line.includes(word) && !given.includes(word));
        must(error.message.length > 10 && odd.length === 0, `${JSON.stringify(argv)} is answered with ${line}`);
        must(!/[\0-\x1f\x7f]/.test(line), `${JSON.stringify(argv)}: more than a line: ${JSON.stringify(line)}`);
      }
    }
    return steps.length;
  }

  close(): void {}
}
