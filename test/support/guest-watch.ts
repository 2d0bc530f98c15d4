/** Watches a tree as development servers do, with chokidar or fs.watch; for a guest that has the host's node. A line per event. */
import { watch as watchTree } from 'node:fs';
import { relative } from 'node:path';
import { watch } from 'chokidar';

const [how, root] = process.argv.slice(2) as [string, string];

if (how === 'chokidar') {
  const watcher = watch(root, { ignoreInitial: true });
  watcher.on('all', (event, path) => console.log(`${event} ${relative(root, path)}`));
  watcher.on('error', (error) => console.log(`error ${error}`));
  watcher.on('ready', () => console.log('= watching'));
} else {
  // The callback says "rename" or "change"; on Linux node watches each directory by itself.
  watchTree(root, { recursive: true }, (event, path) => console.log(`${event} ${path}`)).on('error', (error) =>
    console.log(`error ${error}`),
  );
  console.log('= watching');
}
