/**
 * Translation of user or group ids between guest and host (`--translate-uid`, `--translate-gid`), in the rule language of
 * virtiofsd. The two directions are independent; an id that no rule names is translated to itself.
 */
import { EPERM } from './linux.js';

/** 2^32 - 1 as an id means "none" in system calls: (uid_t)-1. */
export const NO_ID = 0xffffffff;

const TWO_32 = 0x1_0000_0000;

/** Ranges of ids of one direction, in the order of their rules; they never overlap. */
interface Range {
  first: number;
  end: number;
  /** First target id, or the only one of a squashed range; -1: forbidden. */
  target: number;
  squash: boolean;
}

/** One rule of the command line. */
interface Rule {
  guestToHost: Range | null;
  hostToGuest: Range | null;
}

/** Both directions of one kind of id. */
export class IdMap {
  /** Nothing is translated: the hot path need not ask. */
  readonly identity: boolean;
  readonly #toHost: readonly Range[];
  readonly #toGuest: readonly Range[];

  /**
   * @param rules `guest:G:H:N`, `host:H:G:N`, `map:G:H:N`, `squash-guest:G:H:N`, `squash-host:H:G:N`, `forbid-guest:G:N`
   * @throws Error that names the rule: unknown form, a number above 32 bits, a range that ends above 2^32 - 1 or meets
   *   another one of the same direction.
   */
  constructor(rules: readonly string[] = []) {
    const toHost: Range[] = [];
    const toGuest: Range[] = [];
    for (const text of rules) {
      const rule = parse(text);
      if (rule.guestToHost) push(toHost, rule.guestToHost, text, 'guest');
      if (rule.hostToGuest) push(toGuest, rule.hostToGuest, text, 'host');
    }
    this.#toHost = toHost;
    this.#toGuest = toGuest;
    this.identity = rules.length === 0;
  }

  /** The host's id for one of the guest's, or -EPERM where a rule forbids it. */
  toHost(id: number): number {
    return find(this.#toHost, id);
  }

  /** The guest's id for one of the host's. */
  toGuest(id: number): number {
    return find(this.#toGuest, id);
  }
}

function find(ranges: readonly Range[], id: number): number {
  for (let i = 0; i < ranges.length; i++) {
    const range = ranges[i] as Range;
    if (id < range.first || id >= range.end) continue;
    if (range.target < 0) return -EPERM;
    return range.squash ? range.target : range.target + (id - range.first);
  }
  return id;
}

function parse(text: string): Rule {
  const fields = text.split(':');
  const kind = fields[0] as string;
  const numbers = fields.slice(1).map((field) => {
    const value = /^[0-9]+$/.test(field) ? Number(field) : NaN;
    if (!(value < TWO_32)) throw new Error(`${text}: '${field}' is not a number below 2^32`);
    return value;
  });
  const wanted = kind === 'forbid-guest' ? 2 : 3;
  if (numbers.length !== wanted) throw new Error(`${text}: ${kind} takes ${wanted} numbers, not ${numbers.length}`);
  const [a, b] = numbers as [number, number];
  const count = numbers[wanted - 1] as number;
  switch (kind) {
    case 'guest':
      return { guestToHost: range(text, a, b, count), hostToGuest: null };
    case 'host':
      return { guestToHost: null, hostToGuest: range(text, a, b, count) };
    case 'map':
      return { guestToHost: range(text, a, b, count), hostToGuest: range(text, b, a, count) };
    case 'squash-guest':
      return { guestToHost: squash(text, a, b, count), hostToGuest: null };
    case 'squash-host':
      return { guestToHost: null, hostToGuest: squash(text, a, b, count) };
    case 'forbid-guest':
      return { guestToHost: { ...squash(text, a, 0, count), target: -1 }, hostToGuest: null };
    default:
      throw new Error(`${text}: '${kind}' is none of guest, host, map, squash-guest, squash-host, forbid-guest`);
  }
}

function squash(text: string, first: number, target: number, count: number): Range {
  if (first + count > NO_ID) throw new Error(`${text}: the range ends above 2^32 - 1`);
  return { first, end: first + count, target, squash: true };
}

function range(text: string, first: number, target: number, count: number): Range {
  if (target + count > NO_ID) throw new Error(`${text}: the target range ends above 2^32 - 1`);
  return { ...squash(text, first, target, count), squash: false };
}

function push(ranges: Range[], range: Range, text: string, side: string): void {
  for (const other of ranges) {
    if (range.first < other.end && other.first < range.end) throw new Error(`${text}: meets another rule for the same ${side} ids`);
  }
  ranges.push(range);
}
