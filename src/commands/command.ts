/** The command lines of what the program does beside being the daemon (`COMMANDS` of options.ts). */
import { writeSync } from 'node:fs';
import { type IncomingMessage, get as request } from 'node:http';
import { parseArgs } from 'node:util';
import { type MetricsAddress, metricsAddress } from '../config.js';
import { type CommandSpec, PROGRAM, UsageError } from '../options.js';

/** What a command was given. */
export interface Given {
  readonly argument: string | undefined;
  /** By name: `true` for a flag, else the text. */
  readonly options: Readonly<Record<string, string | boolean | undefined>>;
}

/** `virtiofsd-ts events METRICS-ADDRESS [--json]` */
export function synopsis({ name, argument, options }: CommandSpec): string {
  const words = options.map(({ name, value }) => `[--${name}${value === undefined ? '' : `=${value}`}]`);
  return [PROGRAM, name, ...(argument === undefined ? [] : [argument]), ...words].join(' ');
}

/**
 * Reads a command's arguments.
 * @returns undefined when they ask for help, which is printed then
 * @throws UsageError
 */
export function commandArguments(command: CommandSpec, argv: readonly string[]): Given | undefined {
  const { name } = command;
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse(command, argv);
  } catch (error) {
    // Node's sentence, up to where it explains how to pass what looks like an option.
    throw new UsageError(`${name}: ${(error as Error).message.split('. ')[0]}: ${synopsis(command)}`);
  }
  if (parsed.values['help']) {
    writeSync(1, `${helpOf(command)}\n`);
    return undefined;
  }
  const { positionals } = parsed;
  const wanted = command.argument === undefined ? 0 : 1;
  if (positionals.length > wanted) throw new UsageError(`${name}: '${positionals[wanted]}' is one argument too many: ${synopsis(command)}`);
  if (positionals.length < wanted) throw new UsageError(`${name}: ${command.argument} is missing: ${synopsis(command)}`);
  return { argument: positionals[0], options: parsed.values };
}

function parse({ options }: CommandSpec, argv: readonly string[]) {
  const table = options.map(({ name, short, value }) => [
    name,
    { type: value === undefined ? 'boolean' : 'string', ...(short !== undefined && { short }) } as const,
  ]);
  return parseArgs({
    args: [...argv],
    allowPositionals: true,
    options: { ...Object.fromEntries(table), help: { type: 'boolean', short: 'h' } },
  }) as { values: Record<string, string | boolean | undefined>; positionals: string[] };
}

function helpOf(command: CommandSpec): string {
  const rows = command.options.map(
    ({ name, short, value, summary }) =>
      `  ${`${short === undefined ? '' : `-${short}, `}--${name}${value === undefined ? '' : `=${value}`}`.padEnd(24)}  ${summary}`,
  );
  return [synopsis(command), '', `${command.summary}. ${command.details}.`, ...(rows.length > 0 ? ['', ...rows] : [])].join('\n');
}

/** Asks a daemon's metrics address. @throws UsageError when nobody answers there */
export function get(command: CommandSpec, address: string, path: string): Promise<IncomingMessage> {
  const at: MetricsAddress = metricsAddress(address);
  const where = 'path' in at ? { socketPath: at.path } : { host: at.host, port: at.port };
  return new Promise((resolve, reject) => {
    request({ ...where, path }, resolve).on('error', (error: NodeJS.ErrnoException) =>
      reject(new UsageError(`${command.name}: nobody answers there (${error.code ?? error.message}): give the daemon's --metrics address`)),
    );
  });
}
