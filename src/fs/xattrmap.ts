/**
 * Mapping of extended attribute names between guest ("client") and host ("server"): `--xattrmap`, in the rule language of
 * virtiofsd. The first rule that matches decides; names are bytes.
 */
import { EOPNOTSUPP, EPERM, ERANGE } from './linux.js';

const CLIENT = 1;
const SERVER = 2;

type Kind = 'prefix' | 'ok' | 'bad' | 'unsupported';

interface Rule {
  kind: Kind;
  scope: number;
  /** Prefix of a name from the guest. */
  key: Uint8Array;
  /** Prefix of a name on the host; put before the guest's name by `prefix`. */
  prepend: Uint8Array;
}

/** Compiled rules. */
export class XattrMap {
  readonly #rules: readonly Rule[];

  /**
   * @param text rules `:type:scope:key:prepend:` or, last, `:map:key:prepend:`; each may have its own separator
   * @throws Error that names the rule by its number.
   */
  constructor(text: string) {
    this.#rules = parse(text);
  }

  /**
   * Maps the name at `name` (NUL-terminated) of `memory` to NUL-terminated bytes at `out`, where `room` bytes are free.
   * @returns the length of the new name without NUL; -EPERM (bad), -EOPNOTSUPP (unsupported, or no rule matches),
   *   -ERANGE when it becomes longer than `room`, as from the kernel.
   */
  toHost(memory: Uint8Array, name: number, out: number, room: number): number {
    let length = 0;
    while (memory[name + length] !== 0) length++;
    for (const rule of this.#rules) {
      if ((rule.scope & CLIENT) === 0 || !startsWith(memory, name, length, rule.key)) continue;
      if (rule.kind === 'bad') return -EPERM;
      if (rule.kind === 'unsupported') return -EOPNOTSUPP;
      const prepend = rule.kind === 'prefix' ? rule.prepend.length : 0;
      if (prepend + length + 1 > room) return -ERANGE;
      memory.copyWithin(out + prepend, name, name + length + 1);
      if (prepend > 0) memory.set(rule.prepend, out);
      return prepend + length;
    }
    return -EOPNOTSUPP;
  }

  /**
   * Maps the list of `length` bytes of NUL-terminated names at `list` in place: hides names and strips prefixes.
   * @returns the new length, never larger.
   */
  listToGuest(memory: Uint8Array, list: number, length: number): number {
    let to = list;
    let at = list;
    const end = list + length;
    while (at < end) {
      let next = at;
      while (next < end && memory[next] !== 0) next++;
      const strip = this.#visible(memory, at, next - at);
      if (strip >= 0 && at + strip < next) {
        memory.copyWithin(to, at + strip, next + 1);
        to += next + 1 - at - strip;
      }
      at = next + 1;
    }
    return to - list;
  }

  /** How many bytes the guest does not see of a host name; -1: none of it is visible. */
  #visible(memory: Uint8Array, name: number, length: number): number {
    for (const rule of this.#rules) {
      if ((rule.scope & SERVER) === 0 || !startsWith(memory, name, length, rule.prepend)) continue;
      if (rule.kind === 'ok') return 0;
      return rule.kind === 'prefix' ? rule.prepend.length : -1;
    }
    return -1;
  }
}

function startsWith(memory: Uint8Array, at: number, length: number, prefix: Uint8Array): boolean {
  if (prefix.length > length) return false;
  for (let i = 0; i < prefix.length; i++) if (memory[at + i] !== prefix[i]) return false;
  return true;
}

function parse(text: string): Rule[] {
  const rules: Rule[] = [];
  let rest = text.trimStart();
  let number = 0;
  let last = '';
  while (rest !== '') {
    number++;
    if (last === 'map') throw new Error(`xattrmap: rule ${number - 1}: map must be the last rule`);
    const separator = String.fromCodePoint(rest.codePointAt(0) as number);
    const fields = rest.slice(separator.length).split(separator);
    const type = fields[0] as string;
    last = type;
    const wanted = type === 'map' ? 3 : 4;
    if (fields.length <= wanted)
      throw new Error(`xattrmap: rule ${number}: '${rest}' has not ${wanted} fields that each end in '${separator}'`);
    if (type === 'map') {
      rules.push(...expandMap(fields[1] as string, fields[2] as string));
    } else {
      if (type !== 'prefix' && type !== 'ok' && type !== 'bad' && type !== 'unsupported') {
        throw new Error(`xattrmap: rule ${number}: type '${type}' is none of prefix, ok, bad, unsupported, map`);
      }
      const scope = { all: CLIENT | SERVER, client: CLIENT, server: SERVER }[fields[1] as string];
      if (scope === undefined) throw new Error(`xattrmap: rule ${number}: scope '${fields[1]}' is none of all, client, server`);
      rules.push(rule(type, scope, fields[2] as string, fields[3] as string));
    }
    rest = fields.slice(wanted).join(separator).trimStart();
  }
  if (rules.length === 0) throw new Error('xattrmap: no rules');
  return rules;
}

/** What `map` is short for: everything below one prefix, or one kind of name below it and the way round it shut. */
function expandMap(key: string, prepend: string): Rule[] {
  const both = CLIENT | SERVER;
  if (key === '') return [rule('prefix', both, '', prepend), rule('bad', both, '', '')];
  return [rule('prefix', both, key, prepend), rule('bad', SERVER, '', key), rule('bad', CLIENT, prepend, ''), rule('ok', both, '', '')];
}

function rule(kind: Kind, scope: number, key: string, prepend: string): Rule {
  return { kind, scope, key: Buffer.from(key), prepend: Buffer.from(prepend) };
}
