/** Reads a daemon's metrics (`--metrics=unix:PATH`). */
import { get } from 'node:http';

/** Samples by their name with labels, as `virtiofsd_requests_total{opcode="LOOKUP"}`. */
export async function readMetrics(socketPath: string): Promise<Map<string, number>> {
  const text = await new Promise<string>((resolve, reject) => {
    const request = get({ socketPath, path: '/metrics' }, (response) => {
      let body = '';
      response.setEncoding('utf8');
      response.on('data', (data: string) => {
        body += data;
      });
      response.on('end', () => resolve(body));
    });
    request.on('error', reject);
  });
  const samples = new Map<string, number>();
  for (const line of text.split('\n')) {
    const space = line.lastIndexOf(' ');
    if (line !== '' && !line.startsWith('#')) samples.set(line.slice(0, space), Number(line.slice(space + 1)));
  }
  return samples;
}
