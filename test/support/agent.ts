/** The replay agent in a guest with a stock kernel. */
import { writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { repository } from '../../qemu/guest/daemon.js';
import type { Command } from '../../qemu/guest.js';
import type { Setup, SetupOptions } from './guests.js';

/** The program that `make agent` builds, and where guests get it. */
const AGENT = join(repository, 'build/virtiofsd-ts-agent');
const IN_GUEST = '/bin/virtiofsd-ts-agent';
const TOKEN = '/etc/virtiofsd-ts-agent.token';

const TEXT = 'the token of the tests';

/** Makes a token in `folder` and returns what a set-up with an agent needs. */
export function withAgent(folder: string): Required<Pick<SetupOptions, 'files' | 'daemonOptions'>> {
  const token = join(folder, 'token');
  writeFileSync(token, `${TEXT}\n`, { mode: 0o600 });
  return { daemonOptions: [`--agent=${token}`], files: { [IN_GUEST]: AGENT, [TOKEN]: token } };
}

/**
 * The command that starts the agent in User Mode Linux with the host's files, without the mount: the folder that it was built in need not
 * be among those files.
 */
export function agentOfHost(token: string): string {
  const built = `mkdir -p /run/built && mount -t hostfs -o ro,${dirname(AGENT)} none /run/built`;
  return `umask 077; echo '${token}' >/run/token; ${built} && exec /run/built/${basename(AGENT)} -t /run/token`;
}

/**
 * Starts the agent in a guest that was set up {@link withAgent} and waits until it is connected; it ends before the guest does.
 * @param hostRoot the guest has the host's files: see {@link agentOfHost}
 */
export async function startAgent(setup: Setup, hostRoot = false): Promise<Command> {
  const command = hostRoot ? agentOfHost(TEXT) : 'exec virtiofsd-ts-agent';
  const agent = setup.guest.spawn(`${command} /mnt 2>&1`);
  const { end } = setup;
  setup.end = async () => {
    agent.kill('SIGTERM');
    await agent.ended.catch(() => undefined);
    await end();
  };
  await agent.waitForLine('connected').catch(async (error) => {
    await setup.end();
    throw error;
  });
  return agent;
}
