/** The replay agent in a guest with a stock kernel. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { repository } from '../../qemu/guest/daemon.js';
import type { Command } from '../../qemu/guest.js';
import type { Setup, SetupOptions } from './guests.js';

/** The program that `make agent` builds, and where guests get it. */
export const AGENT = join(repository, 'build/virtiofsd-ts-agent');
const IN_GUEST = '/bin/virtiofsd-ts-agent';
const TOKEN = '/etc/virtiofsd-ts-agent.token';

/** Makes a token in `folder` and returns what a set-up with an agent needs. */
export function withAgent(folder: string): Pick<SetupOptions, 'files' | 'daemonOptions'> {
  const token = join(folder, 'token');
  writeFileSync(token, 'the token of the tests\n', { mode: 0o600 });
  return { daemonOptions: [`--agent=${token}`], files: { [IN_GUEST]: AGENT, [TOKEN]: token } };
}

/** Starts the agent in a guest that was set up {@link withAgent} and waits until it is connected; it ends before the guest does. */
export async function startAgent(setup: Setup): Promise<Command> {
  const agent = setup.guest.spawn('exec virtiofsd-ts-agent /mnt 2>&1');
  await agent.waitForLine('connected');
  const { end } = setup;
  setup.end = async () => {
    agent.kill('SIGTERM');
    await agent.ended.catch(() => undefined);
    await end();
  };
  return agent;
}
