/** Everything that can be fuzzed, by name. A new target: a file beside this one that implements `Target`, and a row here. */

import { AgentTarget } from './agent.js';
import { DaemonTarget } from './daemon.js';
import type { Target } from './engine.js';
import { FuseTarget } from './fuse.js';
import { MessageTarget } from './messages.js';
import { MigrationTarget } from './migration.js';
import { OptionTarget } from './options.js';
import { RingTarget } from './rings.js';

export interface Row {
  /** One line for people. */
  readonly about: string;
  /** Makes it ready; in a process of its own. */
  open(): Target | Promise<Target>;
  /** Its share of a campaign's time. */
  readonly weight: number;
}

export const TARGETS: Readonly<Record<string, Row>> = {
  fuse: { about: 'FUSE requests in sequences, to the real device and file system', open: () => new FuseTarget(), weight: 6 },
  rings: { about: 'descriptors and rings that no driver would make', open: () => new RingTarget(), weight: 2 },
  messages: { about: 'vhost-user messages that no VMM sends', open: () => new MessageTarget(), weight: 2 },
  agent: { about: "the replay agent's control file, and who pretends to be the agent", open: () => new AgentTarget(), weight: 2 },
  migration: { about: 'streams of live migration that no daemon writes', open: () => new MigrationTarget(), weight: 2 },
  options: { about: 'command lines and -o strings', open: () => new OptionTarget(), weight: 1 },
  daemon: { about: 'FUSE requests in sequences, to the real program in its sandbox', open: () => new DaemonTarget(), weight: 2 },
};
