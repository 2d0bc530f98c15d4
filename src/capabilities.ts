/** Linux capabilities by name, and the ones that the daemon keeps in its sandbox. */

/** capability.h: a capability's number is its place. */
const NAMES = [
  'chown',
  'dac_override',
  'dac_read_search',
  'fowner',
  'fsetid',
  'kill',
  'setgid',
  'setuid',
  'setpcap',
  'linux_immutable',
  'net_bind_service',
  'net_broadcast',
  'net_admin',
  'net_raw',
  'ipc_lock',
  'ipc_owner',
  'sys_module',
  'sys_rawio',
  'sys_chroot',
  'sys_ptrace',
  'sys_pacct',
  'sys_admin',
  'sys_boot',
  'sys_nice',
  'sys_resource',
  'sys_time',
  'sys_tty_config',
  'mknod',
  'lease',
  'audit_write',
  'audit_control',
  'setfcap',
  'mac_override',
  'mac_admin',
  'syslog',
  'wake_alarm',
  'block_suspend',
  'audit_read',
  'perfmon',
  'bpf',
  'checkpoint_restore',
] as const;

export type Capability = (typeof NAMES)[number];

/** What serving other users' files takes; virtiofsd's set. */
const KEPT: readonly Capability[] = ['chown', 'dac_override', 'fowner', 'fsetid', 'setgid', 'setuid', 'mknod', 'setfcap'];

/**
 * The capabilities to keep.
 * @param more beside the usual ones
 * @param changes --modcaps: `+NAME` or `-NAME`, separated by colons; the last word about a capability counts
 * @throws Error that says what is wrong with `changes`
 */
export function capabilitySet(more: readonly Capability[], changes = ''): Set<Capability> {
  const set = new Set([...KEPT, ...more]);
  for (const change of changes.split(':')) {
    if (change === '' && changes === '') continue;
    const name = change.slice(1).toLowerCase().replace(/^cap_/, '') as Capability;
    if (!/^[+-]/.test(change)) throw new Error(`'${change}' has neither + nor -: give for example +sys_admin:-chown`);
    if (!NAMES.includes(name)) throw new Error(`'${change.slice(1)}' is no capability: see capabilities(7)`);
    if (change.startsWith('+')) set.add(name);
    else set.delete(name);
  }
  return set;
}

/** As the mask that capset(2) takes, in hexadecimal. */
export function capabilityMask(set: ReadonlySet<Capability>): string {
  let mask = 0n;
  for (const name of set) mask |= 1n << BigInt(NAMES.indexOf(name));
  return mask.toString(16);
}
