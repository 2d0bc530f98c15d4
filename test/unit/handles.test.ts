import assert from 'node:assert/strict';
import { test } from 'node:test';
import { native } from 'vhost-user-ts/native';
import { Block } from '../../src/fs/block.js';
import { ANY_NODE, HandleStore, Kind } from '../../src/fs/handles.js';

const EBADF = -9;

/** Whether a descriptor is open. */
function isOpen(fd: number): boolean {
  const copy = native.dup(fd);
  if (copy >= 0) native.close(copy);
  return copy >= 0;
}

test('a handle belongs to one inode and one kind', () => {
  const block = new Block();
  const handles = new HandleStore(block);
  const fd = native.eventfd(0);
  const slot = handles.add(fd, 4711, Kind.file, 0, 0, 0);
  const fh = handles.fh(slot);
  assert.equal(handles.find(fh, 4711, Kind.file), slot);
  assert.equal(handles.find(fh, ANY_NODE, Kind.file), slot);
  assert.equal(handles.find(fh, 0, Kind.file), EBADF);
  assert.equal(handles.find(fh, 4712, Kind.file), EBADF);
  assert.equal(handles.find(fh, 4711, Kind.directory), EBADF);
  for (const wrong of [0, 1, slot, fh + 1, fh + 2 ** 20, fh - 2 ** 20, -1, 2 ** 53 - 1, 2 ** 63, 2 ** 64]) {
    assert.equal(handles.find(wrong, 4711, Kind.file), EBADF, String(wrong));
  }
  handles.release(slot);
  assert.equal(handles.find(fh, 4711, Kind.file), EBADF);
  assert.equal(isOpen(fd), false);
  block.close();
});

test('a slot that is used again has another handle', () => {
  const block = new Block();
  const handles = new HandleStore(block);
  const a = handles.add(native.eventfd(0), 1, Kind.file, 0, 0, 0);
  const old = handles.fh(a);
  handles.release(a);
  const b = handles.add(native.eventfd(0), 1, Kind.file, 0, 0, 0);
  assert.equal(b, a);
  assert.notEqual(handles.fh(b), old);
  assert.equal(handles.find(old, 1, Kind.file), EBADF);
  assert.equal(handles.releaseAll(), 1);
  assert.equal(handles.open, 0);
  block.close();
});

test('released while jobs use it: found by nobody, closed by the last job', () => {
  const block = new Block();
  const handles = new HandleStore(block);
  const fd = native.eventfd(0);
  const slot = handles.add(fd, 1, Kind.file, 0, 0, 0);
  const fh = handles.fh(slot);
  handles.hold(slot);
  handles.hold(slot);
  assert.equal(handles.release(slot), false);
  assert.equal(handles.find(fh, 1, Kind.file), EBADF);
  assert.equal(handles.releaseAll(), 0);
  assert.equal(handles.unhold(slot), false);
  assert.equal(isOpen(fd), true);
  assert.equal(handles.unhold(slot), true);
  assert.equal(isOpen(fd), false);
  assert.equal(handles.open, 0);
  block.close();
});
