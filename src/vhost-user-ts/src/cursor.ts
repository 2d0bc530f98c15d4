/**
 * The one place where a peer's bytes become numbers: every bound is checked here and nowhere else.
 *
 * Reading past the end is the peer's doing, so it is a value: the read gives 0, `overrun` becomes true and stays true, and
 * a decoder looks at it once, at its end. Writing past the end is our own mistake and throws.
 * All numbers are little-endian (vhost-user says native byte order, virtio 1.x little-endian: the same on every machine that runs this).
 */
export class Cursor {
  private readonly view: DataView;
  /** Where the next byte is read or written, from the start of the cursor's part. */
  position = 0;
  /** Whether a read went past the end. */
  overrun = false;

  /** Over `length` bytes of `bytes` from `offset`; a part that does not lie within `bytes` throws RangeError. */
  constructor(bytes: Uint8Array, offset = 0, length = bytes.byteLength - offset) {
    if (offset < 0 || length < 0 || offset + length > bytes.byteLength) throw new RangeError('a cursor beyond its buffer');
    this.view = new DataView(bytes.buffer, bytes.byteOffset + offset, length);
  }

  /** Bytes from the position to the end. */
  get left(): number {
    return this.view.byteLength - this.position;
  }

  u8(): number {
    return this.take(1) ? this.view.getUint8(this.position - 1) : 0;
  }

  u16(): number {
    return this.take(2) ? this.view.getUint16(this.position - 2, true) : 0;
  }

  u32(): number {
    return this.take(4) ? this.view.getUint32(this.position - 4, true) : 0;
  }

  u64(): bigint {
    return this.take(8) ? this.view.getBigUint64(this.position - 8, true) : 0n;
  }

  /** A copy of the next `length` bytes (empty after an overrun). */
  bytes(length: number): Uint8Array {
    if (!this.take(length)) return new Uint8Array(0);
    return new Uint8Array(this.view.buffer, this.view.byteOffset + this.position - length, length).slice();
  }

  skip(length: number): void {
    this.take(length);
  }

  putU8(value: number): void {
    this.view.setUint8(this.position, value);
    this.position += 1;
  }

  putU16(value: number): void {
    this.view.setUint16(this.position, value, true);
    this.position += 2;
  }

  putU32(value: number): void {
    this.view.setUint32(this.position, value, true);
    this.position += 4;
  }

  putU64(value: bigint): void {
    this.view.setBigUint64(this.position, value, true);
    this.position += 8;
  }

  putBytes(bytes: Uint8Array): void {
    if (bytes.length > this.left) throw new RangeError('a write beyond the cursor');
    new Uint8Array(this.view.buffer, this.view.byteOffset + this.position, bytes.length).set(bytes);
    this.position += bytes.length;
  }

  /** Writes `length` zero bytes: padding, whose old content must not reach the peer. */
  putZeros(length: number): void {
    if (length > this.left) throw new RangeError('a write beyond the cursor');
    new Uint8Array(this.view.buffer, this.view.byteOffset + this.position, length).fill(0);
    this.position += length;
  }

  private take(length: number): boolean {
    if (this.overrun || length < 0 || length > this.left) {
      this.overrun = true;
      return false;
    }
    this.position += length;
    return true;
  }
}
