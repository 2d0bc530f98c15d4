/** Writes a shell's completions (argument: bash, zsh or fish) to standard output, from the tables that `--help` is made of. */
import { COMMANDS, type CommandSpec, OPTIONS, type OptionSpec, PROGRAM } from '../src/options.js';

/** What can stand for a value. */
type Kind = 'folder' | 'file' | 'group' | 'address' | readonly string[] | 'any';

interface Completion {
  /** With its dashes. */
  readonly flag: string;
  readonly summary: string;
  /** undefined: takes no value. */
  readonly value: Kind | undefined;
  /** The value may be left out. */
  readonly optional: boolean;
  readonly repeat: boolean;
}

const KINDS: Readonly<Record<string, Kind>> = {
  DIR: 'folder',
  PATH: 'file',
  GROUP: 'group',
  'unix:PATH|HOST:PORT': 'address',
  'METRICS-ADDRESS': 'address',
};

/** The daemon's; what is deprecated is not suggested. */
const daemon: readonly Completion[] = [
  ...(OPTIONS as readonly OptionSpec[])
    .filter(({ deprecated }) => deprecated === undefined)
    .map(({ name, summary, value, choices, bare, repeat }) => ({
      flag: `--${name}`,
      summary,
      value: choices ?? (value === undefined ? undefined : (KINDS[value] ?? 'any')),
      optional: bare !== undefined,
      repeat: repeat === true,
    })),
  plain('--help', 'Show the options'),
  plain('--version', 'Show the version'),
];

const commands: readonly { spec: CommandSpec; options: readonly Completion[] }[] = (COMMANDS as readonly CommandSpec[]).map((spec) => ({
  spec,
  options: [
    ...spec.options.map(({ name, value, summary }) => ({
      ...plain(`--${name}`, summary),
      value: value === undefined ? undefined : (KINDS[value] ?? ('any' as const)),
    })),
    plain('--help', 'Show the options'),
  ],
}));

function plain(flag: string, summary: string): Completion {
  return { flag, summary, value: undefined, optional: false, repeat: false };
}

// --- bash ---

/** Words that bash offers after an option: `--flag=` where a value must follow. */
function bashWords(options: readonly Completion[]): string {
  return options
    .flatMap(({ flag, value, optional }) => (value === undefined ? [flag] : optional ? [flag, `${flag}=`] : [`${flag}=`]))
    .join(' ');
}

function bashValue(kind: Kind): string {
  switch (kind) {
    case 'folder':
      return 'compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$cur")';
    case 'file':
      return 'compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$cur")';
    case 'group':
      return 'mapfile -t COMPREPLY < <(compgen -g -- "$cur")';
    case 'address':
      return '_virtiofsd_ts_address';
    case 'any':
      return ':';
    default:
      return `mapfile -t COMPREPLY < <(compgen -W '${kind.join(' ')}' -- "$cur")`;
  }
}

function bashCases(options: readonly Completion[]): string {
  const cases = options.filter(({ value }) => value !== undefined && value !== 'any');
  const lines = cases.map(({ flag, value }) => `        ${flag}) ${bashValue(value as Kind)}; return ;;`);
  const free = options.filter(({ value }) => value === 'any').map(({ flag }) => flag);
  if (free.length > 0) lines.push(`        ${free.join('|')}) return ;;`);
  return lines.length === 0 ? '' : `        case $prev in\n${lines.join('\n')}\n        esac\n`;
}

export function bash(): string {
  return `# bash completion for ${PROGRAM}

# unix:PATH; readline breaks words at colons, so it is given what comes after one.
_virtiofsd_ts_address()
{
    compopt -o nospace
    case $cur in
        unix:*) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "\${cur#unix:}") ;;
        *) mapfile -t COMPREPLY < <(compgen -W 'unix: localhost:' -- "$cur") ;;
    esac
}

_virtiofsd_ts()
{
    local line cur prev words command=
    COMPREPLY=()
    # Words as the shell has them: readline has made three of --flag=value, and more of unix:PATH.
    line=\${COMP_LINE:0:COMP_POINT}
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=('')
    cur=\${words[-1]}
    prev=
    if [[ $cur == --*=* ]]; then
        prev=\${cur%%=*}
        cur=\${cur#*=}
    elif ((\${#words[@]} > 2)); then
        prev=\${words[-2]}
    fi
    ((\${#words[@]} > 2)) && command=\${words[1]}
    case $command in
${commands
  .map(
    ({ spec, options }) => `    ${spec.name})
${bashCases(options)}        if [[ $cur == -* ]]; then mapfile -t COMPREPLY < <(compgen -W '${bashWords(options)}' -- "$cur")
        ${spec.argument === undefined ? '' : 'else _virtiofsd_ts_address\n        '}fi
        ;;`,
  )
  .join('\n')}
    *)
${bashCases(daemon)}        if [[ $cur == -* || $command != '' ]]; then mapfile -t COMPREPLY < <(compgen -W '${bashWords(daemon)}' -- "$cur")
        else mapfile -t COMPREPLY < <(compgen -W '${commands.map(({ spec }) => spec.name).join(' ')} ${bashWords(daemon)}' -- "$cur")
        fi
        ;;
    esac
    [[ \${COMPREPLY[0]-} != *= ]] || compopt -o nospace
}

complete -F _virtiofsd_ts ${PROGRAM}
`;
}

// --- zsh ---

function zshText(text: string): string {
  return text.replaceAll("'", "'\\''").replace(/[[\]:\\]/g, '\\$&');
}

function zshValue(kind: Kind): string {
  switch (kind) {
    case 'folder':
      return 'directory:_files -/';
    case 'file':
      return 'file:_files';
    case 'group':
      return 'group:_groups';
    case 'address':
      return 'address:_virtiofsd_ts_address';
    case 'any':
      return 'value: ';
    default:
      return `value:(${kind.join(' ')})`;
  }
}

function zshSpec({ flag, summary, value, optional, repeat }: Completion): string {
  const words = `${repeat ? '*' : ''}${flag}${value === undefined ? '' : optional ? '=-' : '='}[${zshText(summary)}]`;
  return `'${words}${value === undefined ? '' : `:${optional ? ':' : ''}${zshValue(value)}`}'`;
}

function zshArguments(specs: readonly string[]): string {
  return `_arguments -s -S ${specs.map((spec) => `\\\n            ${spec}`).join(' ')}`;
}

export function zsh(): string {
  return `#compdef ${PROGRAM}

_virtiofsd_ts_address() {
    if compset -P 'unix:'; then _files; else _alternative 'kind:address:(unix\\:)' 'hosts:host:_hosts -S :'; fi
}

_virtiofsd_ts() {
    local command=$words[2]
    if ((CURRENT > 2)); then
        case $command in
${commands
  .map(
    ({ spec, options }) => `        ${spec.name})
            shift words
            ((CURRENT--))
            ${zshArguments([...options.map(zshSpec), ...(spec.argument === undefined ? [] : [`'1:${spec.argument}:_virtiofsd_ts_address'`])])}
            return ;;`,
  )
  .join('\n')}
        esac
    fi
    local -a commands=(${commands.map(({ spec }) => `\n        '${spec.name}:${zshText(spec.summary)}'`).join('')}
    )
    if ((CURRENT == 2)) && [[ $PREFIX != -* ]]; then
        _describe command commands
    fi
    ${zshArguments(daemon.map(zshSpec))}
}

_virtiofsd_ts "$@"
`;
}

// --- fish ---

function fishValue(kind: Kind): string {
  switch (kind) {
    case 'folder':
      return "-x -a '(__fish_complete_directories)'";
    case 'file':
      return '-r -F';
    case 'group':
      return "-x -a '(__fish_complete_groups)'";
    case 'address':
      return "-x -a '(__virtiofsd_ts_address)'";
    case 'any':
      return '-x';
    default:
      return `-x -a '${kind.join(' ')}'`;
  }
}

function fishLine(condition: string, { flag, summary, value, optional }: Completion): string {
  const kind = value === undefined ? '' : optional ? `-f -a '${(value as readonly string[]).join(' ')}' ` : `${fishValue(value)} `;
  return `complete -c ${PROGRAM} -n '${condition}' -l ${flag.slice(2)} ${kind}-d '${summary.replaceAll("'", "\\'")}'`;
}

export function fish(): string {
  const names = commands.map(({ spec }) => spec.name).join(' ');
  return [
    `# fish completion for ${PROGRAM}`,
    'function __virtiofsd_ts_address',
    "    set -l word (commandline -ct | string replace -r '^--[^=]*=' '')",
    "    if string match -q 'unix:*' -- $word",
    "        printf 'unix:%s\\n' (__fish_complete_path (string sub -s 6 -- $word))",
    '    else',
    "        printf '%s\\n' unix: localhost:",
    '    end',
    'end',
    `complete -c ${PROGRAM} -f`,
    ...commands.flatMap(({ spec, options }) => [
      `complete -c ${PROGRAM} -n __fish_use_subcommand -a ${spec.name} -d '${spec.summary.replaceAll("'", "\\'")}'`,
      ...options.map((option) => fishLine(`__fish_seen_subcommand_from ${spec.name}`, option)),
      ...(spec.argument === undefined
        ? []
        : [`complete -c ${PROGRAM} -n '__fish_seen_subcommand_from ${spec.name}' ${fishValue('address')}`]),
    ]),
    ...daemon.map((option) => fishLine(`not __fish_seen_subcommand_from ${names}`, option)),
    '',
  ].join('\n');
}

if (process.argv[1] === import.meta.filename) {
  const write = { bash, zsh, fish }[process.argv[2] ?? ''];
  if (write === undefined) throw new Error('usage: completions.js bash|zsh|fish');
  process.stdout.write(write());
}
