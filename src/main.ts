/** `virtiofsd-ts`: reads the command line and runs the daemon; whatever a user can put right is said in one line. */
import { commandLine, usageExit } from './cli.js';
import { needsSandbox } from './config.js';
import { log } from './log.js';
import { UsageError } from './options.js';
import { StartError } from './starterror.js';

const argv = process.argv.slice(2);
try {
  if (argv[0] === 'events') {
    const { events } = await import('./events.js');
    process.exitCode = await events(argv.slice(1));
  } else {
    // Inside the sandbox the command line was read already, outside it.
    const inside = process.env['VIRTIOFSD_TS_HANDOVER'] === undefined ? undefined : (await import('./sandbox.js')).handover();
    const config = inside?.config ?? (await commandLine(argv));
    const { start } = await import('./start.js');
    const started = start(config, inside);
    if (inside === undefined && needsSandbox(config)) (await import('./sandbox.js')).launch(config, started);
    const { Daemon } = await import('./daemon.js');
    process.exitCode = new Daemon(config, started, inside).run();
  }
} catch (error) {
  if (error instanceof UsageError) usageExit(error);
  if (!(error instanceof StartError)) throw error;
  log.error(error.message);
  process.exitCode = 1;
}
// Threads that still have something open must not keep the process.
process.exit();
