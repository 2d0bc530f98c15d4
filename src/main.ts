/** `virtiofsd-ts`: reads the command line and runs the daemon; whatever a user can put right is said in one line. */
import { commandLine, usageExit } from './cli.js';
import { needsSandbox } from './config.js';
import { log } from './log.js';
import { COMMANDS, UsageError } from './options.js';
import { StartError } from './starterror.js';

const argv = process.argv.slice(2);
try {
  const command = COMMANDS.find(({ name }) => name === argv[0]);
  if (command !== undefined) {
    process.exitCode = await run(command, argv.slice(1));
  } else {
    // Inside the sandbox the command line was read already, outside it.
    const inside = process.env['VIRTIOFSD_TS_HANDOVER'] === undefined ? undefined : (await import('./sandbox.js')).handover();
    const config = inside?.config ?? (await commandLine(argv));
    const { start } = await import('./start.js');
    const started = start(config, inside);
    if (inside === undefined && needsSandbox(config)) (await import('./sandbox.js')).launch(config, started);
    const { Daemon } = await import('./daemon.js');
    const worker = inside && (await import('./restart.js')).takeUp(inside);
    process.exitCode = new Daemon(config, started, inside, worker).run();
  }
} catch (error) {
  if (error instanceof UsageError) usageExit(error);
  if (!(error instanceof StartError)) throw error;
  log.error(error.message);
  process.exitCode = 1;
}
// Threads that still have something open must not keep the process.
process.exit();

async function run(command: (typeof COMMANDS)[number], argv: readonly string[]): Promise<number> {
  switch (command.name) {
    case 'events':
      return (await import('./commands/events.js')).events(command, argv);
    case 'top':
      return (await import('./commands/top.js')).top(command, argv);
    case 'doctor':
      return (await import('./commands/doctor.js')).doctor(command, argv);
  }
}
