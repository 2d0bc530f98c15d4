/** A share, its daemon and a guest, for the tests in test/guest: made in one call, taken down in one. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { bootGuest, type Daemon, type Guest, type GuestOptions, type Share, startDaemon } from '../../qemu/guest.js';

export interface Setup {
  /** The shared directory on the host. */
  share: string;
  daemon: Daemon;
  guest: Guest;
  /** Turns everything off and looks for complaints of the guest's kernel. */
  end(): Promise<void>;
}

export interface SetupOptions extends Partial<GuestOptions> {
  kind: 'qemu' | 'uml';
  /** An existing directory instead of a fresh one. */
  share?: string;
  daemonOptions?: string[];
  /** Further shares of the guest. */
  moreShares?: Share[];
}

/** What a guest's kernel log must not have. */
export const COMPLAINTS = /\bBUG\b|WARNING|Oops|possible recursive locking|circular locking|use-after-free|hung task|blocked for more than/;

export async function setUp({ share, daemonOptions = [], moreShares = [], ...options }: SetupOptions): Promise<Setup> {
  const directory = share ?? mkdtempSync(join(tmpdir(), 'share-'));
  const daemon = await startDaemon({
    shareDir: directory,
    options: daemonOptions,
    ...(options.kind === 'uml' ? { tag: 'myfs' } : {}),
  });
  let guest: Guest;
  try {
    guest = await bootGuest({ shares: [{ socket: daemon }, ...moreShares], ...options });
  } catch (error) {
    await daemon.stop();
    throw error;
  }
  return {
    share: directory,
    daemon,
    guest,
    async end() {
      try {
        assert.doesNotMatch(await guest.dmesg(), COMPLAINTS);
      } finally {
        await guest.poweroff();
        const end = await daemon.stop();
        if (share === undefined) rmSync(directory, { recursive: true, force: true });
        assert.equal(end.status, 0, `the daemon ended with ${JSON.stringify(end)}: ${daemon.log.join('\n')}`);
      }
    },
  };
}

/** Makes the guest stand still, or go on. */
export async function pause({ guest }: Setup, still: boolean): Promise<void> {
  if (guest.kind === 'qemu') await guest.qmp(still ? 'stop' : 'cont');
  else process.kill(guest.pid, still ? 'SIGSTOP' : 'SIGCONT');
}
