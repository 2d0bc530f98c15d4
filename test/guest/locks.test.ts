/** Locks in a real guest (--posix-lock, --flock): programs of the guest and of the host exclude each other. */
import assert from 'node:assert/strict';
import { execFile, execFileSync, spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { promisify } from 'node:util';
import { type Setup, setUp } from '../support/guests.js';

const folder = mkdtempSync(join(tmpdir(), 'guest-locks-'));
after(() => rmSync(folder, { recursive: true, force: true }));

/** Adds to the number in a file, under a lock on its first byte. */
const COUNT = `
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for i in range(int(sys.argv[2])):
    fcntl.lockf(fd, fcntl.LOCK_EX, 1)
    n = int(os.pread(fd, 20, 0) or b'0')
    os.pwrite(fd, b'%d' % (n + 1), 0)
    fcntl.lockf(fd, fcntl.LOCK_UN, 1)
`;
/** The same in a database. */
const SQL = `
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=120, isolation_level=None)
for i in range(int(sys.argv[2])):
    db.execute('begin immediate')
    n = db.execute('select n from t').fetchone()[0]
    db.execute('update t set n = ?', (n + 1,))
    db.execute('commit')
`;

describe('locks in a guest', () => {
  let setup: Setup;
  let held = 0;
  before(async () => {
    // What is read under a lock must not be what was cached before it.
    setup = await setUp({
      kind: 'uml',
      kernel: '6.12',
      hostRoot: true,
      memoryMiB: 512,
      daemonOptions: ['--posix-lock', '--flock', '--cache=never', '--allow-mmap'],
    });
    writeFileSync(join(setup.share, 'count.py'), COUNT);
    writeFileSync(join(setup.share, 'sql.py'), SQL);
  });
  after(() => setup.end());

  const onHost = (command: string) => spawnSync('sh', ['-c', command], { cwd: setup.share }).status;
  const inGuest = async (command: string) => (await setup.guest.run(`cd /mnt; ${command}`)).status;

  it('flock(1) both ways', { timeout: 120_000 }, async () => {
    writeFileSync(join(setup.share, 'file'), '');
    const holder = spawn('flock', ['file', 'sh', '-c', 'echo locked; cat'], { cwd: setup.share, stdio: ['pipe', 'pipe', 'inherit'] });
    await new Promise((done) => holder.stdout.once('data', done));
    assert.equal(await inGuest('flock -n file true'), 1);
    assert.equal(await inGuest('flock -n -s file true'), 1);
    const waiter = setup.guest.spawn('cd /mnt; flock file echo granted');
    assert.equal(await inGuest('sleep 0.3; ls > /dev/null'), 0, 'the guest goes on meanwhile');
    holder.stdin.end();
    await waiter.waitForLine('granted');
    assert.equal((await waiter.ended).status, 0);

    const inside = setup.guest.spawn('cd /mnt; exec flock -s file sh -c "echo locked; exec sleep 1000"');
    await inside.waitForLine('locked');
    assert.equal(onHost('flock -n file true'), 1);
    assert.equal(onHost('flock -n -s file true'), 0);
    assert.equal(await inGuest('flock -n file true'), 1);
    await inGuest('pkill -9 sleep; pkill -9 flock; true');
    await inside.ended;
    assert.equal(onHost('flock -w 20 file true'), 0);
  });

  it('fcntl(2): guest and host count together', { timeout: 240_000 }, async () => {
    const file = join(setup.share, 'number');
    writeFileSync(file, '0');
    const host = [1, 2].map(() => promisify(execFile)('python3', [join(setup.share, 'count.py'), file, '150']));
    const guest = [1, 2].map(() => setup.guest.run('python3 /mnt/count.py /mnt/number 150', { timeoutMs: 200_000 }));
    await Promise.all(host);
    for (const { status, stderr } of await Promise.all(guest)) assert.equal(status, 0, stderr);
    assert.equal(readFileSync(file, 'utf8'), '600');
  });

  it('a database that guest and host write', { timeout: 240_000 }, async () => {
    const file = join(setup.share, 'database');
    const python = (code: string) => execFileSync('python3', ['-c', code, file], { encoding: 'utf8' }).trim();
    python(
      "import sqlite3,sys; db=sqlite3.connect(sys.argv[1]); db.execute('create table t (n)'); db.execute('insert into t values (0)'); db.commit()",
    );
    const host = promisify(execFile)('python3', [join(setup.share, 'sql.py'), file, '40']);
    const guest = [1, 2].map(() => setup.guest.run('python3 /mnt/sql.py /mnt/database 40', { timeoutMs: 200_000 }));
    await host;
    for (const { status, stderr } of await Promise.all(guest)) assert.equal(status, 0, stderr);
    assert.equal(python("import sqlite3,sys; print(sqlite3.connect(sys.argv[1]).execute('select n from t').fetchone()[0])"), '120');
    assert.equal(python("import sqlite3,sys; print(sqlite3.connect(sys.argv[1]).execute('pragma integrity_check').fetchone()[0])"), 'ok');
  });

  it('a guest that is killed leaves no lock', { timeout: 240_000 }, async () => {
    const second = await setUp({
      kind: 'uml',
      kernel: '6.12',
      share: setup.share,
      hostRoot: true,
      daemonOptions: ['--posix-lock', '--flock'],
    });
    const lock =
      'import fcntl,os,time; f=open("/mnt/file","r+"); fcntl.lockf(f, fcntl.LOCK_EX); fcntl.flock(f, fcntl.LOCK_EX); print("locked", flush=True); time.sleep(1000)';
    const inside = second.guest.spawn(`python3 -c '${lock}'`);
    await inside.waitForLine('locked');
    held = onHost('flock -n file true') as number;
    const posix = `import fcntl,sys; f=open("file","r+")
try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError: sys.exit(1)`;
    const tries = () => spawnSync('python3', ['-c', posix], { cwd: setup.share }).status;
    assert.deepEqual([held, tries()], [1, 1]);
    assert.equal(await inGuest('flock -n file true'), 1, 'another guest');
    await second.guest.kill();
    assert.equal(onHost('flock -w 20 file true'), 0);
    for (let i = 0; tries() !== 0; i++) assert.ok(i < 100);
    await second.daemon.stop();
  });
});
