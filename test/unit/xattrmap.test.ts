import assert from 'node:assert/strict';
import { test } from 'node:test';
import { XattrMap } from '../../src/fs/xattrmap.js';

/** Maps a name from the guest; the host's name or -errno. */
function toHost(rules: string, name: string): string | number {
  const memory = Buffer.alloc(4096, 0xee);
  memory.write(`${name}\0`, 0);
  const n = new XattrMap(rules).toHost(memory, 0, 1024, 300);
  if (n < 0) return n;
  assert.equal(memory[1024 + n], 0);
  return memory.toString('utf8', 1024, 1024 + n);
}

/** Maps a list from the host. */
function toGuest(rules: string, names: string[]): string[] {
  const memory = Buffer.from(names.map((name) => `${name}\0`).join(''));
  const n = new XattrMap(rules).listToGuest(memory, 0, memory.length);
  return memory.toString('utf8', 0, n).split('\0').slice(0, -1);
}

const EPERM = -1;
const ENOTSUP = -95;

test('everything below a prefix, what the host has beside it is hidden', () => {
  for (const rules of [':prefix:all::user.virtiofs.::bad:all:::', ':map::user.virtiofs.:', '  :map::user.virtiofs.:  ']) {
    assert.equal(toHost(rules, 'trusted.x'), 'user.virtiofs.trusted.x');
    assert.equal(toHost(rules, 'user.virtiofs.x'), 'user.virtiofs.user.virtiofs.x');
    assert.deepEqual(toGuest(rules, ['user.virtiofs.trusted.x', 'security.selinux', 'user.virtiofs.user.a']), ['trusted.x', 'user.a']);
  }
});

test('one kind of names below a prefix, the way round it shut', () => {
  const long = '/prefix/all/trusted./user.virtiofs./\n /bad/server//trusted./ /bad/client/user.virtiofs.// /ok/all///';
  for (const rules of [long, '/map/trusted./user.virtiofs./']) {
    assert.equal(toHost(rules, 'trusted.x'), 'user.virtiofs.trusted.x');
    assert.equal(toHost(rules, 'user.virtiofs.trusted.x'), EPERM);
    assert.equal(toHost(rules, 'user.x'), 'user.x');
    assert.deepEqual(toGuest(rules, ['user.virtiofs.trusted.x', 'trusted.host', 'user.x']), ['trusted.x', 'user.x']);
  }
});

test('scopes, unsupported, and names that no rule matches', () => {
  assert.equal(toHost(':unsupported:client:security.:::ok:all:::', 'security.selinux'), ENOTSUP);
  assert.deepEqual(toGuest(':unsupported:all:security.:security.::ok:all:::', ['security.selinux', 'user.a']), ['user.a']);
  assert.equal(toHost(':ok:client:user.::', 'trusted.a'), ENOTSUP);
  assert.deepEqual(toGuest(':ok:server::user.:', ['user.a', 'trusted.a']), ['user.a']);
  assert.equal(toHost(':bad:server::user.::ok:all:::', 'user.a'), 'user.a');
});

test('each rule can have its own separator; non-ASCII names are bytes', () => {
  assert.equal(toHost('#prefix#client#ä#user.ö.#|ok|all|||', 'äx'), 'user.ö.äx');
});

test('a name that becomes too long is refused as the kernel would', () => {
  assert.equal(toHost(`:prefix:all::user.${'p'.repeat(200)}.::bad:all:::`, 'n'.repeat(200)), -34);
});

test('a list with nothing visible is empty', () => {
  assert.deepEqual(toGuest(':bad:all:::', ['user.a', 'user.b']), []);
  assert.deepEqual(toGuest(':map::user.virtiofs.:', ['user.virtiofs.']), []);
});

test('wrong rules are refused with their number', () => {
  assert.throws(() => new XattrMap(''), /no rules/);
  assert.throws(() => new XattrMap(':prefix:all:trusted.:user.'), /rule 1/);
  assert.throws(() => new XattrMap(':ok:all::::what:all:::'), /rule 2: type 'what'/);
  assert.throws(() => new XattrMap(':ok:both:::'), /rule 1: scope 'both'/);
  assert.throws(() => new XattrMap(':map::a.::ok:all:::'), /rule 1: map must be the last/);
});
