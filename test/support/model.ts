/**
 * A guest that changes a tree at random and knows what must come of it: operations whose second time is not as the first, in an order
 * that depends on a seed alone.
 */
import assert from 'node:assert/strict';
import * as fs from 'node:fs';
import { join } from 'node:path';
import type { FuseClient } from './fuse-client.js';

const { O_CREAT, O_EXCL, O_RDWR, O_WRONLY, O_APPEND } = fs.constants;
const RENAME_EXCHANGE = 2;

interface Node {
  nodeid: number;
  /** Undefined for a directory. */
  content?: string;
  target?: string;
  names: number;
}

/** mulberry32. */
function random(seed: number): () => number {
  let a = seed;
  return () => {
    a = (a + 0x6d2b79f5) | 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

export class ModelGuest {
  /** Operations done. */
  operations = 0;
  readonly #client: FuseClient;
  readonly #random: () => number;
  readonly #names = new Map<string, Node>();
  readonly #open: { node: Node; fh: number }[] = [];
  #next = 0;

  constructor(client: FuseClient, seed: number) {
    this.#client = client;
    this.#random = random(seed);
  }

  /** One operation. */
  step(): void {
    const client = this.#client;
    const roll = this.#random();
    const some = this.#some();
    const fresh = `n${this.#next++}`;
    this.operations++;
    if (this.#names.size < 10 || roll < 0.2) {
      const { entry, open } = client.create(1, fresh, O_CREAT | O_EXCL | O_RDWR, 0o644);
      const node = { nodeid: entry.nodeid, content: '', names: 1 };
      this.#names.set(fresh, node);
      this.#open.push({ node, fh: open.fh });
      if (this.#open.length > 20) {
        const closed = this.#open.shift() as { node: Node; fh: number };
        client.release(closed.node.nodeid, closed.fh);
      }
    } else if (roll < 0.3) this.#names.set(fresh, { nodeid: client.mkdir(1, fresh).nodeid, names: 1 });
    else if (roll < 0.35)
      this.#names.set(fresh, { nodeid: client.symlink(1, fresh, `to-${fresh}`).nodeid, target: `to-${fresh}`, names: 1 });
    else if (roll < 0.42 && some.node.content !== undefined) {
      client.link(some.node.nodeid, 1, fresh);
      some.node.names++;
      this.#names.set(fresh, some.node);
    } else if (roll < 0.57) {
      if (some.node.content === undefined && some.node.target === undefined) client.rmdir(1, some.name);
      else client.unlink(1, some.name);
      this.#names.delete(some.name);
      some.node.names--;
    } else if (roll < 0.7) {
      client.rename(1, some.name, 1, fresh);
      this.#names.delete(some.name);
      this.#names.set(fresh, some.node);
    } else if (roll < 0.75) {
      const other = this.#some();
      client.rename2(1, some.name, 1, other.name, RENAME_EXCHANGE);
      this.#names.set(some.name, other.node);
      this.#names.set(other.name, some.node);
    } else if (roll < 0.97) this.#append();
    else {
      // A look-up and its FORGET: the inode must stay as long as its other references do.
      const { nodeid } = client.lookup(1, some.name);
      assert.equal(nodeid, some.node.nodeid);
      client.forget(nodeid, 1);
    }
  }

  #some(): { name: string; node: Node } {
    const names = [...this.#names.keys()];
    const name = names[Math.floor(this.#random() * names.length)] ?? '';
    return { name, node: this.#names.get(name) ?? { nodeid: 0, names: 0 } };
  }

  /** To the end of an open file, as programs do that keep logs; unlinked files, too. */
  #append(): void {
    const open = this.#open[Math.floor(this.#random() * this.#open.length)];
    if (open === undefined) return;
    const { node, fh } = open;
    const text = `${this.operations}:${'x'.repeat(Math.floor(this.#random() * 3000))}\n`;
    const content = node.content as string;
    const written = this.#client.write(node.nodeid, fh, content.length, text, { flags: O_WRONLY | O_APPEND });
    assert.equal(written, text.length);
    node.content = content + text;
  }

  /** Compares everything with what the host and the guest have. */
  check(share: string): void {
    const found = fs.readdirSync(share).sort();
    assert.deepEqual(found, [...this.#names.keys()].sort());
    for (const [name, node] of this.#names) {
      const path = join(share, name);
      const stat = fs.lstatSync(path);
      if (node.target !== undefined) assert.equal(fs.readlinkSync(path), node.target, name);
      else if (node.content === undefined) assert.ok(stat.isDirectory(), name);
      else {
        assert.equal(fs.readFileSync(path, 'utf8'), node.content, name);
        assert.equal(stat.nlink, node.names, name);
      }
      this.#client.getattr(node.nodeid);
    }
    for (const { node, fh } of this.#open) {
      const content = node.content as string;
      assert.equal(this.#client.read(node.nodeid, fh, 0, Math.max(content.length, 1)).toString().slice(0, content.length), content);
    }
  }
}
