/** What the watcher asks of the store of inodes that the guest knows. */

/** Nodeids are the guest's; 0 is none. */
export interface WatchNodes {
  /** 0 when the guest knows this nodeid with this generation; -ENOENT, -ESTALE. */
  check(nodeid: number, generation: number): number;
  /** The generation that the guest was told with a nodeid, 0 for an unknown one. */
  generation(nodeid: number): number;
  isDirectory(nodeid: number): boolean;
  /** An O_PATH descriptor of the object, the store's own and valid until it is asked for the next one; -errno. */
  fd(nodeid: number): number;
  /** The nodeid of the object with the `struct file_handle` at arena offset `handle` on the mount that `near` is on, or 0. */
  byHandle(handle: number, near: number): number;
  /** Whether {@link byHandle} can find anything on the mount of `near`: a store without privileges, or a file system without handles, has none. */
  hasHandles(near: number): boolean;
  /** The nodeid of the object that the NUL-terminated `name` (arena offset) stands for now in directory `parent`, or 0. For stores without handles. */
  byName(parent: number, name: number): number;
  /** Opens (O_PATH) the object with this handle on the mount of `near`, also one that the guest does not know; the fd is the caller's. -errno. */
  open(handle: number, near: number): number;
  /** Whether two nodes were reached through the same mount. */
  sameMount(a: number, b: number): boolean;
  /** Writes down, for a process after this one, what the guest watches of a node that it knows; 0: nothing. */
  remember(nodeid: number, mask: number): void;
  /** Every node with such a mask that is not 0. */
  remembered(visit: (nodeid: number, mask: number) => void): void;
  /** Every directory that the guest knows. */
  directories(visit: (nodeid: number) => void): void;
}
