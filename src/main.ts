/** `virtiofsd-ts`: reads the command line and runs the daemon; whatever a user can put right is said in one line. */
import { commandLine } from './cli.js';
import { log } from './log.js';
import { StartError } from './starterror.js';

const config = await commandLine(process.argv.slice(2));
try {
  const { Daemon } = await import('./daemon.js');
  process.exitCode = new Daemon(config).run();
} catch (error) {
  if (!(error instanceof StartError)) throw error;
  log.error(error.message);
  process.exitCode = 1;
}
// Threads that still have something open must not keep the process.
process.exit();
