/** Bar charts as SVG. Few lines, and all that is needed here, so no library. */

export interface Bars {
  title: string;
  /** What the numbers are. */
  unit: string;
  /** One per colour. */
  series: string[];
  groups: { label: string; values: (number | undefined)[] }[];
  /** A line to compare with. */
  mark?: number;
  /** Longer bars end here; their number tells how long they are. */
  limit?: number;
}

const WIDTH = 900;
const LEFT = 290;
const RIGHT = 60;
const BAR = 9;
const GAP = 10;
const COLOURS = ['#c2410c', '#1d4ed8', '#60a5fa', '#64748b', '#a3a3a3'];

/** Horizontal bars in groups, from zero. */
export function barChart({ title, unit, series, groups, mark, limit = Number.POSITIVE_INFINITY }: Bars): string {
  const top = 64;
  const groupHeight = series.length * BAR + GAP;
  const bottom = top + groups.length * groupHeight;
  const most = Math.min(limit, Math.max(...groups.flatMap(({ values }) => values.map((value) => value ?? 0)), mark ?? 0));
  const step = niceStep(most);
  const scale = (WIDTH - LEFT - RIGHT) / (Math.ceil(most / step) * step || 1);
  const parts = [text(12, 24, title, 'font-size="15" font-weight="600"')];
  series.forEach((name, i) => {
    const x = 12 + i * 190;
    parts.push(rect(x, 36, 10, 10, COLOURS[i]), text(x + 15, 45, name, 'font-size="11"'));
  });
  for (let value = 0; value <= Math.ceil(most / step) * step + step / 2; value += step) {
    const x = LEFT + value * scale;
    parts.push(line(x, top, bottom, '#e5e7eb'), text(x, bottom + 14, number(value), 'font-size="10" text-anchor="middle" fill="#6b7280"'));
  }
  groups.forEach(({ label, values }, g) => {
    const y = top + g * groupHeight;
    parts.push(text(LEFT - 8, y + (series.length * BAR) / 2 + 4, label, 'font-size="11" text-anchor="end"'));
    values.forEach((value, i) => {
      if (value === undefined) return;
      const at = y + i * BAR;
      const length = Math.min(value, limit) * scale;
      parts.push(rect(LEFT, at, Math.max(1, length), BAR - 1, COLOURS[i]));
      parts.push(text(LEFT + length + 4, at + BAR - 2, number(value), 'font-size="8" fill="#6b7280"'));
    });
  });
  if (mark !== undefined) parts.push(line(LEFT + mark * scale, top, bottom, '#111827'));
  parts.push(text(LEFT, bottom + 32, unit, 'font-size="11" fill="#6b7280"'));
  const height = bottom + 44;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${height}" viewBox="0 0 ${WIDTH} ${height}" font-family="sans-serif">
<rect width="100%" height="100%" fill="#ffffff"/>
${parts.join('\n')}
</svg>
`;
}

/** 1, 2 or 5 times a power of ten, five to ten times in `most`. */
function niceStep(most: number): number {
  const raw = most / 6 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * ([1, 2, 5, 10].find((factor) => factor * power >= raw) ?? 10);
}

const number = (value: number): string => (value >= 100 ? Math.round(value).toLocaleString('en') : Number(value.toPrecision(3)).toString());
const escaped = (words: string): string => words.replaceAll('&', '&amp;').replaceAll('<', '&lt;');
const text = (x: number, y: number, words: string, attributes: string): string =>
  `<text x="${round(x)}" y="${round(y)}" ${attributes}>${escaped(words)}</text>`;
const rect = (x: number, y: number, width: number, height: number, fill: string | undefined): string =>
  `<rect x="${round(x)}" y="${round(y)}" width="${round(width)}" height="${height}" fill="${fill}"/>`;
const line = (x: number, y1: number, y2: number, stroke: string): string =>
  `<line x1="${round(x)}" x2="${round(x)}" y1="${y1}" y2="${y2}" stroke="${stroke}"/>`;
const round = (value: number): number => Math.round(value * 10) / 10;
