// At the installation: the launcher of the sandbox as it was built (static, for x86-64), or built here for another processor.
import { spawnSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const path = (name) => fileURLToPath(new URL(name, import.meta.url));
const launcher = path('../virtiofsd-ts-sandbox');
// Without arguments it says who it is. What is for another processor is taken for a shell script here, which ends somehow, too.
const runs = () => /^virtiofsd-ts: /.test(spawnSync(launcher, { encoding: 'utf8' }).stderr ?? '');

if (!runs()) {
  const args = ['-std=gnu17', '-O2', '-static', '-o', launcher, path('sandbox.c'), path('filter.c'), '-lseccomp'];
  const { status } = spawnSync('gcc', args, { stdio: 'inherit' });
  if (status !== 0 || !runs()) {
    // npm keeps what a script says to itself unless it fails. The daemon works without the launcher, too: it says this when it is started.
    rmSync(launcher, { force: true });
    console.error(
      'virtiofsd-ts: the launcher of the sandbox cannot be built: install gcc and libseccomp (Debian: apt-get install gcc libc6-dev libseccomp-dev) and run npm rebuild virtiofsd-ts',
    );
  }
}
