// SPDX-License-Identifier: GPL-2.0-only
/*
 * A vhost-user-fs device for the test of the carriers: it serves a handful of
 * files and does with notification queue and lent buffers what the guest tells
 * it to, also what no device should do. A command is a look-up of a name that
 * begins with '!' in the root; its result is the size of the file found.
 *
 * usage: carrier-device [-q SIZE] [-i] [-n] SOCKET
 *   -q: offer the notification queue, with this notify_buf_size
 *   -i: offer indirect descriptors
 *   -n: do not agree to FUSE_HAS_FSNOTIFY
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <linux/fuse.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define HAS_FSNOTIFY2		(1U << 28)
#define INIT_EXT		(1U << 30)
#define OP_FSNOTIFY		2048
#define OP_READ_NOTIFY		2049
#define NOTIFY_FSNOTIFY		128

#define F_NOTIFICATION		(1ULL << 0)
#define F_INDIRECT		(1ULL << 28)
#define F_PROTOCOL		(1ULL << 30)
#define F_VERSION_1		(1ULL << 32)
#define PF_BACKEND_REQ		(1ULL << 5)
#define PF_CONFIG		(1ULL << 9)

struct event {
	uint32_t reclen, flags;
	uint64_t nodeid, child, mask;
	uint32_t generation, child_generation, cookie, namelen;
	char name[];
};

static const struct node {
	uint64_t id;
	uint32_t gen;
	uint64_t parent;
	const char *name;
	mode_t mode;
} nodes[] = {
	{ 1, 0, 0, "", S_IFDIR | 0755 },
	{ 2, 7, 1, "d", S_IFDIR | 0755 },
	{ 3, 9, 2, "f", S_IFREG | 0644 },
	{ 4, 11, 2, "sub", S_IFDIR | 0755 },
	{ 5, 13, 1, "e", S_IFDIR | 0755 },
};

static uint32_t notify_size;
static bool queue_offered, indirect, agree = true;
static uint64_t features;

/* ---------------------------------------------------------------- the rings */

static struct { uint64_t guest, size, user; char *host; } regions[8];
static unsigned nregions;

static void *at(uint64_t addr, uint64_t len, bool user)
{
	for (unsigned i = 0; i < nregions; i++) {
		uint64_t start = user ? regions[i].user : regions[i].guest;

		if (addr >= start && addr + len <= start + regions[i].size)
			return regions[i].host + (addr - start);
	}
	fprintf(stderr, "address %" PRIx64 " is not mapped\n", addr);
	exit(1);
}

#define QUEUES 4
static struct queue {
	unsigned num;
	uint16_t next;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	int kick, call;
} queues[QUEUES] = { [0 ... QUEUES - 1] = { .kick = -1, .call = -1 } };

struct chain {
	uint16_t head;
	struct queue *q;
	struct { char *p; uint32_t len; } out[160], in[160];
	unsigned nout, nin;
};

static bool pop(struct queue *q, struct chain *c)
{
	struct vring_desc *table = q->desc;
	uint16_t i, n;

	if (!q->avail)
		return false;
	/*
	 * User Mode Linux does not tell of a reset: the driver takes back buffers,
	 * and the index, of a queue that is not stopped yet.
	 */
	n = *(volatile uint16_t *)&q->avail->idx - q->next;
	if (!n || n > q->num)
		return false;
	__sync_synchronize();
	c->q = q;
	c->nout = c->nin = 0;
	c->head = i = q->avail->ring[q->next++ % q->num];
	if (table[i].flags & VRING_DESC_F_INDIRECT) {
		table = at(table[i].addr, table[i].len, false);
		i = 0;
	}
	for (;;) {
		char *p = at(table[i].addr, table[i].len, false);

		if (table[i].flags & VRING_DESC_F_WRITE) {
			c->in[c->nin].p = p;
			c->in[c->nin++].len = table[i].len;
		} else {
			c->out[c->nout].p = p;
			c->out[c->nout++].len = table[i].len;
		}
		if (!(table[i].flags & VRING_DESC_F_NEXT))
			break;
		i = table[i].next;
	}
	return true;
}

static void push(struct chain *c, uint32_t len)
{
	struct queue *q = c->q;
	uint64_t one = 1;

	q->used->ring[q->used->idx % q->num].id = c->head;
	q->used->ring[q->used->idx % q->num].len = len;
	__sync_synchronize();
	q->used->idx++;
	__sync_synchronize();
	if (q->call >= 0 && !(q->avail->flags & VRING_AVAIL_F_NO_INTERRUPT) &&
	    write(q->call, &one, sizeof(one)) < 0)
		perror("call");
}

static uint32_t fill(struct chain *c, const void *data, uint32_t len)
{
	uint32_t done = 0;

	for (unsigned i = 0; i < c->nin && done < len; i++) {
		uint32_t n = len - done < c->in[i].len ? len - done : c->in[i].len;

		memcpy(c->in[i].p, (const char *)data + done, n);
		done += n;
	}
	return done;
}

/* ------------------------------------------------------------- notifications */

/* What the guest gave us to write to: queue 1, or chains of FUSE_READ_NOTIFY */
static struct chain lent[64];
static unsigned nlent;
static uint64_t lent_unique[64];

static struct {
	char data[1024];
	uint32_t len, used;		/* used: what to say instead of len; 0: the truth */
	int outer_len, outer_unique, outer_error;	/* lies about a lent buffer's reply */
} pending[4096];
static unsigned first, last;
static long stops, reads;
static uint64_t last_mask[8];
static long keep, deaf, late;

static void flush(void)
{
	struct chain c;

	if (!queues[1].avail)
		return;
	while (first != last) {
		typeof(pending[0]) *m = &pending[first % 4096];

		if (features & F_NOTIFICATION) {
			if (!pop(&queues[1], &c))
				return;
			fill(&c, m->data, m->len);
			push(&c, m->used ? m->used - 1 : m->len);
		} else {
			struct { struct fuse_out_header oh; char data[1024]; } r;

			if (!nlent)
				return;
			r.oh = (struct fuse_out_header){
				sizeof(r.oh) + m->len + m->outer_len, m->outer_error,
				lent_unique[0] + m->outer_unique };
			memcpy(r.data, m->data, m->len);
			c = lent[0];
			memmove(lent, lent + 1, --nlent * sizeof(lent[0]));
			memmove(lent_unique, lent_unique + 1, nlent * sizeof(lent_unique[0]));
			fill(&c, &r, sizeof(r.oh) + m->len);
			push(&c, sizeof(r.oh) + (m->used ? m->used - 1 : m->len));
		}
		first++;
	}
}

static void *message(int code, const void *body, uint32_t len)
{
	typeof(pending[0]) *m = &pending[last++ % 4096];
	struct fuse_out_header oh = { sizeof(oh) + len, code, 0 };

	memset(m, 0, sizeof(*m));
	memcpy(m->data, &oh, sizeof(oh));
	memcpy(m->data + sizeof(oh), body, len);
	m->len = sizeof(oh) + len;
	return m;
}

static void *event(uint64_t node, uint32_t gen, uint64_t mask, uint64_t child, uint32_t child_gen,
		   const char *name)
{
	char buf[512] = "";
	struct event *ev = (void *)buf;

	ev->namelen = strlen(name);
	ev->reclen = (sizeof(*ev) + (ev->namelen ? ev->namelen + 1 : 0) + 7) & ~7U;
	ev->nodeid = node;
	ev->generation = gen;
	ev->mask = mask;
	ev->child = child;
	ev->child_generation = child_gen;
	strcpy(ev->name, name);
	return message(NOTIFY_FSNOTIFY, buf, ev->reclen);
}

static void give_back(int error, unsigned keep_count)
{
	while (nlent > keep_count) {
		struct fuse_out_header oh = { sizeof(oh), error, lent_unique[nlent - 1] };

		fill(&lent[nlent - 1], &oh, sizeof(oh));
		push(&lent[nlent - 1], sizeof(oh));
		nlent--;
	}
}

/* Everything a device can do wrong in one notification */
static void malformed(int kind)
{
	typeof(pending[0]) *m = event(2, 7, 0x100, 0, 0, "bad");
	struct fuse_out_header *oh = (void *)m->data;
	struct event *ev = (void *)(m->data + sizeof(*oh));

	switch (kind) {
	case 0: m->used = 1; break;			/* nothing written */
	case 1: m->used = 1 + 8; break;			/* half a header */
	case 2: oh->len += 8; break;
	case 3: oh->len -= 8; break;
	case 4: m->used = 0xffffffff; break;		/* more than the buffer has */
	case 5: m->used = 1 + 65537; break;
	case 6: oh->unique = 2; break;
	case 7: oh->error = 0; break;
	case 8: oh->error = FUSE_NOTIFY_RETRIEVE; break;
	case 9: oh->error = 7; break;			/* RESEND */
	case 10: oh->error = -5; break;
	case 11: ev->reclen = 0; break;
	case 12: ev->reclen = 0xfffffff8; break;
	case 13: ev->namelen = 0xffff; break;
	case 14: m->used = 1 + sizeof(*oh); oh->len = sizeof(*oh); break;
	case 15: m->outer_len = 8; break;		/* lent buffers only */
	case 16: m->outer_len = -16; break;
	case 17: m->outer_unique = 1; break;
	case 18: oh->error = FUSE_NOTIFY_STORE; break;
	case 19: oh->error = FUSE_NOTIFY_INVAL_ENTRY; break;
	case 20: oh->error = FUSE_NOTIFY_DELETE; break;
	case 21: oh->error = FUSE_NOTIFY_POLL; break;
	case 22: oh->error = FUSE_NOTIFY_INVAL_INODE; break;
	case 23: oh->error = 9; break;			/* PRUNE */
	}
}

/* A command from the guest; its result */
static long command(const char *s)
{
	char name[300] = "", body[512];
	unsigned long long node = 0, mask = 0, child = 0;
	unsigned gen = 0, child_gen = 0;
	long n = 0;

	if (sscanf(s, "!ev,%llu,%u,%llx,%llu,%u,%299s", &node, &gen, &mask, &child, &child_gen,
		   name) >= 3) {
		event(node, gen, mask, child, child_gen, name);
	} else if (sscanf(s, "!burst,%ld", &n) == 1) {
		for (long i = 0; i < n; i++) {
			sprintf(name, "b%ld", i);
			event(2, 7, 0x100, 0, 0, name);
		}
	} else if (!strcmp(s, "!over")) {
		struct event ev = { .reclen = sizeof(ev), .flags = 1 };

		message(NOTIFY_FSNOTIFY, &ev, sizeof(ev));
	} else if (sscanf(s, "!bad,%ld", &n) == 1) {
		malformed(n);
	} else if (sscanf(s, "!inval,%llu", &node) == 1) {
		struct fuse_notify_inval_inode_out o = { .ino = node, .off = 0, .len = 0 };

		message(FUSE_NOTIFY_INVAL_INODE, &o, sizeof(o));
	} else if (sscanf(s, "!entry,%llu,%299s", &node, name) == 2) {
		struct fuse_notify_inval_entry_out o = { .parent = node, .namelen = strlen(name) };

		memcpy(body, &o, sizeof(o));
		strcpy(body + sizeof(o), name);
		message(FUSE_NOTIFY_INVAL_ENTRY, body, sizeof(o) + o.namelen + 1);
	} else if (sscanf(s, "!delete,%llu,%llu,%299s", &node, &child, name) == 3) {
		struct fuse_notify_delete_out o = { .parent = node, .child = child,
						    .namelen = strlen(name) };

		memcpy(body, &o, sizeof(o));
		strcpy(body + sizeof(o), name);
		message(FUSE_NOTIFY_DELETE, body, sizeof(o) + o.namelen + 1);
	} else if (!strcmp(s, "!lent")) {
		n = nlent;
		if (features & F_NOTIFICATION)
			n = (uint16_t)(queues[1].avail->idx - queues[1].next);
		return n;
	} else if (!strcmp(s, "!pending")) {
		return last - first;
	} else if (!strcmp(s, "!stops")) {
		return stops;
	} else if (!strcmp(s, "!reads")) {
		return reads;
	} else if (sscanf(s, "!mask,%llu", &node) == 1) {
		return last_mask[node % 8];
	} else if (sscanf(s, "!keep,%ld", &keep) == 1 || sscanf(s, "!deaf,%ld", &deaf) == 1 ||
		   sscanf(s, "!late,%ld", &late) == 1) {
	} else if (sscanf(s, "!fail,%ld", &n) == 1) {
		if (nlent)
			give_back(-n, nlent - 1);
	} else if (sscanf(s, "!giveback,%ld", &n) == 1) {
		give_back(-n, 0);
	} else {
		return -1;
	}
	return 0;
}

/* --------------------------------------------------------------------- FUSE */

static void fill_attr(struct fuse_attr *attr, uint64_t id, mode_t mode)
{
	attr->ino = id;
	attr->mode = mode;
	attr->nlink = S_ISDIR(mode) ? 2 : 1;
	attr->blksize = 4096;
}

static long lookups;

static void serve(struct chain *c)
{
	static char buf[1 << 16];
	struct { struct fuse_out_header oh; char data[4096]; } r = {};
	struct fuse_in_header *h = (void *)buf;
	void *arg = buf + sizeof(*h);
	struct fuse_entry_out *entry = (void *)r.data;
	struct fuse_attr_out *attr = (void *)r.data;
	const struct node *node = NULL;
	uint32_t len = 0;
	int error = 0;

	for (unsigned i = 0, n = 0; i < c->nout && n + c->out[i].len < sizeof(buf); i++) {
		memcpy(buf + n, c->out[i].p, c->out[i].len);
		n += c->out[i].len;
	}
	for (size_t i = 0; i < sizeof(nodes) / sizeof(nodes[0]); i++)
		if (nodes[i].id == h->nodeid)
			node = &nodes[i];

	switch (h->opcode) {
	case FUSE_INIT: {
		struct fuse_init_in *in = arg;
		struct fuse_init_out *out = (void *)r.data;

		give_back(-ENODEV, 0);
		first = last;
		out->major = 7;
		out->minor = 36;
		out->max_write = 65536;
		out->max_background = 8;
		out->congestion_threshold = 6;
		if (agree && (in->flags & INIT_EXT) && (in->flags2 & HAS_FSNOTIFY2)) {
			out->flags = INIT_EXT;
			out->flags2 = HAS_FSNOTIFY2;
		}
		len = sizeof(*out);
		break;
	}
	case FUSE_LOOKUP: {
		const char *name = arg;
		long result;

		if (name[0] == '!') {
			result = command(name);
			if (result < 0) {
				error = -ENOENT;
				break;
			}
			entry->nodeid = 100;
			fill_attr(&entry->attr, 100, S_IFREG | 0644);
			entry->attr_valid = 100000;
			entry->attr.size = result;
			len = sizeof(*entry);
			break;
		}
		error = -ENOENT;
		lookups++;
		for (size_t i = 0; i < sizeof(nodes) / sizeof(nodes[0]); i++) {
			if (nodes[i].parent == h->nodeid && !strcmp(nodes[i].name, name)) {
				error = 0;
				entry->nodeid = nodes[i].id;
				entry->generation = nodes[i].gen;
				entry->entry_valid = entry->attr_valid = 100000;
				fill_attr(&entry->attr, nodes[i].id, nodes[i].mode);
				entry->attr.mtime = lookups;
				len = sizeof(*entry);
			}
		}
		break;
	}
	case FUSE_GETATTR:
		if (h->nodeid == 100) {
			fill_attr(&attr->attr, 100, S_IFREG | 0644);
		} else if (node) {
			attr->attr_valid = 100000;
			fill_attr(&attr->attr, node->id, node->mode);
			attr->attr.mtime = ++lookups;
		} else {
			error = -ENOENT;
		}
		len = error ? 0 : sizeof(*attr);
		break;
	case OP_FSNOTIFY: {
		uint64_t *out = (void *)r.data;

		last_mask[h->nodeid % 8] = *(uint64_t *)arg;
		out[0] = *(uint64_t *)arg;
		out[1] = 0xfff;
		len = 16;
		break;
	}
	case OP_READ_NOTIFY: {
		uint32_t *in = arg;

		if (in[1] & 1) {
			stops++;
			if (!keep && !deaf)
				give_back(-ENODEV, 0);
			if (deaf)
				return;		/* never answered */
			break;
		}
		reads++;
		if (nlent < 64) {
			lent[nlent] = *c;
			lent_unique[nlent++] = h->unique;
		}
		return;
	}
	case FUSE_OPEN:
	case FUSE_OPENDIR:
		len = sizeof(struct fuse_open_out);
		break;
	case FUSE_STATFS:
		len = sizeof(struct fuse_statfs_out);
		break;
	case FUSE_READ:
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
	case FUSE_FLUSH:
		break;
	case FUSE_DESTROY:
		if (!keep)
			give_back(-ENODEV, 0);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
		push(c, 0);
		return;
	default:
		error = -ENOSYS;
	}
	r.oh = (struct fuse_out_header){ sizeof(r.oh) + len, error, h->unique };
	fill(c, &r, sizeof(r.oh) + len);
	push(c, sizeof(r.oh) + len);
	/* A notification when there is no session any more */
	if (h->opcode == FUSE_DESTROY && late) {
		for (int i = 0; i < late; i++)
			event(2, 7, 0x100, 0, 0, "late");
		late = 0;
	}
}

/* --------------------------------------------------------------- vhost-user */

struct vu_msg {
	uint32_t request, flags, size;
	union {
		uint64_t u64;
		struct { uint32_t index, num; } state;
		struct { uint32_t index, flags; uint64_t desc, used, avail, log; } addr;
		struct {
			uint32_t num, padding;
			struct { uint64_t guest, size, user, offset; } region[8];
		} mem;
		struct { uint32_t offset, size, flags; uint8_t data[256]; } config;
	} p;
} __attribute__((packed));

static bool control(int sock)
{
	char space[CMSG_SPACE(8 * sizeof(int))];
	struct vu_msg m;
	struct iovec iov = { &m, 12 };
	struct msghdr mh = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = space,
			     .msg_controllen = sizeof(space) };
	int fds[8], nfds = 0;
	bool reply = false;

	memset(&m, 0, sizeof(m));
	if (recvmsg(sock, &mh, MSG_CMSG_CLOEXEC) < 12)
		return false;
	for (struct cmsghdr *cm = CMSG_FIRSTHDR(&mh); cm; cm = CMSG_NXTHDR(&mh, cm)) {
		nfds = (cm->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(cm), nfds * sizeof(int));
	}
	if (m.size && recv(sock, &m.p, m.size, MSG_WAITALL) != (ssize_t)m.size)
		return false;

	switch (m.request) {
	case 1: /* GET_FEATURES */
		m.p.u64 = F_VERSION_1 | F_PROTOCOL | (queue_offered ? F_NOTIFICATION : 0) |
			  (indirect ? F_INDIRECT : 0);
		m.size = 8;
		reply = true;
		break;
	case 2: /* SET_FEATURES */
		features = m.p.u64;
		break;
	case 15: /* GET_PROTOCOL_FEATURES */
		m.p.u64 = PF_CONFIG | PF_BACKEND_REQ;
		m.size = 8;
		reply = true;
		break;
	case 5: /* SET_MEM_TABLE */
		for (nregions = 0; nregions < m.p.mem.num && nregions < (unsigned)nfds; nregions++) {
			unsigned i = nregions;

			regions[i].guest = m.p.mem.region[i].guest;
			regions[i].size = m.p.mem.region[i].size;
			regions[i].user = m.p.mem.region[i].user;
			regions[i].host = mmap(NULL, regions[i].size, PROT_READ | PROT_WRITE, MAP_SHARED,
					       fds[i], m.p.mem.region[i].offset);
			if (regions[i].host == MAP_FAILED) {
				perror("mmap");
				exit(1);
			}
		}
		break;
	case 8: /* SET_VRING_NUM */
		queues[m.p.state.index % QUEUES].num = m.p.state.num;
		break;
	case 9: { /* SET_VRING_ADDR */
		struct queue *q = &queues[m.p.addr.index % QUEUES];

		q->desc = at(m.p.addr.desc, 16 * q->num, true);
		q->avail = at(m.p.addr.avail, 4 + 2 * q->num, true);
		q->used = at(m.p.addr.used, 4 + 8 * q->num, true);
		break;
	}
	case 10: /* SET_VRING_BASE */
		queues[m.p.state.index % QUEUES].next = m.p.state.num;
		break;
	case 11: /* GET_VRING_BASE */
		m.p.state.num = queues[m.p.state.index % QUEUES].next;
		queues[m.p.state.index % QUEUES].avail = NULL;
		reply = true;
		break;
	case 12: /* SET_VRING_KICK */
		queues[m.p.u64 % QUEUES].kick = nfds ? fds[0] : -1;
		break;
	case 13: /* SET_VRING_CALL */
		queues[m.p.u64 % QUEUES].call = nfds ? fds[0] : -1;
		break;
	case 18: /* SET_VRING_ENABLE; User Mode Linux stops its queues with it */
		if (!m.p.state.num) {
			queues[m.p.state.index % QUEUES].avail = NULL;
			nlent = 0;
		}
		break;
	case 24: { /* GET_CONFIG */
		uint8_t config[256] = "carrier";
		uint32_t one = 1;

		memcpy(config + 36, &one, 4);
		memcpy(config + 40, &notify_size, 4);
		if (m.p.config.offset + m.p.config.size > 256)
			return false;
		memcpy(m.p.config.data, config + m.p.config.offset, m.p.config.size);
		reply = true;
		break;
	}
	}
	if (reply) {
		m.flags = 1 | 4;
		if (send(sock, &m, 12 + m.size, 0) < 0)
			return false;
	}
	return true;
}

int main(int argc, char **argv)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	struct chain c;
	int opt, listener, sock;

	while ((opt = getopt(argc, argv, "q:in")) != -1) {
		switch (opt) {
		case 'q': queue_offered = true; notify_size = atoi(optarg); break;
		case 'i': indirect = true; break;
		case 'n': agree = false; break;
		default: return 2;
		}
	}
	if (optind >= argc)
		return 2;
	strncpy(sa.sun_path, argv[optind], sizeof(sa.sun_path) - 1);
	listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	unlink(sa.sun_path);
	if (bind(listener, (void *)&sa, sizeof(sa)) || listen(listener, 1)) {
		perror(sa.sun_path);
		return 1;
	}
	printf("ready\n");
	fflush(stdout);
	sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

	for (;;) {
		struct pollfd p[1 + QUEUES] = { { sock, POLLIN, 0 } };
		unsigned first_req = features & F_NOTIFICATION ? 2 : 1;

		for (int i = 0; i < QUEUES; i++)
			p[1 + i] = (struct pollfd){ queues[i].kick, POLLIN, 0 };
		if (poll(p, 1 + QUEUES, -1) < 0)
			continue;
		if (p[0].revents && !control(sock))
			return 0;
		for (unsigned i = 0; i < QUEUES; i++) {
			uint64_t n;

			if (!(p[1 + i].revents & POLLIN))
				continue;
			if (read(queues[i].kick, &n, sizeof(n)) < 0)
				continue;
			/* What stops a queue comes first */
			struct pollfd more = { sock, POLLIN, 0 };

			while (poll(&more, 1, 0) > 0)
				if (!control(sock))
					return 0;
			if (i == 0 || i >= first_req)
				while (pop(&queues[i], &c))
					serve(&c);
		}
		flush();
	}
}
