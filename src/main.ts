/** `virtiofsd-ts`: reads the command line and runs the daemon; whatever a user can put right is said in one line. */
import { commandLine, usageExit } from './cli.js';
import { log } from './log.js';
import { UsageError } from './options.js';
import { StartError } from './starterror.js';

const argv = process.argv.slice(2);
try {
  if (argv[0] === 'events') {
    const { events } = await import('./events.js');
    process.exitCode = await events(argv.slice(1));
  } else {
    const config = await commandLine(argv);
    const { start } = await import('./start.js');
    const started = start(config);
    const { Daemon } = await import('./daemon.js');
    process.exitCode = new Daemon(config, started).run();
  }
} catch (error) {
  if (error instanceof UsageError) usageExit(error);
  if (!(error instanceof StartError)) throw error;
  log.error(error.message);
  process.exitCode = 1;
}
// Threads that still have something open must not keep the process.
process.exit();
