/**
 * Event bits: the kernel's FS_* values (include/linux/fsnotify_backend.h), which are also those of inotify and fanotify where
 * these have the event. All of them fit into 32 bits.
 */

export const FS_ACCESS = 0x1;
export const FS_MODIFY = 0x2;
export const FS_ATTRIB = 0x4;
export const FS_CLOSE_WRITE = 0x8;
export const FS_CLOSE_NOWRITE = 0x10;
export const FS_OPEN = 0x20;
export const FS_MOVED_FROM = 0x40;
export const FS_MOVED_TO = 0x80;
export const FS_CREATE = 0x100;
export const FS_DELETE = 0x200;
export const FS_DELETE_SELF = 0x400;
export const FS_MOVE_SELF = 0x800;
export const FS_OPEN_EXEC = 0x1000;
export const FS_Q_OVERFLOW = 0x4000;
/** IN_IGNORED: only inotify says it. */
export const FS_IN_IGNORED = 0x8000;
export const FS_EVENT_ON_CHILD = 0x0800_0000;
export const FS_RENAME = 0x1000_0000;
export const FS_ISDIR = 0x4000_0000;

/** A name in a directory came, went or changed: the event belongs to the directory. */
export const DIRENT = FS_CREATE | FS_DELETE | FS_MOVED_FROM | FS_MOVED_TO | FS_RENAME;
/** What can happen to a child, and is reported to a directory that has {@link FS_EVENT_ON_CHILD}. */
export const ON_CHILD = FS_ACCESS | FS_MODIFY | FS_ATTRIB | FS_CLOSE_WRITE | FS_CLOSE_NOWRITE | FS_OPEN | FS_OPEN_EXEC;
/** What only the object itself hears. */
export const SELF = FS_MOVE_SELF | FS_DELETE_SELF;
/** Bits that say how, not what. */
export const MODIFIERS = FS_EVENT_ON_CHILD | FS_ISDIR;
/** Events that change nothing on the host. */
export const READS = FS_ACCESS | FS_OPEN | FS_OPEN_EXEC | FS_CLOSE_NOWRITE;

/**
 * The order in which the bits of a merged mask are delivered: that in which one process usually causes them, so that a local
 * watcher would have seen them so. Create, open, read, write, change attributes, close; then what ends a name.
 */
export const ORDER: readonly number[] = [
  FS_CREATE,
  FS_OPEN,
  FS_OPEN_EXEC,
  FS_ACCESS,
  FS_MODIFY,
  FS_ATTRIB,
  FS_CLOSE_WRITE,
  FS_CLOSE_NOWRITE,
  FS_MOVED_FROM,
  FS_MOVED_TO,
  FS_MOVE_SELF,
  FS_DELETE_SELF,
  FS_DELETE,
];

const NAMES: readonly (readonly [number, string])[] = [
  [FS_CREATE, 'CREATE'],
  [FS_OPEN, 'OPEN'],
  [FS_OPEN_EXEC, 'OPEN_EXEC'],
  [FS_ACCESS, 'ACCESS'],
  [FS_MODIFY, 'MODIFY'],
  [FS_ATTRIB, 'ATTRIB'],
  [FS_CLOSE_WRITE, 'CLOSE_WRITE'],
  [FS_CLOSE_NOWRITE, 'CLOSE_NOWRITE'],
  [FS_MOVED_FROM, 'MOVED_FROM'],
  [FS_MOVED_TO, 'MOVED_TO'],
  [FS_RENAME, 'RENAME'],
  [FS_MOVE_SELF, 'MOVE_SELF'],
  [FS_DELETE_SELF, 'DELETE_SELF'],
  [FS_DELETE, 'DELETE'],
  [FS_Q_OVERFLOW, 'Q_OVERFLOW'],
  [FS_IN_IGNORED, 'IGNORED'],
  [FS_EVENT_ON_CHILD, 'ON_CHILD'],
  [FS_ISDIR, 'ISDIR'],
];

/** A mask in words as inotifywait prints it: "CREATE,ISDIR". For logs and tests. */
export function maskText(mask: number): string {
  const names = NAMES.filter(([bit]) => (mask & bit) !== 0).map(([, name]) => name);
  return names.length === 0 ? '0' : names.join(',');
}
