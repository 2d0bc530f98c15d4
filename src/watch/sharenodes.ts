/** The watcher's view of a shared directory's inode store. */
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { Inode, SHIFT } from '../fs/inodes.js';
import { AT_NO_AUTOMOUNT, AT_SYMLINK_NOFOLLOW, EPERM, ESTALE, O_NOFOLLOW, O_PATH, S_IFDIR, STATX_MNT_ID, Statx } from '../fs/linux.js';
import type { Share } from '../fs/passthrough/share.js';
import type { WatchNodes } from './nodes.js';

const STATX_INO = 0x100;

export class ShareNodes implements WatchNodes {
  readonly #share: Share;
  readonly #statx = arenaAlloc(Statx.bytes);

  constructor(share: Share) {
    this.#share = share;
  }

  /** A nodeid is never given out twice, so the generation that goes with it is always 0 ({@link Entry}). */
  check(nodeid: number, generation: number): number {
    const slot = this.#share.inodes.find(nodeid);
    if (slot < 0) return slot;
    return generation === 0 ? 0 : -ESTALE;
  }

  generation(_nodeid: number): number {
    return 0;
  }

  isDirectory(nodeid: number): boolean {
    const slot = this.#share.inodes.find(nodeid);
    return slot > 0 && this.#share.type(slot) === S_IFDIR;
  }

  fd(nodeid: number): number {
    const slot = this.#share.inodes.find(nodeid);
    return slot < 0 ? slot : this.#share.fd(slot);
  }

  byHandle(handle: number, near: number): number {
    const share = this.#share;
    const beside = share.inodes.find(near);
    if (beside < 0 || !share.useHandles) return 0;
    const mount = share.mountOf(beside);
    for (let slot = share.inodes.byHandle(handle); slot !== 0; slot = share.inodes.nextByHandle(slot)) {
      if (share.mountOf(slot) === mount) return share.inodes.nodeid(slot);
    }
    return 0;
  }

  hasHandles(near: number): boolean {
    const slot = this.#share.inodes.find(near);
    return slot > 0 && this.#share.handlesOn(this.#share.mountOf(slot));
  }

  byName(parent: number, name: number): number {
    const share = this.#share;
    const directory = share.inodes.find(parent);
    if (directory < 0) return 0;
    const fd = share.fd(directory);
    if (fd < 0 || native.statx(fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_INO | STATX_MNT_ID, this.#statx) < 0) return 0;
    const word = this.#statx >> 2;
    const u32 = arena.u32;
    const mount = share.mounts.find(
      u32[word + (Statx.mountId >> 2)] as number,
      u32[word + (Statx.devMajor >> 2)] as number,
      u32[word + (Statx.devMinor >> 2)] as number,
    );
    if (mount < 0) return 0;
    const slot = share.inodes.byIno(u32[word + (Statx.ino >> 2)] as number, u32[word + (Statx.ino >> 2) + 1] as number, mount);
    return slot === 0 ? 0 : share.inodes.nodeid(slot);
  }

  open(handle: number, near: number): number {
    const share = this.#share;
    const beside = share.inodes.find(near);
    if (beside < 0) return beside;
    const mountFd = share.useHandles ? share.mounts.fd(share.mountOf(beside)) : -1;
    return mountFd < 0 ? -EPERM : native.openByHandle(mountFd, handle, O_PATH | O_NOFOLLOW);
  }

  sameMount(a: number, b: number): boolean {
    const slotA = this.#share.inodes.find(a);
    const slotB = this.#share.inodes.find(b);
    return slotA > 0 && slotB > 0 && this.#share.mountOf(slotA) === this.#share.mountOf(slotB);
  }

  remember(nodeid: number, mask: number): void {
    const { inodes } = this.#share;
    const slot = inodes.find(nodeid);
    if (slot > 0) inodes.u32[(slot << SHIFT) + Inode.watchMask] = mask;
  }

  remembered(visit: (nodeid: number, mask: number) => void): void {
    const { inodes } = this.#share;
    for (let slot = 1; slot < inodes.top; slot++) {
      const mask = inodes.u32[(slot << SHIFT) + Inode.watchMask] as number;
      if (mask !== 0 && inodes.live(slot)) visit(inodes.nodeid(slot), mask);
    }
  }

  directories(visit: (nodeid: number) => void): void {
    const { inodes } = this.#share;
    for (let slot = 1; slot < inodes.top; slot++) {
      // What is only kept for export support the guest does not know.
      const known = inodes.live(slot) && (inodes.f64[((slot << SHIFT) + Inode.nlookup) >> 1] as number) > 0;
      if (known && this.#share.type(slot) === S_IFDIR) visit(inodes.nodeid(slot));
    }
  }
}
