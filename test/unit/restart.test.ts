/** What outlives a process, read by the next one after an end between any two stores: ledger, journal, inodes, open files. */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { Ledger, Virtqueue } from 'vhost-user-ts';
import { native } from 'vhost-user-ts/native';
import { Block } from '../../src/fs/block.js';
import { HandleFlag, HandleStore, Kind } from '../../src/fs/handles.js';
import { Flag, Inode, InodeStore, SHIFT } from '../../src/fs/inodes.js';
import { JOURNAL_WORDS, Journal } from '../../src/fs/passthrough/journal.js';
import { QueueRig } from '../support/queue-rig.js';

const FEATURES = { eventIdx: false, indirect: true };

describe('the ledger', () => {
  /** Six chains sent; the device has taken four. */
  function taken() {
    const memory = new ArrayBuffer(Ledger.bytes(1));
    const rig = new QueueRig({ size: 16, ledger: new Ledger(memory) });
    for (let i = 0; i < 6; i++) rig.driver.send([rig.put(`chain ${i}`)], [rig.room(16)]);
    const heads: number[] = [];
    for (let i = 0; i < 4; i++) {
      assert.equal(rig.queue.pop(), 1);
      heads.push(rig.queue.chain.head);
    }
    return { memory, rig, heads };
  }

  /** Another process's queue over the same rings and ledger. */
  function next(rig: QueueRig, memory: ArrayBuffer): Virtqueue {
    const queue = new Virtqueue(0, rig.memory, rig.queue.chain, new Ledger(memory));
    queue.callFd = rig.driver.callFd;
    assert.equal(queue.resume(rig.driver.size, rig.ringAddresses(), FEATURES), undefined);
    return queue;
  }

  function rest(rig: QueueRig, queue: Virtqueue): string[] {
    const seen: string[] = [];
    while (queue.pop() === 1) {
      seen.push(rig.readable());
      queue.push(queue.chain.head, 0);
    }
    return seen;
  }

  it('what was answered is shown, what was taken comes again: first what was being served', () => {
    const { memory, rig, heads } = taken();
    rig.queue.push(heads[0] as number, 0);
    rig.queue.push(heads[2] as number, 0);
    rig.queue.postpone(heads[1] as number);
    assert.equal(rig.driver.collect().length, 0, 'nothing was published');
    const queue = next(rig, memory);
    assert.equal(rig.driver.collect().length, 2);
    assert.deepEqual(queue.interrupted, [4, -2]);
    assert.ok(queue.pending);
    assert.deepEqual(rest(rig, queue), ['chain 3', 'chain 1', 'chain 4', 'chain 5']);
    queue.flush();
    assert.equal(rig.driver.collect().length, 4);
    rig.driver.send([rig.put('more')], [rig.room(16)]);
    assert.deepEqual(rest(rig, queue), ['more']);
    rig.close();
  });

  it('an end within push: the chain is answered', () => {
    const { memory, rig, heads } = taken();
    const book = new Ledger(memory).book(0, rig.driver.size);
    const number = book.taken[heads[3] as number] as number;
    rig.queue.push(heads[3] as number, 0);
    book.taken[heads[3] as number] = number; // as if the last store were missing
    const queue = next(rig, memory);
    assert.deepEqual(queue.interrupted, [1, 2, 3]);
    assert.equal(rig.driver.collect().length, 1);
    rig.close();
  });

  it('an end within pop: the chain is taken from the ring again', () => {
    const { memory, rig, heads } = taken();
    new Ledger(memory).book(0, rig.driver.size).taken[heads[3] as number] = 0;
    const queue = next(rig, memory);
    assert.deepEqual(rest(rig, queue), ['chain 0', 'chain 1', 'chain 2', 'chain 3', 'chain 4', 'chain 5']);
    rig.close();
  });
});

describe('the journal', () => {
  const REQUEST = 0;

  it('says what may have been done already, of this request alone', () => {
    const words = new Float64Array(JOURNAL_WORDS);
    words[REQUEST] = 7;
    assert.equal(new Journal(words).begin(), false);
    assert.equal(new Journal(words).begin(), true);
    words[REQUEST] = 8;
    assert.equal(new Journal(words).begin(), false);
  });

  it('FORGETs of a list are counted once, wherever it was cut', () => {
    const list = [10, 20, 30, 20];
    for (let cut = 0; cut <= list.length; cut++) {
      const words = new Float64Array(JOURNAL_WORDS);
      words[REQUEST] = 7;
      const counts = new Map(list.map((node) => [node, 5]));
      const forget = (journal: Journal, node: number, apply: boolean) => {
        const left = journal.counted((counts.get(node) as number) - 1);
        if (!Number.isNaN(left) && apply) counts.set(node, left);
      };
      const first = new Journal(words);
      // The last one is written down and not applied.
      for (const [i, node] of list.slice(0, cut).entries()) forget(first, node, i < cut - 1);
      const second = new Journal(words);
      for (const node of list) forget(second, node, true);
      assert.deepEqual(
        [...counts],
        [
          [10, 4],
          [20, 3],
          [30, 4],
        ],
        `cut after ${cut}`,
      );
    }
  });

  it('without a ledger nothing is ever done twice', () => {
    const journal = new Journal();
    for (let i = 0; i < 3; i++) assert.deepEqual([journal.begin(), journal.counted(i)], [false, i]);
  });
});

describe('stores of a process that ended within a change', () => {
  const REG = 0x8000;

  it('inodes: those that the guest knows, with indexes made anew', () => {
    const block = new Block();
    const inodes = new InodeStore(block);
    const root = inodes.insert(2, 0, 0, 0x4000);
    inodes.f64[((root << SHIFT) + Inode.nlookup) >> 1] = 1;
    const slots = Array.from({ length: 3000 }, (_, i) => {
      const slot = inodes.insert(100 + i, 0, 0, REG);
      inodes.f64[((slot << SHIFT) + Inode.nlookup) >> 1] = 1;
      return slot;
    });
    const nodeids = slots.map((slot) => inodes.nodeid(slot));
    const at = (i: number) => (slots[i] as number) << SHIFT;
    // Never told to the guest; in the middle of being removed; with a cached descriptor that nobody keeps; chains torn.
    inodes.f64[(at(1) + Inode.nlookup) >> 1] = 0;
    inodes.u32[at(2) + Inode.flags] = (inodes.u32[at(2) + Inode.flags] as number) & ~Flag.live;
    inodes.i32[at(3) + Inode.fd] = 999;
    for (let i = 500; i < 1000; i++) inodes.u32[at(i) + Inode.nextIno] = slots[0] as number;
    const after = new InodeStore(new Block(native.dup(block.fd)));
    assert.equal(after.size, 3000 - 2 + 1);
    for (let i = 0; i < slots.length; i++) {
      const gone = i === 1 || i === 2;
      assert.equal(after.byIno(100 + i, 0, 0), gone ? 0 : slots[i]);
      assert.equal(after.find(nodeids[i] as number), gone ? -2 : slots[i]);
    }
    assert.equal(after.i32[at(3) + Inode.fd], -1);
    const fresh = after.insert(9999, 0, 0, REG);
    assert.ok(!nodeids.includes(after.nodeid(fresh)), 'no nodeid comes again');
    block.close();
  });

  it('open files: those that the guest has open; a directory stands nobody knows where', () => {
    const block = new Block();
    const handles = new HandleStore(block, Float64Array.of(77));
    const file = handles.add(500, 9, Kind.file, 0, 0, 0);
    const closing = handles.add(501, 9, Kind.file, 0, 0, HandleFlag.closing);
    const directory = handles.add(502, 9, Kind.directory, 0, 0, 0);
    const half = handles.add(503, 9, Kind.file, 0, 0, 0);
    handles.set(half, 4, Kind.none); // its last store is missing
    handles.hold(file);
    const after = new HandleStore(new Block(native.dup(block.fd)));
    assert.equal(after.open, 2);
    assert.equal(after.find(handles.fh(file), 9, Kind.file), file);
    assert.equal(after.opener(file), 77);
    assert.ok(after.find(handles.fh(closing), 9, Kind.file) < 0);
    assert.equal(after.find(handles.fh(directory), 9, Kind.directory), directory);
    assert.deepEqual([...after.slots()], [file, directory]);
    block.close();
  });
});
