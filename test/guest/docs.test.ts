/** Every command of the documentation, run as it stands there. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { describe, it } from 'node:test';
import { repository } from '../../qemu/guest/daemon.js';
import { cacheFolder, prepareBoot } from '../../qemu/guest.js';
import { Reader, stepsOf } from '../support/docs.js';

const PAGES = ['README.md', 'docs/qemu.md', 'docs/events.md', 'docs/libvirt.md', 'docs/sharing.md', 'docs/tools.md', 'docs/measuring.md'];

/** Those whose guest has no modules of ours. */
const STOCK = ['docs/events.md'];

/** Commands that another test types: which. */
const ELSEWHERE: readonly (readonly [RegExp, string])[] = [
  [/^virsh (create qemu\/libvirt\/plain\.xml|destroy plain)$/, 'make test-libvirt'],
  [/^qemu\/guest\/kernel\/install\.sh$/, 'the test of the DKMS package'],
  [/^make test$/, 'whoever runs this'],
];

/** A stand-in for the reader's QEMU and image: our kernel instead of guest.qcow2, a channel to type commands, TCG where there is no KVM. */
function fakeQemu(folder: string, nonce: string, kernelName: string): void {
  const { kernel, initrd } = prepareBoot({ kind: 'qemu', kernel: kernelName }, folder);
  const script = `#!/bin/bash
case " $* " in *" file=guest.qcow2,"*) ;; *) exec /usr/bin/qemu-system-x86_64 "$@" ;; esac
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

/** XML without white space at the ends of lines: what is shown is indented as in its file. */
const lines = (text: string): string => text.replaceAll(/^\s+|\s+$/gm, '');

describe('documentation', () => {
  it('docs/libvirt.md: the XML is that of a domain that make test-libvirt starts', () => {
    const blocks = [...readFileSync(join(repository, 'docs/libvirt.md'), 'utf8').matchAll(/```xml\n(.*?)```/gs)];
    assert.equal(blocks.length, 2);
    for (const [, block] of blocks)
      assert.ok(lines(readFileSync(join(repository, 'qemu/libvirt/plain.xml'), 'utf8')).includes(lines(block as string)));
  });

  for (const page of PAGES) {
    it(page, { timeout: 900_000 }, async () => {
      const folder = mkdtempSync(join(tmpdir(), 'docs-'));
      const nonce = randomBytes(8).toString('hex');
      mkdirSync(join(folder, 'home/src'), { recursive: true });
      const all = stepsOf(join(repository, page));
      assert.ok(all.length > 0, 'no commands');
      const steps = all.filter(({ command }) => !ELSEWHERE.some(([pattern]) => pattern.test(command)));
      if (steps.some(({ command }) => command.startsWith('qemu-system')))
        fakeQemu(folder, nonce, STOCK.includes(page) ? 'debian-plain' : 'debian');
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
