/** Why the daemon cannot start: something the user has to change, said in one line and shown without a stack trace (status 1). */
export class StartError extends Error {}
