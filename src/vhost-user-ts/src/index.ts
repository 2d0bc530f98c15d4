/** vhost-user for Node.js: see README.md. */
export * from './backend.js';
export * from './busyloop.js';
export * from './chain.js';
export * from './connection.js';
export * from './cursor.js';
export * from './fd.js';
export * from './frontend.js';
export * from './ledger.js';
export * from './loop.js';
export * from './memory.js';
export * from './message.js';
export * from './virtqueue.js';
