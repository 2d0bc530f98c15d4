/** Random changes of files, with what a guest must see of each when it hears of it. */
import * as fs from 'node:fs';
import { join } from 'node:path';

/** Directories that are changed in. */
export const DIRECTORIES = 6;
const NAMES = 12;
/** The same changes each time, unless asked for others. */
export const SEED = Number(process.env['SEED'] ?? 1);

/** A small generator (mulberry32): the same changes each time. */
export function random(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

/** FNV-1a, 32 bits. */
function hash(data: Uint8Array): string {
  let h = 0x811c9dc5;
  for (const byte of data) h = Math.imul(h ^ byte, 0x01000193);
  return (h >>> 0).toString(16).padStart(8, '0');
}

/** What `follow` must see of a name: see test/guest/fsnotify.c. */
export function truth(root: string, directory: number, name: string): string {
  const path = join(root, String(directory), name);
  const st = fs.lstatSync(path, { bigint: true, throwIfNoEntry: false });
  if (st === undefined) return `2 0 0000000000 0 0 0 00000000 0`;
  const data = fs.readFileSync(path);
  const mtime = `${st.mtimeNs / 1_000_000_000n}${String(st.mtimeNs % 1_000_000_000n).padStart(9, '0')}`;
  return `0 ${st.size} ${mtime} ${(Number(st.mode) & 0o7777).toString(8)} ${st.nlink} ${data.length} ${hash(data)} 1`;
}

/** Makes one random change; returns the events that must be heard, each "N MASK name": when the last is there, all is as it is on the host. */
export function change(root: string, pick: (below: number) => number, turn: number): { what: string; events: [number, string, string][] } {
  const directory = pick(DIRECTORIES);
  const at = (d: number, n: string) => join(root, String(d), n);
  const names = fs.readdirSync(join(root, String(directory)));
  const name = names[pick(Math.max(names.length, 1))];
  const text = `${turn} `.repeat(1 + pick(pick(8) === 0 ? 4000 : 20));
  const kind = name === undefined || names.length < 3 ? 'create' : names.length > NAMES ? 'delete' : KINDS[pick(KINDS.length)];
  const fresh = `n${turn}`;
  const path = at(directory, name ?? '');
  const one = (mask: string, n = name as string): [number, string, string] => [directory, mask, n];
  switch (kind) {
    case 'write':
      fs.writeFileSync(path, text);
      return { what: `write ${path}`, events: [one('CLOSE_WRITE')] };
    case 'append':
      fs.appendFileSync(path, text);
      return { what: `append ${path}`, events: [one('CLOSE_WRITE')] };
    case 'overwrite': {
      // Neither the size nor what is around it changes.
      const fd = fs.openSync(path, 'r+');
      fs.writeSync(fd, 'over', Math.max(0, fs.fstatSync(fd).size - 5));
      fs.closeSync(fd);
      return { what: `overwrite ${path}`, events: [one('CLOSE_WRITE')] };
    }
    case 'truncate': {
      const size = fs.lstatSync(path).size;
      fs.truncateSync(path, size === 0 ? 100 : pick(size));
      return { what: `truncate ${path}`, events: [one('CLOSE_WRITE')] }; // node opens it for that
    }
    case 'chmod':
      fs.chmodSync(path, 0o600 | pick(0o100));
      return { what: `chmod ${path}`, events: [one('ATTRIB')] };
    case 'utimes':
      fs.utimesSync(path, turn, turn + 0.25);
      return { what: `utimes ${path}`, events: [one('ATTRIB')] };
    case 'create':
      fs.writeFileSync(at(directory, fresh), text, { mode: 0o644 });
      return { what: `create ${directory}/${fresh}`, events: [one('CLOSE_WRITE', fresh)] };
    case 'link':
      fs.linkSync(path, at(directory, fresh));
      return { what: `link ${path} ${fresh}`, events: [one('CREATE', fresh)] };
    case 'delete':
      fs.unlinkSync(path);
      return { what: `delete ${path}`, events: [one('DELETE')] };
    case 'recreate':
      fs.unlinkSync(path);
      fs.writeFileSync(path, text);
      return { what: `delete and create ${path}`, events: [one('CLOSE_WRITE')] };
    case 'replace':
      fs.writeFileSync(at(directory, fresh), text);
      fs.renameSync(at(directory, fresh), path);
      return { what: `replace ${path}`, events: [one('MOVED_FROM', fresh), one('MOVED_TO')] };
    default: {
      // To another name in the same or another directory, which may exist.
      const to = pick(DIRECTORIES);
      const others = fs.readdirSync(join(root, String(to)));
      const target = pick(2) === 0 ? fresh : (others[pick(Math.max(others.length, 1))] ?? fresh);
      if (to === directory && target === name) return change(root, pick, turn);
      const same = fs.lstatSync(at(to, target), { throwIfNoEntry: false })?.ino === fs.lstatSync(path).ino;
      if (same) return change(root, pick, turn); // two names of one inode: rename(2) does nothing
      fs.renameSync(path, at(to, target));
      return { what: `rename ${path} ${to}/${target}`, events: [one('MOVED_FROM'), [to, 'MOVED_TO', target]] };
    }
  }
}
const KINDS = 'write append overwrite truncate chmod utimes create link delete recreate replace rename rename'.split(' ');
