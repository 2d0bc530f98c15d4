/** Writes docs/options.md to standard output, from the table that `--help` is made of. */
import { GROUPS, OPTIONS, type OptionSpec } from '../src/options.js';

const SPECS: readonly OptionSpec[] = OPTIONS;

/** Text in which nothing is Markdown, and no cell ends. */
function escaped(text: string): string {
  return text.replaceAll(/[<>*_`]/g, '\\$&').replaceAll('|', '\\|');
}

function sentence(text: string | undefined, choices?: readonly string[]): string {
  if (!text) return '';
  // A value of the option keeps its spelling.
  const begin = choices?.some((choice) => text.startsWith(choice)) ? text[0] : text[0]?.toUpperCase();
  return `${escaped(begin + text.slice(1))}. `;
}

function row(spec: OptionSpec): string {
  const { name, value, bare, choices, summary, details, deprecated, note } = spec;
  const fallback = spec.defaultText ?? spec.default?.toString() ?? '';
  const argument = value === undefined ? '' : bare === undefined ? `${name.length === 1 ? ' ' : '='}${value}` : `[=${value}]`;
  const values = choices && `one of ${choices.join(', ')}`;
  return `| \`${name.length === 1 ? '-' : '--'}${name}${argument}\` | ${[
    [summary, details, values, deprecated && `deprecated: ${deprecated}`]
      .map((text) => sentence(text, choices))
      .join('')
      .trim(),
    escaped(fallback),
    spec.origin === 'ours' ? 'not in virtiofsd' : escaped(note ?? ''),
  ].join(' | ')} |`;
}

/** The page. */
export function optionsPage(): string {
  const groups = GROUPS.map((group) => {
    const rows = SPECS.filter((spec) => spec.group === group).map(row);
    return [`## ${group}`, '', '| option | meaning | default | differs from virtiofsd 1.14 |', '|---|---|---|---|', ...rows, ''].join('\n');
  });
  return [
    '# Options',
    '',
    'This page is made by `make docs/options.md` from the table in [src/options.ts](../src/options.ts), as are `--help`, the man page and the',
    'completions. Names, values and meanings are those of virtiofsd 1.14; the last column says where they differ.',
    '',
    ...groups,
  ].join('\n');
}

if (process.argv[1] === import.meta.filename) process.stdout.write(optionsPage());
