// At the installation: the add-on as it was built, or built here where that one does not run (another libc or processor).
import { spawnSync } from 'node:child_process';
import { copyFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

const path = (name) => fileURLToPath(new URL(name, import.meta.url));
const runs = () => {
  try {
    createRequire(import.meta.url)('../dist/addon.node');
    return true;
  } catch {
    return false;
  }
};

if (!runs()) {
  // npm puts its own node-gyp on the path of such scripts.
  const { status } = spawnSync('node-gyp', ['--directory', path('.'), '--jobs', 'max', 'rebuild'], { stdio: 'inherit' });
  if (status !== 0) {
    console.error('vhost-user-ts: the add-on cannot be built: node-gyp needs g++, make and python3 (Debian: apt-get install g++ make python3)');
    process.exit(1);
  }
  copyFileSync(path('build/Release/addon.node'), path('../dist/addon.node'));
  if (!runs()) process.exit(1);
}
