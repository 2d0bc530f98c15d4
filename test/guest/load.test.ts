/** Programs that people run on shares, and programs made to break file systems, in a real guest. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import { repository } from '../../qemu/guest/daemon.js';
import { type Setup, setUp } from '../support/guests.js';

const folder = mkdtempSync(join(tmpdir(), 'load-'));
after(() => rmSync(folder, { recursive: true, force: true }));

async function ok(setup: Setup, command: string, timeoutMs = 300_000): Promise<string> {
  const { status, stdout, stderr } = await setup.guest.run(command, { timeoutMs });
  assert.equal(status, 0, `${command}\n${stdout}\n${stderr}`);
  return stdout;
}

const FIO = [
  // Each job verifies every block it wrote, from the guest's cache and again after a remount.
  'fio --name=rand --directory=/mnt --size=24m --rw=randwrite --bs=4k --ioengine=psync --verify=crc32c --do_verify=1 --end_fsync=1',
  'fio --name=seq --directory=/mnt --size=48m --rw=write --bs=1m --ioengine=psync --verify=crc32c --do_verify=1 --end_fsync=1',
  'fio --name=mixed --directory=/mnt --size=16m --rw=randrw --bsrange=512-128k --bs_unaligned --ioengine=psync --verify=crc32c --do_verify=1',
  'fio --name=aio --directory=/mnt --size=16m --rw=randwrite --bs=16k --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --do_verify=1',
  'fio --name=mmap --directory=/mnt --size=8m --rw=randwrite --bs=4k --ioengine=mmap --verify=crc32c --do_verify=1',
];

const STRESSORS =
  'hdd,dir,dirdeep,dentry,rename,link,symlink,filename,flock,lockofd,utime,xattr,fallocate,fiemap,seek,copy-file,sync-file,dirmany,chmod,chown,touch,open,getdent,iomix,aio,fstat,fpunch,mknod,lockf,readahead,sendfile';

describe('load in a guest', () => {
  for (const [name, daemonOptions] of [
    ['cache auto', ['--xattr']],
    ['cache always, writeback, direct I/O', ['--xattr', '--cache=always', '--writeback', '--allow-direct-io']],
    ['cache never', ['--xattr', '--cache=never', '--allow-mmap']],
  ] as const) {
    it(`fio with verify: ${name}`, { timeout: 900_000 }, async () => {
      const setup = await setUp({ kind: 'uml', kernel: '6.12', hostRoot: true, memoryMiB: 384, daemonOptions: [...daemonOptions] });
      try {
        for (const command of FIO) {
          await ok(setup, command);
          await setup.guest.unmount('/mnt');
          await setup.guest.mount('myfs', '/mnt');
          // What the host holds is what was verified in the guest: read it all again with an empty cache.
          await ok(setup, `${command} --verify_only`);
        }
      } finally {
        await setup.end();
      }
    });
  }

  it('stress-ng file stressors', { timeout: 900_000 }, async () => {
    const setup = await setUp({ kind: 'uml', kernel: '6.12', hostRoot: true, memoryMiB: 384, daemonOptions: ['--xattr'] });
    try {
      for (const stressor of STRESSORS.split(',')) {
        await ok(
          setup,
          `stress-ng --${stressor} 2 --timeout 3 --verify --temp-path /mnt --hdd-bytes 16m --iomix-bytes 16m --fallocate-bytes 16m`,
        );
      }
    } finally {
      await setup.end();
    }
  });

  it('git clone, npm ci and a C build in the share', { timeout: 900_000 }, async () => {
    // A repository, a package with a dependency in npm's cache, and a program of several files, made on the host.
    const origin = join(folder, 'origin');
    mkdirSync(origin);
    const git = (...args: string[]) =>
      execFileSync('git', ['-C', origin, '-c', 'user.name=t', '-c', 'user.email=t@localhost', ...args], { stdio: 'pipe' });
    git('init', '-q');
    for (let i = 0; i < 200; i++) {
      mkdirSync(join(origin, `d${i % 20}`), { recursive: true });
      writeFileSync(join(origin, `d${i % 20}`, `f${i}.c`), `int f${i}(void) { return ${i}; }\n`.repeat(1) + '/* text */\n'.repeat(i));
    }
    writeFileSync(join(origin, 'Makefile'), 'SRC := $(wildcard d*/*.c)\nall.a: $(SRC:.c=.o)\n\t$(AR) rcs $@ $^\n');
    git('add', '.');
    git('commit', '-qm', 'one');
    const app = join(folder, 'app');
    const cache = join(folder, 'npm-cache');
    mkdirSync(app);
    const { name, version } = JSON.parse(readFileSync(join(repository, 'node_modules/yargs/package.json'), 'utf8')) as {
      name: string;
      version: string;
    };
    writeFileSync(join(app, 'package.json'), JSON.stringify({ name: 'app', version: '1.0.0', dependencies: { [name]: version } }));
    // Once to make the lock file, once more as the guest will do it: so that all it asks for is in the cache.
    for (const command of ['install', 'ci']) {
      execFileSync('npm', [command, '--cache', cache, '--no-audit', '--no-fund'], { cwd: app, stdio: 'pipe' });
    }
    rmSync(join(app, 'node_modules'), { recursive: true });

    const setup = await setUp({ kind: 'uml', kernel: '6.12', hostRoot: true, memoryMiB: 768, daemonOptions: ['--xattr'] });
    try {
      cpSync(origin, join(setup.share, 'origin'), { recursive: true });
      cpSync(app, join(setup.share, 'app'), { recursive: true });
      cpSync(cache, join(setup.share, 'npm-cache'), { recursive: true });
      const guestGit = 'git -c safe.directory="*"';
      await ok(
        setup,
        `cd /mnt && ${guestGit} clone -q origin clone && cd clone && ${guestGit} fsck --full && test -z "$(${guestGit} status --porcelain)"`,
      );
      await ok(
        setup,
        'cd /mnt/app && npm ci --offline --cache /mnt/npm-cache --no-audit --no-fund && node -e "import(\'yargs\').then(() => 0)"',
      );
      await ok(setup, 'make -s -j2 -C /mnt/clone', 600_000);
      assert.equal(
        execFileSync('ar', ['t', join(setup.share, 'clone/all.a')], { encoding: 'utf8' })
          .trim()
          .split('\n').length,
        200,
      );
      execFileSync('git', ['-c', 'safe.directory=*', '-C', join(setup.share, 'clone'), 'fsck', '--full'], { stdio: 'pipe' });
    } finally {
      await setup.end();
    }
  });
});
