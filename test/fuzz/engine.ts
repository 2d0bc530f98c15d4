/**
 * What all targets share: cases, how they are run, and how a failing one is made small.
 *
 * A case is plain JSON: which fixture it runs on and a list of steps. A step refers to what the guest has been given by then
 * ("the third open file"), never to the number itself, so steps can be taken out of a case and the rest still means the same.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Random } from './random.js';

export interface Case<Step = unknown> {
  /** Which of the target's fixtures (options, session, ...). */
  setup: number;
  steps: Step[];
}

/** Something that takes bytes from a peer. */
export interface Target<Step = unknown> {
  readonly name: string;
  generate(random: Random): Case<Step>;
  /**
   * Runs a case from a fresh state.
   * @returns how many requests were made
   * @throws for everything that must not be
   */
  run(test: Case<Step>): number;
  close(): void;
}

export class Finding extends Error {
  override name = 'Finding';
}

/** @throws Finding unless `condition` */
export function must(condition: boolean, what: string | (() => string)): asserts condition {
  if (!condition) throw new Finding(typeof what === 'string' ? what : what());
}

export function caseOf(target: Target, seed: number, index: number): Case {
  return target.generate(new Random(seed, index));
}

/** What is wrong with a case; undefined: nothing. */
export function failure(target: Target, test: Case): string | undefined {
  try {
    target.run(test);
    return undefined;
  } catch (error) {
    return error instanceof Finding ? error.message : ((error as Error).stack ?? String(error));
  }
}

/** What two failures have in common that are the same one. */
export function kindOf(failure: string): string {
  return failure
    .replace(/\{.*?\}/gs, '')
    .replace(/\d+/g, '#')
    .split('\n')
    .slice(0, 2)
    .join(' ')
    .slice(0, 200);
}

/**
 * Takes steps out of a failing case, and makes the rest plainer, as long as it goes on failing.
 * @param fails whether a case fails, in whatever way
 * @param limit milliseconds
 */
export function shrink(test: Case, fails: (test: Case) => boolean, limit = 60_000): Case {
  const end = performance.now() + limit;
  let steps = test.steps;
  const tryOut = (candidate: unknown[]): boolean => {
    if (performance.now() > end || !fails({ setup: test.setup, steps: candidate })) return false;
    steps = candidate;
    return true;
  };
  for (let again = true; again; ) {
    again = false;
    for (let size = Math.max(1, steps.length >> 1); size >= 1; size >>= 1) {
      for (let at = steps.length - size; at >= 0; at -= size) {
        if (tryOut([...steps.slice(0, at), ...steps.slice(at + size)])) again = true;
      }
    }
  }
  for (let i = 0; i < steps.length; i++) {
    for (let progress = true; progress; ) {
      progress = false;
      for (const plainer of plain(steps[i])) {
        if (tryOut([...steps.slice(0, i), plainer, ...steps.slice(i + 1)])) {
          progress = true;
          break;
        }
      }
    }
  }
  return { setup: test.setup, steps };
}

/** Plainer variants of a JSON value: one part of it at a time 0, half, shorter or left out. */
function* plain(value: unknown): Generator<unknown> {
  if (typeof value === 'number' && value !== 0) {
    yield 0;
    if (Math.abs(value) > 1) yield Math.trunc(value / 2);
  } else if (typeof value === 'string' && value.length > 1) {
    yield value.slice(0, value.length >> 1);
  } else if (Array.isArray(value)) {
    if (value.length > 0) yield value.slice(0, -1);
    for (const [i, item] of value.entries()) for (const other of plain(item)) yield value.with(i, other);
  } else if (typeof value === 'object' && value !== null) {
    for (const [key, item] of Object.entries(value)) {
      if (key === 'op' || key === 'host') continue;
      const { [key]: _, ...rest } = value as Record<string, unknown>;
      yield rest;
      for (const other of plain(item)) yield { ...value, [key]: other };
    }
  }
}

/** The cases of a target that are kept in the repository. */
export function corpus(folder: string, target: string): { file: string; test: Case }[] {
  const at = join(folder, target);
  let names: string[];
  try {
    names = readdirSync(at).filter((name) => name.endsWith('.json'));
  } catch {
    return [];
  }
  return names.sort().map((name) => ({ file: join(at, name), test: JSON.parse(readFileSync(join(at, name), 'utf8')) as Case }));
}

/** A case as text: a line for each step. */
export function text({ setup, steps }: Case): string {
  return `{"setup": ${setup}, "steps": [\n${steps.map((step) => `  ${JSON.stringify(step)}`).join(',\n')}\n]}\n`;
}
