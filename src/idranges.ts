/**
 * Maps of a user namespace: `--uid-map` and `--gid-map`, and the map of an ordinary user that gives none. Not to be confused with
 * `fs/idmap.ts`, which translates what the guest sends.
 */
import { readFileSync } from 'node:fs';

/** Ids inside the namespace, and outside, the same number of each. */
export interface IdRange {
  readonly inside: number;
  readonly outside: number;
  readonly count: number;
}

const TWO_32 = 0x1_0000_0000;

/**
 * `:INSIDE:OUTSIDE:COUNT:`, where any character that is no digit may stand for the colons.
 * @throws Error that says what is wrong
 */
export function parseRange(text: string): IdRange {
  const delimiter = text.charAt(0);
  const words = text.split(delimiter);
  const numbers = words.slice(1, 4).map(Number);
  if (delimiter === '' || /\d/.test(delimiter) || words.length !== 5 || words[4] !== '' || !words.slice(1, 4).every((w) => /^\d+$/.test(w)))
    throw new Error(`${text} is no map: give :INSIDE:OUTSIDE:COUNT:`);
  const [inside, outside, count] = numbers as [number, number, number];
  if (count === 0 || inside + count >= TWO_32 || outside + count >= TWO_32) throw new Error(`${text}: ids end at 4294967294`);
  return { inside, outside, count };
}

/**
 * The map of an ordinary user who gives none: the own id stays what it is (as with virtiofsd), and what a guest's other users need
 * comes from the user's subordinate ids, in order, where there are any.
 */
export function ownMap(id: number, subordinate: { start: number; count: number } | undefined): IdRange[] {
  const own = { inside: id, outside: id, count: 1 };
  if (subordinate === undefined) return [own];
  const { start, count } = subordinate;
  const below = Math.min(id, count);
  const ranges = [{ inside: 0, outside: start, count: below }, own, { inside: id + 1, outside: start + below, count: count - below }];
  return ranges.filter((range) => range.count > 0);
}

/** The first range that /etc/subuid or /etc/subgid has for a user, by name or number. */
export function subordinateIds(file: string, uid: number, name: string | undefined): { start: number; count: number } | undefined {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch {
    return undefined;
  }
  for (const line of text.split('\n')) {
    const [who, start, count] = line.split(':');
    if (who === undefined || (who !== name && who !== String(uid))) continue;
    const range = { start: Number(start), count: Number(count) };
    if (range.start > 0 && range.count > 0) return range;
  }
  return undefined;
}

/** Lines of /proc/PID/uid_map. */
export function mapText(ranges: readonly IdRange[]): string {
  return ranges.map(({ inside, outside, count }) => `${inside} ${outside} ${count}\n`).join('');
}

/** What an id outside is inside; undefined when it is not mapped. */
export function insideOf(ranges: readonly IdRange[], id: number): number | undefined {
  const range = ranges.find(({ outside, count }) => id >= outside && id < outside + count);
  return range === undefined ? undefined : range.inside + (id - range.outside);
}
