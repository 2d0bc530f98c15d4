/** Security contexts that the guest sends with a new object (FUSE_SECURITY_CTX): `struct fuse_secctx { u32 size, padding }`, name, value. */
import { arena, native } from 'vhost-user-ts/native';
import { EINVAL } from '../linux.js';
import type { Share } from './share.js';
import { mapName } from './xattr.js';

const HEADER = 8;

/** Sets the caller's contexts on the object behind `fd`. Returns 0 or the first error. */
export function setContexts(share: Share, fd: number): number {
  const { securityContexts, securityContextCount, securityContextBytes } = share.caller;
  let at = securityContexts;
  const end = securityContexts + securityContextBytes;
  for (let i = 0; i < securityContextCount; i++) {
    if (at + HEADER > end) return -EINVAL;
    const size = arena.u32[at >> 2] as number;
    const name = at + HEADER;
    let value = name;
    while (value < end && arena.u8[value] !== 0) value++;
    value++; // after the NUL
    if (value === name + 1 || value + size > end) return -EINVAL;
    const hostName = mapName(share, name);
    if (hostName < 0) return hostName;
    const error = native.setxattr(share.procfd, fd, hostName, value, size, 0);
    if (error < 0) return error;
    at = (value + size + 7) & ~7;
  }
  return 0;
}
