import type { Offload } from '../../queue/offload.js';
import type { Block } from '../block.js';
import type { Waits } from './lock.js';

/** How a host directory is shared; what is negotiated with the guest comes with FUSE_INIT (`SessionOptions`) instead. */
export interface PassthroughOptions {
  /** The directory. */
  root: string;
  /** What the guest may cache of open files: the flags in the answers to OPEN and OPENDIR follow from it. Default auto. */
  cache?: 'auto' | 'always' | 'never' | 'metadata';
  /** Extended attributes; without them their requests are answered with -ENOSYS, and the guest asks no more. */
  xattr?: boolean;
  /** Rules of `--xattrmap`. */
  xattrmap?: string;
  /**
   * Whether inodes are kept as file handles (needs CAP_DAC_READ_SEARCH) or as open O_PATH descriptors. `prefer` (the default)
   * falls back where a file system has none, `mandatory` does not.
   */
  inodeFileHandles?: 'never' | 'prefer' | 'mandatory';
  /** O_DIRECT of the guest reaches the host. */
  allowDirectIo?: boolean;
  /** O_NOATIME of the guest reaches the host. */
  preserveNoatime?: boolean;
  /** Every operation that modifies is answered with -EROFS. */
  readonly?: boolean;
  /** Rules of `--translate-uid` and `--translate-gid`. */
  translateUid?: readonly string[];
  translateGid?: readonly string[];
  /** Descriptors that the file system may have open at once; default: the process's limit less a reserve. */
  maxDescriptors?: number;
  /** Where system calls that would block go; without it they are made in place. */
  offload?: Offload;
  /** Where requests that wait for a lock are numbered; without it none waits. */
  waits?: Waits;
  /** Where the state lives, perhaps with what an earlier process left; default: memory of this process alone. */
  block?: Block;
  /** Words that tell which request is being served and how far it is ({@link Journal}); kept as long as the block. */
  journal?: Float64Array;
  /** What somebody should know: a file system without handles, a refused mount. */
  warn?: (message: string) => void;
}
