/**
 * The one table of command line options. Parsing, defaults, `--help`, the man page and the shells' completions (packaging/) all
 * follow from it; `cli.ts` parses by it and `config.ts` turns the values into the daemon's configuration.
 *
 * Names, values and meanings are those of virtiofsd 1.14; `origin: 'ours'` marks what it does not have, `note` where we differ.
 */

/** Name and version that `--version` prints; package.json says the same (a unit test compares). */
export const PROGRAM = 'virtiofsd-ts';
export const VERSION = '0.1.0';
/** What it is, in one sentence. */
export const DESCRIPTION = 'Shares a host directory with a virtual machine: a virtio-fs device for a vhost-user front end';

/** Headings of `--help`, in their order. */
export const GROUPS = [
  'Share',
  'Connection',
  'Caching',
  'Attributes and identities',
  'File events',
  'Isolation',
  'Migration',
  'Running',
  'Deprecated',
] as const;

export interface OptionSpec {
  readonly name: string;
  /** `flag` takes no value; `integer` is a decimal number ≥ 0, `seconds` one that may have a fraction. */
  readonly type: 'flag' | 'string' | 'integer' | 'seconds';
  /** Name of the value in `--help`. */
  readonly value?: string;
  readonly choices?: readonly string[];
  /** Deprecated spellings of choices, and what they stand for. */
  readonly oldChoices?: Readonly<Record<string, string>>;
  /** Upper and lower case do not matter in the value. */
  readonly anyCase?: true;
  /** The value that `--name` alone stands for; others must then be attached with '='. */
  readonly bare?: string;
  /** May be given more than once; otherwise the last one counts. */
  readonly repeat?: true;
  readonly default?: string | number;
  /** The default in words, where it is no constant. */
  readonly defaultText?: string;
  /** Smallest and largest number. */
  readonly range?: readonly [number, number];
  /** The flag that this one undoes: of the two the last one counts. */
  readonly undoes?: string;
  readonly group: (typeof GROUPS)[number];
  /** One sentence without the full stop. */
  readonly summary: string;
  readonly details?: string;
  /** Still accepted, with a warning: what to do instead. */
  readonly deprecated?: string;
  readonly origin?: 'ours';
  /** Difference to virtiofsd. */
  readonly note?: string;
}

const MAPPINGS =
  "guest:GUEST:HOST:COUNT maps guest ids to host ids, host:HOST:GUEST:COUNT host ids to guest ids, map:GUEST:HOST:COUNT both ways; squash-guest and squash-host map a range to one id; forbid-guest:GUEST:COUNT makes the guest's use of such an id an error. May be given more than once";

/** Largest timeout: about 68 years, which the guest can count in any clock. */
const YEARS = 0x7fffffff;

export const OPTIONS = [
  // --- Share ---
  {
    name: 'shared-dir',
    type: 'string',
    value: 'DIR',
    group: 'Share',
    summary: 'The directory that the guest gets',
    note: 'a single file as the share is refused',
  },
  {
    name: 'tag',
    type: 'string',
    value: 'TAG',
    group: 'Share',
    summary: 'The tag that the device announces, 1 to 36 bytes',
    details:
      'Offers VHOST_USER_PROTOCOL_F_CONFIG, which QEMU does not use for vhost-user-fs (its own tag property counts); QEMU 7.1 to 8.0 crashes over it',
  },
  {
    name: 'num-request-queues',
    type: 'integer',
    value: 'N',
    default: 1,
    range: [1, 1023],
    group: 'Share',
    origin: 'ours',
    summary: 'Request queues that the device configuration announces (with --tag)',
    details: 'Without --tag the number is what the front end sets up (QEMU: num-request-queues)',
  },
  { name: 'readonly', type: 'flag', group: 'Share', summary: 'The guest can change nothing' },
  {
    name: 'announce-submounts',
    type: 'flag',
    undoes: 'no-announce-submounts',
    group: 'Share',
    summary: 'Tell the guest which directories are mount points [default]',
  },
  {
    name: 'no-announce-submounts',
    type: 'flag',
    undoes: 'announce-submounts',
    group: 'Share',
    summary: 'Do not tell the guest which directories are mount points',
  },
  {
    name: 'posix-lock',
    type: 'flag',
    group: 'Share',
    origin: 'ours',
    summary: 'Locks by fcntl(2) hold between guests, and between guest and host; otherwise only inside the guest',
    details:
      'They order what programs do, but what a guest has cached is as old as --cache allows: programs that share data by locks want --cache=never',
  },
  {
    name: 'flock',
    type: 'flag',
    group: 'Share',
    origin: 'ours',
    summary: 'Locks by flock(2) in the same way',
  },
  {
    name: 'inode-file-handles',
    type: 'string',
    value: 'MODE',
    choices: ['never', 'prefer', 'mandatory'],
    oldChoices: { fallback: 'prefer' },
    default: 'prefer',
    group: 'Share',
    summary: 'Refer to inodes by file handles instead of open O_PATH descriptors',
    details: 'prefer falls back to a descriptor where the host file system has no file handles; mandatory refuses such a file system',
  },
  {
    name: 'export-support',
    type: 'flag',
    group: 'Share',
    origin: 'ours',
    summary: 'Let the guest export the share by NFS, and open files by handle (open_by_handle_at)',
    details:
      'The 262144 files that the guest forgot last are remembered for it (40 MB at most), older handles and those of before a restart are stale; needs file handles (--inode-file-handles, CAP_DAC_READ_SEARCH)',
  },
  {
    name: 'preserve-noatime',
    type: 'flag',
    group: 'Share',
    summary: 'Pass O_NOATIME on instead of dropping it (it fails for files that the daemon does not own)',
  },

  // --- Connection ---
  {
    name: 'socket-path',
    type: 'string',
    value: 'PATH',
    group: 'Connection',
    summary: 'The vhost-user socket to make and listen on',
    details: 'A socket that a .socket unit of systemd passes takes its place',
  },
  { name: 'socket-group', type: 'string', value: 'GROUP', group: 'Connection', summary: 'The group that may connect to the socket' },
  {
    name: 'fd',
    type: 'integer',
    value: 'FD',
    range: [0, 0x7fffffff],
    group: 'Connection',
    summary: 'An inherited listening socket, instead of --socket-path',
  },

  // --- Caching ---
  {
    name: 'cache',
    type: 'string',
    value: 'POLICY',
    choices: ['auto', 'always', 'never', 'metadata', 'notify'],
    anyCase: true,
    default: 'auto',
    group: 'Caching',
    summary: 'What the guest may cache, and for how long',
    details:
      'auto: names and attributes for one second, data while the file is unchanged; always: everything for a day; metadata: names and attributes for a day, no data; never: nothing; notify: everything for a day, and the guest is told when it changes on the host (as auto in guests without our kernel patch)',
  },
  {
    name: 'entry-timeout',
    type: 'seconds',
    value: 'SECONDS',
    range: [0, YEARS],
    defaultText: 'by --cache',
    group: 'Caching',
    origin: 'ours',
    summary: 'How long the guest may keep a name before it asks again, fractions allowed',
    details: 'Counts instead of what --cache says; with --cache=notify from the moment that the guest is told of changes',
  },
  {
    name: 'attr-timeout',
    type: 'seconds',
    value: 'SECONDS',
    range: [0, YEARS],
    defaultText: 'by --cache',
    group: 'Caching',
    origin: 'ours',
    summary: 'How long the guest may keep attributes, in the same way',
  },
  {
    name: 'negative-timeout',
    type: 'seconds',
    value: 'SECONDS',
    range: [0, YEARS],
    defaultText: '0, and a day with --cache=notify',
    group: 'Caching',
    origin: 'ours',
    summary: 'How long the guest may remember that a name does not exist, in the same way',
    details: 'So long it does not see what the host makes under that name',
  },
  {
    name: 'allow-mmap',
    type: 'flag',
    group: 'Caching',
    summary: 'Let files be mapped shared in the guest with --cache=metadata or never',
    details: 'Only safe when nobody else changes the share',
  },
  { name: 'writeback', type: 'flag', group: 'Caching', summary: 'Let the guest write back cached data later' },
  { name: 'no-readdirplus', type: 'flag', group: 'Caching', summary: 'List directories without the attributes of their entries' },
  { name: 'allow-direct-io', type: 'flag', group: 'Caching', summary: 'Pass O_DIRECT of the guest on to the host file system' },

  // --- Attributes and identities ---
  { name: 'xattr', type: 'flag', group: 'Attributes and identities', summary: 'Extended attributes' },
  {
    name: 'xattrmap',
    type: 'string',
    value: 'RULES',
    group: 'Attributes and identities',
    summary: 'Rename or hide extended attributes between guest and host, for example :map::user.virtiofs.: (implies --xattr)',
  },
  {
    name: 'posix-acl',
    type: 'string',
    value: 'WHEN',
    choices: ['never', 'auto', 'always'],
    bare: 'always',
    default: 'never',
    group: 'Attributes and identities',
    summary: 'POSIX access control lists (implies --xattr)',
    details: 'auto: when the guest can; always: a guest that cannot is refused',
  },
  {
    name: 'security-label',
    type: 'string',
    value: 'WHEN',
    choices: ['never', 'auto', 'always'],
    bare: 'always',
    default: 'never',
    group: 'Attributes and identities',
    summary: 'Store the security label that the guest sends with a new file (implies --xattr)',
    details: 'auto: when the guest can; always: a guest that cannot is refused',
  },
  {
    name: 'killpriv-v2',
    type: 'flag',
    undoes: 'no-killpriv-v2',
    group: 'Attributes and identities',
    summary: 'Clear set-user-id bits here instead of by a request of the guest before each write',
  },
  {
    name: 'no-killpriv-v2',
    type: 'flag',
    undoes: 'killpriv-v2',
    group: 'Attributes and identities',
    summary: 'Leave clearing set-user-id bits to the guest [default]',
  },
  {
    name: 'translate-uid',
    type: 'string',
    value: 'MAP',
    repeat: true,
    group: 'Attributes and identities',
    summary: 'Translate user ids between guest and host',
    details: MAPPINGS,
  },
  {
    name: 'translate-gid',
    type: 'string',
    value: 'MAP',
    repeat: true,
    group: 'Attributes and identities',
    summary: 'Translate group ids between guest and host, in the same way',
  },

  // --- Isolation ---
  {
    name: 'sandbox',
    type: 'string',
    value: 'MODE',
    choices: ['namespace', 'chroot', 'none'],
    anyCase: true,
    default: 'namespace',
    group: 'Isolation',
    summary: 'How the daemon locks itself in',
    details:
      'namespace: in namespaces of its own, where there are no files but the share and its own code, no network and no other processes; an ordinary user gets a user namespace, too; chroot: for root without CAP_SYS_ADMIN, keeps paths inside the share; none: not at all',
  },
  {
    name: 'seccomp',
    type: 'string',
    value: 'ACTION',
    choices: ['none', 'kill', 'log', 'trap'],
    default: 'kill',
    group: 'Isolation',
    summary: 'What happens on a system call that the daemon has no need of',
    details: 'kill: the daemon is ended; log: the kernel logs it; trap: SIGSYS; none: all are allowed',
  },
  {
    name: 'modcaps',
    type: 'string',
    value: 'CAPS',
    group: 'Isolation',
    summary: 'Capabilities to keep (+) or to drop (-), for example +sys_admin:-chown',
    details:
      'Kept are chown, dac_override, fowner, fsetid, setgid, setuid, mknod and setfcap, and dac_read_search unless --inode-file-handles=never; trusted.* attributes (overlayfs in the guest) need +sys_admin',
  },
  {
    name: 'uid-map',
    type: 'string',
    value: 'MAP',
    repeat: true,
    group: 'Isolation',
    summary: 'Map user ids into the user namespace, given as :INSIDE:OUTSIDE:COUNT: (any delimiter)',
    details: "An ordinary user's own id and the subordinate ids of /etc/subuid are mapped otherwise. May be given more than once",
    note: 'may be used by root, too; without it subordinate ids are mapped',
  },
  {
    name: 'gid-map',
    type: 'string',
    value: 'MAP',
    repeat: true,
    group: 'Isolation',
    summary: 'Map group ids into the user namespace, in the same way',
  },

  // --- Migration ---
  {
    name: 'migration-mode',
    type: 'string',
    value: 'MODE',
    choices: ['find-paths', 'file-handles'],
    default: 'find-paths',
    group: 'Migration',
    summary: 'How the destination of a live migration finds the inodes that the guest knows',
    details:
      'find-paths: by their paths below the shared directory, which may be a copy; file-handles: by their file handles, which also reach files that were deleted while open, in the same directory of the same file system; both sides must have it, and the destination trusts the source not to name files outside',
    note: 'paths are looked for when the guest stands still already',
  },
  {
    name: 'migration-on-error',
    type: 'string',
    value: 'ACTION',
    choices: ['abort', 'guest-error'],
    default: 'abort',
    group: 'Migration',
    summary: 'What the destination does about inodes and open files that it cannot have',
    details: 'abort: it refuses the migration, and the guest goes on where it was; guest-error: the guest gets errors for them',
  },
  {
    name: 'migration-verify-handles',
    type: 'flag',
    group: 'Migration',
    summary: 'Send file handles along with the paths: the destination takes only what has the same one',
    details: 'For the same directory on both sides, where others may rename files meanwhile',
  },
  {
    name: 'migration-confirm-paths',
    type: 'flag',
    group: 'Migration',
    summary: 'Look once more at paths that the whole tree was searched for, before they are sent',
    note: 'all others are looked at when they are sent anyway',
  },

  // --- Running ---
  {
    name: 'thread-pool-size',
    type: 'integer',
    value: 'N',
    range: [0, 1024],
    defaultText: 'chosen by the daemon',
    group: 'Running',
    summary: 'Most threads for requests that would block the others (cold reads, fsync, large copies)',
    details: '0: no such threads, every request is served in turn',
    note: 'the default is not 0',
  },
  {
    name: 'busy-poll',
    type: 'integer',
    value: 'MICROSECONDS',
    range: [0, 1_000_000],
    default: 20,
    group: 'Running',
    origin: 'ours',
    summary: 'How long the daemon looks for the next request before it sleeps, while requests come so soon',
    details:
      'no kick and no wake-up is needed for those, which a guest that waits for each reply feels most; 0: it sleeps at once, for hosts with more virtual machines than processors',
  },
  {
    name: 'rlimit-nofile',
    type: 'integer',
    value: 'N',
    range: [0, Number.MAX_SAFE_INTEGER],
    defaultText: "the smaller of 1000000 and '/proc/sys/fs/nr_open'",
    group: 'Running',
    summary: 'Most open files; 0 leaves the limit as it is',
  },
  {
    name: 'log-level',
    type: 'string',
    value: 'LEVEL',
    choices: ['error', 'warn', 'info', 'debug', 'trace', 'off'],
    anyCase: true,
    default: 'info',
    group: 'Running',
    summary: 'What is logged',
    details: 'SIGUSR1 goes to the next level at run time: the given one, debug, trace, and around',
  },
  {
    name: 'log-format',
    type: 'string',
    value: 'FORMAT',
    choices: ['text', 'json'],
    default: 'text',
    group: 'Running',
    origin: 'ours',
    summary: 'How log lines look',
    details: 'json: an object with time, level, pid, msg and values in each line, also of the system log',
  },
  {
    name: 'fsnotify',
    type: 'string',
    value: 'HOW',
    choices: ['auto', 'fanotify', 'inotify', 'off'],
    default: 'auto',
    group: 'File events',
    origin: 'ours',
    summary: 'Tell guests that can hear it when files change on the host',
    details:
      'auto: by fanotify, and by inotify where a file system or the kernel permits no fanotify; inotify reports no accesses and cannot tell changes of this guest made in the background from those of others',
  },
  {
    name: 'agent',
    type: 'string',
    value: 'off|TOKEN-FILE',
    default: 'off',
    group: 'File events',
    origin: 'ours',
    summary: 'Let a replay agent in a guest with a stock kernel bring the file events; it must show the token in this file',
    details: 'See qemu/guest/agent/README.md. Guests cannot use idmapped mounts then',
  },
  {
    name: 'fsnotify-limit',
    type: 'integer',
    value: 'N',
    default: 131072,
    range: [1, 16777216],
    group: 'File events',
    origin: 'ours',
    summary: 'How many files and directories the guest may watch at a time',
    details: 'Each costs the host kernel about 1 KiB',
  },
  { name: 'syslog', type: 'flag', group: 'Running', summary: 'Log to the system log instead of standard error' },
  {
    name: 'metrics',
    type: 'string',
    value: 'unix:PATH|HOST:PORT',
    group: 'Running',
    origin: 'ours',
    summary: 'Serve Prometheus metrics over HTTP at this address, path /metrics',
  },
  {
    name: 'print-capabilities',
    type: 'flag',
    group: 'Running',
    summary: 'Print what this program can do as JSON (vhost-user.json) and exit',
  },

  // --- Deprecated ---
  { name: 'socket', type: 'string', value: 'PATH', group: 'Deprecated', summary: 'The vhost-user socket', deprecated: 'use --socket-path' },
  {
    name: 'o',
    type: 'string',
    value: 'OPTIONS',
    repeat: true,
    group: 'Deprecated',
    summary: 'Options in the old form: source=DIR,cache=none,xattr,… (a comma in a value is doubled)',
    deprecated: 'use the separate options (--cache=auto for -o cache=auto)',
    note: "values may contain '=' and doubled commas",
  },
  { name: 'd', type: 'flag', group: 'Deprecated', summary: 'Log debug messages', deprecated: 'use --log-level=debug' },
  {
    name: 'f',
    type: 'flag',
    group: 'Deprecated',
    summary: 'Stay in the foreground, which is always so',
    deprecated: 'leave it out, it has no effect',
  },
] as const satisfies readonly OptionSpec[];

/** An option of a command other than the daemon. */
export interface CommandOption {
  readonly name: string;
  /** Its one letter. */
  readonly short?: string;
  /** Name of its value; without one it is a flag. */
  readonly value?: string;
  readonly summary: string;
}

/** What the program does beside being the daemon: its first argument. */
export interface CommandSpec {
  readonly name: string;
  /** Name of its argument, if it takes one. */
  readonly argument?: string;
  readonly summary: string;
  readonly details: string;
  readonly options: readonly CommandOption[];
}

const ADDRESS = 'METRICS-ADDRESS';
const ADDRESS_IS = `${ADDRESS} is what the daemon was given as --metrics`;

export const COMMANDS = [
  {
    name: 'events',
    argument: ADDRESS,
    summary: 'Shows what a guest watches and is sent, live',
    details: `${ADDRESS_IS}. One line for each watch and each event, until the daemon ends`,
    options: [{ name: 'json', summary: 'Lines of JSON' }],
  },
  {
    name: 'top',
    argument: ADDRESS,
    summary: 'Shows requests, their times, caches, watches and events, live',
    details: `${ADDRESS_IS}. At a terminal the view is refreshed in place, and q ends it; elsewhere one follows the other`,
    options: [
      { name: 'count', short: 'n', value: 'N', summary: 'Ends after N views' },
      { name: 'interval', short: 'i', value: 'SECONDS', summary: 'Time between views, 0.1 to 3600; default: 2' },
    ],
  },
  {
    name: 'doctor',
    summary: 'Says what will work on this host, and what to do about the rest',
    details:
      'Looks at the kernel, the sandbox, how files can be watched, limits, QEMU, libvirt and AppArmor, and starts the daemon once on trial. The exit status is 1 when it cannot serve a guest',
    options: [
      { name: 'shared-dir', value: 'DIR', summary: 'Looks at this directory, too, as the share' },
      { name: 'json', summary: 'A JSON array' },
    ],
  },
] as const satisfies readonly CommandSpec[];

type Table = (typeof OPTIONS)[number];

type Value<S extends OptionSpec> = S extends { type: 'flag' }
  ? boolean
  : S extends { repeat: true }
    ? readonly string[]
    :
        | (S extends { choices: readonly (infer C)[] } ? C : S extends { type: 'integer' | 'seconds' } ? number : string)
        | (S extends { default: string | number } ? never : undefined);

/** The parsed value of each option, defaults filled in. */
export type Values = { -readonly [S in Table as S['name']]: Value<S> };

/** Wrong use of the command line: one line that says what is wrong and what to do. The process ends with status 2. */
export class UsageError extends Error {
  override name = 'UsageError';
}
