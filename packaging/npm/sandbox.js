// At the installation: the launcher of the sandbox as it was built (static, for x86-64), or built here for another processor.
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';

const path = (name) => fileURLToPath(new URL(name, import.meta.url));
const launcher = path('../virtiofsd-ts-sandbox');
// Without arguments it says how it is used and ends with 1.
const runs = () => spawnSync(launcher).status !== null;

if (!runs()) {
  const args = ['-std=gnu17', '-O2', '-static', '-o', launcher, path('sandbox.c'), path('filter.c'), '-lseccomp'];
  const { status } = spawnSync('gcc', args, { stdio: 'inherit' });
  if (status !== 0 || !runs())
    console.error(
      'virtiofsd-ts: the launcher of the sandbox cannot be built: install gcc and libseccomp (Debian: apt-get install gcc libc6-dev libseccomp-dev) and run npm rebuild, or start the daemon with --sandbox=none --seccomp=none',
    );
}
