/** Programs that people watch trees with, in a guest whose kernel is told of events. */

import { watchWithPrograms } from '../support/guest-programs.js';
import { setUp } from '../support/guests.js';

watchWithPrograms('watchers of trees in a guest: User Mode Linux 6.12 with the host’s programs', () =>
  setUp({ kind: 'uml', kernel: '6.12', hostRoot: true, memoryMiB: 512 }),
);
