/** Writes the man page to standard output, from the tables that `--help` is made of. */
import { readFileSync } from 'node:fs';
import { synopsis } from '../src/commands/command.js';
import { COMMANDS, type CommandSpec, DESCRIPTION, GROUPS, OPTIONS, type OptionSpec, PROGRAM, VERSION } from '../src/options.js';

const SPECS: readonly OptionSpec[] = OPTIONS;
const WIDTH = 78;

/** Lines of roff. */
type Roff = readonly string[];

/** The day of this version: CHANGELOG.md's heading `## [VERSION] - DAY`. */
export function dateOf(version: string, changelog: string): string {
  const heading = changelog.split('\n').find((line) => line.startsWith(`## [${version}] - `));
  if (heading === undefined) throw new Error(`CHANGELOG.md has no heading for version ${version}`);
  return heading.slice(heading.indexOf(' - ') + 3);
}

/** Text in which nothing is an instruction to roff. */
function escaped(text: string): string {
  return text
    .replaceAll('\\', '\\e')
    .replaceAll('-', '\\-')
    .replaceAll("'", '\\(aq')
    .replaceAll('~', '\\(ti')
    .replaceAll('…', '...')
    .replace(/^\./, '\\&.');
}

/** Sentences: each begins a line, as roff wants them, and long ones are broken between words. */
function paragraph(text: string): Roff {
  return text.split(/(?<=[.?!]) (?=[A-Z0-9-])/).flatMap((sentence) => {
    const lines: string[] = [];
    let line = '';
    for (const word of sentence.split(' ').map(escaped)) {
      if (line.length + word.length >= WIDTH) {
        lines.push(line);
        line = '';
      }
      line += line === '' ? word : ` ${word}`;
    }
    return [...lines, line];
  });
}

/** Joins sentences that have no full stop. */
function sentences(...parts: readonly (string | undefined)[]): string {
  return parts
    .filter((part) => part !== undefined && part !== '')
    .map((part) => `${part}.`)
    .join(' ');
}

function term(name: string, value: string | undefined, separator: string): string {
  return `.BI "${escaped(name)}${value === undefined ? '' : separator}"${value === undefined ? '' : ` "${escaped(value)}"`}`;
}

function option(spec: OptionSpec): Roff {
  const { name, value, choices, bare, summary, details, deprecated, note } = spec;
  const dashes = name.length === 1 ? '-' : '--';
  const fallback = spec.defaultText ?? spec.default?.toString();
  return [
    '.TP',
    bare === undefined ? term(dashes + name, value, name.length === 1 ? ' ' : '=') : `.BI "${escaped(dashes + name)}[=" "${value}" "]"`,
    ...paragraph(
      sentences(
        summary,
        details && details[0]?.toUpperCase() + details.slice(1),
        choices && `One of ${choices.join(', ')}`,
        bare && `The option alone means ${bare}`,
        fallback && `Default: ${fallback}`,
        deprecated && `Deprecated: ${deprecated}`,
        note && `Differs from virtiofsd: ${note}`,
        spec.origin === 'ours' ? 'Not in virtiofsd' : undefined,
      ),
    ),
  ];
}

function command(spec: CommandSpec): Roff {
  return [
    '.TP',
    ...bold(synopsis(spec)),
    ...paragraph(sentences(spec.summary, spec.details)),
    ...(spec.options.length === 0 ? [] : ['.RS']),
    ...spec.options.flatMap(({ name, short, value, summary }) => [
      '.TP',
      term(`${short === undefined ? '' : `-${short}, `}--${name}`, value, '='),
      ...paragraph(`${summary}.`),
    ]),
    ...(spec.options.length === 0 ? [] : ['.RE']),
  ];
}

function bold(text: string): Roff {
  return [`.B "${escaped(text)}"`];
}

/** A list of terms and what they mean. */
function list(entries: readonly (readonly [string, string])[]): Roff {
  return entries.flatMap(([name, text]) => ['.TP', ...bold(name), ...paragraph(text)]);
}

function example(text: string, ...lines: readonly string[]): Roff {
  return [...paragraph(text), '.PP', '.RS', '.nf', ...lines.map(escaped), '.fi', '.RE'];
}

/** The page, for man(1). */
export function manPage(date: string): string {
  const [what, how] = DESCRIPTION.split(': ') as [string, string];
  const lines: Roff = [
    `.TH VIRTIOFSD\\-TS 1 ${date} "${PROGRAM} ${VERSION}" "User Commands"`,
    '.SH NAME',
    `${escaped(PROGRAM)} \\- virtio\\-fs daemon that tells the guest of file events`,
    '.SH SYNOPSIS',
    `.B ${escaped(PROGRAM)}`,
    '.BI \\-\\-shared\\-dir= DIR',
    '.BI \\-\\-socket\\-path= PATH',
    '.RI [ OPTIONS ]',
    ...COMMANDS.flatMap(({ name, argument }: CommandSpec) => [
      '.br',
      `.B ${escaped(`${PROGRAM} ${name}`)}`,
      ...(argument === undefined ? [] : [`.I ${escaped(argument)}`]),
      '.RI [ OPTIONS ]',
    ]),
    '.SH DESCRIPTION',
    ...paragraph(`${what}. It is ${how}, such as QEMU.`),
    ...paragraph(
      'Options and meanings are those of virtiofsd, and libvirt starts it as it starts virtiofsd. A guest whose kernel has the patch is also told when files change on the host, as inotify and fanotify events.',
    ),
    '.PP',
    ...paragraph(
      "The daemon serves one front end at a time and waits for the next one when it goes; with --fd it ends with its first. It locks itself into a sandbox. Root is not needed: an ordinary user can share the user's own files.",
    ),
    '.SH COMMANDS',
    ...COMMANDS.flatMap((spec: CommandSpec) => command(spec)),
    '.SH OPTIONS',
    ...paragraph('Values may be attached with = or follow as the next argument. The last one of an option counts.'),
    ...GROUPS.flatMap((group) => {
      const specs = SPECS.filter((spec) => spec.group === group);
      return specs.length === 0 ? [] : [`.SS ${escaped(group)}`, ...specs.flatMap(option)];
    }),
    '.TP',
    '.BR \\-h ", " \\-\\-help',
    'Show the options and exit.',
    '.TP',
    '.BR \\-V ", " \\-\\-version',
    'Show the version and exit.',
    '.SH SIGNALS',
    ...list([
      ['SIGTERM, SIGINT, SIGHUP', 'Finish what is in flight and end.'],
      ['SIGUSR1', 'The next log level: the configured one, debug, trace, and around.'],
      ['SIGUSR2', 'Start the program anew from its files, as another version has left them, and go on with the guest after a short pause.'],
    ]),
    '.SH EXIT STATUS',
    ...list([
      ['0', 'The daemon was told to end, or its front end has gone and it was started with --fd.'],
      ['1', 'It could not start, or a check of the host failed; a line on standard error says why.'],
      ['2', 'Wrong use of the command line.'],
    ]),
    '.SH EXAMPLES',
    ...example(
      'A share for a QEMU guest:',
      'virtiofsd-ts --socket-path=/run/fs.sock --shared-dir=/srv/share &',
      'qemu-system-x86_64 ... \\',
      '  -object memory-backend-memfd,id=mem,size=4G,share=on -numa node,memdev=mem \\',
      '  -chardev socket,id=fs,path=/run/fs.sock \\',
      '  -device vhost-user-fs-pci,chardev=fs,tag=share,queue-size=1024',
      'guest# mount -t virtiofs share /mnt',
    ),
    '.SH SEE ALSO',
    '.BR inotify (7),',
    '.BR fanotify (7),',
    '.BR qemu (1),',
    '.BR virsh (1)',
  ];
  return `${lines.join('\n')}\n`;
}

if (process.argv[1] === import.meta.filename) process.stdout.write(manPage(dateOf(VERSION, readFileSync('CHANGELOG.md', 'utf8'))));
