/** Every command of the documentation, run as it stands there. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { describe, it } from 'node:test';
import { repository } from '../../qemu/guest/daemon.js';
import { cacheFolder, prepareBoot } from '../../qemu/guest.js';
import { Reader, stepsOf } from '../support/docs.js';

const PAGES = ['docs/qemu.md', 'docs/tools.md', 'docs/measuring.md'];

/** A stand-in for the reader's QEMU and image: our kernel instead of guest.qcow2, a channel to type commands, TCG where there is no KVM. */
function fakeQemu(folder: string, nonce: string): void {
  const { kernel, initrd } = prepareBoot({ kind: 'qemu' }, folder);
  const script = `#!/bin/bash
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    -enable-kvm) ;;
    -drive) [ "$2" = file=guest.qcow2,if=virtio ] || exit 2; shift ;;
    -nographic) arguments+=(-display none -serial file:${folder}/console) ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
exec /usr/bin/qemu-system-x86_64 "\${arguments[@]}" -nodefaults -cpu max -kernel ${kernel.image} -initrd ${initrd} \\
  -append 'console=ttyS0 quiet panic=-1 rdinit=/init nonce=${nonce} channel=/dev/vport*p*' \\
  -device virtio-serial-pci -chardev socket,id=agent,path=${folder}/agent,server=on,wait=off -device virtserialport,chardev=agent
`;
  mkdirSync(join(folder, 'bin'));
  writeFileSync(join(folder, 'bin/qemu-system-x86_64'), script);
  chmodSync(join(folder, 'bin/qemu-system-x86_64'), 0o755);
}

describe('documentation', () => {
  for (const page of PAGES) {
    it(page, { timeout: 900_000 }, async () => {
      const folder = mkdtempSync(join(tmpdir(), 'docs-'));
      const nonce = randomBytes(8).toString('hex');
      mkdirSync(join(folder, 'home/src'), { recursive: true });
      const steps = stepsOf(join(repository, page));
      assert.ok(steps.length > 0, 'no commands');
      if (steps.some(({ command }) => command.startsWith('qemu-system'))) fakeQemu(folder, nonce);
      const environment = {
        ...process.env,
        HOME: join(folder, 'home'),
        XDG_CACHE_HOME: dirname(cacheFolder),
        PATH: `${folder}/bin:${repository}/build:${process.env['PATH']}`,
      };
      const reader = new Reader(environment, repository, join(folder, 'agent'), nonce);
      try {
        for (const step of steps) await reader.run(step, 240_000);
      } finally {
        await reader.end();
        rmSync(folder, { recursive: true, force: true });
      }
    });
  }
});
