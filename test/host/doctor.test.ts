/** `virtiofsd-ts doctor` on this host, and on hosts made bad in a mount namespace of their own. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { chmodSync, mkdtempSync, realpathSync, rmSync } from 'node:fs';
import { release, tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { assertNoStack, needsRoot, PROGRAM_PATH, runDaemon } from '../support/daemon.js';

const folder = realpathSync(mkdtempSync(join(tmpdir(), 'doctor-')));
after(() => rmSync(folder, { recursive: true, force: true }));
chmodSync(folder, 0o755);

interface Finding {
  subject: string;
  verdict: string;
  found: string;
  advice?: string;
}

/** Runs it on a host that the shell commands `change` first. @param become a command that ends in running its arguments */
function doctor(change: string, args: readonly string[] = [], become: readonly string[] = [], env: NodeJS.ProcessEnv = {}) {
  const script = `set -e; ${change}\nexec "$@"`;
  const { status, stdout, stderr } = spawnSync(
    'unshare',
    ['-m', 'sh', '-c', script, 'sh', ...become, PROGRAM_PATH, 'doctor', '--json', ...args],
    { encoding: 'utf8', cwd: '/', env: { ...process.env, ...env } },
  );
  assertNoStack(stderr);
  assert.equal(stderr, '');
  const findings = JSON.parse(stdout) as Finding[];
  return {
    status,
    findings,
    of(subject: string): Finding {
      const found = findings.find((each) => each.subject === subject);
      assert.ok(found, `${subject} in ${stdout}`);
      return found;
    },
  };
}

/** Makes a file of /proc say something else. */
const says = (path: string, text: string) =>
  `echo '${text}' > ${folder}/said-${path.replaceAll('/', '-')}; mount --bind ${folder}/said-${path.replaceAll('/', '-')} ${path}`;

test('this host can serve; text and JSON tell the same', () => {
  const text = runDaemon(['doctor']);
  assert.equal(text.status, 0, text.stdout);
  assert.match(text.stdout, new RegExp(`^ok {7}kernel {11}Linux ${release().replaceAll('.', '\\.')}\n`));
  assert.match(text.stdout, /^ok {7}daemon {11}starts in its sandbox/m);
  const json = runDaemon(['doctor', '--json', `--shared-dir=${folder}`]);
  const findings = JSON.parse(json.stdout) as Finding[];
  for (const { subject, verdict, found } of findings.filter(({ subject }) => subject !== 'share' && subject !== 'daemon'))
    assert.ok(text.stdout.includes(`${verdict.padEnd(8)} ${subject.padEnd(16)} ${found}\n`), subject);
  assert.match(findings.find(({ subject }) => subject === 'share')?.found ?? '', new RegExp(`^${folder} is on \\w+`));
});

test('without /proc, and as root of no mount', needsRoot, () => {
  const parts = `${folder}/parts`;
  const enter = (but: string) =>
    `mkdir -p ${parts}; for d in /*; do [ -d "$d" ] && [ $d != ${but} ] || continue; mkdir -p ${parts}$d; mount --rbind $d ${parts}$d; done`;
  const without = doctor(enter('/proc'), [], ['chroot', parts]);
  assert.equal(without.status, 1);
  assert.deepEqual(without.findings, [
    { subject: 'proc', verdict: 'failed', found: '/proc is not mounted', advice: 'mount -t proc proc /proc' },
  ]);
  const daemon = doctor(enter('/none'), [], ['chroot', parts]).of('daemon');
  assert.equal(daemon.verdict, 'failed');
  assert.match(
    daemon.found,
    /\/ is no mount point, as in a plain chroot: chroot to one \(mount --bind DIR DIR\), or take another --sandbox/,
  );
});

test('wrong use', () => {
  assert.match(
    runDaemon(['doctor', '--shared-dir=/nonexistent']).stderr,
    /doctor: --shared-dir: \/nonexistent is no directory: name one\n$/,
  );
  assert.match(runDaemon(['doctor', 'x']).stderr, /^virtiofsd-ts: doctor: .*x.*: virtiofsd-ts doctor \[--shared-dir=DIR\] \[--json\]\n$/);
});

describe('a bad host', needsRoot, () => {
  test('an old kernel', () => {
    const { status, of } = doctor('', [], ['setarch', '--uname-2.6']);
    assert.equal(status, 1);
    assert.deepEqual([of('kernel').verdict, of('kernel').advice], ['failed', 'Linux 5.10 or newer is needed']);
  });

  test('no namespaces: the daemon does not start, and its own words say why', () => {
    const { status, of } = doctor('', [], ['setpriv', '--bounding-set', '-sys_admin', '--inh-caps', '-sys_admin']);
    assert.equal(status, 1);
    assert.equal(of('daemon').verdict, 'failed');
    assert.match(of('daemon').found, /^does not start: .*--sandbox=namespace: no namespaces without CAP_SYS_ADMIN/);
  });

  test('user namespaces forbidden, low limits, no QEMU, no KVM', () => {
    const { status, of } = doctor(
      [
        says('/proc/sys/user/max_user_namespaces', '0'),
        says('/proc/sys/fs/inotify/max_user_watches', '8192'),
        says('/proc/sys/fs/nr_open', '1024'),
        says('/proc/sys/kernel/seccomp/actions_avail', ''),
        'mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9',
      ].join('; '),
      [],
      ['env', `PATH=${folder}`],
    );
    assert.equal(status, 0, 'root needs no user namespaces');
    assert.match(of('user namespaces').found, /^not for ordinary users \(user.max_user_namespaces is 0\)$/);
    assert.match(of('inotify').advice ?? '', /max_user_watches=131072/);
    assert.deepEqual([of('open files').verdict, of('open files').found], ['limited', 'at most 1024']);
    assert.equal(of('seccomp').advice, 'give --seccomp=none');
    assert.equal(of('QEMU').found, 'qemu-system-x86_64 is not here');
    assert.equal(of('KVM').found, 'there is no /dev/kvm: guests are slow');
    assert.equal(of('libvirt').found, 'is not here; nothing else needs it');
  });

  test('an ordinary user', () => {
    const { of } = doctor('', [], ['setpriv', '--reuid=1234', '--regid=1234', '--clear-groups']);
    assert.match(of('file handles').advice ?? '', /^that takes root/);
  });

  test('a share on overlayfs', () => {
    const { status, of } = doctor(
      `mount -t tmpfs none ${folder}; cd ${folder}; mkdir lower upper work share; mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work none share; cd /`,
      [`--shared-dir=${folder}/share`],
    );
    assert.equal(status, 0);
    assert.match(of('share').found, /is on overlay, which has no file handles that can be opened$/);
    assert.equal(of('file handles').verdict, 'limited');
  });

  test('libvirt that starts another daemon, and whose AppArmor profile does not permit ours', () => {
    const fakes = (binary: string) =>
      [
        `mount -t tmpfs none ${folder}`,
        `mkdir ${folder}/bin ${folder}/usr-share`,
        `printf '#!/bin/sh\\necho "libvirtd (libvirt) 9.0.0"\\n' > ${folder}/bin/libvirtd; chmod 755 ${folder}/bin/libvirtd`,
        'mkdir -p /usr/share/qemu/vhost-user; mount -t tmpfs none /usr/share/qemu/vhost-user',
        `echo '{"type":"fs","binary":"${binary}"}' > /usr/share/qemu/vhost-user/10-first.json`,
        `echo '{"type":"gpu","binary":"/usr/bin/other"}' > /usr/share/qemu/vhost-user/05-gpu.json`,
        'mount -t tmpfs none /sys/module; mkdir -p /sys/module/apparmor/parameters; echo Y > /sys/module/apparmor/parameters/enabled',
        'mount -t tmpfs none /sys/kernel/security; mkdir /sys/kernel/security/apparmor; echo "libvirtd (enforce)" > /sys/kernel/security/apparmor/profiles',
      ].join('; ');
    const env = { PATH: `${folder}/bin:${process.env['PATH']}` };
    const other = doctor(fakes('/usr/libexec/virtiofsd'), [], [], env);
    assert.match(other.of('libvirt').found, /^9\.0\.0 starts \/usr\/libexec\/virtiofsd for file systems \(.*10-first\.json\)$/);
    assert.equal(other.of('AppArmor').verdict, 'ok');
    const local = doctor(fakes('/usr/local/bin/virtiofsd-ts'), [], [], env);
    assert.equal(local.of('libvirt').verdict, 'ok');
    assert.equal(local.of('AppArmor').found, 'does not let libvirtd start /usr/local/bin/virtiofsd-ts');
    assert.equal(doctor(fakes('/usr/bin/virtiofsd-ts'), [], [], env).of('AppArmor').verdict, 'ok');
  });
});
