/** Medians and their spread. */

export interface Spread {
  median: number;
  /** Half of the distance from the least to the greatest, as a part of the median. */
  spread: number;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const upper = sorted[middle] ?? 0;
  return sorted.length % 2 === 1 ? upper : ((sorted[middle - 1] ?? 0) + upper) / 2;
}

export function spreadOf(values: readonly number[]): Spread {
  const middle = median(values);
  return { median: middle, spread: middle === 0 ? 0 : (Math.max(...values) - Math.min(...values)) / 2 / middle };
}
