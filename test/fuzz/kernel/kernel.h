/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * As much of the kernel as fs/fuse/fsnotify.c of our patches needs to be
 * compiled and run in user space.  What is only bookkeeping there is checked
 * here: locks, references, what fsnotify() is called with.
 */
#ifndef FUZZ_KERNEL_H
#define FUZZ_KERNEL_H

#define CONFIG_FSNOTIFY 1

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef unsigned long long u64;
typedef uint32_t u32;
typedef uint16_t umode_t;
typedef unsigned int gfp_t;

#define must(condition) do { \
	if (!(condition)) { \
		fprintf(stderr, "%s:%d: must be: %s\n", __FILE__, __LINE__, #condition); \
		abort(); \
	} \
} while (0)

/* --- language --- */

#define __init
#define READ_ONCE(x) (x)
#define WRITE_ONCE(x, value) ((x) = (value))
#define smp_load_acquire(p) (*(p))
#define smp_store_release(p, value) (*(p) = (value))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(p, type, member) ((type *)((char *)(p) - offsetof(type, member)))
#define swap(a, b) do { __typeof__(a) swapped = (a); (a) = (b); (b) = swapped; } while (0)
#define WARN_ON(condition) must(!(condition))
#define pr_warn_ratelimited(...) do { if (0) fprintf(stderr, __VA_ARGS__); } while (0)
#define IS_ERR(p) ((uintptr_t)(p) >= (uintptr_t)-4095)
#define PTR_ERR(p) ((long)(p))
#define EXPORT_SYMBOL_GPL(name) extern int exported_##name
#define module_param_named(name, variable, type, mode) extern int param_##name
#define MODULE_PARM_DESC(name, text) extern int desc_##name
#define cond_resched() do { } while (0)

#define HZ 100
static unsigned long jiffies;
#define time_after(a, b) ((long)((b) - (a)) < 0)

#define GFP_KERNEL 0
#define GFP_KERNEL_ACCOUNT 0
#define GFP_ATOMIC 0
#define __GFP_NOWARN 0
static inline void *kzalloc(size_t size, gfp_t gfp) { (void)gfp; return calloc(1, size); }
#define kzalloc_obj(object, ...) ((__typeof__(&(object)))calloc(1, sizeof(object)))
static inline void kfree(const void *p) { free((void *)p); }

struct task { unsigned int flags; };
static struct task the_task;
#define current (&the_task)
#define PF_KTHREAD 1
#define MAY_READ 4

/* --- locks: taken once, given back --- */

typedef struct { int held; } spinlock_t;
static int spinlocks;
static inline void spin_lock_init(spinlock_t *lock) { lock->held = 0; }
static inline void spin_lock(spinlock_t *lock) { must(!lock->held); lock->held = 1; spinlocks++; }
static inline void spin_unlock(spinlock_t *lock) { must(lock->held); lock->held = 0; spinlocks--; }
#define might_sleep() must(spinlocks == 0)

struct mutex { int held; };
static inline void mutex_init(struct mutex *lock) { lock->held = 0; }
static inline void mutex_lock(struct mutex *lock) { might_sleep(); must(!lock->held); lock->held = 1; }
static inline int mutex_lock_killable(struct mutex *lock) { mutex_lock(lock); return 0; }
static inline void mutex_unlock(struct mutex *lock) { must(lock->held); lock->held = 0; }
#define lockdep_assert_held(lock) must((lock)->held)

struct rw_semaphore { int readers; };
static inline void down_read(struct rw_semaphore *sem) { might_sleep(); sem->readers++; }
static inline int down_read_trylock(struct rw_semaphore *sem) { sem->readers++; return 1; }
static inline void up_read(struct rw_semaphore *sem) { must(sem->readers > 0); sem->readers--; }

typedef struct { int count; } refcount_t;
static inline void refcount_set(refcount_t *r, int n) { r->count = n; }
static inline void refcount_inc(refcount_t *r) { must(r->count > 0); r->count++; }
static inline bool refcount_dec_and_test(refcount_t *r) { must(r->count > 0); return --r->count == 0; }

typedef struct { int unused; } wait_queue_head_t;
static inline void init_waitqueue_head(wait_queue_head_t *q) { (void)q; }
static inline void wake_up(wait_queue_head_t *q) { (void)q; }
#define wake_up_all wake_up
#define wait_event_killable(queue, condition) ((condition) ? 0 : -EINTR)

/* --- lists --- */

struct list_head { struct list_head *next, *prev; };
#define LIST_HEAD(name) struct list_head name = { &(name), &(name) }
static inline void INIT_LIST_HEAD(struct list_head *list) { list->next = list->prev = list; }
static inline int list_empty(const struct list_head *list) { return list->next == list; }
static inline void list_add_tail(struct list_head *entry, struct list_head *list)
{
	entry->prev = list->prev;
	entry->next = list;
	list->prev->next = entry;
	list->prev = entry;
}
static inline void list_del_init(struct list_head *entry)
{
	entry->prev->next = entry->next;
	entry->next->prev = entry->prev;
	INIT_LIST_HEAD(entry);
}
static inline void list_move_tail(struct list_head *entry, struct list_head *list)
{
	list_del_init(entry);
	list_add_tail(entry, list);
}
#define list_entry(p, type, member) container_of(p, type, member)
#define list_first_entry(list, type, member) list_entry((list)->next, type, member)
#define list_for_each_entry(pos, list, member) \
	for (pos = list_entry((list)->next, __typeof__(*pos), member); &pos->member != (list); \
	     pos = list_entry(pos->member.next, __typeof__(*pos), member))
#define list_for_each_entry_safe(pos, after, list, member) \
	for (pos = list_entry((list)->next, __typeof__(*pos), member), \
	     after = list_entry(pos->member.next, __typeof__(*pos), member); &pos->member != (list); \
	     pos = after, after = list_entry(after->member.next, __typeof__(*after), member))

struct hlist_node { struct hlist_node *next; };
struct hlist_head { struct hlist_node *first; };
#define hlist_for_each_entry(pos, list, member) \
	for (struct hlist_node *at_ = (list)->first; \
	     at_ && ((pos = container_of(at_, __typeof__(*pos), member)), 1); at_ = at_->next)

/* A set of pointers is all that is wanted of it */
struct xarray { unsigned int count; unsigned long keys[64]; };
static inline void xa_init(struct xarray *xa) { xa->count = 0; }
static inline void xa_destroy(struct xarray *xa) { xa->count = 0; }
static inline void *xa_mk_value(unsigned long value) { return (void *)value; }
static inline int xa_insert(struct xarray *xa, unsigned long key, void *value, gfp_t gfp)
{
	(void)value, (void)gfp;
	for (unsigned int i = 0; i < xa->count; i++)
		if (xa->keys[i] == key)
			return -EBUSY;
	must(xa->count < ARRAY_SIZE(xa->keys));
	xa->keys[xa->count++] = key;
	return 0;
}

/* --- work items: never run by themselves --- */

struct work_struct { void (*func)(struct work_struct *work); };
struct delayed_work { struct work_struct work; bool scheduled; };
#define INIT_DELAYED_WORK(w, f) ((w)->work.func = (f))
static inline void schedule_delayed_work(struct delayed_work *work, unsigned long delay) { (void)delay; work->scheduled = true; }
static inline void cancel_delayed_work_sync(struct delayed_work *work) { work->scheduled = false; }

/* --- inodes and dentries --- */

#define S_DEAD 16

struct qstr { u32 len; const unsigned char *name; };
#define QSTR_INIT(n, l) { .len = (l), .name = (const unsigned char *)(n) }

struct super_block {
	u32 s_fsnotify_mask;
	spinlock_t s_inode_list_lock;
	struct list_head s_inodes;
};

struct inode {
	umode_t i_mode;
	u32 i_generation;
	u32 i_fsnotify_mask;
	unsigned int i_flags;
	struct super_block *i_sb;
	struct list_head i_sb_list;
	int count;
	/* fuse_inode */
	u64 nodeid;
	bool bad;
	struct fuse_fsnotify_watch *fsnotify_watch;
	struct dentry *alias;
};

struct dentry { struct inode *inode; int count; struct qstr d_name; };

#define fuse_inode inode
static inline struct inode *get_fuse_inode(struct inode *inode) { return inode; }
static inline u64 get_node_id(struct inode *inode) { return inode->nodeid; }
static inline bool fuse_is_bad(struct inode *inode) { return inode->bad; }

struct inode *new_inode(struct super_block *sb);
void iput(struct inode *inode);
static inline struct inode *igrab(struct inode *inode) { inode->count++; return inode; }
static inline void inode_lock(struct inode *inode) { (void)inode; might_sleep(); }
static inline void inode_unlock(struct inode *inode) { (void)inode; }
static inline void clear_nlink(struct inode *inode) { (void)inode; }
struct dentry *d_find_alias(struct inode *inode);
#define d_find_any_alias d_find_alias
struct dentry *d_alloc(struct dentry *parent, const struct qstr *name);
void dput(struct dentry *dentry);
static inline void d_prune_aliases(struct inode *inode) { (void)inode; might_sleep(); }
static inline void shrink_dcache_sb(struct super_block *sb) { (void)sb; might_sleep(); }
static inline void shrink_dcache_parent(struct dentry *dentry) { (void)dentry; might_sleep(); }

/* --- fs/fuse --- */

struct fuse_conn {
	struct fuse_fsnotify *fsnotify;
	struct rw_semaphore killsb;
	struct list_head mounts;
};
struct fuse_mount {
	struct fuse_conn *fc;
	struct super_block *sb;
	struct list_head fc_entry;
};
struct fuse_arg { unsigned int size; void *value; };
struct fuse_args {
	u64 nodeid;
	u32 opcode;
	bool force, nocreds;
	unsigned int in_numargs, out_numargs;
	struct fuse_arg in_args[1], out_args[1];
};
#define FUSE_ROOT_ID 1
static inline int fuse_simple_request(struct fuse_mount *fm, struct fuse_args *args) { (void)fm, (void)args; return 0; }
struct fuse_conn *get_fuse_conn(struct inode *inode);
struct fuse_mount *get_fuse_mount(struct inode *inode);
struct inode *fuse_ilookup_sb(struct super_block *sb, u64 nodeid);
struct inode *fuse_ilookup(struct fuse_conn *fc, u64 nodeid, struct fuse_mount **fm);
static inline void fuse_invalidate_entry_cache(struct dentry *dentry) { must(dentry->count > 0); }
static inline int fuse_reverse_inval_inode(struct fuse_conn *fc, u64 nodeid, long offset, long length)
{
	(void)nodeid, (void)offset, (void)length;
	must(fc->killsb.readers > 0);
	might_sleep();
	return 0;
}

/* --- fsnotify: <linux/fsnotify_backend.h> --- */

#define FS_ACCESS 0x00000001
#define FS_MODIFY 0x00000002
#define FS_ATTRIB 0x00000004
#define FS_CLOSE_WRITE 0x00000008
#define FS_CLOSE_NOWRITE 0x00000010
#define FS_OPEN 0x00000020
#define FS_MOVED_FROM 0x00000040
#define FS_MOVED_TO 0x00000080
#define FS_CREATE 0x00000100
#define FS_DELETE 0x00000200
#define FS_DELETE_SELF 0x00000400
#define FS_MOVE_SELF 0x00000800
#define FS_OPEN_EXEC 0x00001000
#define FS_EVENT_ON_CHILD 0x08000000
#define FS_RENAME 0x10000000
#define FS_ISDIR 0x40000000
#define FS_MOVE (FS_MOVED_FROM | FS_MOVED_TO)

enum { FSNOTIFY_EVENT_INODE = 1, FSNOTIFY_EVENT_DENTRY };
struct fsnotify_event { struct list_head list; };
struct fsnotify_group {
	struct fsnotify_event *overflow_event;
	spinlock_t notification_lock;
	bool shutdown;
	unsigned int q_len;
	struct list_head notification_list;
	wait_queue_head_t notification_waitq;
	void *fsn_fa;
};
struct fsnotify_mark_connector { spinlock_t lock; struct hlist_head list; };
struct fsnotify_mark {
	struct fsnotify_group *group;
	struct fsnotify_mark_connector *connector;
	struct hlist_node obj_list;
	int count;
};
struct fsnotify_ops {
	int (*handle_inode_event)(struct fsnotify_mark *mark, u32 mask, struct inode *inode, struct inode *dir,
				  const struct qstr *name, u32 cookie);
	void (*free_mark)(struct fsnotify_mark *mark);
};
static inline void kill_fasync(void **fa, int signal, int band) { (void)fa, (void)signal, (void)band; }

int fsnotify(u32 mask, const void *data, int data_type, struct inode *dir, const struct qstr *name,
	     struct inode *inode, u32 cookie);
u32 fsnotify_get_cookie(void);
static inline void fsnotify_inoderemove(struct inode *inode) { must(inode->count > 1); }
struct fsnotify_group *fsnotify_alloc_group(const struct fsnotify_ops *ops, int flags);
static inline void fsnotify_put_group(struct fsnotify_group *group) { free(group); }
static inline void fsnotify_wait_marks_destroyed(void) { }
void fsnotify_init_mark(struct fsnotify_mark *mark, struct fsnotify_group *group);
int fsnotify_add_inode_mark(struct fsnotify_mark *mark, struct inode *inode, int flags);
/* Its arguments differ from series to series */
#define fsnotify_add_mark(mark, ...) add_sb_mark(mark)
int add_sb_mark(struct fsnotify_mark *mark);
void fsnotify_destroy_mark(struct fsnotify_mark *mark, struct fsnotify_group *group);
void fsnotify_put_mark(struct fsnotify_mark *mark);

#endif
