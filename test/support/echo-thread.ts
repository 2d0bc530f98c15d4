/** An echo device in a thread of its own, asleep between kicks as a real back end is. */
import { isMainThread, workerData } from 'node:worker_threads';
import { VhostUserBackend, WaitLoop } from 'vhost-user-ts';
import { EchoDevice } from './vhost-user.js';

if (!isMainThread && typeof workerData?.socket === 'number') {
  const loop = new WaitLoop();
  const device = new EchoDevice();
  device.backend = new VhostUserBackend(device, workerData.socket, loop);
  while (device.backend.connected) loop.turn(-1);
  loop.close();
}
