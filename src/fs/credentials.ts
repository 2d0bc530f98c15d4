/**
 * Whose ids a new file gets: create-type operations run under the caller's user and group id, all others under the daemon's.
 *
 * The ids are effective ids of this thread, changed by raw system calls. With SECBIT_NO_SETUID_FIXUP the thread keeps its
 * capabilities, so nothing else an operation may do depends on the effective ids, and changing back can wait until somebody
 * needs other ids. The exceptions:
 *  - file systems that ask who we are themselves (NFS, FUSE, 9p, CIFS, anything unknown): there the ids are changed back
 *    at once ({@link leave});
 *  - blocks reserved for root (ext4), and quota limits: an operation that fails with -ENOSPC or -EDQUOT is tried again
 *    after {@link restore};
 *  - threads started meanwhile inherit the ids: offload jobs are preceded by {@link restore};
 *  - S_ISGID of a new file: kept for a caller outside the group because CAP_FSETID says so. Where a mode has it, CAP_FSETID
 *    is dropped and the caller's supplementary group set, as the kernel judges by both (`mode_strip_sgid()`).
 *
 * Without the privilege to change ids only callers with the daemon's own ids, or root, may create (-EPERM), as in virtiofsd.
 */
import { arena, arenaAlloc, native } from 'vhost-user-ts/native';
import { NO_ID } from './idmap.js';
import { CAP_DAC_OVERRIDE, CAP_FSETID, CAP_SETGID, CAP_SETUID, EINVAL, EPERM } from './linux.js';

/** The ids of the calling thread. */
export class Credentials {
  readonly #baseUid: number;
  readonly #baseGid: number;
  #uid: number;
  #gid: number;
  #umask = -1;
  /** Ids can be changed at all. */
  readonly #privileged: boolean;
  /** Capabilities stay when the user id changes. */
  readonly #keeps: boolean;
  #fsetidDropped = false;
  #groupSet = false;
  readonly #groups = arenaAlloc(4);

  constructor() {
    this.#baseUid = process.geteuid?.() ?? 0;
    this.#baseGid = process.getegid?.() ?? 0;
    this.#uid = this.#baseUid;
    this.#gid = this.#baseGid;
    this.#privileged = native.hasCapability(CAP_SETUID) === 1 && native.hasCapability(CAP_SETGID) === 1;
    // CAP_SETPCAP is needed for this bit; a launcher may have set it before it dropped that.
    this.#keeps = this.#privileged && native.keepCapabilities() === 0;
  }

  /** Whether the thread runs under other ids than the daemon's. */
  get switched(): boolean {
    return this.#uid !== this.#baseUid || this.#gid !== this.#baseGid;
  }

  /**
   * Before a create-type operation: takes the ids of the caller (host ids; 0 is the daemon's own, as in virtiofsd).
   * @param group supplementary group, or -1
   * @param exact the mode has S_ISGID, or the file system judges by itself: the supplementary group and CAP_FSETID count
   * @returns 0, or -EPERM, or -EINVAL for ids that do not exist
   */
  enter(uid: number, gid: number, group: number, exact: boolean, setGid: boolean): number {
    if (uid === NO_ID || gid === NO_ID) return -EINVAL;
    const wantUid = uid === 0 ? this.#baseUid : uid;
    const wantGid = gid === 0 ? this.#baseGid : gid;
    if (wantUid === this.#uid && wantGid === this.#gid && !exact && !setGid) return 0;
    if (!this.#privileged) return wantUid === this.#uid && wantGid === this.#gid ? 0 : -EPERM;
    if ((exact || setGid || !this.#keeps) && (group >= 0 || setGid)) {
      arena.u32[this.#groups >> 2] = group;
      const error = native.setGroups(this.#groups, group >= 0 ? 1 : 0);
      if (error < 0) return error;
      this.#groupSet = group >= 0;
    }
    const error = this.#change(wantUid, wantGid);
    if (error < 0) {
      this.#dropGroup();
      this.restore(); // the group id may have been changed before the user id was refused
      return error;
    }
    if (wantUid !== this.#baseUid) {
      // The kernel has cleared the effective set; the guest's kernel has judged by the caller's groups already, ours cannot.
      if (!this.#keeps && group < 0) native.setCapability(CAP_DAC_OVERRIDE, 1);
      if (setGid && this.#keeps) this.#fsetidDropped = native.setCapability(CAP_FSETID, 0) === 1;
    }
    return 0;
  }

  /** The id that a new file of this user (host id) gets. */
  effective(uid: number): number {
    return uid === 0 ? this.#baseUid : uid;
  }

  /** After it. `local`: the ids may stay until other ones are needed. */
  leave(local: boolean): void {
    if (this.#fsetidDropped) {
      native.setCapability(CAP_FSETID, 1);
      this.#fsetidDropped = false;
    }
    this.#dropGroup();
    if ((!local || !this.#keeps) && this.switched) this.restore();
  }

  /** Takes the daemon's own ids again. */
  restore(): void {
    if (this.switched) this.#change(this.#baseUid, this.#baseGid);
  }

  /** The umask of the calling thread is this one from now on (0 where the guest has applied its own). */
  setUmask(mask: number): void {
    if (mask === this.#umask) return;
    native.umask(mask);
    this.#umask = mask;
  }

  #change(uid: number, gid: number): number {
    // Group first: without SECBIT_NO_SETUID_FIXUP the capability for it goes with the user id; and last on the way back.
    if (gid !== this.#gid && (this.#keeps || this.#uid === this.#baseUid)) {
      const error = native.setEffectiveGid(gid);
      if (error < 0) return error;
      this.#gid = gid;
    }
    if (uid !== this.#uid) {
      const error = native.setEffectiveUid(uid);
      if (error < 0) return error;
      this.#uid = uid;
    }
    if (gid !== this.#gid) {
      const error = native.setEffectiveGid(gid);
      if (error < 0) return error;
      this.#gid = gid;
    }
    return 0;
  }

  #dropGroup(): void {
    if (!this.#groupSet) return;
    native.setGroups(this.#groups, 0);
    this.#groupSet = false;
  }
}
