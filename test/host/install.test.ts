/** `make install` leaves a program that needs nothing of the clone. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, realpathSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, it } from 'node:test';
import { repository, startDaemon } from '../../qemu/guest/daemon.js';
import { FuseClient } from '../support/fuse-client.js';

const prefix = realpathSync(mkdtempSync(join(tmpdir(), 'install-')));
after(() => rmSync(prefix, { recursive: true, force: true }));

it('make install PREFIX=…: the installed program serves a share', { timeout: 120_000 }, async () => {
  execFileSync('make', ['-s', '-C', repository, 'install', `PREFIX=${prefix}`], { stdio: 'pipe' });
  const program = join(prefix, 'bin/virtiofsd-ts');
  assert.match(execFileSync(program, ['--version'], { encoding: 'utf8', cwd: '/' }), /^virtiofsd-ts \d+\.\d+\.\d+\n$/);
  // Where libvirt looks for the program of a <filesystem> without <binary>.
  const found = JSON.parse(readFileSync(join(prefix, 'share/qemu/vhost-user/50-virtiofsd-ts.json'), 'utf8'));
  assert.deepEqual([found.type, found.binary], ['fs', program]);
  for (const page of [
    'man/man1/virtiofsd-ts.1',
    'bash-completion/completions/virtiofsd-ts',
    'zsh/site-functions/_virtiofsd-ts',
    'fish/vendor_completions.d/virtiofsd-ts.fish',
  ])
    assert.ok(statSync(join(prefix, 'share', page)).size > 1000, page);
  // For guests.
  const agent = join(prefix, 'lib/virtiofsd-ts/agent');
  assert.match(execFileSync(join(agent, 'virtiofsd-ts-agent'), ['-h'], { encoding: 'utf8' }), /^usage: virtiofsd-ts-agent /);
  for (const name of ['virtiofsd-ts-agent@.service', 'virtiofsd-ts-agent.openrc'])
    assert.match(readFileSync(join(agent, name), 'utf8'), /\/usr\/local\/sbin\/virtiofsd-ts-agent/);
  const share = mkdtempSync(join(prefix, 'share-'));
  writeFileSync(join(share, 'file'), 'installed');
  const daemon = await startDaemon({ shareDir: share, daemon: program });
  const fuse = FuseClient.connect(daemon.socketPath);
  try {
    fuse.init();
    const { nodeid } = fuse.lookup(1, 'file');
    const { fh } = fuse.open(nodeid);
    assert.equal(fuse.read(nodeid, fh, 0, 100).toString(), 'installed');
  } finally {
    fuse.close();
    await daemon.stop();
  }
  const { stdout } = spawnSync('grep', ['-rl', '--', repository.replace(/\/$/, ''), prefix], { encoding: 'utf8' });
  assert.equal(stdout, '', 'no path of the clone in what was installed');
});
